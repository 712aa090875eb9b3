"""How much of the model a circuit is, and what the model does without it.

- **Faithfulness** f(C) = (m(C) - m(∅)) / (m(M) - m(∅)): 1 where the circuit C does as well as the full model M, 0
  where it does as badly as the empty circuit ∅. m is a loss, but f is the same for any m that is larger for better
  runs. `faithfulness_curve` takes it over circuits of growing size, `cpr` and `cmd` are its areas (MIB, arXiv
  2504.13151).
- **Comprehensiveness**: what the model still answers when the circuit is cut out of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.integrate import trapezoid
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.discovery.selection import read_selection, select_edges
from kcwb.errors import CircuitError, DataError, KcwbError, SettingError, choose
from kcwb.evaluation.completeness import completeness
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import statistic_interval
from kcwb.tasks.metrics import METRICS, Loss, make_loss
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

#: MIB's edge fractions.
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: A difference between the full model and the empty circuit below which no share of it can be told from rounding.
_SAME = 1e-6


@verb
def faithfulness_curve(
    model: Model,
    task: Task,
    circuit_or_scores: Circuit | Float[Tensor, "S R"],
    *,
    ablation: str | AblationKind | None = None,
    metric: str = "nll",
    select: str | float = "signed",
    fractions: Sequence[float] = FRACTIONS,
    split: str = "val",
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """The faithfulness of circuits of growing size, cut from one set of edge scores.

    Parameters
    ----------
    model, task, metric
        As in `kcwb.discover`; the metric is the loss m, in its mean over facts.
    circuit_or_scores
        A circuit whose every edge is scored, or `[S, R]` scores as of `kcwb.score_edges`.
    ablation
        As in `kcwb.completeness`; scores alone do not say what they were found with, so name it.
    select
        How edges are chosen by score, see `kcwb.discovery.selection.select_edges`. MIB takes `signed` for CPR and
        `absolute` for CMD.
    fractions
        Nominal shares k of all edges, growing, between 0 and 1.
    split
        `val` or `test`: the facts that the circuits are run on.
    seed
        Of the bootstrap.

    Returns
    -------
    DataFrame
        One row per fraction: `fraction`; `asked`, the whole edges in that share (rounded down, as MIB does);
        `edges`, those left after dropping dangling ones; `m`, `m_full`, `m_empty`; `faithfulness`, and `low` and
        `high`, the 95% bootstrap interval of that ratio of means over facts (9,999 resamples, the same facts for
        circuit, full model and empty circuit; NaN for a single fact, and where all resamples agree, as those of the
        full model do).

    Raises
    ------
    SettingError
        If the full model and the empty circuit have the same loss, so that f is not defined; or a setting cannot be
        meant.
    CircuitError
        If edges lack a score, or the circuit belongs to another model.
    """
    scores, ablation = _scores_of(model, circuit_or_scores, ablation)
    if not len(fractions) or not (fractions[0] >= 0 and fractions[-1] <= 1 and (np.diff(fractions) > 0).all()):
        raise SettingError(f"fractions={list(fractions)}: shares of all edges must grow, from 0 at least to 1 at most.")
    choose("The metric", metric, METRICS)
    select = read_selection(select)
    check_same_weights(model, task)
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(_prompts(task, split)), metric)
    rows = []
    with track(progress, len(fractions) + 2, "faithfulness") as step:
        full = _per_prompt(model, None, loss, cuts)
        step()
        empty = _per_prompt(model, Circuit.empty(model.graph), loss, cuts)
        step()
        if abs(full.mean() - empty.mean()) <= _SAME:
            raise SettingError(
                f"The full model and the empty circuit have the same {metric} ({full.mean():.6g}) under {ablation} "
                "ablation: there is nothing for a circuit to recover, so faithfulness is not defined. Use another "
                "ablation, metric or task."
            )
        for fraction in fractions:
            asked = int(fraction * model.graph.n_edges)
            circuit = Circuit.empty(model.graph)
            if asked:
                kept = select_edges(model.graph, scores, edges=asked, select=select)
                circuit = Circuit(model.graph, kept).without_dangling()
            values = _per_prompt(model, circuit, loss, cuts)
            gained, possible = values - empty, full - empty
            share = recovered_share(gained, possible)
            low, high = statistic_interval([gained, possible], recovered_share, seed)
            rows.append((fraction, asked, circuit.n_edges, values.mean(), full.mean(), empty.mean(), share, low, high))
            step()
    columns = ["fraction", "asked", "edges", "m", "m_full", "m_empty", "faithfulness", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


@verb
def cpr(curve: pd.DataFrame) -> float:
    """The area under a faithfulness curve (integrated circuit performance ratio): higher is better, about 1 is perfect.

    It equals `area_under` of MIB's `evaluate_area_under_curve`, which MIB reports for edges selected by signed
    score: the trapezoid over *nominal* fractions on a linear axis, from the first fraction (.001, not 0) to the
    last. So a circuit that is as good as the model at every size has .999, and one that is better may exceed 1.
    """
    return float(trapezoid(*_points(curve)))


@verb
def cmd(curve: pd.DataFrame) -> float:
    """The area between a faithfulness curve and 1 (integrated circuit-model distance): lower is better, 0 is perfect.

    It equals `area_from_1` of MIB's `evaluate_area_under_curve`, which MIB reports for edges selected by absolute
    score: the trapezoid of |1 - f| over the same axis as `cpr`. Between two fractions |1 - f| is drawn straight,
    also where f crosses 1.
    """
    shares, fractions = _points(curve)
    return float(trapezoid(np.abs(1 - shares), fractions))


@verb
def comprehensiveness(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | AblationKind | None = None,
    k: Count = 10,
    draws: Count = 10,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """What the model still answers when the circuit is cut out of it.

    If the circuit is all that recalls the facts, its complement does as badly as the empty circuit; if it does well,
    the model has other ways to the answer.

    Parameters
    ----------
    model, circuit, task, ablation, k, seed, progress
        As in `kcwb.completeness`.
    draws
        Random connected circuits with as many edges as the complement: models that lack as many edges, any edges.

    Returns
    -------
    DataFrame
        As of `kcwb.completeness`, with the runs `full model`, `complement`, `empty circuit`, `random complements`.
    """
    check_same_model(model, circuit)
    check_same_weights(model, task)
    table = completeness(
        model, circuit.complement(), task, ablation=ablation or circuit.ablation, k=k, draws=draws, seed=seed,
        progress=progress,
    )  # fmt: skip
    names = {"circuit": "complement", "random circuits": "random complements"}
    return table.assign(run=table["run"].replace(names))


def _scores_of(
    model: Model, given: Circuit | Tensor, ablation: str | AblationKind | None
) -> tuple[Float[Tensor, "S R"], str | AblationKind]:
    """Scores of all edges, and the ablation; CircuitError or SettingError if one is missing."""
    exists = model.graph.exists
    if isinstance(given, Circuit):
        check_same_model(model, given)
        scores, ablation = given.scores, ablation or given.ablation
    else:
        scores = given.detach().cpu()
        if scores.shape != exists.shape:
            raise CircuitError(
                f"The scores have shape {tuple(scores.shape)}; {model.name} has {tuple(exists.shape)} "
                "(senders, receivers)."
            )
    if scores is None or bool(scores[exists].isnan().any()):
        raise CircuitError("A faithfulness curve needs a score for every edge; run an attribution method first.")
    if ablation is None:
        raise SettingError("Scores do not say what they were found with: name the ablation (zero, mean or resample).")
    return scores, ablation


def _prompts(task: Task, split: str) -> Prompts:
    prompts = {"val": task.val, "test": task.test}[choose("The split", split, ("val", "test"))]
    if not len(prompts):
        raise DataError(f"{task.relation.name} has no facts left for D_test; use split='val', or a smaller n.")
    return prompts


def _per_prompt(model: Model, circuit: Circuit | None, loss: Loss, cuts: Ablation) -> np.ndarray:
    """The loss of each fact."""
    values = loss.per_prompt(run_circuit(model, circuit, loss.prompts, cuts)).double().cpu().numpy()
    if not np.isfinite(values).all():
        raise KcwbError(f"The {loss.metric} of a run is not a number: its logits overflow. Use float32.")
    return values


#: Nats of a mean gain over nothing below which no share of it means anything.
LEAST_GAIN = 0.05


def recovered_share(gained: np.ndarray, possible: np.ndarray, axis: int = -1) -> np.ndarray:
    """How much of what can be gained over the empty circuit is gained, in the mean over facts."""
    return gained.mean(axis) / possible.mean(axis)


def _points(curve: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    if len(curve) < 2:
        raise SettingError("An area needs a curve of at least two fractions.")
    ordered = curve.sort_values("fraction")
    return ordered["faithfulness"].to_numpy(float), ordered["fraction"].to_numpy(float)
