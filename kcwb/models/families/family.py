"""What is particular about a family of models, as one record, and the registry of these records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kcwb.errors import ModelError, SettingError

#: A rotary embedding: (x, positions[, kind of layer]) -> cosines and sines, `[1, T, r]` each.
Rotary = Callable[..., tuple[Tensor, Tensor]]


def usual_scale(config: Any, layer: int, d_head: int) -> float:
    """One over the root of a head's width, or of what the configuration names in its place."""
    return getattr(config, "query_pre_attn_scalar", d_head) ** -0.5


def usual_window(config: Any, layer: int) -> int | None:
    """The configuration's sliding window, in the layers that it says slide (all, if it says nothing)."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds and kinds[layer] != "sliding_attention" else getattr(config, "sliding_window", None)


def usual_rotary(bridge: Any) -> Rotary | None:
    """Hugging Face's own module, where there is one."""
    return bridge.rotary_emb.original_component if hasattr(bridge, "rotary_emb") else None


@dataclass(frozen=True)
class Family:
    """The models of one Hugging Face `model_type`: what works on them, and in what they differ from Llama.

    What a `transformer_lens` bridge shows by itself (weights, biases, which norms there are, grouped keys and values,
    parallel blocks) is read from it and stands nowhere here.

    Attributes
    ----------
    name
        What people call it.
    examples
        Names on the Hugging Face hub.
    edges
        Circuits of edges: ablated runs, attribution, ACDC, completeness. False for encoders.
    nodes
        The effect of ablating heads and MLPs.
    roles
        Head roles by what each head writes towards the answer.
    editing
        Editing an MLP's down-projection.
    checked
        What the tests hold against Hugging Face's own logits, the slow definition of a cut and the slow ACDC. Beside
        that, every model is checked when it is loaded (`kcwb.models.selfcheck`).
    note
        What a user has to know; empty if nothing.
    adapter
        The Hugging Face class as which `transformer_lens` wraps the models; empty for their own.
    uncovered
        Of a configuration: the option in it that is not covered, in words, or None.
    scale
        Of a configuration, a layer and a head's width: what the layer's attention scores are multiplied by.
    window
        Of a configuration and a layer: the sliding window of the layer's attention, or None.
    rope
        Of a configuration and a layer: the kind of rotary table, where layers differ.
    rotary
        Of a bridge: the rotary embedding, or None.
    interleaved
        Whether a channel turns with its neighbour, instead of the one half the width away.
    position_offset
        Of a configuration: the rows of the table of positions that come before position 0.
    activation
        The settings of a configuration that may name the MLP's activation; the first that does counts.
    float32_scores
        Whether Hugging Face computes attention scores in float32, whatever the precision of the weights.
    gain
        A norm's gain from the weight that is stored.
    """

    name: str
    examples: tuple[str, ...]
    edges: bool = True
    nodes: bool = True
    roles: bool = True
    editing: bool = True
    checked: str = "tiny random model"
    note: str = ""
    adapter: str = ""
    uncovered: Callable[[Any], str | None] = lambda config: None
    scale: Callable[[Any, int, int], float] = usual_scale
    window: Callable[[Any, int], int | None] = usual_window
    rope: Callable[[Any, int], str | None] = lambda config, layer: None
    rotary: Callable[[Any], Rotary | None] = usual_rotary
    interleaved: bool = False
    position_offset: Callable[[Any], int] = lambda config: 0
    activation: tuple[str, ...] = ("hidden_act", "activation_function")
    float32_scores: bool = False
    gain: Callable[[Tensor], Tensor] = lambda weight: weight


#: Hugging Face `model_type` -> the family. Everything else is refused.
FAMILIES: dict[str, Family] = {}
#: Encoders: `kcwb.models.encoder.load_encoder`, not `load_model`.
ENCODERS: dict[str, Family] = {}


def register(model_type: str, family: Family) -> None:
    """Cover a family from now on: what `load_model`, or for encoders `load_encoder`, does with its `model_type`.

    SettingError if another family has that `model_type`.
    """
    before = (FAMILIES | ENCODERS).get(model_type, family)
    if before is not family:
        raise SettingError(f"There is a family of {model_type!r:.60} already: {before.name}.")
    (FAMILIES if family.edges else ENCODERS)[model_type] = family


def covered_family(config: Any) -> str:
    """The `model_type` of a Hugging Face configuration; ModelError if it, or an option of it, is not covered."""
    kind = config.model_type
    if kind in ENCODERS:
        raise ModelError(
            f"{ENCODERS[kind].name} is an encoder with a norm after each sum: it has no residual stream that nodes "
            "add to, so edges, and circuits of them, are not defined. Ablate its nodes: load_encoder, "
            "make_masked_task, ablate_encoder."
        )
    problem = FAMILIES[kind].uncovered(config) if kind in FAMILIES else f"architecture {kind!r}"
    if problem is not None:
        raise ModelError(
            f"{problem} is not covered. Covered: {_names(FAMILIES)}. Load a model of one of these families."
        )
    return kind


def covered_encoder(config: Any) -> str:
    """The same for encoders."""
    kind = config.model_type
    if kind not in ENCODERS:
        raise ModelError(f"{kind!r} is no encoder that is covered. Covered: {_names(ENCODERS)}. Decoders: load_model.")
    return kind


def _names(families: dict[str, Family]) -> str:
    return ", ".join(family.name for family in families.values())
