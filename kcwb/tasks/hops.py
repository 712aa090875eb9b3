"""Two-hop questions as a model meets them: what it knows of each, and the cases to study.

A chain is worth looking at when the model answers both of its hops and the two-hop question, and could not have got
there otherwise (after Yang et al., arXiv 2402.16837 and 2411.16679). Two shortcuts are asked for that:

- **entity alone**: the second relation about the subject itself, "The capital of Louvre Museum is": what the subject
  alone calls to mind;
- **relation alone**: the two-hop question without its subject, "The capital of the country where the landmark is
  located is": what the words alone call to mind.

Right means that the answer has rank k or better (`kcwb.tasks.ranks`); k = 1 unless said otherwise.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.tasks.compose import Composition, Wording
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.task import REFERENCE_SIZE, Split, Task
from kcwb.verbs import verb

#: What is asked about each chain: both hops, both together, and what would do without them.
ASKED = ("hop 1", "hop 2", "two-hop", "entity alone", "relation alone")
#: The three that have a task and a circuit of their own.
HOPS = ASKED[:3]


@dataclass(frozen=True, eq=False)
class Hops:
    """The chains in which a model takes two hops, and their tasks; made by `make_hops`.

    Attributes
    ----------
    composition, wording
        The chains, and how the two-hop question is asked.
    ranks
        One row per chain: `subject`, `bridge`, `object`, the rank of the answer to each of `ASKED`, and `kept`, whether
        it is right in both hops and the two-hop question and in no shortcut that was to be dropped.
    k, shortcut_k
        Up to which rank an answer, and a shortcut's answer, counts as right.
    tasks
        For each of `HOPS` its task. Row i of each `val` is about the same chain, also where two chains have their
        second hop in common. `test` holds kept chains that are not in `val`, row by row the same.
    """

    composition: Composition
    wording: Wording
    ranks: pd.DataFrame
    k: int
    shortcut_k: int | None
    tasks: dict[str, Task]

    @property
    def chains(self) -> pd.DataFrame:
        """The chains of `val`, row by row: `subject`, `bridge`, `object`."""
        two, first = self.tasks["two-hop"].val.facts, self.tasks["hop 1"].val.facts
        rows = [(a.subject, b.object, a.object) for a, b in zip(two, first, strict=True)]
        return pd.DataFrame(rows, columns=["subject", "bridge", "object"])

    def __repr__(self) -> str:
        """One line: relations and sizes."""
        return (
            f"Hops({self.composition.first.name} > {self.composition.second.name}: {int(self.ranks['kept'].sum())} of "
            f"{len(self.ranks)} chains kept, {len(self.chains)} of them in D_val; right means rank {self.k})"
        )


@dataclass(frozen=True, eq=False)
class HopAnswers:
    """What a model answers to everything in `ASKED`, about every chain; made by `ask_hops`.

    Attributes
    ----------
    model_name, model_digest
        Who was asked.
    composition, wording
        The chains, and how the two-hop question was asked.
    ranks
        One row per chain: `subject`, `bridge`, `object`, and the rank of the answer, from 1, for each of `ASKED`.
    asked
        For each of `ASKED` its prompts.
    """

    model_name: str
    model_digest: str
    composition: Composition
    wording: Wording
    ranks: pd.DataFrame
    asked: dict[str, Asked]


@verb
def ask_hops(
    model: Model,
    composition: Composition,
    *,
    template: int = 0,
    first_template: int = 0,
    second_template: int = 0,
    seed: Seed = 0,
    progress: Progress = True,
) -> HopAnswers:
    """Ask a model about both hops of every chain, both together, and the shortcuts.

    Parameters
    ----------
    model, composition
        The model is asked about every chain, whether it knows its hops or not.
    template
        Which wording of the two-hop question.
    first_template, second_template
        Which zero-shot templates of the two relations.
    seed
        Of foils and corrupted partners, as in `kcwb.make_task`.
    progress
        Reported per question; one that several chains share is asked once.

    Raises
    ------
    DataError
        If a prompt does not fit into the context, or an answer cannot be told apart from its prompt.
    SettingError
        If there is no such template.
    """
    first, second, chains = composition.first, composition.second, composition.chains
    wording = composition.wording(template)
    hop_1, hop_2 = first.template(first_template), second.template(second_template)
    both = composition.facts_of("two-hop")
    questions: dict[str, tuple[str, Sequence[Fact]]] = {
        "hop 1": (hop_1, composition.facts_of("hop 1")),
        "hop 2": (hop_2, composition.facts_of("hop 2")),
        "two-hop": (wording.template, both),
        "entity alone": (hop_2, both),
        "relation alone": ("{}", [replace(fact, subject=wording.relation_alone) for fact in both]),
    }
    table = pd.DataFrame([vars(chain) for chain in chains])
    asked = {}
    with track(progress, sum(len(set(facts)) for _, facts in questions.values()), "hops") as step:
        for name, (text, facts) in questions.items():
            objects = (first if name == "hop 1" else second).objects
            asked[name] = _ask(model, text, facts, objects, seed, partial(step, note=name))
            table[name] = asked[name].prompts.ranks[asked[name].of_chain].tolist()
    return HopAnswers(model.name, model.digest, composition, wording, table, asked)


@verb
def funnel(ranks: pd.DataFrame, k: Count = 1, shortcut_k: Count | None = 1) -> pd.DataFrame:
    """How many chains are left after each filter.

    Parameters
    ----------
    ranks
        Those of `ask_hops`, or of a Hops.
    k
        An answer is right when its rank is at most this.
    shortcut_k
        The same for shortcuts; None keeps chains that have one.

    Returns
    -------
    DataFrame
        One row per filter, applied one after the other: `filter`; `left`; `lost`, to this filter; `share`, of those
        that came to it (NaN where none did).
    """
    kept = _passed(ranks, k, shortcut_k).cumprod(axis=1).sum()
    left = pd.Series({"chains": len(ranks), **kept.to_dict()}, dtype=int)
    before = left.shift()
    lost, share = (before - left).fillna(0).astype(int), left / before.where(before > 0)
    return pd.DataFrame({"left": left, "lost": lost, "share": share}).rename_axis("filter").reset_index()


@verb
def make_hops(answers: HopAnswers, *, k: Count = 1, shortcut_k: Count | None = 1, n: Count = 8, seed: Seed = 0) -> Hops:
    """Keep the chains in which the model takes both hops, and make the three tasks of them.

    Parameters
    ----------
    answers
        What the model answers.
    k
        An answer is right when its rank is at most this; 10 is a relaxation, to be reported as such.
    shortcut_k
        A chain is dropped if a shortcut's answer has at most this rank; None keeps such chains, another relaxation.
    n
        Chains in D_val; fewer if fewer are kept. Those with different bridges are taken first.
    seed
        Of the draw.

    Raises
    ------
    DataError
        If no chain is kept: with the number that each filter left.
    SettingError
        If a setting cannot be meant.
    """
    composition, ranks = answers.composition, answers.ranks
    ranks = ranks.assign(kept=_passed(ranks, k, shortcut_k).all(axis=1))
    rows = ranks.index[ranks["kept"]].tolist()
    if not rows:
        left = ", ".join(f"{one.filter}: {one.left}" for one in funnel(ranks, k, shortcut_k).itertuples())
        raise DataError(
            f"{answers.model_name} answers no chain of {composition.first.name} > {composition.second.name} by two "
            f"hops at rank {k} (left after each filter: {left}). Try another pair or template, or relax: k=10, "
            "shortcut_k=None."
        )
    order = _by_bridge(rows, ranks["bridge"].tolist(), random.Random(seed))
    val, test = sorted(order[:n]), sorted(order[n : 2 * n])
    relations = (composition.first, composition.second, composition.relation)
    tasks = {name: _task(answers, name, one, val, test, n, seed) for name, one in zip(HOPS, relations, strict=True)}
    return Hops(composition, answers.wording, ranks, k, shortcut_k, tasks)


@dataclass(frozen=True, eq=False)
class Asked:
    """One kind of question.

    Attributes
    ----------
    template
        Its text.
    prompts
        Each different prompt once.
    of_chain
        Which of them belongs to each chain.
    """

    template: str
    prompts: Prompts
    of_chain: list[int]


def _ask(
    model: Model, template: str, facts: Sequence[Fact], objects: Sequence[str], seed: int, step: Callable[..., None]
) -> Asked:
    """Ask one kind of question about every chain, each different one once."""
    different = list(dict.fromkeys(facts))
    place = {fact: i for i, fact in enumerate(different)}
    done = 0

    def told(now: int, _total: int, _note: str) -> None:
        nonlocal done
        step(now - done)
        done = now

    prompts = encode(model, different, template, objects, seed, progress=told)
    return Asked(template, prompts, [place[fact] for fact in facts])


def _passed(ranks: pd.DataFrame, k: int, shortcut_k: int | None) -> pd.DataFrame:
    """Chain by filter: whether it passes."""
    passed = {f"{name} right": ranks[name] <= k for name in HOPS}
    if shortcut_k is not None:
        passed |= {f"not by {name}": ranks[name] > shortcut_k for name in ASKED[3:]}
    return pd.DataFrame(passed)


def _by_bridge(rows: Sequence[int], bridges: Sequence[str], draw: random.Random) -> list[int]:
    """Rows in random order, but the first of every bridge before the second of any."""
    order = list(rows)
    draw.shuffle(order)
    seen: Counter[str] = Counter()
    turn = {}
    for row in order:
        turn[row] = seen[bridges[row]]
        seen[bridges[row]] += 1
    return sorted(order, key=lambda row: turn[row])


def _task(
    answers: HopAnswers, name: str, relation: Relation, val: Sequence[int], test: Sequence[int], n: int, seed: int
) -> Task:
    """The task of one kind of question; rows are those of chains."""
    asked = answers.asked[name]
    prompts, of_chain = asked.prompts, asked.of_chain
    in_val, in_test = ([of_chain[row] for row in some] for some in (val, test))
    first = list(dict.fromkeys(in_val))
    rest = [i for i in range(len(prompts)) if i not in set(first)]
    random.Random(seed).shuffle(rest)
    rows = Split(in_val, in_test, sorted([*first, *rest][:REFERENCE_SIZE]))
    return Task(
        model_name=answers.model_name,
        model_digest=answers.model_digest,
        relation=relation,
        template=asked.template,
        n=n,
        seed=seed,
        **rows.of(prompts),
        n_known=int(prompts.known.sum()),
        n_facts=len(prompts),
    )
