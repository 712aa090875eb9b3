"""Checkpoints of a search: whole or absent, of this search or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from kcwb.errors import CircuitError
from kcwb.files import atomic_path

if TYPE_CHECKING:
    from kcwb.discovery.acdc import Search

_COUNTERS = ("visited", "evaluations", "near_ties", "surprises", "seen", "value")
#: Raised with every change of the search that may change its decisions.
_VERSION = 3


def checkpoint_folder() -> Path:
    """Where checkpoints are kept that no path is given for: in the user's cache (`KCWB_CACHE`)."""
    root = os.environ.get("KCWB_CACHE")
    return (Path(root) if root else user_cache_path("kcwb")) / "checkpoints"


def fingerprint(search: Search) -> str:
    """SHA-256 of all that determines a search: weights, prompts, metric, ablation, tau, and the edges it began with."""
    prompts = search.loss.prompts
    settings = {
        "version": _VERSION,
        "weights": search.model.digest,
        "dtype": str(search.model.dtype),
        "graph": dataclasses.asdict(search.model.graph),
        "metric": search.loss.metric,
        "ablation": [search.ablation.kind, search.ablation.reference],
        "tau": search.tau,
        "absolute": search.absolute,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (prompts.tokens, prompts.lengths, prompts.answers, prompts.answer_mask, prompts.foils):
        _update(digest, tensor)
    if search.ablation.kind == "resample":
        _update(digest, prompts.corrupted)
    _update(digest, search.start)
    return digest.hexdigest()


def write_checkpoint(path: Path, search: Search, identity: str) -> None:
    """Write the state of a search between two receivers; a kill leaves the previous file."""
    from safetensors.torch import save_file

    tensors = {"kept": search.kept.to(torch.uint8), "increases": search.increases}
    counters = {name: getattr(search, name) for name in _COUNTERS}
    state = json.dumps({"fingerprint": identity, **counters}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"state": state, "digest": _state_digest(state, tensors)})


def read_checkpoint(path: Path, search: Search, identity: str) -> None:
    """Bring a search that has just begun to the state that a checkpoint holds.

    Raises
    ------
    CircuitError
        If the file is damaged, or was written by a search for something else.
    """
    from safetensors import SafetensorError, safe_open

    advice = "Delete it to start anew, or give another checkpoint path."
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("kept", "increases")}
        state = json.loads(metadata["state"])
        if metadata["digest"] != _state_digest(metadata["state"], tensors):
            raise ValueError("its digest does not match its content")
        found = state.pop("fingerprint")
        counters = {name: state[name] for name in _COUNTERS}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CircuitError(f"The checkpoint {path} is damaged: {error}. {advice}") from error
    if found != identity:
        raise CircuitError(
            f"The checkpoint {path} belongs to another search: another model, prompts, metric, ablation, tau or start. "
            f"{advice}"
        )
    search.resume(tensors["kept"].bool(), tensors["increases"], counters)


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
    digest.update(tensor.cpu().contiguous().numpy().tobytes())


def _state_digest(state: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for tensor in tensors.values():
        _update(digest, tensor)
    return digest.hexdigest()
