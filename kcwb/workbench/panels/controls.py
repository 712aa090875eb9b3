"""The widgets by which a discovery panel is told how to discover, and how large."""

from __future__ import annotations

import math
from typing import Any

import ipywidgets as W

from kcwb.circuits.ablation import ABLATIONS, AblationKind, ablation_kind
from kcwb.discovery.methods import METHODS, check_method
from kcwb.models.loading import Model
from kcwb.tasks.metrics import METRICS
from kcwb.workbench.panels.widgets import Group, check_edges, dropdown, room


class Controls(Group):
    """How to discover, on how many facts, and how large: a widget by the name of each parameter of `DiscoveryPanel`."""

    def __init__(
        self,
        model: Model,
        *,
        method: str,
        ablation: str | AblationKind | None,
        metric: str,
        edges: int,
        tau: float,
        within: int | None,
        n: int,
        seed: int,
    ) -> None:
        check_method(method, metric, ablation)
        self._n_edges = model.graph.n_edges
        edges = edges if "edges" in METHODS[method].defaults else min(edges, self._n_edges)
        check_edges(model, edges=edges, within=within)
        usual = ("usual for the method", "")
        self.method = dropdown("Method", list(METHODS), method)
        chosen = "" if ablation is None else str(ablation_kind(ablation))
        kinds = [kind for kind in dict.fromkeys([*ABLATIONS, chosen]) if kind]
        self.ablation = dropdown("Ablation", [usual, *((one, one) for one in kinds)], chosen)
        self.metric = dropdown("Metric", list(METRICS), metric)
        self.n = W.BoundedIntText(n, min=1, max=10_000, description="Facts", layout=room(120))
        self.seed = W.IntText(seed, description="Seed", layout=room(120))
        self.edges = W.FloatLogSlider(
            edges, min=0, max=math.log10(self._n_edges), step=0.02, description="Edges", readout_format=",.0f",
            continuous_update=False, layout=room(320),
        )  # fmt: skip
        self.tau = W.FloatText(tau, step=0.005, description="τ, nats", layout=room(160))
        self.within = W.BoundedIntText(
            within or 0, min=0, max=self._n_edges, step=1000, description="Within", layout=room(160),
            tooltip="Search only this many edges, chosen by attribution; 0 searches all",
        )  # fmt: skip
        self.rows = [
            [self.method, self.ablation, self.metric],
            [self.edges, self.tau, self.within, self.n, self.seed],
        ]
        self.offer_size()

    @property
    def size(self) -> int:
        """How many edges the slider asks for."""
        return min(max(1, round(self.edges.value)), self._n_edges)

    @property
    def sized(self) -> bool:
        """Whether the chosen method is asked for a number of edges; if not, it is ACDC or its like."""
        return "edges" in METHODS[str(self.method.value)].defaults

    @property
    def settings(self) -> dict[str, Any]:
        """What is on screen; `within` as a number of edges, or None."""
        common = {name: getattr(self, name).value for name in ("n", "seed", "method", "ablation", "metric")}
        common["ablation"] = common["ablation"] or None
        size = {"edges": self.size} if self.sized else {"tau": self.tau.value, "within": self.within.value or None}
        return common | size

    def offer_size(self) -> None:
        """Edges for attribution; tau, and what to search, for ACDC."""
        self.edges.layout.display = "" if self.sized else "none"
        self.tau.layout.display = self.within.layout.display = "none" if self.sized else ""
