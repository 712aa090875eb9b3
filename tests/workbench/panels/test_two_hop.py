"""The hop panel does what the plain functions do, and says what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import pytest

from kcwb.errors import DataError, KcwbError, SettingError
from kcwb.studies.two_hop.circuits import hop_circuits
from kcwb.studies.two_hop.overlap import hop_overlap
from kcwb.tasks.compose import compose
from kcwb.tasks.hops import ask_hops, make_hops
from kcwb.workbench.panels.two_hop import HopPanel
from tests.twohop import two_hop_model

SOON = 120.0
QUICK = {"edges": 4, "n": 4, "draws": 2, "resamples": 2, "controls": ()}


@pytest.fixture(scope="module")
def planted():
    return two_hop_model()


@pytest.fixture
def panel(planted) -> Iterator[HopPanel]:
    panel = HopPanel(planted.model, planted.composition, **QUICK)
    yield panel
    panel.cancel()
    assert panel._runner.wait(SOON)


def test_the_panel_finds_what_plain_functions_find(panel, planted):
    assert "the capital of the place of {} is" in panel.to_html()
    panel._run_button.click()
    panel.wait(SOON)
    hops = make_hops(ask_hops(planted.model, planted.composition, progress=False), n=4)
    pd.testing.assert_frame_equal(panel.hops.chains, hops.chains)
    found = hop_circuits(planted.model, hops, edges=4, progress=False)
    assert panel.circuits.circuits["two-hop"].digest == found.circuits["two-hop"].digest
    pd.testing.assert_frame_equal(panel.overlap, hop_overlap(found, draws=2, resamples=2, progress=False))
    assert "two-hop less hop 2" in set(panel.deletion["asked"])
    page = panel.to_html()
    for words in (
        f"chains are left, {len(hops.chains)} of them in D_val. Right means rank {hops.k} or better.",
        "Funnel",
        "not by entity alone",
        "Lens of the bridge at subject",
        "integrated",
        "Without the first hop",
        "<iframe",
    ):
        assert words in page
    assert page.count("<img") >= 5


def test_where_the_lens_has_nothing_to_tell_the_rest_is_shown(panel, monkeypatch):
    def alike(*_, **__):
        raise DataError("All objects begin alike.")

    monkeypatch.setattr("kcwb.workbench.panels.two_hop.hop_lens", alike)
    panel._compare.value = False
    panel.run()
    panel.wait(SOON)
    page = panel.to_html()
    assert panel.lens is None and len(panel.hops.chains) == 4
    assert "All objects begin alike." in page and "the model&#x27;s rank of it" in page.replace("&#39;", "&#x27;")
    assert "Lens of the bridge" not in page


def test_a_case_can_be_chosen(panel):
    panel._compare.value = False
    panel.run()
    panel.wait(SOON)
    assert panel.circuits is None and "Circuits were not compared" in panel.to_html()
    last = panel.hops.chains.iloc[-1]
    panel.select(last["subject"])
    assert f"the place of {last['subject']} is" in panel._pages["Case"].value
    with pytest.raises(SettingError, match="not among the chains"):
        panel.select("nobody")


def test_that_nothing_is_left_is_told_beside_the_funnel(planted):
    wrong = [replace(chain, object="f3") for chain in planted.composition.chains]
    panel = HopPanel(planted.model, replace(planted.composition, chains=tuple(wrong)), **QUICK)
    panel.run()
    panel.wait(SOON)
    assert panel.hops is None and panel.state == "done"
    page = panel.to_html()
    assert "answers no chain of place" in page and "hop 2 right" in page and "No chain is left" in page


def test_a_cancelled_run_leaves_the_panel_as_it_was(panel):
    panel.run()
    panel.cancel()
    assert panel._runner.wait(SOON)
    assert panel.answers is None and panel.state == "idle"


def test_hostile_names_are_drawn_and_not_run(planted):
    wording = [("the place <script>alert(1)</script> of {}", "the capital of {} <b>then</b> is")]
    composition = compose(planted.composition.first, planted.composition.second, wordings=wording)
    panel = HopPanel(planted.model, composition, **QUICK)
    panel._compare.value = False
    panel.run()
    panel.wait(SOON)
    assert "<script>alert" not in panel.to_html() and "&lt;script&gt;" in panel.to_html()


def test_another_first_relation_offers_what_it_chains_with(planted):
    panel = HopPanel(planted.model, planted.composition, **QUICK)
    panel.picker.first.value = "landmark_country"
    assert panel.settings["second"] in {"country_capital", "country_largest_city", "country_currency"}
    panel.picker.second.value = "country_capital"
    assert panel.settings["question"] == "The capital of the country where the landmark {} is located is"
    assert len(panel.picker.template.options) == 4


@pytest.mark.parametrize(
    "wrong",
    [{"k": 3}, {"shortcut_k": 2}, {"template": 9}, {"first": "landmarks"}, {"first": "country_largest_city"}],
)
def test_what_cannot_be_meant_is_refused(planted, wrong):
    with pytest.raises(KcwbError):
        HopPanel(planted.model, **{"first": "landmark_country", **wrong})
