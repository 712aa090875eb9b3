"""The hallucination panel: its button does what the plain function does, errors are said, text stays text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.text import Text

from kcwb.errors import DataError, KcwbError
from kcwb.settings import fits
from kcwb.studies.hallucination.diagnosis import Diagnosis, diagnose
from kcwb.tasks.relations import Fact
from kcwb.workbench.panels.hallucination import HallucinationPanel, _drawn, plot_diagnosis
from kcwb.workbench.plots import Plot
from tests.handmade import copying_head
from tests.hostile import HOSTILE

SOON = 120.0


@pytest.fixture(scope="module")
def copying():
    found = copying_head()
    wrong = (*found.relation.facts[:15], Fact("s15", "o5"))
    templates = (found.relation.prompt_templates_zs[0], "we say that the {} is")
    return found.model, replace(found.relation, facts=wrong, prompt_templates_zs=templates)


@pytest.fixture
def panel(copying) -> Iterator[HallucinationPanel]:
    panel = HallucinationPanel(*copying, subject="s1", movers=3)
    yield panel
    panel.cancel()
    assert panel._runner.wait(SOON)


def test_diagnose_does_what_the_plain_function_does(panel, copying):
    assert "we think that the {} is" in panel.to_html()  # before: the settings
    panel._run_button.click()
    panel.wait(SOON)
    alone = diagnose(*copying, "s1", movers=3, progress=False)
    assert panel.diagnosis is not None and panel.diagnosis.words == alone.words
    pd.testing.assert_frame_equal(panel.diagnosis.heads, alone.heads)
    page = BeautifulSoup(panel.to_html(), "html.parser")
    assert alone.words in page.get_text() and page.find("img")["src"].startswith("data:image/png;base64,")
    for words in ("Movers", "Who decides", "a1.h2", "other heads"):
        assert words in page.get_text()
    assert "NA" not in page.get_text()


def test_another_fact_and_template_replace_what_was_there(panel):
    panel.run()
    panel.wait(SOON)
    first = panel.diagnosis
    panel.picker.fact.value = 15
    panel.picker.template.value = 0
    assert panel.settings["object"] == "o5"
    panel.run()
    panel.wait(SOON)
    assert panel.diagnosis is not first and not panel.diagnosis.right
    assert "a failure of" in panel.to_html()


def test_another_relation_offers_its_own_facts(panel):
    panel.picker.relation.value = "country_currency"
    assert panel.settings["object"] != "o1" and "currency" in panel.settings["template"]


def test_errors_are_told_and_what_was_there_stays(panel, monkeypatch):
    panel.run()
    panel.wait(SOON)
    before = panel.diagnosis

    def fail(*args, **more):
        raise DataError("no <b>movers</b>")

    monkeypatch.setattr("kcwb.workbench.panels.hallucination.diagnose", fail)
    panel.run()
    with pytest.raises(DataError):
        panel.wait(SOON)
    said = BeautifulSoup(panel.to_html(), "html.parser").get_text()
    assert panel.diagnosis is before and "no <b>movers</b>" in said and before.words in said


def test_it_can_be_cancelled(panel):
    panel.run()
    panel.cancel()
    assert panel._runner.wait(SOON)
    assert panel.diagnosis is None and panel.state == "idle"


@pytest.mark.parametrize(
    "wrong", [{"subject": "nobody"}, {"movers": 0}, {"movers": 9}, {"n": 3}, {"template": 2}, {"relation": "capitals"}]
)
def test_what_cannot_be_meant_is_refused(copying, wrong):
    HallucinationPanel(copying[0], copying[1], movers=3).close()
    with pytest.raises(KcwbError):
        HallucinationPanel(copying[0], **{"relation": copying[1], "movers": 3, **wrong})


# --- pictures and text ---


@pytest.fixture(scope="module")
def plain_diagnosis(copying) -> Diagnosis:
    return diagnose(*copying, "s15", movers=3, progress=False)


def test_the_picture_draws_both_curves_and_all_movers(plain_diagnosis):
    end, subject, movers = plot_diagnosis(plain_diagnosis).axes
    ranks = plain_diagnosis.lens[plain_diagnosis.lens["quantity"] == "rank"]
    for axes, where in ((end, "END"), (subject, "subject's best token")):
        drawn = [line.get_ydata().tolist() for line in axes.lines if len(line.get_xdata()) == 3]
        some = ranks[ranks["where"] == where]
        assert drawn == [part["value"].tolist() for _, part in some.groupby("who", sort=False)]
        assert axes.yaxis_inverted() and axes.get_yscale() == "log"
    assert [label.get_text() for label in movers.get_yticklabels()] == plain_diagnosis.movers["node"].tolist()
    widths = [bar.get_width() for bars in movers.containers for bar in bars]
    assert widths == pytest.approx([*plain_diagnosis.movers["gold"], *plain_diagnosis.movers["rival"]])


def test_a_diagnosis_without_movers_is_drawn(plain_diagnosis):
    none = replace(plain_diagnosis, heads=plain_diagnosis.heads.assign(mover=False))
    assert "Who decides" in _drawn(none)


def test_hostile_text_stays_text(plain_diagnosis, monkeypatch):
    monkeypatch.setattr("kcwb.workbench.panels.hallucination.plot_diagnosis", lambda _: Plot(figsize=(1, 1)))

    def count(page: str) -> int:
        return len(BeautifulSoup(page, "html.parser").find_all(True))

    usual = count(_drawn(plain_diagnosis))
    for text in HOSTILE[::3]:
        heads = plain_diagnosis.heads.assign(source=text, writes=text)
        answers = plain_diagnosis.answers.assign(token=text)
        fact = Fact(text, text) if fits(text, str) else plain_diagnosis.fact
        one = replace(
            plain_diagnosis, prompt=text, gold=text, rival=text, fact=fact, heads=heads, answers=answers,
            words=f"Asked {text!r}, the model says {text!r}.",
        )  # fmt: skip
        assert count(_drawn(one)) == usual
    figure = plot_diagnosis(replace(plain_diagnosis, prompt=HOSTILE[0], gold="$\\frac{1}{$", rival=HOSTILE[-1]))
    figure._repr_png_()
    assert any("<script>" in text.get_text() for text in figure.findobj(Text))
