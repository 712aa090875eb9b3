"""One node of a circuit, looked at: choose it or click it in the graph.

What it shows comes from `kcwb.reading.nodes`; the results are attributes of the panel, so that a notebook can go on
with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import pandas as pd

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.errors import CircuitError, SettingError, nearest
from kcwb.interventions.nodes import ablate_nodes, ablation_summary
from kcwb.models.loading import Model
from kcwb.progress import ProgressCallback
from kcwb.reading.nodes import attention_pattern, component_logits, node_edges
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.workbench import tables
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.playing import Playing
from kcwb.workbench.panels.results import SCORE, title
from kcwb.workbench.panels.runner import Job, Latest
from kcwb.workbench.panels.widgets import brief, button, dropdown, hidden_graph, numbered, room, rows
from kcwb.workbench.plots import picture, plot_attention, plot_bars

_MOST_TOKENS = 40  # of a prompt, in a picture of attention
_CIRCUIT, _MODEL = "circuit", "model"


@dataclass(frozen=True)
class _Look:
    """What is found out about the first node on a prompt, for what was asked then."""

    asked: tuple[object, ...]
    pattern: pd.DataFrame | None
    tokens: pd.DataFrame


class NodePanel(Panel):
    """Look at one node: where it attends, what it writes, what it is joined to, and what goes without it.

    Parameters
    ----------
    model
        The model.
    circuit, task
        A circuit, and what it was found on; without a task only its edges can be shown.
    node
        What to start with: the name of a node.
    k
        How many tokens of a node's output are shown.
    roles
        The table of `kcwb.head_roles`: a head's role is said beside its name, and colours the graph.
    graph
        Whether to draw the circuit's graph above, to be clicked in.
    height
        Of the graph, in pixels.

    Attributes
    ----------
    nodes
        The chosen nodes; the first is looked at, all are ablated.
    pattern
        `attention_pattern` of the node; None where it is no head.
    tokens
        `component_logits` of the node.
    edges
        `node_edges` of the node.
    ablated
        `ablate_nodes` of the nodes, once asked for.

    Raises
    ------
    CircuitError, SettingError
        If the circuit or the task belong to another model, or the node is not the model's.

    Examples
    --------
    >>> panel = NodePanel(model, circuit, task, node="a14.h5")  # doctest: +SKIP
    >>> panel.wait(); panel.tokens  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        circuit: Circuit | None = None,
        task: Task | None = None,
        *,
        node: str | None = None,
        k: int = 10,
        roles: pd.DataFrame | None = None,
        graph: bool = True,
        height: int = 560,
    ) -> None:
        if not 1 <= k <= model.network.d_vocab:
            raise SettingError(f"k={k}: the vocabulary has {model.network.d_vocab:,} tokens; ask for 1 to that many.")
        super().__init__(model, button("Ablate it", "scissors", width=120))
        self.circuit, self.task, self.roles = circuit, task, roles
        self.nodes: tuple[str, ...] = ()
        self.pattern: pd.DataFrame | None = None
        self.tokens: pd.DataFrame | None = None
        self.edges: pd.DataFrame | None = None
        self.ablated: pd.DataFrame | None = None
        self._k = k
        self._cut = Latest[Ablation]()
        words = {"description": "Node", "placeholder": "click one in the graph, or type its name"}
        self._node = W.Combobox(ensure_option=False, continuous_update=False, layout=room(205), **words)
        self._where = dropdown("In", [("the circuit alone", _CIRCUIT), ("the full model", _MODEL)], _CIRCUIT)
        self._prompt = dropdown("Prompt", [], None, least=400)
        self._heading, self._joined, self._gone = W.HTML(), W.HTML(), W.HTML()
        self._graph, self._playing = hidden_graph(height) if graph else None, None
        beside = {"flex": "1 1 330px", "min_width": "0"}
        self._attention, self._writes = W.HTML(layout=beside), W.HTML(layout=beside)
        if self._graph is not None:
            self._on(self._graph, lambda change: self.select(*change["new"]) if change["new"] else None, "selected")
            self._playing = Playing(self, self._graph, lambda: (self.circuit, self.task))
        for widget in (self._where, self._prompt):
            self._on(widget, lambda _: self._look())
        self._on(self._node, lambda change: self.select(*change["new"].replace(",", " ").split()))
        wrapped = W.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="2px 28px", width="100%")
        self._assemble(
            *([] if self._graph is None else [self._graph]),
            *rows([self._node, self._where, self._prompt], [self._run_button, *self._progress]),
            self._message,
            self._heading,
            self._gone,
            W.HBox([self._attention, self._writes], layout=wrapped),
            self._joined,
        )
        self.show(circuit, task, roles)
        if node is not None:
            self.select(node)

    # --- in a script ---

    @property
    def settings(self) -> dict[str, Any]:
        """What is looked at."""
        return {"nodes": self.nodes, "in": self._where.value, "prompt": self._prompt.value}

    def show(self, circuit: Circuit | None, task: Task | None, roles: pd.DataFrame | None = None) -> None:
        """Go over to another circuit, with its heads' roles if they are known, and look at the same node in it."""
        if circuit is not None:
            check_same_model(self.model, circuit)
        if task is not None:
            check_same_weights(self.model, task)
        with self._silently():
            same = task is not None and task is self.task and self._prompt.options
            if self._where.disabled or circuit is None:  # there was none, or is none: then the choice was not made
                self._where.value = _MODEL if circuit is None else _CIRCUIT
            self.circuit, self.task, self.roles, self.ablated = circuit, task, roles, None
            if self._graph is not None and circuit is not None:
                self._graph.show(circuit, roles=roles, title=title(circuit))
                self._graph.selected = list(self.nodes)
                self._graph.layout.display = ""
            inside = [] if circuit is None else circuit.nodes.sort_values("score", ascending=False)["node"].tolist()
            self._node.options = inside or self.model.graph.node_names
            self._where.disabled = circuit is None
            if not same:
                self._prompt.options = _prompt_options(task)
                self._prompt.value = None if task is None else int(task.val.ranks.argmin())  # the fact known best
            self._draw_ablation()
        self._look()

    def select(self, *nodes: str) -> None:
        """Look at a node, in letters of any case (the first; more are for `ablate`); returns at once, see `wait`.

        Raises
        ------
        CircuitError
            If the model has no such node.
        """
        known = self.model.graph.node_names
        nodes = tuple(dict.fromkeys(name.strip().lower() for name in nodes))
        for name in nodes:
            if name not in known:
                raise CircuitError(f"{self.model.name} has no node {brief(name, 60)!r}. {_near(name, known)}")
        self._message.value = ""
        with self._silently():
            if nodes != self.nodes:
                self.ablated = None
            self.nodes = nodes
            self._node.value = ", ".join(self.nodes)
            if self._graph is not None and self._graph.circuit is not None:
                self._graph.selected = list(self.nodes)
            self._draw_ablation()
        self._look()

    def ablate(self) -> None:
        """Ablate the chosen nodes in the full model and in the circuit; returns at once, see `wait`."""
        self.run()

    def to_html(self) -> str:
        """The panel's state drawn plainly, for pages without widgets; every text in it is escaped."""
        drawn = "" if self._graph is None else self._graph._repr_html_()
        parts = (self._message, self._heading, self._attention, self._writes, self._joined, self._gone)
        return tables.styled(drawn, *(part.value for part in parts))

    # --- events ---

    def _look(self) -> None:
        """Draw what is known at once, and find out the rest."""
        with self._silently():
            self.pattern = self.tokens = None
            node = self.nodes[0] if self.nodes else None
            self.edges = None if node is None or self.circuit is None else node_edges(self.circuit, node)
            self._run_button.disabled = node is None or self.task is None
            self._draw_edges()
            self._attention.value = self._writes.value = ""
            self._heading.value = tables.styled(self._heading_of())
        self._tell_stopped("look")
        if node is None or self.task is None:
            self._runner.cancel()
        else:
            self._start("look", self._looking(self.task, node), self._draw_look)

    # --- work; on the worker ---

    def _asked(self) -> tuple[object, ...]:
        return self.nodes, self._prompt.value, self._where.value, self.circuit, self.task

    def _looking(self, task: Task, node: str) -> Job:
        """The job that looks at the first node with the settings on screen."""
        split, row = _prompt_of(task, self._prompt.value or 0)
        circuit = self.circuit if self._where.value == _CIRCUIT else None
        asked = self._asked()

        def job(progress: ProgressCallback) -> _Look:
            self._enter(f"Looking at {node}", progress)
            more: dict[str, Any] = {"prompt": row, "circuit": circuit}
            if circuit is not None:
                kind = circuit.ablation
                key = (self.model.digest, task, kind)
                more["ablation"] = self._cut.get(key, lambda: make_ablation(self.model, task, kind))
                progress(1, 3, "")
            head = self.model.graph.node(node).kind == "head"
            pattern = attention_pattern(self.model, split, node, **more) if head else None
            progress(2, 3, "")
            return _Look(asked, pattern, component_logits(self.model, split, node, k=self._k, **more))

        return job

    def _job(self) -> Job:
        circuit, task, nodes = self.circuit, self.task, self.nodes
        if not nodes:
            raise SettingError("Choose a node first: click one in the graph, or type its name.")
        if task is None:
            raise SettingError("The facts that this circuit was found on are not at hand, so there is nothing to ask.")
        if "logits" in nodes:
            raise SettingError("logits is where the answer is read; choose another node to ablate.")
        look = self._looking(task, nodes[0]) if self.tokens is None else None  # which this would supersede

        def job(progress: ProgressCallback) -> tuple[_Look | None, tuple[object, ...], pd.DataFrame]:
            looked = None if look is None else look(progress)
            self._enter(f"Ablating {brief(', '.join(nodes), 60)}", progress)
            return looked, (circuit, task, nodes), ablate_nodes(self.model, circuit, task, nodes, progress=progress)

        return job

    # --- drawing ---

    def _take(self, result: tuple[_Look | None, tuple[object, ...], pd.DataFrame]) -> dict[str, str]:
        look, asked, ablated = result
        if look is not None:
            self._draw_look(look)
        if asked == (self.circuit, self.task, self.nodes):
            self.ablated = ablated
            self._draw_ablation()
        if self._playing is not None:
            self._playing.resume("ablate it")
        return {}

    def _heading_of(self) -> str:
        if not self.nodes:
            return tables.muted("Click a node in the graph, or choose one above.")
        node = self.nodes[0]
        place = self.model.graph.node(node)
        words = {"head": f"head {place.head} of layer {place.layer}", "mlp": f"the MLP of layer {place.layer}"}
        said = [f"{node}: {words.get(place.kind, place.kind)}", *self._role_of(node)]
        if self.circuit is not None and self.edges is not None:
            counts = self.edges["direction"].value_counts()
            joined = f"edges: {counts.get('in', 0):,} in, {counts.get('out', 0):,} out"
            said.append(joined if len(self.edges) else "not in this circuit")
        if len(self.nodes) > 1:
            said.append(f"also chosen, to be ablated together: {brief(', '.join(self.nodes[1:]))}")
        without = [] if self.task else [tables.muted("The facts of this circuit are not at hand; only its edges are.")]
        return "".join([tables.summary(" · ".join(said)), *without])

    def _role_of(self, node: str) -> list[str]:
        known = None if self.roles is None else self.roles[self.roles["node"] == node]
        if known is None or known.empty:
            return []
        row = known.iloc[0]
        return [f"{row['role']}: {row['D_S']:+.2f} logits from the subject, {row['D_R']:+.2f} from the relation"]

    def _draw_edges(self) -> None:
        sides = [] if self.edges is None else self.edges.groupby("direction")  # in, out
        drawn = [tables.table(side, SCORE, scroll=True) for _, side in sides]
        self._joined.value = tables.styled(tables.heading("Edges"), *drawn) if drawn else ""

    def _draw_look(self, look: _Look) -> None:
        if look.asked != self._asked():
            return
        self.pattern, self.tokens = look.pattern, look.tokens
        where = "in the circuit alone" if self._where.value == _CIRCUIT else "in the full model"
        if look.pattern is not None:
            self._attention.value = tables.styled(_attention_html(look.pattern, self.nodes[0], where))
        self._writes.value = tables.styled(_writes_html(look.tokens, where))
        if self._playing is not None:
            self._playing.resume("look")

    def _draw_ablation(self) -> None:
        names = brief(", ".join(self.nodes), 80)
        self._gone.value = "" if self.ablated is None else tables.styled(_ablation_html(self.ablated, names))


def _attention_html(pattern: pd.DataFrame, node: str, where: str) -> str:
    seen = pattern.iloc[-_MOST_TOKENS:, -_MOST_TOKENS:]
    drawn = picture(plot_attention(seen, title=node), f"Where {node} attends")
    left_out = f" The last {len(seen)} of {len(pattern):,} tokens." if len(seen) < len(pattern) else ""
    note = tables.muted(f"Each row is a token and where it attends, {where}.{left_out}")
    return tables.heading("Attention") + drawn + note


def _writes_html(tokens: pd.DataFrame, where: str) -> str:
    shown = tokens.assign(token=tokens["token"].map(repr), answer=tokens["answer"].map({True: "the answer", False: ""}))
    shown = shown.drop(columns=["token_id", "logit"]).rename(columns={"above_mean": "adds, in logits", "answer": ""})
    note = tables.muted(f"What its output at END adds to tokens' logits, above the mean over all tokens, {where}.")
    return tables.heading("Writes") + tables.table(shown) + note


def _ablation_html(ablated: pd.DataFrame, names: str) -> str:
    summary = ablation_summary(ablated)
    facts = ablated[ablated["split"] == "D_val"]
    ranks = facts.pivot(index=["prompt", "answer"], columns=["run", "state"], values="rank")
    ranks = ranks[[(run, state) for run in dict.fromkeys(facts["run"]) for state in ("before", "after")]]
    ranks.columns = [f"{run}, {state}" for run, state in ranks.columns]
    bars = plot_bars(summary, "run", "hit", hue="state", column="split", label="Hit@10")
    return "".join(
        [
            tables.heading(f"Without {names}"),
            picture(bars, f"Hit@10 before and after {names} is ablated"),
            tables.table(summary.rename(columns={"hit": "Hit@10", "rank": "median rank", "loss": "nll"})),
            tables.heading("Rank of the answer, D_val"),
            tables.table(ranks.reset_index(), scroll=True),
        ]
    )


def _near(name: str, known: tuple[str, ...]) -> str:
    words = nearest(name[:60], known)
    return words if words.startswith("Did") else "Nodes are input, a<layer>.h<head>, m<layer> and logits."


def _prompt_options(task: Task | None) -> list[tuple[str, int]]:
    """All prompts of D_val, then of D_test."""
    if task is None:
        return []
    splits = (("D_val", task.val), ("D_test", task.test))
    lines = [
        f"{split}: {text} … {fact.object} (rank {rank:,})"
        for split, prompts in splits
        for text, fact, rank in zip(prompts.texts, prompts.facts, prompts.ranks.tolist(), strict=True)
    ]
    return numbered(lines)


def _prompt_of(task: Task, number: int) -> tuple[Prompts, int]:
    """The split and the row of one of `_prompt_options`."""
    return (task.val, number) if number < len(task.val) else (task.test, number - len(task.val))
