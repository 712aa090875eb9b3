"""Relations after one another: two-hop questions, and relations asked backwards.

A chain is two facts that meet in a bridge, Louvre -> France -> Paris. It is asked without naming the bridge: words that
*describe* it by the subject ("the country where the landmark {} is located") stand in a question of the second relation
("The capital of {} is"). Both kinds of words are kept here, for each relation by itself, so that any two relations that
share entities can be asked about together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import pandas as pd

from kcwb.errors import DataError, SettingError, nearest
from kcwb.settings import Count
from kcwb.tasks.relations import Fact, Relation, check_template, load_relation, load_relations, require_subjects
from kcwb.verbs import verb

#: First relation -> words that describe its object by its subject.
DESCRIPTIONS = {
    "antonym": ("the opposite of {}", "the word that means the reverse of {}"),
    "book_author": ("the author of the book {}", "the writer of the book {}"),
    "city_country": ("the country where the city of {} is located", "the country that has the city of {}"),
    "company_headquarters": (
        "the city where the company {} has its headquarters",
        "the city with the head office of the company {}",
    ),
    "food_country": ("the country where the dish {} comes from", "the country that has the national dish {}"),
    "landmark_country": ("the country where the landmark {} is located", "the country that has the landmark {}"),
    "product_company": ("the company that makes the product {}", "the company that sells the product {}"),
    "task_person": ("somebody whose job is to {}", "a person who is paid to {}"),
}
#: Second relation -> questions about it in which such words may stand.
QUESTIONS = {
    "adj_comparative": ("The comparative form of {} is", "The comparative of {} is the word"),
    "adj_superlative": ("The superlative form of {} is", "The superlative of {} is the word"),
    "city_country": ("On the map, {} lies in the country of", "The country that {} belongs to is"),
    "company_headquarters": ("The headquarters of {} is located in", "The head office of {} is in"),
    "country_capital": ("The capital of {} is", "The capital city of {} is"),
    "country_continent": ("On a world map, {} is found on the continent of", "The continent of {} is"),
    "country_currency": ("The official currency of {} is the", "The national currency of {} is the"),
    "country_language": ("The main language spoken in {} is", "The most widely spoken language in {} is"),
    "country_largest_city": ("The largest city in {} is", "The most populous city in {} is"),
    "person_native_language": ("The native language of {} is", "The mother tongue of {} is"),
    "person_occupation": ("The main occupation of {} was that of a", "By profession, {} was a"),
    "work_location": ("You would most likely find {} at work in a", "After a long shift, {} finally left the"),
}
#: Relation -> templates that ask for its subject by its object.
BACKWARDS = {
    "adj_comparative": ("The word {} is the comparative form of", "The adjective whose comparative is {} is"),
    "adj_superlative": ("The word {} is the superlative form of", "The adjective whose superlative is {} is"),
    "animal_young": ("A {} is a young", "The animal whose young is called a {} is the"),
    "book_author": ("The most famous book by {} is", "The author {} wrote the classic book"),
    "company_headquarters": ("A large company with its headquarters in {} is", "The city of {} is home to the company"),
    "country_capital": ("{} is the capital of", "The country whose capital is {} is"),
    "country_currency": ("The {} is the official currency of", "The country that pays with the {} is"),
    "country_language": ("Most people who speak {} live in", "The country where most people speak {} is"),
    "country_largest_city": ("{} is the largest city in", "The country whose largest city is {} is"),
    "element_symbol": ("The chemical symbol {} stands for the element", "The element with the symbol {} is"),
    "noun_plural": ("The word {} is the plural of", "Instead of several {}, there was now only one"),
    "superhero_person": ("The superhero that {} becomes is", "The secret of {} is that he is the superhero"),
    "verb_past_tense": ("The word {} is the past tense of", "The verb whose past tense is {} is to"),
}


@dataclass(frozen=True, order=True)
class Chain:
    """Two facts that meet: the first relation gives the subject a bridge, the second gives the bridge an object."""

    subject: str
    bridge: str
    object: str


class Wording(NamedTuple):
    """How a chain is asked.

    Attributes
    ----------
    description
        Words for the bridge, in which `{}` is the subject.
    question
        A template of the second relation, whose `{}` takes those words.
    """

    description: str
    question: str

    @property
    def template(self) -> str:
        """The two-hop question, in which `{}` is the subject."""
        return self.question.replace("{}", self.description)

    @property
    def relation_alone(self) -> str:
        """The same without the subject, without an "of" before it or an "'s" after it."""
        return re.sub(r"\s*(\bof\s+)?\{\}('s\b)?", "", self.template).strip()


@dataclass(frozen=True, eq=False)
class Composition:
    """A relation after a relation; made by `compose` or `kcwb.tasks.mquake.load_mquake`.

    Attributes
    ----------
    first, second
        The two relations.
    wordings
        How the two-hop question may be asked.
    chains
        One per subject.
    counts
        Where the chains come from: facts of the first relation, how many go on, and how many were dropped for what.
    """

    first: Relation
    second: Relation
    wordings: tuple[Wording, ...]
    chains: tuple[Chain, ...]
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse wordings that cannot be filled."""
        for i, wording in enumerate(self.wordings):
            for name, text in wording._asdict().items():
                check_template(text, f"{self.name}, wordings[{i}].{name}")
            if not wording.relation_alone:
                raise DataError(f"{self.name}, wordings[{i}]: {wording.template!r:.80} is nothing without its subject.")

    @property
    def name(self) -> str:
        """Both names, in the order in which the relations are used."""
        return f"{self.first.name}__{self.second.name}"

    @property
    def n_different(self) -> tuple[int, int]:
        """How many different bridges and objects there are."""
        return len({chain.bridge for chain in self.chains}), len({chain.object for chain in self.chains})

    @cached_property
    def relation(self) -> Relation:
        """The two hops as one relation, from subject to object, for all that takes a relation."""
        templates = tuple(wording.template for wording in self.wordings)
        return Relation(
            name=self.name,
            relation_type="two-hop",
            domain_name=self.first.domain_name,
            range_name=self.second.range_name,
            symmetric=False,
            prompt_templates=templates,
            prompt_templates_zs=templates,
            facts=self.facts_of("two-hop"),
        )

    def facts_of(self, question: str) -> tuple[Fact, ...]:
        """What `hop 1`, `hop 2` or a `two-hop` question asks of each chain, with all right answers of its relation."""
        hop_1 = question == "hop 1"
        own = {fact.subject: fact for fact in (self.first if hop_1 else self.second).facts}
        found = []
        for chain in self.chains:
            subject, answer = (chain.subject, chain.bridge) if hop_1 else (chain.bridge, chain.object)
            fact = own.get(subject, Fact(subject, answer))
            fact = fact if fact.object == answer else fact.with_object(answer)
            both = question == "two-hop"
            found.append(replace(fact, subject=chain.subject, corrupted="") if both else fact)
        return tuple(found)

    def wording(self, which: int) -> Wording:
        """A wording by its number; SettingError if there is none."""
        last = len(self.wordings) - 1
        if not 0 <= which <= last:
            raise SettingError(f"template={which}: {self.name} has {last + 1} wordings, 0 to {last}.")
        return self.wordings[which]

    def __repr__(self) -> str:
        """One line: names and sizes."""
        bridges, objects = self.n_different
        return (
            f"Composition({self.first.name} > {self.second.name}: {len(self.chains)} chains over {bridges} bridges to "
            f"{objects} objects, {len(self.wordings)} wordings)"
        )


@verb
def compose(
    first: Relation | str, second: Relation | str, *, wordings: Sequence[tuple[str, str]] | None = None
) -> Composition:
    """Chain two relations where the first one's objects are subjects of the second.

    Left out, and counted in `counts`, are chains whose answer could be copied: where the object is the bridge, where
    it stands in the subject ("the country that has the city of Mexico City"), and where the bridge does.

    Parameters
    ----------
    first, second
        Relations, names of packaged ones, or paths.
    wordings
        Pairs of a description of the bridge and a question, as `Wording`; None takes those of `DESCRIPTIONS` and
        `QUESTIONS`, each with each, the first of both first.

    Raises
    ------
    DataError
        If the relations share no entity, or no chain is left: with the counts.
    SettingError
        If there are no words for one of them.

    Examples
    --------
    >>> compose("landmark_country", "country_capital").wordings[0].template
    'The capital of the country where the landmark {} is located is'
    """
    first, second = load_relation(first), load_relation(second)
    for relation in (first, second):
        require_subjects(relation, "A chain")
    chosen = [Wording(*pair) for pair in wordings] if wordings is not None else _usual_wordings(first, second)
    if not chosen:
        raise SettingError("wordings=[]: give at least one pair of a description and a question.")
    objects = {fact.subject: fact.object for fact in second.facts}
    found = [Chain(fact.subject, fact.object, objects[fact.object]) for fact in first.facts if fact.object in objects]
    if not found:
        raise DataError(
            f"{first.name} and {second.name} share no entity: none of the {len(first.objects)} objects of "
            f"{first.name} ({_some(first.objects)}) is among the {len(second.facts)} subjects of {second.name} "
            f"({_some(fact.subject for fact in second.facts)}). Names must be spelled alike."
        )
    kept, dropped = drop_copies(found)
    counts = {f"facts of {first.name}": len(first.facts), f"go on in {second.name}": len(found), **dropped}
    if not kept:
        said = ", ".join(f"{what}: {count}" for what, count in counts.items())
        raise DataError(f"{first.name} > {second.name}: no chain is left whose answer cannot be copied ({said}).")
    return Composition(first, second, tuple(chosen), tuple(kept), counts)


@verb
def compositions(least: Count = 10) -> pd.DataFrame:
    """The packaged relations that can be chained.

    Parameters
    ----------
    least
        Of at least how many chains.

    Returns
    -------
    DataFrame
        `first`, `second`, `chains`, `bridges`, `objects` (how many different ones), `dropped`; most chains first.
    """
    relations = {relation.name: relation for relation in load_relations()}
    rows = []
    for first in (relations[name] for name in DESCRIPTIONS):
        for second in (relations[name] for name in QUESTIONS):
            if not set(first.objects) & {fact.subject for fact in second.facts}:
                continue
            try:
                found = compose(first, second)
            except DataError:  # every chain could be copied
                continue
            gone = found.counts[f"go on in {second.name}"] - len(found.chains)
            rows.append((first.name, second.name, len(found.chains), *found.n_different, gone))
    table = pd.DataFrame(rows, columns=["first", "second", "chains", "bridges", "objects", "dropped"])
    table = table[table["chains"] >= least]
    return table.sort_values("chains", ascending=False, kind="stable").reset_index(drop=True)


@verb
def reverse(relation: Relation | str, *, templates: Sequence[str] | None = None) -> Relation:
    """The relation from its objects to its subjects.

    Only facts whose object belongs to one subject can be asked backwards: Paris is the capital of one country, but the
    euro is the currency of many.

    Parameters
    ----------
    relation
        A Relation, the name of a packaged one, or a path.
    templates
        Zero-shot templates that ask for the subject, `{}` being the object; None takes those of `BACKWARDS`, or the
        relation's own if it is symmetric.

    Raises
    ------
    DataError
        If every object has several subjects.
    SettingError
        If there are no templates for it.
    """
    relation = load_relation(relation)
    require_subjects(relation, "A question backwards")
    usual = relation.prompt_templates_zs if relation.symmetric else BACKWARDS.get(relation.name)
    texts = usual if templates is None else tuple(templates)
    if not texts:
        raise SettingError(
            f"There are no templates that ask {relation.name} backwards: give some, for example "
            f"reverse({relation.name!r}, templates=['... {{}} ...']). {nearest(relation.name, BACKWARDS)}"
        )
    times = Counter(name for fact in relation.facts for name in fact.right)
    facts = tuple(
        Fact(fact.object, fact.subject, space=fact.space) for fact in relation.facts if times[fact.object] == 1
    )
    if not facts:
        raise DataError(
            f"{relation.name} cannot be asked backwards: each of its {len(times)} objects belongs to several of its "
            f"{len(relation.facts)} subjects."
        )
    return Relation(
        name=f"{relation.name}_reversed",
        relation_type=relation.relation_type,
        domain_name=relation.range_name,
        range_name=relation.domain_name,
        symmetric=relation.symmetric,
        prompt_templates=tuple(texts),
        prompt_templates_zs=tuple(texts),
        facts=facts,
    )


#: How the answer of a chain could be copied, and whether that is so for its subject, bridge and object.
_COPIES: dict[str, Callable[[str, str, str], bool]] = {
    "object is the bridge": lambda subject, bridge, answer: answer == bridge,
    "object in the subject": lambda subject, bridge, answer: answer in subject,
    "bridge in the subject": lambda subject, bridge, answer: bridge in subject,
}


def drop_copies(chains: Iterable[Chain]) -> tuple[list[Chain], dict[str, int]]:
    """The chains whose answer cannot be copied, and how many others there are of each kind."""
    kept: list[Chain] = []
    dropped = dict.fromkeys(_COPIES, 0)
    for chain in chains:
        words = [text.casefold() for text in (chain.subject, chain.bridge, chain.object)]
        copied = next((name for name, found in _COPIES.items() if found(*words)), None)
        if copied is None:
            kept.append(chain)
        else:
            dropped[copied] += 1
    return kept, dropped


def _usual_wordings(first: Relation, second: Relation) -> list[Wording]:
    for relation, words, what in ((first, DESCRIPTIONS, "describe the object"), (second, QUESTIONS, "ask")):
        if relation.name not in words:
            raise SettingError(
                f"There are no words to {what} of {relation.name}: give wordings=[(description, question)], for "
                f"example ('the country where {{}} is located', 'The capital of {{}} is'). "
                f"{nearest(relation.name, words)}"
            )
    return [Wording(about, asked) for asked in QUESTIONS[second.name] for about in DESCRIPTIONS[first.name]]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(f"{name:.40}" for name in listed[:3]) + (", ..." if len(listed) > 3 else "")
