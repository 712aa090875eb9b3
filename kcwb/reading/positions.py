"""Which tokens of a prompt are what, and which prompts can tell something about a subject.

Positions up to END fall into four groups: SUBJECT; BOS, or the first token where prompts have no BOS, since attention
rests there when it has nothing to do; END; and RELATION, which is every other token. A subject's token that is END
belongs to END, one that is the first token belongs to SUBJECT.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from kcwb.errors import DataError, choose, warn
from kcwb.models.loading import Model
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task

#: The groups of source positions, in the order of `position_groups`.
GROUPS = ("SUBJECT", "RELATION", "BOS", "END")


def position_groups(prompts: Prompts) -> Bool[Tensor, "g N T"]:
    """Which positions belong to which of `GROUPS`; each up to END belongs to one, each after it to none."""
    steps = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)[None]
    ends = prompts.ends[:, None]
    seen, end = steps <= ends, steps == ends
    subject = (steps >= prompts.subject_start[:, None]) & (steps < prompts.subject_stop[:, None]) & ~end
    first = (steps == 0) & ~end & ~subject
    return torch.stack([subject, seen & ~subject & ~first & ~end, first, end])


def check_prompts(prompts: Prompts) -> None:
    """Refuse prompts in which nothing can be told about a subject.

    Raises
    ------
    DataError
        If there are none, a prompt is a single token, or its subject is not known or has no token before END.
    """
    check_any(prompts)
    check_subjects(prompts)
    subject = position_groups(prompts)[0].any(-1)
    for i, (length, found) in enumerate(zip(prompts.lengths.tolist(), subject.tolist(), strict=True)):
        if length == 1:
            raise DataError(
                f"The prompt {prompts.texts[i]!r:.120} is a single token: nothing is read from anywhere else. Use a "
                "template in which words follow the subject."
            )
        if not found:
            raise DataError(
                f"The subject {prompts.facts[i].named!r:.60} has no token before the last one of "
                f"{prompts.texts[i]!r:.120}. Use a template in which words follow the subject."
            )


def check_any(prompts: Prompts) -> None:
    """Refuse no prompts at all; DataError."""
    if not len(prompts):
        raise DataError("There are no prompts to look at: the task's split is empty. Use a relation with more facts.")


def check_subjects(prompts: Prompts) -> None:
    """Refuse prompts of which it is not known what in them is the subject; DataError."""
    for fact, text in zip(prompts.facts, prompts.texts, strict=True):
        if not fact.named:
            raise DataError(
                f"Which part of {text!r:.120} is the subject is not known. Say it in the table of prompts, in a column "
                "'subject': a text that stands in the prompt once, or [start, stop] in characters."
            )


def split_of(task: Task, split: str) -> Prompts:
    """D_val or D_test by name."""
    return task.val if choose("The split", split, ("val", "test")) == "val" else task.test


def told_at_end(prompts: Prompts) -> Prompts:
    """The prompts whose answer is told apart by the token that is read at END, its first; see `rows_told_at_end`."""
    rows = rows_told_at_end(prompts)
    return prompts if len(rows) == len(prompts) else prompts.select(rows)


def rows_told_at_end(*asked: Prompts) -> list[int]:
    """The rows in which the first token of every answer tells it apart from the relation's other objects.

    What END says of a token with which another object begins as well does not tell which of them is meant. Warns of the
    rows that are left out.

    Parameters
    ----------
    asked
        Prompts that belong together row by row.

    Raises
    ------
    DataError
        If none is left, or there were none.
    """
    check_any(asked[0])
    told = torch.stack([prompts.told_at_end for prompts in asked]).all(0).tolist()
    shared = dict.fromkeys(
        prompts.facts[i].object for prompts in asked for i in (~prompts.told_at_end).nonzero()[:, 0].tolist()
    )
    if not shared:
        return list(range(len(told)))
    words = (
        f"{told.count(False)} of {len(told)} facts have an object that starts with the same token as another object of "
        f"the relation, so that this token does not tell which is meant "
        f"({', '.join(f'{name!r:.60}' for name in shared):.300})"
    )
    if not any(told):
        raise DataError(f"{words}. No fact is left; use a relation or template whose objects start differently.")
    warn(f"{words}: left out.")
    return [i for i, apart in enumerate(told) if apart]


def without_copies(model: Model, prompts: Prompts) -> Prompts:
    """The prompts whose object does not begin with a token of its subject; warns of the others.

    Raises
    ------
    DataError
        If none is left.
    """
    mixed = [i for i in range(len(prompts)) if says_its_object(model, prompts, i)]
    if not mixed:
        return prompts
    names = ", ".join(f"{prompts.facts[i].subject!r:.60} -> {prompts.facts[i].object!r:.60}" for i in mixed)
    words = f"The object begins with a token of the subject, so that copying passes for knowing: {names}"
    rest = [i for i in range(len(prompts)) if i not in set(mixed)]
    if not rest:
        raise DataError(f"{words}. No fact is left; use facts whose object is not in their subject.")
    warn(f"{words}: left out.")
    return prompts.select(rest)


def says_its_object(model: Model, prompts: Prompts, row: int) -> bool:
    """Whether the first token of a right answer is, but for spaces and case, among its subject's tokens."""
    subject = prompts.tokens[row, int(prompts.subject_start[row]) : int(prompts.subject_stop[row])].tolist()
    words = {token_text(model, token).strip().casefold() for token in subject}
    return any(token_text(model, token).strip().casefold() in words for token in prompts.firsts[row])


def token_text(model: Model, token: int) -> str:
    """The text of one token; a byte that is none, or NUL, as what is not known, so that it can be shown and sent."""
    text = str(model.tokenizer.decode([token]))
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
