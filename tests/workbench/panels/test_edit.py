"""The edit panel: its buttons do what the plain functions do, and the weights come back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kcwb.editing.edit import EditError, edit
from kcwb.errors import KcwbError, SettingError
from kcwb.workbench.panels.edit import EditPanel
from tests.editing.conftest import same_bits, weights
from tests.tasks import known_relation
from tests.tiny import tiny_model

SOON = 120.0
QUICK = {
    "rome": {"steps": 3, "prefixes": 2, "covariance": "identity", "bound": 99.0},
    "ft_m": {"steps": 2, "bound": 99.0},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3)


@pytest.fixture
def relation(model):
    return replace(known_relation(model, 16), prompt_templates_zs=("w1 {} w2", "w3 {} w4"))


@pytest.fixture
def panel(model, relation) -> Iterator[EditPanel]:
    panel = EditPanel(model, relation, layer=0, edges=40, movers=["a0.h1"], draws=5, n=6, target="w61", settings=QUICK)
    yield panel
    panel.cancel()
    assert panel._runner.wait(SOON)
    panel.undo()


def test_edit_and_undo_do_what_the_plain_functions_do(panel, model, relation):
    before = weights(model)
    panel._run_button.click()
    panel.wait(SOON)
    asked = panel.settings
    assert (asked["target"], asked["method"], asked["layer"]) == ("w61", "rome", 0)
    assert panel.edit is not None and panel.edit.active and not same_bits(model, before)
    in_weights = model.network.layers[0].W_out.clone()
    panel._undo_button.click()
    assert same_bits(model, before) and panel.edit is None
    alone = edit(model, relation.facts[0], "w61", template=asked["template"], layer=0, progress=False, **QUICK["rome"])
    with alone:
        assert torch.equal(model.network.layers[0].W_out, in_weights)
    assert panel.said is not None and set(panel.said["asked"]) == {"edited", "other words", "other subject"}
    assert "w61" in panel.to_html() and "TE" in panel.to_html() and panel.to_html().count("<iframe") == 1


def test_a_second_edit_takes_the_first_out(panel, model):
    before = weights(model)
    panel._compare.value = False
    panel._method.value = "ft_m"
    panel.run()
    panel.wait(SOON)
    first = panel.edit
    panel.run()
    panel.wait(SOON)
    assert panel.edit is not first and not first.active and panel.edit.digest == first.digest
    assert panel.comparison is None and "not compared" in panel.to_html()
    panel.undo()
    assert same_bits(model, before)


def test_edits_on_top_are_plain_edits_on_top_and_come_out_one_by_one(panel, model, relation):
    before = weights(model)
    panel._compare.value = False
    panel.run()
    panel.wait(SOON)
    first, after_first = panel.edit, weights(model)
    panel._on_top.value = True
    panel.picker.fact.value = 1
    panel._target.value = "w62"
    panel.run()
    panel.wait(SOON)
    assert panel.edits == (first, panel.edit) and all(one.active for one in panel.edits)
    fact = relation.facts[0]
    assert f"In the weights now, on top of {fact.subject}: {fact.object} → w61." in panel.to_html()
    prompts = {name: part["prompt"].tolist() for name, part in panel.said.groupby("asked")}
    assert prompts["earlier edit"] == [f"w1 {relation.facts[0].subject} w2"]
    both = weights(model)
    panel._target.value = relation.facts[1].object  # refused: both stay
    panel.run()
    with pytest.raises(SettingError, match="already the answer"):
        panel.wait(SOON)
    assert same_bits(model, both) and len(panel.edits) == 2
    panel.undo()
    assert same_bits(model, after_first) and panel.edit is first and "1 earlier still in" in panel.to_html()
    panel.undo()
    assert same_bits(model, before) and panel.edits == ()
    more = {"layer": 0, "progress": False, **QUICK["rome"]}
    template = relation.prompt_templates_zs[0]
    with edit(model, relation.facts[0], "w61", template=template, **more):  # noqa: SIM117
        with edit(model, relation.facts[1], "w62", template=template, **more):
            assert same_bits(model, both)


def test_a_closed_panel_takes_all_its_edits_out(model, relation):
    before = weights(model)
    panel = EditPanel(model, relation, layer=0, target="w61", settings=QUICK, compare=False, on_top=True, n=6)
    for i in range(2):
        panel.picker.fact.value = i
        panel._target.value = f"w6{i}"
        panel.run()
        panel.wait(SOON)
    assert len(panel.edits) == 2 and not same_bits(model, before)
    panel.close()
    assert same_bits(model, before)


def test_whether_the_new_object_is_said_is_told(panel):
    panel._compare.value = False
    panel.run()
    panel.wait(SOON)
    for row in panel.said.to_dict("records"):
        words = row["after"].split(".")[0].split()
        told = "" if not row["target"] else "yes" if words[:1] == [row["target"]] else "no"
        assert row["says it"] == told


def test_what_goes_wrong_is_said_and_leaves_the_model_alone(panel, model):
    before = weights(model)
    panel._target.value = panel.settings["object"]
    panel.run()
    with pytest.raises(SettingError, match="already the answer"):
        panel.wait(SOON)
    assert same_bits(model, before) and panel.edit is None and "already the answer" in panel.to_html()


def test_a_cancelled_edit_leaves_the_model_alone(panel, model):
    before = weights(model)
    panel._layer.value = 1
    panel.run()
    panel.cancel()
    assert panel._runner.wait(SOON)
    assert same_bits(model, before) and panel.edit is None and panel.state == "idle"


def test_an_edit_that_was_put_on_top_must_come_out_first(panel, model):
    panel._compare.value = False
    panel._method.value = "ft_m"
    panel.run()
    panel.wait(SOON)
    fact = panel.edit.facts[0]
    more = {"template": panel.settings["template"], "layer": 1, "progress": False, "bound": 99.0, "steps": 1}
    with edit(model, fact, "w70", "ft_m", **more):
        with pytest.raises(EditError, match="first"):
            panel.undo()
        panel._undo_button.click()
        assert "undo that first" in panel._message.value
    panel.undo()


def test_a_relation_of_one_template_is_edited_but_not_compared(model):
    panel = EditPanel(model, known_relation(model, 16), layer=0, edges=40, target="w61", settings=QUICK)
    panel.run()
    panel.wait(SOON)
    assert panel.edit is not None and panel.comparison is None and "no other template" in panel.to_html()
    panel.undo()


def test_another_relation_offers_its_own_facts(panel):
    panel.picker.relation.value = "country_capital"
    assert panel.settings["subject"] != "" and panel.settings["target"] not in ("", panel.settings["object"])
    assert "country_capital" in panel.to_html()


@pytest.mark.parametrize("wrong", [{"method": "rom"}, {"layer": 2}, {"subject": "nobody"}, {"relation": "capitals"}])
def test_what_cannot_be_meant_is_refused(model, relation, wrong):
    with pytest.raises(KcwbError):
        EditPanel(model, **{"relation": relation, **wrong})
