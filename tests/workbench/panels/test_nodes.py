"""The node panel: what it shows is what the plain functions give; clicks count only when they name a node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import ipywidgets as W
import pandas as pd
import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.discover import discover
from kcwb.errors import CircuitError, SettingError
from kcwb.interventions.nodes import ablate_nodes
from kcwb.models.graph import Graph
from kcwb.reading.nodes import attention_pattern, component_logits, node_edges
from kcwb.tasks.task import Task, make_task
from kcwb.workbench.panels import nodes as nodepanel
from kcwb.workbench.panels.nodes import NodePanel, _Look
from tests.hostile import HOSTILE
from tests.tasks import known_relation
from tests.workbench.panels.test_discovery import ALLOWED, SOON, Tags, every


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model) -> Task:
    return make_task(model, known_relation(model, 16, unknown=6), n=4)


@pytest.fixture
def circuit(model, task) -> Circuit:
    return discover(model, task, edges=60, progress=False)


@pytest.fixture
def panel(model, circuit, task) -> Iterator[NodePanel]:
    panel = NodePanel(model, circuit, task)
    yield panel
    panel.cancel()
    assert panel._runner.wait(SOON)


@pytest.fixture
def head(circuit) -> str:
    return circuit.nodes.query("kind == 'head'")["node"].iloc[-1]


def click(panel: NodePanel, *nodes: Any) -> None:
    """What the page sends when nodes are clicked."""
    panel._graph.set_state({"selected": list(nodes), "selected_edges": []})


def text_of(panel: NodePanel) -> str:
    return Tags(panel.to_html()).text


# --- the same as in a script ---


def test_a_head_shows_what_the_plain_functions_give(panel, model, circuit, task, head):
    panel.select(head)
    panel.wait(SOON)
    more = {"prompt": int(task.val.ranks.argmin()), "circuit": circuit}
    pd.testing.assert_frame_equal(panel.pattern, attention_pattern(model, task, head, **more))
    pd.testing.assert_frame_equal(panel.tokens, component_logits(model, task, head, **more))
    pd.testing.assert_frame_equal(panel.edges, node_edges(circuit, head))
    page = Tags(panel.to_html())
    assert page.tags.count("img") == 1 and page.tags.count("iframe") == 1 and page.tags.count("table") == 3
    for words in (f"{head}: head", "in the circuit alone", repr(panel.tokens["token"][0]), panel.edges["sender"][0]):
        assert words in page.text


def test_every_control_reaches_the_functions(panel, model, task, head):
    panel.select(head)
    panel._where.value, panel._prompt.value = "model", len(task.val) + 1
    panel.wait(SOON)
    pd.testing.assert_frame_equal(panel.pattern, attention_pattern(model, task.test, head, prompt=1))
    pd.testing.assert_frame_equal(panel.tokens, component_logits(model, task.test, head, prompt=1))
    assert "in the full model" in text_of(panel)


def test_all_prompts_can_be_chosen(panel, task):
    labels = [label for label, _ in panel._prompt.options]
    asked = [
        f"{text} … {fact.object} (rank {rank})"
        for some in (task.val, task.test)
        for text, fact, rank in zip(some.texts, some.facts, some.ranks.tolist(), strict=True)
    ]
    assert [label.split(": ", 1)[1] for label in labels] == asked
    assert panel._prompt.value == task.val.ranks.tolist().index(min(task.val.ranks.tolist()))


def test_an_mlp_has_no_attention_and_logits_no_output_edges(panel):
    for node in ("m1", "input", "logits"):
        panel.select(node)
        panel.wait(SOON)
        assert panel.pattern is None and "img" not in Tags(panel.to_html()).tags
        assert len(panel.tokens) >= 10
    assert panel.edges["direction"].eq("in").all()


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_what_cut_edges_deliver_is_what_the_circuit_was_found_with(model, task, ablation):
    circuit = discover(model, task, ablation=ablation, edges=40, progress=False)
    panel = NodePanel(model, circuit, task, node="a1.h0")
    panel.wait(SOON)
    expected = component_logits(
        model, task, "a1.h0", prompt=int(task.val.ranks.argmin()), circuit=circuit, ablation=ablation
    )
    pd.testing.assert_frame_equal(panel.tokens, expected)


def test_ablating_shows_before_and_after(panel, model, circuit, task, head):
    panel.select(head, "m0")
    panel.wait(SOON)
    panel._run_button.click()
    panel.wait(SOON)
    pd.testing.assert_frame_equal(panel.ablated, ablate_nodes(model, circuit, task, [head, "m0"], progress=False))
    page = Tags(panel._gone.value)
    assert page.tags.count("img") == 1 and f"Without {head}, m0" in page.text
    for words in ("full model, before", "circuit, after", task.val.texts[0], task.val.facts[0].object):
        assert words in page.text
    panel.select(head)
    assert panel.ablated is None and not panel._gone.value  # it was another question


def test_ablating_does_not_lose_what_is_being_looked_at(panel, head):
    """The latest request wins, but this one takes the other along."""
    panel.select(head)
    panel.ablate()
    panel.wait(SOON)
    assert panel.tokens is not None and panel.pattern is not None and panel.ablated is not None
    assert "Attention" in text_of(panel) and f"Without {head}" in text_of(panel)


def test_more_tokens_than_a_picture_holds_are_cut_from_the_left(panel, head):
    labels = [f"{i}:w" for i in range(900)]
    panel.select(head)
    panel.wait(SOON)
    pattern = pd.DataFrame(0.0, index=labels, columns=labels)
    panel._draw_look(_Look(panel._asked(), pattern, panel.tokens))
    assert "The last 40 of 900 tokens" in Tags(panel._attention.value).text


# --- choosing ---


def test_a_click_chooses(panel, head):
    click(panel, head)
    panel.wait(SOON)
    assert panel.nodes == (head,) and panel._node.value == head and panel.tokens is not None
    click(panel, "m0", head)
    assert panel.nodes == ("m0", head) and panel._node.value == f"m0, {head}"
    panel._node.value = "m1"
    assert panel.nodes == ("m1",)
    click(panel, "m0", head)  # the same once more
    assert panel.nodes == ("m0", head)


@pytest.mark.parametrize("value", [[], ["a9.h9"], [3], [None], [["m0"]], ["a0.h0<q>"], "m0", {"m0": 1}, 7, HOSTILE])
def test_what_names_no_node_is_left_alone(panel, head, value):
    panel.select(head)
    panel.wait(SOON)
    panel._graph.set_state({"selected": value})
    assert panel.nodes == (head,) and not panel._message.value and panel.state == "done"
    assert bool(panel._graph.problem) == (value != [])


def test_a_node_that_is_chosen_is_selected_in_the_graph(panel, head):
    panel._node.value = head
    assert panel._graph.selected == [head]
    panel.select("m0", head, "m0")
    assert panel._graph.selected == ["m0", head]
    panel._node.value = f" {head.upper()} "
    assert panel.nodes == (head,) and panel._node.value == head
    assert NodePanel(panel.model, panel.circuit, node=head)._graph.selected == [head]


def test_a_name_that_was_typed_wrong_is_told_with_the_nearest(panel, head):
    panel.select(head)
    panel._node.value = "a1.h77"
    assert "no node" in panel._message.value and "a1.h" in panel._message.value
    assert panel.nodes == (head,)
    panel._node.value = "<script>"
    assert "&lt;script&gt;" in panel._message.value and "a&lt;layer&gt;" in panel._message.value


def test_nodes_of_the_circuit_are_offered_strongest_first(panel, circuit):
    strongest = circuit.nodes.sort_values("score", ascending=False)["node"].tolist()
    assert list(panel._node.options) == strongest


# --- another circuit ---


def test_another_circuit_keeps_node_and_prompt(panel, model, task, head):
    panel.select(head)
    panel._prompt.value = 2
    panel.wait(SOON)
    other = discover(model, task, "eap", edges=30, progress=False)
    graph = panel._graph.scene
    panel.show(other, task)
    panel.wait(SOON)
    assert panel.nodes == (head,) and panel._prompt.value == 2 and panel._graph.scene != graph
    pd.testing.assert_frame_equal(panel.tokens, component_logits(model, task, head, prompt=2, circuit=other))
    pd.testing.assert_frame_equal(panel.edges, node_edges(other, head))


def test_a_node_that_is_not_in_the_circuit_is_said_to_be_so(model, task):
    panel = NodePanel(model, Circuit.empty(model.graph), task, node="a0.h0")
    panel.wait(SOON)
    assert "not in this circuit" in text_of(panel) and panel.tokens is not None


def test_without_a_task_only_edges_are_shown(model, circuit, head):
    panel = NodePanel(model, circuit, node=head)
    panel.wait(SOON)
    assert panel.tokens is None and len(panel.edges) and panel._run_button.disabled
    assert "not at hand" in text_of(panel)
    with pytest.raises(SettingError, match="not at hand"):
        panel.ablate()


def test_without_a_circuit_the_full_model_is_looked_at(model, task):
    panel = NodePanel(model, None, task, node="a1.h1")
    panel.wait(SOON)
    pd.testing.assert_frame_equal(
        panel.tokens, component_logits(model, task, "a1.h1", prompt=int(task.val.ranks.argmin()))
    )
    assert panel.edges is None and panel._where.disabled and "iframe" not in Tags(panel.to_html()).tags
    panel.ablate()
    panel.wait(SOON)
    assert set(panel.ablated["run"]) == {"full model"}


def test_an_answer_for_a_circuit_that_is_gone_is_not_drawn(panel, model, task, head, monkeypatch):
    """The latest request wins; so does the latest circuit."""
    started, go = threading.Event(), threading.Event()
    other = discover(model, task, "eap", edges=30, progress=False)  # before the panel has the model to itself

    def slow(*args: Any, **more: Any) -> Any:
        started.set()
        assert go.wait(SOON)
        return component_logits(*args, **more)

    monkeypatch.setattr(nodepanel, "component_logits", slow)
    panel.select(head)
    assert started.wait(SOON)
    panel.show(other, task)
    go.set()
    panel.wait(SOON)
    pd.testing.assert_frame_equal(
        panel.tokens, component_logits(model, task, head, prompt=int(task.val.ranks.argmin()), circuit=other)
    )


# --- refusing ---


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m, c, t: NodePanel(m, c, t, node="m9"), CircuitError, "no node 'm9'"),
        (lambda m, c, t: NodePanel(m, c, t, k=0), SettingError, "k=0"),
        (lambda m, c, t: NodePanel(m, Circuit.empty(Graph(7, 3)), t), CircuitError, "7 layers"),
        (lambda m, c, t: NodePanel(m, c, t).ablate(), SettingError, "Choose a node"),
        (lambda m, c, t: NodePanel(m, c, t, node="logits").ablate(), SettingError, "logits"),
    ],
)
def test_what_cannot_be_meant_is_refused(model, circuit, task, call, kind, words):
    with pytest.raises(kind, match=words):
        call(model, circuit, task)


def test_an_error_while_looking_is_said_and_the_edges_stay(panel, head, monkeypatch):
    def broken(*args: Any, **more: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(nodepanel, "component_logits", broken)
    panel.select(head)
    with pytest.raises(MemoryError):
        panel.wait(SOON)
    assert "not enough memory" in panel._message.value and len(panel.edges) and panel._joined.value


# --- what is drawn ---


def test_tokens_that_are_markup_are_shown_as_text(panel, model, head, monkeypatch):
    texts = iter(HOSTILE * 20)
    monkeypatch.setattr(type(model.tokenizer), "decode", lambda *args, **more: next(texts))
    panel.select(head)
    panel.wait(SOON)
    panel.ablate()
    panel.wait(SOON)
    for source in (*(html.value for html in every(panel.widget, W.HTML)), panel.to_html()):
        assert set(Tags(source).tags) <= ALLOWED
    assert any(text[:20] in Tags(panel._writes.value).text for text in HOSTILE if "script" in text)


def test_a_panel_without_a_node_says_what_to_do(panel):
    panel.wait(SOON)
    assert "Click a node" in text_of(panel) and panel.state == "idle"
