"""Two panels on one model: one waits for the other and says so; what a panel shows is of one state of the weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import kcwb
from kcwb.discovery.discover import discover
from kcwb.errors import KcwbError, SettingError
from kcwb.tasks.task import make_task
from kcwb.workbench.panels import discovery as panels
from kcwb.workbench.panels import edit as editpanel
from kcwb.workbench.panels import search
from kcwb.workbench.panels.discovery import DiscoveryPanel
from kcwb.workbench.panels.edit import EditPanel
from kcwb.workbench.panels.runner import Runner
from tests.editing.conftest import same_bits, weights
from tests.tasks import known_relation
from tests.tiny import tiny_model

SOON = 60.0
QUICK = {"rome": {"steps": 2, "prefixes": 2, "covariance": "identity", "bound": 99.0}}
WAITS = "Waiting for another run on this model"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny_model(request.param, seed=3)


@pytest.fixture(scope="module")
def relation(model):
    return replace(known_relation(model, 16), prompt_templates_zs=("w1 {} w2", "w3 {} w4"))


@pytest.fixture
def editing(model, relation) -> Iterator[EditPanel]:
    with EditPanel(model, relation, layer=0, target="w61", compare=False, settings=QUICK) as panel:
        yield panel


@pytest.fixture
def discovery(model, relation) -> Iterator[DiscoveryPanel]:
    with DiscoveryPanel(model, relation, edges=40, n=4, draws=2) as panel:
        yield panel


@pytest.fixture
def gate(monkeypatch) -> SimpleNamespace:
    """A discovery that stops when it is half done, until `go` is set."""
    gate = SimpleNamespace(reached=threading.Event(), go=threading.Event())

    def half(*args: Any, **more: Any) -> Any:
        gate.reached.set()
        assert gate.go.wait(SOON)
        return discover(*args, **more)

    monkeypatch.setattr(search, "discover", half)
    return gate


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_edit_during_a_discovery_waits_for_its_whole_chain(discovery, editing, model, relation, gate, monkeypatch):
    before, name = model.digest, model.name
    task = make_task(model, relation, n=4, progress=False)
    circuit = discover(model, task, edges=40, progress=False)
    alone = kcwb.completeness(model, circuit, task, draws=2, progress=False)
    states: list[str] = []

    def seen(model: Any, *args: Any, **more: Any) -> pd.DataFrame:
        time.sleep(0.3)  # whoever waits for the model would take it in between
        states.append(model.digest)
        return kcwb.completeness(model, *args, **more)

    monkeypatch.setattr(panels, "completeness", seen)
    discovery.run()
    assert gate.reached.wait(SOON)
    editing.run()
    until(lambda: WAITS in editing._status.value)
    assert model.digest == before and editing.state == "running" and not editing._cancel_button.disabled
    gate.go.set()
    discovery.wait(SOON)
    editing.wait(SOON)
    assert discovery.circuit.digest == circuit.digest and states == [before]
    assert discovery.circuit.provenance["model"] == circuit.provenance["model"]
    assert (discovery.circuit.provenance["model"]["digest"], discovery.circuit.provenance["model"]["name"]) == (
        before,
        name,
    )
    pd.testing.assert_frame_equal(discovery.completeness, alone)
    assert editing.edit is not None and model.digest != before


def test_a_discovery_during_an_edit_finds_the_edited_model(discovery, editing, model, relation, monkeypatch):
    reached, go, made = threading.Event(), threading.Event(), editpanel.edit

    def half(*args: Any, **more: Any) -> Any:
        reached.set()
        assert go.wait(SOON)
        return made(*args, **more)

    monkeypatch.setattr(editpanel, "edit", half)
    editing.run()
    assert reached.wait(SOON)
    discovery.run()
    until(lambda: WAITS in discovery._status.value)
    go.set()
    editing.wait(SOON)
    discovery.wait(SOON)
    assert discovery.circuit.provenance["model"]["digest"] == model.digest
    expected = discover(model, make_task(model, relation, n=4, progress=False), edges=40, progress=False)
    assert discovery.circuit.digest == expected.digest
    edited = discovery.task
    editing.undo()
    discovery.run()  # with the same settings: the facts are asked for again
    discovery.wait(SOON)
    assert discovery.task is not edited and discovery.circuit.provenance["model"]["digest"] == model.digest


def test_a_cancel_is_heard_while_a_panel_waits(discovery, editing, model, gate):
    before = weights(model)
    discovery.run()
    assert gate.reached.wait(SOON)
    editing.run()
    until(lambda: WAITS in editing._status.value)
    editing._cancel_button.click()
    editing.wait(5)
    assert editing.state == "idle" and editing.edit is None and discovery.state == "running"
    gate.go.set()
    discovery.wait(SOON)
    assert discovery.circuit is not None and same_bits(model, before)


def test_the_latest_request_is_the_one_that_waits(discovery, editing, model, gate):
    discovery.run()
    assert gate.reached.wait(SOON)
    for target in ("w62", "w63"):
        editing._target.value = target
        editing.run()
        until(lambda: WAITS in editing._status.value)
    gate.go.set()
    editing.wait(SOON)
    assert editing.edit.targets == ("w63",) and len(model.edits) == 1


def test_closing_a_panel_that_waits_does_not_wait_for_the_other(discovery, editing, gate):
    discovery.run()
    assert gate.reached.wait(SOON)
    editing.run()
    until(lambda: WAITS in editing._status.value)
    closing = threading.Thread(target=editing._runner.close, daemon=True)
    closing.start()
    closing.join(5)
    assert not closing.is_alive() and discovery.state == "running"
    gate.go.set()


def test_undo_is_waited_for_without_blocking_the_notebook(discovery, editing, model, gate):
    before = weights(model)
    editing.run()
    editing.wait(SOON)
    edited = model.digest
    discovery.run()
    assert gate.reached.wait(SOON)
    clock = time.monotonic()
    editing._undo_button.click()
    assert time.monotonic() - clock < 5 and model.digest == edited and editing.edit is not None
    until(lambda: WAITS in editing._status.value)
    gate.go.set()
    discovery.wait(SOON)
    editing.wait(SOON)
    assert editing.edit is None and same_bits(model, before)
    assert discovery.circuit.provenance["model"]["digest"] == edited


def test_a_click_elsewhere_during_a_wait_is_answered(discovery, editing, gate):
    discovery.run()
    assert gate.reached.wait(SOON)
    editing.run()
    until(lambda: WAITS in editing._status.value)
    discovery._save_button.click()
    assert "There is no circuit to save yet" in discovery._message.value
    gate.go.set()
    editing.wait(SOON)


# --- the edit that stands ---


@contextmanager
def standing(panel: EditPanel, model: Any) -> Iterator[None]:
    """An edit that must be there afterwards as it was before, to the bit."""
    panel.run()
    panel.wait(SOON)
    edit, digest, bits = panel.edit, model.digest, weights(model)
    yield
    assert panel.edit is edit and edit.active and model.digest == digest and same_bits(model, bits)
    assert "In the weights now." in panel._summary.value


@pytest.mark.parametrize("target", ["", " ", " w62", "the fact's own"])
def test_an_edit_that_is_refused_leaves_the_standing_one(editing, model, target):
    with standing(editing, model):
        editing._target.value = editing.picker.chosen_fact.object if target == "the fact's own" else target
        editing._run_button.click()
        with pytest.raises(SettingError):
            editing.wait(SOON)
        assert "kc-error" in editing._message.value


@pytest.mark.parametrize("error", [KcwbError("no"), RuntimeError("no"), MemoryError()])
def test_an_edit_that_fails_leaves_the_standing_one(editing, model, error, monkeypatch):
    with standing(editing, model):
        monkeypatch.setattr(editpanel, "_said", lambda *_: (_ for _ in ()).throw(error))
        editing._target.value = "w62"
        editing.run()
        with pytest.raises(type(error)):
            editing.wait(SOON)


def test_an_edit_that_is_cancelled_leaves_the_standing_one(editing, model, monkeypatch):
    started = threading.Event()

    def endless(*_: Any, progress: Any, **__: Any) -> None:
        started.set()
        while True:
            progress(0, 1, "")

    with standing(editing, model):
        monkeypatch.setattr(editpanel, "edit", endless)
        editing._target.value = "w62"
        editing.run()
        assert started.wait(SOON)
        editing.cancel()
        editing.wait(SOON)


def test_a_new_edit_takes_the_place_of_the_standing_one(editing, model):
    before = weights(model)
    for target in ("w61", "w62"):
        editing._target.value = target
        editing.run()
        editing.wait(SOON)
        assert editing.edit.targets == (target,) and len(model.edits) == 1
    editing.undo()
    assert same_bits(model, before)


# --- the runner ---


def test_a_chain_of_requests_holds_without_a_gap_and_lets_go_at_its_end() -> None:
    told: list[str] = []

    @contextmanager
    def hold(progress: Any) -> Iterator[None]:
        told.append("taken")
        yield
        told.append("let go")

    runner = Runner(hold=hold)
    again = lambda _: runner.submit("second", lambda progress: told.append("second"))  # noqa: E731
    runner.submit("first", lambda progress: told.append("first"), again)
    assert runner.wait(SOON)
    runner.submit("third", lambda progress: told.append("third"))
    assert runner.wait(SOON)
    assert told == ["taken", "first", "second", "let go", "taken", "third", "let go"]


def test_a_hold_that_fails_fails_the_request_and_nothing_is_held() -> None:
    def hold(progress: Any) -> Any:
        raise OSError("no")

    runner = Runner(hold=hold)
    runner.submit("first", lambda progress: None)
    assert runner.wait(SOON) and runner.state == "failed" and isinstance(runner.error, OSError)
