"""The graph view: what is on the page and where, that text stays text, that a browser draws it offline."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import pyvis.network
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.selection import resize
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph
from kcwb.workbench.graph.drawing import COLOURS, DASHES, ROLES, SIDES, control_points
from kcwb.workbench.graph.page import GraphView, compare_view, graph_view
from kcwb.workbench.graph.svg import graph_svg
from kcwb.workbench.graph.widget import CircuitGraph
from tests.workbench.pages import (
    HEADS,
    LAYERS,
    about,
    asked,
    colours,
    drawn,
    ends,
    inner,
    make_circuit,
    ready,
    spot,
    stand_in,
    until,
)

SVG = "{http://www.w3.org/2000/svg}"
# How colours are seen by those who lack a kind of cone: matrices for linear RGB (Machado, Oliveira and Fernandes, 2009)
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deuteranopia": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
    "tritanopia": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}
SIZES = [(2, 1, 3), (12, 12, 900), (32, 32, 3000), (3, 64, 400)]


def points_of(path: str) -> list[tuple[float, float]]:
    """The points of a Bézier curve written as the path of an SVG."""
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def notice(view: GraphView) -> str:
    return about(view)["notice"]


# --- without a browser ---


def test_page_makes_no_outside_request() -> None:
    view = graph_view(make_circuit(50))
    for page in (view.page, inner(view), html.unescape(view._repr_html_())):
        assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
        assert not re.search(r"@import|url\(\s*[\"']?http", page)


def test_page_holds_every_node_and_edge() -> None:
    circuit = make_circuit(200)
    view = graph_view(circuit)
    nodes, edges = drawn(view, "nodes"), drawn(view, "edges")
    assert [node["name"] for node in nodes] == list(circuit.nodes["node"])
    assert {ends(e) for e in edges} == set(zip(circuit.edges["sender"], circuit.edges["receiver"], strict=True))
    for edge in edges:
        assert [nodes[edge["from"]]["name"], nodes[edge["to"]]["name"]] == [name.split("<")[0] for name in ends(edge)]
    assert notice(view) == ""


def test_layers_rise_and_heads_keep_their_column() -> None:
    circuit = make_circuit(1500)
    kinds = circuit.nodes.set_index("node")
    nodes = drawn(graph_view(circuit), "nodes")
    y = {(kinds.kind[n["name"]], kinds.layer[n["name"]]): n["y"] for n in nodes}
    heads = sorted((layer, -height) for (kind, layer), height in y.items() if kind == "head")
    assert [h for _, h in heads] == sorted(h for _, h in heads) and len({h for _, h in heads}) == len(heads)
    assert y["input", -1] > max(v for (kind, _), v in y.items() if kind != "input")
    assert y["logits", LAYERS] < min(v for (kind, _), v in y.items() if kind != "logits")
    for layer in kinds.layer[kinds.kind == "mlp"]:
        assert y["mlp", layer] < y.get(("head", layer), math.inf)
    x = {kinds["head"][n["name"]]: set() for n in nodes}
    for node in nodes:
        x[kinds["head"][node["name"]]].add(node["x"])
    mlps = {n["x"] for n in nodes if kinds.kind[n["name"]] == "mlp"}
    assert len(mlps) == 3 and min(mlps) > max(n["x"] for n in nodes if kinds.kind[n["name"]] == "head")
    columns = [x[head] for head in range(HEADS)]
    assert all(len(column) == 1 for column in columns) and columns == sorted(columns, key=min)


@pytest.mark.parametrize(("n_layers", "n_heads", "n_edges"), SIZES)
def test_nodes_of_a_layer_never_touch(n_layers: int, n_heads: int, n_edges: int) -> None:
    nodes = drawn(graph_view(make_circuit(n_edges, 1, n_layers, n_heads)), "nodes")
    rows: dict[float, list[float]] = {}
    for node in nodes:
        rows.setdefault(node["y"], []).append(node["x"])
    for xs in map(sorted, rows.values()):
        assert all(b - a >= 55 for a, b in itertools.pairwise(xs))


def test_ports_differ_in_dashes_and_strong_edges_are_wide_and_last() -> None:
    rows = [("input", "a0.h0<q>", 1.0), ("input", "a0.h0<k>", -0.5), ("input", "a0.h0<v>", 0.1)]
    rows += [("a0.h0", "logits", math.nan)]
    kinds = {"input": ("input", -1, -1), "a0.h0": ("head", 0, 0), "logits": ("logits", 1, -1)}
    edges = drawn(graph_view(stand_in(rows, kinds, 1, 1)), "edges")
    assert [e["port"] for e in edges] == ["direct", "v", "k", "q"]
    assert [e["lines"][1] for e in edges] == [
        "no score",
        "score 0.1 (positive)",
        "score \u22120.5 (negative)",
        "score 1 (positive)",
    ]
    assert [e["weight"] for e in edges] == pytest.approx([0, 0.1, 0.5, 1.0])
    assert [e["width"] for e in edges] == sorted(e["width"] for e in edges)
    assert len({DASHES[e["port"]] for e in edges if e["port"] in "qkv"}) == 3
    assert len({json.dumps(e["bend"]) for e in edges if e["to"] == edges[-1]["to"]}) == 3


def test_beyond_max_edges_the_strongest_are_drawn_and_the_page_says_so() -> None:
    circuit = make_circuit(1500)
    assert notice(graph_view(circuit)) == ""
    view = graph_view(circuit, max_edges=1000)
    assert notice(view) == "showing the 1,000 strongest of 1,500 edges"
    shown = {e["weight"] for e in drawn(view, "edges")}
    assert len(drawn(view, "edges")) == 1000
    assert min(shown) >= circuit.edges["score"].abs().iloc[1000]


def test_roles_are_normalised_and_unknown_ones_are_only_named() -> None:
    circuit = make_circuit(200)
    heads = list(circuit.nodes.node[circuit.nodes.kind == "head"])
    roles = {heads[0]: "Mover head", heads[1]: "dreamer", "a99.h0": "mover", "m3": "mover"}
    view = graph_view(circuit, roles=roles)
    nodes = {node["name"]: node for node in drawn(view, "nodes")}
    assert nodes[heads[0]]["tone"] == "mover"
    assert nodes[heads[1]]["tone"] == "head" and "dreamer" in nodes[heads[1]]["lines"][1]
    assert "a99.h0" not in nodes and nodes["m3"]["tone"] == "mlp"


def test_a_real_circuit_is_drawn_whole_with_and_without_scores() -> None:
    graph = Graph(n_layers=2, n_heads=2)
    names = ["input->a0.h1<v>", "input->m0", "a0.h1->a1.h0<q>", "m0->a1.h0<k>", "a1.h0->logits"]
    scores = dict(zip(names, [0.5, -0.2, math.nan, 0.1, 1.0], strict=True))
    for circuit in (Circuit.from_edges(graph, scores), Circuit.from_edges(graph, names)):
        view = graph_view(circuit)
        assert {"->".join(ends(e)) for e in drawn(view, "edges")} == set(names)
        assert [n["name"] for n in drawn(view, "nodes")] == list(circuit.nodes["node"])
    assert {e["lines"][1] for e in drawn(view, "edges")} == {"no score"}
    assert "no edges" in inner(graph_view(Circuit.empty(graph)))
    full = Circuit.full(graph)
    assert len(drawn(graph_view(full), "edges")) == full.n_edges


def test_same_circuit_same_page() -> None:
    assert graph_view(make_circuit(100)) == graph_view(make_circuit(100))


def test_sixty_nodes_and_two_hundred_edges_stay_below_300_kb() -> None:
    circuit = make_circuit(200, n_layers=6)
    assert len(circuit.nodes) >= 60
    assert len(graph_view(circuit, title="t" * 100)._repr_html_()) <= 300_000


@pytest.mark.parametrize("with_ends", [True, False])
def test_empty_circuit_gives_a_page(with_ends: bool) -> None:
    circuit = make_circuit(5)
    circuit.edges = circuit.edges.head(0)
    circuit.nodes = circuit.nodes.head(2 if with_ends else 0)
    view = graph_view(circuit)
    assert drawn(view, "edges") == [] and "This circuit has no edges." in inner(view)


def test_bad_settings_and_unknown_nodes_are_refused() -> None:
    with pytest.raises(SettingError, match="max_edges=0 is not a whole number of at least 1"):
        graph_view(make_circuit(5), max_edges=0)
    with pytest.raises(SettingError, match="height"):
        graph_view(make_circuit(5), height=-3)
    circuit = make_circuit(5)
    circuit.edges.loc[0, "sender"] = "a77.h1"
    with pytest.raises(CircuitError, match=r"no 'a77\.h1'"):
        graph_view(circuit)


def test_to_html_gives_text_or_writes_a_whole_file(tmp_path: Path) -> None:
    view = graph_view(make_circuit(5), title="Größe 🦜")
    assert view.to_html() == view.page
    path = tmp_path / "graph.html"
    graph_view(make_circuit(4)).to_html(path)
    assert view.to_html(path) is None
    assert path.read_text(encoding="utf-8") == view.page and list(tmp_path.iterdir()) == [path]
    view.to_html(tmp_path / "new" / "graph.html")
    assert (tmp_path / "new" / "graph.html").read_text(encoding="utf-8") == view.page


def test_to_html_keeps_what_kcwb_did_not_write(tmp_path: Path) -> None:
    view, path = graph_view(make_circuit(5)), tmp_path / "graph.html"
    path.write_text("mine")
    with pytest.raises(SettingError, match="only a page is overwritten"):
        view.to_html(path)
    assert path.read_text() == "mine"
    view.to_html(path, force=True)
    assert path.read_text(encoding="utf-8") == view.page


def test_pyvis_has_the_same_nodes_and_edges_in_their_places_and_colours() -> None:
    circuit = make_circuit(60)
    head = circuit.nodes.node[circuit.nodes.kind == "head"].iloc[0]
    view = graph_view(circuit, roles={head: "mover"})
    network, nodes = view.to_pyvis(), drawn(view, "nodes")
    assert isinstance(network, pyvis.network.Network)
    assert [(one["label"], one["x"], one["y"]) for one in network.nodes] == [
        (one["label"], one["x"], one["y"]) for one in nodes
    ]
    assert [one["from"] for one in network.edges] == [one["from"] for one in drawn(view, "edges")]
    assert next(one for one in network.nodes if one["label"] == head)["color"] == COLOURS["light"]["mover"]
    assert "vis.Network" in network.generate_html()


def test_repr_is_short() -> None:
    assert len(repr(graph_view(make_circuit(5)))) < 200


# --- the look ---


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("sight", list(SIGHT))
def test_roles_and_sides_are_told_apart_by_every_kind_of_sight(theme: str, sight: str) -> None:
    ink = COLOURS[theme]
    for names in ((*ROLES, "head"), SIDES, ("q", "k", "v", "direct")):
        seen = {name: lab(SIGHT[sight] @ linear(ink[name])) for name in names}
        for one, other in itertools.combinations(names, 2):
            if {one, other} != {"k", "v"}:  # a dotted and a whole line
                assert np.linalg.norm(seen[one] - seen[other]) > 15, (one, other)


def linear(colour: str) -> np.ndarray:
    """Linear RGB of `#rrggbb`."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear RGB, in which a distance of 2.3 is just noticed."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_an_infinite_score_is_the_strongest(tmp_path: Path) -> None:
    scores = {"input->m1": -math.inf, "m1->logits": 1.0, "input->logits": math.nan}
    circuit = Circuit.from_edges(Graph(2, 2), scores)
    for view in (graph_view(circuit), compare_view(circuit, circuit), CircuitGraph(circuit).as_view()):
        widths = [edge["width"] for edge in drawn(view, "edges")]
        assert widths[-1] == max(widths) > 6 and min(widths) < 1.3
    CircuitGraph(circuit).save(tmp_path / "circuit.pdf")


def test_a_table_of_roles_is_read_by_node_or_by_layer_and_head() -> None:
    circuit = make_circuit(200)
    head = circuit.nodes[circuit.nodes.kind == "head"].iloc[4]
    by_node = pd.DataFrame({"node": [head.node, "a1.h1"], "role": ["relation", None]})
    by_place = pd.DataFrame({"layer": [head.layer], "head": [head["head"]], "role": ["relation"]})
    floats = by_place.astype({"layer": float, "head": float})  # as after a merge
    for roles in (by_node, by_place, floats, {head.node: "relation"}):
        tones = {node["name"]: node["tone"] for node in drawn(graph_view(circuit, roles=roles), "nodes")}
        assert [name for name, tone in tones.items() if tone in ROLES] == [head.node] and tones[head.node] == "relation"
        assert about(graph_view(circuit, roles=roles))["withRoles"]
    with pytest.raises(SettingError, match=r"columns node .or layer and head. and role; it has node, rol"):
        graph_view(circuit, roles=by_node.rename(columns={"role": "rol"}))


def two_circuits() -> tuple[Circuit, Circuit]:
    """Scores of the right one are a hundred times those of the left one, as another metric's may be."""
    graph = Graph(n_layers=2, n_heads=2)
    left = {"input->a0.h1<v>": 1.0, "a0.h1->a1.h0<q>": -0.5, "a1.h0->logits": 0.25}
    right = {"input->a0.h1<v>": 25.0, "a1.h0->logits": 100.0, "input->m1": 50.0, "m1->logits": math.nan}
    return Circuit.from_edges(graph, left), Circuit.from_edges(graph, right)


def test_comparison_scales_each_circuit_by_its_own_largest_score() -> None:
    left, right = two_circuits()
    view = compare_view(left, right, names=("A", "B"))
    edges = {"->".join(ends(edge)): edge for edge in drawn(view, "edges")}
    sides = {name: (edge["tone"], edge["weight"]) for name, edge in edges.items()}
    assert sides == {
        "input->a0.h1<v>": ("shared", 1.0),
        "a0.h1->a1.h0<q>": ("left", 0.5),
        "a1.h0->logits": ("shared", 1.0),
        "input->m1": ("right", 0.5),
        "m1->logits": ("right", 0.0),
    }
    assert edges["a1.h0->logits"]["lines"][1] == "A: score 0.25 (positive); B: score 100 (positive)"
    assert edges["m1->logits"]["lines"][1] == "B: no score"
    assert about(view)["sides"] == {"left": "only A (1)", "right": "only B (2)", "shared": "shared (2)"}
    held = {node["name"]: node["side"] for node in drawn(view, "nodes")}
    assert held == {"input": "shared", "a0.h1": "shared", "a1.h0": "shared", "m1": "right", "logits": "shared"}
    assert "only B" in next(n for n in drawn(view, "nodes") if n["name"] == "m1")["lines"][1]


def test_comparison_keeps_the_strongest_edges_and_refuses_what_cannot_be_compared() -> None:
    left, right = two_circuits()
    view = compare_view(left, right, max_edges=2)
    assert notice(view) == "showing the 2 strongest of 5 edges"
    assert {edge["weight"] for edge in drawn(view, "edges")} == {1.0}
    empty = Circuit.empty(left.graph)
    assert drawn(compare_view(empty, empty), "edges") == []
    assert {e["tone"] for e in drawn(compare_view(left, empty), "edges")} == {"left"}
    with pytest.raises(CircuitError, match="different graphs"):
        compare_view(left, Circuit.empty(Graph(n_layers=1, n_heads=1)))
    with pytest.raises(SettingError, match="names='AB'"):
        compare_view(left, right, names="AB")


def test_a_graph_of_three_hundred_edges_follows_a_slider() -> None:
    graph = Graph(n_layers=LAYERS, n_heads=HEADS)
    scores = torch.rand(graph.exists.shape).masked_fill(~graph.exists, math.nan)
    whole = Circuit(graph, graph.exists.clone(), scores)
    graph_view(resize(whole, edges=300, select="greedy"))  # what all pages share is made once
    seconds = []
    for edges in (300, 301, 302):
        clock = time.process_time()
        graph_view(resize(whole, edges=edges, select="greedy"))
        seconds.append(time.process_time() - clock)
    assert min(seconds) <= 0.3


# --- the drawing ---


def test_svg_has_every_edge_and_node_in_the_layout_of_the_page() -> None:
    circuit = make_circuit(200)
    head = circuit.nodes.node[circuit.nodes.kind == "head"].iloc[0]
    svg = ElementTree.fromstring(graph_svg(circuit, roles={head: "mixture"}, title="Capital", details={head: "why"}))
    assert svg.findtext(f"{SVG}title") == "Capital"
    paths = [path for path in svg.findall(f"{SVG}path") if len(path)]  # those of the legend have no title
    page = drawn(graph_view(circuit), "edges")
    assert [path.findtext(f"{SVG}title") for path in paths] == ["\n".join(edge["lines"]) for edge in page]
    assert [float(path.attrib["stroke-width"]) for path in paths] == [edge["width"] for edge in page]
    assert [path.attrib["stroke"] for path in paths] == [COLOURS["light"][edge["port"]] for edge in page]
    assert all(
        ("stroke-dasharray" in path.attrib) == bool(DASHES[edge["port"]])
        for path, edge in zip(paths, page, strict=True)
    )
    groups = svg.findall(f"{SVG}g")
    nodes = drawn(graph_view(circuit), "nodes")
    assert [group.findtext(f"{SVG}text") for group in groups] == [node["name"] for node in nodes]
    xs, ys = (np.array([float(group.find(f"{SVG}text").attrib[at]) for group in groups]) for at in ("x", "y"))
    assert ys == pytest.approx([node["y"] + 4.5 for node in nodes], abs=0.01)
    assert xs == pytest.approx(np.polyval(np.polyfit([n["x"] for n in nodes], xs, 1), [n["x"] for n in nodes]), abs=0.1)
    coloured = next(group for group in groups if group.findtext(f"{SVG}text") == head)
    assert coloured.find(f"{SVG}rect").attrib["fill"] == COLOURS["light"]["mixture"]
    assert "why" in coloured.findtext(f"{SVG}title")
    left, top, width, height = map(float, svg.attrib["viewBox"].split())
    assert left < xs.min() and xs.max() < left + width and top < ys.min() and ys.max() < top + height
    assert COLOURS["dark"]["bg"] in graph_svg(circuit, dark=True)


def test_svg_of_nothing_of_too_much_and_with_bad_settings() -> None:
    circuit = make_circuit(60)
    assert "showing the 10 strongest of 60 edges" in graph_svg(circuit, max_edges=10)
    with pytest.raises(SettingError, match="aspect=0"):
        graph_svg(circuit, aspect=0)
    circuit.edges, circuit.nodes = circuit.edges.head(0), circuit.nodes.head(0)
    assert "This circuit has no edges." in graph_svg(circuit)


# --- in Chromium ---


@pytest.mark.browser
def test_page_is_drawn_in_light_and_dark(show: Any) -> None:
    content = graph_view(make_circuit(60), title="Capital of a country").page
    for scheme, background in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")):
        page = ready(show(content, color_scheme=scheme))
        assert colours(page) > 20
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        assert asked(page, "getComputedStyle(shadow.querySelector('.kc')).backgroundColor") == background
        assert page.title() == "Capital of a country"


@pytest.mark.browser
def test_a_role_is_seen_in_its_colour_also_after_a_change_of_size(show: Any) -> None:
    circuit = make_circuit(20)
    head = circuit.nodes.node[circuit.nodes.kind == "head"].iloc[0]
    page = ready(show(graph_view(circuit, roles={head: "mover"}).page))
    page.set_viewport_size({"width": 700, "height": 500})
    page.wait_for_timeout(300)
    pixels = asked(
        page,
        """(() => {
            const { x, y, width, height } = graph.place(arg), context = shadow.querySelector("canvas").getContext("2d");
            return [...context.getImageData(x - width / 2, y - height / 2, width, height).data];
        })()""",
        head,
    )
    [(commonest, _)] = Counter(zip(*[iter(pixels)] * 4, strict=True)).most_common(1)
    assert commonest == (0xD5, 0x5E, 0x00, 255)


@pytest.mark.browser
def test_slider_hides_edges_and_counts_them(show: Any) -> None:
    page = ready(show(graph_view(make_circuit(60)).page))
    assert page.inner_text("#kc-shown") == "all 60 edges shown"
    page.focus("#kc-slider")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    until(page, "shadow.getElementById('kc-shown').textContent.endsWith('50 of 60 edges shown')")
    assert asked(page, "graph.links().length") == 50
    page.keyboard.press("End")
    until(page, "shadow.getElementById('kc-shown').textContent.endsWith('1 of 60 edges shown')")


@pytest.mark.browser
def test_search_selects_a_node_and_tells_the_parent(show: Any) -> None:
    circuit = make_circuit(60)
    name = circuit.nodes["node"].iloc[5]
    page = ready(show(graph_view(circuit).page))
    page.evaluate("addEventListener('message', (e) => { window.told = e.data; })")
    page.fill("#kc-search", name)
    page.keyboard.press("Enter")
    page.wait_for_function("window.told")
    assert page.evaluate("window.told") == {"kcwb": "select", "nodes": [name], "edges": []}
    assert asked(page, "graph.model.get('selected')") == [name]
    page.fill("#kc-search", "nothing like it")
    page.keyboard.press("Enter")
    assert page.get_attribute("#kc-search", "aria-invalid") == "true"


@pytest.mark.browser
def test_click_in_a_notebook_frame_selects_and_theme_follows_the_notebook(show: Any) -> None:
    view = graph_view(make_circuit(20))
    listener = "<script>addEventListener('message', (e) => { window.told = e.data; })</script>"
    page = show(f'<!doctype html><body data-jp-theme-light="false">{listener}{view._repr_html_()}')
    frame = ready(page.wait_for_selector("iframe").content_frame())
    ground = "getComputedStyle(shadow.querySelector('.kc')).backgroundColor"
    assert asked(frame, ground) == "rgb(21, 24, 28)"
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")
    until(frame, f"{ground} === 'rgb(255, 255, 255)'")
    name = drawn(view, "nodes")[0]["name"]
    canvas = frame.wait_for_selector("#kc-canvas")
    canvas.hover(position=spot(frame, name))
    frame.wait_for_selector("#kc-tip:not([hidden])")
    assert frame.inner_text("#kc-tip").splitlines()[0] == name
    canvas.click(position=spot(frame, name))
    page.wait_for_function("window.told")
    assert page.evaluate("window.told.nodes") == [name]
    page.mouse.move(0, 0)
    until(frame, "graph.lit()?.links.length < 20")
    frame.press("#kc-canvas", "Escape")
    page.wait_for_function("window.told.nodes.length === 0")


@pytest.mark.browser
def test_legend_names_the_roles_that_are_there(show: Any) -> None:
    circuit = make_circuit(60)
    heads = circuit.nodes.node[circuit.nodes.kind == "head"]
    roles = pd.DataFrame({"node": heads, "role": ["mover", "suppressor", *["other"] * (len(heads) - 2)]})
    page = ready(show(graph_view(circuit, roles=roles).page))
    assert legend(page) == ["other head", "mover", "suppressor"]
    assert legend(ready(show(graph_view(circuit).page))) == ["head"]


def legend(page: Any) -> list[str]:
    return [key.inner_text().strip() for key in page.query_selector_all("[data-role]") if key.is_visible()]


@pytest.mark.browser
def test_compared_circuits_are_told_apart_in_colour_and_in_numbers(show: Any) -> None:
    left, right = two_circuits()
    view = compare_view(left, right, names=("ACDC <b>", "EAP"), roles={"a0.h1": "mover"}, title="Two")
    page = ready(show(view.page))
    assert colours(page) > 20
    sides = [key.inner_text() for key in page.query_selector_all("[data-side]")]
    assert sides == ["only ACDC <b> (1)", "only EAP (2)", "shared (2)"]
    assert {link["tone"] for link in asked(page, "graph.links()")} == {"left", "right", "shared"}
    assert page.inner_text("#kc-below") == "Hide below share"
    page.click("[data-key=v]")  # which stands for all whole lines
    until(page, "graph.links().every((link) => /<[qk]>$/.test(link.name))")
    page.click("[data-key=v]")
    page.click("[data-key=left]")
    until(page, "graph.links().every((link) => link.tone !== 'left') && graph.links().length === 4")


@pytest.mark.browser
def test_drawing_is_saved_with_what_is_shown(show: Any, tmp_path: Path) -> None:
    circuit = make_circuit(60)
    view = graph_view(circuit, roles={circuit.nodes.node[3]: "mover"})
    page = ready(show(view.page))
    page.focus("#kc-slider")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    until(page, "shadow.getElementById('kc-shown').textContent.endsWith('40 of 60 edges shown')")
    with page.expect_download() as download:
        page.click("#kc-svg")
    download.value.save_as(tmp_path / "circuit.svg")
    svg = ElementTree.parse(tmp_path / "circuit.svg").getroot()
    paths = svg.findall(f"{SVG}path")
    assert len(paths) == 40
    groups = svg.findall(f"{SVG}g")
    assert [g.findtext(f"{SVG}text") for g in groups] == list(circuit.nodes["node"])
    assert groups[3].find(f"{SVG}rect").attrib["fill"] == "#d55e00"
    # the curves are those of Python's drawing, with columns as far apart as the window has them
    stretch = asked(page, "graph.painter.stretch")
    nodes, edges = view.drawing.nodes, {tuple(edge.lines): edge for edge in view.drawing.edges}
    for path in paths:
        edge = edges[tuple(path.findtext(f"{SVG}title").splitlines())]
        start, end = ((stretch * node.x, node.y) for node in (nodes[edge.start], nodes[edge.end]))
        wanted = [start, *control_points(start, end, edge.bend), end]
        assert np.array(points_of(path.attrib["d"])) == pytest.approx(np.array(wanted), abs=0.1)


@pytest.mark.browser
def test_picture_is_saved_at_twice_the_size_and_the_view_stays(show: Any, tmp_path: Path) -> None:
    page = ready(show(graph_view(make_circuit(60)).page))
    before = asked(page, "[graph.view().scale, graph.view().left, graph.view().top]")
    with page.expect_download() as download:
        page.click("#kc-png")
    picture = tmp_path / "circuit.png"
    download.value.save_as(picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    width = asked(page, "shadow.querySelector('canvas').clientWidth")
    assert int.from_bytes(content[16:20], "big") == 2 * width
    page.wait_for_timeout(200)
    assert asked(page, "[graph.view().scale, graph.view().left, graph.view().top]") == pytest.approx(before)
    assert colours(page) > 20


@pytest.mark.browser
def test_empty_circuit_says_so(show: Any) -> None:
    circuit = make_circuit(5)
    circuit.edges, circuit.nodes = circuit.edges.head(0), circuit.nodes.head(0)
    page = ready(show(graph_view(circuit).page))
    assert page.is_visible("text=This circuit has no edges.")
