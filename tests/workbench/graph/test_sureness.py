"""A graph of an ensemble: as opaque as sure, and what hovering tells of each edge."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from kcwb.statistics import proportion_interval
from kcwb.workbench.graph.page import graph_view
from kcwb.workbench.graph.sureness import FAINTEST
from kcwb.workbench.graph.svg import graph_svg
from tests.workbench.ensembles import KEPT, TWINS, ensemble_of
from tests.workbench.pages import TOLD, about, asked, drawn, ends, ready, until

SVG = "{http://www.w3.org/2000/svg}"


def lines(view: Any) -> dict[str, list[str]]:
    return {"->".join(ends(edge)): edge["lines"] for edge in drawn(view, "edges")}


def test_edges_are_as_opaque_as_they_are_sure_but_never_invisible() -> None:
    kept = {"input->a0.h1<v>": "1" * 20, "a0.h1->logits": "1" * 9 + "0" * 11, "input->m1": "1" + "0" * 19}
    kept["m1->logits"] = "1" * 3 + "0" * 17
    ensemble = ensemble_of(kept)
    circuit = ensemble.consensus(0.05)
    view = graph_view(circuit, ensemble=ensemble)
    strength = {"->".join(ends(edge)): edge["strength"] for edge in drawn(view, "edges")}
    assert strength == {
        "input->a0.h1<v>": 1.0,
        "a0.h1->logits": 0.45,
        "input->m1": FAINTEST,
        "m1->logits": 0.15,
    }
    assert about(view)["sure"] and not about(graph_view(circuit))["sure"]
    svg = ElementTree.fromstring(graph_svg(circuit, ensemble=ensemble))
    opacity = {path[0].text: path.get("stroke-opacity") for path in svg.iter(f"{SVG}path") if len(path)}
    assert {text.splitlines()[0].replace(" → ", "->"): float(one) for text, one in opacity.items()} == strength
    legend = [text.text for text in svg.iter(f"{SVG}text")]
    assert legend[-1] == "opacity: share of draws"
    assert "opacity" not in graph_svg(circuit).replace("stroke-opacity", "")


def test_hovering_tells_in_how_many_draws_and_which_source_removes_it_most() -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    told = lines(graph_view(ensemble.consensus(0.25), ensemble=ensemble))
    low, high = proportion_interval([True, True, True, False])
    # of draws 1 to 3, which keep it, other facts lose it in the second, another setting in the first and second
    assert told["a0.h1->a1.h0<q>"][2:] == [
        f"kept in 3 of 4 draws: 0.75 [{low:.2f}, {high:.2f}]",
        "with another setting alone it is gone from 67% of them",
    ]
    assert told["input->m1"][3] == "with other facts alone it is gone from 100% of them"
    assert told["input->a0.h1<v>"][3] == "no source of chance removes it alone"


def test_an_ensemble_is_drawn_as_its_consensus_at_one_half() -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    half = ensemble.consensus(0.5)
    assert graph_view(ensemble) == graph_view(half, ensemble=ensemble)
    assert graph_svg(ensemble) == graph_svg(half, ensemble=ensemble)


def test_with_fewer_twins_than_draws_the_share_is_of_those() -> None:
    ensemble = ensemble_of(
        {"input->m0": "1101", "m0->logits": "1111"}, {"order": {"input->m0": "10", "m0->logits": "11"}}
    )
    told = lines(graph_view(ensemble.consensus(), ensemble=ensemble))
    assert told["input->m0"][3] == "in another order alone it is gone from 50% of those drawn again"
    bare = ensemble_of({"input->m0": "1101", "m0->logits": "1111"})
    assert len(lines(graph_view(bare.consensus(), ensemble=bare))["input->m0"]) == 3


def test_a_circuit_of_other_edges_is_drawn_and_one_of_another_graph_refused() -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    circuit = Circuit.from_edges(ensemble.graph, ["input->a0.h1<v>", "a0.h1->logits"])
    view = graph_view(circuit, ensemble=ensemble)
    assert lines(view)["a0.h1->logits"][2] == "kept in none of 4 draws"
    assert {edge["strength"] for edge in drawn(view, "edges")} == {1.0, FAINTEST}
    for draw in (graph_view, graph_svg):
        with pytest.raises(CircuitError, match="The ensemble is of"):
            draw(Circuit.empty(Graph(n_layers=1, n_heads=1)), ensemble=ensemble)


def test_beyond_max_edges_the_strongest_are_drawn_with_their_own_opacity() -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    view = graph_view(ensemble.consensus(0.25), ensemble=ensemble, max_edges=2)
    shown = {"->".join(ends(edge)): edge["strength"] for edge in drawn(view, "edges")}
    assert shown == {"input->a0.h1<v>": 1.0, "a0.h1->a1.h0<q>": 0.75}
    empty = graph_view(Circuit.empty(ensemble.graph), ensemble=ensemble)
    assert drawn(empty, "edges") == []


def test_names_of_sources_are_text() -> None:
    rows = {"input->m0": "00", "m0->logits": "00"}
    for name in TOLD:
        ensemble = ensemble_of({"input->m0": "11", "m0->logits": "11"}, {name: rows})
        told = lines(graph_view(ensemble.consensus(), ensemble=ensemble))["input->m0"]
        assert told[3].startswith("with another ") and len(told[3]) < 100


@pytest.mark.browser
def test_a_click_on_an_edge_lights_it_and_tells_its_ends(show: Any) -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    page = ready(show(graph_view(ensemble.consensus(0.25), ensemble=ensemble).page))
    assert page.inner_text("#kc-sure").strip() == "opacity: share of draws"
    page.evaluate("addEventListener('message', (e) => { window.told = e.data; })")
    place = asked(
        page,
        """[0.3, 0.4, 0.5, 0.6, 0.7].map((t) => graph.along("input->m1", t))
            .find(({ x, y }) => graph.edgeAt(x, y) === "input->m1")""",
    )
    page.click("#kc-canvas", position=place)
    page.wait_for_function("window.told")
    assert page.evaluate("window.told") == {"kcwb": "select", "nodes": [], "edges": [["input", "m1"]]}
    page.mouse.move(1, 1)
    until(page, "graph.lit()?.links.join() === 'input->m1'")
    page.press("#kc-canvas", "Escape")
    page.wait_for_function("window.told.edges.length === 0")
    until(page, "graph.lit() === null")


@pytest.mark.browser
def test_a_slider_of_confidence_hides_what_few_draws_keep(show: Any) -> None:
    ensemble = ensemble_of(KEPT, TWINS)
    page = ready(show(graph_view(ensemble.consensus(0.25), ensemble=ensemble).page))
    page.locator("#kc-confidence").fill("0.5")
    until(page, "shadow.getElementById('kc-shown').textContent.includes('3 of 5 edges')")
    assert {link["name"] for link in asked(page, "graph.links()")} == {
        "input->a0.h1<v>",
        "a0.h1->a1.h0<q>",
        "a1.h0->logits",
    }
    assert not ready(show(graph_view(ensemble.consensus(0.25)).page)).is_visible("#kc-confidence")
