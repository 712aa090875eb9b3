"""Edge attribution: what cutting each edge would cost, to first order, from a few gradients.

Cutting u -> v changes what v reads by (abl_u - a_u), so that to first order the loss M grows by

    score(u -> v) = sum over prompts and positions of (abl_u - a_u) . dM/dx_v

(positive: cutting hurts). `eap` takes the gradient at the clean run (Edge Attribution Patching, arXiv 2310.10348).
`eap-ig` averages it over m points between the ablated and the clean output of `input` (EAP-IG, inputs, arXiv
2403.17806): abl + k/m (clean - abl) for k = 1..m.

It needs an ablation that leaves the stream's scale alone. Under `zero`, abl_u - a_u = -a_u, and a layer norm does not
feel a change of its input's scale: the scores into one receiver sum to zero, and those of `input` into the first layer
vanish one by one. So `mean` is attribution's default.

1. Run the clean prompts: every sender's a_u; and take abl_u from the ablation.
2. Run the interpolated prompts, all steps in one batch; differentiate by every receiver's input.
3. One matrix product per layer between the senders' differences and the receivers' gradients.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.errors import SettingError
from kcwb.models.forward import forward, prompt_chunks
from kcwb.models.loading import Model
from kcwb.models.network import Network
from kcwb.progress import Progress, cancel_point, track
from kcwb.tasks.metrics import Loss, at_answers

#: Stacks of all receivers' inputs that a differentiated pass holds, in stacks of all senders' outputs; and twice that,
#: so that a chunk of prompts ends within a second or so on two cores, and progress is seen.
_COPIES_PER_STEP = 24


def attribution_scores(
    model: Model, loss: Loss, ablation: Ablation, *, steps: int = 1, progress: Progress = False
) -> Float[Tensor, "S R"]:
    """Score every edge by attribution.

    Parameters
    ----------
    model
        The model.
    loss
        The metric, on prompts that the ablation is defined on.
    ablation
        What a cut edge would deliver.
    steps
        Points of the integral; 1 is `eap` (the clean run alone).
    progress
        Reported per chunk of prompts.

    Returns
    -------
    Tensor
        `[S, R]` float32 on the CPU, in the loss's units; 0 where there is no edge.
    """
    if steps < 1:
        raise SettingError(f"steps={steps}: the integral needs at least one point.")
    network, prompts = model.network, loss.prompts
    scores = torch.zeros(model.graph.exists.shape, device=model.device)
    with track(progress, len(prompts), "attribution") as step:
        for rows in prompt_chunks(network, prompts.tokens, copies=_COPIES_PER_STEP * steps):
            part = loss.select(range(len(prompts))[rows])
            scores += _chunk_scores(network, part, ablation, steps) * (len(part.prompts) / len(prompts))
            step(len(part.prompts))
    return scores.cpu()


def _chunk_scores(network: Network, loss: Loss, ablation: Ablation, steps: int) -> Float[Tensor, "S R"]:
    prompts, graph = loss.prompts, network.graph
    ablated = ablation.values(prompts)
    with torch.no_grad():
        clean = forward(network, prompts.tokens, senders=True).senders
    assert clean is not None  # asked for in the line above
    start = torch.zeros_like(clean[0]) if ablated is None else ablated[0]
    shares = torch.arange(1, steps + 1, device=network.device, dtype=clean.dtype) / steps
    points = start + shares[:, None, None, None] * (clean[0] - start)
    attention, mlp, final = _receiver_gradients(network, loss, points)

    change = (-clean if ablated is None else ablated - clean).flatten(1).float()
    scores = torch.zeros(graph.exists.shape, device=network.device)
    for layer in range(graph.n_layers):
        columns = graph.attention_receivers(layer)
        before = graph.senders_before(columns.start)
        scores[:before, columns] = change[:before] @ attention[layer].flatten(1).T
        column = graph.mlp_receiver(layer)
        before = graph.senders_before(column)
        scores[:before, column] = change[:before] @ mlp[layer].flatten()
    scores[:, -1] = change @ final.flatten()
    return scores


def _receiver_gradients(
    network: Network, loss: Loss, points: Float[Tensor, "m N T D"]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """dM/dx_v averaged over points: per layer of heads `[3H, N, T, D]` and MLP; of logits `[N, T, D]`."""
    steps, n_prompts = points.shape[:2]
    tokens = loss.prompts.tokens.repeat(steps, 1)
    with torch.enable_grad():
        run = forward(network, tokens, embedding=points.flatten(0, 1).requires_grad_(), receivers=True)
        assert run.receivers is not None  # asked for in the line above
        residual = run.residual.unflatten(0, (steps, n_prompts))
        value = loss(network.logits(at_answers(residual, loss.prompts))).mean()
        inputs = [x for pair in run.receivers for x in pair]
        for x in inputs:
            x.register_hook(lambda _: cancel_point())
        gradients = torch.autograd.grad(value, [*inputs, run.residual])

    def over_steps(gradient: Tensor) -> Tensor:
        return gradient.unflatten(-3, (steps, n_prompts)).sum(-4).float()

    *of_layers, final = [over_steps(gradient) for gradient in gradients]
    return of_layers[::2], of_layers[1::2], final
