"""One node: its attention, its part of the logits, and its edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.discover import discover
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.interventions.together import heads_together
from kcwb.models.forward import forward
from kcwb.models.graph import Graph
from kcwb.reading.attending import why_attends
from kcwb.reading.nodes import attention_pattern, component_logits, node_edges, planned_run, written_logits
from kcwb.tasks.prompts import encode
from kcwb.tasks.task import make_task
from tests.handmade import copying_head, key_value_lookup
from tests.tasks import TEMPLATE, known_relation, unpadded_tokens

ARCHITECTURES = ["llama", "gpt2", "neox", "qwen2", "opt", "mistral-window", "llama-biases"]
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def llama(tiny):
    return tiny("llama")


def task_of(model):
    return make_task(model, known_relation(model, 9), n=4)


def node_logits(model, task, node, prompt=None, circuit=None, ablation=None):
    """`[N, V]`: what `component_logits` takes the mean of."""
    return written_logits(model, planned_run(model, task, circuit, ablation, prompt), node)


def half(model, ablation: str, seed: int = 0) -> Circuit:
    """A circuit of about half of the edges."""
    draw = torch.rand(model.graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    return Circuit(model.graph, (draw < 0.5) & model.graph.exists, provenance={"ablation": ablation})


# --- attention ---


def test_attention_is_that_of_transformer_lens(model):
    task = task_of(model)
    for row in (0, 3):
        tokens = task.val.tokens[row : row + 1, : int(task.val.lengths[row])]
        _, cache = model.bridge.run_with_cache(tokens)
        for layer, head in ((0, 1), (1, 3)):
            found = attention_pattern(model, task, f"a{layer}.h{head}", prompt=row)
            expected = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_attention_is_labelled_by_the_prompts_tokens(llama):
    task = task_of(llama)
    row = 2
    found = attention_pattern(llama, task, "a1.h0", prompt=row)
    words = [llama.tokenizer.decode([token]) for token in unpadded_tokens(llama, task.val.facts[row])]
    assert list(found.columns) == list(found.index)
    assert list(found.columns) == [f"{i}:{word}" for i, word in enumerate(words[: len(found)])]
    assert len(found) == int(task.val.lengths[row])
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert (np.triu(found, 1) == 0).all()


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_attention_in_the_whole_circuit_is_the_models(model, ablation):
    task = task_of(model)
    full = replace(Circuit.full(model.graph), provenance={"ablation": ablation})
    for head in ("a0.h2", "a1.h1"):
        pd.testing.assert_frame_equal(
            attention_pattern(model, task, head, prompt=1, circuit=full),
            attention_pattern(model, task, head, prompt=1),
            atol=1e-5,
        )


def test_attention_in_a_circuit_depends_on_the_edges_into_query_and_key_alone(llama):
    task = task_of(llama)
    head, whole = "a1.h2", Circuit.full(llama.graph)
    plain = attention_pattern(llama, task, head)

    def without(*receivers: str) -> pd.DataFrame:
        kept = whole.kept.clone()
        for name in receivers:
            kept[:, llama.graph.receiver_index(name)] = False
        return attention_pattern(llama, task, head, circuit=Circuit(llama.graph, kept))

    pd.testing.assert_frame_equal(without("a1.h2<v>", "a1.h1<q>", "m1", "logits"), plain, atol=1e-5)
    for port in "qk":
        assert (without(f"a1.h2<{port}>") - plain).abs().max(axis=None) > 0.01
    flat = without("a1.h2<q>")  # a query of zero attends to all tokens alike
    np.testing.assert_allclose(flat.iloc[-1], 1 / len(flat), atol=1e-5)


def test_the_mover_of_a_handmade_model_attends_from_end_to_the_subject():
    model, relation, edges, _ = copying_head()
    task = make_task(model, relation, n=6)
    circuit = Circuit.from_edges(model.graph, sorted(edges))
    for row in range(len(task.val)):
        for run in (None, circuit):
            found = attention_pattern(model, task, "a1.h2", prompt=row, circuit=run)
            subject = int(task.val.subject_stop[row]) - 1
            assert found.iloc[-1].argmax() == subject and found.iloc[-1].max() > 0.8


# --- component logits ---


def test_all_components_and_biases_sum_to_the_logits(model):
    """Of the full model, as Hugging Face computes them; the final norm is linear once its scale is given."""
    task = task_of(model)
    prompts = task.val
    total = sum(node_logits(model, task, node) for node in model.graph.sender_names)
    rows = torch.arange(len(prompts))
    expected = model.logits(prompts.tokens)[rows, prompts.ends]
    residual = run_residual(model, prompts)
    torch.testing.assert_close(total + constants(model, residual), expected, **CLOSE)


def run_residual(model, prompts):
    _, cache = model.bridge.run_with_cache(prompts.tokens)
    last = model.graph.n_layers - 1
    return cache[f"blocks.{last}.hook_resid_post"][torch.arange(len(prompts)), prompts.ends]


def constants(model, residual):
    """What belongs to no sender: every layer's b_O, the final norm's bias, and that of the unembedding."""
    network, norm = model.network, model.network.norm_final
    shared = sum((network.constant(layer) for layer in range(model.graph.n_layers)), torch.zeros(network.d_model))
    variance = residual.square().mean(-1) if norm.rms else residual.var(-1, unbiased=False)
    centred = shared if norm.rms else shared - shared.mean()
    part = centred / (variance + norm.eps).sqrt()[:, None] * norm.weight
    part = part + (0 if norm.bias is None else norm.bias)
    return part @ network.W_U + (0 if network.b_U is None else network.b_U)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_in_a_circuit_those_that_logits_reads_sum_to_its_logits(tiny, name, ablation):
    """Cut edges deliver their ablated value, which is added by hand."""
    model = tiny(name)
    task = task_of(model)
    circuit, cuts = half(model, ablation), make_ablation(model, task, ablation)
    prompts, graph = cuts.usable(task.val), model.graph
    heard = circuit.kept[:, -1]
    total = sum(
        node_logits(model, task, node, circuit=circuit)
        for node, edge in zip(graph.sender_names, heard, strict=True)
        if edge
    )
    values = cuts.values(prompts)
    residual = forward(model.network, prompts.tokens, kept=circuit.kept, ablated=values).residual
    at = torch.arange(len(prompts)), prompts.ends
    if values is not None:
        cut = values[~heard].sum(0)[at]
        norm, x = model.network.norm_final, residual[at]
        if not norm.rms:
            cut, x = cut - cut.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
        total = total + cut / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight @ model.network.W_U
    expected = run_circuit(model, circuit, prompts, cuts)[:, 0]
    torch.testing.assert_close(total + constants(model, residual[at]), expected, **CLOSE)
    torch.testing.assert_close(node_logits(model, task, "logits", circuit=circuit), expected, **CLOSE)


def test_a_components_logits_are_those_of_transformer_lens(tiny):
    """Its cache's per-head results, layer-normed at the run's own scale (`apply_ln`), through W_U."""
    model = tiny("gpt2")
    task = task_of(model)
    row = 1
    prompts = task.val.select([row])
    tokens = prompts.tokens[:, : int(prompts.lengths[0])]
    _, cache = model.bridge.run_with_cache(tokens)
    z, W_O = cache["blocks.1.attn.hook_z"][0, -1, 2], model.bridge.blocks[1].attn.W_O[2]
    scaled = cache.apply_ln_to_stack((z @ W_O)[None, None, None, :], layer=-1, pos_slice=-1)[0, 0, 0]
    # apply_ln_to_stack leaves the gain to weights that are folded, which ours are not
    expected = scaled * model.network.norm_final.weight @ model.network.W_U
    torch.testing.assert_close(node_logits(model, task, "a1.h2", prompt=row)[0], expected, **CLOSE)


def test_the_lookup_writes_the_answer(tiny):
    """m0 of the handmade model turns a subject into its object, but at the subject, not at END; a2.h1 says it there."""
    model, relation, edges, _ = key_value_lookup()
    task = make_task(model, relation, n=6)
    circuit = Circuit.from_edges(model.graph, sorted(edges))
    for run in (None, circuit):
        for row in range(len(task.val)):
            said = component_logits(model, task, "a2.h1", k=1, prompt=row, circuit=run)
            assert said["token"].iloc[0] == task.val.facts[row].object and bool(said["answer"].iloc[0])
            assert said["above_mean"].iloc[0] > 1


def test_top_tokens_are_ranked_and_the_answer_follows(llama):
    task = task_of(llama)
    logits = node_logits(llama, task, "m1", prompt=2)[0]
    answer = int(task.val.answers[2, 0])
    table = component_logits(llama, task, "m1", k=3, prompt=2)
    order = sorted(range(len(logits)), key=lambda token: -float(logits[token]))
    rank = order.index(answer) + 1
    assert table["token_id"].tolist() == order[:3] + ([answer] if rank > 3 else [])
    assert table["rank"].tolist() == [1, 2, 3] + ([rank] if rank > 3 else [])
    assert table["token"].tolist() == [llama.tokenizer.decode([token]) for token in table["token_id"]]
    np.testing.assert_allclose(table["logit"], logits[table["token_id"].tolist()], rtol=1e-5)
    np.testing.assert_allclose(table["above_mean"], table["logit"] - float(logits.mean()), rtol=1e-4)
    assert table.set_index("token_id")["answer"].to_dict() == {
        token: token == answer for token in table["token_id"].tolist()
    }


def test_no_prompts_are_refused(llama):
    none = task_of(llama).val.select([])
    for ask in (
        lambda: component_logits(llama, none, "m0"),
        lambda: attention_pattern(llama, none, "a0.h0"),
        lambda: why_attends(llama, none),
        lambda: heads_together(llama, none, ["a0.h0", "a0.h1"], progress=False),
    ):
        with pytest.raises(DataError, match="no prompts to look at"):
            ask()


def test_every_right_answer_is_an_answer(llama):
    facts = [replace(fact, also=("w70", "w71")) for fact in known_relation(llama, 9).facts if " " not in fact.object]
    prompts = encode(llama, facts, TEMPLATE, [fact.object for fact in facts])
    table = component_logits(llama, prompts, "m1", k=llama.network.d_vocab, prompt=0)
    assert set(table.loc[table["answer"], "token"]) == set(facts[0].right)


def test_over_all_prompts_it_is_the_mean(llama):
    task = task_of(llama)
    each = torch.cat([node_logits(llama, task, "a1.h1", prompt=row) for row in range(len(task.val))])
    torch.testing.assert_close(node_logits(llama, task, "a1.h1"), each, **CLOSE)
    table = component_logits(llama, task, "a1.h1", k=5)
    assert len(table) == 5
    np.testing.assert_allclose(table["logit"], each.mean(0).topk(5).values, rtol=1e-3)


def test_other_prompts_are_taken_with_their_ablation(llama):
    task = task_of(llama)
    circuit = half(llama, "mean")
    cuts = make_ablation(llama, task, "mean")
    by_task = node_logits(llama, task, "m0", circuit=circuit)
    torch.testing.assert_close(node_logits(llama, task.val, "m0", circuit=circuit, ablation=cuts), by_task)
    assert node_logits(llama, task.test, "m0", circuit=circuit, ablation=cuts).shape[0] == len(task.test)
    with pytest.raises(SettingError, match="pass the task"):
        node_logits(llama, task.val, "m0", circuit=circuit)
    assert not torch.equal(node_logits(llama, task.val, "m1", circuit=circuit, ablation="zero"), by_task)


# --- edges ---


def test_a_nodes_edges_are_those_that_name_it(llama):
    task = task_of(llama)
    circuit = discover(llama, task, edges=60, progress=False)
    node = circuit.nodes.query("kind == 'head'").sort_values("in_edges")["node"].iloc[-1]
    table = node_edges(circuit, node)
    names = [f"{row.sender}->{row.receiver}" for row in circuit.edges.itertuples()]
    mine = [name for name in names if f"->{node}<" in name] + [name for name in names if name.startswith(f"{node}->")]
    assert (table["sender"] + "->" + table["receiver"]).tolist() == mine
    counts = circuit.nodes.set_index("node").loc[node]
    assert table["direction"].value_counts().to_dict() == {"in": counts["in_edges"], "out": counts["out_edges"]}
    assert node_edges(circuit, "logits")["direction"].eq("in").all()
    assert node_edges(Circuit.empty(llama.graph), node).empty


# --- refusing ---


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m, t: attention_pattern(m, t, "m0"), CircuitError, "only heads"),
        (lambda m, t: attention_pattern(m, t, "a9.h9"), CircuitError, "a9.h9"),
        (lambda m, t: attention_pattern(m, t, "a0.h0", prompt=4), SettingError, "0 to 3"),
        (lambda m, t: attention_pattern(m, t, "a0.h0", prompt=-1), SettingError, "0 to 3"),
        (lambda m, t: node_logits(m, t, "a0.h0<q>"), CircuitError, "not a node"),
        (lambda m, t: component_logits(m, t, "m0", k=0), SettingError, "k=0"),
        (lambda m, t: component_logits(m, t, "m0", k=10**6), SettingError, "vocabulary"),
        (lambda m, t: node_edges(Circuit.empty(m.graph), "m7"), CircuitError, "m7"),
        (lambda m, t: node_logits(m, t, "m0", circuit=Circuit.empty(Graph(7, 3))), CircuitError, "7 layers"),
        (lambda m, t: node_logits(m, t.val, "m0", circuit=Circuit.empty(m.graph), ablation="no"), SettingError, "no"),
    ],
)
def test_what_cannot_be_meant_is_refused(llama, call, kind, words):
    with pytest.raises(kind, match=words):
        call(llama, task_of(llama))


# --- the built-in model ---


@pytest.mark.model
def test_on_the_builtin_model(smollm2):
    """Attention and a head's part of the logits as transformer_lens has them."""
    task = make_task(smollm2, "country_capital", n=2)
    prompts = task.val.select([0])
    tokens = prompts.tokens[:, : int(prompts.lengths[0])]
    _, cache = smollm2.bridge.run_with_cache(tokens)
    found = attention_pattern(smollm2, task, "a14.h5", prompt=0)
    np.testing.assert_allclose(found, cache["blocks.14.attn.hook_pattern"][0, 5].numpy(), atol=1e-5)
    norm = smollm2.network.norm_final
    residual = cache["blocks.29.hook_resid_post"][0, -1]
    z, W_O = cache["blocks.14.attn.hook_z"][0, -1], smollm2.bridge.blocks[14].attn.W_O
    expected = (z[5] @ W_O[5]) / (residual.square().mean() + norm.eps).sqrt() * norm.weight @ smollm2.network.W_U
    torch.testing.assert_close(node_logits(smollm2, task, "a14.h5", prompt=0)[0], expected, atol=1e-3, rtol=1e-3)
