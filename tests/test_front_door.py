"""`import kcwb` and its rooms: what is public, where it is found, and what the package needs for it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest

import kcwb

ROOT = Path(__file__).parents[1]
STUBS = sorted((ROOT / "kcwb").rglob("__init__.pyi"))
#: Needed, though the package imports neither: the workbench is opened in one, transformers reads GGUF by the other.
NOT_IMPORTED = {"jupyterlab", "gguf"}
#: What a public name was called in version 0.1 at the top, and which room it is in now.
MOVED = {"new_heads": "studies.in_context", "hit_at_k": "tasks", "make_world": "world", "load_mib": "circuits"}


def room_of(stub: Path) -> ModuleType:
    return importlib.import_module(".".join(stub.relative_to(ROOT).parent.parts))


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_each_public_name_is_there(stub):
    room = room_of(stub)
    assert room.__all__
    for name in room.__all__:
        assert getattr(room, name) is not None


@pytest.mark.parametrize("stub", STUBS[1:], ids=lambda stub: stub.parent.name)
def test_no_public_function_is_hidden_by_a_file_of_its_name(stub):
    """Python sets `room.lens` to the file lens.py once that is imported, whatever it was before."""
    files = {path.stem for path in stub.parent.iterdir()}
    functions = [name for name in room_of(stub).__all__ if not inspect.ismodule(getattr(room_of(stub), name))]
    assert files.isdisjoint(functions)


def test_some_fifty_names_are_at_the_top():
    assert 40 <= sum(not inspect.ismodule(getattr(kcwb, name)) for name in kcwb.__all__) <= 60


def test_the_front_door_is_light():
    """A notebook's first cell, a shell's completion and `kcwb --help` must not wait for torch."""
    code = "import sys, kcwb; dir(kcwb); print({'torch', 'pandas', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize(("name", "room"), MOVED.items())
def test_a_name_that_moved_is_found_with_a_warning_that_says_where(name, room):
    with pytest.warns(DeprecationWarning, match=rf"^kcwb\.{name} is kcwb\.{room}\.{name} now\.$"):
        found = getattr(kcwb, name)
    assert found is getattr(importlib.import_module(f"kcwb.{room}"), name)


def test_a_name_that_never_was_is_no_attribute():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(kcwb, "no_such_name") and not hasattr(kcwb, "_private")


def test_notebooks_come_in_by_the_front_door():
    rooms = {".".join(stub.relative_to(ROOT).parent.parts) for stub in STUBS}
    imported, named = set(), set()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(line for line in cell["source"] if not line.lstrip().startswith(("%", "!")))
                for node in ast.walk(ast.parse(source)):
                    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kcwb"):
                        imported.add(node.module)
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kcwb":
                        named.add(node.attr)
    assert imported and imported <= rooms
    assert named and named <= set(kcwb.__all__)  # not where they once were


def test_what_is_imported_is_declared_and_the_reverse():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    declared = {normal(one.split(">")[0]) for one in stated}
    found = set()
    for path in (ROOT / "kcwb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {one.name.split(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
    homes = packages_distributions()
    optional = {"distributed"}  # of the extra named cluster
    needed = found - set(sys.stdlib_module_names) - {"kcwb"} - optional
    assert {normal(name) for one in needed for name in homes[one][:1]} == declared - NOT_IMPORTED
    assert declared >= NOT_IMPORTED


def normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")
