"""The circuit before and after an edit, and which way the edit takes to the answer.

Knowledge Circuits (arXiv 2405.17969) claims that ROME acts through the circuit (the new object is written at the
subject and carried to END by mover heads), and that FT-M writes straight at the edited layer, whatever the circuit
does. Measured here, for one edit that turns the old object into the new one:

- **circuits** of the same size on the fact's own prompt: for the old object before the edit, and for the new one after
  it. They also differ because they answer differently, so two more stand beside them: the unedited model's circuit for
  the new object, and its circuit for the old object in other words (the paraphrase null). With `circuit_draws` each is
  an ensemble (`kcwb.studies.fact_circuits`), all four of the same draws: what differs between two of them is then no
  accident of size, selection or reference prompts, and edges, nodes and heads count by their pi;
- **layers**: where the edges are that only one of the two circuits has. An edge counts half for each of its ends, so
  that shares add up to 1; beside it stands the layer's share of the circuits' nodes;
- **lens**: rank and probability of both objects after each layer, at END and at the subject's last token;
- **roles**: D_S and D_R (`kcwb.reading.roles`) of each head of the circuits for the object that the model now says.
  One prompt has no standard error, so a head counts here from |D_S| + |D_R| >= 0.1 logits;
- **transport**: TE = (LD_edit - LD_patched) / (LD_edit - LD_clean), LD the logit of the new object minus the old one's
  at END; patched: the edited model, into which some outputs of the unedited run are put back. TE is 1 if all of the
  edit's effect goes through them, 0 if none does. Put back are the relation's strongest mover heads at END, random
  sets of heads with as many in each layer, and the edited MLP's outputs at the subject, at END and elsewhere.

The steps: 1. the relation's mover heads; 2. the unedited model's circuits, lens and roles; 3. those with the edit in;
4. outputs of the unedited run put back into the edited one, `kcwb.studies.editing_account.transport`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.circuits.ablation import Ablation, ablation_kind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble, inclusion, node_inclusion
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.methods import STEPS, check_size
from kcwb.discovery.selection import matched_circuit
from kcwb.editing.edit import Edit, EditError
from kcwb.errors import DataError, SettingError
from kcwb.evaluation.compare import compare_circuits
from kcwb.interventions.block import Block
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.dla import attribute, named_heads
from kcwb.reading.positions import check_prompts, position_groups, told_at_end
from kcwb.reading.roles import role_labels, strongest_movers
from kcwb.reading.trajectories import standing
from kcwb.settings import Count, Seed, at_least
from kcwb.studies.editing_account.transport import mlp_outputs, trace_blocks, transport
from kcwb.studies.fact_circuits import FactDraw, fact_draws, fact_ensemble, found_with, require_connected
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import KNOWN_RANK, Prompts, encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

#: Logits: the least |D_S| + |D_R| with which a head has a role on a single prompt.
LEAST_LOGITS = 0.1
#: Resamples of the reference prompts, the prompts themselves counted in, that circuits are drawn against.
_ABLATIONS = 3


@dataclass(frozen=True, eq=False)
class EditComparison:
    """What `compare_edit` found; see the module's text.

    Attributes
    ----------
    edit, movers
        The edit, and the mover heads that are put back.
    asked
        What the unedited model's circuits and the mover heads depend on.
    circuits
        `before`, `after`, `new answer` (unedited) and `paraphrase` (unedited); ensembles if they were drawn.
    overlap
        Each of the last three against `before`: `edges` of either, `edge_iou`, `node_jaccard`
        (`kcwb.compare_circuits`).
    layers
        One row per layer: `layer`, `edited`, `change` (its share of the edges that differ between before and after, of
        ensembles by how much their pi differs),
        `change_paraphrase` (the same against the paraphrase), `nodes` (its share of nodes).
    lens
        As `kcwb.reading.lens.lens` has it, with a `state`, `before` or `after`: `quantity` (`rank`, `probability`),
        `who` (`old, END`, `new, subject`, ...), `value`.
    roles
        One row per head of the circuits before and after: `node`, `mover` (of the relation), `pi` (the larger of before
        and after), and `D_S`, `D_R`, `role` with the ending `_before` (old object, unedited) and `_after` (new object,
        edited).
    transport
        One row per thing put back: `what`, `TE`, and for `random heads` the 95% range of the draws in `low`, `high`.
    p
        The share of random head sets (this one counted in) whose TE is at least that of the mover heads.
    """

    edit: Edit
    movers: Sequence[str]
    asked: tuple[Any, ...]
    circuits: Mapping[str, Circuit | Ensemble]
    overlap: pd.DataFrame
    layers: pd.DataFrame
    lens: pd.DataFrame
    roles: pd.DataFrame
    transport: pd.DataFrame
    p: float

    @property
    def summary(self) -> dict[str, float]:
        """The numbers of one edit, for statistics over many."""
        row: dict[str, float] = {}
        for name, key in (("after", ""), ("new answer", "_answer"), ("paraphrase", "_paraphrase")):
            row[f"edge_iou{key}"] = float(self.overlap.loc[name, "edge_iou"])  # pyright: ignore[reportArgumentType]
            row[f"node_jaccard{key}"] = float(self.overlap.loc[name, "node_jaccard"])  # pyright: ignore
        edited = self.layers[self.layers["edited"]]
        row["edited_share"], row["node_share"] = edited["change"].sum(), edited["nodes"].sum()
        row["edited_share_paraphrase"] = edited["change_paraphrase"].sum()
        ranks = self.lens[self.lens["quantity"] == "rank"].set_index(["state", "who", "layer"])["value"].sort_index()
        last = int(self.lens["layer"].max())
        for state in ("before", "after"):
            for who in ("old", "new"):
                row[f"rank_{who}_{state}"] = float(ranks[state, f"{who}, END", last])
        for place in ("subject", "END"):
            reached = ranks["after", f"new, {place}"] <= KNOWN_RANK
            row[f"arrival_{place}"] = float(reached.index[reached].min()) if reached.any() else math.nan
        before, after = self.roles["role_before"], self.roles["role_after"]
        pi, movers = self.roles["pi"], before == "mover"
        row["roles_changed"] = float(np.average(before != after, weights=pi)) if len(before) else math.nan
        kept = after[movers] == "mover"
        row["movers_kept"] = float(np.average(kept, weights=pi[movers])) if movers.any() else math.nan
        names = {"mover heads": "te_movers", "random heads": "te_random", "edited MLP, subject": "te_subject"}
        names |= {"edited MLP, END": "te_end", "edited MLP, elsewhere": "te_elsewhere"}
        row |= {names[what]: float(te) for what, te in zip(self.transport["what"], self.transport["TE"], strict=True)}
        return {**row, "p": self.p}


@verb
def compare_edit(
    model: Model,
    made: Edit,
    task: Task,
    *,
    paraphrase: str | None = None,
    edges: Count = 300,
    movers: Count | Sequence[str] = 10,
    draws: Count = 100,
    circuit_draws: Annotated[int, at_least(2)] | None = None,
    seed: Seed = 0,
    like: EditComparison | None = None,
    progress: Progress = True,
) -> EditComparison:
    """Compare the model before and after one edit; afterwards the model is as it was.

    Parameters
    ----------
    model
        The Model object that the edit was made for, as it was then.
    made
        The edit, not in the weights now; of several requests, the first is looked at.
    task
        A task of the fact's relation in the edited template, made with the unedited model: its reference prompts are
        what cut edges deliver (mean ablation), its D_val tells the mover heads.
    paraphrase
        The fact in other words, with `{}`. Default: the relation's next zero-shot template.
    edges
        The circuits' size, after dangling edges are dropped (the nearest that the scores give).
    movers
        How many mover heads are put back, those of largest D_S; or their names.
    draws
        Random sets of heads.
    circuit_draws
        Draw each circuit so many times, and weigh by pi; three times the runs. None: each once.
    like
        A comparison of another edit of the same fact to the same object, with the same task and settings: the unedited
        model's circuits and the mover heads are taken from it, most of the work.

    Raises
    ------
    DataError
        If old and new object start with the same token, or one of them with that of another object of the relation; no
        head is a mover; there is no paraphrase; or the edit has no effect at END.
    SettingError
        If the edit was made for another Model object (with equal weights, too), the task is not in the edit's template,
        `like` is of another fact, object, task or setting, or a setting cannot be meant.
    CircuitError
        If a named mover is not a head of the model, or so few of the strongest edges are no circuit.
    EditError
        If the edit is in the weights, or was made for other ones.
    """
    _check(model, made, task, edges)
    if not isinstance(movers, int) and not named_heads(model, movers):
        raise SettingError("movers=[]: name a head, or give a number.")
    fact, new = made.facts[0], made.facts[0].with_object(made.targets[0])
    other = _paraphrase_of(task) if paraphrase is None else paraphrase
    asked = {answer: _asked(model, task, answer, made.templates[0]) for answer in (fact, new)}
    tokens = torch.stack([asked[fact].answers[0, 0], asked[new].answers[0, 0]])
    if tokens[0] == tokens[1]:
        raise DataError(f"{fact.object!r:.60} and {new.object!r:.60} start with the same token; choose another target.")
    for prompts in asked.values():
        check_prompts(told_at_end(prompts))
    heads = movers if isinstance(movers, int) else tuple(movers)
    wanted = (model.digest, task, fact, new, other, edges, heads, circuit_draws, seed)
    if like is not None and like.asked != wanted:
        raise SettingError("like is of another fact, new object, task or setting than this; compare without it.")
    drawn = None if circuit_draws is None else fact_draws(model.graph, edges, circuit_draws, _ABLATIONS, seed)
    size = {"edges": edges, "drawn": drawn}
    with track(progress, 7 if like is None else 3, "comparing") as step:
        if like is None:
            # 1. the relation's mover heads
            names = strongest_movers(model, task, heads, seed) if isinstance(heads, int) else heads
            step(note="mover heads")
            # 2. the unedited model: circuits, lens, roles
            cuts = _ablations(model, task, drawn, seed)
            circuits = {"before": _circuit(model, task, fact, task.template, cuts, **size)}
            step(note="circuit before")
            circuits["new answer"] = _circuit(model, task, new, task.template, cuts, **size)
            step(note="circuit of the new object")
            reworded = replace(task, reference=encode(model, task.reference.facts, other, task.relation.objects))
            cuts = _ablations(model, reworded, drawn, seed)
            circuits["paraphrase"] = _circuit(model, reworded, fact, other, cuts, **size)
            step(note="circuit of the paraphrase")
        else:
            names, circuits = like.movers, {**like.circuits}
        prompt = asked[fact].select([0])
        ids = prompt.tokens[:, : int(prompt.ends[0]) + 1]
        clean = trace_blocks(model.network, ids)
        written = mlp_outputs(model.network, clean, made.layers)
        lens = [_lens(model, prompt, clean, tokens, "before")]
        roles = _contributions(model, prompt, tokens)
        # 3. the same with the edit in
        with made:
            cuts = _ablations(model, task, drawn, seed)
            circuits["after"] = _circuit(model, task, new, task.template, cuts, **size)
            step(note="circuit after")
            edited = trace_blocks(model.network, ids)
            lens.append(_lens(model, prompt, edited, tokens, "after"))
            roles_after = _contributions(model, prompt, tokens)
            step(note="lens and roles")
            # 4. outputs of the unedited run put back
            transported, p = transport(model, made, prompt, clean, edited, written, tokens, names, draws, seed)
            step(note="transport")
    return EditComparison(
        edit=made,
        movers=names,
        asked=wanted,
        circuits=circuits,
        overlap=_overlap(circuits),
        layers=_layers(model.graph, made.layers, circuits),
        lens=pd.concat(lens, ignore_index=True),
        roles=_roles(circuits, names, roles[..., 0], roles_after[..., 1]),
        transport=transported,
        p=p,
    )


def _check(model: Model, made: Edit, task: Task, edges: int) -> None:
    if made.active:
        raise EditError(f"{made} is in the weights; undo it first, so that there is a before.")
    if made.parameters.get("model") != model.digest:
        raise EditError(f"{made} was made for other weights than those of {model.name}; make it again.")
    made.require_own(model)
    check_same_weights(model, task)
    if task.template != made.templates[0]:
        raise SettingError(
            f"The task asks {task.template!r:.120}, the edit {made.templates[0]!r:.120}; use one template."
        )
    check_size(model.graph, edges, model.name)


def _paraphrase_of(task: Task) -> str:
    others = [text for text in task.relation.prompt_templates_zs if text != task.template]
    if not others:
        raise DataError(f"{task.relation.name} has no other template; give one: paraphrase='... {{}} ...'.")
    return others[0]


# --- circuits ---


def _asked(model: Model, task: Task, fact: Fact, template: str) -> Prompts:
    return encode(model, [fact], template, task.relation.objects)


def _ablations(model: Model, task: Task, drawn: Sequence[FactDraw] | None, seed: int) -> list[Ablation]:
    """Mean ablation over the task's reference prompts; for draws also over resamples of them."""
    tasks = [task]
    for level in range(1, _ABLATIONS if drawn else 1):
        again = ablation_kind("mean").drawn_again(task, seed + level)
        tasks += [] if again is None else [again[1]]
    return [make_ablation(model, one, "mean") for one in tasks]


def _circuit(
    model: Model, task: Task, fact: Fact, template: str, cuts: Sequence[Ablation], *, edges: int,
    drawn: Sequence[FactDraw] | None,
) -> Circuit | Ensemble:  # fmt: skip
    """The circuit of one prompt with one answer, by EAP-IG under mean ablation, at a size; or draws of it."""
    loss = make_loss(model, _asked(model, task, fact, template), "nll")
    scores = [attribution_scores(model, loss, one, steps=STEPS) for one in cuts]
    about = {**found_with(model, task, [fact], "nll", "mean", edges, STEPS), "template": template}
    if drawn is not None:
        return fact_ensemble(model.graph, scores, drawn, about)
    found = replace(matched_circuit(model.graph, scores[0], edges), provenance=about)
    require_connected(found, f"{fact.subject}, {fact.object}", edges)
    return found


def _overlap(circuits: Mapping[str, Circuit | Ensemble]) -> pd.DataFrame:
    rows = {}
    for name in ("after", "new answer", "paraphrase"):
        table = compare_circuits(circuits["before"], circuits[name])
        rows[name] = {
            "edges_before": table.loc["edges", "left"],
            "edges": table.loc["edges", "right"],
            "edge_iou": table.loc["edges", "iou"],
            "node_jaccard": table.loc["nodes", "iou"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("circuit")


def _layers(graph: Graph, edited: Sequence[int], circuits: Mapping[str, Circuit | Ensemble]) -> pd.DataFrame:
    layer_of = np.array([graph.node(name).layer for name in graph.node_names])
    senders, receivers = layer_of[:-1], layer_of[graph.receiver_node.numpy()]

    def shares(left: Circuit | Ensemble, right: Circuit | Ensemble) -> np.ndarray:
        apart = (inclusion(left) - inclusion(right)).abs()
        rows, columns = apart.nonzero(as_tuple=True)
        ends = np.concatenate([senders[rows.numpy()], receivers[columns.numpy()]])
        return _shares(ends, np.tile(apart[rows, columns].numpy(), 2), graph.n_layers)

    before, after = circuits["before"], circuits["after"]
    return pd.DataFrame(
        {
            "layer": range(graph.n_layers),
            "edited": [layer in edited for layer in range(graph.n_layers)],
            "change": shares(before, after),
            "change_paraphrase": shares(before, circuits["paraphrase"]),
            "nodes": _shares(layer_of, np.maximum(*map(node_inclusion, (before, after))), graph.n_layers),
        }
    )


def _shares(layers: np.ndarray, weights: np.ndarray, n_layers: int) -> np.ndarray:
    """How much of a list of layers each layer is; `input` (-1) and `logits` (n_layers) count in the whole alone."""
    return np.bincount(layers + 1, weights, minlength=n_layers + 2)[1:-1] / (weights.sum(dtype=float) or 1)


# --- lens and roles ---


@torch.no_grad()
def _lens(model: Model, prompt: Prompts, trace: Sequence[Block], tokens: Int[Tensor, "2"], state: str) -> pd.DataFrame:
    places = {"END": -1, "subject": int(prompt.subject_stop[0]) - 1}
    rows: list[dict[str, Any]] = []
    for (layer, block), (place, position) in itertools.product(enumerate(trace), places.items()):
        found = standing(model.network.logits(block.after[0, position])[None].float(), tokens[None])
        for who, rank, probability in zip(("old", "new"), *(values[0].tolist() for values in found), strict=True):
            head = {"state": state, "layer": layer, "who": f"{who}, {place}"}
            rows.append({**head, "quantity": "rank", "value": float(rank)})
            rows.append({**head, "quantity": "probability", "value": probability})
    return pd.DataFrame(rows).assign(low=math.nan, high=math.nan)


def _contributions(model: Model, prompt: Prompts, tokens: Int[Tensor, "2"]) -> Float[Tensor, "2 L H 2"]:
    """D_S and D_R of every head, for the old and the new object."""
    found = attribute(model, prompt, tokens[None])
    return found.by_group(position_groups(prompt))[:2, :, :, 0].cpu()


def _roles(
    circuits: Mapping[str, Circuit | Ensemble], movers: Sequence[str], before: Float[Tensor, "2 L H"],
    after: Float[Tensor, "2 L H"],
) -> pd.DataFrame:  # fmt: skip
    graph, pi = circuits["before"].graph, np.maximum(*(node_inclusion(circuits[name]) for name in ("before", "after")))
    nodes = pd.DataFrame([graph.node(name) for name in graph.node_names]).assign(node=graph.node_names, pi=pi)
    heads = nodes[(nodes["kind"] == "head") & (pi > 0)].reset_index(drop=True)
    table = pd.DataFrame({"node": heads["node"], "mover": heads["node"].isin(movers), "pi": heads["pi"]})
    for state, every in (("before", before), ("after", after)):
        d = every[:, heads["layer"].tolist(), heads["head"].tolist()].double()
        table[f"D_S_{state}"], table[f"D_R_{state}"] = d.tolist()
        table[f"role_{state}"] = role_labels(d, d.abs().sum(0) >= LEAST_LOGITS)
    return table
