"""Two sessions of one circuit: what is drawn and listed is what differs."""

from __future__ import annotations

from typing import Any

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.session import Session, played
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph
from kcwb.workbench.graph.sessions import compare_sessions_view
from kcwb.workbench.graph.widget import CircuitGraph
from tests.workbench.pages import about, asked, circuit_of, ready

EDGES = {
    "input->a0.h1<v>": 1.0, "a0.h1->m0": 0.5, "a0.h1->a1.h0<q>": -0.4, "m0->a1.h0<v>": 0.3, "a1.h0->logits": 0.8,
    "m0->logits": 0.1,
}  # fmt: skip
LEFT = Session(
    pinned=["m0"], groups={"early": ["a0.h1", "m0"], "mine": ["a1.h0"]}, names={"m0": "first", "a1.h0": "<b>mover</b>"},
    notes={"m0": "adds"}, cut=["m0->logits", "a0.h1->m0"], forced=["input->m1"],
)  # fmt: skip
RIGHT = Session(
    pinned=["m0", "a0.h1"], groups={"early": ["a0.h1", "m0"]}, names={"m0": "second", "a1.h0": "<b>mover</b>"},
    cut=["m0->logits", "m0->a1.h0<v>"],
)  # fmt: skip


@pytest.fixture
def circuit() -> Circuit:
    return Circuit.from_edges(Graph(n_layers=2, n_heads=2), EDGES)


def test_what_is_drawn_is_what_either_left(circuit: Circuit) -> None:
    view = compare_sessions_view(circuit, LEFT, RIGHT, names=("Ada", "Bob"))
    edges = {edge["lines"][0].replace(" → ", "->"): edge["tone"] for edge in about(view)["edges"]}
    assert edges == {
        "input->a0.h1<v>": "shared", "a0.h1->a1.h0<q>": "shared", "a1.h0->logits": "shared",
        "input->m1": "left", "m0->a1.h0<v>": "left", "a0.h1->m0": "right",
    }  # fmt: skip
    assert about(view)["sides"]["right"] == "only Bob (1)"
    held = circuit_of(view)
    assert held["pinned"] == ["m0", "a0.h1"] and held["groups"] == {"early": ["a0.h1", "m0"]}
    assert held["names"] == {"m0": "first / second", "a1.h0": "<b>mover</b>"} and held["notes"] == {"m0": "Ada: adds"}
    names, *rows = about(view)["differences"]
    assert names == ["Ada", "Bob"]
    assert rows == LEFT.compare(RIGHT).values.tolist() and ["names", "m0", "first", "second"] in rows
    assert ["cut", "a0.h1->m0", "cut", ""] in rows and not [row for row in rows if row[1] == "m0->logits"]
    graph = CircuitGraph()
    graph.compare_sessions(circuit, LEFT, RIGHT, names=("Ada", "Bob"))
    assert graph.scene["differences"] == about(view)["differences"] and graph.names == held["names"]
    assert graph.circuit is not None
    assert graph.circuit.kept.equal(played(circuit, LEFT).kept | played(circuit, RIGHT).kept)


def test_the_same_twice_differs_in_nothing(circuit: Circuit) -> None:
    drawn = about(compare_sessions_view(circuit, LEFT, LEFT))
    assert drawn["differences"] == [] and {edge["tone"] for edge in drawn["edges"]} == {"shared"}


def test_sessions_of_other_circuits_are_refused(circuit: Circuit) -> None:
    other = Circuit.from_edges(circuit.graph, ["input->m1", "m1->logits"])
    theirs = other.with_session(Session(pinned=["m1"])).session
    assert theirs is not None
    for left, right in ((theirs, LEFT), (LEFT, theirs)):
        with pytest.raises(CircuitError, match="The session is of the circuit"):
            compare_sessions_view(circuit, left, right)
    with pytest.raises(CircuitError, match="cut: m0->m1 is not in the circuit"):
        compare_sessions_view(circuit, Session(cut=["m0->m1"]), RIGHT)
    with pytest.raises(SettingError, match="give two"):
        compare_sessions_view(circuit, LEFT, RIGHT, names=("one",))


@pytest.mark.browser
def test_the_list_leads_to_what_differs(circuit: Circuit, show: Any) -> None:
    view = compare_sessions_view(circuit, LEFT, RIGHT, names=("<i>Ada</i>", "Bob"))
    page = ready(show(view.page))
    assert page.inner_text("#kc-differences h3") == f"What differs ({len(LEFT.compare(RIGHT))})"
    assert page.locator("#kc-differences th").all_inner_texts() == ["", "<i>Ada</i>", "Bob"]
    row = page.locator("#kc-differences tbody tr").filter(has_text="a0.h1 → m0")
    assert row.locator("td").all_inner_texts() == ["a0.h1 → m0\ncut", "cut", "–"]
    row.get_by_role("button").click()
    assert asked(page, "graph.model.get('selected_edges')") == ["a0.h1->m0"]
    page.locator("#kc-differences tbody tr").filter(has_text="second").get_by_role("button").click()
    assert asked(page, "graph.model.get('selected')") == ["m0"]
    assert page.locator("#kc-differences tr").filter(has_text="mine").get_by_role("button").count() == 0
