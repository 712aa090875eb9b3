"""Shared by all tests: tiny models made once, and one loaded copy of the built-in model.

`make test` runs two or more processes side by side (pytest-xdist): all tests that need the built-in model in one of
them, so that it is loaded once; others by file; a notebook's tests together, since they look at one run of it.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they and what they start share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kcwb.models.loading import Model, load_model
from kcwb.models.network import Network
from kcwb.tasks.relations import Relation
from tests.tiny import ARCHITECTURES, tiny_model, word_relation

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

_TINY: dict[str, Model] = {}
#: Functions whose cases take more than 0.15 s each; `pytest --note-slow` writes it anew.
SLOW = Path(__file__).parent / "slow.txt"
_DAILY = {"llama", "gpt2"}  # the architectures of the daily loop, one of each kind of norm, position and block
_SECONDS: dict[str, list[float]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--note-slow", action="store_true", help=f"note in {SLOW.name} which tests take long")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests belong into one process and which are slow; side by side, start with what takes longest."""
    if workers:
        long = ("model", "browser")
        items.sort(key=lambda item: not (any(map(item.get_closest_marker, long)) or item.path.stem == "test_notebooks"))
    slow, others = set(SLOW.read_text(encoding="utf-8").split()), set(ARCHITECTURES) - _DAILY
    for item in items:
        group, function = item.nodeid.split("::")[0], item.nodeid.split("[")[0]
        if item.path.stem == "test_notebooks":
            group = f"notebook {item.name.split('_')[1]}"
        elif item.get_closest_marker("model"):
            group = "model"
        item.add_marker(pytest.mark.xdist_group(group))
        values = getattr(item, "callspec", None)
        if function in slow or (values and not others.isdisjoint(v for v in values.params.values() if type(v) is str)):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Look for garbage among what tests make, and not each time among all that is imported and collected."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note the processor's seconds, a test's processes' too, which do not depend on what else the machine does."""
    started = sum(os.times()[:4])
    result = yield
    _SECONDS.setdefault(item.nodeid.split("[")[0], []).append(sum(os.times()[:4]) - started)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("note_slow"):
        slow = sorted(name for name, seconds in _SECONDS.items() if sum(seconds) / len(seconds) > 0.15)
        SLOW.write_text("\n".join(slow) + "\n", encoding="utf-8")


@pytest.fixture
def tiny():
    """tiny("llama"): a tiny random model of an architecture, the same object all through the session."""

    def get(name: str) -> Model:
        if name not in _TINY:
            _TINY[name] = tiny_model(name)
        return _TINY[name]

    return get


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The built-in model, loaded once."""
    return load_model()


@pytest.fixture
def words() -> Relation:
    """A relation over the tiny tokenizer's words, with subjects and objects of one and two tokens."""
    return word_relation()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_as_it_was() -> Iterator[None]:
    """A method that is patched on a network, not on its class, is left on it, and its copies call the original's."""
    yield
    for name, model in _TINY.items():
        left = [one for one in vars(model.network) if callable(getattr(Network, one, None))]
        assert not left, f"This test has left {left} on the tiny {name}'s network: patch the class."
