"""The ensemble panel: it does what the plain functions do, its slider and clicks tell right, nothing good is lost."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest

import kcwb
from kcwb.circuits.ensemble import Ensemble
from kcwb.discovery import runs as discovery_runs
from kcwb.errors import CircuitError, DataError, KcwbError, SettingError
from kcwb.tasks.relations import Relation
from kcwb.workbench.panels import ensemble as panels
from kcwb.workbench.panels.ensemble import EnsemblePanel
from tests.tasks import known_relation
from tests.workbench.ensembles import KEPT, TWINS, ensemble_of
from tests.workbench.panels.test_discovery import ALLOWED, Tags

SOON = 60.0
QUICK: dict[str, Any] = {"method": "eap-ig", "edges": 40, "n": 6, "draws": 12, "vary": ["facts", "setting"]}


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _few(monkeypatch) -> None:
    """The curve at two confidences, with one random circuit beside each."""
    whole = panels.confidence_curve
    quick = {"confidences": (0.5, 1.0), "draws": 1}
    monkeypatch.setattr(panels, "confidence_curve", lambda *args, **more: whole(*args, **more, **quick))


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture(scope="module")
def _relations() -> dict[int, Relation]:
    return {}


@pytest.fixture
def relation(model, _relations) -> Relation:
    return _relations.setdefault(0, known_relation(model, 16))


@pytest.fixture
def panel(model, relation) -> Iterator[EnsemblePanel]:
    panel = EnsemblePanel(model, relation, **QUICK)
    yield panel
    panel.cancel()
    assert panel._runner.wait(SOON)


@pytest.fixture
def found(panel) -> EnsemblePanel:
    """After a run and a test."""
    for step in (panel.run, panel.test):
        step()
        panel.wait(SOON)
    return panel


@pytest.fixture
def by_hand(model) -> Iterator[EnsemblePanel]:
    """An ensemble of which all is known, opened; its facts are nowhere."""
    panel = EnsemblePanel(model, "country_capital", edges=40, ensemble=hand_made(model), confidence=0.25)
    panel.wait(SOON)
    yield panel
    panel.close()


def hand_made(model: Any, **provenance: Any) -> Ensemble:
    return ensemble_of(KEPT, TWINS, model.graph, {"model": {"digest": model.digest}, **provenance})


def opacities(panel: EnsemblePanel) -> dict[str, float]:
    return {edge["lines"][0].replace(" → ", "->"): edge["strength"] for edge in panel._graph.scene["edges"]}


def click(panel: EnsemblePanel, *edges: list[str], nodes: list[str] | None = None) -> None:
    """What the page sends when an edge or nodes are clicked."""
    panel._graph.set_state({"selected": nodes or [], "selected_edges": ["->".join(edge) for edge in edges]})


def cells(source: str) -> list[list[str]]:
    """The rows of tables in a piece of HTML."""
    rows = re.findall(r"<tr>(.*?)</tr>", source)
    return [[Tags(cell).text for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in rows if "<td" in row]


# --- the same as in a script ---


def test_run_draws_what_the_plain_functions_draw(found, model, relation):
    task = kcwb.make_task(model, relation, n=6)
    alone = kcwb.discover_many(model, task, progress=False, **{name: QUICK[name] for name in QUICK if name != "n"})
    pd.testing.assert_frame_equal(found.ensemble.edges, alone.edges)
    pd.testing.assert_frame_equal(found.ensemble.sources, alone.sources)
    pd.testing.assert_frame_equal(found.curve, panels.confidence_curve(model, alone, task, progress=False))
    assert found.circuit.digest == alone.consensus(0.5).digest and found.task.val.facts == task.val.facts


def test_every_control_reaches_the_function(panel, model, relation):
    panel.controls.method.value, panel.controls.ablation.value, panel.controls.metric.value = "acdc", "resample", "kl"
    panel.controls.within.value, panel.controls.tau.value, panel.controls.n.value = 30, 0.02, 5
    panel.controls.seed.value, panel._draws.value = 3, 4
    for name, box in panel._sources.items():
        box.value = name in ("facts", "order")
    panel._run_button.click()
    panel.wait(SOON)
    task = kcwb.make_task(model, relation, n=5, seed=3)
    how: dict[str, Any] = {"ablation": "resample", "metric": "kl"}
    within = kcwb.discover(model, task, edges=30, progress=False, **how)
    how |= {"tau": 0.02, "within": within, "draws": 4, "vary": ["facts", "order"], "seed": 3}
    alone = kcwb.discover_many(model, task, "acdc", progress=False, **how)
    pd.testing.assert_frame_equal(panel.ensemble.edges, alone.edges)
    assert panel.curve is None and "Press Test" in panel._pages["Confidence curve"].value


def test_sources_that_a_method_or_an_ablation_lacks_cannot_be_ticked(model, relation):
    panel = EnsemblePanel(model, relation, edges=40)

    def offered() -> str:
        return " ".join(name for name, box in panel._sources.items() if not box.disabled)

    assert offered() == "facts template setting ablation" and panel.settings["vary"] is None
    panel.controls.ablation.value = "zero"
    assert offered() == "facts template setting"
    panel.controls.method.value = "acdc"
    assert offered() == "facts template setting order" and panel.settings["vary"] is None
    panel._sources["facts"].value = panel._sources["ablation"].value = False
    assert panel.settings["vary"] == ["template", "setting", "order"]
    panel.close()


# --- how sure ---


def test_the_slider_draws_the_consensus_as_opaque_as_it_is_sure(found):
    pi = {f"{row.sender}->{row.receiver}": row.pi for row in found.ensemble.edges.itertuples()}
    sizes = []
    for confidence in (0.25, 0.5, 0.9):
        found._confidence.value = confidence
        circuit = found.ensemble.consensus(confidence)
        assert found.circuit.digest == circuit.digest
        names = [f"{row.sender}->{row.receiver}" for row in circuit.edges.itertuples()]
        assert opacities(found) == {name: pytest.approx(max(0.12, pi[name]), abs=0.005) for name in names}
        assert found._graph.scene["sure"]
        assert f"At confidence {confidence:.2f}: {circuit.n_edges} edges" in Tags(found._summary.value).text
        sizes.append(circuit.n_edges)
    assert sizes[0] > sizes[2] > 0
    found.show(1.0)
    assert found.circuit.digest == found.ensemble.consensus(1.0).digest and found._confidence.value == 1.0
    with pytest.raises(SettingError, match="confidence"):
        found.show(0)


def test_a_click_on_an_edge_tells_its_draws_and_what_removes_it(by_hand):
    assert opacities(by_hand)["a0.h1->a1.h0<q>"] == 0.75
    click(by_hand, ["a0.h1", "a1.h0<q>"])
    assert by_hand.chosen == "a0.h1->a1.h0<q>" == by_hand._edge.value
    assert "In 3 of 4 draws: π = 0.75 [0.30, 0.95]" in Tags(by_hand._card.value).text
    assert cells(by_hand._card.value) == [
        ["with other facts alone", "3", "33%"],
        ["with another setting alone", "3", "67%"],
    ]
    by_hand._edge.value = "input->m1"
    assert "In 1 of 4 draws" in by_hand._card.value and cells(by_hand._card.value)[0][1:] == ["1", "100%"]
    click(by_hand, ["input", "m0"])
    assert "None of 4 draws keeps it." in by_hand._card.value


def test_a_click_on_a_node_tells_its_draws_and_its_surest_edges(by_hand):
    click(by_hand, nodes=["m1"])
    assert by_hand.chosen == "m1" and "In 1 of 4 draws" in by_hand._card.value
    assert [row[:2] for row in cells(by_hand._card.value)] == [["input", "m1"], ["m1", "logits"]]
    click(by_hand, nodes=["a1.h1"])
    assert "None of 4 draws has it." in by_hand._card.value


def test_a_message_that_names_no_edge_is_left_alone(by_hand):
    click(by_hand, ["a0.h1", "a1.h0<q>"])
    before = by_hand._card.value
    for value in ([], "", 7, [3], ["input"], ["a1.h0->a0.h0<q>"], ["<script>->m1"], [["input", "m1"]], [None]):
        by_hand._graph.set_state({"selected_edges": value})
        by_hand._graph.set_state({"selected": value if value != ["input"] else ["<b>"]})
        assert by_hand._card.value == before and by_hand._message.value == ""


def test_an_edge_that_is_not_there_is_refused_in_words(by_hand, panel):
    for wrong, words in (("m1->m0", "no edge"), ("nowhere", "not a node"), ("input-><b>", "not a receiver")):
        by_hand._edge.value = wrong
        assert words in Tags(by_hand._message.value).text and by_hand.chosen is None
    with pytest.raises(SettingError, match="press Run"):
        panel.select("input->m1")
    with pytest.raises(SettingError, match="press Run"):
        panel.show(0.9)


def test_tables_hold_the_split_the_bound_the_edges_and_the_nodes(by_hand):
    ensemble = by_hand.ensemble
    sure = by_hand._pages["How sure?"].value
    rows = cells(sure)
    assert [row[0] for row in rows[:3]] == ["facts", "setting", "everything"]
    # other facts change the second draw by three edges and the fourth by one; another setting three draws by one
    assert [row[1] for row in rows[:2]] == ["1", "0.75"]
    bound = ensemble.bound()
    assert [int(row[1]) for row in rows[3:]] == bound["edges"].tolist()
    assert sure.count("<img") == 1
    table = cells(by_hand._pages["Edges"].value)
    assert table[2][:4] == ["a0.h1", "a1.h0<q>", "0.75 [0.30, 0.95]", "3"] and table[2][5:] == ["33%", "67%"]
    nodes = cells(by_hand._pages["Nodes"].value)
    assert [row[0] for row in nodes if row[-1] == "1"] == ["m1"]


# --- files and what goes wrong ---


def test_save_and_load_through_the_buttons(found, model, relation, tmp_path):
    found._path.value = str(tmp_path / "found.json")
    found._save_button.click()
    assert "Saved to" in found._message.value
    with EnsemblePanel(model, relation, edges=40) as other:
        other._path.value = str(tmp_path / "found.json")
        for step in (other._load_button, other._test_button):
            step.click()
            other.wait(SOON)
        pd.testing.assert_frame_equal(other.ensemble.edges, found.ensemble.edges)
        pd.testing.assert_frame_equal(other.curve, found.curve)
        assert other.task.val.facts == found.task.val.facts
    with EnsemblePanel(model, "country_capital", edges=40) as stranger:
        stranger.load(tmp_path / "found.json")
        stranger.wait(SOON)
        stranger.test()
        stranger.wait(SOON)
        assert stranger.curve is None and "not at hand" in stranger._pages["Confidence curve"].value
        assert opacities(stranger) == opacities(found)


def test_a_damaged_or_another_models_file_is_refused_in_words_and_what_was_there_stays(by_hand, model, tmp_path):
    by_hand.save(tmp_path / "good.json")
    good = (tmp_path / "good.json").read_text()
    (tmp_path / "half.json").write_text(good[: len(good) // 2])
    (tmp_path / "bent.json").write_text(good.replace('"kept": "e"', '"kept": "f"'))
    ensemble_of({"input->m0": "11", "m0->logits": "11"}).save(tmp_path / "other.json")
    data = json.loads(good)
    data["provenance"]["model"] = {"name": "elsewhere", "digest": "0" * 64}
    by_hand._message.value = ""
    (tmp_path / "weights.json").write_text(json.dumps(data))
    before = by_hand.ensemble, by_hand.circuit, by_hand.to_html()
    for name, words in (
        ("half", "not an ensemble"),
        ("bent", "digest"),
        ("other", "2 heads"),
        ("weights", "elsewhere"),
        ("missing", "cannot be read"),
    ):
        by_hand._path.value = str(tmp_path / f"{name}.json")
        by_hand._load_button.click()
        with pytest.raises(CircuitError):
            by_hand.wait(SOON)
        assert words in Tags(by_hand._message.value).text
        by_hand._message.value = ""
        assert (by_hand.ensemble, by_hand.circuit, by_hand.to_html()) == before


def test_a_file_with_odd_provenance_is_shown_or_refused_and_nothing_is_lost(found, tmp_path):
    found.save(tmp_path / "odd.json")
    data = json.loads((tmp_path / "odd.json").read_text())
    own = data["provenance"]
    for change in (
        {"parameters": "many", "seconds": "soon", "relation": 7, "template": ["<script>"], "left_out": 3},
        {"parameters": {"edges": "300", "within": {"edges": {}}}, "method": {"a": "<b>"}, "halves": 3, "facts": "none"},
        {"relation": None, "n": None, "seed": "x", "ablation": "<img>", "left_out": {"<b>": ["<i>"]}, "drawn": None},
    ):
        (tmp_path / "odd.json").write_text(json.dumps({**data, "provenance": {**own, **change}}))
        found.load(tmp_path / "odd.json")
        try:
            found.wait(SOON)
        except KcwbError as error:
            assert str(error)[:60].split(":")[0] in Tags(found._message.value).text
        assert found.ensemble is not None and len(found.ensemble) == 12
        assert set(Tags(found.to_html()).tags) <= ALLOWED


def test_another_file_is_not_overwritten_and_a_name_is_asked_for(found, panel, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    found._path.value = str(tmp_path / "mine.json")
    found._save_button.click()
    assert "only an ensemble is overwritten" in found._message.value
    assert (tmp_path / "mine.json").read_text() == "{}"
    found._path.value = " "
    found._load_button.click()
    assert "a name, for example ensemble.json" in found._message.value
    empty = EnsemblePanel(panel.model, "country_capital", edges=40)
    empty._save_button.click()
    assert "no ensemble to save" in empty._message.value
    empty.close()


def test_a_cancelled_run_goes_on_from_what_was_finished(model, relation, monkeypatch):
    settings = QUICK | {"vary": ["facts", "ablation"]}
    whole = EnsemblePanel(model, relation, **settings)
    whole.run()
    whole.wait(SOON)
    compute, runs = discovery_runs.Run.compute, []
    panel = EnsemblePanel(model, relation, **settings)

    def counted(run: Any, *args: Any, **more: Any) -> Any:
        runs.append(run.condition)
        if len(runs) == 2:
            panel.cancel()
        return compute(run, *args, **more)

    monkeypatch.setattr(discovery_runs.Run, "compute", counted)
    panel.run()
    panel._runner.wait(SOON)
    assert panel.state == "idle" and panel.ensemble is None and len(runs) == 2
    assert "goes on from there" in panel._message.value
    panel._run_button.click()
    panel.wait(SOON)
    assert len(runs) == 2 + 2  # of three conditions the first was kept
    pd.testing.assert_frame_equal(panel.ensemble.edges, whole.ensemble.edges)
    panel.close()
    whole.close()


def test_a_test_that_was_stopped_can_be_done_again(found, monkeypatch):
    curve, again = found.curve, panels.confidence_curve

    def stopped(*_: Any, progress: Any, **__: Any) -> None:
        found.cancel()
        progress(0, 1, "")

    monkeypatch.setattr(panels, "confidence_curve", stopped)
    found._show_result((found.ensemble, found.task))
    found.test()
    found._runner.wait(SOON)
    assert found.curve is None and "Press Test" in found._pages["Confidence curve"].value
    monkeypatch.setattr(panels, "confidence_curve", again)
    found._test_button.click()
    found.wait(SOON)
    pd.testing.assert_frame_equal(found.curve, curve)
    assert "<img" in found._pages["Confidence curve"].value


def test_too_few_facts_are_said_and_the_last_ensemble_stays(found):
    before, page = found.ensemble, found._pages["Edges"].value
    found.controls.n.value = 3
    found._run_button.click()
    with pytest.raises(DataError, match="at least 4 facts"):
        found.wait(SOON)
    assert found.ensemble is before and found._pages["Edges"].value == page
    assert "at least 4 facts" in found.to_html()


def test_a_source_with_one_value_is_said(panel):
    for name, box in panel._sources.items():
        box.value = name == "template"
    panel.run()
    with pytest.raises(SettingError, match="template cannot be varied"):
        panel.wait(SOON)
    panel._sources["template"].value = False
    panel.run()
    with pytest.raises(SettingError, match="name what is left to chance"):
        panel.wait(SOON)


def test_what_cannot_be_varied_is_left_out_and_said(panel):
    for box in panel._sources.values():
        box.value = True
    panel.run()
    panel.wait(SOON)
    assert list(panel.ensemble.twins) == ["facts", "setting", "ablation"]
    assert "Not varied: template: " in panel._pages["How sure?"].value


def test_a_ready_ensemble_is_opened_with_its_task_and_one_of_another_model_refused(found, model, relation, tiny):
    given = {"ensemble": found.ensemble, "task": found.task, "curve": found.curve}
    with EnsemblePanel(model, relation, edges=40, confidence=0.9, **given) as ready:
        assert ready.circuit.digest == found.ensemble.consensus(0.9).digest  # at once
        ready.wait(SOON)
        assert ready.task is found.task
        assert ready.curve is found.curve and "<img" in ready._pages["Confidence curve"].value
    for wrong in (
        {"ensemble": ensemble_of(KEPT, TWINS)},
        {"ensemble": hand_made(tiny("gpt2"))},
        {"draws": 1},
        {"confidence": 0},
        {"vary": ["fact"]},
        {"edges": 0},
    ):
        with pytest.raises(KcwbError):
            EnsemblePanel(model, relation, **{"edges": 40, **wrong})


def test_an_ensemble_without_twins_or_scores_is_drawn(model):
    bare = ensemble_of({"input->m0": "11", "m0->logits": "10"}, None, model.graph)
    bare.scores.fill_(float("nan"))
    with EnsemblePanel(model, "country_capital", edges=40, ensemble=bare) as panel:
        panel.wait(SOON)
        panel.select("input->m0")
        assert "no split" in panel.to_html() and "In 2 of 2 draws" in panel.to_html()
        panel.show(1.0)
        assert panel.circuit.n_edges == 0  # what leads nowhere is no circuit
        assert opacities(panel) == {}


# --- drawn plainly ---


def test_the_panel_is_drawn_without_widgets(panel):
    assert "Settings" in panel.to_html() and "all that can be" not in panel.to_html()
    for step in (panel.run, panel.test):
        step()
        panel.wait(SOON)
    panel.select("input->m0")
    page = panel.to_html()
    for words in ("12 draws", "facts, setting", "What it depends on", "How many may be false", "input → m0", "gone: "):
        assert words in page
    assert page.count("<iframe") == 1 and page.count("<img") == 3


def test_hostile_names_stay_text(model):
    script = "<script>alert(1)</script>"
    rows = dict.fromkeys(KEPT, "0000")
    provenance = {"template": script, "relation": {"name": script}, "method": script, "left_out": {script: script}}
    provenance |= {"model": {"name": script}}
    ensemble = ensemble_of(KEPT, {script: rows}, model.graph, provenance)
    with EnsemblePanel(model, "country_capital", edges=40, ensemble=ensemble) as panel:
        panel.wait(SOON)
        panel.select("input->m1")
        page = panel.to_html()
        assert script not in page and html.escape(script) in page and set(Tags(page).tags) <= ALLOWED
