"""The completeness table, against counting by hand; and its intervals."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, KcwbError, SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.models.forward import forward
from kcwb.models.graph import Graph
from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.task import make_task
from tests.tasks import answer_ids, known_relation, relation_of, unpadded_logits
from tests.tiny import tiny_model

RUNS = ["full model", "circuit", "empty circuit", "random circuits"]
SPLITS = ["D_val", "D_test", "D_test, known"]


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    """Half of the facts are not known, so that D_test has both kinds."""
    task = make_task(model, known_relation(model, 16, unknown=6), n=5)
    assert 0 < int(task.test.known.sum()) < len(task.test)
    return task


@pytest.fixture
def circuit(model):
    return random_circuit(model.graph, 70, seed=4)


def table_of(*args, **more):
    more = {"draws": 3, "progress": False, **more}
    return completeness(*args, **more)


def prompt_by_prompt(model, prompts, cuts, kept) -> tuple[list[int], list[float]]:
    """Rank and nll of each prompt, run on its own; `kept` None for the Hugging Face model."""
    ranks, losses = [], []
    for n, fact in enumerate(prompts.facts):
        answer = answer_ids(model, fact)
        if kept is None:
            logits = unpadded_logits(model, fact)
        else:
            alone = prompts.select([n])
            residual = forward(model.network, alone.tokens, kept=kept, ablated=cuts.values(alone)).residual
            logits = model.network.logits(residual)[0, -len(answer) :]
        first = logits[0].tolist()
        ranks.append(sum(value >= first[answer[0]] for value in first))
        logs = logits.log_softmax(-1)
        losses.append(-sum(float(row[token]) for row, token in zip(logs, answer, strict=True)) / len(answer))
    return ranks, losses


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
@pytest.mark.parametrize("k", [1, 10])
def test_every_cell_is_what_counting_by_hand_gives(model, task, circuit, ablation, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = table_of(model, circuit, task, ablation=ablation, k=k, seed=11)
        cuts = make_ablation(model, task, ablation)
        splits = {"D_val": cuts.usable(task.val), "D_test": cuts.usable(task.test)}
    assert list(table.columns) == ["run", "edges", "nodes", "split", "n", "k", "hit", "low", "high", "nll"]
    assert list(zip(table["run"], table["split"], strict=True)) == [(run, split) for run in RUNS for split in SPLITS]
    draws = [random_circuit(model.graph, 70, 11 + draw) for draw in range(3)]
    circuits = dict(zip(RUNS, [[None], [circuit], [Circuit.empty(model.graph)], draws], strict=True))
    for row in table.itertuples():
        some = circuits[row.run]
        prompts = splits[row.split.removesuffix(", known")]
        scored = [prompt_by_prompt(model, prompts, cuts, None if one is None else one.kept) for one in some]
        chosen = [n for n in range(len(prompts)) if "known" not in row.split or prompts.known[n]]
        hits = np.mean([[ranks[n] <= k for n in chosen] for ranks, _ in scored], axis=0)
        assert row.n == len(chosen)
        assert row.hit == pytest.approx(hits.mean())
        assert row.nll == pytest.approx(np.mean([[losses[n] for n in chosen] for _, losses in scored]), abs=1e-4)
        ends = mean_interval(hits, 11) if row.run == "random circuits" else proportion_interval(hits)
        assert (row.low, row.high) == pytest.approx(ends, nan_ok=True)
        assert row.edges == (model.graph.n_edges if some[0] is None else some[0].n_edges)
        n_nodes = [model.graph.n_senders - 1 if one is None else one.n_nodes for one in some]
        assert row.nodes == pytest.approx(np.mean(n_nodes))


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_the_full_circuit_is_the_full_model(model, task, ablation):
    table = table_of(model, Circuit.full(model.graph), task, ablation=ablation).set_index(["run", "split"])
    for split in SPLITS:
        full, same = table.loc[("full model", split)], table.loc[("circuit", split)]
        assert same[["edges", "nodes", "n", "hit", "low", "high"]].equals(
            full[["edges", "nodes", "n", "hit", "low", "high"]]
        )
        assert same["nll"] == pytest.approx(full["nll"], abs=1e-5)
    assert table.loc[("full model", "D_val"), "hit"] == table.loc[("full model", "D_test, known"), "hit"] == 1


def test_the_empty_circuit_has_no_random_circuits_beside_it(model, task):
    table = table_of(model, Circuit.empty(model.graph), task)
    assert table["run"].unique().tolist() == RUNS[:3]
    circuit, empty = (table[table["run"] == run].drop(columns="run").reset_index(drop=True) for run in RUNS[1:3])
    assert len(empty) == 3 and circuit.equals(empty)


def test_a_circuit_is_run_with_the_ablation_that_it_was_found_with(model, task, circuit):
    found = replace(circuit, provenance={"ablation": "mean"})
    assert table_of(model, found, task).equals(table_of(model, circuit, task, ablation="mean"))
    assert table_of(model, circuit, task).equals(table_of(model, circuit, task, ablation="zero"))
    assert not table_of(model, found, task).equals(table_of(model, circuit, task))


def test_the_table_repeats_and_its_seed_matters_to_random_circuits_alone(model, task, circuit):
    one, again, other = (table_of(model, circuit, task, seed=seed) for seed in (0, 0, 50))
    assert one.equals(again)
    same = one[["run", "edges", "split", "n", "hit", "nll"]] == other[["run", "edges", "split", "n", "hit", "nll"]]
    assert same[one["run"] != "random circuits"].all(axis=None)
    assert not same.loc[one["run"] == "random circuits", "nll"].any()


def test_a_relation_of_one_fact_has_no_d_test(model, circuit):
    task = make_task(model, known_relation(model, 1), n=1)
    table = table_of(model, circuit, task)
    assert table["split"].unique().tolist() == ["D_val"] and (table["n"] == 1).all()


def test_d_test_without_a_known_fact_has_no_number(model, circuit):
    task = make_task(model, known_relation(model, 8, unknown=6), n=2)
    assert not task.test.known.any()
    table = table_of(model, circuit, task).set_index("split").loc["D_test, known"]
    assert (table["n"] == 0).all() and table[["hit", "low", "high", "nll"]].isna().all(axis=None)


def test_facts_without_a_partner_are_left_out_under_resample(model, circuit):
    facts = known_relation(model, 9).facts
    lonely = next(fact for fact in facts if len(fact.subject.split()) == 3)
    chosen = [fact for fact in facts if len(fact.subject.split()) == 1] + [lonely]
    task = make_task(model, relation_of(chosen), n=9)
    with pytest.warns(UserWarning, match=lonely.subject):
        table = table_of(model, circuit, task, ablation="resample")
    totals = table[table["split"] != "D_test, known"].groupby("run")["n"].sum()
    assert (totals == len(task.val) + len(task.test) - 1).all()


def test_without_a_partner_for_any_fact_of_d_test_it_alone_is_left_out_under_resample(model, circuit):
    task = make_task(model, known_relation(model, 9), n=4)
    lonely = replace(task, test=replace(task.test, paired=torch.zeros_like(task.test.paired)))
    with pytest.warns(UserWarning, match="there is none for .*: D_test is left out"):
        table = table_of(model, circuit, lonely, ablation="resample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = table_of(model, circuit, task, ablation="resample")
    assert table.equals(whole[whole["split"] == "D_val"].reset_index(drop=True)) and len(table)


def test_progress_counts_every_run(model, task, circuit):
    calls = []
    completeness(model, circuit, task, draws=4, progress=lambda *call: calls.append(call[:2]))
    assert calls == [(i + 1, 14) for i in range(14)]  # three runs and four draws on two splits


def test_without_draws_there_is_no_row_of_random_circuits(model, task, circuit):
    whole, less = table_of(model, circuit, task), table_of(model, circuit, task, draws=0)
    assert whole[whole["run"] != "random circuits"].equals(less)
    assert len(whole) > len(less)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"draws": -1}, {"ablation": "none"}])
def test_settings_that_cannot_be_meant_are_errors(model, task, circuit, wrong):
    with pytest.raises(SettingError, match=str(next(iter(wrong.values())))):
        table_of(model, circuit, task, **wrong)


def test_a_circuit_of_another_graph_or_of_other_weights_is_refused(model, task, circuit):
    with pytest.raises(CircuitError, match="3 layers"):
        table_of(model, Circuit.full(Graph(3, 4)), task)
    theirs = replace(circuit, provenance={"model": {"name": "theirs", "digest": "0" * 64}})
    with pytest.raises(CircuitError, match="theirs"):
        table_of(model, theirs, task)


def test_a_task_of_other_weights_is_refused(model, circuit):
    """Its tokens, known facts and ranks are the other model's."""
    other = tiny_model("llama", seed=1)
    with pytest.raises(KcwbError):
        table_of(model, circuit, make_task(other, known_relation(other, 8), n=3))


def test_a_run_whose_logits_are_not_numbers_is_an_error_and_not_a_hit(model, task, circuit, monkeypatch):
    from kcwb.evaluation import completeness as module

    run = module.run_circuit
    monkeypatch.setattr(module, "run_circuit", lambda *args: run(*args) * torch.nan)
    with pytest.raises(KcwbError):
        table_of(model, circuit, task)
