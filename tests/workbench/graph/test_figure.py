"""A saved picture: the same boxes and lines, in the same places, as the page shows; files of three kinds."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.patches import PathPatch

from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph
from kcwb.workbench.graph.drawing import Look, draw
from kcwb.workbench.graph.figure import figure_of
from kcwb.workbench.graph.seen import lit, seen_of
from kcwb.workbench.graph.state import CHECKS
from kcwb.workbench.graph.widget import CircuitGraph
from tests.hostile import HOSTILE
from tests.workbench.ensembles import ensemble_of
from tests.workbench.graph.test_instrument import EDGES, GRAPH, SCORES
from tests.workbench.pages import asked, make_circuit, ready

NAMES = [text for text in HOSTILE if "\0" not in text and 0 < len(text) <= 120]
WINDOW = ("width", "height", "scale", "left", "top", "stretch")
GROUPS = {"early": ["a0.h0", "a0.h1", "m0"], "late": ["m1", "a1.h2"]}
STATES = [
    {},
    {"selected": ["m0"], "pinned": ["m1", "input"]},
    {"cut": EDGES[2:5], "forced": ["a2.h1->logits", "m0->a2.h1<q>"], "selected_edges": [EDGES[0]]},
    {"groups": GROUPS, "names": {"m1": "x"}, "cut": EDGES[4:6]},
    {"groups": GROUPS, "threshold": 0.15, "selected": ["a0.h0", "a0.h1", "m0"]},
    {"paths": [["input", "a0.h0", "m0", "m1", "logits"]], "cut": [EDGES[5]]},
]  # fmt: skip


def state_of(graph: CircuitGraph) -> dict[str, Any]:
    return {name: getattr(graph, name) for name in CHECKS}


@pytest.fixture
def graph() -> CircuitGraph:
    return CircuitGraph(Circuit.from_edges(GRAPH, SCORES), title="T", height=500)


@pytest.mark.browser
def test_what_is_drawn_is_what_the_page_shows(graph: CircuitGraph, show: Any) -> None:
    graph.show(Circuit.from_edges(GRAPH, SCORES), roles={"a1.h2": "mover", "a0.h0": "relation"})
    drawing, marked = graph._drawing, set[str]()
    assert drawing is not None
    for state in STATES:
        for name, value in state.items():
            setattr(graph, name, value)
        page, now = ready(show(graph.as_view().page)), state_of(graph)
        view = {name: asked(page, "graph.painter[arg]", name) for name in WINDOW}
        boxes, links = seen_of(drawing, now, view)
        assert Counter(box.label for box in boxes) == Counter(asked(page, "graph.boxes()"))
        told = {one["name"]: one for one in asked(page, "graph.links()")}
        assert len(links) == len(told)
        for link in links:
            (one,) = (told[name] for name in link.names if name in told)
            assert (one["edges"], one["gone"], one["tone"]) == (len(link.names), link.gone, link.tone)
            assert one["forced"] == link.forced
        page.mouse.move(1, 1)
        bright, front = asked(page, "graph.lit()"), lit(boxes, links, now)
        assert (bright is None) == (front is None)
        if front is not None:
            assert Counter(box.label for box in front[0]) == Counter(bright["boxes"])
            assert len(front[1]) == len(bright["links"])
        texts = {one.get_text(): one.get_position() for one in figure_of(drawing, now, view, 500).axes[0].texts}
        for box in boxes:
            place = asked(page, "graph.place(arg)", box.names[0])
            if place["labelled"] and box.label in texts:
                assert texts[box.label] == pytest.approx((place["x"], place["y"]), abs=0.01)
        marks = set(asked(page, "graph.painter.boxes.filter((box) => box.marked).map((box) => box.mark)"))
        assert {"mover", "relation"} & texts.keys() == marks
        marked |= marks
        for name in state:
            setattr(graph, name, type(getattr(graph, name))())
    assert marked == {"mover", "relation"}


def test_a_large_circuit_is_drawn_by_layers() -> None:
    drawing = draw(make_circuit(2500, n_layers=12, n_heads=12), Look(None, 20_000, None, None))
    state = state_of(CircuitGraph())
    boxes, links = seen_of(drawing, state, {})
    assert len(boxes) == 14 and sum(len(link.names) for link in links) > 2000
    opened, _ = seen_of(drawing, state, {"open": ["L3"]})
    assert len(opened) == 13 + 13
    every, edges = seen_of(drawing, state, {"layered": False})
    assert len(edges) == 2500 and all(box.group is None for box in every)
    few, none = seen_of(drawing, state, {"layered": False, "hidden": ["head"]})
    assert {box.kind for box in few} == {"input", "mlp", "logits"} and len(none) < 2500
    alone, _ = seen_of(drawing, state | {"pinned": ["m3", "m4"]}, {"layered": False, "pinned_only": True})
    assert [box.label for box in alone] == ["m3", "m4"]


@pytest.mark.browser
def test_layers_are_drawn_where_the_page_has_them(show: Any) -> None:
    graph = CircuitGraph(make_circuit(2500, n_layers=12, n_heads=12))
    page = ready(show(graph.as_view().page))
    assert graph._drawing is not None
    view = {name: asked(page, "graph.painter[arg]", name) for name in WINDOW}
    texts = {one.get_text(): one for one in figure_of(graph._drawing, state_of(graph), view, 500).axes[0].texts}
    for layer in range(12):
        place = asked(page, "graph.place(arg)", f"m{layer}")
        assert place["labelled"] == (place["label"] in texts)
        if place["labelled"]:
            assert texts[place["label"]].get_position() == pytest.approx((place["x"], place["y"]), abs=0.01)


def test_marks_stand_below_labels_from_the_scale_at_which_the_page_writes_them(graph: CircuitGraph) -> None:
    graph.show(Circuit.from_edges(GRAPH, SCORES), roles={"a1.h2": "mover", "a0.h0": "x" * 40})
    assert graph._drawing is not None
    marks = {node.name: node.mark for node in graph._drawing.nodes if node.mark}
    assert marks.keys() == {"a1.h2", "a0.h0"} and marks["a1.h2"] == "mover"
    view = {"width": 900, "height": 600, "left": 60.0, "top": 500.0, "stretch": 1.0}
    for scale, told in ((1.0, set()), (1.3, {*marks.values()})):
        axes = figure_of(graph._drawing, state_of(graph), {**view, "scale": scale}, 600).axes[0]
        texts = {one.get_text(): one for one in axes.texts}
        assert texts.keys() & {*marks.values()} == told
    (x, y), below = texts["a1.h2"].get_position(), texts["mover"].get_position()
    assert below == pytest.approx((x, y + (16 + 8) / 2 + 8)) and texts["mover"].get_fontsize() == 11 * 72 / 96
    assert texts["a1.h2"].get_fontsize() == pytest.approx(16 * 72 / 96)
    graph.groups = {"both": ["a1.h2", "a0.h0"]}
    axes = figure_of(graph._drawing, state_of(graph), {**view, "scale": 1.3}, 600).axes[0]
    assert not {one.get_text() for one in axes.texts} & {*marks.values()}


def test_what_is_lit_is_as_opaque_as_it_is_sure() -> None:
    ensemble = ensemble_of({"input->m1": "1" * 20, "m1->logits": "1" * 3 + "0" * 17})
    graph = CircuitGraph(ensemble.consensus(0.05), ensemble=ensemble, selected=["m1"])
    assert graph._drawing is not None

    def opacities() -> list[float]:
        shown = figure_of(graph._drawing, state_of(graph), {}, 500).axes[0].patches
        return sorted(float(one.get_alpha()) for one in shown if isinstance(one, PathPatch))

    assert opacities() == [0.15, 1.0]  # the page's legend says: opacity is the share of draws
    graph.cut = ["m1->logits"]
    assert opacities() == [0.8, 1.0]


def test_files_are_vectors_with_their_letters_and_without_margins(graph: CircuitGraph, tmp_path: Path) -> None:
    graph.view = {"width": 800, "height": 400, "scale": 1.0, "left": 60.0, "top": 380.0, "stretch": 1.0}
    for kind in ("pdf", "svg", "png"):
        graph.save(tmp_path / f"circuit.{kind}")
        first = (tmp_path / f"circuit.{kind}").read_bytes()
        graph.save(tmp_path / f"circuit.{kind}")  # its own is overwritten, and the same again
        assert (tmp_path / f"circuit.{kind}").read_bytes() == first
    pdf = (tmp_path / "circuit.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and re.search(rb"/MediaBox \[ 0 0 600 300 \]", pdf)
    drawn = ElementTree.fromstring((tmp_path / "circuit.svg").read_text())
    assert drawn.get("width") == "600pt" and "a1.h2" in {text.strip() for text in drawn.itertext()}
    assert first[:4] == b"\x89PNG"


def test_other_files_are_kept_and_other_kinds_refused(graph: CircuitGraph, tmp_path: Path) -> None:
    (tmp_path / "mine.pdf").write_text("mine")
    with pytest.raises(SettingError, match="is kept"):
        graph.save(tmp_path / "mine.pdf")
    assert (tmp_path / "mine.pdf").read_text() == "mine"
    graph.save(tmp_path / "mine.pdf", force=True)
    with pytest.raises(SettingError, match=r"ends with, 'eps' is not known"):
        graph.save(tmp_path / "mine.eps")
    with pytest.raises(CircuitError, match="no circuit yet"):
        CircuitGraph().save(tmp_path / "none.pdf")


def test_hostile_names_are_drawn_as_text(graph: CircuitGraph, tmp_path: Path) -> None:
    for start in range(0, len(NAMES), 5):
        graph.names = dict(zip(["m0", "m1", "a0.h0", "a0.h1", "a1.h2"], NAMES[start : start + 5], strict=False))
        graph.save(tmp_path / "circuit.svg")
        drawn = ElementTree.fromstring((tmp_path / "circuit.svg").read_text(encoding="utf-8"))
        assert not [
            one for one in drawn.iter() if one.tag.rpartition("}")[2] in ("script", "image", "a", "foreignObject")
        ]


def test_a_circuit_without_edges_is_a_picture_too(tmp_path: Path) -> None:
    CircuitGraph(Circuit.empty(Graph(2, 2))).save(tmp_path / "none.pdf")
    assert (tmp_path / "none.pdf").read_bytes().startswith(b"%PDF")
