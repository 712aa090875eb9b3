"""Faithfulness and comprehensiveness: a game computed by hand, and the slow obvious way on tiny models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.discover import discover, score_edges
from kcwb.discovery.selection import select_edges
from kcwb.errors import CircuitError, DataError, KcwbError, SettingError
from kcwb.evaluation import faithfulness as module
from kcwb.evaluation.completeness import completeness
from kcwb.evaluation.faithfulness import (
    FRACTIONS,
    cmd,
    comprehensiveness,
    cpr,
    faithfulness_curve,
)
from kcwb.statistics import statistic_interval
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.tasks import known_relation, relation_of
from tests.tiny import tiny_model

# A game on the eight edges of one layer with one head: every kept edge lowers the loss of each fact by its worth, times
# a weight of the fact.

WORTH = {
    "m0->logits": 4.0,
    "a0.h0->logits": 3.0,
    "input->a0.h0<v>": 2.5,
    "input->m0": 2.0,
    "input->logits": 1.0,
    "input->a0.h0<q>": 0.5,
    "input->a0.h0<k>": 0.25,
    "a0.h0->m0": -1.0,
}
TOTAL = 12.25
FACTS = np.array([1.0, 3.0, 2.0])


@pytest.fixture
def game(monkeypatch):
    """A model of one layer and one head, a task of three facts, the game's scores; runs are scored by the game."""
    model = tiny_model("gpt2", n_layer=1, n_head=1)
    task = make_task(model, known_relation(model, 6), n=3)
    scores = torch.zeros(model.graph.exists.shape)
    for name, worth in WORTH.items():
        scores[model.graph.edge_index(name)] = worth

    def per_prompt(model, circuit, loss, cuts):
        kept = model.graph.exists if circuit is None else circuit.kept
        return 20 - float(scores[kept].sum()) * FACTS

    monkeypatch.setattr(module, "_per_prompt", per_prompt)
    return model, task, scores


def test_the_curve_of_a_game_is_the_one_computed_by_hand(game):
    model, task, scores = game
    curve = faithfulness_curve(
        model, task, scores, ablation="zero", fractions=[i / 8 for i in range(9)], progress=False
    )
    # m0->logits and a0.h0->logits dangle until something reads the input
    gained = [0, 0, 0, 5.5, 11.5, 12.5, 13.0, 13.25, 12.25]
    assert curve["asked"].tolist() == list(range(9))
    assert curve["edges"].tolist() == [0, 0, 0, 2, 4, 5, 6, 7, 8]
    assert curve["faithfulness"].tolist() == pytest.approx([g / TOTAL for g in gained])
    assert curve["m"].tolist() == pytest.approx([20 - 2 * g for g in gained])
    assert (curve["m_empty"] == 20).all() and curve["m_full"].tolist() == pytest.approx([20 - 2 * TOTAL] * 9)
    # in this game every fact, and so every resample of them, has the same f, which is not to say that others would
    assert curve[["low", "high"]].isna().all(axis=None)
    trapezoid = (sum(gained) - (gained[0] + gained[-1]) / 2) / 8
    assert cpr(curve) == pytest.approx(trapezoid / TOTAL)
    distance = [1, 1, 1, 6.75 / TOTAL, 0.75 / TOTAL, 0.25 / TOTAL, 0.75 / TOTAL, 1 / TOTAL, 0]
    assert cmd(curve) == pytest.approx((sum(distance) - 0.5) / 8)


def test_absolute_selection_takes_the_harmful_edge_for_its_size(game):
    model, task, scores = game
    curve = faithfulness_curve(
        model, task, scores, ablation="zero", select="absolute", fractions=[0.5, 5 / 8, 0.75], progress=False
    )
    assert curve["edges"].tolist() == [4, 5, 6]  # input->logits before a0.h0->m0: ties go to the earlier sender
    assert curve["faithfulness"].tolist() == pytest.approx([11.5 / TOTAL, 12.5 / TOTAL, 11.5 / TOTAL])


def test_the_areas_of_a_curve_drawn_by_hand():
    curve = pd.DataFrame({"fraction": [0.1, 0.5, 1.0], "faithfulness": [0.5, 1.2, 1.0]})
    assert cpr(curve) == pytest.approx(0.4 * 0.85 + 0.5 * 1.1)
    assert cmd(curve) == pytest.approx(0.4 * 0.35 + 0.5 * 0.1)
    assert cpr(curve.iloc[::-1]) == cpr(curve)
    with pytest.raises(SettingError, match="two fractions"):
        cpr(curve.head(1))


def mib_areas(shares, fractions):
    """The loop of MIB's `evaluate_area_under_curve`, in words of our own: area under, and area from 1."""
    under = from_one = 0.0
    for i in range(len(shares) - 1):
        width = fractions[i + 1] - fractions[i]
        under += width * (shares[i] + shares[i + 1]) / 2
        from_one += width * (abs(1 - shares[i]) + abs(1 - shares[i + 1])) / 2
    return under, from_one


def test_the_areas_are_mibs_and_do_not_begin_at_zero():
    shares = np.random.default_rng(0).normal(0.7, 0.4, len(FRACTIONS))
    curve = pd.DataFrame({"fraction": FRACTIONS, "faithfulness": shares})
    assert (cpr(curve), cmd(curve)) == pytest.approx(mib_areas(shares, FRACTIONS))
    assert cpr(curve.assign(faithfulness=1.0)) == pytest.approx(0.999)
    assert cmd(curve.assign(faithfulness=1.0)) == 0


def test_with_two_facts_the_interval_reaches_from_one_to_the_other():
    """A quarter of the resamples holds one fact alone, a quarter the other."""
    values, full, empty = np.array([3.0, 4.0]), np.array([1.0, 2.0]), np.array([5.0, 10.0])
    gained, possible = values - empty, full - empty
    assert statistic_interval([gained, possible], module.recovered_share) == pytest.approx((0.5, 0.75))
    assert np.isnan(statistic_interval([gained[:1], possible[:1]], module.recovered_share)).all()


def test_a_game_that_the_circuit_cannot_change_is_an_error_in_words(game, monkeypatch):
    model, task, scores = game
    monkeypatch.setattr(module, "_per_prompt", lambda *args: np.array([1.0, 3.0, 2.0]))
    with pytest.raises(SettingError, match=r"same nll .*not defined"):
        faithfulness_curve(model, task, scores, ablation="zero", progress=False)


# Tiny models


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 16, unknown=6), n=5)


@pytest.fixture
def found(model, task):
    return discover(model, task, "eap-ig", edges=60, progress=False)


def one_by_one(model, kept, prompts, cuts, metric="nll"):
    """The loss of each prompt, run on its own."""
    losses = []
    for n in range(len(prompts)):
        alone = prompts.select([n])
        losses.append(float(make_loss(model, alone, metric)(run_circuit(model, kept, alone, cuts))))
    return np.array(losses)


@pytest.mark.parametrize("name", ["llama", "neox"])
@pytest.mark.parametrize(("ablation", "metric"), [("zero", "nll"), ("mean", "logit_diff"), ("resample", "kl")])
@pytest.mark.parametrize("select", ["signed", "absolute", "greedy"])
def test_the_curve_is_that_of_running_each_circuit_on_each_fact(tiny, name, ablation, metric, select):
    model = tiny(name)
    task = make_task(model, known_relation(model, 24), n=5)
    cuts = make_ablation(model, task, ablation)
    scores = score_edges(model, task, "eap-ig", ablation=ablation, metric=metric, progress=False)
    fractions = (0.02, 0.2, 0.6, 1)
    for split, prompts in (("val", cuts.usable(task.val)), ("test", cuts.usable(task.test))):
        curve = faithfulness_curve(
            model, task, scores, ablation=ablation, metric=metric, select=select, fractions=fractions, split=split,
            progress=False,
        )  # fmt: skip
        full = one_by_one(model, None, prompts, cuts, metric)
        empty = one_by_one(model, torch.zeros_like(model.graph.exists), prompts, cuts, metric)
        for row in curve.itertuples():
            asked = int(row.fraction * model.graph.n_edges)
            kept = select_edges(model.graph, scores, edges=asked, select=select)
            circuit = Circuit(model.graph, kept).without_dangling()
            values = one_by_one(model, circuit.kept, prompts, cuts, metric)
            assert (row.asked, row.edges) == (asked, circuit.n_edges)
            assert (row.m, row.m_full, row.m_empty) == pytest.approx(
                (values.mean(), full.mean(), empty.mean()), abs=1e-4
            )
            expected = (values.mean() - empty.mean()) / (full.mean() - empty.mean())
            assert row.faithfulness == pytest.approx(expected, abs=1e-3)
            assert row.low <= row.faithfulness <= row.high or (np.isnan(row.low) and row.faithfulness in (0, 1))
        assert curve["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-3)


def test_a_circuit_brings_its_scores_and_its_ablation(model, task, found):
    curve = faithfulness_curve(model, task, found, progress=False)
    same = faithfulness_curve(model, task, found.scores.nan_to_num(), ablation="mean", progress=False)
    pd.testing.assert_frame_equal(curve, same)
    assert curve["fraction"].tolist() == list(FRACTIONS)
    assert (curve["edges"] <= curve["asked"]).all()
    other = faithfulness_curve(model, task, found, ablation="zero", progress=False)
    assert not np.allclose(other["m_empty"], curve["m_empty"])


def test_shares_that_hold_no_whole_edge_are_the_empty_circuit(model, task, found):
    curve = faithfulness_curve(model, task, found, fractions=(0, 1e-6, 1), progress=False)
    assert curve["edges"].tolist() == [0, 0, model.graph.n_edges]
    assert curve["faithfulness"].tolist() == pytest.approx([0, 0, 1], abs=1e-4)


def test_a_curve_of_one_fact_has_no_interval(model):
    task = make_task(model, known_relation(model, 4), n=1)
    curve = faithfulness_curve(
        model, task, score_edges(model, task, "eap", progress=False), ablation="zero", progress=False
    )
    assert curve[["low", "high"]].isna().all(axis=None) and curve["faithfulness"].notna().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fractions": ()}, "fractions"),
        ({"fractions": (0.1, 0.1)}, "grow"),
        ({"fractions": (0.5, 0.1)}, "grow"),
        ({"fractions": (-0.1, 1)}, "0 at least"),
        ({"fractions": (0.1, 2)}, "1 at most"),
        ({"metric": "loss"}, "loss"),
        ({"select": "best"}, "best"),
        ({"split": "train"}, "train"),
        ({"ablation": "none"}, "none"),
    ],
)
def test_settings_of_a_curve_that_cannot_be_meant_are_errors(model, task, found, wrong, message):
    with pytest.raises(SettingError, match=message):
        faithfulness_curve(model, task, found, progress=False, **wrong)


def test_a_curve_without_what_it_needs_is_an_error(model, task, found):
    with pytest.raises(SettingError, match="name the ablation"):
        faithfulness_curve(model, task, torch.zeros(found.kept.shape), progress=False)
    with pytest.raises(CircuitError, match="every edge"):
        faithfulness_curve(model, task, replace(found, scores=None), progress=False)
    with pytest.raises(CircuitError, match="every edge"):
        holes = torch.where(found.kept, found.scores, torch.nan)
        faithfulness_curve(model, task, holes, ablation="zero", progress=False)
    with pytest.raises(CircuitError, match="shape"):
        faithfulness_curve(model, task, torch.zeros(3, 3), ablation="zero", progress=False)
    lonely = make_task(model, known_relation(model, 1), n=1)
    with pytest.raises(DataError, match="D_test"):
        faithfulness_curve(model, lonely, found, split="test", progress=False)
    stranger = tiny_model("llama", seed=1)
    with pytest.raises(SettingError, match="weights"):
        faithfulness_curve(model, make_task(stranger, known_relation(stranger, 8), n=2), found, progress=False)


def test_a_run_whose_logits_are_not_numbers_is_an_error(model, task, found, monkeypatch):
    run = module.run_circuit
    monkeypatch.setattr(module, "run_circuit", lambda *args: run(*args) * torch.nan)
    with pytest.raises(KcwbError, match="not a number"):
        faithfulness_curve(model, task, found, progress=False)


def test_a_curve_reports_every_run_and_can_be_cancelled(model, task, found):
    calls = []
    faithfulness_curve(model, task, found, fractions=(0.1, 1), progress=lambda *call: calls.append(call[:2]))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def cancel(*call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        faithfulness_curve(model, task, found, progress=cancel)


# Comprehensiveness


def test_comprehensiveness_is_the_completeness_of_what_is_left(model, task, found):
    table = comprehensiveness(model, found, task, draws=3, seed=2, progress=False)
    rest = Circuit(model.graph, model.graph.exists & ~found.kept)
    expected = completeness(model, rest, task, ablation="mean", draws=3, seed=2, progress=False)
    assert table["run"].unique().tolist() == ["full model", "complement", "empty circuit", "random complements"]
    pd.testing.assert_frame_equal(table.drop(columns="run"), expected.drop(columns="run"))
    cuts = make_ablation(model, task, "mean")
    row = table.set_index(["run", "split"]).loc[("complement", "D_val")]
    assert row["edges"] == model.graph.n_edges - found.n_edges
    assert row["nll"] == pytest.approx(one_by_one(model, rest.kept, task.val, cuts).mean(), abs=1e-4)


def test_without_nothing_the_model_is_whole_and_without_all_it_is_empty(model, task):
    whole = comprehensiveness(model, Circuit.empty(model.graph), task, draws=1, progress=False).set_index(
        ["run", "split"]
    )
    assert whole.loc[("complement", "D_val"), "hit"] == whole.loc[("full model", "D_val"), "hit"] == 1
    nothing = comprehensiveness(model, Circuit.full(model.graph), task, draws=1, progress=False).set_index(
        ["run", "split"]
    )
    left, empty = (nothing.loc[(run, "D_val"), "nll"] for run in ("complement", "empty circuit"))
    assert left == empty


def test_comprehensiveness_refuses_another_models_circuit(model, task, found):
    theirs = replace(found, provenance={"model": {"name": "theirs", "digest": "0" * 64}})
    with pytest.raises(CircuitError, match="theirs"):
        comprehensiveness(model, theirs, task, progress=False)


def test_facts_without_a_partner_are_left_out_under_resample(model):
    facts = known_relation(model, 9).facts
    lonely = next(fact for fact in facts if len(fact.subject.split()) == 3)
    chosen = [fact for fact in facts if len(fact.subject.split()) == 1] + [lonely]
    task = make_task(model, relation_of(chosen), n=9)
    if lonely not in task.val.facts:
        task = replace(task, val=task.test, test=task.val)
    scores = torch.rand(model.graph.exists.shape)
    with pytest.warns(UserWarning, match=lonely.subject):
        faithfulness_curve(model, task, scores, ablation="resample", fractions=(0.5, 1), progress=False)
