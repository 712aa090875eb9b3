"""A relation becomes a Task: the facts that a model knows, split into D_val and D_test (`kcwb.tasks.prompts`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kcwb.errors import SettingError, warn
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count, Natural, Seed
from kcwb.tasks.prompts import Prompts, encode, full_ranks, known_rows
from kcwb.tasks.relations import Relation, load_relation
from kcwb.tasks.tokens import text_tokens, told_apart
from kcwb.verbs import noun, verb

#: Prompts that mean ablation averages over, at most.
REFERENCE_SIZE = 32


@noun
@dataclass(frozen=True, eq=False)
class Task:
    """A relation as a model meets it in one template.

    Attributes
    ----------
    model_name, model_digest
        The model that the facts were filtered with.
    relation, template
        The relation, and the template's text.
    n, seed
        The parameters that the split was drawn with.
    val
        D_val: facts that the full model knows (Hit@10), for discovery.
    test
        D_test: other facts of the relation, as many by subject, known or not.
    reference
        Up to 32 of the relation's prompts, over which mean ablation averages.
    n_known, n_facts
        How many of the relation's facts the model knows in this template, of those that can be told apart by tokens.
    """

    model_name: str
    model_digest: str
    relation: Relation
    template: str
    n: int
    seed: int
    val: Prompts
    test: Prompts
    reference: Prompts
    n_known: int
    n_facts: int

    def __repr__(self) -> str:
        """One line: relation, template and sizes."""
        return (
            f"Task({self.relation.name!r}, {self.template!r}: {len(self.val)} facts in D_val, {len(self.test)} in "
            f"D_test; {self.model_name} knows {self.n_known} of {self.n_facts})"
        )


@verb
def make_task(
    model: Model,
    relation: Relation | str,
    n: Count = 8,
    seed: Seed = 0,
    template: int | str = 0,
    foil: str | None = None,
    n_test: Natural | None = None,
    progress: Progress = False,
) -> Task:
    """Turn a relation into prompts: filter the known facts, split, tokenise, find spans, pad.

    Parameters
    ----------
    model
        The model that is to know the facts.
    relation
        A Relation, the name of one that comes with the package, or the path of a file.
    n
        Facts in D_val; fewer if the model knows fewer, and never more than half of the relation's facts, so that as
        many others can stand in D_test.
    seed
        Of the draw of D_val, D_test, foils and corrupted partners.
    template
        The index of one of the relation's zero-shot templates, or a template with `{}`.
    foil
        The object that `logit_diff` compares with; None draws another object of the relation for each fact.
    n_test
        Facts in D_test, known or not; None for as many as in D_val.
    progress
        Reported per fact that the model is asked.

    Returns
    -------
    Task
        Tensors are on the model's device.

    Warns
    -----
    UserWarning
        Of facts that are left out, since all tokens of their object begin another object of the relation (or of their
        own wrong answers); and of corrupted prompts that do not have as many tokens as their own, or the same.

    Raises
    ------
    DataError
        If the model knows none of the facts (says how many were tried and the best rank), a prompt does not fit into
        the context, or an answer cannot be told apart from its prompt, its foil or other objects.
    SettingError
        If `n` or `template` make no sense.
    """
    relation = load_relation(relation)
    text = relation.template(template)
    facts = told_apart(model, relation.facts, text, relation)
    everything = encode(model, facts, text, relation.objects, seed, foil, progress)
    known = known_rows(model, everything.ranks, f"{relation.name} in {text!r}")
    lonely = [fact for i, fact in enumerate(facts) if fact.corrupted and not everything.paired[i]]
    if lonely:
        warn(
            f"{len(lonely)} of {len(facts)} corrupted prompts of {relation.name} do not have as many tokens as the "
            f"clean one, or the same (the first: {lonely[0].corrupted!r:.60} for {lonely[0].subject!r:.60}), and are "
            "not used."
        )
    rows = split(known, len(everything), n, seed, n_test)
    return Task(
        model_name=model.name,
        model_digest=model.digest,
        relation=relation,
        template=text,
        n=n,
        seed=seed,
        **rows.of(everything),
        n_known=len(known),
        n_facts=len(everything),
    )


@verb
def ask_again(model: Model, task: Task) -> Task:
    """The same facts, prompts and split, asked of other weights: a checkpoint, an edited model.

    Which facts are in D_val is left as it is, known to these weights or not; `ranks` are theirs, and `n_known` and
    `n_facts` count the facts that the task holds, which alone are asked.

    Raises
    ------
    SettingError
        If the model's tokens are others than those that the task has.
    DataError
        If a prompt does not fit into the context.
    """
    parts = {}
    for name in Split._fields:
        prompts = getattr(task, name)
        ids = [text_tokens(model, text) for text in prompts.texts]
        if ids != prompts.own or prompts.tokens.device != model.device:
            raise SettingError(
                f"{model.name} reads the task's prompts as other tokens, or elsewhere, than {task.model_name} does; "
                f"make the task anew: make_task(model, {task.relation.name!r})."
            )
        parts[name] = replace(prompts, ranks=full_ranks(model, prompts, False)) if len(prompts) else prompts
    known = {
        fact: hit for prompts in parts.values() for fact, hit in zip(prompts.facts, prompts.known.tolist(), strict=True)
    }
    counts = {"n_known": sum(known.values()), "n_facts": len(known)}
    return replace(task, model_name=model.name, model_digest=model.digest, **parts, **counts)


class Split(NamedTuple):
    """Rows of D_val, of D_test, and of the prompts that mean ablation averages over."""

    val: list[int]
    test: list[int]
    reference: list[int]

    def of(self, prompts: Any) -> dict[str, Any]:
        """The three parts of some prompts, by the names that they have in a Task."""
        return {name: prompts.select(rows) for name, rows in self._asdict().items()}


def split(known: Sequence[int], total: int, n: int, seed: int, n_test: int | None = None) -> Split:
    """Draw D_val from the known ones of `total` facts and D_test from the rest; see `make_task`."""
    draw = random.Random(seed)
    order = list(known)
    draw.shuffle(order)
    val = sorted(order[: min(n, max(1, total // 2))])
    rest = [i for i in range(total) if i not in set(val)]
    draw.shuffle(rest)
    test = rest[: len(val) if n_test is None else n_test]
    return Split(val, sorted(test), sorted([*val, *rest][:REFERENCE_SIZE]))


def check_same_weights(model: Any, task: Any, again: str = "") -> None:
    """Raise SettingError if a task was made for other weights: its known facts and ranks are not this model's.

    `again` says how to make it, if not by `make_task`; a model and a task may be those of an encoder.
    """
    if task.model_digest != model.digest:
        again = again or f"make_task(model, {task.relation.name!r})"
        raise SettingError(
            f"The task was made for {task.model_name!r} with weights {task.model_digest[:12]}; this is "
            f"{model.name!r} with {model.digest[:12]}. Make it again: {again}."
        )
