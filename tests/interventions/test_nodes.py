"""What goes without some nodes."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.errors import CircuitError, SettingError
from kcwb.interventions.nodes import ablate_nodes, ablation_summary
from kcwb.studies.hallucination.measurement import task_of as task_with
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.handmade import copying_head
from tests.reading.test_nodes import half, task_of
from tests.tasks import TEMPLATE, answer_ids, relation_of, slow_rank, unpadded_logits


@pytest.fixture
def llama(tiny):
    return tiny("llama")


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablating_equals_running_without_the_nodes_edges(llama, ablation):
    task = task_of(llama)
    circuit = half(llama, ablation)
    table = ablate_nodes(llama, circuit, task, ["a0.h1", "m1"], progress=False)
    cuts = make_ablation(llama, task, ablation)
    for run, kept in (("full model", llama.graph.exists), ("circuit", circuit.kept)):
        for split, prompts in (("D_val", task.val), ("D_test", task.test)):
            prompts = cuts.usable(prompts)
            for state in ("before", "after"):
                mask = kept.clone()
                if state == "after":
                    for row, name in enumerate(llama.graph.sender_names):
                        mask[row] &= name not in ("a0.h1", "m1")
                logits = run_circuit(llama, mask, prompts, cuts)
                found = table[(table["run"] == run) & (table["state"] == state) & (table["split"] == split)]
                assert found["answer"].tolist() == [fact.object for fact in prompts.facts]
                assert found["prompt"].tolist() == list(prompts.texts)
                for row, fact in enumerate(found.itertuples()):
                    answer, mask_a = prompts.answers[row], prompts.answer_mask[row]
                    logp = logits[row].log_softmax(-1)
                    loss = -float(torch.stack([logp[i, t] for i, t in enumerate(answer) if mask_a[i]]).mean())
                    assert fact.rank == int((logits[row, 0] >= logits[row, 0, answer[0]]).sum())
                    assert math.isclose(fact.probability, float(logp[0, answer[0]].exp()), rel_tol=1e-3, abs_tol=1e-6)
                    assert math.isclose(fact.loss, loss, rel_tol=1e-3, abs_tol=1e-4)
                    assert fact.hit == (fact.rank <= 10)


def test_rank_and_probability_reach_to_the_token_that_decides(llama):
    facts = [Fact(f"w{10 + i}", name) for i, name in enumerate(["w40 w1", "w40 w2 w3", "w40 w2 w4", "w41"])]
    prompts = encode(llama, facts, TEMPLATE, [fact.object for fact in facts])
    task = task_with(llama, relation_of(facts), TEMPLATE, prompts, range(4), 0)
    table = ablate_nodes(llama, None, task, ["m1"], progress=False)
    for row, fact in zip(table[table["state"] == "before"].itertuples(), facts, strict=True):
        logits = unpadded_logits(llama, fact)
        stop = {"w40 w1": 2, "w41": 1}.get(fact.object, 3)
        each = [logits[i].softmax(-1)[token] for i, token in enumerate(answer_ids(llama, fact)[:stop])]
        assert row.probability == pytest.approx(float(torch.stack(each).prod()), rel=1e-4)
        assert row.rank == slow_rank(llama, fact, [one.object for one in facts])


def test_ablating_the_mover_of_a_handmade_model_loses_the_facts_and_a_decoy_does_not():
    model, relation, edges, _ = copying_head()
    task = make_task(model, relation, n=6)
    circuit = Circuit.from_edges(model.graph, sorted(edges))

    def ranks(node: str) -> pd.DataFrame:
        table = ablate_nodes(model, circuit, task, [node], ablation="zero", progress=False)
        return table.groupby(["run", "state"])["rank"].max().unstack()

    assert (ranks("a1.h2")["before"] == 1).all() and (ranks("a1.h2")["after"] > 1).all()
    assert (ranks("a0.h1")["after"] == 1).all()


def test_the_mean_over_facts_is_summarised(llama):
    task = task_of(llama)
    table = ablate_nodes(llama, half(llama, "zero"), task, ["m0"], progress=False)
    summary = ablation_summary(table)
    assert list(summary["run"].unique()) == ["full model", "circuit"]
    places = [(split, state) for split in ("D_val", "D_test") for state in ("before", "after")]
    assert list(zip(summary["split"], summary["state"], strict=True)) == places * 2
    for row in summary.itertuples():
        part = table[(table["run"] == row.run) & (table["split"] == row.split) & (table["state"] == row.state)]
        assert row.n == len(part) and math.isclose(row.hit, part["hit"].mean())
        assert row.low <= row.hit <= row.high
        assert math.isclose(row.loss, part["loss"].mean()) and row.rank == part["rank"].median()
    assert summary[(summary["run"] == "full model") & (summary["split"] == "D_val")]["hit"].iloc[0] == 1


def test_without_a_circuit_only_the_model_is_run(llama):
    task = task_of(llama)
    table = ablate_nodes(llama, None, task, ["m0"], progress=False)
    assert set(table["run"]) == {"full model"}
    by_name = ablate_nodes(llama, None, task, ["m0"], ablation="mean", progress=False)
    pd.testing.assert_frame_equal(table, by_name)


def test_ablation_reports_each_run(llama):
    reports = []
    ablate_nodes(llama, half(llama, "zero"), task_of(llama), ["m0"], progress=lambda *report: reports.append(report))
    assert [report[:2] for report in reports] == [(done, 8) for done in range(1, 9)]


@pytest.mark.parametrize(
    ("nodes", "more", "kind", "words"),
    [
        ([], {}, SettingError, "at least one"),
        ("m0", {}, SettingError, "list"),
        (["logits"], {}, CircuitError, "not a sender"),
        (["m0"], {"k": 0}, SettingError, "k=0"),
        (["m0"], {"ablation": "men"}, SettingError, "mean"),
    ],
)
def test_what_cannot_be_meant_is_refused(llama, nodes, more, kind, words):
    with pytest.raises(kind, match=words):
        ablate_nodes(llama, None, task_of(llama), nodes, **more)


@pytest.mark.model
def test_without_its_first_mlp_the_builtin_model_loses_the_capitals(smollm2):
    task = make_task(smollm2, "country_capital", n=2)
    after = ablate_nodes(smollm2, None, task, ["m0"], ablation="zero", progress=False)
    ranks = after[after["split"] == "D_val"].groupby("state")["rank"].max()
    assert ranks["before"] <= 10 < ranks["after"]
