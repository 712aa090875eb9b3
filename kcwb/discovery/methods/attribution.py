"""`eap`, `eap-ig`, `eap-ig-activations`, `ceap`, `gim` and `relp`, by `kcwb.discovery.attribution`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.discovery.attribution import (
    STEPS,
    activation_scores,
    attribution_scores,
    conductance_by_fact,
    conductance_scores,
    scores_by_fact,
)
from kcwb.discovery.registry import Method
from kcwb.errors import SettingError
from kcwb.models import rules
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Count
from kcwb.tasks.metrics import Loss


def eap(model: Model, loss: Loss, ablation: Ablation, *, progress: Progress = False) -> Float[Tensor, "S R"]:
    """The gradient at the clean run alone."""
    return attribution_scores(model, loss, ablation, progress=progress)


def eap_ig(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = STEPS, progress: Progress = False
) -> Float[Tensor, "S R"]:
    """The gradient averaged over points between the ablated and the clean embedding."""
    return attribution_scores(model, loss, ablation, steps=steps, progress=progress)


def gim(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = STEPS, progress: Progress = False
) -> Float[Tensor, "S R"]:
    """Gradient interaction modifications, arXiv 2505.17630 (there `steps=1`), averaged over points as in `eap_ig`."""
    return attribution_scores(model, loss, ablation, steps=steps, rules=rules.GIM, progress=progress)


def relp(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = 1, progress: Progress = False
) -> Float[Tensor, "S R"]:
    """Relevance patching, arXiv 2508.21258; with more steps, averaged as in `eap_ig`."""
    return attribution_scores(model, loss, ablation, steps=steps, rules=rules.RELP, progress=progress)


def _refuse(metric: str, settings: Mapping[str, Any]) -> None:
    """SettingError for `kl` where its gradient is taken at the clean run alone: there KL is at its minimum."""
    if metric == "kl" and settings.get("steps", 1) < 2:
        which = "An integral with a single step" if "steps" in settings else "eap"
        raise SettingError(
            f"{which} takes the gradient at the full model, where that of kl is zero: its scores would be rounding. "
            "Use eap-ig with at least 2 steps, or another metric."
        )


EAP = Method("eap", eap, refuse=_refuse, by_fact=scores_by_fact)
EAP_IG = Method("eap-ig", eap_ig, refuse=_refuse, by_fact=scores_by_fact)
EAP_IG_ACTIVATIONS = Method("eap-ig-activations", activation_scores, refuse=_refuse)
CEAP = Method("ceap", conductance_scores, by_fact=conductance_by_fact)
GIM = Method("gim", gim, refuse=_refuse, by_fact=partial(scores_by_fact, rules=rules.GIM))
RELP = Method("relp", relp, refuse=_refuse, by_fact=partial(scores_by_fact, rules=rules.RELP))
