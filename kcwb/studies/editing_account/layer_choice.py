"""Does a fact's own circuit tell the layer to edit: layers chosen by circuits, against others, on the same edits.

Knowledge Circuits (arXiv 2405.17969) leaves open whether circuits make better edits. ROME writes at the subject what
mover heads then carry to the answer, so that the circuit has a proposal: **the last MLP that a mover reads**, where
what is written still reaches it (after CaKE, arXiv 2503.16356). Here it is taken from an ensemble of the fact's
circuits:

1. the relation's mover heads, found on other facts too (`kcwb.reading.roles.strongest_movers`);
2. the edges' scores for the fact alone, in each of the relation's wordings, by the default method;
3. draws of its circuit: a wording, half to twice as many edges, signed or absolute scores
   (`kcwb.studies.fact_circuits`);
4. pi of layer l: the largest share of draws that keep the edge from its MLP to a mover's value. Chosen is the last
   layer with a pi of at least `confidence`; where there is none, the one of the largest pi.

A mover is a head whose contribution comes from the subject, so what its value reads there is what counts; edges do not
say at which position they act.

`compare_layers` makes the same edits at the layers of several choices, each with the same settings, and compares the
scores pair by pair.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.discovery.methods import METHODS, check_size
from kcwb.discovery.registry import DEFAULT
from kcwb.editing.cases import EditCase
from kcwb.editing.scores import SCORES, edit_scores
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.roles import strongest_movers
from kcwb.settings import Count, Natural, Seed, Share
from kcwb.statistics import mean_interval
from kcwb.studies.fact_circuits import fact_draws, fact_ensemble
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import Task, make_task
from kcwb.verbs import verb

_FLIPS = 9999  # of signs, in a test of paired differences (fewer pairs than 14: all of them)


@verb
def circuit_layers(
    model: Model,
    cases: Sequence[EditCase],
    *,
    edges: Count = 300,
    draws: Count = 50,
    confidence: Share = 0.5,
    movers: Count = 10,
    n: Count = 8,
    wordings: Count = 3,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """The layer that each fact's own circuit proposes for its edit.

    Parameters
    ----------
    model, cases
        The unedited model, and edits (their relation is needed: its facts tell the mover heads).
    edges
        About how many edges a draw has; half to twice as many are drawn.
    draws
        Circuits of each fact.
    confidence
        The pi that an edge into a mover's value needs.
    movers, n
        How many mover heads of each relation, and on how many of its facts they are found.
    wordings
        In how many of the relation's templates, the edited one first, a fact is asked.

    Returns
    -------
    DataFrame
        One row per case: `case`, `relation`, `subject`; `layer`; `pi` of its edge to `mover`; `sure`, whether that
        reaches `confidence`; `seconds`. `layer` is -1 where no draw keeps an edge from an MLP to a mover's value, and
        where the relation has no mover.

    Raises
    ------
    SettingError
        If there are no cases, or the graph has fewer edges.
    DataError
        If a fact cannot be asked.
    """
    if not cases:
        raise SettingError("cases=[]: give at least one edit, of kcwb.edit_cases.")
    check_size(model.graph, edges, model.name)
    keys = [(case.relation, case.template) for case in cases]
    first = {key: make_task(model, key[0], n=n, seed=seed, template=key[1]) for key in dict.fromkeys(keys)}
    for key, case in zip(keys, cases, strict=True):
        encode(model, [case.fact], case.template, first[key].relation.objects)
    tasks: dict[tuple[str, str], tuple[list[_Wording], list[str]]] = {}
    rows = []
    with track(progress, len(cases), "layers by circuits") as step:
        for i, case in enumerate(cases):
            key = keys[i]
            if key not in tasks:
                tasks[key] = _asked_so(model, case, first[key], movers, wordings)
            worded, names = tasks[key]
            row = {"case": i, "relation": case.relation, "subject": case.fact.subject}
            pi = _reading(model, case.fact, worded, names, edges, draws, seed + i)
            rows.append({**row, **_chosen(pi, names, confidence)})
            step(note=case.fact.subject)
    return pd.DataFrame(rows)


class _Wording(NamedTuple):
    """One of the relation's templates, and what cut edges deliver there."""

    template: str
    objects: tuple[str, ...]
    cuts: Ablation


def _asked_so(model: Model, case: EditCase, task: Task, movers: int, wordings: int) -> tuple[list[_Wording], list[str]]:
    """Some wordings of the relation, the edited one first, and its mover heads."""
    others = [text for text in task.relation.prompt_templates_zs if text != case.template]
    tasks = [task]
    for text in others[: wordings - 1]:
        with contextlib.suppress(DataError):  # the model knows none of the facts in these words
            tasks.append(make_task(model, case.relation, n=task.n, seed=task.seed, template=text))
    worded = [_Wording(one.template, one.relation.objects, make_ablation(model, one, "mean")) for one in tasks]
    try:
        return worded, strongest_movers(model, task, movers, task.seed)
    except DataError:
        return worded, []


def _reading(
    model: Model, fact: Fact, worded: Sequence[_Wording], movers: Sequence[str], edges: int, draws: int, seed: int
) -> Float[Tensor, "layers movers"]:
    """The share of draws of the fact's circuit in which each mover's value reads each layer's MLP."""
    if not movers:
        return torch.zeros(model.graph.n_layers, 0)
    method, scores = METHODS[DEFAULT], []
    for one in worded:
        try:
            loss = make_loss(model, encode(model, [fact], one.template, one.objects))
        except DataError:  # the answer cannot be told apart in these words
            if one is worded[0]:
                raise
            continue
        scores.append(method.function(model, loss, one.cuts, **method.own))
    graph = model.graph
    pi = fact_ensemble(graph, scores, fact_draws(graph, edges, draws, len(scores), seed), {}).inclusion
    mlps = [[graph.mlp_sender(layer)] for layer in range(graph.n_layers)]
    return pi[mlps, [graph.receiver_names.index(f"{name}<v>") for name in movers]]


def _chosen(pi: Float[Tensor, "layers movers"], movers: Sequence[str], confidence: float) -> dict[str, Any]:
    """The last layer that is sure, or the surest."""
    if not bool((pi > 0).any()):
        return {"layer": -1, "pi": 0.0, "mover": "", "sure": False}
    of_layer, mover = pi.max(1)
    sure = (of_layer >= confidence - 1e-9).nonzero()[:, 0]
    layer = int(sure[-1]) if len(sure) else int(of_layer.argmax())
    return {"layer": layer, "pi": float(of_layer[layer]), "mover": movers[int(mover[layer])], "sure": len(sure) > 0}


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """The same edits at the layers of several choices; made by `compare_layers`.

    Attributes
    ----------
    scores
        One row per case and choice: `choice`, `layer`, and what `edit_scores` says of the edit; before them one per
        case of the unedited model, `choice` being `unedited` and `layer` -1.
    paired
        One row per other choice and score: `choice`, `score`; `n` cases that both have the score of; `own`, `other`,
        the means of the first choice and of this one; `difference`, own less other, with its 95% bootstrap interval
        `low` to `high` over cases; `same`, the share of cases in which both take the same layer; `p`, two-sided, of
        flipped signs, not corrected for the number of rows.
    """

    scores: pd.DataFrame
    paired: pd.DataFrame


@verb
def compare_layers(
    model: Model,
    cases: Sequence[EditCase],
    choices: Mapping[str, Natural | Sequence[Natural]],
    method: str = "rome",
    *,
    seed: Seed = 0,
    progress: Progress = True,
    **settings: Any,
) -> LayerComparison:
    """Make every edit at each choice's layer, and compare the first choice with the others, pair by pair.

    Parameters
    ----------
    model, cases
        The model, and at least two edits.
    choices
        Name -> a layer, or one for each case. The first is compared with all others.
    method, settings
        As in `kcwb.edit`, the same for all choices; also `tokens` of `edit_scores`. An edit that two choices have in
        common is made once.
    progress
        Reported per edit.

    Raises
    ------
    SettingError
        If there are fewer than two cases or choices, a choice has another number of layers than there are cases, or a
        layer is not the model's.
    """
    if len(cases) < 2 or len(choices) < 2:
        raise SettingError(f"{len(cases)} cases and {len(choices)} choices: a comparison takes at least two of each.")
    layers = {
        name: [one] * len(cases) if isinstance(one, int) else [int(layer) for layer in one]
        for name, one in choices.items()
    }
    for name, of_case in layers.items():
        if len(of_case) != len(cases):
            raise SettingError(f"The choice {name!r:.60} has {len(of_case)} layers for {len(cases)} cases.")
        wrong = next((layer for layer in of_case if not 0 <= layer < model.graph.n_layers), None)
        if wrong is not None:
            raise SettingError(
                f"The choice {name!r:.60} has the layer {wrong}; {model.name} has layers 0 to "
                f"{model.graph.n_layers - 1}."
            )
    edits = sorted({(layer, i) for of_case in layers.values() for i, layer in enumerate(of_case)})
    table = edit_scores(
        model, [cases[i] for _, i in edits], method, layer=[layer for layer, _ in edits], seed=seed, progress=progress,
        **settings,
    )  # fmt: skip
    found, rows = table.to_dict("records"), {}
    for (layer, i), before, after in zip(edits, found[::2], found[1::2], strict=True):
        rows[layer, i] = after | {"case": i}
        rows.setdefault((-1, i), before | {"case": i})
    named = {"unedited": [-1] * len(cases), **layers}
    at = [(name, layer, i) for name, of_case in named.items() for i, layer in enumerate(of_case)]
    scores = pd.DataFrame([{"choice": name, "layer": layer, **rows[layer, i]} for name, layer, i in at])
    return LayerComparison(scores, _paired(scores, list(choices), seed))


def _paired(scores: pd.DataFrame, choices: Sequence[str], seed: int) -> pd.DataFrame:
    """The first choice less each of the others."""
    of = {name: part.set_index("case") for name, part in scores.groupby("choice", sort=False)}
    first, rows = of[choices[0]], []
    for name in choices[1:]:
        same = float((first["layer"] == of[name]["layer"]).mean())
        for score in SCORES:
            both = pd.DataFrame({"own": first[score], "other": of[name][score]}).astype(float).dropna()
            difference = (both["own"] - both["other"]).to_numpy()
            low, high = mean_interval(difference, seed)
            mean = difference.mean() if len(both) else np.nan
            rows.append((name, score, len(both), *both.mean(), mean, low, high, same, flipped_p(difference, seed)))
    columns = ["choice", "score", "n", "own", "other", "difference", "low", "high", "same", "p"]
    return pd.DataFrame(rows, columns=columns)


def flipped_p(differences: Float[np.ndarray, " n"], seed: int) -> float:
    """Two-sided: the share of flips of signs, the own among them, in which the mean is as far from 0. NaN for none."""
    if len(differences) < 2:
        return np.nan
    if not np.any(differences):
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stats.permutation_test(
            (differences,), lambda some, axis: some.mean(axis), permutation_type="samples", vectorized=True,
            n_resamples=_FLIPS, rng=np.random.default_rng(seed),
        )  # fmt: skip
    return float(found.pvalue)
