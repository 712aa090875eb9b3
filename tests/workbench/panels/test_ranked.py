"""A table that is sorted, filtered and clicked, in Chromium."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest

from kcwb.workbench import tables
from kcwb.workbench.panels.ranked import Ranked

FRAME = pd.DataFrame(
    {"sender": ["m0", "a1.h10", "a1.h2", "<b>x</b>"], "edges": [3, 1, 2, 0], "score": [0.5, -2.0, 0.125, math.nan]}
)
KEYS = ["m0->m1", "a1.h10->m1", "a1.h2->m1", "x->m1"]


@pytest.fixture
def table() -> Ranked:
    table = Ranked()
    table.show(FRAME, KEYS)
    return table


def test_only_a_row_that_there_is_can_be_chosen_by_the_page(table: Ranked) -> None:
    assert table.rows[1] == ["a1.h10", 1, -2] and table.rows[3] == ["<b>x</b>", 0, None]
    table.set_state({"chosen": "m0->m1", "rows": []})
    assert table.chosen == "m0->m1" and len(table.rows) == 4
    table.set_state({"chosen": "nobody"})
    table.set_state({"chosen": ["m0->m1"]})
    assert table.chosen == "m0->m1"
    table.show(pd.DataFrame({"token": ["\n", "x" * 999]}), ["a", "b"])
    assert table.chosen == "" and [len(row[0]) for row in table.rows] == [1, 160]


def opened(table: Ranked, show: Any) -> Any:
    """A page with the table; what the widget holds is `values` there."""
    values = {name: getattr(table, name) for name in ("columns", "rows", "names", "numeric", "chosen", "most")}
    script = str(table._esm).replace("export default { render };", "")
    return show(
        f"<!doctype html><meta charset=utf-8><body><script>{script}"
        f"const values = {json.dumps(values).replace('<', chr(92) + 'u003c')};"
        "const heard = {};const model = { get: (name) => values[name], on: (name, work) => { heard[name] = work; },"
        " off() {}, set(name, value) { values[name] = value; heard[`change:${name}`]?.(); }, save_changes() {} };"
        "render({ model, el: document.body });</script>"
    )


@pytest.mark.browser
def test_numbers_are_written_as_in_other_tables(show: Any) -> None:
    values = [1234, 1, 0, -41, 999.6, 0.0312, -1e-5, 1234.5678, math.nan]
    table = Ranked()
    table.show(pd.DataFrame({"number": values}), [str(value) for value in values])
    page = opened(table, show)
    written = page.locator("tbody td").all_inner_texts()
    assert written == [tables.number(value) for value in values] and written[0] == "1,234"


@pytest.mark.browser
def test_it_is_sorted_filtered_and_clicked(table: Ranked, show: Any) -> None:
    page = opened(table, show)

    def first() -> list[str]:
        return page.locator("tbody tr td:first-child").all_inner_texts()

    assert first() == list(FRAME["sender"]) and "4 rows" in page.inner_text(".kc-line")
    page.get_by_role("button", name="score").click()  # by size
    assert first() == ["a1.h10", "m0", "a1.h2", "<b>x</b>"]
    assert page.locator("th").nth(2).get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="score").click()
    assert first() == ["<b>x</b>", "a1.h2", "m0", "a1.h10"]
    page.get_by_role("button", name="sender").click()
    page.get_by_role("button", name="sender").click()
    assert [name for name in first() if name[0] == "a"] == ["a1.h2", "a1.h10"]
    page.fill("input", "A1.H")
    assert first() == ["a1.h2", "a1.h10"] and "2 of 4 rows" in page.inner_text(".kc-line")
    page.locator("tbody tr").nth(1).click()
    assert page.evaluate("values.chosen") == "a1.h10->m1"
    assert page.locator("tbody tr[aria-selected=true]").count() == 1
    page.locator("tbody tr").first.press("Enter")
    assert page.evaluate("values.chosen") == "a1.h2->m1"
