"""Relations and their facts: read, validate, write.

A relation is one JSON file in the format of the LRE dataset (Hernandez et al., arXiv 2308.09124):

    {"name": ..., "prompt_templates": [...], "prompt_templates_zs": [...],
     "properties": {"relation_type": ..., "domain_name": ..., "range_name": ..., "symmetric": ...},
     "samples": [{"subject": ..., "object": ...}, ...]}

where `{}` in a template marks the subject. `prompt_templates_zs` are the zero-shot templates. A relation gives a
subject one object: of several in a file the first counts, and a warning says how many others were left out.

A sample may say more (`Fact`): `also`, `wrong`, `corrupted`, `span`, `space`. Where samples have a `span`, their
subjects are whole prompts and the template is `{}`: so `kcwb.tasks.pairs` writes prompts of anybody's own. A table of
prompts (.csv, .tsv, .jsonl, .parquet) is read by it wherever a relation's file is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kcwb.errors import DataError, SettingError, nearest, warn
from kcwb.files import write_text
from kcwb.tasks.records import read_json, readable
from kcwb.verbs import noun, verb


@noun
@dataclass(frozen=True, order=True)
class Fact:
    """A subject and the object that the relation gives it.

    Attributes
    ----------
    subject, object
        What is asked about, and the answer.
    also
        Other answers that are right as well.
    wrong
        Answers that are wrong; none: the relation's other objects are.
    corrupted
        The text in the place of the subject in the corrupted prompt; empty: another fact's.
    span
        Where the subject proper stands in `subject`, which is a whole prompt: from and to which character. (0, 0) if it
        is not known. None: all of `subject` is the subject.
    space
        Whether a space stands between prompt and answer.
    """

    subject: str
    object: str
    also: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    corrupted: str = ""
    span: tuple[int, int] | None = None
    space: bool = True

    def __post_init__(self) -> None:
        """Refuse a span that is not one of the subject's text."""
        if self.span is not None and not 0 <= self.span[0] <= self.span[1] <= len(self.subject):
            raise DataError(
                f"The span {list(self.span)} is none of {self.subject!r:.60}, which has {len(self.subject)} characters."
            )

    @property
    def named(self) -> str:
        """The subject proper; empty if it is not known."""
        return self.subject if self.span is None else self.subject[slice(*self.span)]

    @property
    def right(self) -> tuple[str, ...]:
        """All right answers, the first one first."""
        return (self.object, *self.also)

    @verb
    def with_object(self, name: str) -> Fact:
        """The same question, to which this answer is right and no other."""
        return replace(self, object=name, also=(), wrong=())


@noun
@dataclass(frozen=True)
class Relation:
    """A relation: templates and facts.

    Attributes
    ----------
    name, relation_type
        For example `country_capital`, `factual`.
    domain_name, range_name, symmetric
        What subjects and objects are, and whether each may stand for the other.
    prompt_templates, prompt_templates_zs
        Templates for several-shot and zero-shot prompts; each holds `{}` once.
    facts
        One object per subject.
    """

    name: str
    relation_type: str
    domain_name: str
    range_name: str
    symmetric: bool
    prompt_templates: tuple[str, ...]
    prompt_templates_zs: tuple[str, ...]
    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        """Refuse a relation without facts or with templates that cannot be filled."""
        where = f"relation {self.name!r}"
        for key in ("prompt_templates", "prompt_templates_zs"):
            for i, template in enumerate(getattr(self, key)):
                check_template(template, f"{where}, {key}[{i}]")
        if not self.facts:
            raise DataError(f"{where} has no facts.")
        twice = [subject for subject, n in Counter(fact.subject for fact in self.facts).items() if n > 1]
        if twice:
            raise DataError(
                f"{where}: the subject {twice[0]!r:.60} stands in more than one fact; a subject has one object."
            )

    @property
    def objects(self) -> tuple[str, ...]:
        """The different objects, in order of first appearance."""
        return tuple(dict.fromkeys(fact.object for fact in self.facts))

    @property
    def of_prompts(self) -> bool:
        """Whether its facts are whole prompts, so that nothing can be done with their subjects alone."""
        return any(fact.span is not None for fact in self.facts)

    @verb
    def template(self, which: int | str, *, shots: bool = False) -> str:
        """A zero-shot template (or a several-shot one, for `shots`) by its number, or one of the caller's own, checked.

        Raises
        ------
        SettingError
            If there is no such template.
        DataError
            If a template of the caller's own does not hold `{}` exactly once.
        """
        if isinstance(which, str):
            return check_template(which, "template")
        known = self.prompt_templates if shots else self.prompt_templates_zs
        if not 0 <= which < len(known):
            kind, last = "several-shot" if shots else "zero-shot", len(known) - 1
            raise SettingError(f"template={which}: {self.name} has {len(known)} {kind} templates, 0 to {last}.")
        return known[which]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the relation's content."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The relation as text in the LRE format, one sample a line."""
        head = {
            "name": self.name,
            "prompt_templates": list(self.prompt_templates),
            "prompt_templates_zs": list(self.prompt_templates_zs),
            "properties": {
                "relation_type": self.relation_type,
                "domain_name": self.domain_name,
                "range_name": self.range_name,
                "symmetric": self.symmetric,
            },
        }
        samples = [json.dumps(_sample(fact), ensure_ascii=False) for fact in self.facts]
        start = json.dumps(head, ensure_ascii=False, indent=2)[:-2]
        return start + ',\n  "samples": [\n    ' + ",\n    ".join(samples) + "\n  ]\n}\n"

    @verb
    def save(self, path: str | Path) -> None:
        """Write the relation to a JSON file."""
        write_text(Path(path), self.to_json())


def require_subjects(relation: Relation, what: str) -> None:
    """Refuse a relation of whole prompts for what has to name a subject; DataError."""
    if relation.of_prompts:
        raise DataError(
            f"{what} needs facts with a subject and templates; {relation.name} is made of whole prompts "
            f"({relation.facts[0].subject!r:.60}), which have neither. Use a relation."
        )


def relation_folder() -> Path:
    """The folder of the relations that come with the package: in a checkout `data/relations`."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "data" / "relations"
    return installed if installed.is_dir() else package.parent / "data" / "relations"


@verb
def relation_files(folder: str | Path | None = None) -> dict[str, Path]:
    """Name -> file of the relations in a folder (default: those that come with the package), by category and name."""
    root = relation_folder() if folder is None else Path(folder)
    if not root.is_dir():
        raise DataError(f"There is no folder {root} to read relations from.")
    files: dict[str, Path] = {}
    for path in sorted(root.rglob("*.json")):
        if path.stem in files:
            raise DataError(f"Two relations are named {path.stem!r}: {files[path.stem]} and {path}. Rename one.")
        files[path.stem] = path
    return files


@verb
def load_relation(name: str | Path | Relation) -> Relation:
    """Read and validate one relation.

    Parameters
    ----------
    name
        The name of a relation that comes with the package, or the path of a file: in the LRE format, or a table of
        prompts as `kcwb.tasks.read_pairs` reads it. A Relation is returned as it is.

    Raises
    ------
    DataError
        If there is no such relation, or its file is malformed; names the file and the place in it.
    """
    if isinstance(name, Relation):
        return name
    path = Path(name)
    if path.suffix in TABLES:
        from kcwb.tasks.pairs import read_pairs  # which makes relations

        return read_pairs(path)
    if path.suffix != ".json":
        known = relation_files()
        if str(name) not in known:
            raise DataError(
                f"There is no relation {str(name)!r}. {nearest(str(name), known)} "
                "A relation of your own is given by the path of its .json file."
            )
        path = known[str(name)]
    return _parse(read_json(path), path)


@verb
def load_relations(folder: str | Path | None = None) -> list[Relation]:
    """Read and validate every relation of a folder (default: those that come with the package).

    Files that cannot be read are left out, with a warning that names them and says why.

    Raises
    ------
    DataError
        If there is no such folder, or files in it but none that can be read.
    """
    return readable(relation_files(folder).values(), load_relation, "relations")


def _parse(data: Any, path: Path) -> Relation:
    """A relation out of what its file holds."""
    name = check_text(_get(data, "name", str, path), f"{path}, name")
    properties = _get(data, "properties", Mapping, path)
    kinds = {"relation_type": str, "domain_name": str, "range_name": str, "symmetric": bool}
    known = {key: _get(properties, key, kind, path, "properties.") for key, kind in kinds.items()}
    check_text(known["relation_type"], f"{path}, properties.relation_type")
    return Relation(
        name,
        **known,
        prompt_templates=_templates(data, "prompt_templates", path),
        prompt_templates_zs=_templates(data, "prompt_templates_zs", path),
        facts=_facts(_get(data, "samples", list, path), path),
    )


#: Endings of tables of prompts.
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
#: Endings of relations.
FILES = (".json", *TABLES)
_KINDS = {str: "a text", bool: "true or false", list: "a list", Mapping: "an object"}


def _get(data: Any, key: str, kind: type, path: Path, where: str = "") -> Any:
    if not isinstance(data, Mapping):
        raise DataError(f"{path}, {where.rstrip('.') or 'top level'}: expected an object with keys.")
    if key not in data:
        raise DataError(f"{path}: the key {where + key!r} is missing.")
    if not isinstance(data[key], kind):
        raise DataError(f"{path}, {where + key}: expected {_KINDS[kind]}, found {data[key]!r:.60}.")
    return data[key]


def check_text(value: Any, where: str, strip: bool = False) -> str:
    """Return a text that is not empty and has no white space around it (`strip` takes it away), or raise DataError."""
    if strip and isinstance(value, str):
        value = value.strip()
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected a text that is not empty, found {value!r:.60}.")
    if value != value.strip():
        raise DataError(f"{where}: {value!r:.60} starts or ends with white space; remove it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {value!r:.60} holds a lone surrogate at {error.start}, which is no text.") from error
    return value


def check_prompt(value: Any, where: str, space: bool) -> str:
    """Return a whole prompt, which may end in white space if none is put between it and its answer; or DataError."""
    check_text(value.strip() if isinstance(value, str) else value, where)
    if space and value[-1].isspace():
        raise DataError(
            f"{where}: {value!r:.60} ends in white space, and a space is put before the answer. Remove it, or say that "
            "none is to be put there: space=False."
        )
    return value


def check_template(template: str, where: str) -> str:
    """Return a template that holds `{}` exactly once and does not end in white space, or raise DataError."""
    check_text(template, where)
    if template.count("{}") != 1:
        raise DataError(f"{where}: {template!r:.80} must hold {{}} exactly once, where the subject goes.")
    return template


def _templates(data: Any, key: str, path: Path) -> tuple[str, ...]:
    templates = _get(data, key, list, path)
    if not templates:
        raise DataError(f"{path}, {key}: the list is empty; give at least one template.")
    return tuple(check_template(template, f"{path}, {key}[{i}]") for i, template in enumerate(templates))


def _facts(samples: list[Any], path: Path) -> tuple[Fact, ...]:
    """One fact per subject, the first; warns of others. White space around words is the file's, not theirs."""
    if not samples:
        raise DataError(f"{path}, samples: the list is empty; give at least one fact.")
    first: dict[str, Fact] = {}
    others: list[Fact] = []
    for i, sample in enumerate(samples):
        where = f"samples[{i}]."
        words = [check_text(_get(sample, key, str, path, where), f"{path}, {where}{key}", True) for key in _WORDS]
        more = _more(sample, path, where)
        if "span" in more:
            words[0] = check_prompt(sample["subject"], f"{path}, {where}subject", more.get("space", True))
        try:
            fact = Fact(words[0], words[1], **more)
        except DataError as error:
            raise DataError(f"{path}, {where}span: {error}") from error
        if first.setdefault(fact.subject, fact) != fact:
            others.append(fact)
    if others:
        one = others[0]
        warn(
            f"{path}: {len(others)} of {len(samples)} facts give a subject another object than one before, and are "
            f"left out, the first {one.subject!r:.60}: {one.object!r:.60} (kept: {first[one.subject].object!r:.60})."
        )
    return tuple(first.values())


_WORDS = ("subject", "object")
#: What else a sample may say, and how JSON says it.
_MORE = {"also": list, "wrong": list, "corrupted": str, "span": list, "space": bool}


def _more(sample: Mapping[str, Any], path: Path, where: str) -> dict[str, Any]:
    """What a sample says beside subject and object."""
    found = {key: _get(sample, key, kind, path, where) for key, kind in _MORE.items() if key in sample}
    for key in ("also", "wrong"):
        texts = enumerate(found.get(key, ()))
        found[key] = tuple(check_text(text, f"{path}, {where}{key}[{i}]", True) for i, text in texts)
    if "corrupted" in found:
        check_prompt(found["corrupted"], f"{path}, {where}corrupted", found.get("space", True))
    if "span" in found:
        ends = found["span"]
        if len(ends) != 2 or not all(type(end) is int for end in ends):
            raise DataError(f"{path}, {where}span: expected two whole numbers, [start, stop], found {ends!r:.60}.")
        found["span"] = tuple(ends)
    return found


def _sample(fact: Fact) -> dict[str, Any]:
    """A fact as JSON says it: what is as usual is not said."""
    usual = vars(Fact("", ""))
    return {key: value for key, value in vars(fact).items() if key in _WORDS or value != usual[key]}
