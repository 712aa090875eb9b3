"""Edits to be made, and the prompts that judge them: from our relations, or from a file of CounterFact's format."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed
from kcwb.tasks.prompts import encode
from kcwb.tasks.records import read_json, readable
from kcwb.tasks.relations import Fact, Relation, check_template, load_relation, load_relations, require_subjects
from kcwb.tasks.subjects import blank
from kcwb.tasks.tokens import objects_after
from kcwb.verbs import noun, verb

#: Relations with shared objects, from which edits are made where none are named.
RELATIONS = (
    "city_country",
    "landmark_country",
    "country_language",
    "country_currency",
    "musician_instrument",
    "noun_superclass",
    "food_country",
    "person_native_language",
)
#: How a subject's object is described, so that another relation can be asked of it.
_DESCRIPTIONS = {
    "city_country": "the country that has the city of {}",
    "landmark_country": "the country that has the landmark {}",
    "food_country": "the country that has the dish {}",
}
#: What such a description is asked.
_SECOND_STEPS = ("country_capital", "country_language", "country_currency", "country_continent")
_AT_ONCE = 16  # facts that are asked together


@noun
@dataclass(frozen=True)
class EditCase:
    """One edit to be made, and the prompts that judge it.

    Attributes
    ----------
    fact, target, template
        The edit: the true fact, the new object, and the template.
    paraphrases
        The same question in other words.
    neighbours
        Prompts whose answer is the same true object, about other subjects.
    same_subject, other_subjects
        Prompts of other relations, for bleed-over.
    compositions
        (prompt, new object, true object) of a fact that follows from the edited one.
    relation
        The relation's name.
    """

    fact: Fact
    target: str
    template: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    same_subject: tuple[str, ...] = ()
    other_subjects: tuple[str, ...] = ()
    compositions: tuple[tuple[str, str, str], ...] = ()
    relation: str = ""

    @property
    def prompt(self) -> str:
        """The template about the fact's subject."""
        return self.template.replace("{}", self.fact.subject)

    @property
    def wanted(self) -> Fact:
        """The subject with its new object."""
        return self.fact.with_object(self.target)

    @property
    def told(self) -> dict[str, str]:
        """What tables say of it."""
        fact = self.fact
        return {"relation": self.relation, "subject": fact.subject, "true": fact.object, "target": self.target}


def check_targets(cases: Iterable[EditCase]) -> None:
    """Refuse an edit to what its subject has already; SettingError."""
    for i, case in enumerate(cases):
        if case.target in case.fact.right:
            raise SettingError(
                f"Case {i}: the target {case.target!r:.60} is what {case.fact.subject!r:.60} has already."
            )


@verb
def edit_cases(
    model: Model,
    relations: Sequence[Relation | str] = RELATIONS,
    *,
    n: Count = 50,
    seed: Seed = 0,
    template: int = 0,
    rank: Count = 1,
    neighbours: Natural = 5,
    others: Natural = 5,
    progress: Progress = False,
) -> list[EditCase]:
    """Edits made from relations: facts that the model knows, each with another object of the relation as its target.

    Parameters
    ----------
    model
        Who is to know the facts.
    relations
        Relations or their names; of each, in turn, a fact that has a neighbour, where these are asked.
    n
        How many edits; fewer if there are not as many.
    template
        The zero-shot template that is edited; the others are paraphrases.
    rank
        A fact is known when its object has at most this rank (`kcwb.tasks.ranks`).
    neighbours
        How many of the other subjects with the same object are asked, at most; 0: none, and no fact needs one.
    others
        How many prompts of other relations and about other subjects.

    Returns
    -------
    list
        EditCases, of the relations in turn.

    Raises
    ------
    SettingError
        If a relation has no such template.
    DataError
        If no relation has a fact that is known and has a neighbour, where these are asked.
    """
    loaded = [*dict.fromkeys(load_relation(one) if isinstance(one, str) else one for one in relations)]
    for relation in loaded:
        require_subjects(relation, "An edit")
        relation.template(template)
    everything = load_relations()
    of_each = [_cases_of(model, one, everything, template, rank, seed, neighbours, others) for one in loaded]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*of_each))
    cases: list[EditCase] = []
    with track(progress, n, "facts") as step:
        for case in itertools.islice(filter(None, in_turn), n):
            cases.append(case)
            step(note=case.relation)
    if not cases:
        names = ", ".join(relation.name for relation in loaded)
        sharing = " that shares its object with another" if neighbours else ""
        raise DataError(f"{model.name} knows no fact of {names} (rank {rank}){sharing}.")
    return cases


def _cases_of(
    model: Model, relation: Relation, everything: Sequence[Relation], template: int, rank: int, seed: int,
    neighbours: int, others: int,
) -> Iterator[EditCase]:  # fmt: skip
    """The edits of one relation, in random order; facts are asked a few at a time, as they are needed."""
    text = relation.template(template)
    draw = random.Random(f"{seed} {relation.name}")
    apart = [one for one in everything if one.name != relation.name]
    facts = draw.sample(relation.facts, len(relation.facts))
    if neighbours:
        facts = [fact for fact in facts if any(one.object == fact.object and one != fact for one in relation.facts)]
    tokens = objects_after(model, text, relation.facts, relation.objects)
    for start in range(0, len(facts), _AT_ONCE):
        part = facts[start : start + _AT_ONCE]
        prompts = encode(model, part, text, relation.objects)
        for fact, known in zip(part, (prompts.ranks <= rank).tolist(), strict=True):
            named = tokens[fact.space]
            true = named[fact.object]  # neither object may begin the other
            targets = [one for one in relation.objects if any(a != b for a, b in zip(named[one], true, strict=False))]
            targets = [one for one in targets if one not in fact.also]
            if known and targets:
                yield _case(relation, fact, draw.choice(targets), template, apart, draw, neighbours, others)


def _case(
    relation: Relation, fact: Fact, target: str, template: int, apart: Sequence[Relation], draw: random.Random,
    neighbours: int, others: int,
) -> EditCase:  # fmt: skip
    """One edit with the prompts that judge it; `apart` are the other relations."""
    templates, subject = relation.prompt_templates_zs, fact.subject
    near = [one for one in relation.facts if one.object == fact.object and one != fact]
    near = draw.sample(near, min(neighbours, len(near)))
    same = [one.prompt_templates_zs[0] for one in apart if any(other.subject == subject for other in one.facts)]
    far = [draw.choice(apart) for _ in range(others)]
    strangers = [draw.choice([other.subject for other in one.facts if other.subject != subject]) for one in far]
    return EditCase(
        fact=fact,
        target=target,
        template=templates[template],
        paraphrases=tuple(text.replace("{}", subject) for i, text in enumerate(templates) if i != template),
        neighbours=tuple(templates[template].replace("{}", one.subject) for one in near),
        same_subject=tuple(text.replace("{}", subject) for text in same),
        other_subjects=tuple(
            one.prompt_templates_zs[0].replace("{}", name) for one, name in zip(far, strangers, strict=True)
        ),
        compositions=tuple(_compositions(relation.name, fact, target, apart)),
        relation=relation.name,
    )


def _compositions(name: str, fact: Fact, target: str, everything: Iterable[Relation]) -> Iterator[tuple[str, str, str]]:
    """Second steps from the old and the new object, where both are known to differ."""
    if name not in _DESCRIPTIONS:
        return
    whose = _DESCRIPTIONS[name].replace("{}", fact.subject)
    for relation in everything:
        objects = {one.subject: one.object for one in relation.facts}
        old, new = objects.get(fact.object), objects.get(target)
        if relation.name in _SECOND_STEPS and old and new and old != new:
            yield relation.prompt_templates_zs[0].replace("{}", whose), new, old


@verb
def load_counterfact(path: str | Path) -> list[EditCase]:
    """Read edits from a file in the format of CounterFact: a JSON list of records.

    Of a record, `requested_rewrite` (`prompt`, `subject`, `target_new.str`, `target_true.str`) is read, and
    `paraphrase_prompts` and `neighborhood_prompts`, which may be missing: the scores that they serve then leave this
    edit out. Records that are something else are left out, with a warning that names them.

    Raises
    ------
    DataError
        If the file cannot be read, or none of its records; names the file and the record.
    """
    path = Path(path)
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: expected a list of records, as in CounterFact.")
    numbered = [(record, f"{path}, record {i}") for i, record in enumerate(records)]
    return readable(numbered, lambda pair: _counterfact_case(*pair), "records")


def _counterfact_case(record: Any, where: str) -> EditCase:
    try:
        asked = record["requested_rewrite"]
        texts = [asked["prompt"], asked["subject"], asked["target_true"]["str"], asked["target_new"]["str"]]
        near, other = (record.get(key) or [] for key in ("neighborhood_prompts", "paraphrase_prompts"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: {error} is missing or is not what CounterFact has there.") from error
    if not (isinstance(near, list) and isinstance(other, list)):
        raise DataError(f"{where}: neighborhood_prompts and paraphrase_prompts must be lists of texts.")
    if not all(isinstance(text, str) and text.strip() for text in [*texts, *near, *other]):
        raise DataError(f"{where}: prompts, subject and targets must be texts that are not empty.")
    template, subject, true, new = (text.strip() for text in texts)
    if true == new:
        raise DataError(f"{where}: the new object {new!r:.60} is the true one; there is nothing to edit.")
    return EditCase(
        fact=Fact(subject, true),
        target=new,
        template=check_template(blank(template, subject) or template, f"{where}, prompt"),
        paraphrases=tuple(text.strip() for text in other),
        neighbours=tuple(text.strip() for text in near),
    )
