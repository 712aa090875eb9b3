"""An ablation from outside the package: this file, and the line `@register_ablation`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, register_ablation, sender_outputs
from kcwb.models.network import Network
from kcwb.settings import NotNegative, Seed
from kcwb.tasks.prompts import Prompts


@register_ablation
@dataclass(frozen=True)
class GaussianNoise(AblationKind):
    """The sender's output on the prompt itself plus noise, drawn anew for each prompt from its tokens and the seed."""

    name = "gaussian-noise"
    scale: NotNegative = 1.0
    seed: Seed = 0

    def values(self, network: Network, prompts: Prompts, fitted: Any) -> Float[Tensor, "S N T D"]:
        """The outputs, and a draw for each position: those that come first do not depend on the padding behind them."""
        outputs = sender_outputs(network, prompts.tokens)
        senders, _, width, d_model = outputs.shape
        draws = []
        for tokens, length in zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True):
            digest = hashlib.sha256(repr((self.seed, tokens[:length])).encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest[:8]))
            draws.append(generator.standard_normal((width, senders, d_model)).transpose(1, 0, 2))
        noise = torch.from_numpy(np.stack(draws, 1)).to(outputs)
        return outputs + self.scale * noise
