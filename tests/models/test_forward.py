"""The masked pass: against the slow obvious version, and against interventions through the bridge's hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kcwb.models.forward import forward
from kcwb.models.loading import Model
from tests.tiny import ARCHITECTURES, WORDS


def by_the_definition(model: Model, tokens: Tensor, kept: Tensor, ablated: Tensor | None) -> Tensor:
    """Each receiver's input is a sum over senders, taken one by one; each head is computed alone. Returns logits.

    Where a norm follows the attention, a head's share is its own result over the root mean square of all heads' sum,
    times the gain.
    """
    network, graph = model.network, model.graph
    outputs: list[Tensor] = [network.embed(tokens)]

    def read(column: int, layers_of_bias: int) -> Tensor:
        x = torch.zeros_like(outputs[0])
        for layer in range(layers_of_bias):
            x = x + network.constant(layer)
        for row in range(graph.senders_before(column)):
            if kept[row, column]:
                x = x + outputs[row]
            elif ablated is not None:
                x = x + ablated[row]
        return x

    for layer in range(graph.n_layers):
        start = graph.attention_receivers(layer).start
        heads = []
        for head in range(graph.n_heads):
            only = torch.tensor([head])
            q, k, v = (read(start + kind * graph.n_heads + head, layer)[None] for kind in range(3))
            q, k, v = network.queries(layer, q, only), network.keys(layer, k, only), network.values(layer, v, only)
            heads.append(network.head_results(layer, q, k, v, only)[0])
        if network.post_norms:
            norm = model.bridge.blocks[layer].ln1_post.original_component
            size = (torch.stack(heads).sum(0).pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
            heads = [head / size * (1 + norm.weight) for head in heads]
        mlp_before_heads = network.mlp(layer, read(graph.mlp_receiver(layer), layer)) if graph.parallel else None
        outputs += heads
        outputs.append(
            network.mlp(layer, read(graph.mlp_receiver(layer), layer + 1))
            if mlp_before_heads is None
            else mlp_before_heads
        )
    return network.logits(read(graph.n_receivers - 1, graph.n_layers))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ablation", ["zero", "any"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_any_mask_equals_the_definition(tiny, architecture: str, ablation: str, share: float) -> None:
    model = tiny(architecture)
    network = model.network
    tokens = torch.randint(len(WORDS), (2, 6))
    kept = network.graph.exists & (torch.rand(network.graph.exists.shape) < share)
    ablated = None if ablation == "zero" else torch.randn(network.graph.n_senders, 2, 6, network.d_model)
    ours = network.logits(forward(network, tokens, kept=kept, ablated=ablated).residual)
    torch.testing.assert_close(ours, by_the_definition(model, tokens, kept, ablated), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_edges_kept_is_the_model(tiny, architecture: str) -> None:
    model = tiny(architecture)
    tokens = torch.randint(len(WORDS), (2, 6))
    ours = model.network.logits(forward(model.network, tokens, kept=model.graph.exists).residual)
    assert (ours - model.logits(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_edges_cut_under_resample_is_the_corrupted_run(tiny, architecture: str) -> None:
    model = tiny(architecture)
    tokens, corrupted = torch.randint(len(WORDS), (2, 2, 6))
    senders = forward(model.network, corrupted, senders=True).senders
    cut = forward(model.network, tokens, kept=torch.zeros_like(model.graph.exists), ablated=senders).residual
    assert (model.network.logits(cut) - model.logits(corrupted)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", "llama", "mistral-window", "qwen2", "qwen3", "neox", "neox-sequential", "gemma", "gemma2", "gemma3"],
)
def test_cutting_an_edge_equals_the_same_intervention_through_the_bridge(tiny, architecture: str) -> None:
    model = tiny(architecture)
    graph, bridge = model.graph, model.bridge
    tokens = torch.randint(4, len(WORDS), (1, 6))
    clean = forward(model.network, tokens, senders=True).senders
    assert clean is not None
    chosen = graph.exists.nonzero()[torch.randperm(graph.n_edges)[:30]].tolist()
    # And every edge into the logits and the last MLP, so that no kind of receiver goes without.
    chosen += [[row, column] for row, column in graph.exists.nonzero().tolist() if column >= graph.n_receivers - 2]
    split = bridge.cfg.use_split_qkv_input
    bridge.set_use_split_qkv_input(True)
    try:
        for row, column in chosen:
            kept = graph.exists.clone()
            kept[row, same_hook(model, column)] = False
            ours = model.network.logits(forward(model.network, tokens, kept=kept).residual)
            name, subtract = bridge_cut(model, column, clean[row])
            theirs = bridge.run_with_hooks(tokens, fwd_hooks=[(name, subtract)], prepend_bos=False)
            difference = (ours - theirs).abs().max()
            assert difference < 1e-4, (graph.edge_name(row, column), difference)
    finally:
        bridge.set_use_split_qkv_input(split)


def same_hook(model: Model, column: int) -> list[int]:
    """The receivers that read at the same place of the bridge: under GQA, it has one key and value input per group."""
    graph = model.graph
    name, size = graph.receiver_names[column], graph.n_heads // model.network.n_kv_heads
    if not name.endswith(("<k>", "<v>")):
        return [column]
    first = column - graph.node(name[:-3]).head % size
    return list(range(first, first + size))


def bridge_cut(model: Model, column: int, output: Tensor) -> tuple[str, Callable[..., Tensor]]:
    """The bridge's hook at which a receiver reads, and an edit that takes a sender's output away from it."""
    graph = model.graph
    name = graph.receiver_names[column]
    if name == "logits":
        return "ln_final.hook_in", lambda x, hook: x - output
    place = graph.node(name.partition("<")[0])
    if place.kind == "mlp":
        return f"blocks.{place.layer}.ln2.hook_in", lambda x, hook: x - output

    def one_head(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[:, :, place.head * x.shape[2] // graph.n_heads] -= output
        return x

    return f"blocks.{place.layer}.attn.hook_{name[-2]}_input", one_head


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "neox", "gemma2"])
def test_senders_sum_to_the_residual_stream(tiny, architecture: str) -> None:
    network = tiny(architecture).network
    run = forward(network, torch.randint(len(WORDS), (2, 5)), senders=True)
    assert run.senders is not None
    total = run.senders.sum(0)
    for layer in range(network.graph.n_layers):
        total = total + network.constant(layer)
    torch.testing.assert_close(total, run.residual)


def test_recorded_receivers_are_what_each_node_read(tiny) -> None:
    network = tiny("llama").network
    run = forward(network, torch.randint(len(WORDS), (2, 5)), senders=True, receivers=True)
    assert run.senders is not None and run.receivers is not None
    for layer, (x, y) in enumerate(run.receivers):
        before = run.senders[: network.graph.head_senders(layer).start].sum(0)
        torch.testing.assert_close(x, before.expand_as(x))
        torch.testing.assert_close(network.mlp(layer, y), run.senders[network.graph.mlp_sender(layer)])
