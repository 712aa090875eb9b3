"""One block, whole or in part: the model's own passes, and each other."""

from __future__ import annotations

import pytest
import torch

from kcwb.interventions.block import run_block
from kcwb.models.forward import forward
from tests import tiny as zoo

TOKENS = torch.tensor([[5, 9, 12, 7, 30, 41, 8], [6, 14, 22, 9, 31, 40, 17]])


@pytest.fixture(params=zoo.ARCHITECTURES)
def network(request, tiny):
    return tiny(request.param).network


def test_all_blocks_one_after_another_are_the_model(network) -> None:
    x = network.embed(TOKENS)
    for layer in range(network.graph.n_layers):
        x = run_block(network, layer, x).after
    torch.testing.assert_close(x, forward(network, TOKENS).residual, rtol=1e-5, atol=1e-4)


def test_some_positions_against_kept_keys_and_values_give_what_the_whole_block_gives(network) -> None:
    x = network.embed(TOKENS)
    whole = run_block(network, 1, x)
    rows, at = torch.arange(2)[:, None], torch.tensor([[2, 3], [4, 5]])
    keys, values = whole.keys.clone(), whole.values.clone()
    keys[:, rows, at] = values[:, rows, at] = 9.0  # they are to be replaced
    part = run_block(network, 1, x[rows, at], at, (keys, values))
    torch.testing.assert_close(part.after, whole.after[rows, at], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.keys, whole.keys, rtol=1e-5, atol=1e-5)

    candidates = torch.stack([x, x.flip(0), 2 * x])[:, rows, at]
    many = run_block(network, 1, candidates, at, (keys[:, None], values[:, None])).after
    for one, stream in zip(many, candidates, strict=True):
        alone = run_block(network, 1, stream, at, (keys, values)).after
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)


def test_positions_behind_the_kept_ones_go_on_where_these_end(network) -> None:
    x = network.embed(TOKENS)
    first = run_block(network, 1, x[:, :4])
    then = run_block(network, 1, x[:, 4:], torch.arange(4, 7), (first.keys, first.values))
    whole = run_block(network, 1, x)
    torch.testing.assert_close(torch.cat([first.after, then.after], 1), whole.after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(then.values, whole.values, rtol=1e-5, atol=1e-5)


def test_without_its_heads_a_block_is_its_bias_and_its_mlp(network) -> None:
    x = network.embed(TOKENS)
    middle = x + network.constant(1)
    expected = middle + network.mlp(1, x if network.graph.parallel else middle)
    found = run_block(network, 1, x, heads=torch.zeros_like).after
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert float((found - run_block(network, 1, x).after).abs().max()) > 1e-3
