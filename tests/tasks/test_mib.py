"""MIB's task files, written in their form: what is taken of a row, what is left out, and what is refused."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kcwb.errors import DataError, SettingError
from kcwb.tasks.mib import load_mib_task
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task

_IOI = "When {0} and {1} went to the park, {2} gave a ball to"
IOI = {
    "prompt": _IOI.format("Ann", "Bob", "Ann"),
    "choices": ["Bob", "Ann"],
    "answerKey": 0,
    "metadata": {"subject": "Ann", "indirect_object": "Bob", "random_c": "Cid", "object": "ball", "place": "park"},
    "s2_io_flip_counterfactual": {"prompt": _IOI.format("Ann", "Bob", "Bob"), "choices": ["Ann", "Bob"]},
    "abc_counterfactual": {"prompt": _IOI.format("Ann", "Bob", "Cid")},
}
_MCQA = "A box is brown. What color is a box?\n{0}. gray\n{1}. brown\nAnswer:"
MCQA = {
    "prompt": _MCQA.format("A", "B"),
    "choices": {"label": ["A", "B"], "text": ["gray", "brown"]},
    "answerKey": 1,
    "symbol_counterfactual": {
        "prompt": _MCQA.format("P", "Q"),
        "choices": {"label": ["P", "Q"], "text": ["gray", "brown"]},
        "answerKey": 1,
    },
}
SUM = {
    "prompt": "Q: How much is 12 plus 34? A: ",
    "label": 46,
    "operator": "+",
    "num_digit": 2,
    "random_counterfactual": {"prompt": "Q: How much is 51 plus 16? A: ", "label": 67},
}
ROWS: dict[str, tuple[dict[str, Any], Fact]] = {
    "ioi": (
        IOI,
        Fact(IOI["prompt"], "Bob", wrong=("Ann",), corrupted=_IOI.format("Ann", "Bob", "Bob"), span=(35, 38)),
    ),
    "mcqa": (MCQA, Fact(MCQA["prompt"], "B", wrong=("Q",), corrupted=_MCQA.format("P", "Q"), span=(0, 0))),
    "arc_easy": (MCQA, Fact(MCQA["prompt"], "B", wrong=("Q",), corrupted=_MCQA.format("P", "Q"), span=(0, 0))),
    "arithmetic_addition": (
        SUM,
        Fact(SUM["prompt"], "46", (), ("67",), "Q: How much is 51 plus 16? A: ", (0, 0), False),
    ),
}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame(list(rows)).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("task", ROWS)
def test_a_row_becomes_a_fact(tmp_path, task, ending):
    row, fact = ROWS[task]
    found = load_mib_task(written(tmp_path / f"test.{ending}", row), task)
    assert found.name == task and found.facts == (fact,)


def test_another_counterfactual_can_be_taken(tmp_path):
    found = load_mib_task(written(tmp_path / "test.jsonl", IOI), "ioi", counterfactual="abc_counterfactual")
    assert found.facts[0].corrupted == IOI["abc_counterfactual"]["prompt"]
    assert found.facts[0].named == "Ann"


def test_rows_of_the_other_operator_and_without_a_counterfactual_are_no_part_of_the_task(tmp_path):
    minus = {**SUM, "prompt": "Q: How much is 34 minus 12? A: ", "label": 22, "operator": "-"}
    alone = {**SUM, "prompt": "Q: How much is 1 plus 1? A: ", "random_counterfactual": None}
    path = written(tmp_path / "test.jsonl", minus, alone, SUM)
    assert [fact.object for fact in load_mib_task(path, "arithmetic_addition").facts] == ["46"]
    assert [fact.object for fact in load_mib_task(path, "arithmetic_subtraction").facts] == ["22"]


def test_the_same_prompt_again_and_the_same_answer_are_counted_and_left_out(tmp_path):
    same = deepcopy(MCQA) | {"prompt": "Another.\nAnswer:"}
    same["symbol_counterfactual"]["choices"]["label"][1] = "B"
    path = written(tmp_path / "test.jsonl", MCQA, MCQA, same)
    with pytest.warns(UserWarning, match="2 rows are left out"):
        assert len(load_mib_task(path, "mcqa").facts) == 1


def test_the_first_rows_can_be_taken(tmp_path):
    rows = [{**SUM, "prompt": f"Q: How much is 1{i} plus 34? A: ", "label": 44 + i} for i in range(5)]
    found = load_mib_task(written(tmp_path / "test.jsonl", *rows), "arithmetic_addition", n=3)
    assert [fact.object for fact in found.facts] == ["44", "45", "46"]


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("ioi", {"metadata": {"subject": "Ann"}}, r"row 2, metadata: there is no 'indirect_object' \(found: subject\)"),
        ("ioi", {"s2_io_flip_counterfactual": None}, "row 2: there is no 's2_io_flip_counterfactual'"),
        ("mcqa", {"answerKey": 7}, "row 2: the answerKey 7 is none of the 2 labels"),
        ("mcqa", {"choices": None}, "row 2: there is no 'choices'"),
    ],
)
def test_a_row_of_another_form_is_refused_with_its_place(tmp_path, task, change, words):
    row = ROWS[task][0]
    path = written(tmp_path / "test.jsonl", row, {**row, "prompt": "Another", **change})
    with pytest.raises(DataError, match=words):
        load_mib_task(path, task)


def test_a_row_without_its_label_is_refused_with_its_place(tmp_path):
    """Where another row has one, the table has NaN there."""
    without = {key: value for key, value in SUM.items() if key != "label"} | {"prompt": "Q: How much is 1 plus 1? A: "}
    with pytest.raises(DataError, match="row 2: there is no 'label'"):
        load_mib_task(written(tmp_path / "test.jsonl", SUM, without), "arithmetic_addition")


def test_a_file_of_no_such_task_is_refused(tmp_path):
    path = written(tmp_path / "test.jsonl", SUM)
    with pytest.raises(SettingError, match="'iou' is not known"):
        load_mib_task(path, "iou")
    with pytest.raises(DataError, match="no row of the task arithmetic_subtraction"):
        load_mib_task(path, "arithmetic_subtraction")


@pytest.mark.model
def test_the_built_in_model_is_asked_with_its_own_tokens(smollm2, tmp_path):
    task = make_task(smollm2, load_mib_task(written(tmp_path / "test.jsonl", IOI), "ioi"), n=1)
    prompts = task.val
    assert smollm2.tokenizer.decode(prompts.answers[0]) == " Bob" and bool(prompts.paired.all())
    assert smollm2.tokenizer.decode([int(prompts.foils[0])]) == " Ann"
    assert smollm2.tokenizer.decode(prompts.tokens[0, int(prompts.subject_start[0])]) == " Ann"


def test_a_giver_is_where_its_name_stands_as_a_whole_word(tmp_path):
    prompt = "When Ann and Bob went to the park, Ann gave a ball to Annabel and"
    (fact,) = load_mib_task(written(tmp_path / "test.jsonl", IOI | {"prompt": prompt}), "ioi").facts
    assert fact.span == (35, 38)
