"""Planted wrongness: found where it can be seen, not found where it cannot, and no relation teaches about itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import tensor

from kcwb.errors import DataError, SettingError
from kcwb.models.graph import Graph
from kcwb.models.loading import load_model
from kcwb.reading.dla import attribute
from kcwb.reading.roles import head_roles
from kcwb.reading.trajectories import read_trajectories
from kcwb.studies.hallucination.auroc import pairs_auroc, resampled_aurocs, within_pairs
from kcwb.studies.hallucination.measurement import Measured, measure_answers
from kcwb.studies.hallucination.prediction import (
    FEATURE_SETS,
    _out_of_relation,
    _random_sets,
    _scores,
    _strongest,
    hallucination_study,
    head_features,
    predict_wrong,
)
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.task import make_task
from tests.handmade import additive
from tests.tasks import known_relation, spaced_tokenizer
from tests.tiny import tiny_hf

GRAPH = Graph(n_layers=3, n_heads=10)
MOVER = 14  # a1.h4
QUICK = {"draws": 20, "resamples": 400, "progress": False}


def planted(
    seed: int = 0, *, attends: float = 0.0, confident: float = 0.0, relations: int = 6, n: int = 40, spread: float = 0.0
) -> Measured:
    """Random features, and answers that are wrong by chance; what is planted makes a wrong answer likelier.

    With `attends`, where the mover attends less to the subject; with `confident`, where the answer is less probable.
    `spread` makes relations differ, in how often they are wrong and, along with that, in all features.
    """
    draw = np.random.default_rng(seed)
    place, count = np.repeat(np.arange(relations), n), relations * n
    own = spread * np.linspace(-1, 1, relations)[place]
    attention = draw.normal(size=(count, 30)) - own[:, None]
    probability = draw.normal(size=count) - own
    wrong = draw.random(count) < 1 / (1 + np.exp(attends * attention[:, MOVER] + confident * probability - own))
    gold, rival = draw.normal(size=(2, count, 30))
    prompts = pd.DataFrame(
        {
            "relation": [f"r{i}" for i in place],
            "subject": [f"s{i}" for i in range(count)],
            "wrong": wrong,
            "kind": np.where(wrong, "another object", "right"),
            "max_probability": probability,
            "entropy": draw.normal(size=count),
            "arrival": draw.integers(3, size=count),
            "subject_rank": draw.random(count),
            "recalled": draw.random(count) < 0.5,
        }
    )
    movers = np.zeros((relations, 30))
    movers[:, MOVER] = 1.0
    counts = prompts.groupby("relation")["wrong"].agg(["size", "sum"])
    table = pd.DataFrame(
        {"relation": counts.index, "facts": counts["size"], "wrong": counts["sum"], "movers": 1}
    ).reset_index(drop=True)
    return Measured(GRAPH, prompts, attention, gold, rival, movers, table)


def scored(measured: Measured) -> pd.DataFrame:
    """The scores without random heads, which take most of the time."""
    wrong = measured.prompts["wrong"].to_numpy()
    place = pd.Categorical(measured.prompts["relation"]).codes.astype(int)
    found, _ = _out_of_relation(measured, place, wrong, [np.array([MOVER])] * (place.max() + 1), FEATURE_SETS)
    pairs = within_pairs(np.stack(list(found.values())), place, wrong)
    return _scores(found, wrong, pairs, np.zeros((20, 2)), 400, seed=0).set_index("features")


def row(study: Any, name: str) -> pd.Series:
    return study.scores.set_index("features").loc[name]


# --- planted ---


def test_a_feature_that_predicts_is_found_and_random_heads_do_not_have_it():
    study = predict_wrong(planted(attends=2.0), movers=1, **{**QUICK, "draws": 100})
    found, both = row(study, "movers: attention"), row(study, "confidence + movers")
    assert found["auroc"] > 0.75 and found["low"] > 0.65
    assert both["gain_low"] > 0.1 and row(study, "movers")["gain"] == pytest.approx(
        row(study, "movers")["auroc"] - row(study, "confidence")["auroc"]
    )
    assert both["p"] <= 0.15 and row(study, "movers")["p"] <= 0.15  # one head of ten is the mover itself
    assert abs(row(study, "random heads")["auroc"] - 0.5) < 0.1
    assert abs(row(study, "confidence")["auroc"] - 0.5) < 0.1
    weights = study.weights.set_index(["features", "feature"])
    assert weights.loc[("movers: attention", "attention_subject"), "most"] < -0.5  # less attention, more wrong


def test_a_feature_that_does_not_predict_is_not_found():
    """Over 20 draws of noise: AUROCs lie about a half, and the intervals miss it about as often as they say."""
    found = [scored(planted(seed)) for seed in range(100, 120)]
    for name in ("confidence", "movers", "confidence + movers", "diagnostic"):
        rows = pd.DataFrame([one.loc[name] for one in found])
        assert abs(rows["auroc"].mean() - 0.5) < 0.04
        assert ((rows["low"] <= 0.5) & (rows["high"] >= 0.5)).sum() >= 16
    gains = pd.DataFrame([one.loc["confidence + movers"] for one in found])
    assert ((gains["gain_low"] <= 0) & (gains["gain_high"] >= 0)).sum() >= 16


def test_random_heads_do_as_well_as_a_head_of_noise():
    found = [predict_wrong(planted(seed), movers=1, **QUICK) for seed in (100, 101, 102)]
    assert all(row(one, "random heads")["low"] <= 0.5 <= row(one, "random heads")["high"] for one in found)
    assert np.mean([row(one, "movers")["p"] for one in found]) > 0.15


def test_labels_that_follow_the_relation_only_give_nothing_on_a_relation_left_out():
    """Features know the relation, and the relation knows how often it is wrong; within it there is nothing to know."""
    found = [scored(planted(seed, spread=2.0)) for seed in range(100, 112)]
    for name in ("confidence", "confidence + movers"):
        rows = pd.DataFrame([one.loc[name] for one in found])
        assert abs(rows["auroc"].mean() - 0.5) < 0.05
        assert rows["pooled"].mean() > 0.62  # what pairs across relations would have claimed
    gains = pd.DataFrame([one.loc["confidence + movers"] for one in found])
    assert abs(gains["gain"].mean()) < 0.03 and (gains["gain_low"] <= 0).sum() >= 10


def test_what_confidence_knows_already_is_no_gain():
    study = predict_wrong(planted(confident=2.0), movers=1, **QUICK)
    assert row(study, "confidence")["low"] > 0.65
    both = row(study, "confidence + movers")
    assert both["auroc"] > 0.7 and abs(both["gain"]) < 0.03 and both["gain_low"] <= 0.005


def test_a_margin_that_makes_the_answer_is_diagnostic_only():
    measured = planted()
    wrong = measured.prompts["wrong"].to_numpy()
    measured.gold[:, MOVER] = np.where(wrong, -1.0, 1.0)
    measured.rival[:, MOVER] = 0.0
    study = predict_wrong(measured, movers=1, **QUICK)
    margin = row(study, "diagnostic: margin")
    assert margin["auroc"] == 1.0 and not margin["deployable"] and np.isnan(margin["gain"])
    deployable = study.scores.set_index("features")["deployable"]
    assert deployable[[name for name, (_, can) in FEATURE_SETS.items() if can]].all()
    assert not deployable[[name for name in FEATURE_SETS if name.startswith("diagnostic")]].any()


# --- nothing leaks ---


def test_a_relations_own_labels_and_movers_do_not_change_what_it_is_given():
    measured = planted(attends=1.0)
    held = (measured.prompts["relation"] == "r2").to_numpy()
    before = predict_wrong(measured, movers=1, **QUICK)
    prompts = measured.prompts.copy()
    prompts.loc[held, "wrong"] = np.random.default_rng(1).permutation(prompts.loc[held, "wrong"])
    movers = measured.movers.copy()
    movers[2] = 0.0
    movers[2, 3] = 1e6
    after = predict_wrong(replace(measured, prompts=prompts, movers=movers), movers=1, **QUICK)
    for name in ("confidence", "movers: attention"):
        own, other = before.predictions[name], after.predictions[name]
        assert own[held].tolist() == other[held].tolist()
        assert (own[~held] != other[~held]).any()
    assert before.relations["mover_heads"][2] == after.relations["mover_heads"][2] == "a1.h4"
    assert after.relations["mover_heads"][0] == "a0.h3"


def test_movers_are_those_with_the_largest_mean_of_the_other_relations():
    measured = planted()
    measured.movers[:] = 0.0
    measured.movers[0, 5], measured.movers[1, 6], measured.movers[2, 7] = 3.0, 2.0, 1.0
    study = predict_wrong(measured, movers=2, **QUICK)
    assert study.relations["mover_heads"].tolist()[:4] == [
        "a0.h6, a0.h7",
        "a0.h5, a0.h7",
        "a0.h5, a0.h6",
        "a0.h5, a0.h6",
    ]


def test_features_are_sums_over_the_chosen_heads():
    measured = planted()
    found = head_features(measured, np.array([3, 14]))
    for n in (0, 17, 101):
        heads = [(3, 14)[i] for i in range(2)]
        answer = measured.rival if measured.prompts["wrong"][n] else measured.gold
        assert found["attention_subject"][n] == pytest.approx(np.mean([measured.attention[n, h] for h in heads]))
        assert found["movers_predicted"][n] == pytest.approx(sum(answer[n, h] for h in heads))
        margin = sum(measured.gold[n, h] - measured.rival[n, h] for h in heads)
        assert found["movers_margin"][n] == pytest.approx(margin)


def test_random_heads_never_hold_a_mover():
    """All of layer 1 are movers: what is compared comes from the layers beside it, half of a layer and less apart."""
    measured = planted(attends=2.0)
    measured.movers[:, 10:20] = 1.0
    chosen = [_strongest(measured, i, 10) for i in range(6)]
    for some in _random_sets(measured, chosen, 30, seed=0):
        assert all(len(set(one)) == 10 and not set(one) & set(range(10, 20)) for one in some)
    study = predict_wrong(measured, movers=10, **QUICK)
    assert row(study, "movers")["p"] < 0.15 and abs(row(study, "random heads")["auroc"] - 0.5) < 0.1


def test_recall_is_a_share_of_prompts_with_an_interval_over_relations():
    measured = planted(relations=4, n=25)
    measured.prompts["recalled"] = measured.prompts["relation"].isin(["r0", "r1", "r2"])
    recall = predict_wrong(measured, movers=1, **QUICK).recall.set_index("answer")
    right = recall.loc["right"]
    assert right["low"] == 0 or right["low"] < 0.5  # one relation of four is another world
    assert right["high"] == 1 and right["low"] < right["recalled"] < 1


# --- the numbers ---


def slow_auroc(scores: np.ndarray, place: np.ndarray, wrong: np.ndarray) -> float:
    won, total = 0.0, 0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if place[i] == place[j] and wrong[i] and not wrong[j]:
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                total += 1
    return won / total


def toy(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    place = np.repeat(np.arange(4), (5, 9, 7, 6))
    wrong = draw.random(27) < 0.5
    wrong[:2] = (True, False)
    wrong[21:] = True  # a relation without right answers has no pairs
    return draw.integers(6, size=(2, 27)).astype(float), place, wrong


def test_auroc_counts_pairs_within_relations():
    for seed in range(5):
        scores, place, wrong = toy(seed)
        found = pairs_auroc(within_pairs(scores, place, wrong))
        assert found.tolist() == pytest.approx([slow_auroc(one, place, wrong) for one in scores])
        assert 3 not in within_pairs(scores, place, wrong)


def test_resamples_are_of_relations_and_then_of_prompts():
    """Against index lists that are drawn the slow way: the same mean and spread."""
    scores, place, wrong = toy(3)
    draw = np.random.default_rng(0)
    mixed = [i for i in range(4) if wrong[place == i].any() and not wrong[place == i].all()]
    slow = []
    for _ in range(3000):
        rows, names = [], []
        for copy, i in enumerate(draw.choice(mixed, len(mixed))):
            for kind in (True, False):
                some = np.flatnonzero((place == i) & (wrong == kind))
                rows += draw.choice(some, len(some)).tolist()
                names += [copy] * len(some)
        pairs = within_pairs(scores[:, rows], np.array(names), wrong[rows])
        slow.append(pairs_auroc(pairs))
    fast = resampled_aurocs(within_pairs(scores, place, wrong), 3000, seed=1)
    assert np.mean(slow, 0) == pytest.approx(fast.mean(0), abs=0.015)
    assert np.std(slow, 0) == pytest.approx(fast.std(0), rel=0.08)


def test_the_same_seed_gives_the_same_study():
    one, two = (predict_wrong(planted(attends=1.0), movers=1, seed=5, **QUICK) for _ in range(2))
    pd.testing.assert_frame_equal(one.scores, two.scores)


def test_recall_is_counted_by_kind_of_answer():
    measured = planted()
    measured.prompts["recalled"] = ~measured.prompts["wrong"]
    recall = predict_wrong(measured, movers=1, **QUICK).recall.set_index("answer")
    assert recall.loc["right", "recalled"] == 1 and recall.loc["wrong", "recalled"] == 0
    assert recall.loc["wrong", "prompts"] == measured.prompts["wrong"].sum()
    assert recall.loc["another word", "prompts"] == 0 and np.isnan(recall.loc["another word", "recalled"])


def test_some_of_the_prompts_can_be_studied_alone():
    measured = planted(attends=2.0)
    keep = (measured.prompts["relation"] != "r5") | measured.prompts["wrong"]
    some = measured.select(keep)
    study = predict_wrong(some, movers=1, **QUICK)
    assert len(study.predictions) == keep.sum() and np.isnan(study.relations["movers: attention"][5])
    assert some.relations["facts"][5] == some.relations["wrong"][5]


# --- what the model does ---


def relations_of(model: Any, *unknown: int) -> list[Relation]:
    """Relations of nine facts each, some of which the model gets wrong."""
    templates = ("w1 {} w2", "w3 {} w4", "w6 {} w7")
    return [
        replace(known_relation(model, 9, templates[i], unknown=some), name=f"r{i}") for i, some in enumerate(unknown)
    ]


def test_what_is_measured_is_what_each_prompt_does_alone(tiny):
    model = tiny("llama")
    relations = relations_of(model, 3, 4, 2)
    found = measure_answers(model, relations, n=9, progress=False)
    assert found.relations["relation"].tolist() == ["r0", "r1", "r2"]
    assert found.relations["facts"].sum() == len(found.prompts) == len(found.attention)
    by_name = {relation.name: relation for relation in relations}
    for n, prompt in list(enumerate(found.prompts.to_dict("records")))[::3]:
        relation = by_name[prompt["relation"]]
        fact = next(one for one in relation.facts if one.subject == prompt["subject"])
        alone = encode(model, [fact], relation.template(0), relation.objects)
        readings = read_trajectories(model, alone)
        assert prompt["wrong"] != bool(readings.right[0]) and prompt["rank"] == int(alone.ranks[0])
        assert prompt["entropy"] == pytest.approx(float(readings.entropy[0]), abs=1e-4)
        heads = attribute(model, alone, readings.tokens)
        assert found.gold[n] == pytest.approx(heads.total[:, :, 0, 0].flatten().numpy(), abs=1e-4)
        assert found.rival[n] == pytest.approx(heads.total[:, :, 0, 1].flatten().numpy(), abs=1e-4)
        inside = slice(int(alone.subject_start[0]), int(alone.subject_stop[0]))
        mass = heads.attention[:, :, 0, inside].sum(-1).flatten().numpy()
        assert found.attention[n] == pytest.approx(mass, abs=1e-5)
        if prompt["kind"] == "another object":
            assert prompt["predicted"].strip() in {name.split()[0] for name in relation.objects}
    assert (found.prompts["kind"] == "right").sum() == (~found.prompts["wrong"]).sum()


def test_movers_are_those_that_head_roles_finds_on_known_facts():
    """The four heads of the additive model by name: one of them is a mover, a suppressor is none."""
    found = additive("capital")
    relations = [replace(found.relation, name=f"r{i}", facts=found.relation.facts[i::3]) for i in range(3)]
    wrong = [
        replace(one, facts=(*one.facts[:-1], replace(one.facts[-1], object="p7"))) for one in relations
    ]  # one wrong answer each
    measured = measure_answers(found.model, wrong, n=16, progress=False)
    assert measured.relations["wrong"].tolist() == [1, 1, 1]
    task = make_task(found.model, found.relation, n=8)
    roles = head_roles(found.model, None, task, progress=False).set_index("node")
    assert roles.loc["a1.h1", "role"] == "mover" and roles.loc["a1.h0", "role"] == "suppressor"
    assert (measured.movers[:, 4 + 1] > 1).all() and (measured.movers[:, 4] == 0).all()
    assert measured.movers[0, 5] == pytest.approx(float(roles.loc["a1.h1", "D_S"]), rel=0.3)


def test_the_whole_study_runs_on_a_model(tiny):
    model, seen = tiny("llama"), []
    study = hallucination_study(
        model, relations_of(model, 3, 4, 2), n=9, movers=2, draws=20, resamples=200,
        progress=lambda done, total, note: seen.append((done, total)),
    )  # fmt: skip
    assert set(FEATURE_SETS) < set(study.scores["features"]) and study.scores["auroc"].between(0, 1).all()
    draws = seen[-1][1] - 1  # all that two heads of these layers leave, at most 20
    assert 0 < draws <= 20 and seen[-1] == (1 + draws, 1 + draws) and (27, 27) not in seen[: -2 - draws]
    assert len(study.predictions) == study.relations["facts"].sum()


def test_facts_whose_object_is_in_the_subject_are_left_out_and_counted(tiny):
    model = tiny("llama")
    relations = relations_of(model, 3, 4, 2)
    copies = tuple(Fact(f"w{70 + i} w{80 + i}", f"w{80 + i}") for i in range(3))
    relations[1] = replace(relations[1], facts=(*relations[1].facts, *copies))
    found = measure_answers(model, relations, n=12, progress=False)
    assert found.relations["left_out"][1] >= 3
    assert not set(found.prompts["subject"]) & {fact.subject for fact in copies}


def test_another_object_is_told_as_it_follows_the_prompts():
    """`w9` and ` w9` are two tokens, and these facts have no space before their objects."""
    module, relations = tiny_hf("llama", 3), []
    module.lm_head.weight.data[48:] = 0  # which the model says only where all else is unlikely
    model = load_model(module, spaced_tokenizer(), device="cpu")
    for i in range(3):
        template, facts = f"w{i} {{}} w4", []
        for subject in (f"w{10 + 8 * i + j}" for j in range(8)):
            ids = model.tokenizer(template.replace("{}", subject), add_special_tokens=False)["input_ids"]
            best = model.tokenizer.convert_ids_to_tokens(model.logits(tensor([ids]))[0, -1].argsort(descending=True))
            best = [token for token in best if str(token).startswith("w") and token != subject]
            facts.append(Fact(subject, best[len(facts) % 2], space=False))
        relations.append(Relation(f"r{i}", "factual", "", "", False, (template,), (template,), tuple(facts)))
    found = measure_answers(model, relations, progress=False).prompts
    names = {relation.name: relation.objects for relation in relations}
    seen = {(one.kind, one.wrong, one.wrong and one.predicted in names[one.relation]) for one in found.itertuples()}
    assert seen <= {("right", False, False), ("another object", True, True), ("another word", True, False)}
    assert {kind for kind, *_ in seen} >= {"right", "another object"}


# --- what is refused ---


def labelled(*wrong: list[bool]) -> Measured:
    """Some prompts whose answers are wrong as given, a relation a list."""
    measured = planted(relations=len(wrong), n=len(wrong[0]))
    return replace(measured, prompts=measured.prompts.assign(wrong=[one for some in wrong for one in some]))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (([True] * 5, [True] * 5, [True] * 5), "All 15 answers are wrong"),
        (([False] * 5, [False] * 5, [False] * 5), "All 15 answers are right"),
        (
            ([True] * 5, [False] * 5, [True, False] * 2 + [True]),
            r"1 relations have both.*r0: 5 of 5, r1: 0 of 5, r2: 3",
        ),
    ],
)
def test_answers_of_one_kind_are_refused_with_their_counts(wrong, words):
    with pytest.raises(DataError, match=words):
        predict_wrong(labelled(*wrong), movers=1, **QUICK)


def test_relations_without_movers_are_refused_with_their_counts():
    measured = planted()
    measured.movers[:] = 0.0
    measured.movers[4, 2] = 1.0
    with pytest.raises(DataError, match=r"Without r4 there is no mover.*r0: 1"):
        predict_wrong(measured, movers=1, **QUICK)


def test_what_cannot_be_meant_is_refused_before_the_model_runs(tiny, monkeypatch):
    model = tiny("llama")
    one, two, three = relations_of(model, 3, 4, 2)
    monkeypatch.setattr("kcwb.studies.hallucination.measurement.encode", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(DataError, match="2 relations are too few"):
        hallucination_study(model, [one, two], progress=False)
    with pytest.raises(DataError, match="'r0' is given twice"):
        hallucination_study(model, [one, one, two], progress=False)
    with pytest.raises(DataError, match="r2 has 3 facts"):
        hallucination_study(model, [one, two, replace(three, facts=three.facts[:3])], progress=False)
    with pytest.raises(DataError, match="There is no relation"):
        hallucination_study(model, [one, two, "country_capitol"], progress=False)
    for wrong in ({"n": 3}, {"movers": 0}, {"draws": 5}, {"resamples": 1}, {"template": 2}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            hallucination_study(model, [one, two, three], progress=False, **wrong)


def test_a_model_that_gets_all_right_is_refused_before_its_heads_are_looked_at(monkeypatch):
    found = additive("capital")
    relations = [replace(found.relation, name=f"r{i}", facts=found.relation.facts[i::3]) for i in range(3)]
    monkeypatch.setattr(
        "kcwb.studies.hallucination.measurement.read_trajectories", lambda *_: pytest.fail("its heads were looked at")
    )
    with pytest.raises(DataError, match="All 16 answers are right"):
        measure_answers(found.model, relations, progress=False)


def test_it_can_be_cancelled():
    def stop(done, total, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_wrong(planted(), movers=1, **{**QUICK, "progress": stop})


@pytest.mark.model
def test_three_relations_of_the_built_in_model(smollm2):
    names = ["country_capital", "country_language", "country_currency"]
    study = hallucination_study(smollm2, names, n=6, draws=20, resamples=200, progress=False)
    assert study.relations["facts"].tolist() == [5, 6, 4]  # Dakar and Dhaka, rupiah and ruble begin alike
    assert study.measured.attention.shape == (15, 270)
    assert (study.measured.attention.sum(1) > 0).all() and study.scores["auroc"].between(0, 1).all()
