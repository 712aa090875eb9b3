"""The referee's page: verdicts on one screen, all of a judgement below, and nothing in it but text and pictures."""

from __future__ import annotations

import html
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bs4 import BeautifulSoup

import kcwb
from kcwb.errors import SettingError
from kcwb.evaluation.referee.judgement import NO, NOT_SHOWN, YES, Judgement
from kcwb.outputs import PAGE_MARK
from kcwb.workbench import verdicts
from kcwb.workbench.report.judgement import check_page, judgement_page, ranking_page
from tests.hostile import HOSTILE
from tests.workbench.judgements import ASKED, hostile, judgement_of

RANKING = pd.DataFrame(
    {"circuit": ["ours", "theirs"], "yes": [4, 2], "faithfulness": [0.93, 0.5], "low": [0.9, 0.4], "high": [0.95, 0.6],
     "equivalence": [YES, NO]}
)  # fmt: skip


def text_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def words(tag: Any) -> str:
    return " ".join(tag.get_text(" ").split())


@pytest.fixture
def page(tmp_path: Path) -> BeautifulSoup:
    return text_of(judgement_page(judgement_of(), tmp_path / "page.html"))


def rows(page: BeautifulSoup) -> dict[str, list[str]]:
    found = page.select("table.kc-verdicts tbody tr")
    cells = [[words(cell) for cell in row.find_all("td")] for row in found]
    return {words(row.strong): cell for row, cell in zip(found, cells, strict=True)}


def test_the_page_says_which_circuit_of_which_model_on_what(page: BeautifulSoup) -> None:
    assert words(page.h1) == words(page.title) == "300 edges of smollm2-135m for country_capital"
    assert words(page.select_one(".kc-byline")) == (
        "“The capital of {} is” · 48 facts · found with eap-ig, mean, nll · judged under mean ablation · 100 random "
        "circuits · 20 random paths"
    )
    assert words(page.select(".kc-title p")[1]) == (
        "Shown: sufficiency, specificity, uniqueness; wrong: minimality, other templates, other ablations; not shown "
        "either way: equivalence, independence, partial necessity, other facts."
    )


def test_each_question_has_a_row_with_its_claim_verdict_numbers_and_sentence(page: BeautifulSoup) -> None:
    found = rows(page)
    assert list(found) == list(dict.fromkeys(row[0] for row in ASKED))
    asked = judgement_of().questions.set_index("question")
    assert found["minimality"] == [
        f"minimality {asked.claim['minimality']}", "no", ".94 [.87, .98]", "4e-04", ".64", asked.sentence["minimality"],
    ]  # fmt: skip
    # of two metrics, both; and the sentence of the one that decides
    both = "nll, not shown: .46 [.33, .60] logit_diff, yes: .48 [.34, .62]"
    assert found["equivalence"][1:4] == ["not shown", both, ".124 .080"]
    assert found["equivalence"][5] == asked.sentence["equivalence"].iloc[0]
    assert found["independence"][2] == ".0040"  # without an interval; two digits that say something


def test_a_p_value_that_is_too_small_for_a_number_is_not_0() -> None:
    judgement = judgement_of()
    none = replace(judgement, questions=judgement.questions.assign(holm=0.0))
    table = BeautifulSoup(verdicts.verdict_table(none), "html.parser")
    assert {words(row.find_all("td")[3].div) for row in table.select("tbody tr")} == {"<1e-300"}


def test_metrics_that_agree_are_told_apart_without_their_verdicts() -> None:
    judgement = judgement_of()
    same = replace(judgement, questions=judgement.questions.assign(verdict=NO))
    table = BeautifulSoup(verdicts.verdict_table(same), "html.parser")
    assert words(table.select_one("td.kc-number")) == "nll: .46 [.33, .60] logit_diff: .48 [.34, .62]"


def test_verdicts_are_told_by_word_and_mark(page: BeautifulSoup) -> None:
    marks = {words(one): set(one["class"]) - {"kc-verdict"} for one in page.select(".kc-verdict")}
    assert marks == {"not shown": {"kc-open"}, "yes": {"kc-yes"}, "no": {"kc-no"}}


def test_pictures_are_in_the_page_each_with_its_sentence(page: BeautifulSoup) -> None:
    judgement = judgement_of()
    figures = page.find_all("figure")
    assert [words(one.figcaption) for one in figures] == [
        kcwb.plots.matrix_sentence(judgement),
        kcwb.plots.minimality_sentence(judgement),
        kcwb.plots.rivals_sentence(judgement),
    ]
    assert all(one.img["src"].startswith("data:image/png;base64,") and one.img["alt"] for one in figures)


def test_all_tables_are_below(page: BeautifulSoup) -> None:
    shown = words(page)
    for name in ("{} has the capital", "country_language", "a1.h0<v>", "Every pair of ablations", "held out"):
        assert name in shown
    assert ".11 [.02, .20]" in shown and "arXiv 2410.13032" in shown and "ab" * 32 in shown


def test_few_facts_are_told_with_what_they_could_show(tmp_path: Path) -> None:
    few = text_of(judgement_page(judgement_of(facts=23), tmp_path / "few.html")).select_one(".kc-warning")
    assert words(few).startswith("Only 23 facts, where 50 are asked for: small effects are not seen.")
    assert "wrong by this much: equivalence by .24; independence by .35; other facts by .28;" in words(few)
    assert verdicts.few_facts(judgement_of(facts=50)) == ""
    judgement = judgement_of(facts=9)
    judgement = replace(judgement, questions=judgement.questions.assign(least=math.nan))
    assert "wrong by this much" not in verdicts.few_facts(judgement)
    assert "Nothing is wrong enough to be found so: equivalence, independence," in verdicts.few_facts(judgement)


@pytest.mark.parametrize(
    ("ends", "written"),
    [
        ((0.5, 0.25, 0.75), ".50 [.25, .75]"),
        ((0.0042, 0.001, 0.011), ".004 [.001, .011]"),
        ((-3.14159, -4.0, -2.0), "−3.14 [−4.00, −2.00]"),
        ((0.0, math.nan, math.nan), ".00"),
        ((math.nan, math.nan, math.nan), "–"),
    ],
)
def test_effects_are_written_with_digits_that_say_something(ends: tuple[float, float, float], written: str) -> None:
    assert verdicts.fitting(*ends) == written


def test_a_judgement_without_tables_has_a_page(tmp_path: Path) -> None:
    judgement = judgement_of()
    empty = {name: getattr(judgement, name).head(0) for name in ("matrix", "edges", "null", "rivals", "elsewhere")}
    page = text_of(judgement_page(replace(judgement, **empty), tmp_path / "quick.html"))
    assert "No other ablation was tried." in words(page)
    assert len(rows(page)) == 10 and not page.find_all("img")


def test_a_judgement_that_says_nothing_of_its_origin_has_a_page(tmp_path: Path) -> None:
    judgement = replace(judgement_of(), provenance={})
    assert words(text_of(judgement_page(judgement, tmp_path / "x.html")).h1) == "A circuit of a model for a relation"


def test_the_page_of_a_judgement_read_from_text_is_the_same(tmp_path: Path) -> None:
    judgement = judgement_of()
    nothing = judgement.rivals.assign(low=math.nan, high=math.nan)  # all of a column, as of rivals that lead nowhere
    judgement = replace(judgement, rivals=nothing, questions=judgement.questions.assign(p_for=math.nan))
    first = judgement_page(judgement, tmp_path / "a.html").read_text(encoding="utf-8")
    again = judgement_page(Judgement.from_json(judgement.to_json()), tmp_path / "b.html").read_text(encoding="utf-8")
    assert first == again


def test_a_ranking_has_a_row_for_each_circuit_and_all_of_each_below(tmp_path: Path) -> None:
    judged = {"ours": judgement_of(), "theirs": judgement_of(facts=80)}
    page = text_of(ranking_page(RANKING, judged, tmp_path / "ranking.html"))
    assert words(page.h1) == "2 circuits of smollm2-135m for country_capital"
    head, *body = [[words(cell) for cell in row.find_all(["th", "td"])] for row in page.table.find_all("tr")]
    assert head == ["circuit", "yes", "faithfulness", "equivalence"]
    assert body == [["ours", "4", ".93 [.90, .95]", "yes"], ["theirs", "2", ".50 [.40, .60]", "no"]]
    below = page.find_all("details")
    assert [words(one.summary).partition(":")[0] for one in below] == ["ours", "theirs"]
    assert [len(one.select("table.kc-verdicts tr")) for one in below] == [11, 11]
    assert "Only 48 facts" in words(below[0]) and "Only" not in words(below[1])
    with pytest.raises(SettingError, match="no judgement"):
        ranking_page(RANKING.head(0), {}, tmp_path / "none.html")


def test_only_pages_of_ours_are_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(SettingError, match="is kept"):
        judgement_page(judgement_of(), path)
    assert path.read_text(encoding="utf-8") == "mine"
    assert judgement_page(judgement_of(), path, force=True) == path
    assert PAGE_MARK in path.read_text(encoding="utf-8")
    assert judgement_page(judgement_of(), path) == path
    with pytest.raises(SettingError, match=r"ends in \.html"):
        check_page(tmp_path / "page.json")


def hostile_pages(folder: Path) -> list[Path]:
    texts = [text for text in HOSTILE if text.strip()]
    judgement = hostile(judgement_of(), texts)
    ranking = RANKING.assign(circuit=texts[:2])
    return [
        judgement_page(judgement, folder / "one.html"),
        ranking_page(ranking, dict(zip(texts[:2], [judgement] * 2, strict=True)), folder / "two.html"),
    ]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    for path in hostile_pages(tmp_path):
        page = text_of(path)
        assert not page.find_all(["script", "object", "embed", "base", "form", "iframe", "link", "svg", "input"])
        assert {one["http-equiv"] for one in page.find_all("meta") if one.has_attr("http-equiv")} == {
            "Content-Security-Policy"
        }
        for tag in page.find_all(True):
            for name, value in tag.attrs.items():
                assert not name.startswith("on"), tag
                assert name == "href" or not re.match(r"\s*(?:javascript|https?:|//)", str(value), re.I), (name, value)
        assert {one["href"].partition("/abs/")[0] for one in page.find_all("a")} == {"https://arxiv.org"}
        assert html.escape(HOSTILE[0], quote=False) in path.read_text(encoding="utf-8")


@pytest.mark.browser
def test_the_page_opens_without_a_network_and_answers_on_the_first_screen(tmp_path: Path, show: Any) -> None:
    for path in [judgement_page(judgement_of(facts=23), tmp_path / "plain.html"), *hostile_pages(tmp_path)]:
        shown = show(path.read_text(encoding="utf-8"))
        shown.set_viewport_size({"width": 1280, "height": 800})
        assert shown.evaluate("window.hacked") is None
        assert shown.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert shown.evaluate("document.documentElement.scrollWidth") <= 1280
        if path.stem == "plain":
            box = shown.locator("table.kc-verdicts").bounding_box()
            assert box["y"] + box["height"] <= 800


def test_they_are_public() -> None:
    assert kcwb.judgement_page is judgement_page and kcwb.ranking_page is ranking_page
    assert {YES, NO, NOT_SHOWN} == {"yes", "no", "not shown"}
