"""What a method of discovery is, and which there are: the one place that verbs, panels, sweeps and commands read.

A method is a function `f(model, loss, ablation, *, <settings>, progress)` and a record of it:

- one that *scores* returns what cutting each edge costs, `[S, R]`; edges are then chosen by score (`chosen`);
- one that *prunes* returns a `Pruning`.

Its settings are the function's annotated keyword arguments: their annotations are their check (`kcwb.settings`), their
defaults the method's. A further method is one file and one line, `register_method(Method("name", f))`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, ablation_kind
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.provenance import origin
from kcwb.errors import SettingError, choose
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, NotNegative, Share
from kcwb.tasks.metrics import METRICS, Loss
from kcwb.verbs import check_settings, noun, verb

#: The method where nothing is said: on eight tasks the best circuits for its time, with these two as its settings
#: (notebook 13, `kcwb.evaluation.frontier`).
DEFAULT = "gim"
SELECTIONS = ("signed", "absolute", "greedy", "optimal", "tuned")
OPTIMAL_HAS_A_SIZE = "select='optimal' is the best circuit of a size: give edges, not threshold."
#: The share of all edges that an attribution circuit keeps where nothing else is said.
_SHARE = 0.01


class Pruning(NamedTuple):
    """What a method that prunes finds.

    Attributes
    ----------
    kept
        `[S, R]`: the edges that stay.
    scores
        `[S, R]`: what cutting an edge cost when it was visited; NaN where it was not evaluated.
    report
        What else the provenance is to say, ready for JSON.
    """

    kept: Bool[Tensor, "S R"]
    scores: Float[Tensor, "S R"]
    report: Mapping[str, Any] = MappingProxyType({})


def chosen(
    *,
    edges: Count | None = None,
    threshold: float | None = None,
    select: str | NotNegative = "tuned",
    stable: Share | None = None,
) -> None:
    """What every method that scores also takes: by which scores edges are kept, see `select_edges`."""
    if isinstance(select, str):
        choose("The selection", select, SELECTIONS)
    elif select > 1:
        raise SettingError(f"select={select}: what a negative score counts for is between 0 and 1.")
    if edges is not None and threshold is not None:
        raise SettingError("Give either edges (how many) or threshold (the least score), not both.")
    if threshold is not None and select == "optimal":
        raise SettingError(OPTIMAL_HAS_A_SIZE)


def _anything(metric: str, settings: Mapping[str, Any]) -> None:
    """Refuse nothing."""


@noun
@dataclass(frozen=True)
class Method:
    """A method of discovery.

    Attributes
    ----------
    name
        What `discover` knows it by.
    function
        What it does; see above.
    ablation
        What its cut edges deliver where nothing else is said.
    prunes
        Whether it prunes; if not, it scores every edge.
    refuse
        Raises SettingError for a metric and settings that cannot be meant together.
    seconds
        Roughly how long it will take, from the function's arguments; None where nobody has to know.
    unrecorded
        Settings that do not change what is found, and are left out of the provenance.
    by_fact
        Of a method that scores: the same function for every prompt alone, `[N, S, R]`, in one run; None where it has
        to run once for each.
    additive
        Of a method that scores: whether the scores of several facts are the mean of each one's.
    varied
        Settings that an ensemble draws beside how edges are chosen: numbers above 0, and whether or not.
    """

    name: str
    function: Callable[..., Any]
    ablation: str = "mean"
    prunes: bool = False
    refuse: Callable[[str, Mapping[str, Any]], None] = _anything
    seconds: Callable[..., float] | None = None
    unrecorded: tuple[str, ...] = ()
    by_fact: Callable[..., Any] | None = None
    additive: bool = True
    varied: tuple[str, ...] = ()

    @property
    def scores(self) -> bool:
        """Whether it scores every edge, and then chooses; if not, it prunes."""
        return not self.prunes

    @property
    def own(self) -> dict[str, Any]:
        """The function's settings, with their defaults."""
        return _defaults(self.function)

    @property
    def defaults(self) -> dict[str, Any]:
        """All settings beside metric and ablation, with their defaults (None: decided by the others)."""
        return self.own if self.prunes else _defaults(chosen) | self.own


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "progress"}


#: Name -> method. First-order scores say little about cutting to zero, so attribution's default is `mean`.
METHODS: dict[str, Method] = {}


@verb
def register_method(method: Method) -> None:
    """Make a method known by its name; SettingError if another function has that name."""
    before = METHODS.get(method.name, method).function
    if (before.__module__, before.__qualname__) != (method.function.__module__, method.function.__qualname__):
        raise SettingError(f"There is a method {method.name!r} already ({before.__module__}). Choose another name.")
    METHODS[method.name] = method


def load_extensions() -> None:
    """Import the methods and ablations of installed packages: their entry points of the group `kcwb.extensions`."""
    for one in entry_points(group="kcwb.extensions"):
        try:
            one.load()
        except Exception as error:
            raise SettingError(f"The extension {one.name!r} ({one.value}) cannot be imported: {error}") from error


def scoring() -> list[str]:
    """The names of the methods that score every edge."""
    return [name for name, method in METHODS.items() if method.scores]


class Settled(NamedTuple):
    """What will be run: a method, its ablation's text, and all of its settings."""

    method: Method
    ablation: str
    settings: dict[str, Any]

    def run(self, model: Model, loss: Loss, ablation: Ablation, progress: Progress = False) -> Any:
        """Run the function."""
        return self.method.function(model, loss, ablation, **self._own, progress=progress)

    def by_fact(
        self, model: Model, loss: Loss, ablation: Ablation, progress: Progress = False
    ) -> Float[Tensor, "N S R"]:
        """The scores of every fact alone: their mean is what `run` gives, since a loss is a mean over facts."""
        if self.method.by_fact is not None:
            return self.method.by_fact(model, loss, ablation, **self._own, progress=progress)
        parts = []
        with track(progress, len(loss.prompts), self.method.name) as step:
            for i in range(len(loss.prompts)):
                parts.append(self.run(model, loss.select([i]), ablation))
                step()
        return torch.stack(parts)

    @property
    def _own(self) -> dict[str, Any]:
        return {name: self.settings[name] for name in self.method.own}

    def recorded(self, metric: str) -> dict[str, Any]:
        """How it is found, for a provenance."""
        parameters = recorded(self.settings, self.method.unrecorded)
        return {"method": self.method.name, "metric": metric, "ablation": self.ablation, "parameters": parameters}


def recorded(settings: Mapping[str, Any], unrecorded: Sequence[str]) -> dict[str, Any]:
    """Settings but some, ready for JSON: of a circuit among them, where it comes from."""
    return {
        name: origin(value) if isinstance(value, Circuit) else value
        for name, value in settings.items()
        if name not in unrecorded
    }


def check_method(method: str, metric: str, ablation: str | AblationKind | None = None, **settings: Any) -> Settled:
    """Refuse what cannot be meant, and fill in the method's defaults.

    Parameters
    ----------
    method, metric
        One of `METHODS`, and one of `kcwb.tasks.metrics.METRICS`.
    ablation
        What cut edges deliver. None: what those of `within`, a circuit among the settings, do; or without it the
        method's default.
    settings
        The method's settings; None for a default.

    Raises
    ------
    SettingError
        If a name is not known, a setting is not one of the method's or not what it must be, or they do not go together.
    """
    found = METHODS[choose("The method", method, METHODS)]
    choose("The metric", metric, METRICS)
    given = {name: value for name, value in settings.items() if value is not None}
    checked = check_settings(found.function, method, **{name: given[name] for name in given if name in found.own})
    if found.scores:
        of_choice = {name: given[name] for name in given if name in _defaults(chosen)}
        checked |= check_settings(chosen, method, **of_choice)
    known = found.defaults | checked
    found.refuse(metric, known)
    for name in given:
        if name not in known:
            raise SettingError(f"{method} takes {', '.join(known)}; {name} is not one of them.")
    if found.scores:
        chosen(**of_choice)
        if known["stable"] is not None and not found.additive:
            raise SettingError(f"stable: the scores of {method} are no mean over facts, of which some could be drawn.")
    within = known.get("within")
    if isinstance(within, str):
        usual = read_within(within)[0].ablation
    else:
        usual = found.ablation if within is None else within.ablation
    return Settled(found, str(ablation_kind(usual if ablation is None else ablation)), known)


def read_within(text: str) -> tuple[Method, int]:
    """The method that scores and the number of edges that a text such as `gim:2000` names.

    Raises
    ------
    SettingError
        If it names none.
    """
    name, _, size = text.partition(":")
    if name not in scoring() or not size.isdecimal() or not int(size):
        raise SettingError(
            f"within={text!r:.60}: give a circuit, or one of {', '.join(scoring())} with a number of edges, such as "
            "'gim:2000'."
        )
    return METHODS[name], int(size)


def check_size(graph: Graph, edges: int | None, name: str = "The model") -> int:
    """How many edges to ask for: 1% of all where nothing is said; SettingError if there are not as many."""
    size = max(1, round(_SHARE * graph.n_edges)) if edges is None else edges
    if not 1 <= size <= graph.n_edges:
        raise SettingError(f"edges={size}: {name} has {graph.n_edges:,} edges; ask for 1 to that many.")
    return size
