"""What must hold before any result of a model is believed; run when it is loaded.

1. With every edge kept, the masked pass gives the Hugging Face model's own logits.
2. The residual stream before the unembedding is the sum of all senders and constants.
3. With every edge cut under resample ablation, it gives the logits of the corrupted run.

In float32 a difference is the largest absolute one, divided by the largest absolute value where that exceeds 1, and
may be 1e-4. In half precision it is the norm of the difference over the norm, and may be 5e-2: there two orders of
summation of one model differ by per cents, and single logits by more (SmolLM2-135M, random tokens: Hugging Face's
bfloat16 logits are 3.5% of the norm away from float32's, this package's 2.0%). Beyond its bound the model is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kcwb.errors import ModelError
from kcwb.models.forward import forward
from kcwb.models.network import Network

_LENGTH = 6


def tolerance(dtype: torch.dtype) -> float:
    """The bound on a self-check's difference at a floating-point type."""
    return 5e-2 if _half(dtype) else 1e-4


def _half(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2


@torch.no_grad()
def self_check(bridge: Any, network: Network, name: str) -> dict[str, float]:
    """Check that the graph computes what the model computes.

    Parameters
    ----------
    bridge
        The TransformerBridge that holds the model.
    network
        The functions of nodes to be checked.
    name
        The model's name, for the message.

    Returns
    -------
    dict
        The difference of each check.

    Raises
    ------
    ModelError
        If a difference exceeds `tolerance` (or is not a number); names model, check and difference.
    """
    graph = network.graph
    length = min(_LENGTH, network.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(network.d_vocab, (4, length), generator=generator).to(network.device)
    clean = tokens[:2]
    everything = graph.exists.to(network.device)

    own, stream = _run(bridge, tokens)
    plain = forward(network, tokens, senders=True)
    assert plain.senders is not None  # asked for in the line above
    constants = sum(network.constant(layer) for layer in range(graph.n_layers))
    masked = forward(network, clean, kept=everything)
    cut = forward(network, clean, kept=torch.zeros_like(everything), ablated=plain.senders[:, 2:].contiguous())
    differences = {
        "all edges kept = Hugging Face logits": _difference(network.logits(masked.residual), own[:2]),
        "residual stream = sum of senders": _difference(plain.senders.sum(0) + constants, stream),
        "all edges cut under resample = corrupted run": _difference(network.logits(cut.residual), own[2:]),
    }
    bound = tolerance(network.dtype)
    for check, difference in differences.items():
        if not difference <= bound:
            raise ModelError(
                f"{name} failed its self-check '{check}': difference {difference:.2g}, allowed {bound:.0e} in "
                f"{str(network.dtype).removeprefix('torch.')}. Results on this model would be wrong; please report its "
                "architecture and the versions of torch, transformers and transformer_lens."
            )
    return differences


def _run(bridge: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own logits, and the residual stream that its final norm reads."""
    seen: list[Tensor] = []
    handle = bridge.ln_final.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        return bridge.original_model(tokens).logits, seen[0]
    finally:
        handle.remove()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.to(ours.device)
    wrong = ours.float() - theirs.float()
    if _half(theirs.dtype):
        return float(wrong.norm() / theirs.float().norm())
    return float(wrong.abs().max()) / max(1.0, float(theirs.abs().max()))
