"""Edits of facts that have several right answers, or no space before their answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kcwb.editing.cases import EditCase, edit_cases
from kcwb.editing.edit import edit
from kcwb.editing.scores import edit_scores
from kcwb.errors import SettingError
from kcwb.models.loading import Model, load_model
from kcwb.studies.editing_account.comparison import compare_edit
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.editing.conftest import FACT, TEMPLATE, large_edit
from tests.tasks import relation_of, spaced_tokenizer
from tests.tiny import tiny_hf

STRONG = {"layer": 0, "steps": 30, "lr": 0.1, "clamp": 1.0, "bound": float("inf"), "progress": False}
TIGHT = Fact("w5", "w7", space=False)


@pytest.fixture(scope="module")
def spaced() -> Model:
    """A model for which `w9` and ` w9` are two tokens."""
    return load_model(tiny_hf("llama", 3), spaced_tokenizer(), device="cpu")


def probabilities(model: Model, text: str, *tokens: str) -> list[float]:
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    shares = model.logits(torch.tensor([ids]))[0, -1].softmax(-1)
    return [float(shares[model.tokenizer.convert_tokens_to_ids(token)]) for token in tokens]


def test_an_edit_writes_its_answer_with_a_space_before_it_or_without_as_the_fact_has_it(spaced):
    for fact, asked, other in ((TIGHT, "w9", " w9"), (replace(TIGHT, space=True), " w9", "w9")):
        made = edit(spaced, fact, "w9", "ft_m", template="w1 {} w2", **STRONG)
        before = probabilities(spaced, "w1 w5 w2", asked)[0]
        with made:
            own, without = probabilities(spaced, "w1 w5 w2", asked, other)
        assert own > 0.5 > before and own > 10 * without
        assert made.nll == pytest.approx(-torch.tensor(own).log().item(), abs=1e-4)


def test_scores_are_of_the_answers_as_the_fact_has_them(spaced):
    case = EditCase(TIGHT, "w9", "w1 {} w2", ("w3 w5 w2",), ("w1 w6 w2",))
    table = edit_scores(spaced, [case], "ft_m", layer=0, steps=2, tokens=0, progress=False)
    unedited = table[table["run"] == "unedited"].iloc[0]
    for score, text, sign in (("EM", "w1 w5 w2", 1), ("PM", "w3 w5 w2", 1), ("NM", "w1 w6 w2", -1)):
        new, true = probabilities(spaced, text, "w9", "w7")
        assert unedited[score] == pytest.approx(sign * (new - true), abs=1e-6)


def test_a_comparison_follows_the_new_object_as_the_fact_has_it(spaced):
    facts = [Fact(f"w{10 + i}", f"w{30 + i % 8}", space=False) for i in range(16)]
    relation = relation_of(facts, "w1 {} w2", "w3 {} w4")
    task = make_task(spaced, relation, n=6)
    fact = task.val.facts[0]
    target = next(name for name in relation.objects if name != fact.object)
    found = compare_edit(
        spaced, large_edit(spaced, fact, target), task, edges=60, movers=["a0.h1"], draws=20, progress=False
    )
    last = found.lens[(found.lens["layer"] == 1) & (found.lens["quantity"] == "probability")]
    shown = last[(last["state"] == "before") & (last["who"] == "new, END")]["value"].item()
    assert shown == pytest.approx(probabilities(spaced, f"w1 {fact.subject} w2", target)[0], abs=1e-5)


def test_no_fact_is_edited_to_what_is_right_already(model):
    facts = [Fact(f"w{10 + i}", f"w{60 + i % 3}", also=(f"w{60 + (i + 1) % 3}",)) for i in range(12)]
    cases = edit_cases(model, [relation_of(facts)], n=12, rank=model.network.d_vocab)
    assert len(cases) == 12 and not any(case.target in case.fact.right for case in cases)
    two = replace(FACT, also=("w41",))
    with pytest.raises(SettingError, match="'w41' is already the answer"):
        edit(model, two, "w41", "ft_m", template=TEMPLATE, layer=0, bound=float("inf"), progress=False)
    with pytest.raises(SettingError, match="has already"):
        edit_scores(model, [EditCase(two, "w41", TEMPLATE, (), ())], "ft_m", layer=0, progress=False)
