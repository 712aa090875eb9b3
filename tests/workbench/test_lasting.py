"""The plain drawing below a widget: once for each place where it is shown, and never in the widget's way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.models.graph import Graph
from kcwb.workbench import lasting
from kcwb.workbench.graph.widget import CircuitGraph

HOSTILE = "</style><script>window.hacked = 1</script>"


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A notebook: `cell` is being run for the `run`-th time; `shown` by display ids, which of them were `renewed`."""
    screen = SimpleNamespace(cell="a", run=1, shown=[], renewed=[])

    def display(bundle: dict[str, Any], *, raw: bool, display_id: bool = False) -> Any:
        screen.shown.append(bundle)
        return SimpleNamespace(display_id=str(len(screen.shown) - 1))

    def update(bundle: dict[str, Any], *, display_id: str, raw: bool) -> None:
        screen.renewed.append(int(display_id))
        screen.shown[int(display_id)] = bundle

    def parent() -> dict[str, Any]:
        return {"header": {"msg_id": f"{screen.cell} {screen.run}"}, "metadata": {"cellId": screen.cell}}

    monkeypatch.setattr(lasting, "display", display)
    monkeypatch.setattr(lasting, "update_display", update)
    monkeypatch.setattr(lasting, "get_ipython", lambda: SimpleNamespace(kernel=SimpleNamespace(get_parent=parent)))
    return screen


@pytest.fixture
def graph() -> CircuitGraph:
    return CircuitGraph(Circuit.from_edges(Graph(2, 2), {"input->m0": 1.0, "m0->logits": 0.5}))


def test_a_cell_that_is_run_again_holds_what_it_shows_once(graph, screen):
    graph._ipython_display_()
    for screen.run in range(2, 6):
        graph._ipython_display_()
    graph._ipython_display_()  # twice in this run
    screen.cell = "b"
    graph._ipython_display_()
    graph.names = {"m0": "first"}
    assert screen.renewed == [9, 11, 13] and len(screen.shown) == 14


def test_where_pages_name_no_cells_all_places_are_kept(graph, screen, monkeypatch):
    monkeypatch.setattr(lasting, "get_ipython", lambda: None)
    graph._ipython_display_()
    graph._ipython_display_()
    graph.names = {"m0": "first"}
    assert screen.renewed == [1, 3]


def test_a_graph_lives_on_without_its_drawing(graph, screen, monkeypatch):
    def broken() -> Any:
        raise ValueError(HOSTILE)

    graph._ipython_display_()
    with monkeypatch.context() as broke:
        broke.setattr(graph, "as_view", broken)
        graph.cut = ["m0->logits"]
        graph._ipython_display_()
    assert graph.cut == ["m0->logits"] and lasting.VIEW in screen.shown[2]
    for place in (1, 3):
        told = screen.shown[place]["text/html"]
        assert "cannot be drawn. ValueError: &lt;/style&gt;" in told and "<script" not in told
    graph.cut = []
    assert screen.renewed == [1, 1, 3] and "<iframe" in screen.shown[1]["text/html"]


def test_a_closed_graph_stays_as_it_was_and_can_be_shown_again(graph, screen):
    graph._ipython_display_()
    graph.close()
    graph.names = {"m0": "first"}
    assert not screen.renewed
    graph._ipython_display_()
    (again,) = screen.shown[2:]
    assert lasting.VIEW not in again and "<iframe" in again["text/html"]


def test_a_widget_may_be_shown_while_its_drawings_are_renewed(graph, screen, monkeypatch):
    graph._ipython_display_()
    monkeypatch.setattr(lasting, "update_display", lambda *args, **more: graph._ipython_display_())
    graph.names = {"m0": "first"}
    assert len(graph._places) == 2
