"""Random circuits are of the asked size and connected; exact effects are those of two runs."""

from __future__ import annotations

import networkx as nx
import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit, random_inclusion
from kcwb.discovery.methods.exact import exact_effects
from kcwb.errors import SettingError
from kcwb.models.graph import Graph
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.tasks import answer_ids, known_relation, unpadded_tokens
from tests.tiny import tiny_hf

GRAPHS = [Graph(2, 3), Graph(2, 3, parallel=True), Graph(1, 1), Graph(6, 2), Graph(4, 4)]


def dangling(circuit) -> list[tuple[str, str]]:
    """Edges that lie on no path from input to logits, by networkx."""
    edges = list(zip(circuit.edges["sender"], circuit.edges["receiver"].str.split("<").str[0], strict=True))
    network = nx.DiGraph(edges)
    network.add_nodes_from(["input", "logits"])
    after = nx.descendants(network, "input") | {"input"}
    before = nx.ancestors(network, "logits") | {"logits"}
    return [(sender, receiver) for sender, receiver in edges if sender not in after or receiver not in before]


def sizes(graph) -> list[int]:
    n = graph.n_edges
    return sorted({size for size in (1, 2, 3, 4, 5, 7, n // 10, n // 3, n // 2, n - 2, n - 1, n) if 1 <= size <= n})


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_random_circuit_has_exactly_the_asked_edges_and_none_dangling(graph, seed):
    for edges in sizes(graph):
        circuit = random_circuit(graph, edges, seed)
        assert circuit.n_edges == edges, f"asked for {edges}"
        assert dangling(circuit) == []
        assert not (circuit.kept & ~graph.exists).any()


@pytest.mark.parametrize("graph", GRAPHS[:3], ids=str)
def test_every_size_can_be_drawn(graph):
    for edges in range(1, graph.n_edges + 1):
        circuit = random_circuit(graph, edges, seed=edges)
        assert circuit.n_edges == edges and dangling(circuit) == []


def test_a_seed_draws_the_same_circuit_and_other_seeds_others():
    graph = Graph(4, 4)
    one = random_circuit(graph, 60, seed=3)
    assert random_circuit(graph, 60, seed=3).kept.equal(one.kept)
    assert one.provenance == {"method": "random", "seed": 3, "edges": 60}
    others = [random_circuit(graph, 60, seed) for seed in range(20)]
    assert len({other.digest for other in others}) == 20


def test_a_draw_does_not_touch_the_global_generator():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    random_circuit(Graph(2, 3), 10, seed=0)
    assert torch.random.get_rng_state().equal(before)


def test_draws_reach_every_edge():
    graph = Graph(2, 2)
    seen = sum(random_circuit(graph, graph.n_edges // 2, seed).kept.int() for seed in range(60))
    assert bool((seen[graph.exists] > 0).all())


@pytest.mark.parametrize("edges", [0, -5, 76])
def test_a_size_that_cannot_be_is_an_error_with_the_most(edges):
    with pytest.raises(SettingError, match=rf"edges={edges}: this graph has 75"):
        random_circuit(Graph(2, 3), edges, seed=0)


# Exact effects


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 9), n=3)


def cut_by_hooks(hf, tokens, edge) -> torch.Tensor:
    """Logits of a pristine Hugging Face Llama in which one receiver reads the residual stream without one sender.

    Covers what hooks can reach: the receivers `q` (each head's own), `m` and `logits`.
    """
    sender, receiver = edge.split("->")
    layers, size = hf.model.layers, hf.config.hidden_size // hf.config.num_attention_heads
    outputs, handles = {}, []

    def record(name, module, change=lambda output: output):
        handles.append(module.register_forward_hook(lambda _, inputs, output: outputs.update({name: change(output)})))

    record("input", hf.model.embed_tokens)
    for i, layer in enumerate(layers):
        record(f"m{i}", layer.mlp)

        def record_heads(module, inputs, i=i):
            for h in range(hf.config.num_attention_heads):
                part = slice(h * size, (h + 1) * size)
                outputs[f"a{i}.h{h}"] = inputs[0][..., part] @ module.weight[:, part].T

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(record_heads))

    def without(module, inputs):
        return (inputs[0] - outputs[sender],)

    if receiver == "logits":
        handles.append(hf.model.norm.register_forward_pre_hook(without))
    elif receiver.startswith("m"):
        handles.append(layers[int(receiver[1:])].post_attention_layernorm.register_forward_pre_hook(without))
    else:
        i, h = (int(part) for part in receiver[1:-3].split(".h"))
        norm, stream = layers[i].input_layernorm, {}
        handles.append(norm.register_forward_pre_hook(lambda _, inputs: stream.update(x=inputs[0])))

        def requery(module, inputs, output):
            part = slice(h * size, (h + 1) * size)
            x = stream["x"] - outputs[sender]
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
            output = output.clone()
            output[..., part] = (x @ module.weight.T)[..., part]
            return output

        handles.append(layers[i].self_attn.q_proj.register_forward_hook(requery))
    try:
        with torch.no_grad():
            return hf(torch.tensor([tokens])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def test_exact_effects_under_zero_are_those_of_two_runs_of_the_hugging_face_model(model, task):
    hf = tiny_hf("llama")
    scores = exact_effects(model, make_loss(model, task.val), make_ablation(model, task, "zero"))

    def nll(run) -> float:
        losses = []
        for fact in task.val.facts:
            answer, tokens = answer_ids(model, fact), unpadded_tokens(model, fact)
            logs = run(tokens)[-len(answer) :].log_softmax(-1)
            losses.append(-sum(float(row[token]) for row, token in zip(logs, answer, strict=True)) / len(answer))
        return sum(losses) / len(losses)

    with torch.no_grad():
        full = nll(lambda tokens: hf(torch.tensor([tokens])).logits[0])
    edges = [
        model.graph.edge_name(row, column)
        for row, column in model.graph.exists.nonzero().tolist()
        if model.graph.receiver_names[column][-2:] not in ("k>", "v>")  # hooks cannot give a query head its own keys
    ]
    assert len(edges) == 4 + 5 + 24 + 10 + 11
    for edge in edges:
        expected = nll(lambda tokens, edge=edge: cut_by_hooks(hf, tokens, edge)) - full
        assert float(scores[model.graph.edge_index(edge)]) == pytest.approx(expected, abs=2e-4), edge


@pytest.mark.parametrize("name", ["gpt2", "neox"])
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_exact_effects_are_the_loss_without_an_edge_minus_the_full_models(tiny, name, ablation):
    model = tiny(name)
    task = make_task(model, known_relation(model, 9), n=3)
    loss, cuts = make_loss(model, task.val, "kl"), make_ablation(model, task, ablation)
    scores = exact_effects(model, loss, cuts)
    assert scores.dtype == torch.float32 and not scores[~model.graph.exists].any()
    for row, column in model.graph.exists.nonzero().tolist()[::5]:
        kept = model.graph.exists.clone()
        kept[row, column] = False
        expected = float(loss(run_circuit(model, kept, task.val, cuts)))  # the full model's own KL is 0
        assert float(scores[row, column]) == pytest.approx(expected, abs=1e-5)


def test_exact_effects_report_every_edge_and_can_be_cancelled(model, task):
    calls = []
    loss, cuts = make_loss(model, task.val), make_ablation(model, task, "zero")
    exact_effects(model, loss, cuts, progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, model.graph.n_edges, "") for i in range(model.graph.n_edges)]

    def cancel(done, total, note):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exact_effects(model, loss, cuts, progress=cancel)
    assert model.graph.exists.equal(Graph(2, 4).exists)  # the graph is not the loop's scratch paper


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_random_inclusion_has_the_same_pi_and_is_connected_at_each_level(graph):
    size = min(30, graph.n_edges)
    pi = torch.arange(1, size + 1) / size
    for seed in range(5):
        found = random_inclusion(graph, pi, seed)
        assert found[found > 0].sort().values.tolist() == pi.tolist() and not (found > 0)[~graph.exists].any()
        for least in (0.9, 0.75, 0.5, 0.25, 0.0):
            lost = dangling(Circuit(graph, found > least)) if bool((found > least).any()) else []
            assert len(lost) <= 1 + (size == graph.n_edges)  # of a full graph the last nodes displace the direct edge
    assert size < 10 or not torch.equal(found, random_inclusion(graph, pi, 5))


def test_random_inclusion_of_what_is_sure_is_a_random_circuit():
    graph = Graph(4, 4)
    assert torch.equal(random_inclusion(graph, torch.ones(30), 5), random_circuit(graph, 30, seed=5).kept.float())
