"""What a model writes after a text: by its own logits alone, whatever generation settings came with its files."""

from __future__ import annotations

import copy
import hashlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.models.memory import in_pieces
from kcwb.tasks.tokens import padded, text_tokens

_TOGETHER = 32  # texts that are continued at once


def continuations(model: Model, texts: Sequence[str], new: int, stops: Sequence[str] = ()) -> list[str]:
    """The likeliest continuation of each text, up to `new` tokens, or to the first that has one of `stops` in it.

    Shorter texts are padded on the left, behind a mask: each continuation is that of its text alone.

    Raises
    ------
    DataError
        If a text fills the context, or has no token.
    """
    rows = [text_tokens(model, text) for text in texts]
    room = model.network.n_ctx - new
    alone = [[i] for i, row in enumerate(rows) if len(row) > room]  # they end with the context, each at its own place
    found: dict[int, str] = {}
    for group in ([i for i, row in enumerate(rows) if len(row) <= room], *alone):

        def write(part: slice, group: list[int] = group) -> list[str]:
            some = [rows[i] for i in group[part]]
            ids = padded([row[::-1] for row in some], model.device).flip(1)
            mask = padded([[1] * len(row) for row in some], model.device).flip(1)
            how: dict[str, Any] = {"do_sample": False, "attention_mask": mask}
            if stops:
                how["stopping_criteria"] = [partial(_stopped, model, tuple(stops))]
            new_ids = continued(model, ids, new, **how)[:, ids.shape[1] :]
            return model.tokenizer.batch_decode(new_ids, skip_special_tokens=True)

        written = itertools.chain(*in_pieces(len(group), _TOGETHER, write, "texts"))
        found.update(zip(group, written, strict=True))
    return [found[i] for i in range(len(rows))]


def _stopped(model: Model, stops: tuple[str, ...], ids: Int[Tensor, "N S"], _scores: Any) -> Tensor:
    """Which rows have come to a stop, as Hugging Face asks after each token."""
    last = model.tokenizer.batch_decode(ids[:, -1:])
    return torch.tensor([any(stop in text for stop in stops) for text in last], device=ids.device)


@torch.no_grad()
def continued(model: Model, tokens: Int[Tensor, "N T"], new: int, **how: Any) -> Int[Tensor, "N S"]:
    """The tokens and up to `new` more, fewer where the context or the text ends; `how` as Hugging Face has it.

    Files of models bring settings, such as a penalty on repetition, that Hugging Face adds to whatever is asked for.

    Raises
    ------
    DataError
        If the text fills the context.
    """
    room = model.network.n_ctx - tokens.shape[1]
    if room < 1:
        raise DataError(
            f"A text of {tokens.shape[1]} tokens cannot be continued: {model.name} reads {model.network.n_ctx}."
        )
    own: Any = model.bridge.original_model
    module = copy.copy(own)  # the same weights; only what is set on the copy is its own
    module.generation_config = type(own.generation_config)(
        eos_token_id=own.generation_config.eos_token_id, pad_token_id=model.tokenizer.pad_token_id
    )
    how.setdefault("attention_mask", torch.ones_like(tokens))
    return module.generate(tokens, max_new_tokens=min(new, room), **how)


def writer(model: Model) -> str:
    """What a model's texts depend on beside its weights: the tokenizer's digest, and whether BOS comes first."""
    tokenizer: Any = model.tokenizer
    if tokenizer not in _TOKENIZERS:
        _TOKENIZERS[tokenizer] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return f"{_TOKENIZERS[tokenizer]} {model.prepend_bos}"


@contextmanager
def texts_as_now(model: Model) -> Iterator[None]:
    """Within, an editor's prefixes and covariances stay those of the weights as they are now, whatever edits go in.

    So it is published for edits one after another, and texts are not made anew for each of them.
    """
    place = model.network.W_E.data_ptr()
    before = _AS_OF.get(place)
    _AS_OF[place] = before or (model.digest, {})
    try:
        yield
    finally:
        if before is None:
            del _AS_OF[place]


def text_digest(model: Model) -> str:
    """The digest of the weights that an editor's texts are made with: the model's, but within `texts_as_now`."""
    return _AS_OF.get(model.network.W_E.data_ptr(), (model.digest, {}))[0]


def text_store(model: Model) -> dict[Any, Any]:
    """Where what is made of texts is kept until the end of `texts_as_now`; elsewhere a dict that nobody keeps."""
    return _AS_OF.get(model.network.W_E.data_ptr(), ("", {}))[1]


#: Where weights are in memory -> the digest of the weights that texts are made with, and what was made.
_AS_OF: dict[int, tuple[str, dict[Any, Any]]] = {}
_TOKENIZERS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
