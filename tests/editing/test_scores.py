"""Scores, against counting by hand on the Hugging Face model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.editing import scores
from kcwb.editing.answers import says
from kcwb.editing.cases import EditCase
from kcwb.editing.edit import edit
from kcwb.editing.scores import (
    SCORES,
    Asked,
    edit_scores,
    generate,
    layer_sweep,
    score_summary,
)
from kcwb.errors import DataError, ModelError, SettingError
from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.relations import Fact
from tests.editing.conftest import same_bits, weights
from tests.tasks import prompt_ids
from tests.tiny import tiny_model

TUNING = {"layer": 0, "steps": 3, "lr": 0.05, "clamp": 0.2}
CASE = EditCase(
    fact=Fact("w5 w6", "w40 w41"),
    target="w50",
    template="w80 {} w81",
    paraphrases=("w5 w6 w82", "w83 w5 w6 w84"),
    neighbours=("w80 w7 w81", "w80 w8 w9 w81", "w80 w10 w81"),
    same_subject=("w70 w5 w6",),
    other_subjects=("w71 w11", "w72 w12 w13", "w73 w14"),
    compositions=(("w74 w5 w6 w75", "w52", "w53 w54"),),
    relation="words",
)


def probability(model, text: str, answer: str) -> float:
    ids, own = prompt_ids(model, f"{text} {answer}"), len(answer.split())
    logs = model.logits(torch.tensor([ids[:-1]]))[0, -own:].log_softmax(-1)
    return math.exp(float(logs[range(own), ids[-own:]].mean()))


def likeliest(model, text: str) -> int:
    return int(model.logits(torch.tensor([prompt_ids(model, text)]))[0, -1].argmax())


def written(model, text: str) -> str:
    """The likeliest word again and again, until the text ends or to the twentieth."""
    words: list[str] = []
    while len(words) < 20 and "<eos>" not in words:
        words.append(model.tokenizer.decode([likeliest(model, " ".join([text, *words]))]))
    return " ".join(word for word in words if word != "<eos>")


def by_hand(model, case: EditCase, before: list[int]) -> dict[str, float]:
    new, true = case.target, case.fact.object

    def pair(text: str) -> tuple[float, float]:
        return probability(model, text, new), probability(model, text, true)

    groups = {
        "E": [pair(case.prompt)],
        "P": [pair(t) for t in case.paraphrases],
        "N": [pair(t) for t in case.neighbours],
    }
    found = {}
    for letter, pairs in groups.items():
        sign = -1 if letter == "N" else 1
        found[f"{letter}S"] = np.mean([sign * (a - b) > 0 for a, b in pairs])
        found[f"{letter}M"] = np.mean([sign * (a - b) for a, b in pairs])
    changed = [
        likeliest(model, t) != b for t, b in zip((*case.same_subject, *case.other_subjects), before, strict=True)
    ]
    found["bleed_subject"], found["bleed_other"] = np.mean(changed[:1]), np.mean(changed[1:])
    begins = [
        written(model, text).split()[: len(new.split())] == new.split() for text in (case.prompt, *case.paraphrases)
    ]
    is_all = [written(model, text) == new for text in (case.prompt, *case.paraphrases)]
    for name, hits in (("begins", begins), ("generated", is_all)):
        found[name], found[f"{name}_paraphrase"] = float(hits[0]), np.mean(hits[1:])
    found["portability"] = np.mean(
        [probability(model, t, n) > probability(model, t, o) for t, n, o in case.compositions]
    )
    return found


@pytest.mark.parametrize("method", ["ft_m", "memit"])
def test_every_score_is_what_counting_by_hand_gives(model, method):
    settings = TUNING if method == "ft_m" else {"layer": 0, "steps": 3, "prefixes": 0, "weight": 1e-3}
    before, state = [likeliest(model, t) for t in (*CASE.same_subject, *CASE.other_subjects)], weights(model)
    table = edit_scores(model, [CASE], method, progress=False, **settings).set_index("run")
    assert same_bits(model, state)
    for name, expected in by_hand(model, CASE, before).items():
        assert table.loc["unedited", name] == pytest.approx(expected, abs=1e-5), name
    made = edit(
        model, CASE.fact, CASE.target, method, template=CASE.template, bound=math.inf, progress=False, **settings
    )
    with made:
        after = by_hand(model, CASE, before)
    for name, expected in after.items():
        assert table.loc[method, name] == pytest.approx(expected, abs=1e-4), name
    assert table.loc[method, "EM"] > table.loc["unedited", "EM"]
    with made:
        loss = -math.log(probability(model, CASE.prompt, CASE.target))
    assert table.loc[method, "nll"] == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "answer", "is_it", "begins"),
    [
        (" Rome.", "Rome", True, True),
        (" the Rome\nand more", "Rome", True, True),
        (" Rome, the capital of Italy.", "Rome", False, True),
        (" ROME!", "rome", True, True),
        (" Romeo", "Rome", False, False),
        (" not Rome", "Rome", False, False),
        (" New York City", "New York", False, True),
        (" New", "New York", False, False),
        ("\n Rome", "Rome", True, True),
        ("", "Rome", False, False),
        (" a", "the", True, False),
    ],
)
def test_what_is_said_is_compared_by_squad_s_rules(text, answer, is_it, begins):
    assert says(text, answer) == (is_it, begins)


def test_what_the_model_says_is_generated_and_its_first_words_begin_it(model):
    said = written(model, CASE.prompt).split()[:4]
    for target, expected in ((said, [1.0, 1.0]), (said[:2], [0.0, 1.0]), (said[1:], [0.0, 0.0])):
        case = replace(CASE, target=" ".join(target))
        table = edit_scores(model, [case], "ft_m", tokens=4, progress=False, **TUNING).set_index("run")
        assert table.loc["unedited", ["generated", "begins"]].tolist() == expected


def test_without_tokens_the_model_is_not_asked_what_it_says(model, monkeypatch):
    monkeypatch.setattr("kcwb.editing.scores.continuations", lambda *a: pytest.fail("it was asked"))
    stopped = replace(CASE, target="w50 w.", paraphrases=())
    assert (
        edit_scores(model, [stopped], "ft_m", progress=False, **TUNING)[["generated", "begins"]].isna().all(axis=None)
    )
    table = edit_scores(model, [CASE], "ft_m", tokens=0, progress=False, **TUNING)
    assert table[["generated", "begins", "generated_paraphrase", "begins_paraphrase"]].isna().all(axis=None)
    assert score_summary(table.drop(columns=["begins"]))["score"].tolist().count("S") == 2


@pytest.mark.parametrize("target", ["the", "?"])
def test_nobody_says_an_object_of_which_squad_s_rules_leave_nothing(model, target):
    nothing = Asked(model, replace(CASE, target=target))
    assert np.isnan([*nothing.said([""] * len(nothing.questions)).values()]).all()


def test_a_case_without_some_prompts_has_no_such_scores(model):
    bare = EditCase(CASE.fact, CASE.target, CASE.template, (), CASE.neighbours)
    table = edit_scores(model, [bare], "ft_m", progress=False, **TUNING)
    assert table[["PS", "PM", "portability", "bleed_subject", "bleed_other"]].isna().all(axis=None)
    assert table[["ES", "NS"]].notna().all(axis=None)


def test_a_batch_of_memit_edits_goes_in_at_once(model):
    other = EditCase(Fact("w7 w8", "w42"), "w55", "w80 {} w81", ("w7 w8 w82",), ("w80 w9 w81",))
    more = {"layer": 1, "steps": 3, "prefixes": 0, "weight": 1e-3, "progress": False}
    table = edit_scores(model, [CASE, other], "memit", batch=2, **more)
    made = edit(
        model, [CASE.fact, other.fact], [CASE.target, other.target], "memit",
        template=[CASE.template, other.template], bound=math.inf, **more,
    )  # fmt: skip
    with made:
        expected = probability(model, other.prompt, "w55") - probability(model, other.prompt, "w42")
    assert table.iloc[-1]["EM"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(SettingError, match="memit or alphaedit alone"):
        edit_scores(model, [CASE, other], "ft_m", batch=2)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"target": "w40 w41"}, SettingError),
        ({"paraphrases": ("w1 " * 70,)}, DataError),
        ({"same_subject": ("w1 " * 70,)}, DataError),
        ({"template": "{} " + "w1 " * 70}, DataError),
    ],
)
def test_a_case_that_cannot_be_asked_is_refused_before_the_first_edit(model, wrong, error, monkeypatch):
    monkeypatch.setattr("kcwb.editing.scores.edit", lambda *a, **b: pytest.fail("work was done"))
    with pytest.raises(error):
        edit_scores(model, [CASE, replace(CASE, **wrong)], "ft_m", progress=False, **TUNING)
    with pytest.raises(SettingError, match="in its batch"):
        edit_scores(model, [CASE, replace(CASE, target="w51")], "memit", batch=2, progress=False)


@pytest.mark.parametrize(
    ("more", "words"), [({"layer": [0, 2]}, "layers 0 to 1"), ({"stepz": 2}, "steps"), ({"steps": 0}, "at least 1")]
)
def test_settings_and_models_of_no_edit_are_refused_before_anything_runs(model, more, words, monkeypatch):
    monkeypatch.setattr("kcwb.editing.scores.measure", lambda *a: pytest.fail("work was done"))
    with pytest.raises(SettingError, match=words):
        edit_scores(model, [CASE, CASE], "ft_m", bound=1.0, progress=False, **more)
    with pytest.raises(ModelError, match="not covered"):
        edit_scores(tiny_model("gemma2"), [CASE], "ft_m", progress=False)


def test_a_diverged_edit_counts_as_one_that_changed_nothing(model):
    table = edit_scores(model, [CASE], "ft_m", progress=False, layer=0, steps=2, lr=3e37, clamp=1e38).set_index("run")
    assert table.loc["ft_m", list(SCORES)].equals(table.loc["unedited", list(SCORES)]) is True
    assert np.isnan(table.loc["ft_m", "nll"])


def test_the_summary_holds_means_intervals_and_the_harmonic_mean():
    table = pd.DataFrame({name: [0.0, 1.0, 1.0, 1.0] for name in SCORES} | {"run": "rome"})
    table["NS"], table["EM"], table["portability"] = [1, 0.5, 0.5, 0], [-0.5, 0.1, 0.2, 0.6], [np.nan] * 3 + [1.0]
    rows = score_summary(table).set_index("score")
    assert rows.loc["ES", "mean"] == 0.75 and rows.loc["NS", "mean"] == 0.5
    assert rows.loc["S", "mean"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))
    assert rows.loc["portability", "n"] == 1 and rows.loc["EM", "mean"] == pytest.approx(0.1)
    some = rows.drop("portability")  # which a single case has
    assert ((some["low"] <= some["mean"]) & (some["mean"] <= some["high"])).all()
    assert tuple(rows.loc["ES", ["low", "high"]]) == proportion_interval([0, 1, 1, 1])
    assert tuple(rows.loc["NS", ["low", "high"]]) == mean_interval([1, 0.5, 0.5, 0])
    assert rows.loc["portability", ["low", "high"]].isna().all()
    assert rows.loc["EM", "low"] < 0  # magnitudes may be negative


def test_a_sweep_scores_the_same_edits_at_each_layer(model):
    more = {"steps": 3, "lr": 0.05, "clamp": 0.2, "progress": False}
    table = layer_sweep(model, [CASE], [1, 0, 1], "ft_m", **more).set_index("layer")
    assert table.index.tolist() == [1, 0] and (table["n"] == 1).all()
    for layer in (0, 1):
        alone = edit_scores(model, [CASE], "ft_m", layer=layer, **more).set_index("run").loc["ft_m"]
        assert table.loc[layer, "EM"] == pytest.approx(alone["EM"]) and table.loc[layer, "ES"] == alone["ES"]
    assert table.loc[0, "EM"] != table.loc[1, "EM"]


def test_generation_is_greedy(model):
    text = "w1 w2"
    for word in generate(model, text, tokens=4).split():
        assert model.tokenizer.decode([likeliest(model, text)]).strip() == word
        text = f"{text} {word}"


def test_several_methods_are_scored_as_each_alone_and_the_unedited_model_is_asked_once(model, monkeypatch):
    cases, more = [CASE, replace(CASE, target="w51")], {"layer": 1, "lr": 0.05, "progress": False, "tokens": 4}
    settings = {"ft_m": {"steps": 3, "clamp": 0.2}, "ft_l": {"steps": 1, "clamp": 0.1}}
    alone = {name: edit_scores(model, cases, name, **more, **own) for name, own in settings.items()}
    unedited, measured = 0, scores.measure

    def counted(*args):
        nonlocal unedited
        unedited += "+" not in model.name
        return measured(*args)

    monkeypatch.setattr(scores, "measure", counted)
    table = edit_scores(model, cases, settings, **more)
    assert unedited == 1 and table["run"].tolist() == ["unedited", "ft_m", "ft_l"] * 2
    for name, expected in alone.items():
        found = table[table["run"].isin(["unedited", name])].reset_index(drop=True)
        pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert not table.query("run == 'ft_m'")["nll"].equals(table.query("run == 'ft_l'")["nll"])
    with pytest.raises(SettingError, match="0 editors"):
        edit_scores(model, cases, {})


def test_each_case_may_have_a_layer_of_its_own(model):
    other = replace(CASE, fact=Fact("w7", "w41"))
    cases = [CASE, other, CASE]
    more = {"steps": 2, "prefixes": 2, "covariance": "identity", "tokens": 2, "progress": False}
    found = edit_scores(model, cases, "rome", layer=[0, 1, 1], **more)
    for i, (case, layer) in enumerate(zip(cases, [0, 1, 1], strict=True)):
        alone = edit_scores(model, [case], "rome", layer=layer, **more).assign(case=i).reset_index(drop=True)
        pd.testing.assert_frame_equal(
            found[found["case"] == i].reset_index(drop=True).drop(columns="seconds"), alone.drop(columns="seconds")
        )
    for layers, batch in (([0, 1], 1), ([0, 1, 1], 2)):
        with pytest.raises(SettingError, match=f"{len(layers)} layers for 3 cases in batches of {batch}"):
            edit_scores(model, cases, "memit", layer=layers, batch=batch, **more)
