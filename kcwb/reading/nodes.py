"""One node of a model or of a circuit: where it attends, what it writes, what it is joined to, what goes without it.

All of it for the full model (`circuit=None`) or in a circuit's own run, where cut edges deliver ablated values. What
two runs say of one node differs: in a circuit it reads less.

**Component logits.** The final norm divides the residual stream by one number per position, so that with this number
taken from the run the logits are a sum over what the nodes wrote: a node that writes a at END adds

    ((a - mean(a)) / scale) * gain @ W_U        (an RMS norm subtracts no mean)

to them. The sum over all senders that `logits` reads, plus the biases, is the run's logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import ABLATIONS, Ablation, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.errors import CircuitError, SettingError, choose
from kcwb.models.forward import Pass, forward, prompt_chunks
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.progress import Progress, track
from kcwb.reading.dla import final_scale
from kcwb.settings import Count
from kcwb.statistics import proportion_interval
from kcwb.tasks.metrics import answer_ranks, make_loss
from kcwb.tasks.prompts import Prompts, Task, check_same_weights
from kcwb.verbs import verb


@verb
def attention_pattern(
    model: Model,
    task: Task | Prompts,
    head: str,
    *,
    prompt: int = 0,
    circuit: Circuit | None = None,
    ablation: str | Ablation | None = None,
) -> pd.DataFrame:
    """Where a head attends on one prompt.

    Parameters
    ----------
    model
        The model.
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
    place = model.graph.node(head)
    if place.kind != "head":
        raise CircuitError(f"{head} does not attend: only heads do, a<layer>.h<head>.")
    run = _plan(model, task, circuit, ablation, prompt)
    with torch.no_grad():
        inputs = run.forward(run.prompts, receivers=True).receivers
        assert inputs is not None  # asked for in the line above
        x = inputs[place.layer][0]
        reads = x.chunk(3) if x.shape[0] > 1 else (x, x, x)
        chosen = torch.tensor([place.head], device=x.device)
        q, k = (part[[place.head]] if part.shape[0] > 1 else part for part in reads[:2])
        network = model.network
        pattern = network.pattern(
            place.layer, network.queries(place.layer, q, chosen), network.keys(place.layer, k, chosen)
        )
    length = int(run.prompts.lengths[0])
    tokens = run.prompts.tokens[0, :length].tolist()
    labels = [f"{i}:{model.tokenizer.decode([token])}" for i, token in enumerate(tokens)]
    return pd.DataFrame(pattern[0, 0, :length, :length].float().cpu().numpy(), index=labels, columns=labels)


def node_logits(
    model: Model,
    task: Task | Prompts,
    node: str,
    *,
    prompt: int | None = None,
    circuit: Circuit | None = None,
    ablation: str | Ablation | None = None,
) -> Float[Tensor, "N V"]:
    """What a node's output at END adds to the logits there, with the final norm's scale of the same run.

    Parameters
    ----------
    node
        Any node; for `logits` it is the whole of the run's logits. A node whose edge to `logits` a circuit has cut
        is shown as if it had one: what it would say, could it be heard.
    prompt
        Which of the prompts, from 0; None for all.

    Other parameters are those of `attention_pattern`.

    Returns
    -------
    Tensor
        `[N, V]` float32, on the model's device; before the final softcap, where the model has one (Gemma 2): parts add
        up to what is capped, not to the logits.

    Raises
    ------
    CircuitError
        If the model has no such node, or the circuit belongs to another model.
    SettingError
        If there is no such prompt, or an ablation needs the task.
    """
    graph = model.graph
    whole = graph.node(node).kind == "logits"
    run = _plan(model, task, circuit, ablation, prompt)
    found = []
    with torch.no_grad():
        for rows in prompt_chunks(model.network, run.prompts.tokens):
            part = run.prompts.select(range(len(run.prompts))[rows])
            passed = run.forward(part, senders=not whole)
            at = torch.arange(len(part), device=part.tokens.device), part.ends
            residual = passed.residual[at]
            if whole:
                found.append(model.network.logits(residual).float())
            else:
                assert passed.senders is not None  # asked for above
                found.append(_unembed(model.network, passed.senders[graph.sender_index(node)][at], residual))
    return torch.cat(found)


@verb
def component_logits(
    model: Model,
    task: Task | Prompts,
    node: str,
    *,
    k: Count = 10,
    prompt: int | None = None,
    circuit: Circuit | None = None,
    ablation: str | Ablation | None = None,
) -> pd.DataFrame:
    """The tokens that a node's output at END speaks for, most of all first.

    Parameters
    ----------
    k
        How many.

    Other parameters are those of `node_logits`.

    Returns
    -------
    DataFrame
        `rank`, `token` (its text), `token_id`, `logit` (what the node adds to it, the mean over prompts),
        `above_mean` (the same without the mean over the vocabulary, which no probability depends on) and `answer`
        (whether an answer to the prompts starts with it, and no other object of the relation does). With one `prompt`,
        whose answer is not among the first k, the answer follows with its own rank.
    """
    if k > model.network.d_vocab:
        raise SettingError(f"k={k}: the vocabulary has {model.network.d_vocab:,} tokens; ask for 1 to that many.")
    prompts = _prompts(task)
    logits = node_logits(model, task, node, prompt=prompt, circuit=circuit, ablation=ablation).mean(0)
    asked = prompts if prompt is None else prompts.select([prompt])
    answers = set(asked.answers[asked.told_at_end, 0].tolist())
    order = logits.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1, device=order.device)
    shown = order[:k].tolist()
    if prompt is not None:
        shown += [token for token in answers if token not in shown]
    mean = float(logits.mean())
    return pd.DataFrame(
        {
            "rank": [int(ranks[token]) for token in shown],
            "token": [model.tokenizer.decode([token]) for token in shown],
            "token_id": shown,
            "logit": [float(logits[token]) for token in shown],
            "above_mean": [float(logits[token]) - mean for token in shown],
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


@verb
def ablate_nodes(
    model: Model,
    circuit: Circuit | None,
    task: Task,
    nodes: Sequence[str],
    *,
    ablation: str | None = None,
    k: Count = 10,
    progress: Progress = True,
) -> pd.DataFrame:
    """How well the model, and a circuit alone, answer each fact before and after nodes are ablated.

    A node is ablated by cutting all of its outgoing edges, at every position.

    Parameters
    ----------
    model, circuit, task
        The full model is always run; the circuit too, unless it is None.
    nodes
        Senders: `input`, heads and MLPs.
    ablation
        What cut edges deliver, the circuit's and the nodes'; None for what the circuit was found with (`mean` without
        a circuit).
    k
        An answer counts as a hit when its rank is at most k.
    progress
        Reported per run.

    Returns
    -------
    DataFrame
        One row per run (`full model`, `circuit`), state (`before`, `after`), split (`D_val`, `D_test`) and fact:
        `prompt`, `answer`; `rank` and `probability` of the answer up to the token that decides (`kcwb.tasks.ranks`);
        `loss` (nll of the whole answer, nats); `hit`. `ablation_summary` takes means.

    Raises
    ------
    CircuitError
        If a node is not a sender of the model, or the circuit belongs to another model.
    SettingError
        If no node is named, `k` is below 1, or the ablation is not known.
    """
    if not nodes:
        raise SettingError(f"nodes={nodes!r}: give a list of at least one node, for example ['a0.h0'].")
    rows = [model.graph.sender_index(node) for node in nodes]
    if circuit is not None:
        check_same_model(model, circuit)
    check_same_weights(model, task)
    cuts = make_ablation(model, task, ablation or (circuit.ablation if circuit else "mean"))
    splits = {"D_val": cuts.usable(task.val)} | ({"D_test": cuts.usable(task.test)} if len(task.test) else {})
    runs: list[tuple[str, str, Bool[Tensor, "S R"] | None]] = [
        ("full model", "before", None),
        ("full model", "after", _without(model.graph.exists, rows)),
    ]
    if circuit is not None:
        runs += [("circuit", "before", circuit.kept), ("circuit", "after", _without(circuit.kept, rows))]
    tables = []
    with track(progress, len(runs) * len(splits), "ablation") as step:
        for run, state, kept in runs:
            for split, prompts in splits.items():
                answers = _answers(model, kept, prompts, cuts, k)
                tables.append(answers.assign(run=run, state=state, split=split))
                step()
    columns = ["run", "state", "split", "prompt", "answer", "rank", "probability", "loss", "hit"]
    return pd.concat(tables, ignore_index=True)[columns]


@verb
def ablation_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means of the table of `ablate_nodes` over facts.

    Returns
    -------
    DataFrame
        One row per run, split and state, in the table's order: number of facts `n`; `hit`, the share of them, with its
        95% Wilson interval `low` to `high`; median `rank`, mean `probability` and `loss`.
    """
    groups = dict(iter(table.groupby(["run", "split", "state"])))
    order = [dict.fromkeys(table[name]) for name in ("run", "split", "state")]
    rows = []
    for run, split, state in itertools.product(*order):
        part = groups[run, split, state]
        low, high = proportion_interval(part["hit"])
        middle = {"rank": part["rank"].median(), "probability": part["probability"].mean(), "loss": part["loss"].mean()}
        key = {"run": run, "split": split, "state": state, "n": len(part)}
        rows.append({**key, "hit": part["hit"].mean(), "low": low, "high": high, **middle})
    return pd.DataFrame(rows)


# --- runs ---


class _Plan(NamedTuple):
    """What is to be run, and how."""

    network: Network
    prompts: Prompts
    kept: Bool[Tensor, "S R"] | None
    cuts: Ablation | None

    def forward(self, prompts: Prompts, *, senders: bool = False, receivers: bool = False) -> Pass:
        """One pass over some of the prompts."""
        ablated = None if self.cuts is None else self.cuts.values(prompts)
        return forward(
            self.network, prompts.tokens, kept=self.kept, ablated=ablated, senders=senders, receivers=receivers
        )


def _plan(
    model: Model, task: Task | Prompts, circuit: Circuit | None, ablation: str | Ablation | None, prompt: int | None
) -> _Plan:
    prompts = _prompts(task)
    if prompt is not None and not 0 <= prompt < len(prompts):
        raise SettingError(f"prompt={prompt}: there are {len(prompts)}, 0 to {len(prompts) - 1}.")
    if isinstance(task, Task):
        check_same_weights(model, task)
    cuts = None
    if circuit is not None:
        check_same_model(model, circuit)
        cuts = _cuts(model, task, ablation or circuit.ablation)
        if prompt is None:
            prompts = cuts.usable(prompts)
    if prompt is not None:
        prompts = prompts.select([prompt])
    return _Plan(model.network, prompts, None if circuit is None else circuit.kept, cuts)


def _prompts(task: Task | Prompts) -> Prompts:
    return task.val if isinstance(task, Task) else task


def _cuts(model: Model, task: Task | Prompts, ablation: str | Ablation) -> Ablation:
    if isinstance(ablation, Ablation):
        return ablation
    if isinstance(task, Task):
        return make_ablation(model, task, ablation)
    if choose("The ablation", ablation, ABLATIONS) == "mean":
        raise SettingError(
            "mean ablation averages over a task's prompts: pass the task, or its make_ablation(model, task, 'mean')."
        )
    return Ablation(ablation, model.network)


def _unembed(network: Network, output: Float[Tensor, "N D"], residual: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Push a summand of the final residual stream through the final norm, held at the stream's scale, and W_U."""
    return network.logit_shares(output).float() / final_scale(network, residual)[:, None]


# --- ablating ---


def _without(kept: Bool[Tensor, "S R"], rows: Sequence[int]) -> Bool[Tensor, "S R"]:
    """A mask without what some senders deliver."""
    kept = kept.clone()
    kept[list(rows)] = False
    return kept


def _answers(model: Model, kept: Bool[Tensor, "S R"] | None, prompts: Prompts, cuts: Ablation, k: int) -> pd.DataFrame:
    """How a run answers each prompt."""
    logits = run_circuit(model, kept, prompts, cuts)
    ranks = answer_ranks(logits, prompts)
    steps = torch.arange(prompts.answers.shape[1], device=logits.device)
    logp = logits.float().log_softmax(-1).gather(-1, prompts.answers[..., None])[..., 0]
    probability = (logp * (steps <= prompts.decides[:, None])).sum(-1).exp()
    return pd.DataFrame(
        {
            "prompt": prompts.texts,
            "answer": [fact.object for fact in prompts.facts],
            "rank": ranks.tolist(),
            "probability": probability.tolist(),
            "loss": make_loss(model, prompts, "nll").per_prompt(logits).tolist(),
            "hit": (ranks <= k).tolist(),
        }
    )
