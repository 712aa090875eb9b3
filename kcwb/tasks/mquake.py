"""Two-hop chains from a file in the format of MQuAKE (Zhong et al., arXiv 2305.14795).

The file is a JSON list of records. Of a record are read

    orig.triples           [[subject id, relation id, object id], ...], the chain before any edit
    orig.triples_labeled   the same in words
    single_hops            [{"cloze": "Lyon is located in the country of", ...}, ...], one per triple
    questions              the whole chain in words, several times

and nothing of its edits (`requested_rewrite`, `new_single_hops`, ...). Records of the same two relation ids become one
`Composition`. A cloze with the subject taken out is a template of its relation; a question with the subject taken out,
as "Q: ...? A:", one of the two-hop question, whose bridge has no description of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kcwb.errors import DataError
from kcwb.settings import Count
from kcwb.tasks.compose import Chain, Composition, Wording, drop_copies
from kcwb.tasks.records import read_json, readable
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.subjects import blank
from kcwb.verbs import verb

_MOST_TEMPLATES = 4


class _Case(NamedTuple):
    ids: tuple[str, str]
    names: tuple[str, str]
    chain: Chain
    hops: tuple[str | None, str | None]
    questions: list[str]


@verb
def load_mquake(path: str | Path, *, least: Count = 2) -> list[Composition]:
    """Read the two-hop chains of a file in the format of MQuAKE.

    Records that are something else are left out, with a warning that names them. Left out as well are records of more
    hops, those in which a cloze does not name its subject once as whole words, those that give a subject a second
    bridge or a bridge a second object, and those whose answer could be copied, as in `compose`.

    Parameters
    ----------
    path
        Where the file is.
    least
        Only compositions with at least this many chains.

    Returns
    -------
    list
        Compositions, the one with most chains first; relations are named by their labels.

    Raises
    ------
    DataError
        If the file cannot be read, none of its records is what MQuAKE has there (names file, record and key), or
        nothing is left (with counts).
    """
    path = Path(path)
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: expected a list of records, as in MQuAKE.")
    numbered = [(record, f"{path}, record {i}") for i, record in enumerate(records)]
    cases = [case for case in readable(numbered, lambda pair: _read(*pair), "records") if case is not None]
    pairs: dict[tuple[str, str], list[_Case]] = defaultdict(list)
    for case in cases:
        pairs[case.ids].append(case)
    made = [one for one in (_composition(some) for some in pairs.values()) if one and len(one.chains) >= least]
    if not made:
        raise DataError(
            f"{path}: no two relations with {least} chains or more whose answers cannot be copied; of {len(records)} "
            f"records {len(cases)} have two hops, of {len(pairs)} pairs of relations."
        )
    return sorted(made, key=lambda one: -len(one.chains))


def _read(record: Any, where: str) -> _Case | None:
    """One record; None if it has not two hops."""
    triples = _get(record, "orig", "triples", where=where)
    labels = _get(record, "orig", "triples_labeled", where=where)
    hops, questions = _get(record, "single_hops", where=where), _get(record, "questions", where=where)
    if not all(isinstance(part, list) for part in (triples, labels, hops, questions)):
        raise DataError(f"{where}: orig.triples, orig.triples_labeled, single_hops and questions must be lists.")
    if len(triples) != 2:
        return None
    for name, chain in (("orig.triples", triples), ("orig.triples_labeled", labels)):
        if len(chain) != 2 or not all(isinstance(one, list) and len(one) == 3 for one in chain):
            raise DataError(f"{where}, {name}: expected as many triples of subject, relation and object as hops.")
        if chain[0][2] != chain[1][0]:
            raise DataError(f"{where}, {name}: the second hop does not begin where the first one ends.")
    if len(hops) != 2:
        raise DataError(f"{where}, single_hops: expected one per triple, found {len(hops)}.")
    clozes = [_get(hop, "cloze", where=f"{where}, single_hops[{i}]") for i, hop in enumerate(hops)]
    texts = [part for triple in (*triples, *labels) for part in triple] + clozes + questions
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where}: triples, clozes and questions must be texts that are not empty.")
    first, second = ([part.strip() for part in one] for one in labels)
    return _Case(
        ids=(triples[0][1], triples[1][1]),
        names=(first[1], second[1]),
        chain=Chain(first[0], first[2], second[2]),
        hops=(blank(clozes[0].strip(), first[0]), blank(clozes[1].strip(), second[0])),
        questions=[found for text in questions if (found := blank(f"Q: {text.strip()} A:", first[0]))],
    )


def _get(value: Any, *keys: str, where: str) -> Any:
    for i, key in enumerate(keys):
        if not isinstance(value, dict) or key not in value:
            raise DataError(f"{where}: {'.'.join(keys[: i + 1])!r} is missing; MQuAKE has it there.")
        value = value[key]
    return value


def _composition(cases: Sequence[_Case]) -> Composition | None:
    """What records of the same two relations have in common; None if nothing is left."""
    usable = [case for case in cases if None not in case.hops and case.questions]
    bridges: dict[str, str] = {}
    objects: dict[str, str] = {}
    agree = []
    for case in usable:
        subject, bridge, answer = case.chain.subject, case.chain.bridge, case.chain.object
        if bridges.setdefault(subject, bridge) == bridge and objects.setdefault(bridge, answer) == answer:
            agree.append(case)
    chains, dropped = drop_copies(dict.fromkeys(case.chain for case in agree))
    if not chains:
        return None
    counts = {
        "records": len(cases),
        "words without their subject": len(cases) - len(usable),
        "second bridge or object": len(usable) - len(agree),
        "same chain again": len(agree) - len({case.chain for case in agree}),
        **dropped,
    }
    names = cases[0].names
    first = _relation(names[0], [case.hops[0] for case in agree], [(c.subject, c.bridge) for c in chains])
    second = _relation(names[1], [case.hops[1] for case in agree], [(c.bridge, c.object) for c in chains])
    asked = _commonest([text for case in agree for text in case.questions])
    return Composition(first, second, tuple(Wording("{}", text) for text in asked), tuple(chains), counts)


def _relation(name: str, templates: Sequence[str | None], facts: Sequence[tuple[str, str]]) -> Relation:
    words = _commonest([text for text in templates if text is not None])
    some = tuple(Fact(*pair) for pair in dict.fromkeys(facts))
    return Relation(name, "factual", "subject", "object", False, words, words, some)


def _commonest(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for text, _ in Counter(texts).most_common(_MOST_TEMPLATES))
