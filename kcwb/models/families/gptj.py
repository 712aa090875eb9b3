"""GPT-J: parallel blocks that read through one norm; a rotation of neighbouring channels, from a table of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kcwb.models.families.family import Family, Rotary, register


def _rotary(bridge: Any) -> Rotary:
    """From the table of sines and then cosines that each attention keeps."""
    table = bridge.blocks[0].attn.original_component.embed_positions

    def look_up(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        sin, cos = table.to(x.device, x.dtype)[positions].repeat_interleave(2, dim=-1).chunk(2, dim=-1)
        return cos, sin

    return look_up


register("gptj", Family("GPT-J", ("EleutherAI/gpt-j-6b",), rotary=_rotary, interleaved=True, float32_scores=True))
