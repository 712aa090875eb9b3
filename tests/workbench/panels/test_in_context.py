"""The in-context panel: its button does what the plain function does, and it draws itself without widgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from kcwb.errors import DataError, KcwbError
from kcwb.studies.in_context.study import in_context
from kcwb.tasks.relations import Fact
from kcwb.workbench.panels.in_context import ContextPanel, summary
from tests.tasks import known_relation, relation_of
from tests.tiny import tiny_model

SOON = 120.0
QUICK: dict[str, Any] = {"edges": 40, "n": 4, "n_test": 5, "sets": 2, "steps": 2, "resamples": 10, "draws": 6}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def relation(model):
    return replace(known_relation(model, 24), prompt_templates=("w1 {} w2",))


@pytest.fixture(scope="module")
def unrelated():
    facts = [Fact(f"u{i}", f"v{i}") for i in range(6)]
    return [replace(relation_of(facts), name="filler", prompt_templates=("u {} is",))]


@pytest.fixture
def panel(model, relation, unrelated) -> Iterator[ContextPanel]:
    panel = ContextPanel(model, relation, k=2, unrelated=unrelated, **QUICK)
    yield panel
    panel.cancel()
    assert panel._runner.wait(SOON)


def test_the_button_does_what_the_plain_function_does(panel, model, relation, unrelated):
    panel._run_button.click()
    panel.wait(SOON)
    beside = [(2, "shuffled"), (2, "unrelated")]
    alone = in_context(model, relation, 2, beside=beside, unrelated=unrelated, progress=False, **QUICK)
    assert panel.found is not None
    for name in ("accuracy", "nodes", "ablation", "heads", "reading"):
        pd.testing.assert_frame_equal(getattr(panel.found, name), getattr(alone, name))


def test_the_panel_is_drawn_without_widgets(panel):
    assert "Settings" in panel.to_html()
    panel.run()
    panel.wait(SOON)
    page = panel.to_html()
    for words in ("Accuracy", "Attention heads", "intact", "in_before", "Circuits", "unrelated"):
        assert words in page
    assert page.count("<iframe") == 1 and page.count("<img") >= 2
    assert summary(panel.found).split(":")[0] == "tiny"
    alone = panel.found.ablation[panel.found.ablation["arm"] != "random heads"]
    assert "random" not in summary(replace(panel.found, ablation=alone))


def test_shots_context_and_size_are_what_is_on_screen(panel):
    panel._k.value, panel._kind.value, panel._edges.value = 1, "shuffled", 30
    panel._controls.value = False
    panel.run()
    panel.wait(SOON)
    assert set(panel.found.tasks) == {(0, "shots"), (1, "shuffled")}
    assert list(panel.found.circuits) == ["0 shots", "1 shuffled"]
    assert all(abs(one.circuit.n_edges - 30) <= 3 for one in panel.found.circuits.values())


def test_what_goes_wrong_is_said_and_the_last_result_stays(panel):
    panel.run()
    panel.wait(SOON)
    before = panel.found
    panel._k.value = 9
    panel.run()
    with pytest.raises(DataError, match="9 shots"):
        panel.wait(SOON)
    assert panel.found is before and "9 shots" in panel.to_html()


def test_a_cancelled_run_leaves_what_was_there(panel):
    panel.run()
    panel.cancel()
    assert panel._runner.wait(SOON)
    assert panel.found is None and panel.state == "idle"


def test_hostile_names_are_escaped(model, relation, unrelated):
    facts = (*relation.facts, Fact("<script>alert(1)</script>", "w60"))
    hostile = replace(relation, name="<script>alert(2)</script>", facts=facts)
    panel = ContextPanel(model, hostile, k=1, controls=False, unrelated=unrelated, **QUICK)
    assert "<script>alert" not in panel.to_html()
    panel.run()
    panel.wait(SOON)
    assert "<script>alert" not in panel.to_html() and "&lt;script&gt;alert(2)" in panel.to_html()


@pytest.mark.parametrize("wrong", [{"k": 0}, {"kind": "shot"}, {"edges": 0}, {"relation": "capitals"}], ids=str)
def test_what_cannot_be_meant_is_refused(model, relation, wrong):
    with pytest.raises(KcwbError):
        ContextPanel(model, **{"relation": relation, **wrong})
