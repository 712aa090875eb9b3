"""BERT-like encoders: whole nodes can be ablated, edges cannot.

A block of BERT norms each sum:

    y = norm(x + sum_h a_h + b_O),    x' = norm(y + m)

What a node adds is rescaled and recentred at every later norm together with all else, so no later node reads a sum of
what earlier ones wrote, and an edge between two nodes has nothing to cut. A node as a whole can still be replaced where
it is added: a head by its values mixed by attention (before W_O, which is linear), an MLP by its output.

Nodes have the names that they have elsewhere, `a<layer>.h<head>` and `m<layer>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.errors import ModelError, choose
from kcwb.models.digest import weights_digest
from kcwb.models.families import ENCODERS, covered_encoder
from kcwb.models.graph import Graph
from kcwb.models.loading import known_device, known_dtype
from kcwb.models.reading import named_or_given, read_pretrained, require_fast, require_fit, running
from kcwb.verbs import verb

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Encoder:
    """A loaded encoder with a masked-token head; made by `load_encoder`.

    Attributes
    ----------
    module, tokenizer
        The Hugging Face model and its tokenizer.
    name, digest
        What it was loaded by, and the SHA-256 of its weights.
    device, dtype
        Where and in what precision it is.
    """

    module: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    device: torch.device
    dtype: torch.dtype

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.module.config.num_hidden_layers

    @property
    def n_heads(self) -> int:
        """The number of heads of a block."""
        return self.module.config.num_attention_heads

    @property
    def n_ctx(self) -> int:
        """How many tokens it reads."""
        config = self.module.config
        return config.max_position_embeddings - ENCODERS[config.model_type].position_offset(config)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of its heads and MLPs, layer by layer."""
        return Graph(self.n_layers, self.n_heads).sender_names[1:]

    def __repr__(self) -> str:
        """One line: name, size, device and precision."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"Encoder({self.name!r}: {self.n_layers} layers x {self.n_heads} heads, {kind} on {self.device})"


@verb
def load_encoder(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> Encoder:
    """Load a BERT-like encoder with its masked-token head.

    Parameters
    ----------
    model
        A local folder, a name on the Hugging Face hub such as `"google-bert/bert-base-uncased"`, or a model in memory
        (set to evaluation mode, without parameter gradients).
    tokenizer
        The tokenizer of a model in memory; otherwise the model's own.
    device, dtype
        As in `load_model`.

    Raises
    ------
    ModelError
        If the model cannot be found, is no encoder that is covered, or its tokenizer has no mask.
    SettingError
        If device or precision are not known, or a tokenizer is missing or superfluous.
    """
    place, precision = known_device(device), None if dtype is None else known_dtype(dtype)
    read = partial(read_pretrained, dtype=precision or torch.float32, covered=covered_encoder, masked=True)
    module, words, name = named_or_given(model, tokenizer, read, "load_encoder", revision, precision)
    _require_masked(module)
    require_fast(words, name)
    if words.mask_token_id is None:
        raise ModelError(f"The tokenizer of {name} has no mask token, which a masked-token task asks at.")
    require_fit(words, module.get_input_embeddings().weight.shape[0], name, words.all_special_ids)
    module = module.to(place).eval().requires_grad_(False)
    with running(module, name):
        module(input_ids=torch.tensor([[words.mask_token_id]], device=place))
    return Encoder(module, words, name, weights_digest(module), place, module.dtype)


def _require_masked(module: Any) -> None:
    """Raise ModelError for what is no encoder that is covered, or not set up as one with a masked-token head."""
    name, config = ENCODERS[covered_encoder(module.config)].name, module.config
    if config.is_decoder or config.add_cross_attention or not hasattr(module, "get_output_embeddings"):
        raise ModelError(f"This {name} is set up as a decoder. Load it as a masked language model.")
    if module.get_output_embeddings() is None:
        raise ModelError(f"{type(module).__name__} has no masked-token head. Load it as a masked language model.")


@torch.no_grad()
def run_encoder(
    encoder: Encoder,
    tokens: Int[Tensor, "N T"],
    real: Bool[Tensor, "N T"],
    replaced: Mapping[str, Float[Tensor, "N T X"] | float] | None = None,
) -> Float[Tensor, "N T V"]:
    """Logits of masked-token prompts, with what some nodes compute replaced.

    Prompts are padded on the right; `real` says which tokens are no padding. `replaced` is node -> what it computes
    instead (in the terms of `record_nodes`), or 0.0; SettingError if a node is not the model's.
    """
    replaced = replaced or {}
    for name in replaced:
        choose("The node", name, encoder.nodes)

    def replace(node: str, value: Tensor) -> Tensor:
        new = replaced.get(node)
        if new is None:
            return value
        return new.to(value) if isinstance(new, Tensor) else torch.full_like(value, new)

    with _at_nodes(encoder, replace):
        return encoder.module(input_ids=tokens, attention_mask=real.long()).logits


@torch.no_grad()
def record_nodes(
    encoder: Encoder, tokens: Int[Tensor, "N T"], real: Bool[Tensor, "N T"]
) -> dict[str, Float[Tensor, "N T X"]]:
    """What every node computes: a head its mixed values `[N, T, K]` (before W_O), an MLP its output `[N, T, D]`."""
    found: dict[str, Tensor] = {}

    def record(node: str, value: Tensor) -> Tensor:
        found[node] = value.clone()
        return value

    with _at_nodes(encoder, record):
        encoder.module(input_ids=tokens, attention_mask=real.long())
    return found


@contextmanager
def _at_nodes(encoder: Encoder, visit: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Let `visit(node, value)` see and replace what nodes compute."""

    def heads(layer: int) -> Callable[..., tuple[Tensor]]:
        def hook(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            parts = inputs[0].chunk(encoder.n_heads, dim=-1)
            return (torch.cat([visit(f"a{layer}.h{head}", part) for head, part in enumerate(parts)], dim=-1),)

        return hook

    def mlp(layer: int) -> Callable[..., Tensor]:
        return lambda _, inputs, output: visit(f"m{layer}", output)

    with ExitStack() as stack:
        for index, layer in enumerate(encoder.module.base_model.encoder.layer):
            stack.callback(layer.attention.output.dense.register_forward_pre_hook(heads(index)).remove)
            stack.callback(layer.output.dense.register_forward_hook(mlp(index)).remove)
        yield
