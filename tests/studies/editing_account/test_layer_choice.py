"""The layer that a circuit proposes is where the fact is looked up; comparisons are those of plain edits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kcwb.discovery.discover import score_edges
from kcwb.discovery.selection import matched_circuit
from kcwb.editing.cases import EditCase
from kcwb.editing.scores import SCORES, edit_scores
from kcwb.errors import DataError, SettingError
from kcwb.studies.editing_account import layer_choice as module
from kcwb.studies.editing_account.layer_choice import circuit_layers, compare_layers, flipped_p
from kcwb.studies.fact_circuits import fact_draws
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.editing.conftest import TEMPLATES, same_bits, weights
from tests.handmade import key_value_lookup

QUICK = {"steps": 3, "prefixes": 2, "covariance": "identity", "tokens": 3, "progress": False}
CASES = [
    EditCase(
        Fact(f"w{5 + i}", f"w{40 + i}"),
        f"w{50 + i}",
        "w80 {} w81",
        (f"w5 w{5 + i} w82",),
        (f"w80 w{6 + i} w81",),
        relation="words",
    )
    for i in range(3)
]


def asked(monkeypatch, relation) -> None:
    """Tasks of relations in memory, whatever name is asked for."""
    monkeypatch.setattr(module, "make_task", lambda model, _name, **more: make_task(model, relation, **more))


def test_the_lookup_that_the_mover_reads_is_the_layer(monkeypatch):
    model, relation, *_ = key_value_lookup()
    asked(monkeypatch, relation)
    cases = [EditCase(one, "", relation.template(0), (), (), relation="lookup") for one in relation.facts[:5]]
    table = circuit_layers(model, cases, edges=8, draws=10, n=6, progress=False)
    assert table["layer"].tolist() == [0] * 5 and set(table["mover"]) == {"a2.h1"}
    assert table["sure"].all() and (table["pi"] >= 0.5).all()
    assert table["subject"].tolist() == [one.fact.subject for one in cases]


def test_pi_counts_the_draws_that_keep_the_edge(monkeypatch, model, relation):
    asked(monkeypatch, relation)
    movers = ["a1.h0", "a1.h2"]
    monkeypatch.setattr(module, "strongest_movers", lambda *args: movers)
    fact = make_task(model, relation, n=4).val.facts[0]
    case = EditCase(fact, "", TEMPLATES[0], (), (), relation="words")
    more = {"edges": 40, "draws": 12, "n": 4, "progress": False}
    scores = []
    for text in TEMPLATES:
        task = make_task(model, relation, n=4, template=text)
        task = replace(task, val=encode(model, [fact], text, relation.objects))
        scores.append(score_edges(model, task, progress=False))
    kept = torch.zeros(len(movers), model.graph.n_layers)
    for draw in fact_draws(model.graph, 40, 12, 2, 0):
        value = scores[draw.ablation].abs() if draw.absolute else scores[draw.ablation]
        names = {
            f"{row.sender}->{row.receiver}"
            for row in matched_circuit(model.graph, value, draw.edges).edges.itertuples()
        }
        for (i, mover), layer in itertools.product(enumerate(movers), range(model.graph.n_layers)):
            kept[i, layer] += f"m{layer}->{mover}<v>" in names
    pi = kept.max(0).values / 12
    assert 0 < float(pi.max()) < 1  # some draws have it, and some do not
    for confidence in (0.01, float(pi.max()), 1.0):
        (row,) = circuit_layers(model, [case], confidence=confidence, **more).to_dict("records")
        sure = [layer for layer, share in enumerate(pi.tolist()) if share >= confidence - 1e-6]
        assert row["layer"] == (sure[-1] if sure else int(pi.argmax())) and row["sure"] == bool(sure)
        assert row["pi"] == pytest.approx(float(pi[row["layer"]]))


def test_a_late_fact_that_cannot_be_asked_is_refused_before_work(monkeypatch, model, relation):
    asked(monkeypatch, relation)
    fact = make_task(model, relation, n=4).val.facts[0]
    case, steps = EditCase(fact, "", TEMPLATES[0], (), (), relation="words"), []
    late = replace(case, fact=Fact(" ".join(["w5"] * 80), fact.object))
    monkeypatch.setattr(module, "strongest_movers", lambda *args: steps.append(args) or ["a1.h0"])
    with pytest.raises(DataError, match=r"tokens.* reads 64"):
        circuit_layers(model, [case, late], edges=40, draws=2, n=4, progress=lambda *step: steps.append(step))
    assert not steps


def test_no_mover_proposes_nothing(monkeypatch, model, relation):
    asked(monkeypatch, relation)
    monkeypatch.setattr(module, "strongest_movers", lambda *args: [])
    case = EditCase(make_task(model, relation, n=4).val.facts[0], "", TEMPLATES[0], (), (), relation="words")
    (row,) = circuit_layers(model, [case], edges=40, draws=2, n=4, progress=False).itertuples()
    assert (row.layer, row.pi, row.mover, row.sure) == (-1, 0.0, "", False)


def test_each_choice_has_the_scores_of_plain_edits_at_its_layers(model):
    before = weights(model)
    found = compare_layers(model, CASES, {"mine": [0, 1, 1], "last": 1}, **QUICK)
    assert same_bits(model, before)
    for choice, of_case in {"mine": [0, 1, 1], "last": [1, 1, 1]}.items():
        part = found.scores[found.scores["choice"] == choice]
        assert part["layer"].tolist() == of_case and part["case"].tolist() == [0, 1, 2]
        for row, layer, case in zip(part.to_dict("records"), of_case, CASES, strict=True):
            plain = edit_scores(model, [case], "rome", layer=layer, **QUICK).iloc[1]
            for score in (*SCORES, "nll"):
                assert row[score] == pytest.approx(plain[score], nan_ok=True), score
    paired = found.paired.set_index("score")
    assert set(paired["choice"]) == {"last"} and paired["same"].tolist() == pytest.approx([2 / 3] * len(SCORES))
    magnitudes = found.scores.pivot(index="case", columns="choice", values="PM").astype(float)
    difference = magnitudes["mine"] - magnitudes["last"]
    assert paired.loc["PM", "difference"] == pytest.approx(difference.mean()) and difference[0] != 0
    assert paired.loc["PM", "n"] == 3 and paired.loc["portability", "n"] == 0
    assert (found.scores["choice"] == "unedited").sum() == 3


def test_signs_are_flipped_in_all_ways():
    some = np.array([0.3, -0.1, 0.5, 0.2, 0.05])
    flips = np.array([*itertools.product([1, -1], repeat=5)]) @ some / 5
    above = (flips >= some.mean() - 1e-12).mean()
    assert flipped_p(some, 0) == pytest.approx(min(1, 2 * above))
    assert flipped_p(np.zeros(4), 0) == 1 and np.isnan(flipped_p(np.ones(1), 0))


def test_what_cannot_be_compared_is_said(model):
    for cases, choices, words in (
        (CASES[:1], {"a": 0, "b": 1}, "1 cases and 2 choices"),
        (CASES, {"a": 0}, "3 cases and 1 choices"),
        (CASES, {"a": 0, "b": [0, 1]}, "2 layers for 3 cases"),
        (CASES, {"a": 0, "b": 9}, "the layer 9; .* has layers 0 to 1"),
    ):
        with pytest.raises(SettingError, match=words):
            compare_layers(model, cases, choices, **QUICK)
    with pytest.raises(SettingError, match="give at least one edit"):
        circuit_layers(model, [])
