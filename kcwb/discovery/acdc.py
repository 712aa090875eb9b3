"""ACDC, exactly and fast: the same circuit as the sequential definition (`kcwb.discovery.sequential`).

Three facts, each exact, make it fast:

1. **Nothing upstream has changed yet.** Receivers are visited from the output to the input, so every sender that a
   receiver reads still has its value in the unpruned graph. What the receiver reads without some edges is what it
   read with them, minus those senders' differences (a_u - abl_u).
2. **Little downstream is left.** A change of the receiver's node travels only along edges that were kept, and matters
   only at few positions (`kcwb.circuits.propagate`).
3. **Most edges go, so assume it.** A batch of the next candidates is evaluated cumulatively: candidate i with those
   before it cut that are expected to be. Decisions hold up to the first that is not as expected; the search goes on
   behind it. What the rest of the batch showed is what is expected of them next.

Each receiver is decided on in steps, the last three again and again until all of its senders are:

1. Open it: what it reads, what each sender adds to that, and what is recomputed behind it (`_open`).
2. Evaluate the next batch: the loss of each candidate, those before it cut that are expected to be (`_evaluate`).
3. Judge: the increases, and up to which candidate the expectations held (`_judge`).
4. Settle: cut and keep as far as they held, and expect of the rest what it showed (`_settle`).

After each receiver its node's new output is committed, so that the state always describes the circuit as it is; after
each layer the state is computed anew, so that rounding does not add up. A checkpoint after each receiver holds the
decisions; a resumed search repeats its layer's commits and goes on bit for bit as it would have.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.ablation import Ablation, check_made_for
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.propagate import Current, Need, Plan
from kcwb.discovery.checkpoint import Checkpoint
from kcwb.discovery.sequential import NEAR_TIE, Pruned, receiver_order, sender_order
from kcwb.models.loading import Model
from kcwb.models.memory import halving, memory_budget
from kcwb.progress import Progress, track
from kcwb.tasks.metrics import Loss
from kcwb.verbs import verb

#: Rows (candidates x prompts x positions) of a batch beyond which a larger one is no faster: on a CPU, on a GPU.
_ROWS, _ROWS_GPU = 512, 8192
#: The part of the memory budget that the logits of a batch may take, and that all senders' shares of them may.
_LOGITS, _SHARES = 1 / 8, 1 / 2
#: The work around a batch, in candidates; how soon its surprises are forgotten, per candidate; and candidates at least.
_OVERHEAD, _MEMORY, _SMALLEST = 4, 0.9, 4
#: What `predict_seconds` supposes.
_EVALUATED, _LIVE = 0.5, 0.25


class Search:
    """A pruning under way.

    Parameters
    ----------
    model, loss, ablation
        The model, the metric M on prompts that the ablation is defined on, and what a cut edge delivers.
    tau, absolute
        The increase of M (nats) below which an edge is cut, and whether its absolute value counts.
    within
        The edges to start from, a circuit or a mask; None for all.
    order
        The seed that the order of a layer's heads is drawn from; None for the last to the first.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        ablation: Ablation,
        *,
        tau: float,
        absolute: bool = False,
        within: Circuit | Bool[Tensor, "S R"] | None = None,
        order: int | None = None,
    ) -> None:
        self.model, self.loss, self.ablation, self.tau, self.absolute = model, loss, ablation, tau, absolute
        self.drawn_from = order
        start = within.kept if isinstance(within, Circuit) else within
        self.start = (model.graph.exists if start is None else start).clone()
        self.kept = self.start.clone()
        self.increases = torch.full(self.kept.shape, torch.nan)
        self.order, self.senders = receiver_order(model.graph, order), sender_order(model.graph, order)
        self.visited = 0
        self.evaluations = 1
        self.near_ties = 0
        self.surprises, self.seen = 0.0, 0.0
        check_made_for(model, ablation)
        ablated = ablation.values(loss.prompts)
        self.current = Current(model.network, loss, ablated, self.kept)
        outputs = self.current.outputs.clone()
        self.differences = outputs if ablated is None else outputs - ablated
        self.full = self.value = float(loss(model.network.logits(self.current.residual[None])))
        network = model.network
        self._budget = memory_budget(network.device) / (network.dtype.itemsize * network.d_vocab)
        self._most = max(_SMALLEST, int(_LOGITS * self._budget / loss.prompts.answers.numel()))
        self._rows = _ROWS if network.device.type == "cpu" else _ROWS_GPU

    def again(self, tau: float) -> Search:
        """The same search at another tau, from the beginning; it shares what the unpruned run gave."""
        other = copy.copy(self)
        other.tau = tau
        other.kept = self.start.clone()
        other.increases = torch.full(self.kept.shape, torch.nan)
        other.visited, other.evaluations, other.near_ties, other.value = 0, 1, 0, self.full
        other.surprises, other.seen = 0.0, 0.0
        other.current = copy.copy(self.current)
        other.current.kept = other.kept
        other.current.rebuild()
        return other

    @property
    def done(self) -> bool:
        """Whether every receiver has been visited."""
        return self.visited == len(self.order)

    @property
    def n_decided(self) -> int:
        """How many of the edges that it started from have been decided on."""
        return int(self.start[:, self.order[: self.visited]].sum())

    def begins_layer(self) -> bool:
        """Whether the next receiver is the first of its layer: where the state is computed anew."""
        return self.order[self.visited] % (3 * self.model.graph.n_heads + 1) == 3 * self.model.graph.n_heads

    def resume(self, kept: Bool[Tensor, "S R"], increases: Float[Tensor, "S R"], counters: dict[str, Any]) -> None:
        """Take over the decisions of an interrupted search: repeat the commits of the layer that it was in."""
        for name, value in counters.items():
            setattr(self, name, value)
        self.increases.copy_(increases)
        visited = self.order[: self.visited]
        of_layer = 3 * self.model.graph.n_heads + 1
        begun = [i for i, column in enumerate(visited) if i == 0 or column % of_layer == of_layer - 1]
        again = visited[begun[-1] :] if begun else []
        self.kept.copy_(kept)
        self.kept[:, again] = self.start[:, again]
        self.current.rebuild()
        for column in again:
            self.kept[:, column] = kept[:, column]
            self.commit(column)

    def visit(self, step: Callable[..., None]) -> None:
        """Decide on all edges into the next receiver; `step(n, note)` is called after every batch."""
        if self.begins_layer():
            self.current.rebuild()
        column = self.order[self.visited]
        graph = self.model.graph
        node = int(graph.receiver_node[column])
        rows = self.senders[self.kept[self.senders, column]]
        if node < graph.n_senders and self.current.need(node) is Need.NOWHERE:
            self.kept[:, column] = False
            step(len(rows), self._note())
        elif len(rows):
            self._decide(column, rows, step)
            self.commit(column)
        self.visited += 1

    def commit(self, column: int) -> None:
        """Bring the state up to date with the edges kept into a receiver."""
        graph, current = self.model.graph, self.current
        cut = (self.start[:, column] & ~self.kept[:, column]).nonzero()[:, 0]
        node = int(graph.receiver_node[column])
        if not len(cut) or (node < graph.n_senders and current.need(node) is Need.NOWHERE):
            return
        everywhere = self._everywhere(column)
        read = current.reads(column, everywhere) - current.at(self.differences[cut], everywhere).sum(0)
        current.commit_read(column, read)
        if node < graph.n_senders:
            current.commit(current.plan(node), current.node_output(column, read[None])[0])

    def _everywhere(self, column: int) -> bool:
        """Whether a receiver matters at all positions."""
        graph = self.model.graph
        node = int(graph.receiver_node[column])
        if node == graph.n_senders:
            return False
        key_or_value = graph.receiver_names[column].endswith(("<k>", "<v>"))
        return key_or_value or self.current.need(node) is Need.EVERYWHERE

    def _open(self, column: int, rows: Tensor) -> _Receiver:
        """Step 1: a receiver about to be decided on."""
        everywhere = self._everywhere(column)
        cuts = self.current.at(self.differences[rows], everywhere)
        read = self.current.reads(column, everywhere)
        node = int(self.model.graph.receiver_node[column])
        plan = self.current.plan(node) if node < self.model.graph.n_senders else None
        largest = max(_SMALLEST, min(self._most, self._rows // read[..., 0].numel()))
        shares = self._logit_shares(read, cuts) if plan is None else None
        return _Receiver(column, rows, cuts, read, plan, shares, torch.ones(len(rows), dtype=torch.bool), largest)

    def _decide(self, column: int, rows: Tensor, step: Callable[..., None]) -> None:
        """Visit a receiver's senders from the latest to the earliest, in batches."""
        one = self._open(column, rows)
        while one.start < len(rows):
            losses = self._evaluate(one)
            increases, accepted = self._judge(losses, one.expected[one.start : one.start + len(losses)])
            self._settle(one, losses, increases, accepted)
            step(accepted, self._note())

    def _evaluate(self, one: _Receiver) -> list[float]:
        """Step 2: M of each candidate of the next batch: itself cut, and those before it that are expected to be.

        A batch for which there is not enough memory is halved.
        """
        size = min(self._size(), one.largest, len(one.rows) - one.start)
        losses = halving(size, lambda n: self._losses(one, slice(one.start, one.start + n)), "candidates")
        one.largest = one.largest if len(losses) == size else len(losses)
        return losses

    def _losses(self, one: _Receiver, batch: slice) -> list[float]:
        network, guess = self.model.network, one.expected[batch]
        reads = _without(one.read, one.cuts[batch], guess)
        if one.plan is not None:
            return self.current.loss_after(one.plan, self.current.node_output(one.column, reads)).tolist()
        if one.shares is None:
            return self.loss(network.logits(reads)).tolist()
        left = _without(one.shares[-1], one.shares[batch], guess)
        return self.loss(network.logits_of_shares(left, reads)).tolist()

    def _judge(self, losses: list[float], guess: Tensor) -> tuple[Float[Tensor, " B"], int]:
        """Step 3: each candidate's increase over the circuit before it, and how many of the decisions hold."""
        increases, before = [], self.value
        for loss, cut_expected in zip(losses, guess.tolist(), strict=True):
            increases.append(loss - before)
            if cut_expected:
                before = loss
        result = torch.tensor(increases, dtype=torch.float64)
        wrong = (self._cuts(result) != guess).nonzero()
        return result, int(wrong[0]) + 1 if len(wrong) else len(losses)

    def _settle(self, one: _Receiver, losses: list[float], increases: Float[Tensor, " B"], accepted: int) -> None:
        """Step 4: carry out the decisions that hold, and go on behind them."""
        start, stop = one.start, one.start + len(losses)
        decided, cut = one.rows[start : start + accepted], self._cuts(increases)
        self.increases[decided, one.column] = increases[:accepted].float()
        self.kept[decided, one.column] = ~cut[:accepted]
        self.near_ties += int(((self._measure(increases[:accepted]) - self.tau).abs() < NEAR_TIE).sum())
        self.evaluations += len(losses)
        gone = cut[:accepted].nonzero()[:, 0]
        if len(gone):
            where = start + gone.to(one.cuts.device)
            one.read = one.read - one.cuts[where].sum(0)
            if one.shares is not None:
                one.shares[-1] -= one.shares[where].sum(0)
            self.value = losses[int(gone[-1])]
        one.expected[start + accepted : stop] = cut[accepted:]
        one.start += accepted
        forgotten = _MEMORY**accepted  # in the running rate of surprises
        self.surprises = self.surprises * forgotten + (one.start < stop)
        self.seen = self.seen * forgotten + accepted

    def _size(self) -> int:
        """Candidates in the next batch.

        With a surprise in every n candidates a batch of b wastes about b / 2n of its work, and the overhead costs
        `_OVERHEAD` / b of it: least in sum at b = sqrt(2 n `_OVERHEAD`).
        """
        often = (self.surprises + 0.02) / (self.seen + 1)
        return max(_SMALLEST, int(math.sqrt(2 * _OVERHEAD / often)))

    def _logit_shares(self, read: Float[Tensor, "N A D"], cuts: Float[Tensor, "C N A D"]) -> Tensor | None:
        """What each candidate of `logits` adds to the logits, and last the whole: `[C + 1, N, A, V]`.

        The final norm is linear but for its scale, so that a removal is a difference of vectors instead of a product
        with the unembedding. None if they take too much memory.
        """
        network = self.model.network
        if (len(cuts) + 1) * read[..., 0].numel() > _SHARES * self._budget:
            return None
        parts = [*cuts.split(self._most), read[None]]
        return torch.cat([network.logit_shares(part) for part in parts])

    def _measure(self, increases: Tensor) -> Tensor:
        return increases.abs() if self.absolute else increases

    def _cuts(self, increases: Tensor) -> Bool[Tensor, " B"]:
        return self._measure(increases) < self.tau

    def _note(self) -> str:
        return f"{int(self.kept.sum()):,} edges left"

    def result(self) -> Pruned:
        """What was found."""
        return Pruned(self.kept, self.increases, self.value, self.evaluations, self.near_ties)


def _without(
    whole: Float[Tensor, "N P X"], parts: Float[Tensor, "B N P X"], expected: Bool[Tensor, " B"]
) -> Float[Tensor, "B N P X"]:
    """The whole without each part, and without those before it that are expected to go."""
    weights = expected.to(parts.device, parts.dtype)[:, None, None, None]
    return whole - ((parts * weights).cumsum(0) + parts * (1 - weights))


@dataclass
class _Receiver:
    """A receiver that is being decided on: candidates are its senders, from the latest to the earliest."""

    column: int
    rows: Int[Tensor, " C"]
    cuts: Float[Tensor, "C N P D"]
    read: Float[Tensor, "N P D"]
    plan: Plan | None
    shares: Float[Tensor, "C+1 N A V"] | None
    expected: Bool[Tensor, " C"]
    largest: int
    start: int = 0


def acdc(search: Search, *, progress: Progress = False, checkpoint: Path | None = None) -> Pruned:
    """Prune exactly as the definition does (`kcwb.discovery.sequential`), much faster.

    Parameters
    ----------
    search
        What to prune, by which metric, ablation and tau; taken to its end.
    progress
        Reported per batch, in candidate edges; the first report is `predict_seconds`.
    checkpoint
        A file to keep the state in after each receiver; if it is there, the search resumes from it, and when the search
        is done, it is removed. If it cannot be written, a warning says so. None for no checkpoint.

    Returns
    -------
    Pruned
        Edges, increases, loss, evaluations and near ties: an edge whose increase lies within `NEAR_TIE` of tau may
        differ from the sequential result, since sums are taken in another order.

    Raises
    ------
    CircuitError
        If the checkpoint is damaged, or another search's.
    """
    state = None if checkpoint is None else Checkpoint(checkpoint, search)
    found = run(search, state, progress)
    if state is not None:
        state.remove()
    return found


@torch.no_grad()
def run(search: Search, state: Checkpoint | None, progress: Progress) -> Pruned:
    """The same, for a caller that removes the checkpoint."""
    if state is not None:
        state.resume()
    with track(progress, int(search.start.sum()), "ACDC") as step:
        step(search.n_decided, f"takes about {predict_seconds(search):.0f} s" if search.visited == 0 else "resumed")
        while not search.done:
            search.visit(step)
            if state is not None:
                state.write()
    return search.result()


@verb
@torch.no_grad()
def predict_seconds(search: Search) -> float:
    """Roughly how long a search that has not begun will take, from timing a few candidates of it.

    It takes two costs, each of a batch of candidates: reading the logits, and recomputing all that follows the MLP
    half-way up while everything is still kept; and supposes that `_EVALUATED` of the edges are evaluated, each at the
    first cost plus `_LIVE` of the second. Both shares were measured on SmolLM2-135M at tau = 0.01; a larger tau takes
    less, a smaller one more.
    """
    current, graph = search.current, search.model.graph
    batch = max(1, min(8, search._most, search._rows // current.outputs[0, ..., 0].numel()))
    row = graph.mlp_sender(graph.n_layers // 2)
    output = current.at(current.outputs[row], current.need(row) is Need.EVERYWHERE).expand(
        batch, *(-1,) * current.outputs[row].ndim
    )
    plan = current.plan(row)
    current.loss_after(plan, output)  # warm up
    started = time.perf_counter()
    search.loss(search.model.network.logits(current.residual.expand(batch, -1, -1, -1)))
    read = time.perf_counter() - started
    current.loss_after(plan, output)
    both = time.perf_counter() - started
    edges = int(search.start.sum())
    return edges * _EVALUATED * (read + _LIVE * (both - 2 * read)) / batch
