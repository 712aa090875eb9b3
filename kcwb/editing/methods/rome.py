"""ROME (arXiv 2202.05262): one fact as one rank-one change of one MLP's down-projection.

Let k be the down-projection's input and m the MLP's output, both at the subject's last token in layer l*.

1. k* is the mean of k over the prompt with and without prefixes that the model made up; u = C⁻¹k*, normalised.
2. v* = m + δ, where δ minimises the mean loss of the new object over all prefixes, plus a KL divergence that keeps what
   the subject is ("{s} is a"), plus a decay of (‖δ‖/‖m‖)²; ‖δ‖ is projected to at most c‖m‖ after every step of Adam.
3. W gains r uᵀ with r = (v* - W k)/(k·u), so that k is now mapped to v*.

Only what δ reaches is run at each step (`kcwb.editing.partial_runs.Tail`): later layers, positions from the subject's
last token on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kcwb.editing.covariance import OPENINGS, covariance, sample_texts, whiten
from kcwb.editing.partial_runs import Rows, Tail, answer_logits, answer_nll, make_rows, make_tail, read_places
from kcwb.editing.writing import writer
from kcwb.errors import DataError, choose
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, NotNegative, Positive
from kcwb.tasks.relations import Fact
from kcwb.verbs import noun

#: The prompt whose next-token distribution at the subject is to stay.
ESSENCE = "{} is a"
_PREFIX_LENGTHS = (5, 10)


@noun
@dataclass(frozen=True)
class DeltaSettings:
    """What the search for δ depends on.

    Attributes
    ----------
    steps, lr
        Of Adam on δ.
    clamp
        c: δ's norm is at most this many times that of what it is added to.
    decay, kl
        Weights of the decay and of the KL divergence in the loss.
    penalty
        What the decay weighs: `square`, (‖δ‖/‖m‖)², m being what δ is added to; or `norm`, ‖δ‖/‖m‖², as the authors'
        code has it, for which their values are.
    stop
        The loss below which optimisation ends.
    prefixes
        How many prefixes the model makes up, half of them of 5 tokens and half of 10.
    covariance
        `text`, or `identity` for C = I.
    ridge
        λ: C, where it is of text, gains λ·tr(C)/d·I. Without it C is singular where no text wakes some of the units, as
        happens with ReLUs.
    """

    steps: Count = 25
    lr: Positive = 0.5
    clamp: Positive = 4.0
    decay: NotNegative = 1e-3
    penalty: str = "square"
    kl: NotNegative = 0.0625
    stop: NotNegative = 0.05
    prefixes: Natural = 20
    covariance: str = "text"
    ridge: NotNegative = 0.01

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        choose("The covariance", self.covariance, ("text", "identity"))
        choose("The penalty", self.penalty, ("square", "norm"))


@noun
@dataclass(frozen=True)
class RomeSettings(DeltaSettings):
    """What ROME depends on.

    Attributes
    ----------
    key
        Where the constraint holds: at `prompt`, the key of the prompt itself, as the authors' code has it; or at
        `mean`, k*, which keeps edits from collapsing (r-ROME).
    """

    key: str = "prompt"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        choose("The key", self.key, ("prompt", "mean"))


class Fit(NamedTuple):
    """What an editor finds; no weight has been touched.

    Attributes
    ----------
    deltas
        Layer -> `[M, D]`, the change of the MLP's down-projection.
    losses
        One record per step (and request).
    keys, values
        `[n, M]`, `[n, D]`: k* and v* of each request; None for fine-tuning.
    objective
        The loss after the last step, the worst of all requests.
    contexts
        Of each request the template, and the template with prefixes.
    details
        What else is worth keeping.
    """

    deltas: dict[int, Float[Tensor, "M D"]]
    losses: list[dict[str, float]]
    keys: Float[Tensor, "n M"] | None
    values: Float[Tensor, "n D"] | None
    objective: float
    contexts: list[list[str]]
    details: dict[str, Any]


def rome(
    model: Model, fact: Fact, target: str, template: str, layer: int, settings: RomeSettings, seed: int,
    progress: Progress = False,
) -> Fit:  # fmt: skip
    """Fit a ROME edit; see the module's text, and `kcwb.editing.edit.edit` for the parameters."""
    network, asked = model.network, Fact(fact.subject, target)
    (contexts,) = all_contexts(model, [(asked, template)], settings.prefixes, seed)
    rows = make_rows(model, [(asked, context) for context in contexts])
    found = read_places(network, rows.tokens, rows.subjects, [layer])[layer]
    mean, first = found.key.float().mean(0), found.output[0].float()
    delta, losses = optimise_delta(
        model, contexts, fact.subject, target, layer, first.norm(), settings, progress, what=f"ROME, layer {layer}"
    )
    value, place = first + delta, found.key[0] if settings.key == "prompt" else mean.to(network.dtype)
    details: dict[str, Any] = {"prefixes": [c.removesuffix(template).strip() for c in contexts[1:]]}
    direction = mean
    if settings.covariance == "text":
        about = covariance(model, layer, seed=seed, progress=progress)
        direction = whiten(about.matrix, mean, settings.ridge)
        details["direction_agreement"] = about.agreement(mean, settings.ridge)
    change = rank_one(direction, place, value - network.mlp_output(layer, place)).to(network.dtype)
    return Fit({layer: change}, losses, mean[None], value[None], losses[-1]["loss"], [contexts], details)


def rank_one(
    direction: Float[Tensor, " M"], key: Float[Tensor, " M"], change: Float[Tensor, " D"]
) -> Float[Tensor, "M D"]:
    """The multiple of u rᵀ that changes what `key` is mapped to by `change`, u the direction; orientation as in W_out.

    With u = C⁻¹key this is the least change, in the norm that C gives, of a map that is to send `key` elsewhere.
    """
    u = F.normalize(direction.double(), dim=0)
    return torch.outer(u, change.double() / (key.double() @ u)).to(change.dtype)


def all_contexts(model: Model, asked: Sequence[tuple[Fact, str]], n: int, seed: int) -> list[list[str]]:
    """The `context_templates` of each (fact, template).

    Raises
    ------
    DataError
        If a prompt does not fit into the context: by itself (seen before any text is made up), or after a prefix.
    """
    make_rows(model, [*asked, *((fact, ESSENCE) for fact, _ in asked)])
    found = [context_templates(model, template, n, seed) for _, template in asked]
    try:
        make_rows(model, [(fact, text) for (fact, _), texts in zip(asked, found, strict=True) for text in texts])
    except DataError as error:
        raise DataError(
            f"{error} That is after a prefix of {max(_PREFIX_LENGTHS)} tokens; take prefixes=0 or a shorter template."
        ) from error
    return found


def context_templates(model: Model, template: str, n: int, seed: int) -> list[str]:
    """The template, and the template after n short texts that the model made up."""
    wanted = (model.digest, writer(model), n, seed)
    if wanted not in _PREFIXES:
        texts: list[str] = []
        for i, length in enumerate(_PREFIX_LENGTHS):
            size = n // 2 + (n % 2 if i == 0 else 0)
            openings = [OPENINGS[j % len(OPENINGS)] for j in range(size)]
            sampled = sample_texts(model, openings, length, seed + i, top_k=5) if size else []
            texts += [str(model.tokenizer.decode(ids, skip_special_tokens=True)) for ids in sampled]
        cleaned = [" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts]
        _PREFIXES[wanted] = [text or OPENINGS[0] for text in cleaned]
    return [template, *(f"{prefix}. {template}" for prefix in _PREFIXES[wanted])]


_PREFIXES: dict[tuple[str, str, int, int], list[str]] = {}


def optimise_delta(
    model: Model, contexts: Sequence[str], subject: str, target: str, layer: int, scale: Tensor,
    settings: DeltaSettings, progress: Progress, what: str,
) -> tuple[Float[Tensor, " D"], list[dict[str, float]]]:  # fmt: skip
    """The δ that makes the target likely, and the losses of every step; `scale` is the norm that δ is measured by."""
    network = model.network
    asked = [(Fact(subject, target), context) for context in contexts]
    rows = make_rows(model, [*asked, (Fact(subject, target), ESSENCE)])
    tail = make_tail(network, rows, layer, rows.subjects)
    prompts = Rows(*(values[:-1] for values in rows))
    delta = torch.zeros(network.d_model, device=model.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr)
    reference, losses = None, []
    with torch.enable_grad(), track(progress, settings.steps, what) as step:
        for number in range(settings.steps + 1):
            final = _with_delta(tail, delta)
            nll = answer_nll(answer_logits(network, tail, final, prompts), prompts).mean()
            essence = network.logits(final[-1, 0]).float().log_softmax(-1)
            reference = essence.detach() if reference is None else reference
            kl = (essence.exp() * (essence - reference)).sum()
            decay = delta.square().sum() / scale**2 if settings.penalty == "square" else delta.norm() / scale**2
            loss = nll + settings.kl * kl + settings.decay * decay
            seen = {"loss": loss, "nll": nll, "kl": kl, "norm": delta.norm() / scale}
            losses.append({"step": number, **{name: float(value.detach()) for name, value in seen.items()}})
            value = losses[-1]["loss"]
            if not math.isfinite(value) or value < settings.stop or number == settings.steps:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                delta.mul_((settings.clamp * scale / delta.norm().clamp_min(1e-12)).clamp_max(1.0))
            step(note=f"loss {value:.3f}")
    return delta.detach(), losses


def _with_delta(tail: Tail, delta: Float[Tensor, " D"]) -> Float[Tensor, "N Q D"]:
    """The final stream with δ added at the tail's first position, the subject's last token."""
    n_rows, width = tail.positions.shape
    first = delta.to(tail.after.dtype).expand(n_rows, 1, -1)
    return tail.run(torch.cat([first, torch.zeros_like(tail.after[:, : width - 1])], 1))
