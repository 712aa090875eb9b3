"""Many circuits on the same prompts, each in the time that its own nodes take.

It is the masked pass of `kcwb.models.forward`, which is what this is tested against, without what no answer feels:

1. A node is computed only if its output reaches the answers along kept edges, and only where that matters (`Need`): the
   late ones at the positions of the answers alone.
2. A receiver reads `base + sum of its kept senders' differences` or `everything - sum of its cut senders'`, whichever
   has fewer terms, so that a circuit of few edges, and what is left without it, cost few.
3. What does not depend on the circuit (what cut edges deliver, and its sum before each receiver) is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.plan import Need
from kcwb.models.forward import forward
from kcwb.models.network import Network
from kcwb.tasks.prompts import Prompts

#: The share of all edges up to which few are kept, or few cut; between, sums over all of them at once are quicker.
_FEW = 0.04
#: Heads or MLP of a layer, by need -> in the last two runs of theirs, which they were, what they read, and wrote.
_Made = dict[tuple[int, int, int], deque[tuple[list[int], list[Tensor], Tensor]]]


def needs(network: Network, kept: Bool[Tensor, "S R"]) -> Int[Tensor, " S"]:
    """Where each sender's output matters to the answers, as `Need`; the heads that share a norm alike."""
    graph = network.graph
    of_column = torch.zeros(graph.n_receivers, dtype=torch.long)
    of_column[-1] = Need.ANSWERS
    found = torch.zeros(graph.n_senders, dtype=torch.long)

    def settle(rows: slice) -> Tensor:
        found[rows] = (kept[rows] * of_column).amax(1)
        return found[rows]

    for layer in reversed(range(graph.n_layers)):
        mlp, heads = graph.mlp_sender(layer), graph.head_senders(layer)
        of_column[graph.mlp_receiver(layer)] = settle(slice(mlp, mlp + 1))[0]
        own = settle(heads)
        if network.post_norms:
            own = found[heads] = own.max().expand(graph.n_heads)
        alike = torch.where(own > 0, Need.EVERYWHERE, Need.NOWHERE)
        of_column[graph.attention_receivers(layer)] = torch.cat([own, alike, alike])
    settle(slice(0, 1))
    return found


class MaskedRuns:
    """The logits of any circuits on some prompts.

    Parameters
    ----------
    network, prompts
        The transformer, and what it is asked.
    ablated
        What cut edges deliver, `[S, N, T, D]`; None for zero.
    """

    def __init__(self, network: Network, prompts: Prompts, ablated: Float[Tensor, "S N T D"] | None) -> None:
        self.network, self.prompts, self._ablated = network, prompts, ablated
        self._rows = torch.arange(len(prompts), device=network.device)[:, None]
        self._embedding = network.embed(prompts.tokens)
        self._bases = self._sums_of_ablated()

    @torch.no_grad()
    def _sums_of_ablated(self) -> list[Float[Tensor, "N T D"]]:
        """What heads and MLP of each layer, and at last the unembedding, read with all edges cut."""
        graph, x = self.network.graph, torch.zeros_like(self._embedding)

        def after(rows: slice, x: Tensor) -> Tensor:
            return x if self._ablated is None else x + self._ablated[rows].sum(0)

        x, found = after(slice(0, 1), x), []
        for layer in range(graph.n_layers):
            written = after(graph.head_senders(layer), x) + self.network.constant(layer)
            found += [x, x if graph.parallel else written]
            mlp = graph.mlp_sender(layer)
            x = after(slice(mlp, mlp + 1), written)
        return [*found, x]

    def at(self, x: Float[Tensor, "... N T D"], everywhere: bool) -> Float[Tensor, "... N P D"]:
        """All positions, or those of the answers."""
        return x if everywhere else x[..., self._rows, self.prompts.positions, :]

    @torch.no_grad()
    def logits(self, kept: Bool[Tensor, "S R"]) -> Float[Tensor, "N A V"]:
        """Logits at the positions that predict the answers; 0 where an answer has fewer tokens."""
        kept = kept.cpu() & self.network.graph.exists
        if self._is_dense(kept):
            return self._dense(kept)
        return self._from(self._begin(_Stream(self, kept)), 0)

    def _is_dense(self, kept: Bool[Tensor, "S R"]) -> bool:
        return _FEW < float(kept.sum()) / self.network.graph.n_edges < 1 - _FEW

    def _dense(self, kept: Bool[Tensor, "S R"]) -> Float[Tensor, "N A V"]:
        run = forward(self.network, self.prompts.tokens, kept=kept, ablated=self._ablated)
        return self._logits(self.at(run.residual, False))

    @torch.no_grad()
    def without_each(
        self, kept: Bool[Tensor, "S R"], edges: Int[Tensor, "E 2"]
    ) -> Iterator[tuple[int, Float[Tensor, "N A V"]]]:
        """The same of a circuit, with -1; then of the circuit without each edge alone, with its place in `edges`.

        What comes before an edge's receiver stays as it was, so that edges come from the last layer to the first.
        """
        stream, graph = self._begin(_Stream(self, kept)), self.network.graph
        yield -1, self._from(stream, 0)
        for i in edges[:, 1].argsort(descending=True, stable=True).tolist():
            layer = min(graph.n_layers, int(edges[i, 1]) // (3 * graph.n_heads + 1))
            stream.rewind(layer)
            stream.kept[*edges[i]] = False
            yield i, self._from(stream, layer)
            stream.kept[*edges[i]] = True

    def _begin(self, stream: _Stream) -> _Stream:
        """Write the embedding."""
        if stream.needs[0]:
            stream.write([0], self.at(self._embedding, bool(stream.needs[0] == Need.EVERYWHERE))[None])
        return stream

    def _from(self, stream: _Stream, start: int) -> Float[Tensor, "N A V"]:
        """Run a circuit from a layer on, or from what comes after the last one."""
        network, graph, found = self.network, self.network.graph, stream.needs
        for layer in range(start, graph.n_layers):
            stream.mark(layer)
            first, mlp = graph.head_senders(layer).start, graph.mlp_sender(layer)
            for need in (Need.EVERYWHERE, Need.ANSWERS):
                heads = [h for h in range(graph.n_heads) if found[first + h] == need]
                if heads:
                    self._heads(stream, layer, heads, need is Need.EVERYWHERE)
            if found[mlp]:
                y = stream.read(2 * layer + 1, [graph.mlp_receiver(layer)], bool(found[mlp] == Need.EVERYWHERE))[0]
                stream.write([mlp], stream.made(layer, [mlp], [y], network.mlp)[None])
        stream.mark(graph.n_layers)
        return self._logits(stream.read(2 * graph.n_layers, [graph.n_receivers - 1], False)[0])

    def _logits(self, residual: Float[Tensor, "N A D"]) -> Float[Tensor, "N A V"]:
        real = self.prompts.answer_mask
        logits = self.network.logits(residual[real])
        return logits.new_zeros(*real.shape, logits.shape[-1]).masked_scatter_(real[..., None], logits)

    def _heads(self, stream: _Stream, layer: int, heads: list[int], everywhere: bool) -> None:
        network, graph = self.network, self.network.graph
        first, column = graph.head_senders(layer).start, graph.attention_receivers(layer).start
        index = torch.tensor(heads, device=network.device)
        positions = None if everywhere else self.prompts.positions

        def read(kind: int, where: bool) -> Float[Tensor, "h N P D"]:
            return stream.read(2 * layer, [column + kind * graph.n_heads + head for head in heads], where)

        def write(layer: int, *reads: Tensor) -> Float[Tensor, "h N P D"]:
            q = network.queries(layer, reads[0], index, positions)
            k, v = network.keys(layer, reads[1], index), network.values(layer, reads[2], index)
            results = network.head_results(layer, q, k, v, index, positions)
            return network.head_shares(layer, results) if len(heads) == graph.n_heads else results

        reads = [read(kind, everywhere or kind > 0) for kind in range(3)]
        rows = [first + head for head in heads]
        stream.write(rows, stream.made(layer, rows, reads, write))


class ChangingRun:
    """The logits of a circuit that edges leave and enter, step by step.

    What is recomputed:

    1. Everything stands before the first layer in which a needed node reads other edges than in the run before, or is
       needed elsewhere than it was.
    2. From there on, what nodes read is summed anew. Where that is what an MLP, or the heads of a layer that are needed
       alike, read in one of the last two runs of theirs, they write what they wrote then.

    So only what a change reaches is computed again, and the logits are bit for bit those of `MaskedRuns.logits`,
    whatever the steps that led to a circuit.
    """

    def __init__(self, runs: MaskedRuns) -> None:
        self._runs = runs
        self._stream: _Stream | None = None
        self._made: _Made = {}

    @torch.no_grad()
    def logits(self, kept: Bool[Tensor, "S R"]) -> Float[Tensor, "N A V"]:
        """What `MaskedRuns.logits` gives."""
        runs = self._runs
        before, self._stream = self._stream, None  # a run that is cancelled leaves nothing to go on from
        kept = kept.cpu() & runs.network.graph.exists
        if runs._is_dense(kept):
            return runs._dense(kept)
        stream = _Stream(runs, kept, self._made)
        start = 0 if before is None else stream.resume(before)
        logits = runs._from(stream if start else runs._begin(stream), start)
        self._stream = stream
        return logits


class _Stream:
    """What has been written in a run so far, as differences from what cut edges deliver, and what receivers read of it.

    The differences of senders that matter everywhere are stacked at all positions, those of all senders at the
    answers'.
    """

    def __init__(self, runs: MaskedRuns, kept: Bool[Tensor, "S R"], made: _Made | None = None) -> None:
        self._runs, self.kept, self._made = runs, kept.cpu() & runs.network.graph.exists, made
        self.needs = found = needs(runs.network, self.kept)
        shape = runs._embedding.shape
        self._rows: dict[bool, list[int]] = {True: [], False: []}
        self._stacks = {
            everywhere: runs._embedding.new_empty(count, *size)
            for everywhere, count, size in (
                (True, int((found == Need.EVERYWHERE).sum()), shape),
                (False, int((found > 0).sum()), (*runs.prompts.positions.shape, shape[-1])),
            )
        }
        self._totals: dict[bool, Tensor | float] = {True: 0.0, False: 0.0}
        self._marks: dict[int, tuple[dict[bool, list[int]], dict[bool, Tensor | float]]] = {}

    def made(
        self, layer: int, rows: list[int], reads: list[Tensor], make: Callable[..., Float[Tensor, "*h N P D"]]
    ) -> Float[Tensor, "*h N P D"]:
        """What some senders of a layer, needed alike, make of what they read; remembered, if anything is."""
        if self._made is None:
            return make(layer, *reads)
        before = self._made.setdefault((layer, len(reads), int(self.needs[rows[0]])), deque(maxlen=2))
        for old_rows, old_reads, output in before:
            if old_rows == rows and all(map(torch.equal, old_reads, reads)):
                return output
        output = make(layer, *reads)
        before.append((rows, reads, output))
        return output

    def mark(self, layer: int) -> None:
        """Remember what was written before a layer."""
        self._marks[layer] = {key: [*rows] for key, rows in self._rows.items()}, {**self._totals}

    def rewind(self, layer: int) -> None:
        """Forget what a layer and those behind it wrote."""
        rows, totals = self._marks[layer]
        self._rows, self._totals = {key: [*some] for key, some in rows.items()}, {**totals}

    def resume(self, before: _Stream) -> int:
        """Take what another run wrote before the first layer in which they differ, and return that layer.

        With 0 nothing is taken. The other run is of no use afterwards: its room is taken, too.
        """
        graph, rows = self._runs.network.graph, (self.needs != before.needs).nonzero()[:, 0]
        columns = (self._live() != before._live()).any(0).nonzero()[:, 0]
        layers = [(rows - 1).div(graph.n_heads + 1, rounding_mode="floor"), columns // (3 * graph.n_heads + 1)]
        start = int(torch.cat([*layers, torch.tensor([graph.n_layers])]).min())
        if start <= 0:
            return 0
        self._marks = {layer: mark for layer, mark in before._marks.items() if layer <= start}
        self.rewind(start)
        for everywhere, written in self._rows.items():
            old = before._stacks[everywhere]
            if len(old) < len(self._stacks[everywhere]):
                self._stacks[everywhere][: len(written)] = old[: len(written)]
            else:
                self._stacks[everywhere] = old
        return start

    def _live(self) -> Bool[Tensor, "S R"]:
        """The kept edges into nodes that matter."""
        needed = torch.cat([self.needs > 0, torch.tensor([True])])
        return self.kept & needed[self._runs.network.graph.receiver_node]

    def write(self, rows: list[int], outputs: Float[Tensor, "s N P D"]) -> None:
        """Take in the outputs of some senders that matter at the same positions."""
        everywhere = bool(self.needs[rows[0]] == Need.EVERYWHERE)
        if self._runs._ablated is not None:
            outputs = outputs - self._runs.at(self._runs._ablated[rows], everywhere)
        if everywhere:
            self._add(True, rows, outputs)
            outputs = self._runs.at(outputs, False)
        self._add(False, rows, outputs)

    def _add(self, everywhere: bool, rows: list[int], outputs: Tensor) -> None:
        start = len(self._rows[everywhere])
        self._stacks[everywhere][start : start + len(rows)] = outputs
        self._rows[everywhere] += rows
        self._totals[everywhere] = self._totals[everywhere] + outputs.sum(0)

    def read(self, place: int, columns: list[int], everywhere: bool) -> Float[Tensor, "r N P D"]:
        """What some receivers of a place in the model read; one for all of them, if all read the same."""
        rows, stack = self._rows[everywhere], self._stacks[everywhere]
        keeps = self.kept[rows][:, columns]
        if len(columns) > 1 and bool((keeps == keeps[:, :1]).all()):
            keeps = keeps[:, :1]
        some, lacking = keeps.any(1), ~keeps.all(1)
        x = self._runs.at(self._runs._bases[place], everywhere)
        if some.sum() <= lacking.sum():
            chosen, weights = some.nonzero()[:, 0], keeps.to(stack.dtype)
        else:
            chosen, weights = lacking.nonzero()[:, 0], -(~keeps).to(stack.dtype)
            x = x + self._totals[everywhere]
        if 2 * len(chosen) < len(rows):  # else a copy of them costs more than terms that are 0
            weights, stack = weights[chosen], stack[chosen.to(stack.device)]
        product = weights.T.to(stack.device) @ stack[: len(weights)].flatten(1)
        return x + product.unflatten(1, x.shape)


class SoftRuns(MaskedRuns):
    """The same for gates between 0 and 1 on some edges, differentiable by them: `gate a_u + (1 - gate) abl_u` arrives.

    All other edges are cut. With gates of 0 and 1 the logits are those of `MaskedRuns`.
    """

    def gated(
        self, edges: Int[Tensor, "E 2"], gates: Float[Tensor, " E"], kept: Bool[Tensor, "S R"]
    ) -> Float[Tensor, "N A V"]:
        """Logits with a gate on each of some edges, all of which are in the mask `kept`."""
        matrix = gates.new_zeros(kept.shape).index_put((edges[:, 0], edges[:, 1]), gates)
        return self._from(self._begin(_SoftStream(self, kept, matrix)), 0)


class _SoftStream(_Stream):
    """What has been written, one tensor per sender and none of them changed in place."""

    def __init__(self, runs: MaskedRuns, kept: Bool[Tensor, "S R"], gates: Float[Tensor, "S R"]) -> None:
        super().__init__(runs, kept)
        self._gates = gates
        self._outputs: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}

    def _add(self, everywhere: bool, rows: list[int], outputs: Tensor) -> None:
        self._outputs[everywhere].update(zip(rows, outputs, strict=True))

    def read(self, place: int, columns: list[int], everywhere: bool) -> Float[Tensor, "r N P D"]:
        x, outputs = self._runs.at(self._runs._bases[place], everywhere), self._outputs[everywhere]
        rows = [row for row, some in zip(outputs, self.kept[list(outputs)][:, columns].any(1), strict=True) if some]
        if not rows:
            return x[None]
        stack = torch.stack([outputs[row] for row in rows])
        weights = self._gates[rows][:, columns].to(stack.dtype)
        return x + (weights.T @ stack.flatten(1)).unflatten(1, x.shape)
