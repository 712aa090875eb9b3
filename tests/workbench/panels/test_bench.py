"""The referee in the discovery panel: asked when it is told to, of what is on screen, and stopped at once."""

from __future__ import annotations

import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import kcwb
from kcwb.errors import KcwbError, SettingError
from kcwb.workbench.panels import bench as benches
from tests.hostile import HOSTILE
from tests.workbench.judgements import hostile, judgement_of
from tests.workbench.panels.test_discovery import SOON, Tags, found, model, panel, relation  # noqa: F401


@pytest.fixture
def asked(monkeypatch) -> list[SimpleNamespace]:
    """What the referee was asked, instead of asking it."""
    calls: list[SimpleNamespace] = []

    def judge(asked: Any, circuit: Any, task: Any, *, progress: Any, **more: Any) -> Any:
        calls.append(SimpleNamespace(model=asked, circuit=circuit, task=task, **more))
        progress(1, 1, "")
        return judgement_of(facts=23)

    monkeypatch.setattr(benches, "referee", judge)
    return calls


def test_nothing_is_asked_until_the_button_is_pressed(found, asked) -> None:  # noqa: F811
    assert not asked and found.bench.judgement is None and "Press Judge" in found.bench.said.value
    assert found.bench.to_html() == ""


def test_a_quick_look_at_what_is_on_screen_or_a_thorough_one(found, asked) -> None:  # noqa: F811
    found.bench.judge_button.click()
    found.wait(SOON)
    found.bench.thorough.value = True
    found.bench.judge()
    found.wait(SOON)
    assert [call.quick for call in asked] == [True, False]
    assert {(call.circuit, call.task, call.model) for call in asked} == {(found.circuit, found.task, found.model)}


def test_the_verdicts_and_the_two_pictures_are_shown(found, asked) -> None:  # noqa: F811
    found.bench.judge()
    found.wait(SOON)
    shown = Tags(found.bench.said.value)
    for words in ("partial necessity", "Only 23 facts", ".71 [.61, .79]", "change the loss by more than"):
        assert words in shown.text, words
    assert shown.tags.count("img") == 2
    assert "partial necessity" in Tags(found.to_html()).text  # and on pages without widgets


def test_a_page_is_saved(found, asked, tmp_path) -> None:  # noqa: F811
    page = tmp_path / "verdict.html"
    found.bench.path.value = str(page)
    found.bench.save_button.click()
    assert "press Judge" in found._message.value and not page.exists()
    found.bench.judge()
    found.wait(SOON)
    found.bench.save_button.click()
    assert str(page) in found._message.value and "the referee" in page.read_text(encoding="utf-8")
    page.write_text("mine")
    found.bench.save_button.click()
    assert "is kept" in found._message.value and page.read_text() == "mine"


def test_another_circuit_on_screen_has_its_own_judgement_or_none(found, asked) -> None:  # noqa: F811
    found.bench.judge()
    found.wait(SOON)
    found.resize(30)
    found.wait(SOON)
    assert found.bench.judgement is None and "Press Judge" in found.bench.said.value
    found.bench.judge()
    found.wait(SOON)
    found.run()
    found.wait(SOON)
    assert found.bench.judgement is None
    found.show(0)
    assert found.bench.judgement is not None and "partial necessity" in found.bench.said.value


def test_cancel_stops_it_and_what_was_said_stays(found, asked, monkeypatch) -> None:  # noqa: F811
    found.bench.judge()
    found.wait(SOON)
    before, started = found.bench.judgement, threading.Event()

    def endless(*args: Any, progress: Any, **more: Any) -> None:
        for done in range(10_000):
            started.set()
            time.sleep(0.01)
            progress(done, 10_000, "")
        raise AssertionError("not cancelled")

    monkeypatch.setattr(benches, "referee", endless)
    found.bench.judge()
    assert started.wait(SOON)
    found._cancel_button.click()
    found.wait(SOON)
    assert found.state == "idle" and found.bench.judgement is before


def test_without_a_circuit_or_its_facts_it_says_what_to_do(panel, asked) -> None:  # noqa: F811
    panel.bench.judge_button.click()
    assert "press Run" in panel._message.value and not asked
    with pytest.raises(SettingError, match="press Judge"):
        panel.bench.save("x.html")


def test_what_the_referee_refuses_is_said(found, asked, monkeypatch) -> None:  # noqa: F811
    def refuse(*args: Any, **more: Any) -> None:
        raise KcwbError("There is nothing to judge.")

    monkeypatch.setattr(benches, "referee", refuse)
    found.bench.judge()
    with pytest.raises(KcwbError, match="nothing to judge"):
        found.wait(SOON)
    assert "nothing to judge" in found._message.value and found.bench.judgement is None


def test_hostile_names_are_text(found, monkeypatch) -> None:  # noqa: F811
    judgement = hostile(judgement_of(), [text for text in HOSTILE if text.strip()])
    monkeypatch.setattr(benches, "referee", lambda *args, **more: judgement)
    found.bench.judge()
    found.wait(SOON)
    shown = Tags(found.bench.said.value)
    assert "script" not in shown.tags and HOSTILE[0] in shown.text


def test_it_says_what_the_plain_function_says(found, model, monkeypatch, tmp_path) -> None:  # noqa: F811
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path))
    few = partial(kcwb.referee, draws=6, relations=0)
    monkeypatch.setattr(benches, "referee", few)
    found.bench.judge()
    found.wait(5 * SOON)
    judged = few(model, found.circuit, found.task, quick=True, cache=False, progress=False)
    pd.testing.assert_frame_equal(found.bench.judgement.questions, judged.questions)
    assert all(name in Tags(found.bench.said.value).text for name in judged.answers.index)
