"""The widgets by which a discovery panel is told what to do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ipywidgets as W

from kcwb.circuits.ablation import ABLATIONS
from kcwb.discovery.methods import METHODS, check_method
from kcwb.errors import SettingError
from kcwb.models.loading import Model
from kcwb.tasks.metrics import METRICS
from kcwb.tasks.relations import Relation, load_relation, relation_files
from kcwb.workbench.panels.base import ROW, brief, dropdown, room


class Controls:
    """What to discover, on which facts, how, and how large; parameters as in `DiscoveryPanel`.

    Attributes
    ----------
    relations
        What can be chosen, by name: relations, or the files that hold them.
    widget
        All of the widgets, in rows.
    relation, template, method, ablation, metric, edges, tau, within, n, seed
        The widgets.

    Raises
    ------
    DataError, SettingError
        If the relation cannot be read, or a setting is not known.
    """

    def __init__(
        self,
        model: Model,
        relation: Relation | str | Path,
        *,
        template: int | str,
        method: str,
        ablation: str | None,
        metric: str,
        edges: int,
        tau: float,
        within: int | None,
        n: int,
        seed: int,
    ) -> None:
        check_method(method, metric, ablation)
        self._n_edges = model.graph.n_edges
        for name, value in (("edges", edges), ("within", within)):
            if value is not None and not 1 <= value <= self._n_edges:
                raise SettingError(f"{name}={value}: {model.name} has {self._n_edges:,} edges; ask for 1 to that many.")
        given = relation if isinstance(relation, Relation) else load_relation(relation)
        given.template(template)
        self.relations: dict[str, Relation | Path] = dict(relation_files())
        if not isinstance(relation, str) or relation.endswith(".json"):
            self.relations[given.name] = given
        self.relation = dropdown("Relation", self._relation_options(), given.name, wide=True)
        self.template = dropdown("Template", *self._template_options(template), wide=True)
        self.method = dropdown("Method", list(METHODS), method)
        self.ablation = dropdown(
            "Ablation", [("usual for the method", ""), *((a, a) for a in ABLATIONS)], ablation or ""
        )
        self.metric = dropdown("Metric", list(METRICS), metric)
        self.n = W.BoundedIntText(n, min=1, max=10_000, description="Facts", layout=room(120))
        self.seed = W.IntText(seed, description="Seed", layout=room(120))
        self.edges = W.FloatLogSlider(
            value=edges,
            min=0,
            max=math.log10(self._n_edges),
            step=0.02,
            description="Edges",
            readout_format=",.0f",
            continuous_update=False,
            layout=room(320),
        )
        self.tau = W.FloatText(tau, step=0.005, description="τ, nats", layout=room(160))
        self.within = W.BoundedIntText(
            within or 0,
            min=0,
            max=self._n_edges,
            step=1000,
            description="Within",
            tooltip="Search only this many edges, chosen by attribution (eap-ig); 0 searches all",
            layout=room(160),
        )
        rows = [
            [self.relation, self.template],
            [self.method, self.ablation, self.metric],
            [self.edges, self.tau, self.within, self.n, self.seed],
        ]
        self.widget = W.VBox([W.HBox(row, layout=ROW) for row in rows])
        self.offer_size()

    @property
    def size(self) -> int:
        """How many edges the slider asks for."""
        return min(max(1, round(self.edges.value)), self._n_edges)

    @property
    def scores(self) -> bool:
        """Whether the chosen method scores every edge, so that a circuit has a size; if not, it prunes."""
        return METHODS[str(self.method.value)].scores

    @property
    def settings(self) -> dict[str, Any]:
        """What is on screen, as parameters of `make_task` and `discover`; `within` as a number of edges, or None."""
        method = self.method.value
        common = {
            "relation": self.relation.value,
            "template": self.template.value,
            "n": self.n.value,
            "seed": self.seed.value,
            "method": method,
            "ablation": self.ablation.value or None,
            "metric": self.metric.value,
        }
        if not self.scores:
            return common | {"tau": self.tau.value, "within": self.within.value or None}
        return common | {"edges": self.size}

    def read(self, name: str) -> Relation:
        """A relation by its name."""
        source = self.relations[name]
        return source if isinstance(source, Relation) else load_relation(source)

    def offer_templates(self) -> None:
        """Those of the chosen relation."""
        options, wanted = self._template_options(0)
        self.template.options, self.template.value = options, wanted

    def offer_size(self) -> None:
        """Edges for attribution; tau, and what to search, for ACDC."""
        self.edges.layout.display = "" if self.scores else "none"
        self.tau.layout.display = self.within.layout.display = "none" if self.scores else ""

    def _relation_options(self) -> list[tuple[str, str]]:
        kinds = {
            name: source.relation_type if isinstance(source, Relation) else source.parent.name
            for name, source in self.relations.items()
        }
        return [(brief(f"{kind}: {name}"), name) for kind, name in sorted((kind, name) for name, kind in kinds.items())]

    def _template_options(self, wanted: int | str) -> tuple[list[tuple[str, int | str]], int | str]:
        """The chosen relation's templates, and a template of one's own if that is wanted; and what to select."""
        name = str(self.relation.value)
        known = self.read(name).prompt_templates_zs
        options: list[tuple[str, int | str]] = [(brief(text), i) for i, text in enumerate(known)]
        if isinstance(wanted, str):
            options.append((brief(wanted), wanted))
        return options, wanted
