"""What tests of notebooks share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kcwb.tasks.relations import load_relation


def few(folder: Path, *names: str, facts: int = 16) -> list[str]:
    """Files of the first facts of some relations, as a reader's own: what is asked of every fact is soon asked."""
    for name in names:
        relation = load_relation(name)
        replace(relation, facts=relation.facts[:facts]).save(folder / f"{name}.json")
    return [f"{name}.json" for name in names]
