"""Tables as they are read."""

from __future__ import annotations

import math

import pandas as pd

from kcwb.workbench.tables import completeness_rows


def test_a_mean_without_an_interval_stands_alone():
    rows = [("circuit", 0.5, 0.2, 0.8), ("random circuits", 0.0, math.nan, math.nan)]
    frame = pd.DataFrame(rows, columns=["run", "hit", "low", "high"])
    shown = completeness_rows(frame.assign(split="D_val", n=8, edges=5, nodes=4, nll=1.0))
    assert shown["Hit@10, D_val (n=8)"].tolist() == ["0.50 [0.20, 0.80]", "0.00"]
