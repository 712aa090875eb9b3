"""Heads that attend as previous-token, duplicate-token and induction heads do are seen as such."""

from __future__ import annotations

import torch
from transformer_lens.head_detector import detect_head

from kcwb.models.loading import load_model
from kcwb.reading.patterns import pattern_scores, repeated_tokens, score_patterns
from tests.handmade import induction
from tests.tiny import tiny_hf, tokenizer


def test_hand_written_previous_token_and_induction_heads_score_highest():
    model = induction().model
    scores = pattern_scores(model)
    assert divmod(int(scores["previous_token"].argmax()), 5) == (0, 1)
    assert scores["previous_token"][0, 1] > 0.8
    best = scores["induction"].flatten().topk(2).indices.tolist()
    assert sorted(best) == [5 + 0, 5 + 3]  # the head, and the decoy that attends as it does
    assert scores["induction"][1, 3] > 0.3 > 0.2 > scores["induction"][0].max()


def test_pattern_scores_equal_transformer_lenss(tiny):
    model, text = tiny("llama"), "w1 w2 w3 w1 w2 w3 w9 w1"
    scores = score_patterns(model, model.bridge.to_tokens(text))
    for name, values in scores.items():
        torch.testing.assert_close(values, detect_head(model.bridge, text, f"{name}_head"), atol=1e-5, rtol=1e-4)


def test_random_text_repeats_once_and_starts_with_the_models_bos(tiny):
    tokens = repeated_tokens(tiny("gpt2"))
    assert tokens.shape == (4, 32) and torch.equal(tokens[:, :16], tokens[:, 16:])
    assert not set(tokens.flatten().tolist()) & {0, 1, 2, 3}  # no special token
    with_bos = repeated_tokens(load_model(tiny_hf("gpt2"), tokenizer(), device="cpu", prepend_bos=True))
    assert (with_bos[:, 0] == 1).all() and torch.equal(with_bos[:, 1:], tokens)
