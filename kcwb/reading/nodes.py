"""One node of a model or of a circuit: where it attends, what it writes, and what it is joined to.

All of it for the full model (`circuit=None`) or in a circuit's own run, where cut edges deliver ablated values. What
two runs say of one node differs: in a circuit it reads less.

**Component logits.** The final norm divides the residual stream by one number per position, so that with this number
taken from the run the logits are a sum over what the nodes wrote: a node that writes a at END adds

    ((a - mean(a)) / scale) * gain @ W_U        (an RMS norm subtracts no mean)

to them. The sum over all senders that `logits` reads, plus the biases, is the run's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, check_made_for, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.errors import CircuitError, SettingError
from kcwb.models.forward import Pass, forward
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.models.network import Network
from kcwb.reading.dla import final_scale
from kcwb.reading.positions import check_any, token_text
from kcwb.settings import Count
from kcwb.tasks.metrics import at_end
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb


@verb
def attention_pattern(
    model: Model,
    task: Task | Prompts,
    head: str,
    *,
    prompt: int = 0,
    circuit: Circuit | None = None,
    ablation: str | AblationKind | Ablation | None = None,
) -> pd.DataFrame:
    """Where a head attends on one prompt.

    Parameters
    ----------
    task
        A task, for its D_val, or any prompts.
    head
        `a<layer>.h<head>`.
    prompt
        Which of the prompts, from 0.
    circuit
        The circuit that is run alone; None for the full model.
    ablation
        What the circuit's cut edges deliver: `zero`, `mean` or `resample`, or an Ablation (which prompts without their
        task need, unless it is `zero`). None for what the circuit was found with.

    Returns
    -------
    DataFrame
        Rows are the prompt's tokens as queries, columns the same as keys, both labelled `position:token`. Rows sum to
        1; what comes after a token is 0.

    Raises
    ------
    CircuitError
        If the model has no such head, or the circuit belongs to another model.
    SettingError
        If there is no such prompt, or an ablation needs the task.
    """
    run = planned_run(model, task, circuit, ablation, prompt)
    place = model.graph.node(head)
    if place.kind != "head":
        raise CircuitError(f"{head} does not attend: only heads do, a<layer>.h<head>.")
    pattern = layer_patterns(model, run, place.layer, [place.head])[0, 0]
    tokens = run.prompts.tokens[0, : int(run.prompts.lengths[0])].tolist()
    labels = [f"{i}:{token_text(model, token)}" for i, token in enumerate(tokens)]
    shown = pattern[: len(tokens), : len(tokens)].float().cpu().numpy()
    return pd.DataFrame(shown, index=labels, columns=labels)


@torch.no_grad()
def layer_patterns(
    model: Model, run: PlannedRun, layer: int, heads: Sequence[int] | None = None
) -> Float[Tensor, "h N T T"]:
    """The attention of some heads of a layer, or of all, on all prompts of a run: rows are queries."""
    network, width = model.network, run.prompts.tokens.shape[1]
    heads = list(range(model.graph.n_heads)) if heads is None else list(heads)
    chosen = torch.tensor(heads, device=network.device)

    def work(rows: slice) -> Tensor:
        x = run.forward(run.prompts.select(rows), receivers=True).receivers[layer][0]
        reads = x.chunk(3) if x.shape[0] > 1 else (x, x)  # in a circuit each head reads its own
        q, k = (part[heads] if part.shape[0] > 1 else part for part in reads[:2])
        pattern = network.pattern(layer, network.queries(layer, q, chosen), network.keys(layer, k, chosen))
        room = width - pattern.shape[-1]
        return torch.nn.functional.pad(pattern, (0, room, 0, room))

    return torch.cat([*by_prompts(network, run.prompts.tokens, work)], dim=1)


def written_logits(model: Model, run: PlannedRun, node: str) -> Float[Tensor, "N V"]:
    """What a node's output at END adds to the logits there, with the final norm's scale of the same run; float32.

    See `component_logits`.
    """
    graph, network = model.graph, model.network
    whole = graph.node(node).kind == "logits"

    @torch.no_grad()
    def written(rows: slice) -> Tensor:
        part = run.prompts.select(rows)
        passed = run.forward(part, senders=not whole)
        residual = at_end(passed.residual, part)
        if whole:
            return network.logits(residual).float()
        # the node's summand, by the final norm held at the stream's scale
        share = network.logit_shares(at_end(passed.senders[graph.sender_index(node)], part)).float()
        return share / final_scale(network, residual)[:, None]

    return torch.cat([*by_prompts(network, run.prompts.tokens, written)])


@verb
def component_logits(
    model: Model,
    task: Task | Prompts,
    node: str,
    *,
    k: Count = 10,
    prompt: int | None = None,
    circuit: Circuit | None = None,
    ablation: str | AblationKind | Ablation | None = None,
) -> pd.DataFrame:
    """The tokens that a node's output at END speaks for, most of all first.

    Parameters
    ----------
    node
        Any node; for `logits` it is the whole of the run's logits. A node whose edge to `logits` a circuit has cut
        is shown as if it had one: what it would say, could it be heard.
    k
        How many tokens.
    prompt
        Which of the prompts, from 0; None for all.

    Other parameters are those of `attention_pattern`.

    Returns
    -------
    DataFrame
        `rank`, `token` (its text), `token_id`, `logit` (what the node adds to it, the mean over prompts),
        `above_mean` (the same without the mean over the vocabulary, which no probability depends on) and `answer`
        (whether an answer to the prompts starts with it, and no other object of the relation does). With one `prompt`,
        whose answer is not among the first k, the answer follows with its own rank. Before the final softcap, where
        the model has one (Gemma 2): parts add up to what is capped, not to the logits.

    Raises
    ------
    CircuitError
        If the model has no such node, or the circuit belongs to another model.
    SettingError
        If there is no such prompt, an ablation needs the task, or the vocabulary has no `k` tokens.
    """
    if k > model.network.d_vocab:
        raise SettingError(f"k={k}: the vocabulary has {model.network.d_vocab:,} tokens; ask for 1 to that many.")
    run = planned_run(model, task, circuit, ablation, prompt)
    logits = written_logits(model, run, node).mean(0)
    told = zip(run.prompts.firsts, run.prompts.told_at_end.tolist(), strict=True)
    answers = sorted({token for firsts, at_end in told if at_end for token in firsts})
    order = logits.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1, device=order.device)
    shown = order[:k].tolist()
    if prompt is not None:
        shown += [token for token in answers if token not in shown]
    values = logits[shown].tolist()
    mean = float(logits.mean())
    return pd.DataFrame(
        {
            "rank": ranks[shown].tolist(),
            "token": [token_text(model, token) for token in shown],
            "token_id": shown,
            "logit": values,
            "above_mean": [value - mean for value in values],
            "answer": [token in answers for token in shown],
        }
    )


@verb
def node_edges(circuit: Circuit, node: str) -> pd.DataFrame:
    """A circuit's edges into and out of a node.

    Returns
    -------
    DataFrame
        `direction` (`in`, `out`), `sender`, `receiver` and `score`; incoming ones first, each strongest first.

    Raises
    ------
    CircuitError
        If the circuit's graph has no such node.
    """
    circuit.graph.node(node)
    edges = circuit.edges
    into = edges[edges["receiver"].str.split("<").str[0] == node]
    out = edges[edges["sender"] == node]
    both = pd.concat([into.assign(direction="in"), out.assign(direction="out")], ignore_index=True)
    return both[["direction", "sender", "receiver", "score"]]


# --- runs ---


class PlannedRun(NamedTuple):
    """What is to be run, and how; `rows` are the prompts' numbers among those that were given."""

    network: Network
    prompts: Prompts
    kept: Bool[Tensor, "S R"] | None
    cuts: Ablation | None
    rows: Sequence[int]

    def forward(self, prompts: Prompts, *, senders: bool = False, receivers: bool = False) -> Pass:
        """One pass over some of the prompts."""
        ablated = self.ablated(prompts)
        return forward(
            self.network, prompts.tokens, kept=self.kept, ablated=ablated, senders=senders, receivers=receivers
        )

    def ablated(self, prompts: Prompts) -> Float[Tensor, "S N T D"] | None:
        """What cut edges deliver; None for zero, and without a circuit."""
        return None if self.cuts is None else self.cuts.values(prompts)


def planned_run(
    model: Model,
    task: Task | Prompts,
    circuit: Circuit | None,
    ablation: str | AblationKind | Ablation | None,
    prompt: int | None,
) -> PlannedRun:
    """The run of a model or of a circuit on one of some prompts, or on all; parameters of `attention_pattern`."""
    prompts = task.val if isinstance(task, Task) else task
    check_any(prompts)
    if prompt is not None and not 0 <= prompt < len(prompts):
        raise SettingError(f"prompt={prompt}: there are {len(prompts)}, 0 to {len(prompts) - 1}.")
    if isinstance(task, Task):
        check_same_weights(model, task)
    kept = cuts = None
    if circuit is not None:
        check_same_model(model, circuit)
        kept, cuts = circuit.kept, ablation or circuit.ablation
        if not isinstance(cuts, Ablation):
            cuts = make_ablation(model, task if isinstance(task, Task) else None, cuts)
        check_made_for(model, cuts)
    if prompt is not None:
        return PlannedRun(model.network, prompts.select([prompt]), kept, cuts, [prompt])
    usable = prompts if cuts is None else cuts.usable(prompts)
    rows = range(len(prompts)) if usable is prompts else prompts.paired.nonzero()[:, 0].tolist()
    return PlannedRun(model.network, usable, kept, cuts, rows)
