"""Does a circuit hold more than it needs: each of its edges against edges of random paths that are let in.

The minimality test of arXiv 2410.13032. A random path from `input` to `logits` is added to the circuit, and one of its
new edges is cut again; what that changes is what an edge does that is there by chance. An edge of the circuit is
**superfluous** if what cutting it changes exceeds that of fewer than nine such random edges of ten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from kcwb.circuits.ablation import AblationKind
from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError, choose
from kcwb.evaluation.completeness import cuts_of
from kcwb.evaluation.referee.hypotheses import QUANTILE
from kcwb.evaluation.referee.scores import Scores
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.parallel import on_each_core
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import holm
from kcwb.tasks.metrics import METRICS
from kcwb.tasks.task import Task
from kcwb.verbs import verb

_TRIES = 1000
_LOT = 16  # edges that are cut one after the other, on one core


@verb
def minimality(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | AblationKind | None = None,
    metric: str = "nll",
    most: Count = 300,
    paths: Count = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Whether each of the circuit's edges matters to it more than edges of random paths that are let in.

    Parameters
    ----------
    model, circuit, task, ablation
        As in `kcwb.completeness`; the circuit is run on the task's D_val.
    metric
        The loss, as in `kcwb.discover`.
    most
        At most so many edges are tested; of a larger circuit, a random sample.
    paths
        How many random paths, each of which gives one random edge.
    seed
        Of the sample and the paths.

    Returns
    -------
    DataFrame
        One row per tested edge, the least effect first, then one per random edge: `sender`, `receiver`, `kept` (False
        for a random edge); `effect`, the mean over facts of the absolute change of the loss when it is cut, and `cost`,
        that of the change itself (nats); and, NaN for a random edge: `exceeds`, the share of random edges with a
        smaller effect; `p`, the probability of such a share or a smaller one if the edge exceeds nine of ten, and
        `holm`, the same after Holm's correction over the tested edges; `superfluous`, whether that is at most .05.

    Raises
    ------
    CircuitError
        If the circuit keeps no edge, or every one; or belongs to another model.
    """
    choose("The metric", metric, METRICS)
    cuts = cuts_of(model, circuit, task, ablation)
    scores = Scores(model, cuts.usable(task.val), cuts, [metric])
    chosen = choose_edges(circuit, most, paths, seed)
    with track(progress, chosen.runs, "minimality") as step:
        changes = edge_changes(scores, circuit, chosen, step)
    return minimality_table(model.graph, chosen, changes[metric])


class Chosen(NamedTuple):
    """The edges that are cut: of the circuit `[E, 2]`, and of random paths `[P, 2]` with the circuit that has each."""

    edges: Tensor
    others: Tensor
    inflated: list[Bool[Tensor, "S R"]]

    @property
    def lots(self) -> tuple[Tensor, ...]:
        """The edges of the circuit in some parts, for several cores."""
        return self.edges.split(_LOT)

    @property
    def runs(self) -> int:
        """How many circuits are run: one for each lot, without each edge, with each path and without an edge of it."""
        return len(self.lots) + len(self.edges) + 2 * len(self.others)


def choose_edges(circuit: Circuit, most: int, paths: int, seed: int) -> Chosen:
    """Which edges are tested, and random paths; CircuitError if there is none, or no edge to let in."""
    graph, generator = circuit.graph, torch.Generator().manual_seed(seed)
    edges = circuit.kept.nonzero()
    edges = edges[torch.randperm(len(edges), generator=generator)[:most].sort().values]
    if not len(edges) or circuit.n_edges == graph.n_edges:
        raise CircuitError(
            f"{circuit!r} keeps {'every' if len(edges) else 'no'} edge: there is none to "
            f"{'compare with' if len(edges) else 'test'}."
        )
    others, inflated = [], []
    for _ in range(paths):
        tried = (random_path(graph, generator) for _ in range(_TRIES))
        path = next((some for some in tried if not circuit.kept[*some.T].all()), None)
        if path is None:
            raise CircuitError(f"{circuit!r} keeps nearly every path: no random one has an edge that it does not.")
        new, kept = path[~circuit.kept[*path.T]], circuit.kept.clone()
        kept[*path.T] = True
        others.append(new[int(torch.randint(len(new), (), generator=generator))])
        inflated.append(kept)
    return Chosen(edges, torch.stack(others), inflated)


def random_path(graph: Graph, generator: torch.Generator) -> Tensor:
    """The edges `[n, 2]` of a walk from `input` to `logits` that takes any edge of a node as likely as any other."""
    row, path = 0, []
    while row < graph.n_senders:
        columns = graph.exists[row].nonzero()[:, 0]
        column = int(columns[torch.randint(len(columns), (), generator=generator)])
        path.append((row, column))
        row = int(graph.receiver_node[column])
    return torch.tensor(path)


def edge_changes(
    scores: Scores, circuit: Circuit, chosen: Chosen, step: Callable[..., None]
) -> dict[str, tuple[Float[np.ndarray, "E N"], Float[np.ndarray, "P N"]]]:
    """Metric -> by how much each fact's loss grows when an edge is cut, of the circuit's edges and of random ones."""
    jobs = [(circuit.kept, lot) for lot in chosen.lots]
    jobs += [(inflated, edge[None]) for inflated, edge in zip(chosen.inflated, chosen.others, strict=True)]

    def changes(job: tuple[Bool[Tensor, "S R"], Int[Tensor, "E 2"]]) -> dict[str, Float[np.ndarray, "E N"]]:
        whole, without = scores.without_each(*job)
        return {key: np.stack([one.losses[key] - whole.losses[key] for one in without]) for key in scores.metrics}

    found = []
    for (_, edges), changed in zip(jobs, on_each_core(changes, jobs, scores.model.device), strict=True):
        found.append(changed)
        step(1 + len(edges))
    own, random = found[: len(chosen.lots)], found[len(chosen.lots) :]
    return {
        key: (np.concatenate([one[key] for one in own]), np.concatenate([one[key] for one in random]))
        for key in scores.metrics
    }


def minimality_table(graph: Graph, chosen: Chosen, changes: tuple[np.ndarray, np.ndarray]) -> pd.DataFrame:
    """The table of `minimality`."""
    own, random = (np.abs(some).mean(1) for some in changes)
    exceeds = (own[:, None] > random[None]).mean(1)
    p = stats.binom(len(random), QUANTILE).cdf(np.round(exceeds * len(random)))
    names = [graph.edge_name(*edge).split("->") for edge in torch.cat([chosen.edges, chosen.others]).tolist()]
    frame = pd.DataFrame(names, columns=["sender", "receiver"])
    frame["kept"] = np.arange(len(frame)) < len(own)
    frame["effect"] = np.concatenate([own, random])
    frame["cost"] = np.concatenate([some.mean(1) for some in changes])
    for column, values in {"exceeds": exceeds, "p": p, "holm": holm(p)}.items():
        frame[column] = np.concatenate([values, np.full(len(random), np.nan)])
    frame["superfluous"] = frame["holm"] <= 0.05
    return frame.sort_values(["kept", "effect"], ascending=[False, True], kind="stable", ignore_index=True)
