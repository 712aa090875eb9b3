"""Comparisons over many edits are those of the single ones, and claims hold, fail or stay open."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.editing.cases import EditCase
from kcwb.errors import SettingError
from kcwb.studies.editing_account.claims import account, compare_edits, edit_claims
from kcwb.studies.editing_account.comparison import compare_edit
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.editing.conftest import TEMPLATES, large_edit, same_bits, weights
from tests.tasks import prompt_ids


def test_many_edits_are_the_single_ones(model, relation, monkeypatch):
    from kcwb.studies.editing_account import claims as module

    monkeypatch.setattr(module, "strongest_movers", lambda *args: ["a1.h0"])
    monkeypatch.setattr(module, "make_task", lambda model, _name, **more: make_task(model, relation, **more))
    facts = make_task(model, relation, n=4).val.facts[:2]
    cases = [EditCase(fact, "w61", TEMPLATES[0], (), (), relation="words") for fact in facts]
    same = EditCase(facts[0], f"{facts[0].object.split()[0]} w9", TEMPLATES[0], (), (), relation="words")
    tokens = torch.tensor([prompt_ids(model, TEMPLATES[0].replace("{}", facts[1].subject))])
    said = model.tokenizer.decode([int(model.logits(tokens)[0, -1].argmax())])
    known = Fact(facts[1].subject, "w62" if said != "w62" else "w63")  # its target is what the model says already
    already = EditCase(known, said, TEMPLATES[0], (), (), relation="words")
    more = {"layer": 0, "steps": 4, "lr": 0.1, "clamp": 0.3, "bound": 99.0, "edges": 40, "draws": 4, "n": 4}
    before = weights(model)
    with pytest.warns(UserWarning, match=r"2 of 4 edits left out.*answer already"):
        table = compare_edits(model, [*cases, same, already], "ft_m", progress=False, **more)
    assert same_bits(model, before) and table["subject"].tolist() == [fact.subject for fact in facts]
    made = large_edit(model, facts[1], "w61")
    task = make_task(model, relation, n=4)
    single = compare_edit(model, made, task, edges=40, movers=["a1.h0"], draws=4, progress=False).summary
    for name, value in single.items():
        assert table.iloc[1][name] == pytest.approx(value, nan_ok=True), name
    both = compare_edits(model, cases, {"ft_l": {"lr": 0.2}, "ft_m": {}}, progress=False, **more)
    assert both["method"].tolist() == ["ft_l", "ft_m"] * 2
    by_itself = compare_edits(model, cases, "ft_l", progress=False, **{**more, "lr": 0.2})
    for name, alone in (("ft_l", by_itself), ("ft_m", table)):
        pd.testing.assert_frame_equal(both[both["method"] == name].reset_index(drop=True), alone)


@pytest.mark.parametrize(
    ("cases", "method", "words"),
    [
        ([], "rome", "0 cases"),
        ([EditCase(Fact("w5", "w40"), "w50", "w80 {}", (), ())], {}, "0 editors"),
        ([EditCase(Fact("w5", "w40"), "w50", "w80 {}", (), ())], {"rome": {}, "romee": {}}, "rome"),
        ([EditCase(Fact("w5", "w40"), new, "w80 {}", (), ()) for new in ("w50", "w40")], "rome", "Case 1"),
        ([EditCase(Fact("w5", "w40"), "w50", "w80 {}", (), ())], {"rome": {}, "ft_m": {"layer": 2}}, "layers 0 to 1"),
        ([EditCase(Fact("w5", "w40"), "w50", "w80 {}", (), ())], "rome", "edges=300.*has 110"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(model, cases, method, words, monkeypatch):
    from kcwb.studies.editing_account import claims as module

    monkeypatch.setattr(module, "make_task", lambda *args, **more: pytest.fail("work was done"))
    with pytest.raises(SettingError, match=words):
        compare_edits(model, cases, method, progress=False)


def test_the_account_says_yes_no_or_undecided():
    n = 40
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"te_subject": 0.9 + 0.02 * draw.standard_normal(n), "edge_iou": 0.5})
    table["te_end"] = 0.1 + 0.02 * draw.standard_normal(n)
    table["te_movers"], table["te_random"] = 0.5 + 0.4 * draw.standard_normal(n), 0.2
    table["edge_iou_paraphrase"] = table["edge_iou_answer"] = 0.5 + 0.01 * draw.standard_normal(n)
    table["edited_share"], table["node_share"] = 0.02 + 0.001 * draw.standard_normal(n), 0.03
    rows = edit_claims(table).set_index("quantity")
    assert rows["holds"].to_dict() == {
        "te_subject": "yes",
        "te_end": "no",
        "te_movers - te_random": "yes",
        "te_movers": "undecided",
        "edge_iou_paraphrase - edge_iou": "undecided",
        "edge_iou_answer - edge_iou": "undecided",
        "edited_share - node_share": "no",
    }
    assert (rows["n"] == n).all() and (rows["low"] <= rows["mean"]).all()
    with pytest.warns(DeprecationWarning, match="edit_claims"):
        pd.testing.assert_frame_equal(account(table).set_index("quantity"), rows)


def test_one_edit_or_edits_that_are_all_alike_decide_nothing():
    names = ("te_subject", "te_end", "te_movers", "te_random", "edge_iou", "edge_iou_paraphrase", "edge_iou_answer")
    for n in (1, 30):
        rows = edit_claims(pd.DataFrame(dict.fromkeys((*names, "edited_share", "node_share"), [0.6] * n)))
        assert (rows["holds"] == "undecided").all() and rows[["low", "high"]].isna().all(axis=None)
