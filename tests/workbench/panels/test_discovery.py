"""The discovery panel: its buttons do what the plain functions do, errors are said in words, nothing good is lost."""

from __future__ import annotations

import json
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from typing import Any

import ipywidgets as W
import pandas as pd
import pytest

import kcwb
from kcwb.discovery.discover import discover
from kcwb.errors import CircuitError, DataError, KcwbError, SettingError
from kcwb.evaluation.sizes import size_curve
from kcwb.reading.nodes import node_edges
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.task import make_task
from kcwb.workbench import lasting
from kcwb.workbench.graph.reading import read_node
from kcwb.workbench.panels import discovery as panels
from kcwb.workbench.panels import life, results, search
from kcwb.workbench.panels.discovery import DiscoveryPanel
from kcwb.workbench.report.headline import HEADLINE, headline_of
from tests.hostile import HOSTILE
from tests.tasks import known_relation
from tests.tiny import tiny_model

SOON = 60.0


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def relation(model) -> Relation:
    return known_relation(model, 16, unknown=6)


@pytest.fixture
def panel(model, relation) -> Iterator[DiscoveryPanel]:
    panel = DiscoveryPanel(model, relation, edges=60, n=4, draws=2)
    yield panel
    panel.cancel()
    assert panel._runner.wait(SOON)


@pytest.fixture
def found(panel) -> DiscoveryPanel:
    """A panel that has run once."""
    panel.run()
    panel.wait(SOON)
    return panel


class Tags(HTMLParser):
    """All tags of a piece of HTML, and its text; the page inside an iframe is an attribute."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def shown_text(panel: DiscoveryPanel) -> str:
    return Tags(" ".join(html.value for html in every(panel.widget, W.HTML))).text


def every(widget: W.Widget, kind: type) -> list[Any]:
    below = [found for child in getattr(widget, "children", ()) for found in every(child, kind)]
    return ([widget] if isinstance(widget, kind) else []) + below


# --- the same as in a script ---


def test_run_finds_what_the_plain_functions_find(found, model, relation):
    task = make_task(model, relation, n=4)
    circuit = discover(model, task, edges=60, progress=False)
    assert found.state == "done" and found.circuit.digest == circuit.digest
    assert found.task.val.facts == task.val.facts
    expected = kcwb.completeness(model, circuit, task, draws=2, progress=False)
    pd.testing.assert_frame_equal(found.completeness, expected)


def test_roles_colour_the_graph_and_stand_beside_a_head(found, model, relation):
    assert found.roles is None and not found._graph.scene["withRoles"]
    found._roles_button.click()
    found.wait(SOON)
    expected = kcwb.head_roles(model, None, make_task(model, relation, n=4), progress=False)
    pd.testing.assert_frame_equal(found.roles, expected)
    head = expected.iloc[0]
    found.nodes.select(head["node"])
    found.wait(SOON)
    assert f"{head['role']}: {head['D_S']:+.2f} logits from the subject" in shown_text(found)
    drawn = found._graph.scene
    found.resize(30)  # roles are the model's heads', whatever the circuit
    assert found.roles is not None and found._graph.scene != drawn
    found.controls.seed.value = 9
    found.run()
    found.wait(SOON)
    assert found.roles is None  # other facts


def test_a_metric_without_a_gradient_is_refused_in_words_and_nothing_runs(panel):
    panel.controls.method.value, panel.controls.metric.value = "eap", "kl"
    panel._run_button.click()
    panel.wait(SOON)
    assert "that of kl is zero" in Tags(panel._message.value).text
    assert not panel.history


def test_roles_without_facts_are_refused_in_words(panel):
    panel._roles_button.click()
    assert "press Run" in panel._message.value


def test_every_control_reaches_the_function(panel, relation, model):
    panel.controls.method.value = "exact"
    panel.controls.ablation.value = "zero"
    panel.controls.metric.value = "kl"
    panel.controls.n.value, panel.controls.seed.value, panel.controls.edges.value = 3, 5, 40
    panel._run_button.click()
    panel.wait(SOON)
    task = make_task(model, relation, n=3, seed=5)
    expected = discover(model, task, "exact", ablation="zero", metric="kl", edges=40, progress=False)
    assert panel.circuit.digest == expected.digest
    assert {key: panel.circuit.provenance[key] for key in ("method", "ablation", "metric", "n", "seed")} == {
        "method": "exact",
        "ablation": "zero",
        "metric": "kl",
        "n": 3,
        "seed": 5,
    }


def test_acdc_is_sized_by_tau(panel, model, relation):
    assert panel.controls.edges.layout.display == "" and panel.controls.tau.layout.display == "none"
    panel.controls.method.value = "acdc"
    assert panel.controls.edges.layout.display == "none" and panel.controls.tau.layout.display == ""
    panel.controls.tau.value = 0.05
    panel._run_button.click()
    panel.wait(SOON)
    expected = discover(model, make_task(model, relation, n=4), "acdc", tau=0.05, progress=False)
    assert panel.circuit.digest == expected.digest


def test_the_slider_cuts_anew_without_scoring(found, monkeypatch):
    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(search, "discover", never)
    before, graph = found.circuit, found._graph.scene
    found.controls.edges.value = 25
    assert found.circuit.digest == kcwb.resize(before, edges=25).digest != before.digest
    assert found._graph.scene != graph
    found.wait(SOON)
    assert found.completeness.set_index("run").loc["circuit", "edges"].eq(found.circuit.n_edges).all()
    assert found.error is None


def test_a_size_that_is_refused_stops_no_test(found, monkeypatch):
    go, test = threading.Event(), panels.completeness

    def waiting(*args: Any, **more: Any) -> pd.DataFrame:
        go.wait(SOON)
        return test(*args, **more)

    monkeypatch.setattr(panels, "completeness", waiting)
    found.resize(30)
    with pytest.raises(SettingError):
        found.resize(0)
    go.set()
    found.wait(SOON)
    assert found.completeness is not None and found.state == "done"


def test_other_sizes_are_tested_when_asked_for_and_the_one_on_screen_is_marked(found, model):
    assert found.sizes.to_html() == ""
    found.sizes.button.click()
    found.wait(SOON)
    expected = size_curve(model, found.circuit, found.task, progress=False)
    drawn = found.sizes.drawn.value
    assert drawn.count("<circle") == len(expected) and drawn.count("dasharray") == 1 and drawn in found.to_html()
    for row in expected.itertuples():
        assert f"{row.split}: {row.edges} edges, Hit@10 {row.hit:.2f} [{row.low:.2f}, {row.high:.2f}]" in drawn
    assert set(re.findall(r'<text [^>]*style="fill:([^"]+)"', drawn)) == {"var(--kc-muted)"}  # read in any theme
    found.resize(30)
    found.wait(SOON)
    assert found.sizes.drawn.value not in ("", drawn)  # the mark has moved
    found.run()
    found.wait(SOON)
    assert found.sizes.drawn.value == ""


def test_sizes_of_nothing_are_refused_in_words(panel):
    panel.sizes.button.click()
    assert "press Run" in panel._message.value


@pytest.mark.parametrize("edges", [-3, 0, float("inf")])
def test_sizes_are_drawn_of_a_circuit_whose_file_tells_no_size(found, tmp_path, edges):
    source = found.circuit.provenance
    told = {**source, "parameters": {**source["parameters"], "edges": edges}}
    replace(found.circuit, provenance=told).save(tmp_path / "circuit.json")
    found.load(tmp_path / "circuit.json")
    found.wait(SOON)
    found.sizes.measure()
    found.wait(SOON)
    assert "<circle" in found.sizes.drawn.value and found.sizes.drawn.value.count("dasharray") == 0


@pytest.mark.parametrize("work", ["find_roles", "ask", "measure"])
def test_a_circuit_is_tested_also_if_other_work_comes_between(panel, monkeypatch, work):
    started, calls = threading.Event(), []

    def slow_at_first(*args: Any, progress: Any, **more: Any) -> pd.DataFrame:
        calls.append(args)
        started.set()
        while len(calls) == 1:
            progress(0, 1, "")  # until it is stopped
            time.sleep(0.005)
        return kcwb.completeness(*args, progress=progress, **more)

    monkeypatch.setattr(panels, "completeness", slow_at_first)
    panel.run()
    assert started.wait(SOON) and panel.completeness is None
    assert "not computed yet" in panel.to_html()
    getattr(panel.sizes if work == "measure" else panel, work)()
    panel.wait(SOON)
    assert panel.completeness is not None and len(calls) == 2
    assert "not computed yet" not in panel.to_html()


def test_a_test_that_was_cancelled_stays_cancelled(panel, monkeypatch):
    started = threading.Event()

    def slow(*args: Any, progress: Any, **more: Any) -> None:
        started.set()
        while True:
            progress(0, 1, "")
            time.sleep(0.005)

    monkeypatch.setattr(panels, "completeness", slow)
    panel.run()
    assert started.wait(SOON)
    panel.cancel()
    panel.wait(SOON)
    assert panel.state == "idle" and "not computed yet" in panel._pages["Is it the model?"].value


def test_the_slider_leaves_an_acdc_circuit_alone(panel):
    panel.controls.method.value = "acdc"
    panel.run()
    panel.wait(SOON)
    before = panel.circuit
    panel.controls.edges.value = 10
    assert panel.circuit is before and not panel._message.value


def test_a_slider_moved_during_discovery_counts(panel, monkeypatch):
    started, go = threading.Event(), threading.Event()

    def slow(*args: Any, **more: Any) -> Any:
        started.set()
        assert go.wait(SOON)
        return discover(*args, **more)

    monkeypatch.setattr(search, "discover", slow)
    panel.run()
    assert started.wait(SOON)
    panel.controls.edges.value = 30
    go.set()
    panel.wait(SOON)
    assert panel.circuit.provenance["parameters"]["edges"] == 30


# --- choosing ---


def test_a_relation_brings_its_templates(panel):
    panel.picker.relation.value = "country_capital"
    texts = kcwb.load_relation("country_capital").prompt_templates_zs
    assert [label for label, _ in panel.picker.template.options] == list(texts)
    assert panel.settings["template"] == 0


def test_relations_are_grouped_by_category(panel):
    labels = [label for label, _ in panel.picker.relation.options]
    assert labels == sorted(labels) and "factual: country_capital" in labels and "factual: tiny" in labels


def test_a_template_of_ones_own_is_offered(model, relation):
    panel = DiscoveryPanel(model, relation, template="w5 {} w6", edges=60)
    assert panel.settings["template"] == "w5 {} w6"
    assert [label for label, _ in panel.picker.template.options] == [*relation.prompt_templates_zs, "w5 {} w6"]


def test_a_relation_file_is_taken(model, relation, tmp_path):
    relation.save(tmp_path / "mine.json")
    assert DiscoveryPanel(model, tmp_path / "mine.json", edges=60).settings["relation"] == "tiny"
    assert DiscoveryPanel(model, str(tmp_path / "mine.json"), edges=60).settings["relation"] == "tiny"


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"method": "edp"}, SettingError, "eap"),
        ({"metric": "nil"}, SettingError, "nll"),
        ({"ablation": "men"}, SettingError, "mean"),
        ({"relation": "country_capitol"}, DataError, "country_capital"),
        ({"template": 9}, SettingError, "zero-shot templates"),
        ({"edges": 0}, SettingError, "edges=0"),
        ({"within": 10**6}, SettingError, "within=1000000"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_at_once(model, relation, settings, kind, words):
    with pytest.raises(kind, match=words):
        DiscoveryPanel(model, **{"relation": relation, "edges": 60, **settings})


def test_a_method_that_takes_no_number_of_edges_is_not_refused_for_one(model, relation):
    assert model.graph.n_edges < 300
    with DiscoveryPanel(model, relation, method="acdc") as panel:
        assert "edges" not in panel.settings
        panel.controls.method.value = "eap"
        assert panel.settings["edges"] == model.graph.n_edges
    with pytest.raises(SettingError, match="edges=300"):
        DiscoveryPanel(model, relation, method="eap")


# --- going wrong ---


def test_an_error_is_said_in_the_panel_and_the_last_circuit_stays(found):
    before, graph = found.circuit, found._graph.scene
    found.controls.method.value, found.controls.tau.value = "acdc", -1.0
    found._run_button.click()
    with pytest.raises(SettingError, match="above 0"):
        found.wait(SOON)
    assert found.state == "failed" and "above 0" in found._message.value
    assert found.circuit is before and found._graph.scene == graph
    found.controls.tau.value = 0.01
    found._run_button.click()
    found.wait(SOON)
    assert found.state == "done" and not found._message.value


def test_an_unforeseen_error_in_a_callback_is_said_too(found, monkeypatch):
    def broken(*args: Any, **more: Any) -> None:
        raise ZeroDivisionError("surprise <b>")

    monkeypatch.setattr(panels, "resize", broken)
    before = found.circuit
    found.controls.edges.value = 25
    assert "ZeroDivisionError: surprise &lt;b&gt;" in found._message.value
    assert found.circuit is before


def test_a_broken_relation_file_is_said_when_it_is_chosen(model, relation, tmp_path):
    relation.save(tmp_path / "mine.json")
    panel = DiscoveryPanel(model, relation, edges=60)
    panel.picker.relations["mine"] = tmp_path / "mine.json"
    panel.picker.relation.options = [*panel.picker.relation.options, ("own: mine", "mine")]
    (tmp_path / "mine.json").write_text("{")
    panel.picker.relation.value = "mine"
    assert "not JSON" in panel._message.value


def test_cancel_stops_within_a_second_and_another_run_follows(found, monkeypatch):
    before, started = found.circuit, threading.Event()

    def endless(*args: Any, progress: Any, **more: Any) -> None:
        for done in range(10_000):
            started.set()
            time.sleep(0.01)
            progress(done, 10_000, "edges")
        raise AssertionError("not cancelled")

    monkeypatch.setattr(search, "discover", endless)
    found._run_button.click()
    assert started.wait(SOON)
    assert found.state == "running" and not found._cancel_button.disabled
    clicked = time.monotonic()
    found._cancel_button.click()
    found.wait(SOON)
    assert time.monotonic() - clicked < 1
    assert found.state == "idle" and found.circuit is before and found._cancel_button.disabled
    monkeypatch.setattr(search, "discover", discover)
    found.controls.seed.value = 1
    found._run_button.click()
    found.wait(SOON)
    assert len(found.history) == 2 and found.circuit is not before


def test_progress_shows_what_is_left(panel):
    panel._stage, panel._stage_started = "Discovering the circuit", time.monotonic() - 10
    panel._report(1, 4, "90 edges")
    assert panel._bar.value == 0.25
    assert "Discovering the circuit: 1 of 4, 90 edges · 30 s left" in panel._status.value


def test_warnings_become_a_note(panel, monkeypatch):
    """As of facts that have no partner under resample ablation."""

    def warning(*args: Any, **more: Any) -> Any:
        warnings.warn("there is none for 'w3 <b>': left out", stacklevel=2)
        return discover(*args, **more)

    monkeypatch.setattr(search, "discover", warning)
    panel.run()
    panel.wait(SOON)
    assert "w3 &lt;b&gt;&#x27;: left out" in panel._message.value and "kc-note" in panel._message.value
    assert panel.circuit is not None


def test_each_of_two_panels_at_work_takes_its_own_warnings(model, relation, recwarn):
    """Python has one list of filters; what this thread warns of meanwhile goes where it always went."""
    usual = warnings.showwarning
    models = model, tiny_model("llama")  # on one model they would take turns
    panels_, both = [DiscoveryPanel(one, relation, edges=60) for one in models], threading.Barrier(3)

    def job(number: int, progress: Any) -> None:
        both.wait(SOON)
        for i in range(20):
            warnings.warn(f"panel {number}, {i}", stacklevel=1)
            progress(i, 20, "")
        both.wait(SOON)

    for number, panel in enumerate(panels_):
        panel._start(f"job {number}", partial(job, number))
    both.wait(SOON)
    warnings.warn("of the cell", stacklevel=1)
    both.wait(SOON)
    for panel in panels_:
        panel.wait(SOON)
    for number, panel in enumerate(panels_):
        told = Tags(panel._message.value).text.splitlines()
        assert told == [f"panel {number}, {i}" for i in range(20)]
    assert [str(warning.message) for warning in recwarn] == ["of the cell"]
    assert warnings.showwarning is usual


def test_waiting_is_limited(panel, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(search, "discover", lambda *args, **more: go.wait(SOON))
    panel.run()
    with pytest.raises(TimeoutError, match="still running"):
        panel.wait(0.05)
    panel.cancel()
    go.set()
    panel.wait(SOON)


# --- history and files ---


def test_runs_are_kept_shown_again_and_compared(found):
    first = found.circuit
    found.controls.seed.value = 3
    found._run_button.click()
    found.wait(SOON)
    second = found.circuit
    assert [one.circuit for one in found.history] == [first, second]
    assert (
        "Press Run" in found._comparison.numbers.value and found._comparison.graph.layout.display == "none"
    )  # drawn once it is looked at
    open_tab(found, "Compare runs")
    table = found._comparison.numbers.value
    assert str((first & second).n_edges) in Tags(table).text and f"{first.iou(second):.3g}" in table
    assert set(found._comparison.graph.scene["sides"]) == {"left", "right", "shared"}
    before = found._comparison.graph.scene
    found._runs.value = 0
    assert found.circuit is first and found._comparison.other.value == 1 and found._comparison.graph.scene != before


def test_one_run_cannot_be_compared(found):
    open_tab(found, "Compare runs")
    assert "Run once more" in found._comparison.numbers.value and found._comparison.graph.layout.display == "none"


def open_tab(panel: DiscoveryPanel, name: str) -> None:
    panel._tabs.selected_index = panel._tabs.titles.index(name)


# --- before a run ---


def test_asking_shows_what_the_model_knows(panel, monkeypatch):
    panel._ask_button.click()
    panel.wait(SOON)
    task = panel._search.task.value
    text = Tags(panel._pages["Facts"].value).text
    assert f"knows {task.n_known} of {task.n_facts} facts" in text and task.n_known == 10
    for prompts in (task.val, task.test):
        for fact, prompt, rank in zip(prompts.facts, prompts.texts, prompts.ranks.tolist(), strict=True):
            assert prompt in text and fact.object in text and str(rank) in text
    assert panel._result.layout.display == "" and panel._tabs.selected_index == panel._tabs.titles.index("Facts")
    assert panel.circuit is None and not panel.history
    monkeypatch.setattr(search, "make_task", lambda *args, **more: pytest.fail("asked again"))
    panel.run()
    panel.wait(SOON)
    assert panel.task is task


def test_the_time_is_predicted_without_running(panel, monkeypatch):
    assert panel._predict_button.layout.display == "none"
    panel.controls.method.value = "acdc"
    assert panel._predict_button.layout.display == ""
    asked = []

    def seconds(*args: Any, **more: Any) -> float:
        asked.append((args, more))
        return 75.4

    monkeypatch.setattr(search, "predict", seconds)
    panel._predict_button.click()
    panel.wait(SOON)
    ((_, task), more) = asked[0]
    how = {"method": "acdc", "metric": "nll", "ablation": None, "tau": panel.controls.tau.value, "within": None}
    assert task is panel._search.task.value and more == how
    assert f"{panel.model.graph.n_edges:,} edges and 4 facts takes about 1 min 15 s" in Tags(panel._message.value).text
    assert not panel.history


def test_a_run_of_acdc_says_its_predicted_time_and_what_is_left(panel, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(search, "predict", lambda *args, **more: 75.4)
    monkeypatch.setattr(life, "_REDRAW", 0.0)
    panel._status.observe(lambda change: lines.append(Tags(change["new"]).text), "value")
    panel.controls.method.value = "acdc"
    panel.run()
    panel.wait(SOON)
    told = [line for line in lines if line.startswith("Discovering the circuit (about 1 min 15 s)")]
    assert any("left" in line.partition("·")[2] for line in told)
    assert any("edges left" in line for line in told)


def test_acdc_within_a_preselection(panel, model, relation):
    assert panel.controls.within.layout.display == "none"
    panel.controls.method.value = "acdc"
    assert panel.controls.within.layout.display == ""
    panel.controls.within.value, panel.controls.tau.value = 50, 0.02
    assert panel.settings["within"] == 50
    panel._run_button.click()
    panel.wait(SOON)
    task = make_task(model, relation, n=4)
    searched = discover(model, task, ablation="mean", edges=50, progress=False)
    expected = discover(model, task, "acdc", ablation="mean", tau=0.02, within=searched, progress=False)
    assert panel.circuit.digest == expected.digest
    assert not bool((panel.circuit.kept & ~searched.kept).any())
    origin = panel.circuit.provenance["parameters"]["within"]
    assert origin["digest"] == searched.digest and panel.circuit.provenance["ablation"] == "mean"
    assert f"within {searched.n_edges:,}" in panel.history[0].label and "τ 0.02" in panel.history[0].label
    assert "gim" in Tags(panel.to_html()).text


def test_the_preselection_is_scored_once(panel, monkeypatch):
    methods: list[str] = []

    def counting(model: Any, task: Any, method: str = "eap-ig", **more: Any) -> Any:
        methods.append(method)
        return discover(model, task, method, **more)

    monkeypatch.setattr(search, "discover", counting)
    panel.controls.method.value, panel.controls.within.value = "acdc", 50
    for tau in (0.01, 0.05):
        panel.controls.tau.value = tau
        panel.run()
        panel.wait(SOON)
    assert methods == ["eap-ig", "acdc", "acdc"]


def test_attribution_is_not_timed_first(panel):
    with pytest.raises(SettingError, match="Only ACDC"):
        panel.predict()
    assert panel.state == "idle"


# --- the node panel in it ---


def test_a_click_in_the_graph_opens_the_node(found):
    node = found.circuit.nodes.query("kind == 'head'")["node"].iloc[0]
    found._graph.set_state({"selected": [node]})
    found.wait(SOON)
    assert found.nodes.nodes == (node,) and found.nodes.tokens is not None
    assert found._tabs.titles[found._tabs.selected_index] == "Node"
    assert found.nodes.circuit is found.circuit and found.nodes.task is found.task
    assert f"{node}: head" in Tags(found.to_html()).text


def test_what_is_cut_in_the_graph_is_answered_beside_it(found, model):
    wanted = kcwb.Play(model, found.circuit, found.task)
    first, second = (f"{row.sender}->{row.receiver}" for row in found.circuit.edges.head(2).itertuples())
    assert found._graph.answers == {}
    for cut in ([first], [first, second], [second], []):
        found._graph.set_state({"cut": cut, "forced": []})
        found.wait(SOON)
        back, more = set(wanted.cuts) - set(cut), set(cut) - set(wanted.cuts)
        for step, names in ((wanted.restore, back), (wanted.cut, more)):
            if names:
                step(*names)
        assert found._graph.answers == wanted.as_traits() and not found._graph.busy
    found._graph.set_state({"cut": [first]})
    found.resize(20)  # the strongest edge is in it, too, and still cut
    found.wait(SOON)
    smaller = kcwb.Play(model, found.circuit, found.task)
    smaller.cut(first)
    assert found._graph.cut == [first] and found._graph.answers == smaller.as_traits()
    assert found.completeness is not None and found.error is None


def test_a_report_says_first_what_was_found(panel):
    assert HEADLINE not in panel._repr_mimebundle_()
    panel.run()
    panel.wait(SOON)
    said = panel._repr_mimebundle_()[HEADLINE]
    assert said == {"line": headline_of(panel.circuit, panel.completeness)}


def test_a_prompt_of_ones_own_is_answered_and_read_beside_the_graph(found, model):
    graph, question = found._graph, {"prompt": "w80 w3 w9", "subject": "w3"}
    assert graph.asks
    graph.set_state({"question": question})
    found.wait(SOON)
    wanted = kcwb.Play(model, found.circuit, found.task)
    wanted.ask(**question)
    assert graph.answers == wanted.as_traits()
    node = found.circuit.nodes.query("kind == 'head'")["node"].iloc[-1]
    graph.set_state({"selected": [node]})
    found.wait(SOON)
    full, alone = (run["prompts"][-1] for run in graph.reading["runs"])
    assert [full] == read_node(model, wanted.own.prompts, node) and alone["prompt"] == "w80 w3 w9"
    first = f"{found.circuit.edges['sender'][0]}->{found.circuit.edges['receiver'][0]}"
    graph.set_state({"cut": [first]})
    found.wait(SOON)
    wanted.cut(first)
    assert graph.answers == wanted.as_traits()
    graph.set_state({"question": {"prompt": " "}})
    found.wait(SOON)
    assert graph.answers["own"]["problem"].startswith("The prompt is empty") and graph.answers["facts"]
    graph.set_state({"question": {}, "cut": []})
    found.wait(SOON)
    assert len(graph.reading["runs"][0]["prompts"]) == len(read_node(model, found.task, node))


def test_nothing_is_asked_where_the_facts_are_not_at_hand(panel, model):
    panel._graph.set_state({"question": {"prompt": "w80 w3"}})
    assert "nothing can be asked" in Tags(panel._message.value).text


def test_a_node_that_is_selected_is_read_beside_the_graph_and_again_after_a_step(found, model):
    graph, task = found._graph, found.task
    node = found.circuit.nodes.query("kind == 'head'")["node"].iloc[-1]
    graph.set_state({"selected": [node]})
    found.wait(SOON)
    full, alone = graph.reading["runs"]
    assert graph.reading["node"] == node and full["prompts"] == read_node(model, task, node)
    assert alone["prompts"] == read_node(model, task, node, circuit=found.circuit, ablation=found.circuit.ablation)
    edge = next(f"{row.sender}->{row.receiver}" for row in found.circuit.edges.itertuples() if node in row.receiver)
    graph.set_state({"cut": [edge]})
    found.wait(SOON)
    assert graph.answers and graph.reading["runs"][0] == full
    again = read_node(model, task, node, circuit=graph.played, ablation=found.circuit.ablation)
    assert graph.reading["runs"][1]["prompts"] == again != alone["prompts"]
    graph.set_state({"selected": []})
    found.wait(SOON)
    found.resize(20)
    found.wait(SOON)
    assert graph.reading == {} and found.error is None


def test_a_row_of_a_table_selects_its_node_or_edge(found):
    edges, nodes = (found._ranked[name] for name in ("Strongest edges", "Nodes"))
    assert edges.columns == ["sender", "receiver", "score"] and len(edges.rows) == found.circuit.n_edges
    edges.set_state({"chosen": edges.names[2]})
    assert found._graph.selected_edges == [edges.names[2]] and found._graph.selected == []
    node = next(key for key in nodes.names if key.startswith("a"))
    nodes.set_state({"chosen": node})
    found.wait(SOON)
    assert found._graph.selected == [node] == list(found.nodes.nodes) and found._graph.reading["node"] == node
    assert found._tabs.selected_index == 0  # the table stays in front
    nodes.set_state({"chosen": "nobody", "rows": [], "names": ["nobody"]})
    assert nodes.chosen == node and nodes.rows
    found.resize(20)
    found.wait(SOON)
    assert len(edges.rows) == found.circuit.n_edges < 60 and edges.chosen == ""


def test_the_node_panel_follows_the_slider(found):
    node = found.circuit.nodes.query("kind == 'mlp'")["node"].iloc[0]
    found.nodes.select(node)
    found.wait(SOON)
    before = found.nodes.edges
    found.controls.edges.value = 25
    found.wait(SOON)
    assert found.nodes.circuit is found.circuit and found.nodes.nodes == (node,)
    pd.testing.assert_frame_equal(found.nodes.edges, node_edges(found.circuit, node))
    assert len(found.nodes.edges) < len(before)
    assert found.error is None and found.nodes.error is None


def test_clicking_away_leaves_tab_and_node_alone(found):
    found._graph.set_state({"selected": [], "selected_edges": []})
    assert found._tabs.selected_index == 0 and not found.nodes.nodes


def test_save_and_load_through_the_buttons(found, model, relation, tmp_path):
    path = tmp_path / "found.json"
    found._path.value = str(path)
    found._save_button.click()
    assert str(path) in found._message.value
    other = DiscoveryPanel(model, relation, edges=10, draws=2)
    other._path.value = str(path)
    other._load_button.click()
    other.wait(SOON)
    assert other.circuit.digest == found.circuit.digest
    assert other.task.val.facts == found.task.val.facts
    assert other.controls.edges.value == 60  # the size that it was cut to
    pd.testing.assert_frame_equal(other.completeness, found.completeness)


def test_a_loaded_circuit_of_an_unknown_relation_is_shown_untested(found, model, words, tmp_path):
    found.save(tmp_path / "found.json")
    other = DiscoveryPanel(model, words, edges=10)
    other.load(tmp_path / "found.json")
    other.wait(SOON)
    assert other.circuit.digest == found.circuit.digest
    assert other.task is None and other.completeness is None
    assert "not at hand" in other._message.value


def test_a_damaged_file_or_another_models_circuit_is_refused_in_words(found, tiny, relation, tmp_path):
    before = found.circuit
    (tmp_path / "half.json").write_text('{"format": "kcwb-circuit/1", ')
    gpt2 = tiny("gpt2")
    kcwb.Circuit.empty(kcwb.Graph(7, 3)).save(tmp_path / "other.json")
    data = json.loads(_saved(found, tmp_path / "weights.json"))
    data["provenance"]["model"] = {"name": "elsewhere", "digest": gpt2.digest}
    (tmp_path / "weights.json").write_text(json.dumps(data))
    for name, words in (
        ("half", "not a circuit"),
        ("other", "7"),
        ("weights", "elsewhere"),
        ("missing", "cannot be read"),
    ):
        found._path.value = str(tmp_path / f"{name}.json")
        found._load_button.click()
        with pytest.raises(CircuitError):
            found.wait(SOON)
        assert words in Tags(found._message.value).text
        assert found.circuit is before and len(found.history) == 1


def _saved(panel: DiscoveryPanel, path: Any) -> str:
    panel.save(path)
    return path.read_text()


def test_a_file_with_odd_provenance_is_shown_or_refused_and_nothing_is_lost(found, tmp_path):
    """A file's edges have a digest, what it says of itself has none."""
    before, data = found.circuit, json.loads(_saved(found, tmp_path / "odd.json"))
    own = data["provenance"]
    for change in (
        {"parameters": "many", "seconds": "soon", "relation": 7, "template": ["<script>"]},
        {"parameters": {"edges": "300", "within": {"edges": {}}, "tau": None}, "method": {"a": "<b>"}},
        {"relation": None, "n": None, "seed": "x", "ablation": "<img>", "time": 3},
        {"model": {"name": "<i>", "digest": own["model"]["digest"]}, "facts": "none"},
    ):
        (tmp_path / "odd.json").write_text(json.dumps({**data, "provenance": {**own, **change}}))
        known = len(found.history)
        found.load(tmp_path / "odd.json")
        try:
            found.wait(SOON)
        except KcwbError as error:
            assert str(error)[:60].split(":")[0] in Tags(found._message.value).text
        assert found.circuit is not None and len(found.history) >= known
        assert set(Tags(found.to_html()).tags) <= ALLOWED
        found.show(0)
        found.nodes.wait(SOON)
        assert found.circuit is before


def test_a_split_of_which_the_ablation_leaves_no_fact_is_not_told(found):
    table = found.completeness.assign(n=found.completeness["n"].where(found.completeness["split"] == "D_val", 0))
    table["hit"] = table["hit"].where(table["n"] > 0)
    told = Tags(results.summary(replace(found._shown, completeness=table))).text
    assert "D_val" in told and "D_test" not in told and "nan" not in told


def test_a_file_without_a_name_or_a_circuit_is_asked_for(panel):
    panel._save_button.click()
    assert "no circuit to save" in panel._message.value
    panel._path.value = "  "
    panel._load_button.click()
    assert "a name" in panel._message.value


# --- what is drawn ---


def test_pages_without_widgets_get_the_state_drawn_plainly(found):
    bundle = found._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    page = Tags(bundle["text/html"])
    assert page.tags.count("iframe") == 1 and page.tags.count("table") == 3
    for words in ("gim", "random circuits", "Hit@10", f"{found.circuit.n_edges} of"):
        assert words in page.text, words


def test_a_panel_that_has_not_run_is_drawn_too(panel):
    page = Tags(panel._repr_mimebundle_()["text/html"])
    assert "country" not in page.text and "gim" in page.text and "iframe" not in page.tags


def test_waiting_renews_the_drawing_beside_the_widgets(panel, monkeypatch):
    shown: dict[str, str] = {}

    class Handle:
        display_id = "one"

    def first(bundle: dict[str, str], **more: Any) -> Handle:
        shown["one"] = bundle["text/html"]
        return Handle()

    monkeypatch.setattr(lasting, "display", first)
    monkeypatch.setattr(
        lasting, "update_display", lambda bundle, display_id, **more: shown.update({display_id: bundle["text/html"]})
    )
    panel._ipython_display_()
    assert "iframe" not in shown["one"]
    panel.run()
    panel.wait(SOON)
    assert "iframe" in shown["one"]
    monkeypatch.setattr(lasting, "update_display", lambda *args, **more: pytest.fail("nothing has changed"))
    panel.wait(SOON)


def test_the_tables_hold_facts_edges_and_nodes(found):
    text = shown_text(found)
    for fact in (*found.task.val.facts, *found.task.test.facts):
        assert fact.subject in text and fact.object in text
    assert str(found.task.n_known) in text
    edges, nodes = (found._ranked[name] for name in ("Strongest edges", "Nodes"))
    assert [row[1] for row in edges.rows] == found.circuit.edges["receiver"].tolist()
    assert {row[0] for row in nodes.rows} == set(found.circuit.nodes["node"])


ALLOWED = {"div", "span", "style", "table", "thead", "tbody", "tr", "th", "td", "iframe", "img"}


def test_hostile_text_is_shown_and_never_run(model):
    """As subjects, objects, templates and names; most of it is unknown words to the tokenizer."""
    odd = [text for text in HOSTILE if text.strip() == text and text and "\x00" not in text]
    assert len(odd) >= 30
    short = [text if len(text) > 5000 else text[:40] for text in odd]  # the model reads 64 tokens
    facts = tuple(Fact(f"w{i} {text}", f"w{(7 * i) % 90} {text}") for i, text in enumerate(short))
    texts = [text for text in odd if "script" in text or "\u202e" in text or "href" in text or len(text) > 5000]
    shown = 0
    for number, text in enumerate(texts[::4]):
        template = f"w1 {text[:30]} {{}} w2" if number % 2 else f"w1 {{}} w2 {text[:30]}"
        relation = Relation(odd[1], odd[0], odd[0], odd[0], False, (template,), (template,), facts)
        panel = DiscoveryPanel(model, relation, edges=60, n=3, draws=1, seed=number)
        for _ in range(2):
            panel.run()
            _settle(panel)
        if panel.circuit is not None:
            shown += 1
            open_tab(panel, "Compare runs")
            panel.nodes.select("a1.h1", "m0")
            panel.nodes.ablate()
            _settle(panel)
            assert panel.nodes.ablated is not None
            assert template in shown_text(panel)
        for source in [html.value for html in every(panel.widget, W.HTML)] + [panel.to_html()]:
            assert set(Tags(source).tags) <= ALLOWED
            assert all(address.startswith("data:image/png;base64,") for address in _addresses(source))
    assert shown


def _settle(panel: DiscoveryPanel) -> None:
    try:
        panel.wait(SOON)
    except KcwbError as error:  # then its words are on screen
        assert str(error)


def _addresses(source: str) -> list[str]:
    """All that a page would load or go to."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            found.extend(str(value) for name, value in attrs if name in ("src", "href", "action", "data", "srcset"))

    Reader().feed(source)
    return found


def test_a_text_of_ten_thousand_characters_breaks_no_menu(model, relation):
    panel = DiscoveryPanel(model, relation, template="w5 {} " + "x" * 10_000, edges=60)
    assert all(len(label) <= 120 for label, _ in panel.picker.template.options)
    assert panel.settings["template"] == "w5 {} " + "x" * 10_000
