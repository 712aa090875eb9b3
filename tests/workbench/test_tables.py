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
