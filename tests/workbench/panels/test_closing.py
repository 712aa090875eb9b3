"""A panel that is closed, or that nobody holds any more, is gone: with its widgets, its thread and its work."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ipywidgets.widgets import widget as registry

import kcwb
from kcwb.editing.edit import edit
from kcwb.errors import CircuitError, KcwbError, SettingError
from kcwb.tasks.task import make_task
from kcwb.workbench import lasting
from kcwb.workbench.graph.widget import CircuitGraph
from kcwb.workbench.panels import search
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.discovery import DiscoveryPanel
from kcwb.workbench.panels.edit import EditPanel
from kcwb.workbench.panels.ensemble import EnsemblePanel
from kcwb.workbench.panels.hallucination import HallucinationPanel
from kcwb.workbench.panels.in_context import ContextPanel
from kcwb.workbench.panels.nodes import NodePanel
from kcwb.workbench.panels.two_hop import HopPanel
from tests.editing.conftest import same_bits, weights
from tests.tasks import known_relation
from tests.tiny import tiny_model
from tests.workbench.ensembles import KEPT, TWINS, ensemble_of

SOON = 60.0
QUICK = {"rome": {"steps": 2, "prefixes": 2, "covariance": "identity", "bound": 99.0}}
NAMES = ("discovery", "ensemble", "node", "edit", "context", "hallucination", "hop")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def relation(model):
    return known_relation(model, 16, unknown=6)


@pytest.fixture(scope="module", autouse=True)
def _freeze(model, relation):
    """What was there before is no garbage; to look through it, five times a test, would take most of the time."""
    make_task(model, relation, n=4)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make(model, relation) -> dict[str, Callable[[], Panel]]:
    """One of every class; those that are quick in the state in which they hold most."""

    def discovery() -> Panel:
        panel = DiscoveryPanel(model, relation, edges=60, n=4, draws=2)
        panel.run()
        panel.wait(SOON)
        panel.nodes.select("a0.h1")
        panel.wait(SOON)
        return panel

    def ensemble() -> Panel:
        made = ensemble_of(KEPT, TWINS, model.graph)
        panel = EnsemblePanel(model, relation, edges=60, ensemble=made)
        panel.select("input->m1")
        panel.wait(SOON)
        return panel

    def node() -> Panel:
        task = make_task(model, relation, n=4, progress=False)
        panel = NodePanel(model, kcwb.discover(model, task, edges=40, progress=False), task, node="a1.h0")
        panel.wait(SOON)
        return panel

    def editing() -> Panel:
        panel = EditPanel(model, relation, layer=0, target="w61", compare=False, settings=QUICK)
        panel.run()
        panel.wait(SOON)
        assert panel.edit is not None
        return panel

    return {
        "discovery": discovery,
        "ensemble": ensemble,
        "node": node,
        "edit": editing,
        "context": lambda: ContextPanel(model, relation, k=2, edges=40),
        "hallucination": lambda: HallucinationPanel(model, relation, movers=4),
        "hop": lambda: HopPanel(model),
    }


def alive() -> int:
    """How many widgets ipywidgets keeps."""
    gc.collect()
    return len(registry._instances)


def workers() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("kcwb")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_a_panel_that_is_closed_or_dropped_is_gone_with_its_widgets(make, model, name: str, how: str) -> None:
    before, clean = alive(), weights(model)
    made = make[name]()
    known = [weakref.ref(one) for one in (made, made._runner, *made._owned)]
    left = getattr(made, "edit", None)
    assert alive() > before + 30
    if how == "close":
        made.close()
        made.close()  # once more does nothing
        assert made.closed and alive() == before  # at once
    elif how == "with":
        with made as same:
            assert same is made
        del same
    if how != "drop":
        assert same_bits(model, clean)
    elif left is not None:
        left.undo()
    del made, left
    assert alive() == before and workers() == []
    gc.collect()  # what the first collection let go
    assert [ref() for ref in known if ref() is not None] == []


def test_of_many_dropped_panels_none_is_left(model, relation) -> None:
    before = alive()
    known = [weakref.ref(DiscoveryPanel(model, relation, edges=60)) for _ in range(33)]
    assert alive() == before and not any(ref() for ref in known)


@pytest.mark.parametrize(
    "refused",
    [
        lambda model, relation: DiscoveryPanel(model, relation, template=99),
        lambda model, relation: DiscoveryPanel(model, relation, method="acd"),
        lambda model, relation: EnsemblePanel(model, relation, edges=60, vary=["fact"]),
        lambda model, relation: EnsemblePanel(model, relation, edges=60, ensemble=ensemble_of(KEPT, TWINS)),
        lambda model, relation: EditPanel(model, relation, subject="nobody"),
        lambda model, relation: EditPanel(model, relation, template=99),
        lambda model, relation: EditPanel(model, relation, layer=99),
        lambda model, relation: HallucinationPanel(model, relation, subject="nobody", movers=4),
        lambda model, relation: ContextPanel(model, relation, kind="shot", edges=40),
        lambda model, relation: HopPanel(model, k=3),
        lambda model, relation: NodePanel(model, node="a99.h0"),
        lambda model, relation: NodePanel(model, kcwb.Circuit.empty(kcwb.Graph(7, 3))),
    ],
)
def test_a_panel_whose_settings_are_refused_leaves_no_widgets(model, relation, refused) -> None:
    before = alive()
    with pytest.raises((SettingError, CircuitError)):
        refused(model, relation)
    assert alive() == before


def test_closing_cancels_what_runs_and_ends_its_thread(model, relation, monkeypatch) -> None:
    started, ended = threading.Event(), threading.Event()

    def endless(*_: Any, progress: Any, **__: Any) -> None:
        try:
            started.set()
            while True:
                progress(0, 1, "")
        finally:
            ended.set()

    monkeypatch.setattr(search, "discover", endless)
    panel = DiscoveryPanel(model, relation, edges=60, n=4)
    panel.run()
    assert started.wait(SOON) and workers() == ["kcwb-runner"]
    panel.close()
    assert ended.is_set() and workers() == [] and panel.state == "idle" and panel.circuit is None


def test_a_dropped_panel_finishes_what_it_runs_and_goes_then(model, relation, monkeypatch) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> None:
        started.set()
        assert go.wait(SOON)
        raise SettingError("enough")

    monkeypatch.setattr(search, "discover", slow)
    before = alive()
    panel = DiscoveryPanel(model, relation, edges=60, n=4)
    panel.run()
    assert started.wait(SOON)
    known = weakref.ref(panel)
    (worker,) = (one for one in threading.enumerate() if one.name == "kcwb-runner")
    del panel
    gc.collect()
    assert known() is not None
    go.set()
    worker.join(SOON)
    del worker
    assert alive() == before and known() is None


def test_a_closed_panel_keeps_its_results_and_is_drawn_plainly(make) -> None:
    panel = make["discovery"]()
    circuit, drawn = panel.circuit, panel.to_html()
    panel.close()
    assert panel.circuit is circuit and panel.completeness is not None and panel.nodes.closed
    bundle = panel._repr_mimebundle_()
    assert panel.to_html() == drawn == bundle["text/html"] and not any("widget" in kind for kind in bundle)
    for again in (panel.run, panel.ask, panel.find_roles, lambda: panel.nodes.select("a1.h0")):
        with pytest.raises(SettingError, match="This panel is closed"):
            again()


def test_closing_takes_the_edit_out_and_hides_no_exception(make, model) -> None:
    before = weights(model)
    with pytest.raises(ZeroDivisionError), make["edit"]() as panel:
        assert not same_bits(model, before)
        raise ZeroDivisionError
    assert panel.edit is None and same_bits(model, before)
    panel = make["edit"]()
    fact, more = panel.edit.facts[0], QUICK["rome"]
    upper = edit(model, fact, "w62", template=panel.settings["template"], layer=0, progress=False, **more)
    upper.apply()
    with pytest.raises(ZeroDivisionError) as error, panel:
        raise ZeroDivisionError
    assert error.value.__notes__ and not panel.closed
    with pytest.raises(KcwbError):
        panel.close()
    upper.undo()
    panel.close()
    assert same_bits(model, before)


# --- on screen ---


@pytest.fixture
def screen(monkeypatch) -> SimpleNamespace:
    """A notebook's kernel: `cell` is being run for the `run`-th time; `shown` is what stands on screen, by its id."""
    screen = SimpleNamespace(cell="a", run=1, shown={})

    def display(bundle: dict[str, Any], *, raw: bool, display_id: bool = False) -> Any:
        name = f"display {len(screen.shown)}"
        screen.shown[name] = bundle
        return SimpleNamespace(display_id=name)

    def update(bundle: dict[str, Any], *, display_id: str, raw: bool) -> None:
        screen.shown[display_id] = bundle

    def parent() -> dict[str, Any]:
        metadata = {} if screen.cell is None else {"cellId": screen.cell}
        return {"header": {"msg_id": f"{screen.cell} {screen.run}"}, "metadata": metadata}

    monkeypatch.setattr(lasting, "display", display)
    monkeypatch.setattr(lasting, "update_display", update)
    kernel = SimpleNamespace(get_parent=parent)
    monkeypatch.setattr(lasting, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    return screen


def test_a_panel_on_screen_stays_until_its_cell_is_run_again(model, relation, screen) -> None:
    def show() -> weakref.ref[Panel]:
        panel = HallucinationPanel(model, relation, movers=4)
        panel._ipython_display_()
        return weakref.ref(panel)

    before = alive()
    first, second = show(), show()  # two in one cell, and nobody else holds them
    each = (alive() - before) // 2
    assert first() is not None and second() is not None
    screen.cell = "b"
    other = show()
    screen.cell, screen.run = "a", 2
    third = show()
    assert alive() == before + 2 * each
    assert (first(), second()) == (None, None) and other() is not None and third() is not None
    for one in (other, third):
        one().close()
    assert alive() == before


def test_a_panel_that_is_shown_again_or_elsewhere_stays(model, relation, screen) -> None:
    panel = HallucinationPanel(model, relation, movers=4)
    known = weakref.ref(panel)
    for screen.cell, screen.run in (("a", 1), ("a", 2), ("b", 1)):
        panel._ipython_display_()
    del panel
    screen.run = 2
    with HallucinationPanel(model, relation, movers=4) as another:  # in cell b
        another._ipython_display_()
        alive()
        assert known() is not None  # in cell a
    known().close()
    assert alive() >= 0 and known() is None


def test_whoever_takes_the_widget_keeps_the_panel_until_it_is_closed(model, relation) -> None:
    before = alive()
    panel = HallucinationPanel(model, relation, movers=4)
    known, _ = weakref.ref(panel), panel.widget
    del panel
    assert alive() > before and known() is not None
    known().close()
    assert alive() == before and known() is None


def test_a_closed_panel_leaves_its_plain_drawing_on_screen(make, screen) -> None:
    panel = make["discovery"]()
    panel._ipython_display_()
    widget, plain = screen.shown.values()
    assert "application/vnd.jupyter.widget-view+json" in widget and not widget["text/html"]
    panel.find_roles()
    panel.wait(SOON)
    panel.close()
    shown, renewed = screen.shown.values()
    assert shown == widget and plain != renewed and panel.to_html() in renewed["text/html"]
    assert "application/vnd.jupyter.widget-view+json" not in renewed


def test_a_panel_lives_on_without_its_drawing(model, relation, screen, monkeypatch) -> None:
    def broken() -> str:
        raise ValueError("<script>")

    panel = DiscoveryPanel(model, relation, edges=60, n=4, draws=2)
    monkeypatch.setattr(panel, "to_html", broken)
    panel._ipython_display_()
    panel.run()
    panel.wait(SOON)
    assert panel.completeness is not None and panel.error is None
    panel.close()
    assert panel.closed
    _, told = screen.shown.values()
    assert "cannot be drawn. ValueError: &lt;script&gt;" in told["text/html"]


@pytest.mark.parametrize("name", ["discovery", "node", "ensemble"])
def test_what_a_person_does_to_a_panels_graph_is_drawn(make, screen, name) -> None:
    panel = make[name]()
    panel._ipython_display_()
    (graph,) = (one for one in panel._owned if isinstance(one, CircuitGraph) and one.circuit is not None)
    for doing in ({"names": {"m0": "the first"}}, {"notes": {"m0": "<b>"}}, {"pinned": ["m0"]}):
        _, before = screen.shown.values()
        graph.set_state(doing)
        panel._runner.wait(SOON)
        _, after = screen.shown.values()
        assert before != after and graph._repr_html_() in after["text/html"]
    panel.close()
