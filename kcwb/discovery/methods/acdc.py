"""`acdc`: greedy pruning, one edge at a time, by `kcwb.discovery.acdc`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.acdc import Search, acdc, predict_seconds
from kcwb.discovery.checkpoint import usual_path
from kcwb.discovery.registry import Method, Pruning
from kcwb.discovery.sequential import Pruned
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Positive, Seed
from kcwb.tasks.metrics import Loss, kc_scale


def pruning(search: Search, pruned: Pruned) -> Pruning:
    """What a search found, for a circuit and its provenance."""
    report = {"loss": pruned.loss, "evaluations": pruned.evaluations, "near_ties": pruned.near_ties}
    if search.loss.metric == "nll":
        report["tau_kc"] = search.tau / kc_scale(search.loss.prompts)
    heads = "last to first" if search.drawn_from is None else f"of a layer as drawn from {search.drawn_from}"
    report["order"] = f"output to input; heads {heads}; v, k, q"
    return Pruning(pruned.kept, pruned.increases, report)


def prune(
    model: Model,
    loss: Loss,
    ablation: Ablation,
    *,
    tau: Positive = 0.01,
    absolute: bool = False,
    within: Circuit | str | None = None,
    order: Seed | None = None,
    checkpoint: str | Path | bool = True,
    progress: Progress = False,
) -> Pruning:
    """The method; settings as in `kcwb.discover`, which has made a circuit of a `within` that is a text."""
    assert not isinstance(within, str)
    search = Search(model, loss, ablation, tau=tau, absolute=absolute, within=within, order=order)
    path = None if checkpoint is False else usual_path(search) if checkpoint is True else Path(checkpoint)
    return pruning(search, acdc(search, progress=progress, checkpoint=path))


def _seconds(model: Model, loss: Loss, ablation: Ablation, *, checkpoint: Any, **settings: Any) -> float:
    return predict_seconds(Search(model, loss, ablation, **settings))


ACDC = Method(
    "acdc", prune, "zero", prunes=True, seconds=_seconds, unrecorded=("checkpoint",), varied=("tau", "absolute")
)
