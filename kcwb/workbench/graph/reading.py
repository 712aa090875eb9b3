"""What is read of one node beside its graph: where a head attends and why, and what a node writes.

On every prompt: END's attention to the prompt's tokens (`kcwb.reading.nodes`); which senders make the query at END and
the key at the subject meet (`kcwb.reading.why_attends`); the tokens that the output at END speaks for, in logits above
the mean over the vocabulary. Before these stands their mean over the prompts, with attention summed over the groups of
`kcwb.reading.positions`. Where a subject is not known or not in sight, the key is that of the token that END attends to
most. Of a head and of an MLP, all heads of its layer are read beside it: where each token attends.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind
from kcwb.circuits.circuit import Circuit
from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.reading.attending import why_attends
from kcwb.reading.nodes import layer_patterns, planned_run, written_logits
from kcwb.reading.positions import GROUPS, position_groups, token_text
from kcwb.settings import Count
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task
from kcwb.verbs import verb

_MOST = 32  # tokens of which patterns are read, the last ones
#: In the order in which they stand in a prompt, with the words that are shown: of GROUPS.
_PARTS = {"BOS": "first token", "SUBJECT": "subject", "RELATION": "relation", "END": "END"}


@verb
def read_node(
    model: Model,
    task: Task | Prompts,
    node: str,
    *,
    circuit: Circuit | None = None,
    ablation: str | AblationKind | Ablation | None = None,
    facts: Count = 8,
    k: Count = 8,
) -> list[dict[str, Any]]:
    """What is read of a node in one run, as `CircuitGraph.reading` has it under ``prompts``.

    Parameters
    ----------
    task
        A task, for its D_val, or any prompts; the first `facts` are read.
    node
        Any node; only heads attend.
    circuit, ablation
        As in `kcwb.attention_pattern`; None for the full model.
    k
        How many senders of each side, and how many tokens.

    Returns
    -------
    list of dict
        The mean over the prompts, if there are several, then each: `prompt`, `answer`, `writes` (tokens with what is
        added to them, in logits) and, of a head, `tokens`, `attention` (from END, one number per token), `at` (the
        token whose key is explained), `query` and `key` (senders with their scores, see `kcwb.why_attends`). Each
        prompt of a head or an MLP has `layer`: its `number`, the last `tokens`, and for each of `heads` where these
        attend to one another, in thousandths, for each in turn to all up to itself.

    Raises
    ------
    CircuitError, SettingError
        As in `kcwb.attention_pattern`.
    """
    prompts = (task.val if isinstance(task, Task) else task).select(slice(facts))
    run = planned_run(model, task, circuit, ablation, None)
    run = run._replace(prompts=prompts if run.cuts is None else run.cuts.usable(prompts))
    prompts = run.prompts
    writes = written_logits(model, run, node)
    found: list[dict[str, Any]] = [
        {"prompt": text, "answer": fact.object, "writes": _tokens(model, written, k)}
        for text, fact, written in zip(prompts.texts, prompts.facts, writes, strict=True)
    ]
    mean: dict[str, Any] = {"prompt": f"mean over {len(found)} prompts", "answer": ""}
    mean["writes"] = _tokens(model, writes.mean(0), k)
    place = model.graph.node(node)
    patterns = None
    if place.kind in ("head", "mlp"):
        patterns = layer_patterns(model, run, place.layer).double().cpu()
        for i, one in enumerate(found):
            one["layer"] = _layer(model, prompts, place.layer, patterns, i)
    if place.kind == "head" and patterns is not None:
        attention = patterns[place.head][torch.arange(len(prompts)), prompts.ends.cpu()]
        why, named = _why(model, prompts, node, attention, circuit, run.cuts)
        for i, (one, length) in enumerate(zip(found, prompts.lengths.tolist(), strict=True)):
            one |= {"tokens": [token_text(model, token) for token in prompts.tokens[i, :length].tolist()]}
            one |= {"attention": attention[i, :length].tolist(), **_sides(why[why["prompt"] == i], k)}
            one["at"] = int(prompts.subject_stop[i]) - 1 if named else int(attention[i].argmax())
        if named:
            summed = torch.einsum("nt,gnt->g", attention, position_groups(prompts).cpu().double()) / len(found)
            mean |= {"tokens": list(_PARTS.values()), "attention": [float(summed[GROUPS.index(one)]) for one in _PARTS]}
            mean |= {"at": 1, **_sides(why.groupby(["side", "sender"], sort=False)[["score"]].mean().reset_index(), k)}
    return [mean, *found] if len(found) > 1 else found


def _layer(model: Model, prompts: Prompts, number: int, patterns: Float[Tensor, "h N T T"], row: int) -> dict[str, Any]:
    stop = int(prompts.lengths[row])
    start = max(0, stop - _MOST)
    seen = (1000 * patterns[:, row, start:stop, start:stop]).round().int()
    lower = torch.tril_indices(stop - start, stop - start)
    tokens = [token_text(model, token) for token in prompts.tokens[row, start:stop].tolist()]
    return {"number": number, "tokens": tokens, "heads": seen[:, lower[0], lower[1]].tolist()}


def _why(
    model: Model, prompts: Prompts, head: str, attention: Tensor, circuit: Circuit | None, cuts: Ablation | None
) -> tuple[pd.DataFrame, bool]:
    """`why_attends` of each prompt, and whether it is to the subject; if not, it is to where END attends most."""
    more: dict[str, Any] = {"circuit": circuit, "ablation": cuts, "each": True}
    try:
        return why_attends(model, prompts, head, **more), True
    except DataError:  # no subject, or none in sight
        where = attention.argmax(-1).tolist()
        tables = [why_attends(model, prompts, head, prompt=i, to=at, **more) for i, at in enumerate(where)]
        return pd.concat([table.assign(prompt=i) for i, table in enumerate(tables)]), False


def _sides(table: pd.DataFrame, k: int) -> dict[str, list[list[Any]]]:
    """The senders with the largest |score| on each side."""
    some = table[table["score"] != 0].sort_values("score", key=abs, ascending=False, kind="stable")
    sides = {name: some[some["side"] == side].head(k) for name, side in (("query", "q"), ("key", "k"))}
    return {name: side[["sender", "score"]].values.tolist() for name, side in sides.items()}


def _tokens(model: Model, logits: Float[Tensor, " V"], k: int) -> list[list[Any]]:
    """The tokens that logits speak for most, with what they have above the mean."""
    values, tokens = (logits - logits.mean()).topk(min(k, len(logits)))
    return [[token_text(model, token), value] for token, value in zip(tokens.tolist(), values.tolist(), strict=True)]
