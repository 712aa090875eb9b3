"""What a change of one node's output reaches, as `kcwb.circuits.propagate` computes it step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


class Need(IntEnum):
    """Where a node's output matters."""

    NOWHERE = 0
    ANSWERS = 1
    EVERYWHERE = 2


@dataclass(frozen=True)
class Inputs:
    """How changed senders enter receivers: few of many, so that only those are read.

    Receiver `places[i]` keeps the edges of the senders from `first[i]` to `first[i + 1]` in `senders`, which are
    counted in the order in which changes are stacked.
    """

    places: Int[Tensor, " r"]
    senders: Int[Tensor, " c"]
    first: Int[Tensor, " r"]

    @classmethod
    def of(cls, reached: Bool[Tensor, "R C"]) -> Inputs | None:
        """The receivers that a change reaches, and what reaches them; None if there is none."""
        each = reached.sum(1)
        places = each.nonzero()[:, 0]
        return cls(places, reached.nonzero()[:, 1], (each.cumsum(0) - each)[places]) if len(places) else None

    def read(self, stack: Float[Tensor, "C *any"]) -> Float[Tensor, "r *any"]:
        """The sum of the changes that each receiver reads: gathered and added in one go, without a copy."""
        return embedding_bag(self.senders, stack.flatten(1), self.first, mode="sum").unflatten(1, stack.shape[1:])


@dataclass(frozen=True)
class HeadsStep:
    """The heads of a layer that change, all needed at the same positions; `rows` are the senders that do with them."""

    layer: int
    everywhere: bool
    heads: Int[Tensor, " h"]
    rows: Int[Tensor, " h"]
    changed: dict[str, Inputs | None]


@dataclass(frozen=True)
class MlpStep:
    """An MLP that changes."""

    layer: int
    everywhere: bool
    row: int
    changed: Inputs


@dataclass
class Plan:
    """What a change of one node's output reaches, in the order of computation; made by `Current.plan`.

    `changed` are the senders at the answers' positions, `everywhere` those of them that matter at all positions: the
    order in which their changes are stacked.
    """

    row: int
    changed: list[int] = field(default_factory=list)
    everywhere: list[int] = field(default_factory=list)
    steps: list[HeadsStep | MlpStep] = field(default_factory=list)
    logits: Inputs | None = None
