"""What is put back into an edited model, against hooks on the Hugging Face model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kcwb.errors import DataError
from kcwb.interventions.at_end import logits_with
from kcwb.models.loading import load_model
from kcwb.studies.editing_account.comparison import compare_edit
from kcwb.studies.editing_account.transport import (
    head_outputs_at_end,
    mlp_outputs,
    outputs_put_back,
    trace_blocks,
    transport,
)
from tests.editing.conftest import large_edit
from tests.tasks import prompt_ids
from tests.tiny import tiny_hf, tokenizer

HEADS = [f"a1.h{head}" for head in range(4)]


def hooked(model, tokens: torch.Tensor, heads: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    """Logits at END of the Hugging Face model when some heads' outputs at END are replaced, through o_proj's input."""
    module: Any = model.bridge.original_model
    handles = []
    for layer in {layer for layer, _ in heads}:
        chosen = {head: value for (at, head), value in heads.items() if at == layer}

        def hook(_module: Any, inputs: Any, output: torch.Tensor, layer=layer, chosen=chosen) -> torch.Tensor:
            weight = model.network.layers[layer].W_O
            output = output.clone()
            z = inputs[0].unflatten(-1, (weight.shape[0], -1))
            for head, value in chosen.items():
                output[:, -1] += value - z[:, -1, head] @ weight[head]
            return output

        handles.append(module.model.layers[layer].self_attn.o_proj.register_forward_hook(hook))
    try:
        return model.logits(tokens)[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def test_heads_put_back_is_the_hooked_model(model, task):
    prompt = task.val.select([0])
    tokens = prompt.tokens[:, : int(prompt.ends[0]) + 1]
    clean = head_outputs_at_end(model.network, tokens, trace_blocks(model.network, tokens))
    with large_edit(model, task.val.facts[0], "w61"):
        sets = torch.zeros(4, 2, 4, dtype=torch.bool)
        sets[1, 0, 1], sets[2, 0, :], sets[3, 1, 2], sets[3, 0, 3] = True, True, True, True
        logits = torch.cat(list(logits_with(model, prompt, clean[:, :, None], sets)))[:, 0]
        for one, row in zip(sets, logits, strict=True):
            heads = {(layer, head): clean[layer, head] for layer, head in one.nonzero().tolist()}
            assert torch.allclose(row, hooked(model, tokens, heads), atol=2e-4)
        assert torch.allclose(logits[0], logits[2], atol=1e-4)  # those heads are below the edited MLP
        assert not torch.allclose(logits[0], logits[3], atol=1e-3)


def test_outputs_put_back_everywhere_is_the_unedited_model(model, task):
    tokens = task.val.select([0]).tokens[:, : int(task.val.ends[0]) + 1]
    clean, unedited = trace_blocks(model.network, tokens), model.logits(tokens)
    before = mlp_outputs(model.network, clean, [0])
    with large_edit(model, task.val.facts[0], "w61") as edited:
        everywhere = torch.ones(tokens.shape[1], dtype=torch.bool)
        final = outputs_put_back(model.network, tokens, before, everywhere)
        assert torch.allclose(model.network.logits(final), unedited, atol=2e-4)
        nowhere = outputs_put_back(model.network, tokens, before, ~everywhere)
        assert torch.allclose(model.network.logits(nowhere), edited.logits(tokens), atol=2e-4)


def test_te_is_the_share_of_the_edits_effect(model, task, found):
    """From logits of the Hugging Face model, edited, unedited and patched."""
    fact, made = task.val.facts[0], found.edit
    tokens = task.val.select([0]).tokens[:, : int(task.val.ends[0]) + 1]
    old, new = (prompt_ids(model, name)[int(model.prepend_bos)] for name in (fact.object, "w61"))
    clean = head_outputs_at_end(model.network, tokens, trace_blocks(model.network, tokens))
    before = model.logits(tokens)[0, -1]
    with made:
        after = model.logits(tokens)[0, -1]
        patched = hooked(model, tokens, {at: clean[at] for at in [(0, 1), (1, 0), (1, 2)]})
    clean_ld, edit_ld, patched_ld = (float(row[new] - row[old]) for row in (before, after, patched))
    te = (edit_ld - patched_ld) / (edit_ld - clean_ld)
    assert found.transport.set_index("what").loc["mover heads", "TE"] == pytest.approx(te, abs=1e-3)
    assert found.summary["te_movers"] == pytest.approx(te, abs=1e-3)
    assert 1 / 26 <= found.p <= 1


def test_random_heads_are_all_others_of_the_layer_and_never_the_mover(model, task, found):
    """Of a layer of four heads a mover leaves three: their mean, and p, from the TE of each alone."""
    more = {"edges": 40, "draws": 25, "progress": False}
    alone = {name: compare_edit(model, found.edit, task, movers=[name], **more) for name in HEADS}
    te = {name: one.transport.set_index("what").loc["mover heads", "TE"] for name, one in alone.items()}
    for name, one in alone.items():
        others = [te[other] for other in HEADS if other != name]
        chance = one.transport.set_index("what").loc["random heads"]
        assert chance["TE"] == pytest.approx(np.mean(others), abs=1e-5)
        assert one.p == (1 + sum(other >= te[name] for other in others)) / 4


def test_without_other_heads_there_is_no_p_and_all_else_is_there(model, task, found):
    every = [f"a{layer}.h{head}" for layer in range(2) for head in range(4)]
    with pytest.warns(UserWarning, match="8 of the model's 8 heads"):
        whole = compare_edit(model, found.edit, task, movers=every, edges=40, draws=25, progress=False)
    table = whole.transport.set_index("what")["TE"]
    assert np.isnan(whole.p) and np.isnan(table["random heads"]) and table.drop("random heads").notna().all()


def test_an_edit_without_effect_has_no_te(model, task):
    """Once an undefined TE came with the smallest p that there is."""
    made, prompt = large_edit(model, task.val.facts[0], "w61"), task.val.select([0])
    clean = trace_blocks(model.network, prompt.tokens[:, : int(prompt.ends[0]) + 1])
    written = mlp_outputs(model.network, clean, made.layers)
    with pytest.raises(DataError, match="no effect"):
        transport(model, made, prompt, clean, clean, written, prompt.answers[0, [0, 0]], ["a0.h0"], 2, 0)


def test_all_that_the_edited_mlp_wrote_is_its_whole_effect_in_half_precision_too(task):
    """W + Δ is rounded there, so that W is not W + Δ - Δ: what the MLP wrote must be kept from before the edit."""
    model = load_model(tiny_hf("llama", seed=3).bfloat16(), tokenizer(), device="cpu")
    made = large_edit(model, task.val.facts[0], "w61")
    tokens = task.val.select([0]).tokens[:, : int(task.val.ends[0]) + 1]
    clean = trace_blocks(model.network, tokens)
    written = mlp_outputs(model.network, clean, made.layers)
    with made:
        everywhere = torch.ones(tokens.shape[1], dtype=torch.bool)
        final = outputs_put_back(model.network, tokens, written, everywhere)
    assert (final - clean[-1].after).abs().max() <= 0.02 * clean[-1].after.abs().max()
    kept = {
        layer: output - (clean[layer].hidden.float() @ made.deltas[layer]).bfloat16()
        for layer, output in written.items()
    }
    assert all((kept[layer] - written[layer]).abs().max() > 0.1 for layer in written)
