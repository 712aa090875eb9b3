"""The widget: traits are checked, steps undone, hostile text is text, and a page without a kernel keeps it all."""

from __future__ import annotations

import html
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import traitlets

import kcwb
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.paths import strongest_paths
from kcwb.discovery.discover import discover
from kcwb.errors import CircuitError, SettingError
from kcwb.evaluation.play import Play
from kcwb.models.graph import Graph
from kcwb.tasks.task import make_task
from kcwb.workbench import lasting
from kcwb.workbench.graph import kept
from kcwb.workbench.graph.page import GraphView, graph_view
from kcwb.workbench.graph.widget import CircuitGraph
from tests.hostile import HOSTILE, SURROGATE
from tests.tasks import known_relation
from tests.workbench.ensembles import KEPT, TWINS, ensemble_of
from tests.workbench.pages import circuit_of

GRAPH = Graph(n_layers=2, n_heads=2)
EDGES = {
    "input->a0.h1<v>": 1.0, "a0.h1->m0": 0.5, "a0.h1->a1.h0<q>": -0.4, "m0->a1.h0<v>": 0.3, "a1.h0->logits": 0.8,
    "m0->logits": 0.1,
}  # fmt: skip
FACT = {
    "prompt": "The capital of France is", "answer": "Paris", "before": {"p": 0.8, "rank": 1, "top": [["Paris", 0.8]]},
    "after": {"p": 0.1, "rank": 7, "top": [["Lyon", 0.3]]},
}  # fmt: skip
READ_ONE = {
    "prompt": "The capital of France is", "answer": "Paris", "tokens": ["The", "France"], "attention": [0.25, 0.75],
    "at": 1, "query": [["a0.h1", 0.5], ["m0", -0.25]], "key": [["input", 1.0]], "writes": [["Paris", 2.0], ["\n", 0.5]],
}  # fmt: skip
SHORT = {"number": 0, "tokens": ["a", "b"], "heads": [[1000, 500]]}  # of three numbers
READ = {"node": "a1.h0", "runs": [{"run": "the full model", "prompts": [READ_ONE, READ_ONE]}]}
NAMES = [text for text in HOSTILE if "\0" not in text and len(text) <= 120]


@pytest.fixture
def circuit() -> Circuit:
    return Circuit.from_edges(GRAPH, EDGES)


@pytest.fixture
def graph(circuit: Circuit) -> CircuitGraph:
    return CircuitGraph(circuit, title="Capitals")


def test_it_draws_what_the_page_draws(graph: CircuitGraph, circuit: Circuit) -> None:
    assert graph.scene == circuit_of(graph_view(circuit, title="Capitals"))["scene"] | {
        "edges": graph.scene["edges"], "nodes": graph.scene["nodes"],
    }  # fmt: skip
    assert [node["name"] for node in graph.scene["nodes"]] == list(circuit.nodes["node"])
    assert graph.circuit is circuit and kcwb.CircuitGraph is CircuitGraph
    ensemble = ensemble_of(KEPT, TWINS)
    drawn = CircuitGraph(ensemble)
    assert drawn.scene["sure"] and drawn.circuit is not None
    assert drawn.circuit.kept.equal(ensemble.consensus().kept)


# --- what is refused ---

WRONG = [
    ("selected", ["a9.h9"], "selected: .*there is no node 'a9.h9'"),
    ("selected", 5, "selected"),
    ("selected", [3], "selected=.* is not a list of names"),
    ("selected_edges", ["input->nowhere"], "selected_edges: "),
    ("pinned", [["a0.h1"]], "pinned=.* is not a list of names"),
    ("cut", ["input"], "cut: there is no edge 'input'"),
    ("cut", ["input->m1"], "cut: input->m1 is not in the circuit"),
    ("forced", ["input->a0.h1<v>"], "forced: input->a0.h1<v> is in the circuit"),
    ("forced", ["logits->m0"], "forced: "),
    ("groups", {"one": ["a0.h1"], "two": ["a0.h1"]}, "groups: 'a0.h1' is in 'one' and in 'two'"),
    ("groups", {"one": ["x"]}, "groups.'one'.: .*there is no node 'x'"),
    ("groups", {"one": []}, "groups: 'one' has no name or no nodes"),
    ("groups", {"x" * 121: []}, "groups=.* is not a table by names"),
    ("names", {"a0.h1": "x" * 121}, "names.'a0.h1'.=.* is not text of at most 120 letters"),
    ("names", {"a0.h1": SURROGATE}, "names.'a0.h1'.=.* is not text"),
    ("notes", {"a0.h1": 5}, "notes.'a0.h1'.=5 is not text"),
    ("threshold", -1, "threshold=-1"),
    ("threshold", float("nan"), "threshold=nan is not a number"),
    ("confidence", 1.5, "confidence=1.5 is not a number from 0 to 1"),
    ("answers", {"facts": [{"prompt": "x"}]}, "answers=.* is not "),
    ("answers", {"facts": [FACT | {"before": {"p": float("nan"), "rank": 1}}]}, "answers=.* with finite numbers"),
    ("answers", {"facts": object()}, "answers=.* is not "),
    ("reading", {"node": "m0"}, "reading=.* is not "),
    ("reading", {"node": "m9", "runs": []}, "reading.'node'.: there is no node 'm9'"),
    ("reading", READ | {"runs": [{"run": "x", "prompts": []}]}, "reading=.* is not "),
    ("reading", {"node": "m0", "runs": [{"run": "x", "prompts": [READ_ONE | {"tokens": []}]}]}, "reading=.* is not "),
    ("reading", {"node": "m0", "runs": [{"run": "x", "prompts": [READ_ONE | {"key": [[1, 1.0]]}]}]}, "reading=.* is"),
    ("reading", {"node": "m0", "runs": [{"run": "x", "prompts": [READ_ONE | {"layer": {}}]}]}, "reading=.* is not "),
    ("reading", {"node": "m0", "runs": [{"run": "x", "prompts": [READ_ONE | {"layer": SHORT}]}]}, "reading=.* is not "),
    ("paths", [["input", "m9"]], "paths: .*there is no node 'm9'"),
    ("paths", [3], "paths=3 is not a list of names"),
    ("view", {"scale": 0}, "view=.* is not what is looked at"),
    ("view", {"hidden": "x"}, "view=.* is not what is looked at"),
    ("view", {"nothing": 1}, "view=.* is not what is looked at"),
    ("question", {"subject": "x"}, "question=.* has no prompt"),
    ("question", {"prompt": 5}, "question=.* with a text for each"),
    ("question", {"prompt": "x", "more": "y"}, "question=.* with a text for each"),
    ("question", {"prompt": "x" * 4001}, "question: the prompt has 4,001 letters; at most 4,000 are asked"),
    ("answers", {"own": {"prompt": "x", "answer": "y", "before": {"p": "z"}}}, "answers=.* is not "),
    ("answers", {"own": {"problem": 5}}, "answers=.* is not "),
    ("asked", "delete", "asked='delete' is none of undo, redo, explain"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_nonsense_from_python_raises_in_one_line_and_the_old_value_stays(
    graph: CircuitGraph, name: str, value: Any, words: str
) -> None:
    before = getattr(graph, name)
    with pytest.raises(traitlets.TraitError, match=words) as caught:
        setattr(graph, name, value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert getattr(graph, name) == before and not graph.problem and not graph._steps.past


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_nonsense_from_the_page_becomes_a_problem_and_all_else_is_taken(
    graph: CircuitGraph, name: str, value: Any, words: str
) -> None:
    before, beside = getattr(graph, name), "pinned" if name != "pinned" else "selected"
    graph.set_state({name: value, beside: ["m0"]})
    assert getattr(graph, name) == before and getattr(graph, beside) == ["m0"]
    assert re.search(words, graph.problem)
    assert "\n" not in graph.problem
    graph.set_state({beside: []})
    assert graph.problem == ""


@pytest.mark.parametrize(
    ("name", "value"), [("scene", {}), ("height", -1), ("live", False), ("busy", True), ("asks", 1)]
)
def test_the_page_does_not_set_what_is_pythons(graph: CircuitGraph, name: str, value: Any) -> None:
    before = getattr(graph, name)
    graph.set_state({name: value})
    assert getattr(graph, name) == before and name in graph.problem


def test_bad_settings_are_refused(circuit: Circuit) -> None:
    with pytest.raises(SettingError, match=r"has no 'pined'\. Did you mean 'pinned'"):
        CircuitGraph(circuit, pined=["m0"])
    with pytest.raises(SettingError, match="height=0"):
        CircuitGraph(circuit, height=0)
    with pytest.raises(traitlets.TraitError, match="there is no node"):
        CircuitGraph(circuit, pinned=["a7.h7"])
    blank = CircuitGraph()
    for name, value in (("selected", ["m0"]), ("cut", ["input->m0"])):
        with pytest.raises(traitlets.TraitError, match="no circuit yet"):
            setattr(blank, name, value)
    for ask in (blank.as_view, lambda: blank.played):
        with pytest.raises(CircuitError, match="no circuit yet"):
            ask()
    assert blank._repr_html_() == ""


def test_edges_are_kept_by_their_full_names_and_once(graph: CircuitGraph) -> None:
    graph.cut = ["m0->logits", "m0->logits"]
    assert graph.cut == ["m0->logits"]


# --- steps ---


def test_steps_are_undone_and_redone(graph: CircuitGraph) -> None:
    rng, states = random.Random(0), [([], [])]
    absent = ["input->m1", "m1->logits", "input->logits"]
    while len(states) < 130:
        cut = sorted(rng.sample(list(EDGES), rng.randrange(4)))
        forced = sorted(rng.sample(absent, rng.randrange(3)))
        if (cut, forced) != states[-1]:
            graph.set_state({"cut": cut, "forced": forced})  # both in one step, as the page sends them
            states.append((cut, forced))
    for wanted in states[-2::-1]:
        graph.undo()
        assert (graph.cut, graph.forced) == wanted
    graph.undo()
    assert (graph.cut, graph.forced) == ([], [])
    for wanted in states[1:]:
        graph.redo()
        assert (graph.cut, graph.forced) == wanted
    graph.redo()
    graph.undo(129)
    assert (graph.cut, graph.forced) == ([], [])
    graph.redo(5)
    assert (graph.cut, graph.forced) == states[5]
    graph.cut = ["m0->logits"]
    graph.redo()  # there is nothing to redo after a new step
    assert graph.cut == ["m0->logits"]


def test_the_page_asks_to_undo_and_what_it_asked_is_cleared(graph: CircuitGraph) -> None:
    graph.cut = ["m0->logits"]
    for asked, wanted in (("undo", []), ("redo", ["m0->logits"]), ("undo", [])):
        graph.set_state({"asked": asked})
        assert graph.cut == wanted and graph.asked == ""


def test_played_is_the_circuit_without_what_is_cut_and_with_what_is_forced(graph: CircuitGraph) -> None:
    graph.cut, graph.forced = ["a0.h1->m0"], ["input->m1"]
    wanted = Circuit.from_edges(GRAPH, [*(set(EDGES) - {"a0.h1->m0"}), "input->m1"])
    assert graph.played.kept.equal(wanted.kept)
    assert graph.played.provenance["cut"] == ["a0.h1->m0"] and graph.played.provenance["forced"] == ["input->m1"]


def test_explain_lights_the_strongest_paths_of_what_is_left(graph: CircuitGraph, circuit: Circuit) -> None:
    graph.set_state({"asked": "explain"})
    best = strongest_paths(circuit, 1)["edges"][0]
    assert graph.paths[0] == ["input", "a0.h1", "a1.h0", "logits"] and best[1] == "a0.h1->a1.h0<q>"
    graph.cut = ["a0.h1->a1.h0<q>"]
    graph.explain()
    assert graph.paths[0] == ["input", "a0.h1", "m0", "a1.h0", "logits"]
    graph.selected = ["m0"]
    graph.explain()
    assert all("m0" in path for path in graph.paths)
    graph.cut = ["input->a0.h1<v>"]
    graph.explain()
    assert graph.paths == [] and "No path" in graph.problem


def test_another_circuit_keeps_what_can_be_said_of_it(graph: CircuitGraph) -> None:
    graph.cut, graph.forced = ["a0.h1->m0", "m0->logits"], ["input->m1"]
    graph.pinned, graph.names, graph.groups = ["m0"], {"m0": "first"}, {"both": ["m0", "a0.h1"]}
    graph.selected = ["m0"]
    other = Circuit.from_edges(GRAPH, ["input->m1", "m0->logits", "input->m0", "m1->logits"])
    graph.show(other)
    assert (graph.cut, graph.forced, graph.selected) == (["m0->logits"], [], [])
    assert (graph.pinned, graph.names, graph.groups) == (["m0"], {"m0": "first"}, {"both": ["m0", "a0.h1"]})
    graph.undo()
    assert graph.cut == ["m0->logits"]
    graph.show(Circuit.from_edges(Graph(n_layers=1, n_heads=1), ["input->a0.h0<v>", "a0.h0->logits"]))
    assert (graph.cut, graph.groups, graph.names, graph.pinned) == ([], {"both": ["m0"]}, {"m0": "first"}, ["m0"])
    graph.compare(other, Circuit.empty(GRAPH), names=("A", "B"))
    assert graph.scene["sides"]["left"] == "only A (4)"


def test_what_was_done_is_kept_with_the_circuit_and_taken_up(
    graph: CircuitGraph, circuit: Circuit, tmp_path: Any
) -> None:
    graph.cut, graph.forced, graph.pinned = ["m0->logits"], ["input->m1"], ["m0"]
    graph.groups, graph.names, graph.notes = {"both": ["m0", "a0.h1"]}, {"m0": "<b>"}, {"m0": "adds"}
    circuit.with_session(graph.session).save(tmp_path / "circuit.json")
    other = CircuitGraph(Circuit.load(tmp_path / "circuit.json"))
    for name in ("cut", "forced", "pinned", "groups", "names", "notes"):
        assert getattr(other, name) == getattr(graph, name)
    assert other.session == graph.session and other.session.compare(graph.session).empty
    other.undo()
    assert other.cut == ["m0->logits"]
    with pytest.raises(CircuitError, match="no circuit yet"):
        _ = CircuitGraph().session


# --- answers ---


def test_each_step_is_answered_as_play_does(tiny: Any) -> None:
    model = tiny("llama")
    task = make_task(model, known_relation(model, 16, unknown=6), n=4)
    circuit = discover(model, task, "eap", edges=30, progress=False)
    graph = CircuitGraph(circuit)
    graph.play(Play(model, circuit, task))
    assert graph.answers == Play(model, circuit, task).as_traits()
    names = [f"{row.sender}->{row.receiver}" for row in circuit.edges.itertuples()]
    absent = next(name for name in ("input->logits", "input->m0", "input->m1") if name not in names)
    rng = random.Random(1)
    for _ in range(6):
        cut, forced = rng.sample(names, 3), rng.choice([[], [absent]])
        graph.set_state({"cut": cut, "forced": forced})
        wanted = Play(model, circuit, task)
        for step, some in ((wanted.cut, cut), (wanted.force, forced)):
            if some:
                step(*some)
        assert graph.answers == wanted.as_traits() and not graph.busy and not graph.problem
    for _ in range(10):
        graph.undo()
    assert graph.answers == Play(model, circuit, task).as_traits()
    with pytest.raises(CircuitError, match="another circuit"):
        CircuitGraph(Circuit.full(model.graph)).play(Play(model, circuit, task))
    graph.show(Circuit.full(model.graph))
    assert graph.answers == {}


def test_a_prompt_of_ones_own_is_asked_after_each_step_and_what_is_wrong_with_it_told(tiny: Any) -> None:
    model = tiny("llama")
    task = make_task(model, known_relation(model, 16, unknown=6), n=4)
    circuit = discover(model, task, "eap", edges=30, progress=False)
    graph, wanted = CircuitGraph(circuit), Play(model, circuit, task)
    question = {"prompt": "w80 w3 w9", "subject": "w3", "answer": "w41"}
    graph.question = question
    assert not graph.asks and graph.answers == {}
    graph.play(Play(model, circuit, task))
    wanted.ask(**question)
    assert graph.asks and graph.answers == wanted.as_traits()
    edge = f"{circuit.edges['sender'][0]}->{circuit.edges['receiver'][0]}"
    graph.set_state({"cut": [edge]})
    wanted.cut(edge)
    assert graph.answers == wanted.as_traits() and graph.answers["own"]["after"] != graph.answers["own"]["before"]
    graph.set_state({"question": {"prompt": "w80 w3", "subject": "w9"}})
    told = {"problem": "The subject 'w9' does not stand in the prompt in these letters.", "prompt": "w80 w3"}
    assert graph.answers["own"] == told | {"subject": "w9"} and graph.answers["facts"] == wanted.as_traits()["facts"]
    graph.set_state({"cut": [], "question": {"prompt": "w80 w3"}})
    assert graph.answers["own"]["prompt"] == "w80 w3" and "problem" not in graph.answers["own"]
    assert circuit_of(graph.as_view())["answers"] == graph.answers
    graph.question = {}
    assert "own" not in graph.answers and not graph.problem
    graph.show(circuit)
    assert not graph.asks  # until it is played again


# --- without a kernel ---


def test_the_fallback_holds_all_that_a_person_did(graph: CircuitGraph) -> None:
    texts = {node: text for node, text in zip(GRAPH.node_names, NAMES, strict=False)}
    graph.names, graph.notes = texts, texts
    graph.groups = {text: [node] for node, text in zip(GRAPH.node_names, NAMES, strict=False)}
    graph.cut, graph.pinned, graph.answers = ["m0->logits"], ["m0"], {"facts": [FACT], "loss_before": 0.1}
    graph.reading = READ
    data, _ = graph._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    view = graph.as_view()
    assert isinstance(view, GraphView) and html.escape(view.page, quote=True) in data["text/html"]
    held = circuit_of(view)
    for name in ("names", "notes", "groups", "cut", "pinned", "answers", "reading"):
        assert held[name] == getattr(graph, name)
    assert "selected" not in held and "asked" not in held


def test_where_it_is_shown_a_drawing_follows_it(graph: CircuitGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, dict[str, Any]] = {}

    def display(bundle: dict[str, Any], *, raw: bool, display_id: str | bool = False) -> Any:
        name = display_id if isinstance(display_id, str) else str(len(shown))
        shown[name] = bundle
        return SimpleNamespace(display_id=name)

    monkeypatch.setattr(lasting, "display", display)
    monkeypatch.setattr(lasting, "update_display", display)
    graph._ipython_display_()
    widget, drawn = shown.values()
    assert lasting.VIEW in widget and not widget["text/html"] and lasting.VIEW not in drawn
    graph.cut = ["m0->logits"]
    again, renewed = shown.values()
    assert again is widget and html.escape(graph.as_view().page, quote=True) in renewed["text/html"]
    assert f"kcwb-w-{graph.model_id}" in graph._dom_classes and f"kcwb-p-{graph.model_id}" in renewed["text/html"]


def test_a_step_is_drawn_once_for_the_saved_notebook_with_its_answers(tiny: Any, monkeypatch: Any) -> None:
    model = tiny("llama")
    task = make_task(model, known_relation(model, 16, unknown=6), n=4)
    circuit = discover(model, task, "eap", edges=30, progress=False)
    graph, drawn = CircuitGraph(circuit), []
    monkeypatch.setattr(lasting, "display", lambda *args, **more: SimpleNamespace(display_id="one"))
    monkeypatch.setattr(lasting, "update_display", lambda *args, **more: None)
    graph._ipython_display_()
    graph.play(Play(model, circuit, task))
    draw = kept.view_of
    monkeypatch.setattr(kept, "view_of", lambda *args: drawn.append(args[2]["answers"]) or draw(*args))
    edge, other = (f"{row.sender}->{row.receiver}" for row in circuit.edges.head(2).itertuples())
    for step in (
        lambda: graph.set_state({"cut": [edge]}),
        graph.undo,
        graph.redo,
        lambda: setattr(graph, "cut", [other]),
    ):
        step()
        assert drawn == [graph.answers]
        drawn.clear()


@pytest.mark.parametrize("start", range(0, len(NAMES), 6))
def test_hostile_names_come_back_as_they_are(graph: CircuitGraph, start: int) -> None:
    texts = dict(zip(GRAPH.node_names, NAMES[start : start + 6], strict=False))
    graph.set_state({"names": texts, "notes": texts, "groups": {text: [node] for node, text in texts.items()}})
    assert graph.names == graph.notes == texts and not graph.problem
    with pytest.raises(traitlets.TraitError, match="is not a table"):
        graph.groups = {"a\0b": []}


def test_the_module_is_small_and_asks_nothing_of_the_network(graph: CircuitGraph) -> None:
    source = str(graph._esm)
    assert len(source.encode()) < 200_000 and source.endswith("export default { render };\n")
    addresses = re.findall(r"https?://[^\"'`\s]+", source)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # a name, never asked for
    assert not re.search(r"\bimport\b|innerHTML|insertAdjacentHTML|document\.write|eval\(", source)


def test_a_closed_widget_is_gone(graph: CircuitGraph) -> None:
    graph.close()
    assert graph.comm is None
    assert torch.equal(graph.played.kept, graph.circuit.kept)
