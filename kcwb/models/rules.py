"""What a backward pass takes the network's nonlinear parts for; the forward pass is the same under all rules.

A gradient says what an infinitely small change does; a cut edge changes a lot. Where a part is nonlinear in a known
way, another slope tells better what a large change does:

- the scale of a norm is a constant (freeze_norms);
- the softmax of the attention has the slope that it would have at another temperature;
- where several tensors are multiplied, each gets a part of the gradient (queries_keys, values, factors), since together
  their gradients count a product's change more than once;
- an activation f(x) is the line through the origin and its point, (f(x) / x) x with f(x) / x constant (secant).

`GIM` is arXiv 2505.17630, as released (github.com/corticph/gim): the backward pass of the softmax takes softmax(x / 2)
for its output, and is not divided by that temperature. `RELP` is arXiv 2508.21258, as released
(github.com/FarnoushRJ/RelP): its LN, identity and half rules; its further rule for attention, patterns that are
constants (freeze_patterns), is off there by default, since no edge to a query or a key would count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.models.weights import Norm


@dataclass(frozen=True)
class Rules:
    """One number or yes-or-no for each kind of nonlinear part; by default the true gradient."""

    freeze_norms: bool = False
    temperature: float = 1.0
    queries_keys: float = 1.0
    values: float = 1.0
    factors: float = 1.0
    secant: bool = False
    freeze_patterns: bool = False

    def norm(self, norm: Norm, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """A norm."""
        return norm.frozen(x) if self.freeze_norms else norm(x)

    def norm_factor(self, norm: Norm, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """What a root-mean-square norm multiplies by."""
        factor = norm.factor(x)
        return factor.detach() if self.freeze_norms else factor

    def softmax(self, scores: Float[Tensor, "... T"]) -> Float[Tensor, "... T"]:
        """An attention pattern."""
        if self.freeze_patterns:
            return scores.softmax(-1).detach()
        return scores.softmax(-1) if self.temperature == 1 else _Softmax.apply(scores, self.temperature)

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """An activation function."""
        if not self.secant:
            return function(x)
        with torch.no_grad():
            slope = function(x) / torch.where(x == 0, 1.0, x)
        return slope * x


class _Softmax(torch.autograd.Function):
    """A softmax with the backward pass of one at another temperature, not divided by it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.temperature = temperature
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (scores,), (gradient,) = ctx.saved_tensors, grad_outputs
        flatter = (scores / ctx.temperature).softmax(-1)
        return flatter * (gradient - (gradient * flatter).sum(-1, keepdim=True)), None


class _Share(torch.autograd.Function):
    """The same, with a share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.share, None


def share(x: Tensor, of_gradient: float) -> Tensor:
    """`x`, to which a share of its gradient goes back."""
    return x if of_gradient == 1 else _Share.apply(x, of_gradient)  # pyright: ignore[reportReturnType]


#: The true gradient.
TRUE = Rules()
GIM = Rules(freeze_norms=True, temperature=2.0, queries_keys=0.25, values=0.5, factors=0.5)
RELP = Rules(freeze_norms=True, factors=0.5, secant=True)
