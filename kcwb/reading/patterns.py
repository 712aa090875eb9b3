"""How heads attend on any text: previous-token, duplicate-token and induction heads."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.models.loading import Model
from kcwb.reading.trajectories import layer_streams

PATTERNS = ("previous_token", "duplicate_token", "induction")
_SEQUENCES, _PERIOD = 4, 16


def pattern_scores(model: Model, seed: int = 0) -> dict[str, Float[Tensor, "L H"]]:
    """How much every head attends as a previous-token, duplicate-token or induction head does.

    Random tokens, repeated once (after BOS, if the model's prompts have one), so that each token of the second half
    has a duplicate, and a token that followed it. The detection patterns and the score ("mul": the share of all
    attention that lies on the pattern) are those of `transformer_lens.head_detector`; with half of the tokens having
    no earlier duplicate, about a half is the most that the last two can reach.
    """
    return score_patterns(model, repeated_tokens(model, seed))


@torch.no_grad()
def score_patterns(model: Model, tokens: Int[Tensor, "n T"]) -> dict[str, Float[Tensor, "L H"]]:
    """The same on any tokens; the mean over rows."""
    from transformer_lens import head_detector as detector

    network = model.network
    expected = {
        "previous_token": detector.get_previous_token_head_detection_pattern,
        "duplicate_token": detector.get_duplicate_token_head_detection_pattern,
        "induction": detector.get_induction_head_detection_pattern,
    }
    wanted = {name: [make(row[None].cpu()) for row in tokens] for name, make in expected.items()}
    scores = {name: torch.zeros(model.graph.n_layers, model.graph.n_heads) for name in PATTERNS}
    for layer, x in enumerate(layer_streams(network, tokens)[:-1]):
        pattern = network.pattern(layer, network.queries(layer, x[None]), network.keys(layer, x[None])).float().cpu()
        for name, head in itertools.product(PATTERNS, range(model.graph.n_heads)):
            each = [
                detector.compute_head_attention_similarity_score(
                    pattern[head, i], one, exclude_bos=False, exclude_current_token=False, error_measure="mul"
                )
                for i, one in enumerate(wanted[name])
            ]
            scores[name][layer, head] = float(np.mean(each))
    return scores


def repeated_tokens(model: Model, seed: int = 0) -> Int[Tensor, "n T"]:
    """Random tokens of the vocabulary, each row repeated once, with the model's BOS if its prompts have one."""
    special = set(model.tokenizer.all_special_ids)
    usual = np.array([token for token in range(model.network.d_vocab) if token not in special])
    period = min(_PERIOD, (model.network.n_ctx - 1) // 2, len(usual))
    draw = np.random.default_rng(seed)
    half = torch.from_numpy(np.stack([draw.choice(usual, period, replace=False) for _ in range(_SEQUENCES)]))
    bos = torch.tensor(model.tokenizer.bos_token_id if model.prepend_bos else []).long().reshape(1, -1)
    return torch.cat([bos.expand(_SEQUENCES, -1), half, half], dim=1).to(model.device)
