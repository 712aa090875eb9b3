"""A small world of invented facts, for models about which everything is known.

    person --was born in--> city --lies in--> country --> its capital, its language

Forty people, sixteen cities, eight countries, eight languages. What belongs to one country begins alike, so that a
reader sees at once whether an answer is right: Borland has the capital Borton, the other city Borwick, and the language
Borish. A model cannot see it, since each name is one token of a word-level tokenizer. The seed decides who was born
where.

Four relations are **atomic**, and three are **composed** of them: a person's country follows from the city, a person's
language from the country, a city's language from its country. Of some people only the city is ever told, and of some
cities only the country: their composed facts are **held out**. A model can know those by composition alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import pandas as pd

from kcwb.errors import DataError, choose
from kcwb.settings import Seed
from kcwb.tasks.relations import Fact, Relation
from kcwb.verbs import verb

#: What countries, and all that belongs to them, begin with.
STEMS = ("Bor", "Cal", "Dru", "Fen", "Gal", "Hos", "Jor", "Kel")
PEOPLE = (
    *("Ada", "Alma", "Ben", "Bodo", "Cara", "Cleo", "Dirk", "Edda", "Elsa", "Finn", "Fritz", "Gina", "Gwen", "Hans"),
    *("Hugo", "Ida", "Ilse", "Jan", "Jonas", "Kira", "Kurt", "Lena", "Leo", "Max", "Mona", "Nils", "Nora", "Olga"),
    *("Pim", "Quin", "Rosa", "Sven", "Tara", "Ugo", "Vera", "Wim", "Xena", "Yuri", "Yves", "Zoe"),
)
#: Relation -> what its subjects and objects are, and its templates. All end in a word of the relation.
_ATOMIC = {
    "person_city": (
        ("person", "city"),
        ("{} was born in the city of", "the city where {} was born is", "people know that {} was born in"),
    ),
    "city_country": (
        ("city", "country"),
        ("the city of {} lies in the country of", "the country where {} lies is", "maps show that {} lies in"),
    ),
    "country_capital": (
        ("country", "city"),
        ("the capital of {} is the city of", "the city that rules {} is", "the rulers of {} live in"),
    ),
    "country_language": (
        ("country", "language"),
        ("the people of {} speak the language called", "the language of {} is", "at home in {} they speak"),
    ),
}
_COMPOSED = {
    "person_country": (
        ("person", "country"),
        ("{} comes from the country of", "the country where {} was born is", "people know that {} comes from"),
    ),
    "person_language": (
        ("person", "language"),
        ("{} speaks the language called", "the mother tongue of {} is", "people know that {} speaks"),
    ),
    "city_language": (
        ("city", "language"),
        ("the people in {} speak the language called", "the language in {} is", "in the streets of {} they speak"),
    ),
}
#: Composed relation -> the steps that it consists of.
STEPS = {
    "person_country": ("person_city", "city_country"),
    "person_language": ("person_city", "city_country", "country_language"),
    "city_language": ("city_country", "country_language"),
}
#: A fact is atomic, or it follows from others; and then training shows it as well, or it does not.
KINDS = ("atomic", "composed", "held out")
#: Which part of a relation's facts: those that training shows, those that it does not, or all.
PARTS = ("trained", "held out", "all")


@dataclass(frozen=True)
class World:
    """The facts of the world; made by `make_world`.

    Attributes
    ----------
    seed
        That it was drawn with.
    relations
        Name -> Relation with all facts: the atomic ones first, then the composed ones.
    held_out
        The people and cities whose composed facts training does not show.
    """

    seed: int
    relations: Mapping[str, Relation]
    held_out: frozenset[str]

    @property
    def atomic(self) -> tuple[str, ...]:
        """The names of the relations that are told outright."""
        return tuple(_ATOMIC)

    @property
    def composed(self) -> tuple[str, ...]:
        """The names of the relations that follow from others, see `STEPS`."""
        return tuple(_COMPOSED)

    @verb
    def relation(self, name: str, part: str = "all") -> Relation:
        """A relation by its name, with all its facts or with a part of them.

        Raises
        ------
        SettingError
            If there is no such relation or part.
        DataError
            If no fact is left: of the atomic relations nothing is held out.
        """
        whole = self.relations[choose("The relation", name, self.relations)]
        if choose("The part", part, PARTS) == "all":
            return whole
        held_out = self.held_out if name in _COMPOSED else frozenset()
        facts = tuple(fact for fact in whole.facts if (fact.subject in held_out) == (part == "held out"))
        if not facts:
            raise DataError(f"Nothing of {name} is {part}: that is so for {', '.join(_COMPOSED)} alone.")
        return replace(whole, facts=facts)

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """What training shows: every fact that is not held out, in all templates of its relation."""
        return tuple(
            f"{template.replace('{}', fact.subject)} {fact.object} ."
            for name in self.relations
            for fact in self.relation(name, "trained").facts
            for template in self.relations[name].prompt_templates_zs
        )

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word of the sentences, in alphabetical order."""
        return tuple(sorted({word for sentence in self.sentences for word in sentence.split()}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what training shows."""
        return hashlib.sha256("\n".join(self.sentences).encode()).hexdigest()

    def table(self) -> pd.DataFrame:
        """One row per fact: `relation`, `subject`, `object`, `steps` (1 if atomic), `kind` (one of `KINDS`).

        Relations and kinds are categories, in their order.
        """
        rows = []
        for name, relation in self.relations.items():
            steps = len(STEPS.get(name, (name,)))
            for fact in relation.facts:
                kind = "atomic" if steps == 1 else "held out" if fact.subject in self.held_out else "composed"
                rows.append((name, fact.subject, fact.object, steps, kind))
        table = pd.DataFrame(rows, columns=["relation", "subject", "object", "steps", "kind"])
        orders = {"relation": [*self.relations], "kind": KINDS}
        return table.astype({name: pd.CategoricalDtype(order, ordered=True) for name, order in orders.items()})

    @verb
    def save(self, folder: str | Path) -> None:
        """Write each relation, with all its facts, to a file that `load_relation` reads: `<folder>/<name>.json`."""
        for name, relation in self.relations.items():
            relation.save(Path(folder) / f"{name}.json")


@verb
def make_world(seed: Seed = 0) -> World:
    """The world.

    Parameters
    ----------
    seed
        Of who was born where, and of which people and cities are held out. Each country has five people, two of whom
        are held out; of the sixteen cities, four.
    """
    draw = random.Random(seed)
    cities = {f"{stem}{ending}": stem for ending in ("ton", "wick") for stem in STEMS}
    born = dict(zip(draw.sample(PEOPLE, len(PEOPLE)), [*cities, *cities, *cities], strict=False))
    maps = {
        "person_city": {person: born[person] for person in PEOPLE},
        "city_country": {city: f"{stem}land" for city, stem in cities.items()},
        "country_capital": {f"{stem}land": f"{stem}ton" for stem in STEMS},
        "country_language": {f"{stem}land": f"{stem}ish" for stem in STEMS},
    }
    for name, steps in STEPS.items():
        maps[name] = {one: reduce(lambda place, step: maps[step][place], steps, one) for one in maps[steps[0]]}
    people = {stem: [person for person in PEOPLE if born[person].startswith(stem)] for stem in STEMS}
    held_out = [person for stem in STEMS for person in draw.sample(people[stem], 2)]
    held_out += draw.sample([*cities], 4)
    relations = {name: _relation(name, objects) for name, objects in maps.items()}
    return World(seed, relations, frozenset(held_out))


def _relation(name: str, objects: Mapping[str, str]) -> Relation:
    (domain, range_), templates = (_ATOMIC | _COMPOSED)[name]
    facts = tuple(Fact(subject, answer) for subject, answer in objects.items())
    return Relation(name, "synthetic", domain, range_, False, templates, templates, facts)


def world_tokenizer(world: World, masked: bool = False) -> Any:
    """A tokenizer of whole words, of Hugging Face's own class: each word of the world is one token, as is a full stop.

    Texts begin with `<bos>`; `masked`, for encoders, they stand between `[CLS]` and `[SEP]`, and there is a `[MASK]`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ("pad", "unk", "cls", "sep", "mask") if masked else ("pad", "unk", "bos", "eos")
    special = {f"{name}_token": f"[{name.upper()}]" if masked else f"<{name}>" for name in names}
    ids = {word: i for i, word in enumerate([*special.values(), *world.words])}
    words = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [special[key] for key in (("cls_token", "sep_token") if masked else ("bos_token",))]
    words.post_processor = processors.TemplateProcessing(
        single=f"{around[0]} $A{f' {around[1]}' if masked else ''}", special_tokens=[(one, ids[one]) for one in around]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)
