"""ROME (arXiv 2202.05262): one fact as one rank-one change of one MLP's down-projection.

Let k be the down-projection's input and m the MLP's output, both at the subject's last token in layer l*.

1. k* is the mean of k over the prompt with and without prefixes that the model made up; u = C⁻¹k*, normalised.
2. v* = m + δ, where δ minimises the mean loss of the new object over all prefixes, plus a KL divergence that keeps what
   the subject is ("{s} is a"), plus a decay of (‖δ‖/‖m‖)²; ‖δ‖ is projected to at most c‖m‖ after every step of Adam.
3. W gains r uᵀ with r = (v* - W k*)/(k*·u), so that k* is now mapped to v* (r-ROME, arXiv 2403.07175). ROME's authors'
   code has the prompt's own k in place of k* here, but not in step 1.

Only what δ reaches is run at each step (`kcwb.editing.partial_runs.Tail`): later layers, positions from the subject's
last token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kcwb.editing.covariance import OPENINGS, covariance, sample_texts, whiten
from kcwb.editing.methods.base import Descent, EditMethod, Fit, Request, descend
from kcwb.editing.partial_runs import Rows, answer_logits, answer_nll, make_rows, make_tail, read_places
from kcwb.editing.writing import text_digest, writer
from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.progress import Progress
from kcwb.settings import Natural, NotNegative
from kcwb.tasks.relations import Fact
from kcwb.verbs import noun

#: The prompt whose next-token distribution at the subject is to stay.
ESSENCE = "{} is a"
_PREFIX_LENGTHS = (5, 10)


@noun
@dataclass(frozen=True)
class DeltaSettings(Descent):
    """What the search for δ depends on; δ's norm is at most `clamp` times that of what it is added to.

    Attributes
    ----------
    decay, kl
        Weights of the decay and of the KL divergence in the loss.
    penalty
        What the decay weighs: `square`, (‖δ‖/‖m‖)², m being what δ is added to; or `norm`, ‖δ‖/‖m‖², as the authors'
        code has it, for which their values are.
    prefixes
        How many prefixes the model makes up, half of them of 5 tokens and half of 10.
    covariance
        `text`, or `identity` for C = I.
    """

    decay: NotNegative = 1e-3
    penalty: Literal["square", "norm"] = "square"
    kl: NotNegative = 0.0625
    prefixes: Natural = 20
    covariance: Literal["text", "identity"] = "text"


@noun
@dataclass(frozen=True)
class RomeSettings(DeltaSettings):
    """What ROME depends on.

    Attributes
    ----------
    ridge
        λ: C, where it is of text, gains λ·tr(C)/d·I. Without it C is singular where no text wakes some of the units, as
        happens with ReLUs.
    key
        Where the constraint holds: at `mean`, k* (r-ROME, arXiv 2403.07175); or at `prompt`, the key of the prompt
        itself, as ROME's authors' code has it, beside u of k*: that mixture is what makes models collapse after some
        edits.
    """

    ridge: NotNegative = 0.01
    key: Literal["mean", "prompt"] = "mean"


def rome(
    model: Model, requests: Sequence[Request], layer: int, settings: RomeSettings, seed: int, progress: Progress
) -> Fit:
    """Fit a ROME edit; see the module's text."""
    network, (request,) = model.network, requests
    # 1. k*, and the direction u
    (contexts,) = all_contexts(model, requests, settings.prefixes, seed)
    rows = make_rows(model, [(request.wanted, context) for context in contexts])
    found = read_places(network, rows.tokens, rows.subjects, [layer])[layer]
    mean, first = found.key.float().mean(0), found.output[0].float()
    details: dict[str, Any] = {"prefixes": [c.removesuffix(request.template).strip() for c in contexts[1:]]}
    direction = mean
    if settings.covariance == "text":
        about = covariance(model, layer, seed=seed, progress=progress)
        direction = whiten(about.matrix, mean, settings.ridge)
        details["direction_agreement"] = about.agreement(mean, settings.ridge)
    # 2. v*
    what = f"ROME, layer {layer}"
    delta, losses = optimise_delta(model, contexts, request.wanted, layer, first.norm(), settings, progress, what)
    value = first + delta
    # 3. the change that maps the one to the other
    place = found.key[0].float() if settings.key == "prompt" else mean
    change = rank_one(direction, place, value - mapped(network, layer, place))
    return Fit(
        {layer: change}, losses, losses[-1]["loss"], [contexts], mean[None], value[None], {layer: place[None]}, details
    )


def mapped(network: Network, layer: int, key: Float[Tensor, "*n M"]) -> Float[Tensor, "*n D"]:
    """What a down-projection makes of a key, computed in the key's precision."""
    weights = network.layers[layer]
    output = key @ weights.W_out.to(key.dtype)
    return output if weights.b_out is None else output + weights.b_out.to(key.dtype)


def rank_one(
    direction: Float[Tensor, " M"], key: Float[Tensor, " M"], change: Float[Tensor, " D"]
) -> Float[Tensor, "M D"]:
    """The multiple of u rᵀ that changes what `key` is mapped to by `change`, u the direction; orientation as in W_out.

    With u = C⁻¹key this is the least change, in the norm that C gives, of a map that is to send `key` elsewhere.
    """
    u = F.normalize(direction.double(), dim=0)
    return torch.outer(u, change.double() / (key.double() @ u)).to(change.dtype)


def all_contexts(model: Model, requests: Sequence[Request], n: int, seed: int) -> list[list[str]]:
    """The `context_templates` of each request.

    Raises
    ------
    DataError
        If a prompt does not fit into the context: by itself (seen before any text is made up), or after a prefix.
    """
    make_rows(model, [(one.wanted, text) for one in requests for text in (one.template, ESSENCE)])
    found = [context_templates(model, one.template, n, seed) for one in requests]
    try:
        make_rows(model, [(one.wanted, text) for one, texts in zip(requests, found, strict=True) for text in texts])
    except DataError as error:
        raise DataError(
            f"{error} That is after a prefix of {max(_PREFIX_LENGTHS)} tokens; take prefixes=0 or a shorter template."
        ) from error
    return found


def context_templates(model: Model, template: str, n: int, seed: int) -> list[str]:
    """The template, and the template after n short texts that the model made up."""
    wanted = (text_digest(model), writer(model), n, seed)
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
    model: Model, contexts: Sequence[str], wanted: Fact, layer: int, scale: Tensor, settings: DeltaSettings,
    progress: Progress, what: str,
) -> tuple[Float[Tensor, " D"], list[dict[str, float]]]:  # fmt: skip
    """The δ that makes the target likely, and the losses of every step; `scale` is the norm that δ is measured by."""
    network = model.network
    rows = make_rows(model, [(wanted, context) for context in (*contexts, ESSENCE)])
    tail = make_tail(network, rows, layer, rows.subjects)
    prompts = Rows(*(values[:-1] for values in rows))
    delta = torch.zeros(network.d_model, device=model.device, requires_grad=True)
    rest = torch.zeros_like(tail.after[:, 1:])  # δ is added at the tail's first position, the subject's last token
    reference: list[Tensor] = []  # what the essence is before the first step

    def measure() -> dict[str, Tensor]:
        first = delta.to(network.dtype).expand(len(rest), 1, -1)
        final = tail.run(torch.cat([first, rest], 1))
        nll = answer_nll(answer_logits(network, tail, final, prompts), prompts).mean()
        essence = network.logits(final[-1, 0]).float().log_softmax(-1)
        if not reference:
            reference.append(essence.detach())
        kl = (essence.exp() * (essence - reference[0])).sum()
        decay = delta.square().sum() / scale**2 if settings.penalty == "square" else delta.norm() / scale**2
        loss = nll + settings.kl * kl + settings.decay * decay
        return {"loss": loss, "nll": nll, "kl": kl, "norm": delta.norm() / scale}

    def clamp() -> None:
        delta.mul_((settings.clamp * scale / delta.norm().clamp_min(1e-12)).clamp_max(1.0))

    losses = descend(delta, settings, measure, clamp, progress, what)
    return delta.detach(), losses


ROME = EditMethod("rome", rome, RomeSettings)
