"""How a model, and a circuit alone, answer without some nodes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from kcwb.circuits.ablation import Ablation, AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.errors import SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count
from kcwb.statistics import proportion_interval
from kcwb.tasks.metrics import answer_probabilities, answer_ranks, make_loss
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb


@verb
def ablate_nodes(
    model: Model,
    circuit: Circuit | None,
    task: Task,
    nodes: Sequence[str],
    *,
    ablation: str | AblationKind | None = None,
    k: Count = 10,
    progress: Progress = True,
) -> pd.DataFrame:
    """How well the model, and a circuit alone, answer each fact before and after nodes are ablated.

    A node is ablated by cutting all of its outgoing edges, at every position.

    Parameters
    ----------
    model, circuit, task
        The full model is always run; the circuit too, unless it is None.
    nodes
        Senders: `input`, heads and MLPs.
    ablation
        What cut edges deliver, the circuit's and the nodes'; None for what the circuit was found with (`mean` without
        a circuit).
    k
        An answer counts as a hit when its rank is at most k.
    progress
        Reported per run.

    Returns
    -------
    DataFrame
        One row per run (`full model`, `circuit`), state (`before`, `after`), split (`D_val`, `D_test`) and fact:
        `prompt`, `answer`; `rank` and `probability` of the answer up to the token that decides (`kcwb.tasks.ranks`);
        `loss` (nll of the whole answer, nats); `hit`. `ablation_summary` takes means.

    Raises
    ------
    CircuitError
        If a node is not a sender of the model, or the circuit belongs to another model.
    SettingError
        If no node is named, `k` is below 1, or the ablation is not known.
    """
    if not nodes:
        raise SettingError(f"nodes={nodes!r}: give a list of at least one node, for example ['a0.h0'].")
    rows = [model.graph.sender_index(node) for node in nodes]
    if circuit is not None:
        check_same_model(model, circuit)
    check_same_weights(model, task)
    cuts = make_ablation(model, task, ablation or (circuit.ablation if circuit else "mean"))
    splits = cuts.splits(task)
    gone = torch.zeros_like(model.graph.exists)
    gone[rows] = True
    runs = {("full model", "before"): None, ("full model", "after"): model.graph.exists & ~gone}
    if circuit is not None:
        runs |= {("circuit", "before"): circuit.kept, ("circuit", "after"): circuit.kept & ~gone}
    tables = []
    with track(progress, len(runs) * len(splits), "ablation") as step:
        for ((run, state), kept), (split, prompts) in itertools.product(runs.items(), splits.items()):
            answers = _answers(model, kept, prompts, cuts, k)
            tables.append(answers.assign(run=run, state=state, split=split))
            step()
    columns = ["run", "state", "split", "prompt", "answer", "rank", "probability", "loss", "hit"]
    return pd.concat(tables, ignore_index=True)[columns]


@verb
def ablation_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means of the table of `ablate_nodes` over facts.

    Returns
    -------
    DataFrame
        One row per run, split and state, in the table's order: number of facts `n`; `hit`, the share of them, with its
        95% Wilson interval `low` to `high`; median `rank`, mean `probability` and `loss`.
    """
    groups = dict(iter(table.groupby(["run", "split", "state"])))
    order = [dict.fromkeys(table[name]) for name in ("run", "split", "state")]
    rows = []
    for run, split, state in itertools.product(*order):
        part = groups[run, split, state]
        low, high = proportion_interval(part["hit"])
        middle = {"rank": part["rank"].median(), "probability": part["probability"].mean(), "loss": part["loss"].mean()}
        key = {"run": run, "split": split, "state": state, "n": len(part)}
        rows.append({**key, "hit": part["hit"].mean(), "low": low, "high": high, **middle})
    return pd.DataFrame(rows)


def _answers(model: Model, kept: Bool[Tensor, "S R"] | None, prompts: Prompts, cuts: Ablation, k: int) -> pd.DataFrame:
    """How a run answers each prompt."""
    logits = run_circuit(model, kept, prompts, cuts)
    ranks = answer_ranks(logits, prompts)
    return pd.DataFrame(
        {
            "prompt": prompts.texts,
            "answer": [fact.object for fact in prompts.facts],
            "rank": ranks.tolist(),
            "probability": answer_probabilities(logits, prompts).tolist(),
            "loss": make_loss(model, prompts, "nll").per_prompt(logits).tolist(),
            "hit": (ranks <= k).tolist(),
        }
    )
