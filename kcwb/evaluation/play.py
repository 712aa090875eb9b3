"""Play a circuit: cut edges, nodes and groups out of it, put them back, force others in, and see what it answers.

After every step the circuit is run alone, cut edges delivering ablated values, as in `kcwb.run_circuit`. Beside it
stand the circuit as it was given (**before**) and the full model.

**What is recomputed.** Of a step, the nodes that it reaches: those that matter to the answers and read something else
than in the last two runs of theirs (`kcwb.circuits.masked.ChangingRun`); then the unembedding. All else stands. The
answers of a circuit are bit for bit the same whatever the steps that led to it, so that what is undone is as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, check_made_for, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.masked import ChangingRun, MaskedRuns
from kcwb.circuits.naming import edges_meant, edges_named, known_name
from kcwb.circuits.provenance import origin, part
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.circuits.session import Session, session_of
from kcwb.errors import CircuitError, DataError, SettingError, shown
from kcwb.evaluation.asking import Asked, likeliest
from kcwb.locks import WeightsLock
from kcwb.models.loading import Model
from kcwb.models.memory import HeldPieces
from kcwb.settings import Count
from kcwb.tasks.metrics import answer_probabilities, answer_ranks, make_loss
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb


class Losses(NamedTuple):
    """The mean nll of the answers (nats): of the circuit as it was given, as it is now, and of the full model."""

    before: float
    after: float
    model: float


class Play:
    """A circuit that is played with on some facts.

    Names are those of edges, `a3.h1->m7` (an edge to a head, `m2->a3.h1`, stands for those to its query, key and value,
    `m2->a3.h1<q>` for one of them), of nodes, for all edges at them, or of groups, for all edges at their nodes. A step
    is made whole or not at all: if a name is unknown or has nothing to do, all is as it was.

    Parameters
    ----------
    model, circuit
        The circuit is run alone. What its session (`kcwb.circuits.Session`), if it has one, cuts and forces in is the
        first step.
    task
        The first facts of its D_val are asked; or any prompts.
    ablation
        What cut edges deliver, or an Ablation (which prompts without their task need, unless it is `zero`); None for
        what the circuit was found with.
    facts
        How many of the facts are asked, at most.
    groups
        Name -> nodes; None for those of the circuit's session.

    Attributes
    ----------
    own
        The prompt that `ask` asked last, and `as_traits` tells of; None for none.

    Raises
    ------
    CircuitError
        If the circuit belongs to another model, or a group has an unknown node.
    DataError
        If there is no fact, or none that the ablation is defined on.
    """

    @verb
    def __init__(
        self,
        model: Model,
        circuit: Circuit,
        task: Task | Prompts,
        *,
        ablation: str | AblationKind | Ablation | None = None,
        facts: Count = 8,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        check_same_model(model, circuit)
        asked = task
        if isinstance(task, Task):
            check_same_weights(model, task)
            asked = task.val
        assert isinstance(asked, Prompts)
        cuts = ablation or circuit.ablation
        if not isinstance(cuts, Ablation):
            cuts = make_ablation(model, task if isinstance(task, Task) else None, cuts)
        check_made_for(model, cuts)
        if not len(asked):
            raise DataError("There is no fact to ask: the task's D_val is empty. Use a relation with more facts.")
        self.model, self.given, self._digest, self._cuts = model, circuit, model.digest, cuts
        self.own: Asked | None = None
        self.prompts = cuts.usable(asked).select(slice(facts))
        session = circuit.session or Session()
        self.set_groups(session.groups if groups is None else groups)

        def begin(rows: slice) -> ChangingRun:
            some = self.prompts.select(rows)
            return ChangingRun(MaskedRuns(model.network, some, cuts.values(some)))

        self._runs = HeldPieces(model.network, self.prompts.tokens, begin)
        self._nll = make_loss(model, self.prompts, "nll")
        self._steps: list[_Step] = []
        self._done = 0
        self._kept = circuit.kept & model.graph.exists
        self._before = self._after = self._logits(self._kept)
        full = self._nll(run_circuit(model, None, self.prompts, cuts))
        self._losses = Losses(float(self._nll(self._before)), float(self._nll(self._after)), float(full))
        if session.cut or session.forced:
            self.go_to(cut=session.cut, forced=session.forced)

    # --- steps ---

    @verb
    def cut(self, *names: str) -> pd.DataFrame:
        """Cut all edges of the circuit that are named; returns `answers`.

        Raises
        ------
        CircuitError
            If a name is unknown, or nothing of it is in the circuit; says which. All is as it was.
        """
        return self._step("cut", names)

    @verb
    def restore(self, *names: str) -> pd.DataFrame:
        """Put back what was cut of the circuit as it was given; returns `answers`.

        Raises
        ------
        CircuitError
            If a name is unknown, or nothing of it is cut; says which. All is as it was.
        """
        return self._step("restore", names)

    @verb
    def force(self, *names: str) -> pd.DataFrame:
        """Put in edges of the model that the circuit has not; returns `answers`.

        Of a node, or a group, these are all edges that join it to `input`, `logits`, the circuit's nodes as they are
        now, and the group's own.

        Raises
        ------
        CircuitError
            If a name is unknown, the graph has no such edge, or all of it is in the circuit; says which. All is as it
            was.
        """
        return self._step("force", names)

    @verb
    def go_to(self, *, cut: Sequence[str] = (), forced: Sequence[str] = ()) -> pd.DataFrame:
        """Go in one step to where of the circuit as it was given just these edges are cut, and just those forced in.

        Raises
        ------
        CircuitError
            If an edge is unknown, one that is to be cut is not in the circuit as it was given, or one that is to be
            forced is. All is as it was.
        """
        wanted = self.given.kept.clone()
        for name in cut:
            edges = edges_named(self.model.graph, name, self.groups, "cut") & self.given.kept
            if not edges.any():
                raise CircuitError(f"cut: {shown(name)} is not in the circuit.")
            wanted &= ~edges
        for name in forced:
            edges = edges_named(self.model.graph, name, self.groups, "force") & ~self.given.kept
            if not edges.any():
                raise CircuitError(f"force: {shown(name)} is in the circuit already.")
            wanted |= edges
        return self._toggle(f"go to {len(cut)} cut, {len(forced)} forced", wanted ^ self._kept)

    @verb
    def undo(self, steps: Count = 1) -> pd.DataFrame:
        """Take back the last steps, of any number; returns `answers`. CircuitError if there are fewer."""
        if steps > self._done:
            raise CircuitError(f"undo: {self._done} steps can be undone, not {steps}.")
        return self._move(self._done - steps)

    @verb
    def redo(self, steps: Count = 1) -> pd.DataFrame:
        """Make steps again that were undone; returns `answers`. CircuitError if there are fewer."""
        undone = len(self._steps) - self._done
        if steps > undone:
            raise CircuitError(f"redo: {undone} steps can be made again, not {steps}.")
        return self._move(self._done + steps)

    @verb
    def set_groups(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Name groups of nodes anew; what has been done stays. CircuitError if a node is unknown."""
        known, found = self.model.graph.node_names, {}
        for name, nodes in groups.items():
            if name in known or not nodes:
                raise CircuitError(f"The group {shown(name)} has {'the name of a node' if nodes else 'no nodes'}.")
            found[name] = tuple(known_name(f"group {shown(name)}", node, known) for node in nodes)
        self.groups: dict[str, tuple[str, ...]] = found

    # --- what is so now ---

    @property
    def lock(self) -> WeightsLock:
        """That of the model."""
        return self.model.lock

    @property
    def circuit(self) -> Circuit:
        """The circuit as it is now; its provenance says, under `played`, which edges a person cut and forced."""
        if torch.equal(self._kept, self.given.kept):
            return self.given
        before = part(self.given.provenance, "played")
        found = {**origin(self.given), **({"played": dict(before)} if before else {})}
        played = {"circuit": found, "cut": self.cuts, "forced": self.forced}
        return replace(
            self.given,
            kept=self._kept.clone(),
            session=None,
            provenance={**self.given.provenance, "method": "played", "played": played},
        )

    @property
    def cuts(self) -> list[str]:
        """The edges of the circuit as it was given that are cut."""
        return self._names(self.given.kept & ~self._kept)

    @property
    def forced(self) -> list[str]:
        """The edges that it had not."""
        return self._names(self._kept & ~self.given.kept)

    @property
    def session(self) -> Session:
        """The session of the circuit as it was given, with what is cut, forced and grouped now.

        `play.given.with_session(play.session).save(path)` keeps it.
        """
        session = self.given.session or Session()
        now = replace(session, cut=self.cuts, forced=self.forced, groups=self.groups)
        return session_of(self.given, now)

    @property
    def steps(self) -> list[str]:
        """The steps that led here, in words: `cut a3.h1->m7`."""
        return [step.words for step in self._steps[: self._done]]

    @property
    def undone(self) -> list[str]:
        """The steps that `redo` would make, the next one first."""
        return [step.words for step in self._steps[self._done :]]

    @property
    def loss(self) -> Losses:
        """The mean nll of the answers (nats) before, after, and of the full model."""
        return self._losses

    @verb
    def answers(self, k: Count = 5) -> pd.DataFrame:
        """What the circuit answers, as it was given (before) and as it is now (after).

        Parameters
        ----------
        k
            How many of the likeliest tokens.

        Returns
        -------
        DataFrame
            One row per fact: `prompt`, `answer`; its `probability_before`, `probability_after`, `rank_before` and
            `rank_after`, up to the token that decides (`kcwb.tasks.ranks`); `top_before` and `top_after`, the likeliest
            first tokens as `[text, probability]`.

        Raises
        ------
        SettingError
            If the vocabulary has fewer than k tokens.
        """
        if k > self.model.network.d_vocab:
            raise SettingError(f"k={k}: the vocabulary has {self.model.network.d_vocab:,} tokens; ask for fewer.")
        runs = {"before": self._before, "after": self._after}
        reads = {
            "probability": lambda logits: answer_probabilities(logits, self.prompts).tolist(),
            "rank": lambda logits: answer_ranks(logits, self.prompts).tolist(),
            "top": lambda logits: likeliest(self.model, logits, k),
        }
        read = {f"{name}_{state}": of(logits) for name, of in reads.items() for state, logits in runs.items()}
        answers = [fact.object for fact in self.prompts.facts]
        return pd.DataFrame({"prompt": self.prompts.texts, "answer": answers, **read})

    @verb
    def ask(self, prompt: str, *, subject: str = "", answer: str = "") -> pd.DataFrame:
        """Ask any prompt: the circuit as it was given and as it is now, and the full model.

        Parameters
        ----------
        prompt, subject, answer
            As in `kcwb.tasks.own.own_prompt`; `resample` ablation needs the subject. Errors in them are told.

        Returns
        -------
        DataFrame
            A row for each `run`, `before`, `after` and `model`: `answer`, its first token's `probability` and `rank`,
            and `top`, the likeliest tokens as `[text, probability]`. `attrs["delivers"]` says what cut edges deliver.
        """
        self._check_weights()
        question = {"prompt": prompt, "subject": subject, "answer": answer}
        self.own = Asked(self.model, question, self.prompts.facts, self._cuts, self.given.kept)
        return self.own.table(self._kept)

    @verb
    def as_traits(self, k: Count = 5) -> dict[str, Any]:
        """The same, ready for JSON: `facts`, each with `before` and `after`, the three losses, and what was asked.

        Returns
        -------
        dict
            `{facts: [{prompt, answer, before: {p, rank, top: [[token, p], ...]}, after: {...}}], loss_before,
            loss_after, loss_model}`; losses in nats. After `ask` also `own`: a fact with `model` and `delivers`.
        """
        facts = []
        for row in self.answers(k).rename(columns=lambda name: name.replace("probability", "p")).to_dict("records"):
            states = {
                state: {name: row[f"{name}_{state}"] for name in ("p", "rank", "top")} for state in ("before", "after")
            }
            facts.append({"prompt": row["prompt"], "answer": row["answer"], **states})
        found = {"facts": facts, **{f"loss_{key}": value for key, value in self.loss._asdict().items()}}
        if self.own is not None:
            self._check_weights()
            found["own"] = self.own.as_traits(self._kept)
        return found

    def __repr__(self) -> str:
        """One line: the circuit, and how far it is from the one that was given."""
        return f"Play({self.circuit!r}: {len(self.cuts)} edges cut, {len(self.forced)} forced)"

    # --- inside ---

    def _step(self, what: str, names: Sequence[str]) -> pd.DataFrame:
        if not names:
            raise SettingError(f"{what}: name at least one edge, node or group.")
        toggled = torch.zeros_like(self._kept)
        for name in names:
            toggled |= edges_meant(what, name, self.groups, self.given, self.circuit)
        return self._toggle(f"{what} {', '.join(names)}", toggled)

    def _check_weights(self) -> None:
        if self.model.digest != self._digest:
            raise CircuitError(f"The weights of {self.model.name!r} have changed since this play began. Begin anew.")

    def _toggle(self, words: str, edges: Bool[Tensor, "S R"]) -> pd.DataFrame:
        """Make a new step, which turns some edges round."""
        step = _Step(words, edges.flatten().nonzero()[:, 0])
        return self._move(self._done + 1, [*self._steps[: self._done], step])

    def _move(self, done: int, steps: list[_Step] | None = None) -> pd.DataFrame:
        """Go to a place in the history; if that fails, all is as it was."""
        self._check_weights()
        steps, kept = self._steps if steps is None else steps, self._kept.clone()
        for step in steps[min(done, self._done) : max(done, self._done)]:
            kept.view(-1)[step.toggled] ^= True
        after = self._logits(kept)
        losses = self._losses._replace(after=float(self._nll(after)))
        self._kept, self._after, self._losses, self._steps, self._done = kept, after, losses, steps, done
        return self.answers(min(5, self.model.network.d_vocab))

    def _logits(self, kept: Bool[Tensor, "S R"]) -> Float[Tensor, "N A V"]:
        width = self.prompts.answers.shape[1]
        parts = self._runs.run(lambda run: run.logits(kept))
        return torch.cat([torch.nn.functional.pad(one, (0, 0, 0, width - one.shape[1])) for one in parts])

    def _names(self, mask: Bool[Tensor, "S R"]) -> list[str]:
        return [self.model.graph.edge_name(row, column) for row, column in mask.nonzero().tolist()]


class _Step(NamedTuple):
    """A step in words, and the places in the flattened mask that it changes."""

    words: str
    toggled: Int[Tensor, " e"]
