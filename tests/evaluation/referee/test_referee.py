"""The referee before circuits of which the truth is known, and what it does with its facts, its cache and bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.evaluation.referee import elsewhere, hypotheses
from kcwb.evaluation.referee import referee as module
from kcwb.evaluation.referee.compare import rank_circuits
from kcwb.evaluation.referee.elsewhere import best_circuit, of_nodes, rivals
from kcwb.evaluation.referee.hearing import Hearing, judged_facts, subjects_of
from kcwb.evaluation.referee.judgement import NO, YES, Judgement
from kcwb.evaluation.referee.referee import QUICK, referee
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests import handmade
from tests.ensembles import drawn

SETTINGS = {"relations": 0, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def fewer_permutations():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hypotheses, "_PERMUTATIONS", 4999)
        patch.setattr(hypotheses, "_SIMULATIONS", 50)
        yield


@pytest.fixture(scope="module")
def planted():
    """A head that copies, in a model whose other weights do nothing; and a task with two of its facts in D_val."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handmade, "_NOISE", 0.0)
        found = handmade.copying_head(n_layers=4, decoys=False)
    return found, make_task(found.model, found.relation, n=2)


def circuit_of(planted, edges) -> Circuit:
    found, task = planted
    facts = [[fact.subject, fact.object] for fact in task.val.facts]
    return Circuit.from_edges(found.model.graph, list(edges), provenance={"ablation": "zero", "facts": facts})


@pytest.fixture(scope="module")
def judged(planted, tmp_path_factory):
    """The truth, the truth without an edge and with idle ones, and a random circuit before the referee."""
    found, task = planted
    truth = sorted(found.truth("zero") | {"input->logits"})  # which no answer needs, but the final norm feels
    circuits = {
        "truth": circuit_of(planted, truth),
        "missing": circuit_of(planted, [edge for edge in truth if edge != "input->a1.h2<k>"]),
        "surplus": circuit_of(planted, [*truth, "input->m1", "m1->logits"]),
    }
    random = random_circuit(found.model.graph, len(truth), seed=7)
    circuits["random"] = replace(random, provenance=circuits["truth"].provenance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCWB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: referee(found.model, one, task, draws=60, **SETTINGS) for name, one in circuits.items()}


def refused(judgement: Judgement) -> set[str]:
    answers = judgement.answers
    return set(answers[answers == NO].index)


# --- planted truths ---


def test_the_planted_circuit_passes_every_question(judged):
    assert refused(judged["truth"]) == set()
    answers = judged["truth"].answers
    assert answers["minimality"] == answers["uniqueness"] == YES


def test_without_one_of_its_edges_it_no_longer_answers_as_the_model_does(judged):
    # the query that is left of an attention score asks for nothing that a key could answer: it is idle now
    assert refused(judged["missing"]) == {"equivalence", "minimality"}
    edges = judged["missing"].edges
    assert (edges.loc[edges["superfluous"], "receiver"] == "a1.h2<q>").all()


def test_with_idle_edges_it_is_not_minimal_and_nothing_else(judged):
    assert refused(judged["surplus"]) == {"minimality"}
    edges = judged["surplus"].edges
    idle = edges.loc[edges["superfluous"].astype(bool)]
    assert set(idle["sender"] + "->" + idle["receiver"]) == {"input->m1", "m1->logits"}


def test_a_random_circuit_is_no_better_than_random_ones(judged):
    assert {"equivalence", "sufficiency", "partial necessity", "minimality"} <= refused(judged["random"])


def test_every_question_has_numbers_and_a_sentence(judged):
    for judgement in judged.values():
        table = judgement.questions
        assert not (table[["p_for", "p_against"]] <= 0).any(axis=None) and (table["holm"] <= 1).all()
        assert (table["holm"] >= table[["p_for", "p_against"]].min(axis=1) - 1e-12).all()
        assert table["sentence"].str.endswith(".").all() and not table["sentence"].str.contains("nan|{").any()
        assert (table["low"].fillna(0) <= table["effect"] + 1e-9).all()


# --- what the numbers are of ---


def test_it_is_judged_on_known_facts_that_it_was_not_found_on(planted, judged):
    found, task = planted
    seen, fresh = judged_facts(found.model, circuit_of(planted, found.truth("zero")), task, 100, 0)
    assert {fact.subject for fact in seen.facts} == {fact.subject for fact in task.val.facts}
    assert len(fresh) == 14 and not {fact.subject for fact in fresh.facts} & {fact.subject for fact in task.val.facts}
    _, fewer = judged_facts(found.model, circuit_of(planted, found.truth("zero")), task, 100, 0, ["s4"])
    assert len(fewer) == 13
    assert judged["truth"].provenance["judged on"] == 14


def test_faithfulness_is_that_of_runs_one_by_one(planted, judged):
    found, task = planted
    circuit = circuit_of(planted, found.truth("zero") | {"input->logits"})
    _, fresh = judged_facts(found.model, circuit, task, 100, 0)
    rows = judged["truth"].matrix.set_index(["found", "tested", "level"])
    for ablation in ("zero", "mean"):
        cuts = make_ablation(found.model, task, ablation)
        loss = make_loss(found.model, fresh, "nll")
        full, empty = (Circuit.full(circuit.graph), Circuit.empty(circuit.graph))
        for level, one in {"edges": circuit, "nodes": of_nodes(circuit)}.items():
            own, all_, none = (float(loss(run_circuit(found.model, x, fresh, cuts))) for x in (one, full, empty))
            expected = (none - own) / (none - all_)
            assert rows.loc[("zero", ablation, level), "faithfulness"] == pytest.approx(expected, abs=1e-4)


def test_the_edges_between_kept_nodes():
    graph = handmade.copying_head().model.graph
    inside = of_nodes(Circuit.from_edges(graph, ["input->a0.h1<q>", "a0.h1->m1", "m1->logits"]))
    nodes = ("input", "a0.h1", "m1", "logits")
    expected = {
        graph.edge_name(*edge)
        for edge in graph.exists.nonzero().tolist()
        if all(name.partition("<")[0] in nodes for name in graph.edge_name(*edge).split("->"))
    }
    assert {f"{a}->{b}" for a, b in inside.edges[["sender", "receiver"]].to_numpy()} == expected


def test_rivals_have_none_of_the_strongest_edges():
    graph = handmade.copying_head().model.graph
    circuit = random_circuit(graph, 12, seed=0)
    scores = np.random.default_rng(0).random(graph.exists.shape).astype("float32")
    scored = replace(circuit, scores=circuit.kept.new_tensor(scores, dtype=None).float())
    strongest = scored.edges.assign(edge=lambda table: table["sender"] + "->" + table["receiver"])["edge"]
    for k, (rival, shared) in rivals(scored, scored.scores, [1, 5, 12]).items():
        own = set(rival.edges["sender"] + "->" + rival.edges["receiver"])
        assert not own & set(strongest[:k]) and shared == len(own & set(strongest))


def test_a_rival_finds_ways_round_an_edge_that_all_strong_paths_take():
    graph = handmade.copying_head(n_layers=4).model.graph
    scores = 0.01 * torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(0))
    for edge in ("input->m0", "m0->m1", "m1->m2", "m2->m3", "m3->logits", "m0->m3", "m1->m3"):
        scores[graph.edge_index(edge)] = 1.0
    scores[graph.edge_index("input->m0")] = -1.0
    for edges in (8, 20, 60):
        rival = best_circuit(graph, scores, edges)
        assert not rival.kept[graph.edge_index("input->m0")] and rival.without_dangling().kept.equal(rival.kept)
        assert 1 <= rival.n_edges <= edges + 3 and rival.n_edges >= edges - 8


# --- keeping, ranking ---


def test_a_judgement_is_kept_and_read_again(planted, tmp_path, monkeypatch):
    found, task = planted
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path))
    circuit = circuit_of(planted, found.truth("zero"))
    first = referee(found.model, circuit, task, quick=True, draws=10, **SETTINGS)
    monkeypatch.setattr(module, "Hearing", None)  # nothing is run again
    again = referee(found.model, circuit, task, quick=True, draws=10, **SETTINGS)
    assert again.answers.equals(first.answers) and again.provenance == json.loads(json.dumps(first.provenance))
    pd.testing.assert_frame_equal(again.questions, first.questions, check_dtype=False)
    seen, unseen = next(iter(subjects_of(circuit, task))), task.test.facts[0].subject
    same = referee(found.model, circuit, task, quick=True, draws=10, exclude=[seen], **SETTINGS)  # is not asked anyway
    assert same.answers.equals(first.answers)
    for more in ({"draws": 11}, {"draws": 10, "exclude": [unseen]}):
        with pytest.raises(TypeError):
            referee(found.model, circuit, task, quick=True, **more, **SETTINGS)
    fewer = replace(task, reference=task.reference.select(range(3)))  # a mean over others
    with pytest.raises(TypeError):
        referee(found.model, circuit, fewer, quick=True, draws=10, **SETTINGS)
    (kept,) = (tmp_path / "judgements").iterdir()
    kept.write_text(kept.read_text()[:100])
    with pytest.raises(TypeError):
        referee(found.model, circuit, task, quick=True, draws=10, **SETTINGS)


def test_circuits_are_ranked_on_the_same_facts(planted, tmp_path, monkeypatch):
    found, task = planted
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path))
    truth = circuit_of(planted, found.truth("zero"))
    elsewhere = replace(truth, provenance={"ablation": "zero", "facts": [["s9", "o1"]]})
    worse = circuit_of(planted, ["input->m1", "m1->logits"])
    some = {"worse": worse, "truth": elsewhere, "drawn": drawn(truth, truth)}
    order, judged = rank_circuits(found.model, some, task, quick=True, draws=10, ablation="zero", **SETTINGS)
    assert order["circuit"].tolist()[-1] == "worse" and set(judged) == {"worse", "truth", "drawn"}
    facts = {tuple(map(tuple, one.provenance["facts"])) for one in judged.values()}
    assert len(facts) == 1 and "s9" not in {subject for subject, _ in next(iter(facts))}
    with pytest.raises(SettingError, match="nothing to rank"):
        rank_circuits(found.model, {"one": truth}, task, progress=False)


# --- bad input ---


def test_what_cannot_be_judged_is_refused(planted):
    found, task = planted
    model, truth = found.model, circuit_of(planted, found.truth("zero"))
    with pytest.raises(CircuitError, match="no edge"):
        referee(model, Circuit.empty(model.graph), task, **SETTINGS)
    with pytest.raises(CircuitError, match="every edge"):
        referee(model, Circuit.full(model.graph), task, **SETTINGS)
    everything = replace(truth, provenance={"facts": [[fact.subject, fact.object] for fact in found.relation.facts]})
    with pytest.raises(DataError, match="needs 4"):
        referee(model, everything, task, cache=False, **SETTINGS)
    for wrong in ({"metric": "kl"}, {"metric": "hits"}, {"facts": 0}, {"confidence": 0.0}, {"draws": 0}):
        with pytest.raises(SettingError):
            referee(model, truth, task, cache=False, **SETTINGS, **wrong)


def test_a_judgement_of_another_format_is_refused(judged):
    text = judged["truth"].to_json()
    assert Judgement.from_json(text).to_json() == text
    for damaged in ("", "[]", "{}", text[:50], text.replace("kcwb-judgement/1", "other")):
        with pytest.raises(DataError, match="no judgement"):
            Judgement.from_json(damaged)


def test_a_judgement_is_read_with_every_digit_that_was_written(judged):
    truth = judged["truth"]
    questions = truth.questions.assign(p_for=1.2345678901234567e-13, effect=1 / 3)
    again = Judgement.from_json(replace(truth, questions=questions).to_json())
    assert (again.questions["p_for"] == 1.2345678901234567e-13).all() and (again.questions["effect"] == 1 / 3).all()
    for name in ("edges", "null", "matrix", "elsewhere", "rivals"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(truth, name), check_dtype=False, check_exact=True)


def test_circuits_that_cannot_be_judged_are_refused_before_any_is(planted, heard):
    found, task = planted
    circuits = {"truth": circuit_of(planted, found.truth("zero")), "none": Circuit.empty(found.model.graph)}
    with pytest.raises(CircuitError, match="nothing to judge"):
        rank_circuits(found.model, circuits, task, progress=False)
    assert not heard


def test_an_unknown_relation_is_refused_before_anything_runs(planted, tmp_path, monkeypatch):
    found, task = planted
    monkeypatch.setattr(module, "Hearing", lambda *_: pytest.fail("work was done"))
    for cache in (False, True):
        with pytest.raises(DataError, match="no relation 'no_such'"):
            truth = circuit_of(planted, found.truth("zero"))
            referee(found.model, truth, task, relations=["no_such"], cache=cache, progress=False)


@pytest.fixture
def heard(tmp_path, monkeypatch):
    """What the referee is asked, if it has kept no judgement of it."""
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))
    asked = []

    class Heard:
        def __init__(self, *given):
            asked.append(given)

        def judge(self, *_):
            return Judgement(*[pd.DataFrame({"a": [1.0]})] * 6)

    monkeypatch.setattr(module, "Hearing", Heard)
    return asked


def test_a_judgement_beside_a_relation_that_has_changed_since_is_not_read(planted, tmp_path, heard):
    found, task = planted
    path, truth = tmp_path / "other.json", circuit_of(planted, found.truth("zero"))
    for n in (9, 8, 8):
        replace(found.relation, name="other", facts=found.relation.facts[:n]).save(path)
        referee(found.model, truth, task, relations=[str(path)], progress=False)
    assert [len(relations[0].facts) for *_, relations, _, _ in heard] == [9, 8]


def test_a_judgement_with_bos_is_none_without(planted, heard):
    found, task = planted
    for bos in (False, True, True):
        model = replace(found.model, prepend_bos=bos)
        referee(model, circuit_of(planted, found.truth("zero")), task, **SETTINGS)
    assert [model.prepend_bos for model, *_ in heard] == [False, True]


def test_other_templates_are_not_tried_on_what_it_was_found_on_or_is_not_to_be_judged_on(planted, monkeypatch):
    found, task = planted
    circuit = circuit_of(planted, found.truth("zero"))
    circuit = replace(circuit, provenance={**circuit.provenance, "facts": [["s2", "?"]]})  # a single one
    relation = replace(found.relation, prompt_templates_zs=(*found.relation.prompt_templates_zs, "so {} is"))
    left_out = []
    monkeypatch.setattr(elsewhere, "task_elsewhere", lambda *given: left_out.append(set(given[5])))
    other = replace(task, relation=relation)
    referee(found.model, circuit, other, quick=True, draws=5, exclude=["s4"], cache=False, **SETTINGS)
    assert left_out == [{"s2", "s4"}]


def test_too_few_facts_that_the_ablation_is_defined_on_are_refused(planted):
    found, task = planted
    circuit = circuit_of(planted, found.truth("zero"))
    lonely = Kept(make_ablation(found.model, task, "resample"), 3)
    with pytest.raises(DataError, match=r"12 facts.*takes 3.*4 at least"):
        Hearing(found.model, circuit, task, lonely, "nll", QUICK, 0, (), 0)


class Kept:
    """An ablation that is defined on some first facts alone."""

    def __init__(self, cuts, most):
        self.cuts, self.most, self.kind = cuts, most, cuts.kind

    def usable(self, prompts):
        return prompts.select(slice(self.most))

    def values(self, prompts):
        return self.cuts.values(prompts)


def test_it_may_be_cancelled(planted):
    found, task = planted

    def stop(done, total, note):
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        referee(found.model, circuit_of(planted, found.truth("zero")), task, cache=False, relations=0, progress=stop)
