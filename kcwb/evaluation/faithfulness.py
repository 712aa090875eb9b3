"""How much of the model a circuit is, what the model does without it, and whether it holds more than it needs.

- **Faithfulness** f(C) = (m(C) - m(∅)) / (m(M) - m(∅)): 1 where the circuit C does as well as the full model M, 0
  where it does as badly as the empty circuit ∅. m is a loss, but f is the same for any m that is larger for better
  runs. `faithfulness_curve` takes it over circuits of growing size, `cpr` and `cmd` are its areas (MIB, arXiv
  2504.13151).
- **Comprehensiveness**: what the model still answers when the circuit is cut out of it.
- **Minimality**: whether a kept edge matters to the circuit more than one that was let in at random. The comparison
  is that of the minimality test of arXiv 2410.13032, whose random edges come in whole paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.integrate import trapezoid
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.propagate import Current, Need
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.discovery.selection import SELECTIONS, select_edges
from kcwb.errors import CircuitError, DataError, KcwbError, SettingError, choose
from kcwb.evaluation.completeness import completeness
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.statistics import statistic_interval
from kcwb.tasks.metrics import METRICS, Loss, make_loss
from kcwb.tasks.prompts import Prompts, Task, check_same_weights
from kcwb.verbs import verb

#: MIB's edge fractions.
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_RESAMPLES = 9999
#: A difference between the full model and the empty circuit below which no share of it can be told from rounding.
_SAME = 1e-6
#: Rows (candidates x prompts x positions), and bytes of logits, that a batch of candidate edges may take.
_ROWS, _LOGIT_BYTES = 512, 2**27


@verb
def faithfulness_curve(
    model: Model,
    task: Task,
    circuit_or_scores: Circuit | Float[Tensor, "S R"],
    *,
    ablation: str | AblationKind | None = None,
    metric: str = "nll",
    select: str = "signed",
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
    choose("The selection", select, SELECTIONS)
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
            share = _share(gained, possible)
            low, high = statistic_interval([gained, possible], _share, seed)
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


@verb
def minimality(
    model: Model,
    circuit: Circuit,
    task: Task,
    *,
    ablation: str | AblationKind | None = None,
    metric: str = "nll",
    most: Count = 300,
    draws: Count = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Whether the circuit's edges matter to it more than edges that were kept at random.

    The cost of a kept edge is what its removal alone adds to the circuit's loss on D_val, m(C without e) - m(C). A
    random edge is one that the circuit does not keep, between two of its nodes; it is let in, and its cost is that
    of taking it out again, m(C) - m(C with e). (Among the circuit's own edges the share below would be one half by
    construction.)

    Parameters
    ----------
    model, circuit, task, ablation
        As in `kcwb.completeness`; the circuit is run on the task's D_val.
    metric
        The loss m, as in `kcwb.discover`.
    most
        At most so many kept edges are tested; of a larger circuit, a random sample.
    draws
        How many random edges they are compared with (all there are, if fewer).
    seed
        Of the sample and the random edges.

    Returns
    -------
    DataFrame
        One row per tested edge: `sender`, `receiver`, `kept` (False for a random edge), `cost` (nats), and `below`,
        the share of random edges whose cost is higher (NaN for a random edge). The mean of `below` is the share of
        kept edges whose removal alone costs less than a random edge's: 0 for a circuit that keeps nothing idle,
        about .5 for one that was drawn at random. Kept edges come first, the cheapest at the top.

    Raises
    ------
    CircuitError
        If the circuit keeps no edge, or every edge between its nodes; or belongs to another model.
    """
    check_same_model(model, circuit)
    check_same_weights(model, task)
    choose("The metric", metric, METRICS)
    generator = torch.Generator().manual_seed(seed)
    edges = _sample(circuit.kept.nonzero(), most, generator)
    others = _sample(_edges_to_let_in(circuit).nonzero(), draws, generator)
    if not len(edges) or not len(others):
        raise CircuitError(
            f"{circuit!r} keeps {'every' if len(edges) else 'no'} edge between its nodes: there is none to "
            f"{'compare with' if len(edges) else 'test'}."
        )
    cuts = make_ablation(model, task, ablation or circuit.ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    flipped = torch.cat([edges, others])
    with track(progress, len(flipped), "minimality") as step:
        changes = _changes(model, circuit.kept, flipped, loss, cuts, step)
    kept = np.arange(len(flipped)) < len(edges)
    cost = np.where(kept, changes, -changes)
    below = (cost[None, ~kept] > cost[:, None]).mean(1)
    names = [model.graph.edge_name(row, column).split("->") for row, column in flipped.tolist()]
    frame = pd.DataFrame(names, columns=["sender", "receiver"]).assign(
        kept=kept, cost=cost, below=np.where(kept, below, np.nan)
    )
    return frame.sort_values(["kept", "cost"], ascending=[False, True], kind="stable").reset_index(drop=True)


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


def _share(gained: np.ndarray, possible: np.ndarray, axis: int = -1) -> np.ndarray:
    """How much of what can be gained over the empty circuit is gained, in the mean over facts."""
    return gained.mean(axis) / possible.mean(axis)


def _points(curve: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    if len(curve) < 2:
        raise SettingError("An area needs a curve of at least two fractions.")
    ordered = curve.sort_values("fraction")
    return ordered["faithfulness"].to_numpy(float), ordered["fraction"].to_numpy(float)


def _sample(edges: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """All rows, or `most` of them at random, in their order."""
    return edges[torch.randperm(len(edges), generator=generator)[:most].sort().values]


def _edges_to_let_in(circuit: Circuit) -> Bool[Tensor, "S R"]:
    """The edges between the circuit's nodes, `input` and `logits` that it does not keep."""
    graph, matrix = circuit.graph, circuit.without_dangling().node_matrix
    inside = torch.from_numpy(matrix.sum(0) + matrix.sum(1) > 0)
    inside[0] = inside[-1] = True
    return graph.exists & ~circuit.kept & inside[:-1, None] & inside[graph.receiver_node][None, :]


@torch.no_grad()
def _changes(
    model: Model, kept: Bool[Tensor, "S R"], edges: Tensor, loss: Loss, cuts: Ablation, step: Callable[..., None]
) -> np.ndarray:
    """By how much the circuit's loss grows when one edge alone is flipped: cut if it is kept, let in if it is not.

    All edges into one receiver are evaluated in batches: the receiver's input changes by the sender's difference,
    and only what that reaches in the circuit is computed anew.
    """
    network, graph = model.network, model.graph
    ablated = cuts.values(loss.prompts)
    current = Current(network, loss, ablated, kept.to(network.device))
    before = float(loss(network.logits(current.residual[None])))
    changes = np.zeros(len(edges))
    for column in edges[:, 1].unique().tolist():
        where = (edges[:, 1] == column).nonzero()[:, 0]
        node = int(graph.receiver_node[column])
        if node < graph.n_senders and current.need(node) is Need.NOWHERE:
            step(len(where))
            continue
        everywhere = node < graph.n_senders and (
            current.need(node) is Need.EVERYWHERE or graph.receiver_names[column].endswith(("<k>", "<v>"))
        )
        plan = current.plan(node) if node < graph.n_senders else None
        read = current.reads(column, everywhere)
        logit_bytes = 4 * loss.prompts.answers.numel() * network.d_vocab
        size = max(1, min(_ROWS // read[..., 0].numel(), _LOGIT_BYTES // logit_bytes))
        for part in where.split(size):
            rows = edges[part, 0]
            delivered = current.outputs[rows] if ablated is None else current.outputs[rows] - ablated[rows]
            sign = torch.where(kept[rows, column].cpu(), -1.0, 1.0).to(delivered)[:, None, None, None]
            reads = read + sign * current.at(delivered, everywhere)
            if plan is None:
                after = loss(network.logits(reads))
            else:
                after = current.loss_after(plan, current.node_output(column, reads))
            changes[part.numpy()] = after.double().cpu().numpy() - before
            step(len(part))
    return changes
