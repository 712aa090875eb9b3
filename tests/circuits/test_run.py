"""A circuit's logits: the model's own, the corrupted run's, and whatever the chunks."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.discovery.acdc import Search
from kcwb.discovery.attribution import attribution_scores
from kcwb.errors import CircuitError, KcwbError, SettingError
from kcwb.evaluation.play import Play
from kcwb.models import memory
from kcwb.models.digest import state_digest
from kcwb.models.forward import forward
from kcwb.models.graph import Graph
from kcwb.reading.nodes import component_logits
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.tasks import TEMPLATE, answer_ids, known_relation, unpadded_logits, unpadded_tokens
from tests.tiny import tiny_model

ARCHITECTURES = ["llama", "gpt2", "neox", "qwen2", "opt"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def llama(tiny):
    return tiny("llama")


def task_of(model):
    task = make_task(model, known_relation(model, 9), n=4)
    assert task.reference.paired.all() and len(set(task.reference.lengths.tolist())) == 3
    assert task.reference.answer_mask.sum() > len(task.reference)
    return task


def some_edges(model, seed=0, share=0.5):
    return (
        torch.rand(model.graph.exists.shape, generator=torch.Generator().manual_seed(seed)) < share
    ) & model.graph.exists


def at_real_answers(logits, prompts):
    return logits[prompts.answer_mask]


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("form", ["none", "circuit", "mask"])
def test_all_edges_kept_gives_the_hugging_face_logits(model, ablation, form):
    task = task_of(model)
    full = {"none": None, "circuit": Circuit.full(model.graph), "mask": model.graph.exists}[form]
    for prompts in (task.val, task.reference):
        found = run_circuit(model, full, prompts, make_ablation(model, task, ablation))
        assert found.shape == (len(prompts), prompts.answers.shape[1], model.network.d_vocab)
        for n, fact in enumerate(prompts.facts):
            torch.testing.assert_close(found[n, : len(answer_ids(model, fact))], unpadded_logits(model, fact), **CLOSE)


def test_all_edges_cut_under_resample_gives_the_corrupted_runs_logits(model):
    task = task_of(model)
    prompts = task.reference
    found = run_circuit(model, Circuit.empty(model.graph), prompts, make_ablation(model, task, "resample"))
    for n, fact in enumerate(prompts.facts):
        tokens = prompts.corrupted[n, : len(unpadded_tokens(model, fact))]
        expected = model.logits(tokens[None])[0, -len(answer_ids(model, fact)) :]
        torch.testing.assert_close(found[n, : len(expected)], expected, **CLOSE)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_all_edges_cut_gives_the_same_for_prompts_of_one_shape(model, ablation):
    """Nothing of the prompt is left but its length."""
    task = task_of(model)
    prompts = task.reference
    found = run_circuit(model, Circuit.empty(model.graph), prompts, make_ablation(model, task, ablation))
    torch.testing.assert_close(found[:, 0], found[:1, 0].expand(len(prompts), -1), **CLOSE)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_padding_does_not_change_a_circuits_logits(model, ablation):
    """Each prompt on its own, as long as it is."""
    task = task_of(model)
    prompts, cuts, kept = task.reference, make_ablation(model, task, ablation), some_edges(model)
    found = run_circuit(model, kept, prompts, cuts)
    for n, fact in enumerate(prompts.facts):
        alone = prompts.select([n])
        tokens = torch.tensor([unpadded_tokens(model, fact)])
        assert alone.tokens.equal(tokens)
        residual = forward(model.network, tokens, kept=kept, ablated=cuts.values(alone)).residual
        expected = model.network.logits(residual)[0, -len(answer_ids(model, fact)) :]
        torch.testing.assert_close(found[n, : len(expected)], expected, **CLOSE)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_chunks_do_not_change_the_logits(llama, monkeypatch, ablation, size):
    task = task_of(llama)
    prompts, cuts, kept = task.reference, make_ablation(llama, task, ablation), some_edges(llama)
    whole = run_circuit(llama, kept, prompts, cuts)
    monkeypatch.setattr(memory, "prompts_at_once", lambda network, tokens, copies: size)
    found = run_circuit(llama, kept, prompts, cuts)
    assert found.shape == whole.shape
    torch.testing.assert_close(at_real_answers(found, prompts), at_real_answers(whole, prompts), atol=1e-5, rtol=1e-5)


def test_a_budget_of_no_memory_runs_one_prompt_at_a_time(llama, monkeypatch):
    task = task_of(llama)
    prompts, cuts = task.reference, make_ablation(llama, task, "mean")
    whole = run_circuit(llama, some_edges(llama), prompts, cuts)
    monkeypatch.setattr(memory, "memory_budget", lambda device: 1)
    found = run_circuit(llama, some_edges(llama), prompts, cuts)
    torch.testing.assert_close(at_real_answers(found, prompts), at_real_answers(whole, prompts), atol=1e-5, rtol=1e-5)


def test_a_run_repeats_bit_for_bit_and_leaves_the_mask_alone(llama):
    task = task_of(llama)
    kept = some_edges(llama)
    before, cuts = kept.clone(), make_ablation(llama, task, "mean")
    assert run_circuit(llama, kept, task.val, cuts).equal(
        run_circuit(llama, Circuit(llama.graph, kept), task.val, cuts)
    )
    assert kept.equal(before)


def test_entries_of_a_mask_where_there_is_no_edge_do_nothing(llama):
    task = task_of(llama)
    kept, cuts = some_edges(llama), make_ablation(llama, task, "zero")
    expected = run_circuit(llama, kept, task.val, cuts)
    assert run_circuit(llama, kept | ~llama.graph.exists, task.val, cuts).equal(expected)


# What is refused


@pytest.mark.parametrize(
    ("graph", "words"),
    [(Graph(3, 4), "3 layers"), (Graph(2, 2), "2 heads"), (Graph(2, 4, parallel=True), "parallel")],
    ids=str,
)
def test_a_circuit_of_another_graph_is_refused(llama, graph, words):
    task = task_of(llama)
    with pytest.raises(CircuitError, match=words):
        run_circuit(llama, Circuit.full(graph), task.val, make_ablation(llama, task, "zero"))


def test_a_circuit_of_other_weights_is_refused_and_its_mask_is_not(llama):
    task, other = task_of(llama), tiny_model("llama", seed=1)
    cuts = make_ablation(llama, task, "zero")
    circuit = replace(Circuit.full(llama.graph), provenance={"model": {"name": "theirs", "digest": other.digest}})
    with pytest.raises(CircuitError, match=rf"'theirs'.*{other.digest[:12]}.*{llama.digest[:12]}"):
        run_circuit(llama, circuit, task.val, cuts)
    assert run_circuit(llama, circuit.kept, task.val, cuts).isfinite().all()
    own = replace(circuit, provenance={"model": {"name": llama.name, "digest": llama.digest}})
    assert run_circuit(llama, own, task.val, cuts).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 3), (1, 1), ()])
def test_a_mask_of_another_shape_is_refused(llama, shape):
    task = task_of(llama)
    with pytest.raises(CircuitError, match=r"senders, receivers"):
        run_circuit(llama, torch.ones(shape, dtype=torch.bool), task.val, make_ablation(llama, task, "zero"))


def test_prompts_without_a_partner_are_refused_under_resample_and_not_run_on_anothers(llama):
    """Both are three tokens wide with their answers, so that one's corrupted run would fit the other."""
    task = task_of(llama)
    facts = [Fact("w10", "w20 w21"), Fact("w11", "w22"), Fact("w12 w13", "w23")]
    prompts = encode(llama, facts, TEMPLATE, ["w20 w21", "w22", "w23"]).select([0, 2])
    assert prompts.paired.tolist() == [True, False]
    with warnings.catch_warnings(), pytest.raises(KcwbError, match="w12 w13"):
        warnings.simplefilter("ignore")
        run_circuit(llama, Circuit.empty(llama.graph), prompts, make_ablation(llama, task, "resample"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_circuit_with_the_digest_that_depended_on_a_bridges_names_is_still_the_models(name):
    model = tiny_model(name)
    former = state_digest(model.bridge.original_model)  # over the wrapped module's own names and tensors
    assert former != model.digest
    circuit = replace(Circuit.full(model.graph), provenance={"model": {"name": "x", "digest": former}})
    check_same_model(model, circuit)
    with pytest.raises(CircuitError, match="found on"):
        check_same_model(tiny_model(name, seed=1), circuit)


def test_what_cut_edges_deliver_of_other_weights_is_refused(llama):
    """Of a twin, a model of the same shape, the numbers would be wrong and nothing would say so."""
    task, twin = task_of(llama), tiny_model("llama", seed=9)
    half = Circuit(llama.graph, llama.graph.exists & (torch.rand(llama.graph.exists.shape) < 0.5))
    for kind in ("mean", "resample"):
        cuts = replace(make_ablation(llama, task, kind), model_digest=twin.digest, network=twin.network)
        for run in (
            lambda cuts=cuts: run_circuit(llama, half, task.val, cuts),
            lambda cuts=cuts: Play(llama, half, task, ablation=cuts),
            lambda cuts=cuts: component_logits(llama, task, "m1", circuit=half, ablation=cuts),
            lambda cuts=cuts: attribution_scores(llama, make_loss(llama, task.val), cuts),
            lambda cuts=cuts: Search(llama, make_loss(llama, task.val), cuts, tau=0.1),
        ):
            with pytest.raises(SettingError, match=rf"made for weights .* Make it again: make_ablation.*'{kind}'"):
                run()
    run_circuit(llama, half, task.val, make_ablation(twin, None, "zero"))  # nothing is nobody's
