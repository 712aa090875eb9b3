"""How good circuits are for their size, and what finding them takes: the frontier of edges and faithfulness.

For every method one run scores all edges on D_val; the circuits of growing size that these scores give are run on
facts that they were not found on. Of each method the table says how many edges reach 90% and 99% of faithfulness (on a
line through the measured sizes, edges on a log scale), the area under the curve, seconds and peak memory. Methods that
prune give circuits of one size each: hand these in as `circuits`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.integrate import trapezoid
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.discovery.discover import score_edges
from kcwb.discovery.methods import scoring
from kcwb.discovery.selection import select_edges
from kcwb.discovery.tuning import Tuning
from kcwb.errors import DataError, SettingError, choose
from kcwb.evaluation.faithfulness import recovered_share
from kcwb.evaluation.referee.scores import Scores
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import resample_counts, statistic_interval
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

SIZES = (25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)
LEVELS = (0.9, 0.99)
_RESAMPLES = 2000
_Found = TypeVar("_Found")


@verb
def frontier(
    model: Model,
    task: Task,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("eap", "eap-ig", "gim", "relp", "ceap", "ig-prune"),
    *,
    circuits: Mapping[str, Sequence[Circuit]] | None = None,
    ablation: str | AblationKind = "mean",
    metric: str = "nll",
    select: str | float = "signed",
    sizes: Sequence[Count] = SIZES,
    known: bool = True,
    seed: Seed = 0,
    progress: Progress = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare methods by the faithfulness of their circuits of growing size on held-out facts.

    Parameters
    ----------
    model, task, metric
        As in `kcwb.discover`; edges are scored on D_val, and circuits run on D_test.
    methods
        Names of methods that score edges; or name -> settings, `method` among them where the name is one of yours.
    circuits
        Name -> circuits that were found otherwise, and what they are to be called.
    ablation, select
        What cut edges deliver, in finding and running; how edges are chosen by score (a setting `select` of a method
        comes first; `tuned` is tuned at each size).
    sizes
        How many edges are asked for, growing; those above the graph's number are left out.
    known
        Run on those facts of D_test alone that the model knows.
    seed
        Of the bootstrap over facts.

    Returns
    -------
    tuple
        The curves: one row per method and size, `method`, `asked`, `edges` (those left on paths), `faithfulness` with
        its 95% bootstrap interval `low`, `high`, and `n`, the facts. And the summary, one row per method: `edges_90`,
        `edges_99` and the intervals of the former, `low_90` and `high_90` (inf: not reached at the sizes asked);
        `area`, the mean faithfulness over the sizes on a log scale, and `distance`, the mean of |1 - faithfulness|
        over the same (a circuit better than the model is another model, too); `seconds` and `peak_mib` of scoring
        (NaN of what was handed in, and of memory that cannot be asked for).

    Raises
    ------
    SettingError
        If a method does not score edges, or sizes do not grow; or there is nothing to compare.
    CircuitError
        If one of the circuits belongs to another model.
    DataError
        If D_test has fewer than two facts to run on, or nothing can be gained on them.
    """
    check_same_weights(model, task)
    named = {name: {} for name in methods} if not isinstance(methods, Mapping) else {**methods}
    chosen = {name: {"method": name, **settings} for name, settings in named.items()}
    for settings in chosen.values():
        choose("The method", settings["method"], scoring())
    found = {name: sorted(some, key=lambda one: one.n_edges) for name, some in (circuits or {}).items()}
    if not all(found.values()) or not (chosen or found):
        raise SettingError("There is nothing to compare: give a method, or circuits, at least one of each name.")
    for circuit in itertools.chain.from_iterable(found.values()):
        check_same_model(model, circuit)
    sizes = [size for size in sizes if size <= model.graph.n_edges]
    if not sizes or (np.diff(sizes) <= 0).any():
        raise SettingError(f"sizes={sizes}: numbers of edges must grow, from 1 to {model.graph.n_edges:,}.")
    facts = task.test.select([i for i, hit in enumerate(task.test.known.tolist()) if hit or not known])
    cuts = make_ablation(model, task, ablation)
    facts = cuts.usable(facts) if len(facts) else facts
    if len(facts) < 2:
        raise DataError(
            f"D_test of {task.relation.name} has {len(facts)} facts that {model.name} knows; a frontier needs two at "
            "least. Make the task with a larger n_test, or take known=False."
        )
    scores = Scores(model, facts, cuts, [metric])
    possible = scores.empty.losses[metric] - scores.model_alone.losses[metric]
    if abs(float(possible.mean())) < 1e-6:
        raise DataError(f"With all edges cut {model.name} answers {task.relation.name} as well as with none.")
    curves, summary = [], []
    runs = len(chosen) * (1 + len(sizes)) + sum(map(len, found.values()))
    with track(progress, runs, "frontier") as step:

        def measure(name: str, asked: Sequence[float], some: Sequence[Circuit], seconds: float, peak: float) -> None:
            gained = np.stack([scores.empty.losses[metric] - one.losses[metric] for one in scores.each(some, step)])
            curve = _curve(name, asked, some, gained, possible, seed)
            curves.append(curve)
            spent = {"seconds": seconds, "peak_mib": peak}
            summary.append({"method": name, **_summary(curve, gained, possible, seed), **spent})

        def tuned(of_edges: Tensor, among: Tensor | None) -> list[float]:
            tuning = Tuning(model, make_loss(model, cuts.usable(task.val), metric), cuts)
            return [tuning.share(of_edges, edges=size, among=among) for size in sizes]

        for name, settings in chosen.items():
            own = {"select": select, **settings}
            selections = [own.pop("select")] * len(sizes)
            more = {"metric": metric, "ablation": ablation, "progress": False}
            of_edges, seconds, peak = _spent(model, partial(score_edges, model, task, **own, **more))
            step()
            sure = None if own.get("stable") is None else of_edges != 0
            if selections[0] == "tuned":
                selections, tuning, higher = _spent(model, partial(tuned, of_edges, sure))
                seconds, peak = seconds + tuning / len(sizes), max(peak, higher)
            kept = [
                select_edges(model.graph, of_edges, edges=size, select=one, among=sure)
                for size, one in zip(sizes, selections, strict=True)
            ]
            measure(name, sizes, [Circuit(model.graph, one).without_dangling() for one in kept], seconds, peak)
        for name, some in found.items():
            measure(name, [math.nan] * len(some), some, math.nan, math.nan)
    return pd.concat(curves, ignore_index=True), pd.DataFrame(summary)


def edges_for(
    edges: Sequence[float], faithfulness: Float[np.ndarray, "... sizes"], level: float
) -> Float[np.ndarray, "..."]:
    """The number of edges at which curves first reach a level, on straight lines over log edges; inf if they do not."""
    logs, curves = np.log(np.maximum(edges, 1)), np.asarray(faithfulness, float)
    reached = curves >= level
    first = reached.argmax(-1)
    before = np.maximum(first - 1, 0)
    here, there = (np.take_along_axis(curves, at[..., None], -1)[..., 0] for at in (before, first))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(first > 0, (level - here) / (there - here), 1.0)
    found = np.exp(logs[before] + share * (logs[first] - logs[before]))
    return np.where(reached.any(-1), found, np.inf)


def _curve(
    name: str, asked: Sequence[float], found: Sequence[Circuit], gained: np.ndarray, possible: np.ndarray, seed: int
) -> pd.DataFrame:
    rows = []
    for size, circuit, own in zip(asked, found, gained, strict=True):
        low, high = statistic_interval([own, possible], recovered_share, seed)
        share = float(recovered_share(own, possible))
        rows.append((name, size, circuit.n_edges, share, low, high, len(possible)))
    return pd.DataFrame(rows, columns=["method", "asked", "edges", "faithfulness", "low", "high", "n"])


def _summary(curve: pd.DataFrame, gained: np.ndarray, possible: np.ndarray, seed: int) -> dict[str, float]:
    """Edges for each level, with a bootstrap interval of the first; the area, and the distance from 1."""
    edges, shares = curve["edges"].to_numpy(float), curve["faithfulness"].to_numpy(float)
    counts = resample_counts(len(possible), _RESAMPLES, seed)
    drawn = (counts @ gained.T) / (counts @ possible)[:, None]
    low, high = np.quantile(edges_for(edges, drawn, LEVELS[0]), [0.025, 0.975], method="inverted_cdf")
    logs = np.log(np.maximum(edges, 1))

    def mean(values: np.ndarray) -> float:
        width = float(logs[-1] - logs[0])
        return float(trapezoid(values, logs)) / width if width else float(values.mean())

    return {
        **{f"edges_{round(100 * level)}": float(edges_for(edges, shares, level)) for level in LEVELS},
        "low_90": float(low),
        "high_90": float(high),
        "area": mean(shares),
        "distance": mean(np.abs(1 - shares)),
    }


def _spent(model: Model, work: Callable[[], _Found]) -> tuple[_Found, float, float]:
    """What some work gives, its seconds, and how much more memory (MiB) it takes at its peak than at its start."""
    started, before = time.perf_counter(), _peak(model.device, reset=True)
    return work(), time.perf_counter() - started, _peak(model.device) - before


def _peak(device: torch.device, reset: bool = False) -> float:
    """The peak of memory since the last reset, in MiB; NaN where there is no telling."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return math.nan
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024
