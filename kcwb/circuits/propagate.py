"""Recompute only what a change reaches.

A circuit as it is now: what each receiver reads, what each node writes, on some prompts. When a node's output
changes, only nodes that it leads to along kept edges change, and only at the positions that matter:

- `logits` needs the positions that predict the answers;
- a node needs the positions that its kept receivers need;
- a query needs the positions of its head's output, but a key or a value needs all positions.

So a node is needed nowhere, at the answers, or everywhere (`Need`), and most late nodes at the answers alone. Where a
norm follows the attention (Gemma 2 and 3), what one head of a layer computes changes the scale of all of them: they are
needed where any of them is, and change together.

`Current.plan` lists once what a change of one node's output reaches. `Current.loss_after` then evaluates any number of
alternatives for that output at once, and `Current.commit` makes one of them the new state; both go through the plan
(`Current._propagate`):

1. make room for the changes of all senders in the plan, stacked in its order;
2. what the node itself writes more than before (all heads of its layer, if they share a norm);
3. step by step, layer by layer: what the heads, or the MLP, read now, what they compute from it, and how that differs;
4. what the unembedding reads now.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.plan import HeadsStep, Inputs, MlpStep, Need, Plan
from kcwb.models.forward import forward
from kcwb.models.network import Network
from kcwb.tasks.metrics import Loss


class Current:
    """A circuit's state on the prompts of a loss.

    Parameters
    ----------
    network, loss
        The transformer, and the metric on the prompts.
    ablated
        What cut edges deliver, `[S, N, T, D]`; None for zero.
    kept
        The circuit's edges. Changed in place by whoever prunes; `rebuild` reads it anew.

    Attributes
    ----------
    outputs
        `[S, N, T, D]`: what each node writes. Valid where the node is needed.
    needs
        Where each sender's output matters, by its kept outgoing edges; up to date for the nodes of which `need` was
        asked.
    """

    def __init__(
        self, network: Network, loss: Loss, ablated: Float[Tensor, "S N T D"] | None, kept: Bool[Tensor, "S R"]
    ) -> None:
        self.network, self.loss, self.kept = network, loss, kept
        self._ablated = ablated
        self._settles = ablated is None
        prompts = loss.prompts
        self._rows = torch.arange(len(prompts), device=network.device)[:, None]
        self._positions = prompts.positions
        self.needs: list[Need | None] = [None] * network.graph.n_senders
        self.rebuild()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Compute the whole state from `kept`, by one masked pass."""
        network, graph = self.network, self.network.graph
        run = forward(
            network, self.loss.prompts.tokens, kept=self.kept, ablated=self._ablated, senders=True, receivers=True
        )
        self.outputs = run.senders
        self.residual = self.at(run.residual, everywhere=False)
        self._heads_read = [x for x, _ in run.receivers]
        self._mlps_read = [y for _, y in run.receivers]
        self._projected = [
            dict(zip("qkv", (network.queries(i, q), network.keys(i, k), network.values(i, v)), strict=True))
            for i, (q, k, v) in enumerate(x.chunk(3) for x in self._heads_read)
        ]
        self._results = [
            network.head_results(i, parts["q"], parts["k"], parts["v"])
            for i, parts in enumerate(self._projected)
            if network.post_norms
        ]
        self.needs = [None] * graph.n_senders

    def at(self, x: Float[Tensor, "... N T D"], everywhere: bool) -> Float[Tensor, "... N P D"]:
        """All positions, or those of the answers."""
        return x if everywhere else x[..., self._rows, self._positions, :]

    def need(self, row: int) -> Need:
        """Where a sender's output matters, by its kept edges; those must be final."""
        known = self.needs[row]
        if known is None:
            rows = self.network.together(row)
            columns = self.kept[rows].any(0).nonzero()[:, 0].tolist()
            known = max((self._receiver_need(column) for column in columns), default=Need.NOWHERE)
            self.needs[rows] = [known] * (rows.stop - rows.start)
        return known

    def _receiver_need(self, column: int) -> Need:
        graph = self.network.graph
        if column == graph.n_receivers - 1:
            return Need.ANSWERS
        if self._receiver(column)[1] in "kv":
            return Need.EVERYWHERE
        return self.need(int(graph.receiver_node[column]))

    def reads(self, column: int, everywhere: bool) -> Float[Tensor, "N P D"]:
        """What a receiver reads, where its node is needed."""
        graph = self.network.graph
        if column == graph.n_receivers - 1:
            return self.residual
        return self.at(self._read_by(column), everywhere)

    def _receiver(self, column: int) -> tuple[int, str, int]:
        """The layer of a receiver of a head or MLP, whether it is "q", "k", "v" or "mlp", and the head."""
        n_heads = self.network.graph.n_heads
        layer, place = divmod(column, 3 * n_heads + 1)
        return layer, ("q", "k", "v", "mlp")[place // n_heads], place % n_heads

    def _read_by(self, column: int) -> Float[Tensor, "N T D"]:
        layer, place = divmod(column, 3 * self.network.graph.n_heads + 1)
        reads = self._heads_read[layer]
        return reads[place] if place < len(reads) else self._mlps_read[layer]

    def node_output(self, column: int, x: Float[Tensor, "B N P D"]) -> Float[Tensor, "B N P D"]:
        """What a node writes if a receiver of it reads `x`: keys and values everywhere, others where it is needed.

        Before the norm, if its layer's heads share one.
        """
        layer, kind, head = self._receiver(column)
        everywhere = self.need(int(self.network.graph.receiver_node[column])) is Need.EVERYWHERE
        x = self._settled(x, self.reads(column, everywhere or kind in "kv"))
        if kind == "mlp":
            return self.network.mlp(layer, x)
        heads = torch.tensor([head], device=self.network.device)
        parts = {k: self._cached(layer, k, heads, everywhere) for k in "qkv"}
        parts[kind] = self._project(layer, kind, x[None], heads, everywhere)
        return self._head_results(layer, parts, heads, everywhere)[0]

    def plan(self, row: int) -> Plan:
        """What a change of a sender's output reaches; all edges behind it must be final."""
        graph, plan = self.network.graph, Plan(row)
        self._admit(plan, self._together(row))
        place = graph.node(graph.sender_names[row])
        for layer in range(max(0, place.layer), graph.n_layers):
            for need in (Need.EVERYWHERE, Need.ANSWERS):
                self._plan_heads(plan, layer, need)
            column, mlp = graph.mlp_receiver(layer), graph.mlp_sender(layer)
            if mlp > row and self.need(mlp):
                everywhere = self.need(mlp) is Need.EVERYWHERE
                changed = Inputs.of(self._reached(plan, [column], everywhere))
                if changed is not None:
                    plan.steps.append(MlpStep(layer, everywhere, mlp, changed))
                    self._admit(plan, [mlp])
        plan.logits = Inputs.of(self._reached(plan, [graph.n_receivers - 1], everywhere=False))
        return plan

    def _plan_heads(self, plan: Plan, layer: int, need: Need) -> None:
        """Add the heads of a layer that change and are needed at the same positions."""
        graph, device = self.network.graph, self.network.device
        first, columns = graph.head_senders(layer).start, graph.attention_receivers(layer).start
        there = [h for h in range(graph.n_heads) if first + h > plan.row and self.need(first + h) is need]
        if not there:
            return
        reached: dict[str, Tensor] = {}
        for i, kind in enumerate("qkv"):
            of_kind = [columns + i * graph.n_heads + head for head in there]
            reached[kind] = self._reached(plan, of_kind, need is Need.EVERYWHERE or kind != "q")
        chosen = torch.stack([weights.any(1) for weights in reached.values()]).any(0).nonzero()[:, 0]
        if not len(chosen):
            return
        changed = {kind: Inputs.of(weights[chosen]) for kind, weights in reached.items()}
        heads = torch.tensor(there, device=device)[chosen]
        rows = torch.arange(first, first + graph.n_heads, device=device) if self.network.post_norms else heads + first
        plan.steps.append(HeadsStep(layer, need is Need.EVERYWHERE, heads, rows, changed))
        self._admit(plan, rows.tolist())

    def _together(self, row: int) -> list[int]:
        """The senders that change with one."""
        rows = self.network.together(row)
        return [*range(rows.start, rows.stop)]

    def _admit(self, plan: Plan, rows: list[int]) -> None:
        plan.changed += rows
        plan.everywhere += [row for row in rows if self.need(row) is Need.EVERYWHERE]

    def _reached(self, plan: Plan, columns: list[int], everywhere: bool) -> Bool[Tensor, "r C"]:
        """Which changed senders each receiver still reads, of those stacked at its positions."""
        rows = plan.everywhere if everywhere else plan.changed
        return self.kept[rows][:, columns].T.to(self.network.device)

    @torch.no_grad()
    def loss_after(self, plan: Plan, output: Float[Tensor, "B N P D"]) -> Float[Tensor, " B"]:
        """The loss if the plan's node wrote `output` (where it is needed), for each of B alternatives.

        `output` is what `node_output` gives, here and in `commit`.
        """
        return self.loss(self.network.logits(self._propagate(plan, output, keep=False)))

    @torch.no_grad()
    def commit(self, plan: Plan, output: Float[Tensor, "N P D"]) -> None:
        """Make an output of the plan's node part of the state, with all that follows from it."""
        self.residual = self._propagate(plan, output[None], keep=True)[0]

    @torch.no_grad()
    def commit_read(self, column: int, x: Float[Tensor, "N P D"]) -> None:
        """Make `x` what a receiver reads; its node's output and all that follows are committed by `commit`."""
        graph = self.network.graph
        if column == graph.n_receivers - 1:
            self.residual = x
            return
        layer, kind, head = self._receiver(column)
        node_everywhere = self.need(int(graph.receiver_node[column])) is Need.EVERYWHERE
        everywhere = node_everywhere or kind in "kv"
        x = self._settled(x, self.reads(column, everywhere))
        self._write(self._read_by(column), x, everywhere)
        if kind != "mlp":
            heads = torch.tensor([head], device=self.network.device)
            new = self._project(layer, kind, x[None, None], heads, node_everywhere)[0, 0]
            self._write(self._projected[layer][kind][head], new, everywhere)

    def _settled(self, x: Float[Tensor, "... N P D"], before: Float[Tensor, "... N P D"]) -> Tensor:
        """`x`, or zeros at positions where it is no more than what rounding left of `before`.

        A difference is rarely an exact zero, where the sum over no senders is one. A norm multiplies what is left by up
        to a thousand; a second one, of queries, keys or outputs, would make it a number like any other. Done under zero
        ablation, the only one under which a receiver may read nothing.
        """
        if not self._settles:
            return x
        least = 16 * torch.finfo(x.dtype).eps * before.abs().amax(-1, keepdim=True)
        return x * (x.abs().amax(-1, keepdim=True) > least)  # on a CPU five times faster than masked_fill

    def _write(self, whole: Tensor, part: Tensor, everywhere: bool) -> None:
        if everywhere:
            whole.copy_(part)
        else:
            whole[..., self._rows, self._positions, :] = part

    def _keep(self, whole: Tensor, index: Tensor, parts: Float[Tensor, "h B N P X"], everywhere: bool) -> None:
        for i, one in zip(index.tolist(), parts[:, 0], strict=True):
            self._write(whole[i], one, everywhere)

    def _propagate(self, plan: Plan, output: Float[Tensor, "B N P D"], keep: bool) -> Float[Tensor, "B N A D"]:
        """The final residual stream at the answers after a change; `keep` writes all on the way into the state."""
        size, (n_prompts, n_answers), width = output.shape[0], self._positions.shape, self.network.d_model
        n_tokens = self.outputs.shape[2]
        # 1. Room for the changes.
        answers = output.new_empty(len(plan.changed), size, n_prompts, n_answers, width)
        everywhere = output.new_empty(len(plan.everywhere), size, n_prompts, n_tokens, width)
        filled = {True: 0, False: 0}

        def record(rows: Tensor, new: Float[Tensor, "h B N P D"], is_everywhere: bool) -> None:
            stack, start, count = everywhere if is_everywhere else answers, filled[is_everywhere], len(rows)
            change = stack[start : start + count]
            torch.sub(new, self.at(self.outputs[rows], is_everywhere)[:, None], out=change)
            if is_everywhere:
                answers[filled[False] : filled[False] + count] = self.at(change, False)
                filled[True] += count
            filled[False] += count
            if keep:
                self._keep(self.outputs, rows, new, is_everywhere)

        def change_of(inputs: Inputs, is_everywhere: bool) -> Float[Tensor, "r B N P D"]:
            return inputs.read(everywhere if is_everywhere else answers)

        # 2. The node itself.
        place = self.network.graph.node(self.network.graph.sender_names[plan.row])
        is_everywhere = self.need(plan.row) is Need.EVERYWHERE
        written = output[None]
        if place.kind == "head":
            heads = torch.tensor([place.head], device=output.device)
            written = self._written(place.layer, heads, written, is_everywhere, keep)
        record(torch.tensor(self._together(plan.row), device=output.device), written, is_everywhere)
        # 3. What it reaches, in the order of computation.
        for step in plan.steps:
            if isinstance(step, MlpStep):
                before = self.at(self._mlps_read[step.layer], step.everywhere)
                x = self._settled(before + change_of(step.changed, step.everywhere)[0], before)
                if keep:
                    self._write(self._mlps_read[step.layer], x[0], step.everywhere)
                row = torch.tensor([step.row], device=output.device)
                record(row, self.network.mlp(step.layer, x)[None], step.everywhere)
            else:
                parts = {k: self._changed_part(step, k, change_of, size, keep) for k in "qkv"}
                results = self._head_results(step.layer, parts, step.heads, step.everywhere)
                written = self._written(step.layer, step.heads, results, step.everywhere, keep)
                record(step.rows, written, step.everywhere)
        # 4. The unembedding.
        if plan.logits is None:
            return self.residual.expand(size, -1, -1, -1)
        return self.residual + change_of(plan.logits, False)[0]

    def _changed_part(self, step: HeadsStep, kind: str, change_of, size: int, keep: bool) -> Float[Tensor, "h B N P K"]:
        """Queries, keys or values of a step's heads: new where their receivers change, else as they are."""
        cached = self._cached(step.layer, kind, step.heads, step.everywhere)
        inputs = step.changed[kind]
        if inputs is None:
            return cached
        everywhere = step.everywhere or kind != "q"
        heads = step.heads[inputs.places]
        places = heads + "qkv".index(kind) * self.network.graph.n_heads
        before = self.at(self._heads_read[step.layer][places], everywhere)[:, None]
        x = self._settled(before + change_of(inputs, everywhere), before)
        new = self._project(step.layer, kind, x, heads, step.everywhere)
        if keep:
            self._keep(self._heads_read[step.layer], places, x, everywhere)
            self._keep(self._projected[step.layer][kind], heads, new, everywhere)
        if len(heads) == len(step.heads):
            return new
        whole = cached.expand(-1, size, -1, -1, -1).clone()
        whole[inputs.places] = new
        return whole

    def _cached(self, layer: int, kind: str, heads: Tensor, everywhere: bool) -> Float[Tensor, "h 1 N P K"]:
        return self.at(self._projected[layer][kind][heads], everywhere or kind != "q")[:, None]

    def _project(
        self, layer: int, kind: str, x: Float[Tensor, "h B N P D"], heads: Tensor, everywhere: bool
    ) -> Float[Tensor, "h B N P K"]:
        if kind == "v":
            return self.network.values(layer, x, heads)
        if kind == "k":
            return self.network.keys(layer, x, heads)
        return self.network.queries(layer, x, heads, None if everywhere else self._positions)

    def _head_results(self, layer: int, parts: dict[str, Tensor], heads: Tensor, everywhere: bool) -> Tensor:
        positions = None if everywhere else self._positions
        return self.network.head_results(layer, parts["q"], parts["k"], parts["v"], heads, positions)

    def _written(
        self, layer: int, heads: Tensor, results: Float[Tensor, "h B N P D"], everywhere: bool, keep: bool
    ) -> Float[Tensor, "h B N P D"]:
        """What heads write, from their results; what all of the layer write, if they share a norm."""
        if not self.network.post_norms:
            return results
        if keep:
            self._keep(self._results[layer], heads, results, everywhere)
        whole = self.at(self._results[layer], everywhere)[:, None].repeat(1, results.shape[1], 1, 1, 1)
        whole[heads] = results
        return self.network.head_shares(layer, whole)
