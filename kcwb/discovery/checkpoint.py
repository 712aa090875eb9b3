"""Checkpoints of a search: whole or absent, of this search or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kcwb.errors import CircuitError, shown, warn
from kcwb.files import user_folder, write_tensors

if TYPE_CHECKING:
    from kcwb.discovery.acdc import Search

_COUNTERS = ("visited", "evaluations", "near_ties", "surprises", "seen", "value")
#: Raised with every change of the search that may change its decisions.
_VERSION = 4


def checkpoint_folder() -> Path:
    """Where checkpoints are kept that no path is given for: in the user's cache (`KCWB_CACHE`)."""
    return user_folder("checkpoints")


def fingerprint(search: Search) -> str:
    """SHA-256 of all that determines a search: weights, prompts, metric, ablation, tau, and the edges it began with."""
    prompts = search.loss.prompts
    settings = {
        "version": _VERSION,
        "weights": search.model.digest,
        "dtype": str(search.model.dtype),
        "graph": dataclasses.asdict(search.model.graph),
        "metric": search.loss.metric,
        "ablation": [str(search.ablation.kind), search.ablation.reference],
        "tau": search.tau,
        "absolute": search.absolute,
        **({} if search.drawn_from is None else {"order": search.drawn_from}),
        **({} if search.loss.counts is None else {"counts": search.loss.counts}),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    asked = [prompts.tokens, prompts.lengths, prompts.answers, prompts.answer_mask, prompts.foils, *prompts.further]
    paired = [prompts.corrupted] if search.ablation.kind.paired else []
    add_tensors(digest, [*asked, *paired, search.start])
    return digest.hexdigest()


def usual_path(search: Search) -> Path:
    """The file there of a search that no path is given for."""
    return checkpoint_folder() / f"{fingerprint(search)}.safetensors"


class Checkpoint:
    """Where a search keeps its state: in a file, for as long as that can be written.

    A disk that is full or read-only does not end a search of hours: one warning says so, and it goes on.
    """

    def __init__(self, path: Path, search: Search) -> None:
        self.path, self.search = path, search
        self._identity = fingerprint(search)
        self._warned = False

    def resume(self) -> None:
        """Bring the search, which has just begun, to the state that the file holds, if it is there.

        Raises
        ------
        CircuitError
            If the file is damaged, or was written by a search for something else.
        """
        with self._as_far_as_possible():
            if not self.path.exists():
                return
            kept, increases, counters = self._read()
            self.search.resume(kept, increases, counters)

    def write(self) -> None:
        """Write the state between two receivers; a kill leaves the previous file."""
        tensors = {"kept": self.search.kept.to(torch.uint8), "increases": self.search.increases}
        counters = {name: getattr(self.search, name) for name in _COUNTERS}
        state = json.dumps({"fingerprint": self._identity, **counters}, sort_keys=True)
        with self._as_far_as_possible():
            write_tensors(self.path, tensors, {"state": state, "digest": _state_digest(state, tensors)})

    def remove(self) -> None:
        """The search is done."""
        with self._as_far_as_possible():
            self.path.unlink(missing_ok=True)

    @contextmanager
    def _as_far_as_possible(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn(
                    f"No checkpoint can be kept in {self.path} ({error.strerror}): the search goes on, but if it is "
                    "interrupted it starts anew."
                )

    def _read(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        advice = "Delete it to start anew, or give another checkpoint path."
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("kept", "increases")}
            state = json.loads(metadata["state"])
            if metadata["digest"] != _state_digest(metadata["state"], tensors):
                raise ValueError("its digest does not match its content")
            found = state.pop("fingerprint")
            counters = {name: state[name] for name in _COUNTERS}
            if any(one.shape != self.search.kept.shape for one in tensors.values()):
                raise ValueError("it is of a graph of another size")
            if any(type(one) not in (int, float) for one in counters.values()):
                raise ValueError("a counter is no number")
            if not (type(counters["visited"]) is int and 0 <= counters["visited"] <= len(self.search.order)):
                raise ValueError(f"it has visited {shown(counters['visited'])} receivers")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CircuitError(f"The checkpoint {self.path} is damaged: {error}. {advice}") from error
        if found != self._identity:
            raise CircuitError(
                f"The checkpoint {self.path} belongs to another search: another model, prompts, metric, ablation, tau "
                f"or start. {advice}"
            )
        return tensors["kept"].bool(), tensors["increases"], counters


def add_tensors(digest: Any, tensors: Iterable[Tensor]) -> None:
    """Take tensors into a digest: the shape of each, its type and its values."""
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())


def _state_digest(state: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    add_tensors(digest, tensors.values())
    return digest.hexdigest()
