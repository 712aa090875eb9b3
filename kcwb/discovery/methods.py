"""What each method of discovery takes, and its defaults: the one place that all verbs, panels and commands read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from kcwb.circuits.ablation import AblationKind, ablation_kind
from kcwb.circuits.circuit import Circuit
from kcwb.errors import SettingError, choose
from kcwb.models.graph import Graph
from kcwb.tasks.metrics import METRICS

#: The share of all edges that an attribution circuit keeps where nothing else is said.
_SHARE = 0.01
#: Points of an integral where nothing else is said.
STEPS = 5
#: An integral with fewer points than this has the clean run as its only one.
_POINTS = 2


@dataclass(frozen=True)
class Method:
    """A method of discovery.

    Attributes
    ----------
    name
        What `discover` knows it by.
    ablation
        What its cut edges deliver where nothing else is said.
    defaults
        The parameters that it takes beside metric and ablation, with their defaults (None: decided by the others).
    gradient
        Whether it scores edges by the loss's gradient.
    """

    name: str
    ablation: str
    defaults: Mapping[str, Any]
    gradient: bool = False

    @property
    def scores(self) -> bool:
        """Whether it scores every edge, and then selects; if not, it prunes."""
        return "select" in self.defaults


def _method(name: str, ablation: str, *, gradient: bool = False, **defaults: Any) -> Method:
    return Method(name, ablation, MappingProxyType(defaults), gradient)


_SELECTED: dict[str, Any] = {"edges": None, "threshold": None, "select": "signed"}
#: Name -> method. First-order scores say little about cutting to zero, so attribution's default is `mean`.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _method("eap", "mean", gradient=True, **_SELECTED),
        _method("eap-ig", "mean", gradient=True, **_SELECTED, steps=STEPS),
        _method("eap-ig-activations", "mean", gradient=True, **_SELECTED, steps=STEPS),
        _method("exact", "mean", **_SELECTED),
        _method("acdc", "zero", tau=0.01, absolute=False, within=None, checkpoint=True),
    )
}
#: The methods that score every edge.
SCORING: tuple[str, ...] = tuple(name for name, method in METHODS.items() if method.scores)


class Settled(NamedTuple):
    """What is run where something was left to the method's defaults: the ablation's text, and the integral's points."""

    ablation: str
    steps: int


def check_method(
    method: str,
    metric: str,
    ablation: str | AblationKind | None = None,
    *,
    steps: int | None = None,
    within: Circuit | None = None,
) -> Settled:
    """Refuse what cannot be meant, and fill in the method's defaults.

    Parameters
    ----------
    method, metric
        One of `METHODS`, and one of `kcwb.tasks.metrics.METRICS`.
    ablation
        What cut edges deliver. None: what those of `within` do, or without it the method's default.
    steps
        Points of an integral; None for the method's default.
    within
        A circuit whose edges alone are searched.

    Raises
    ------
    SettingError
        If a name is not known, `steps` is below 1, or the metric is `kl` and its gradient is taken at the clean run
        alone: there KL is at its minimum, so that every score would be rounding.
    """
    found = METHODS[choose("The method", method, METHODS)]
    choose("The metric", metric, METRICS)
    if steps is not None and steps < 1:
        raise SettingError(f"steps={steps}: the integral needs at least one point.")
    points = found.defaults.get("steps", 1) if steps is None or "steps" not in found.defaults else steps
    if metric == "kl" and found.gradient and points < _POINTS:
        single = " with a single step" if "steps" in found.defaults else ""
        raise SettingError(
            f"{method}{single} takes the gradient at the full model, where that of kl is zero: its scores would be "
            f"rounding. Use eap-ig with at least {_POINTS} steps, or another metric."
        )
    if ablation is None:
        ablation = found.ablation if within is None else within.ablation
    return Settled(str(ablation_kind(ablation)), points)


def check_size(graph: Graph, edges: int | None, name: str = "The model") -> int:
    """How many edges to ask for: 1% of all where nothing is said; SettingError if there are not as many."""
    size = max(1, round(_SHARE * graph.n_edges)) if edges is None else edges
    if not 1 <= size <= graph.n_edges:
        raise SettingError(f"edges={size}: {name} has {graph.n_edges:,} edges; ask for 1 to that many.")
    return size
