"""A name or a folder becomes a Hugging Face module and its tokenizer, whole, or an error that says what is missing.

Nothing that a folder brings is run: weights and settings are read, Python is not (`trust_remote_code=False`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from kcwb.errors import ModelError
from kcwb.models.builtin import BUILTIN_NAME, builtin_folder

#: Tensors of published files that are no weights of the model: masks that older versions kept, and the heads of BERT
#: that predict no masked token. What Hugging Face itself declares to be so comes on top.
_SURPLUS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|(^|\.)pooler\.|^cls\.seq_relationship\.|rotary_emb\.inv_freq$"
)


def read_pretrained(
    name: str,
    dtype: torch.dtype,
    masked: bool = False,
    device_map: str | Mapping[str, str | int] | None = None,
) -> tuple[Any, Any]:
    """The Hugging Face module and tokenizer of a name; only a name of the hub may reach the network.

    `masked` reads a masked language model; otherwise the model is a causal one. `device_map` says where its parts go.

    Raises
    ------
    ModelError
        If it cannot be found or read, or its weights are not those that its configuration describes.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
    from transformers.utils import logging

    local = name == BUILTIN_NAME or Path(name).is_dir()
    source = builtin_folder() if name == BUILTIN_NAME else name
    shown = logging.is_progress_bar_enabled()
    if local:
        logging.disable_progress_bar()
    try:
        kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        safe: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
        more = {} if device_map is None else {"device_map": device_map}
        module, found = kind.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **safe, **more
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    except Exception as error:  # a cut or foreign file fails in many ways
        reason = f"{' '.join(str(error).split()):.300}"
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own, which kcwb never runs."
        raise ModelError(
            f"The model {name!r} cannot be loaded: {reason} A name is {BUILTIN_NAME!r} (built in, works offline), the "
            "folder of a causal language model, or a name on the Hugging Face hub (needs the network, or its cache)."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    _require_whole(found, name)
    return module, tokenizer


def _require_whole(found: Mapping[str, Collection[Any]], name: str) -> None:
    """Raise ModelError if the files of a model lack weights, or hold others than its configuration describes."""
    shapes = {key: f": {tuple(stored)} instead of {tuple(wanted)}" for key, stored, wanted in found["mismatched_keys"]}
    surplus = [key for key in found["unexpected_keys"] if not _SURPLUS.search(key)]
    faults = {
        "missing": dict.fromkeys(found["missing_keys"], ""),
        "of another shape": shapes,
        "not the model's": dict.fromkeys(surplus, ""),
    }
    words = [
        f"{len(keys)} {fault} ({first}{keys[first]}{', ...' if len(keys) > 1 else ''})"
        for fault, keys in faults.items()
        for first in sorted(keys)[:1]
    ]
    if words or found["error_msgs"]:
        reason = ", ".join(words) or " ".join(map(str, found["error_msgs"]))[:300]
        raise ModelError(
            f"The weights of {name!r} are not those that its config.json describes: {reason}. Missing weights would be "
            "filled at random. Get the files again, or correct config.json."
        )


def require_fast(tokenizer: Any, name: str) -> None:
    """Raise ModelError if a tokenizer reports no character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer of {name} reports no character offsets, which are needed to find a subject's tokens. "
            "Load the model with its fast tokenizer (tokenizer.json)."
        )
