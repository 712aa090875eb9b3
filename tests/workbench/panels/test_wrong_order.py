"""A person who clicks in the wrong order: nothing that was asked for is lost without a word, and the panel goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kcwb.evaluation.play import Play
from kcwb.workbench.panels import bench, edit, nodes, playing, runner, search, sizes
from kcwb.workbench.panels import discovery as panels
from kcwb.workbench.panels.edit import EditPanel
from kcwb.workbench.panels.ensemble import EnsemblePanel
from tests.workbench.panels.test_discovery import SOON, found, model, panel, relation, shown_text  # noqa: F401


@pytest.fixture
def held(monkeypatch) -> Callable[[Any, str], tuple[threading.Event, threading.Event]]:
    """A function that makes another one wait: the events that it has begun, and that it may go on."""

    def hold(where: Any, name: str) -> tuple[threading.Event, threading.Event]:
        begun, go, work = threading.Event(), threading.Event(), getattr(where, name)

        def waiting(*args: Any, progress: Any = None, **more: Any) -> Any:
            begun.set()
            while not go.is_set():
                progress(0, 1, "")  # may be cancelled here
                time.sleep(0.002)
            return work(*args, progress=progress, **more)

        monkeypatch.setattr(where, name, waiting)
        return begun, go

    return hold


def edges_of(one: Any) -> list[str]:
    return [f"{row.sender}->{row.receiver}" for row in one.circuit.edges.itertuples()]


def fails(*args: Any, **more: Any) -> None:
    raise MemoryError


def test_the_slider_does_not_stop_what_tests_other_sizes(found, held):  # noqa: F811
    begun, go = held(sizes, "size_curve")
    found.sizes.button.click()
    assert begun.wait(SOON)
    found.controls.edges.value = 20
    go.set()
    found.wait(SOON)
    assert "<circle" in found.sizes.drawn.value and found.completeness.set_index("run")["edges"]["circuit"].max() <= 20


def test_a_test_is_gone_on_with_where_the_work_that_stopped_it_fails(panel, held, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sizes, "size_curve", fails)
    begun, go = held(panels, "completeness")
    panel.run()
    assert begun.wait(SOON)
    panel.sizes.measure()
    go.set()
    with pytest.raises(MemoryError):
        panel.wait(SOON)
    assert panel.completeness is not None and panel.state == "failed" and "not enough memory" in shown_text(panel)


def test_a_test_that_fails_is_not_tried_again_and_again(panel, monkeypatch):  # noqa: F811
    calls: list[int] = []
    monkeypatch.setattr(panels, "completeness", lambda *args, **more: calls.append(1) or fails())
    panel.run()
    with pytest.raises(MemoryError):
        panel.wait(SOON)
    panel.find_roles()
    panel.wait(SOON)
    assert calls == [1]


def test_what_is_cut_during_other_work_is_answered_after_it(found, model, held):  # noqa: F811
    first, second = edges_of(found)[:2]
    found._graph.set_state({"cut": [first]})
    found.wait(SOON)
    begun, go = held(sizes, "size_curve")
    found.sizes.measure()
    assert begun.wait(SOON)
    found._graph.set_state({"cut": [first, second]})
    go.set()
    found.wait(SOON)
    wanted = Play(model, found.circuit, found.task)
    wanted.cut(first, second)
    assert found._graph.answers == wanted.as_traits()


def test_answers_beside_the_graph_are_there_again_after_roles(found):  # noqa: F811
    found._graph.set_state({"cut": edges_of(found)[:1]})
    found.wait(SOON)
    before = found._graph.answers
    found.find_roles()
    found.wait(SOON)
    assert before and found._graph.answers == before


def test_answers_are_computed_once_for_each_step(found, monkeypatch):  # noqa: F811
    steps: list[Any] = []
    lead = playing.lead
    monkeypatch.setattr(playing, "lead", lambda *args: steps.append(args) or lead(*args))
    for cut in (edges_of(found)[:1], [], edges_of(found)[:2]):
        found._graph.set_state({"cut": cut})
        found.wait(SOON)
    found.find_roles()
    found.wait(SOON)
    assert len(steps) == 4


@pytest.mark.parametrize("other", ["ask", "find_roles"])
def test_a_run_that_other_work_stops_is_said_to_be_stopped(found, held, other):  # noqa: F811
    begun, _ = held(search, "discover")
    found.run()
    assert begun.wait(SOON)
    found.run()  # the same again is no other
    assert "Stopped for this" not in shown_text(found)
    getattr(found, other)()
    found.wait(SOON)
    assert "Stopped for this: run." in shown_text(found) and len(found.history) == 1
    getattr(found, other)()
    found.wait(SOON)
    assert "Stopped for this" not in shown_text(found)


def test_a_cancel_says_that_it_stopped_and_whether_a_run_goes_on(found, held):  # noqa: F811
    begun, go = held(search, "discover")
    for method, told in (("eap", False), ("acdc", True)):
        found.controls.method.value = method
        begun.clear()
        found.run()
        assert begun.wait(SOON)
        found.cancel()
        found.wait(SOON)
        assert "Stopped; what was found before stays." in shown_text(found)
        assert ("goes on from there" in shown_text(found)) == told
    go.set()
    found.run()
    found.wait(SOON)
    assert "Stopped" not in shown_text(found) and len(found.history) == 2


def test_an_ensemble_that_its_test_stops_and_an_edit_that_undo_stops_are_said_to_be(model, relation, held):  # noqa: F811
    with EnsemblePanel(model, relation, edges=30, n=4, draws=2) as ensemble:
        ensemble.run()
        ensemble.wait(SOON)
        begun, _ = held(search, "discover_many")
        ensemble.run()
        assert begun.wait(SOON)
        ensemble.test()
        ensemble.wait(SOON)
        assert "Stopped for this: run." in shown_text(ensemble)
    begun, _ = held(edit, "edit")
    with EditPanel(model, relation, compare=False) as editing:
        editing.run()
        assert begun.wait(SOON)
        editing._undo_button.click()
        editing.wait(SOON)
        assert "Stopped for this: edit." in shown_text(editing) and editing.edit is None


def test_an_ablation_that_another_prompt_stops_is_said_to_be(found, held):  # noqa: F811
    node = found.nodes
    node.select("m0")
    node.wait(SOON)
    begun, _ = held(nodes, "ablate_nodes")
    node.ablate()
    assert begun.wait(SOON)
    node._prompt.value = 3
    node.wait(SOON)
    assert "Stopped for this: ablate it." in shown_text(node) and node.ablated is None and node.tokens is not None


def test_undo_before_any_edit_says_that_there_is_none(model, relation):  # noqa: F811
    with EditPanel(model, relation, compare=False) as editing:
        editing._undo_button.click()
        assert "There is no edit to undo" in shown_text(editing)


def test_a_judgement_of_a_size_that_was_left_is_said_to_be_none(found, held):  # noqa: F811
    begun, go = held(bench, "referee")
    found.bench.judge()
    assert begun.wait(SOON)
    found.controls.edges.value = 20
    go.set()
    found.wait(SOON)
    assert found.bench.judgement is None and "cut to another size" in shown_text(found)
    assert found.completeness is not None


def test_what_follows_a_failure_leaves_it_told() -> None:
    done: list[str] = []
    states: list[str] = []

    def follow() -> None:
        states.append(one.state)
        if one.state == "failed" and not done:
            one.submit("follows", lambda progress: "good", done.append)

    one = runner.Runner(on_change=follow)
    one.submit("bad", fails)
    assert one.wait(SOON) and done == ["good"]
    assert one.state == "failed" and isinstance(one.error, MemoryError)
    one.submit("another", lambda progress: "good", done.append)
    assert one.wait(SOON) and one.state == "done" and one.error is None
