"""OPT: learned positions, whose table starts two rows later."""

from __future__ import annotations

from typing import Any

from kcwb.models.families.family import Family, register


def _uncovered(config: Any) -> str | None:
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        return "OPT with post-layer-norm or projected embeddings (opt-350m)"
    return "OPT without a final layer norm" if config._remove_final_layer_norm else None


_EXAMPLES = ("facebook/opt-125m", "facebook/opt-1.3b")
register("opt", Family("OPT", _EXAMPLES, uncovered=_uncovered, position_offset=lambda config: 2))
