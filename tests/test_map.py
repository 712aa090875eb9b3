"""The map of the package and the README name files that exist, and the map names every room."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kcwb"
MAP = (PACKAGE / "README.md").read_text(encoding="utf-8")


def paths() -> list[Path]:
    linked = [PACKAGE / one for one in re.findall(r"\]\(([^)]+)\)", MAP)]
    named = [PACKAGE / one for one in re.findall(r"`([a-z_]+/[a-z_/.]+|[a-z_]+\.py)`", MAP)]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return linked + named + [ROOT / one for one in re.findall(r"`((?:tests|kcwb)/[\w/.]+)`", text)]


@pytest.mark.parametrize("path", sorted(set(paths())), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_map_names_is_there(path):
    assert path.exists()


def test_every_room_and_every_file_at_the_top_is_on_the_map():
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "versions.py"}
    assert rooms | files <= set(re.findall(r"\[`([^`]+)`\]", MAP))


def test_the_map_fits_a_screen():
    assert len(MAP.splitlines()) <= 60


def test_imports_point_down_the_map():
    """A room imports from rooms above it alone; the files at the top import no room but for types."""
    rooms = [name.rstrip("/") for name in re.findall(r"^\| \[`([a-z]+/)`\]", MAP, re.M)]
    for place, room in enumerate(rooms):
        for path in (PACKAGE / room).rglob("*.py"):
            for found in re.findall(r"^(?:from|import) kcwb\.([a-z_]+)", path.read_text(encoding="utf-8"), re.M):
                assert found not in rooms[place + 1 :], f"{path.relative_to(ROOT)} imports {found}"


def test_what_is_left_out_of_the_daily_loop_is_there():
    """A test that was renamed would come back into the loop unseen."""
    for line in (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines():
        path, name = line.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), line


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "benchmarks").glob("test_*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_measures(path):
    """They are run by hand alone, and what they import is renamed meanwhile."""
    importlib.import_module(f"tests.benchmarks.{path.stem}")
