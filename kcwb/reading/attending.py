"""Why does a head look there: its attention score, split by who made the query and who made the key.

The score of a query position for a key position is q . k, times a scale. The query is linear in what the earlier nodes
wrote there, if the norms that it passes (that of the layer; that of queries, where a family has one) have the scale
that they have in the run. So

    score = sum over senders u of scale (q_u . k) + biases = sum over senders w of scale (q . k_w) + biases,

with q_u what u's output adds to the query, rotated as the query is, and k_w likewise: **two splits of the same score**,
one by the senders into the query (side `q`), one by those into the key (side `k`). Both at once is
`attending_pairs`: score = sum over u and w of scale (q_u . k_w).

It is exact on all families that load: rotary or learned positions (which are part of `input`), norms of any kind,
biases, grouped keys, windows. Where scores are bounded (Gemma 2's softcap) what is split is the score *before* the
bound. In a circuit's run each sender delivers what its edge to the head's query or key does; what cut edges deliver
instead is one row, `cut edges`.

A score that all positions have in common decides nothing. So compare: with another relation's prompts (`other`), or
with another position (`to`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind
from kcwb.circuits.circuit import Circuit
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.reading.dla import named_heads
from kcwb.reading.nodes import PlannedRun, planned_run
from kcwb.reading.positions import check_subjects
from kcwb.reading.roles import circuit_heads
from kcwb.settings import Natural
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task
from kcwb.verbs import verb

#: Rows beside those of senders: what cut edges deliver in a circuit, and what comes from no node.
CUT, BIASES = "cut edges", "biases"
#: A position in each prompt: by name, or counted from the first token, 0.
Place = Literal["subject", "end", "first"] | Natural


@verb
def why_attends(
    model: Model,
    task: Task | Prompts,
    head: str | Sequence[str] | None = None,
    *,
    prompt: Natural | None = None,
    at: Place = "end",
    to: Place = "subject",
    other: Task | Prompts | None = None,
    each: bool = False,
    circuit: Circuit | None = None,
    ablation: str | AblationKind | Ablation | None = None,
) -> pd.DataFrame:
    """Which senders make a head's query and key meet; the mean over prompts.

    Parameters
    ----------
    task
        A task, for its D_val, or any prompts.
    head
        `a<layer>.h<head>`, or several; None for all of the circuit, or of the model.
    prompt
        Which of the prompts, from 0; None for the mean over all in which the key is in sight.
    at, to
        The positions of the query and of the key: `end` (the prompt's last token), `subject` (the subject's last
        token), `first`, or a number from 0.
    other
        Another relation's task or prompts, for the column `contrast`.
    each
        Say it of each prompt in which the key is in sight, instead of the mean; not with `other`.
    circuit, ablation
        As in `attention_pattern`; None for the full model.

    Returns
    -------
    DataFrame
        One row per head, side and sender: `head`, `side` (`q` or `k`), `sender`, `score` (what is added to q . k times
        the scale, before a softcap where the family has one) and, with `other`, `contrast` (`score` minus that of the
        other prompts) or, with `each`, `prompt` (its number). On each side the scores of a head sum to its score. Rows
        `biases` (of norms, queries, keys and the attention's b_O) and, in a circuit, `cut edges` are no node's. Each
        side is in the order of |contrast|, or |score|. With several heads, one whose window keeps the key out of sight
        in all prompts is left out.

    Raises
    ------
    CircuitError
        If the model has no such head, or the circuit belongs to another model.
    SettingError
        If there is no such prompt or position, an ablation needs the task, or `each` stands beside `other`.
    DataError
        If a prompt's subject is not known, or a key is never in sight of the query.
    """
    if each and other is not None:
        raise SettingError("Each prompt has none of the other relation's beside it: each=True takes no other.")
    heads = _heads(model, head, circuit)
    split = _split(model, planned_run(model, task, circuit, ablation, prompt), heads, at, to)
    beside = None
    if other is not None:
        beside = _split(model, planned_run(model, other, circuit, ablation, None), heads, at, to)
    tables = []
    for name, of_head in split.items():
        if beside is not None and name not in beside:
            continue
        if each:
            shown = zip(of_head.prompts, of_head.scores.unbind(-1), strict=True)
            tables += [_table(name, of_head, scores, None).assign(prompt=row) for row, scores in shown]
        else:
            contrast = None if beside is None else of_head.mean - beside[name].mean
            tables.append(_table(name, of_head, of_head.mean, contrast))
    if not tables:
        raise DataError(
            f"No key at {to!r} is in sight of the query at {at!r} in both the prompts and the other ones: a window "
            "keeps it out. Choose other positions, or another head."
        )
    return pd.concat(tables, ignore_index=True)


@verb
def attending_pairs(
    model: Model,
    task: Task | Prompts,
    head: str,
    *,
    prompt: Natural | None = None,
    at: Place = "end",
    to: Place = "subject",
    circuit: Circuit | None = None,
    ablation: str | AblationKind | Ablation | None = None,
) -> pd.DataFrame:
    """What every sender into a head's query and every one into its key make of the score together.

    Parameters are those of `why_attends`.

    Returns
    -------
    DataFrame
        Rows are senders into the query, columns those into the key. All sum to the score; the sums of rows and of
        columns are the splits of `why_attends`.
    """
    (only,) = _heads(model, head, circuit)
    found = _split(model, planned_run(model, task, circuit, ablation, prompt), [only], at, to, pairs=True)[only]
    return pd.DataFrame(found.mean.numpy(), index=list(found.senders), columns=list(found.senders))


class _Split(NamedTuple):
    """The senders that a head reads, the two rows beside them, and their scores: `[2, P, n]`, or `[P, P, n]` of pairs.

    `prompts` are those in which the key is in sight.
    """

    senders: tuple[str, ...]
    scores: Float[Tensor, "q P n"]
    prompts: list[int]

    @property
    def mean(self) -> Float[Tensor, "q P"]:
        return self.scores.mean(-1)


def _table(name: str, split: _Split, scores: Tensor, contrast: Tensor | None) -> pd.DataFrame:
    """The rows of one head, by side, the largest first."""
    table = pd.DataFrame({"head": name, "side": np.repeat(["q", "k"], len(split.senders))})
    table["sender"] = [*split.senders, *split.senders]
    table["score"] = scores.flatten().tolist()
    if contrast is not None:
        table["contrast"] = contrast.flatten().tolist()
    strength = table[table.columns[-1]].abs()
    return table.loc[np.lexsort((-strength, table["side"] == "k"))]


def _heads(model: Model, head: str | Sequence[str] | None, circuit: Circuit | None) -> list[str]:
    if head is None:
        return circuit_heads(model, circuit)
    if not head:
        raise SettingError(f"head={head!r}: name at least one head, such as 'a3.h1'; None for all.")
    return [head] if isinstance(head, str) else list(dict.fromkeys(head))


def _split(
    model: Model, run: PlannedRun, heads: Sequence[str], at: Place, to: Place, pairs: bool = False
) -> dict[str, _Split]:
    """The split of each head, the mean over the prompts in which it sees the key; DataError if none ever does."""
    graph, network, prompts = model.graph, model.network, run.prompts
    places = {place.node: place for place in named_heads(model, heads)}
    queries, keys = _positions(prompts, at), _positions(prompts, to)
    hidden = (keys > queries).nonzero()[:, 0].tolist()
    if hidden:
        raise DataError(
            f"In {prompts.texts[hidden[0]]!r:.120} the key at {to!r} comes after the query at {at!r}: a head sees "
            "earlier tokens alone. Choose another position, or template."
        )
    seen = {}
    for name in heads:
        window = network.layers[places[name].layer].window
        sight = torch.ones_like(keys, dtype=torch.bool) if window is None else keys > queries - window
        if sight.any():
            seen[name] = sight.cpu()
    if not seen:
        raise DataError(
            f"No key at {to!r} is in sight of the query at {at!r}: the window of {', '.join(heads)!s:.60} keeps it "
            "out. Choose other positions, or another head."
        )
    by_layer: dict[int, list[str]] = {}
    for name in seen:  # in a circuit every head reads something else
        by_layer.setdefault(places[name].layer if run.kept is None else len(by_layer), []).append(name)

    def work(rows: slice) -> list[Float[Tensor, "h q P n"]]:
        part = prompts.select(rows)
        passed, ablated = run.forward(part, senders=True).senders, run.ablated(part)
        found = []
        for names in by_layer.values():
            layer = places[names[0]].layer
            chosen = torch.tensor([places[name].head for name in names], device=network.device)
            made = []
            for kind, make, where in ((0, network.query_parts, queries), (1, network.key_parts, keys)):
                column = graph.attention_receivers(layer).start + kind * graph.n_heads + places[names[0]].head
                parts = _parts(model, run, layer, column, passed, ablated, where[rows])
                made.append(make(layer, parts, chosen, where[rows, None])[:, :, :, 0])
            q, k = (one.expand(len(names), -1, -1, -1) * network.layers[layer].scale ** 0.5 for one in made)
            if pairs:
                scores = torch.einsum("hpnk,hrnk->hprn", q, k)
            else:
                scores = torch.stack([(q * k.sum(1, keepdim=True)).sum(-1), (q.sum(1, keepdim=True) * k).sum(-1)], 1)
            found.append(scores.cpu())
        return found

    with torch.no_grad():
        pieces = [*by_prompts(network, prompts.tokens, work)]
    split = {}
    for names, *parts in zip(by_layer.values(), *pieces, strict=True):
        senders = graph.sender_names[: graph.senders_before(graph.attention_receivers(places[names[0]].layer).start)]
        rows = (*senders, *([] if run.kept is None else [CUT]), BIASES)
        for name, scores in zip(names, torch.cat(parts, -1), strict=True):
            numbers = [number for number, there in zip(run.rows, seen[name].tolist(), strict=True) if there]
            split[name] = _Split(rows, scores[..., seen[name]].double(), numbers)
    return split


def _parts(
    model: Model, run: PlannedRun, layer: int, column: int, passed: Tensor, ablated: Tensor | None, where: Tensor
) -> Float[Tensor, "1 P n 1 D"]:
    """What a receiver of the attention reads at a position of each prompt, by sender, and the rows beside them."""
    network, before = model.network, model.graph.senders_before(column)
    rows = torch.arange(len(where), device=where.device)
    parts = passed[:before][:, rows, where]
    if run.kept is not None:
        kept = run.kept[:before, column].to(parts.device)[:, None, None]
        cut = torch.zeros_like(parts) if ablated is None else ablated[:before][:, rows, where]
        parts = torch.cat([parts * kept, (cut * ~kept).sum(0, keepdim=True)])
    biases = parts.new_zeros(1, *parts.shape[1:])
    for earlier in range(layer):
        biases += network.constant(earlier)
    return torch.cat([parts, biases])[None, :, :, None]


def _positions(prompts: Prompts, place: Place) -> Int[Tensor, " N"]:
    """A position in each prompt."""
    if place == "end":
        return prompts.ends
    if place == "subject":
        check_subjects(prompts)
        return prompts.subject_stop - 1
    position = 0 if place == "first" else place
    shortest = int(prompts.lengths.min())
    if position >= shortest:
        raise SettingError(f"The position {position} is not in all prompts: the shortest has {shortest} tokens.")
    return torch.full_like(prompts.lengths, int(position))
