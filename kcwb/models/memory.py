"""Work on many prompts in pieces that fit into memory.

A piece is as large as the budget lets it be. One for which memory runs out all the same is halved, and halved again,
down to a single prompt; only then is the error the caller's. What sums over pieces round to depends on how large these
were: discovery notes it (`noting_pieces`), and a circuit's provenance records it as `at_once`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Generic, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from kcwb.models.network import Network

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
_NOTED: ContextVar[dict[str, list[int]] | None] = ContextVar("pieces", default=None)


def memory_budget(device: torch.device) -> int:
    """Bytes that one step of a computation may take: on CUDA a quarter of what is free, elsewhere 1 GiB."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30


def prompts_at_once(network: Network, tokens: Int[Tensor, "N T"], copies: int = 3) -> int:
    """How many prompts fit the budget, one at least, each with `copies` of all senders' outputs."""
    each = copies * network.graph.n_senders * tokens.shape[1] * network.d_model * network.dtype.itemsize
    return max(1, min(len(tokens), memory_budget(network.device) // each))


def halving(size: int, run: Callable[[int], _Result], what: str = "") -> _Result:
    """`run(size)`; where memory runs out with half of it, and so on down to 1."""
    while True:
        try:
            return run(size)
        except (RuntimeError, MemoryError) as error:
            if size <= 1 or not is_out_of_memory(error):
                raise
        size = (size + 1) // 2  # out of the handler, which holds what the failed run had
        note(what, size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the machine's, was not enough; for the latter PyTorch has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def in_pieces(n: int, size: int, work: Callable[[slice], _Result], what: str = "") -> Iterator[_Result]:
    """What `work` gives for rows 0 to n, in pieces of `size` rows; smaller from where memory runs out."""
    start = 0
    note(what, size)

    def run(size: int) -> tuple[int, _Result]:
        return size, work(slice(start, min(start + size, n)))

    while start < n:
        size, found = halving(size, run, what)
        yield found
        start += size


def by_prompts(
    network: Network, tokens: Int[Tensor, "N T"], work: Callable[[slice], _Result], copies: int = 3, what: str = ""
) -> Iterator[_Result]:
    """What `work` gives for some rows of `tokens` after the other, as many at once as `prompts_at_once` says."""
    return in_pieces(len(tokens), prompts_at_once(network, tokens, copies), work, what)


class HeldPieces(Generic[_Part]):
    """What is made of each piece of some prompts, held, and worked on again and again.

    Parameters
    ----------
    network, tokens, copies, what
        As in `by_prompts`.
    make
        What is held of some rows; made anew of smaller pieces when memory runs out, here or in `run`.
    """

    def __init__(
        self, network: Network, tokens: Int[Tensor, "N T"], make: Callable[[slice], _Part], copies: int = 3,
        what: str = "",
    ) -> None:  # fmt: skip
        self._n, self._make, self._what = len(tokens), make, what
        self._size, self._parts, self._lock = prompts_at_once(network, tokens, copies), list[_Part](), Lock()
        note(what, self._size)
        halving(self._size, self._of_size, what)

    def run(self, work: Callable[[_Part], _Result]) -> list[_Result]:
        """What `work` gives for each piece; several threads may ask at once."""
        return halving(self._size, lambda size: [work(part) for part in self._of_size(size)], self._what)

    def _of_size(self, size: int) -> list[_Part]:
        """The pieces, of that size or smaller; who works on larger ones, in another thread, goes on with them."""
        with self._lock:
            if size < self._size or not self._parts:
                self._parts = []  # lets go of the larger ones first
                rows = (slice(start, min(start + size, self._n)) for start in range(0, self._n, size))
                self._parts, self._size = [self._make(one) for one in rows], size
            return self._parts


@contextmanager
def noting_pieces() -> Iterator[None]:
    """Note how large pieces are from here on: by what was computed, the sizes in the order in which they were taken."""
    token = _NOTED.set({})
    try:
        yield
    finally:
        _NOTED.reset(token)


def noted_pieces() -> dict[str, list[int]]:
    """What has been noted so far; empty if nobody asked."""
    return _NOTED.get() or {}


def note(what: str, size: int) -> None:
    """Note the size of a piece, if somebody asks and it has changed; what has no name is not noted."""
    noted = _NOTED.get()
    if noted is not None and what and noted.setdefault(what, [])[-1:] != [size]:
        noted[what].append(size)
