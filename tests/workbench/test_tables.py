"""Tables as they are read."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from kcwb.workbench import tables
from kcwb.workbench.tables import completeness_rows


def test_a_mean_without_an_interval_stands_alone():
    rows = [("circuit", 0.5, 0.2, 0.8), ("random circuits", 0.0, math.nan, math.nan)]
    frame = pd.DataFrame(rows, columns=["run", "hit", "low", "high"])
    shown = completeness_rows(frame.assign(split="D_val", n=8, edges=5, nodes=4, nll=1.0))
    assert shown["Hit@10, D_val (n=8)"].tolist() == ["0.50 [0.20, 0.80]", "0.00"]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.934, ".93"),
        (-0.04, "\u2212.04"),
        (1.2, "1.20"),
        (-1.5, "\u22121.50"),
        (0.0, ".00"),
        (math.nan, "–"),
        (10.0, "10.00"),
    ],
)
def test_decimals_have_no_zero_before_the_point(value: float, written: str) -> None:
    assert tables.decimal(value) == written


def test_an_interval_is_written_where_there_is_one() -> None:
    assert tables.interval(0.5, 0.25, 1.0) == ".50 [.25, 1.00]"
    assert tables.interval(0.5, math.nan, 1.0) == ".50"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1.49e-5, "1.49×10⁻⁵"),
        (-2e-10, "\u22122×10⁻¹⁰"),
        (1.5e20, "1.5×10²⁰"),
        (0.0001, "0.0001"),
        (-0.25, "\u22120.25"),
        (-1234.0, "\u22121,234"),
        (1234.5, "1,234"),
        (999.4, "999"),
        (999.5, "1,000"),
        (-999.96, "\u22121,000"),
        (pd.NA, "–"),
        (0.0, "0"),
        (-0.0, "0"),
        (None, "–"),
        ("a_name", "a_name"),
    ],
)
def test_numbers_are_written_for_people(value: object, written: str) -> None:
    assert tables.number(value) == written


def test_columns_are_headed_in_words_and_names_of_others_as_they_are() -> None:
    shown = tables.table(pd.DataFrame({"gold_subject": [0.5], "country_capital": [1e-7]}), {"gold_subject": str})
    assert '<th class="kc-number">to the right answer, by the subject</th>' in shown
    assert ">country_capital</th>" in shown and ">1×10⁻⁷</td>" in shown
    assert not [words for words in tables.HEADS.values() if "_" in words]
