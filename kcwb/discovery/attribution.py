"""Edge attribution: what cutting each edge would cost, to first order, from a few gradients.

Cutting u -> v changes what v reads by (abl_u - a_u), so that to first order the loss M grows by

    score(u -> v) = sum over prompts and positions of (abl_u - a_u) . dM/dx_v

(positive: cutting hurts). `eap` takes the gradient at the clean run (Edge Attribution Patching, arXiv 2310.10348).
`eap-ig` averages it over m points between the ablated and the clean output of `input` (EAP-IG, inputs, arXiv
2403.17806): abl + k/m (clean - abl) for k = 1..m. `eap-ig-activations` (EAP-IG, activations, of the same authors)
averages it for each sender u over m points between abl_u and a_u, all other senders computed from there; as m
grows, the scores of u's edges sum to what ablating u altogether costs. It takes one such integral per sender where
`eap-ig` takes one in all.

`ceap` (conductance along the path, CEAP, arXiv 2606.16920) goes the way of `eap-ig`, and lets each sender's output
change as it does there:

    score(u -> v) = integral of dM/dx_v . (- da_u / dalpha) dalpha

by the trapezoid rule over m + 1 points, k = 0..m. By the chain rule the scores of all edges out of `input` sum to what
ablating the input costs, and so do those of all edges into `logits`. What cut edges deliver counts for `input` alone.

`gim` and `relp` are `eap` (with more steps, `eap-ig`) with other slopes for gradients: see `kcwb.models.rules`. Their
norms do not undo a change of scale, so that they say something under `zero` too.

Two choices differ from the authors' code (github.com/hannamw/EAP-IG). Their `EAP-IG-inputs` takes k = 0..m-1, with the
ablated run and without the clean one; we take the paper's k = 1..m, as their own `EAP-IG-activations` does: both are
sums for one integral, and ours with m = 1 is `eap`. And their `EAP-IG-activations` interpolates all heads of a layer
together and averages each gradient over the interpolations of all nodes; we interpolate one sender at a time, and its
edges take the gradients of its own.

The true gradient needs an ablation that leaves the stream's scale alone. Under `zero`, abl_u - a_u = -a_u, and a layer
norm does not feel a change of its input's scale: the scores into one receiver sum to zero, and those of `input` into
the first layer vanish one by one. So `mean` is attribution's default.

1. Run the clean prompts: every sender's a_u; and take abl_u from the ablation.
2. Run the interpolated prompts, all steps in one batch; differentiate by every receiver's input. For activations: run
   what lies behind the sender.
3. One matrix product per layer between the senders' differences and the receivers' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation, check_made_for
from kcwb.models.forward import Pass, forward
from kcwb.models.graph import Graph
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.models.network import Network
from kcwb.models.rules import TRUE, Rules
from kcwb.progress import Progress, cancel_point, track
from kcwb.settings import Count
from kcwb.tasks.metrics import Loss, at_answers
from kcwb.verbs import verb

#: Stacks of all receivers' inputs that a differentiated pass holds, in stacks of all senders' outputs; and twice that,
#: so that a chunk of prompts ends within a second or so on two cores, and progress is seen.
_COPIES_PER_STEP = 24
#: Points of an integral where nothing else is said.
STEPS = 5
#: The scores of a chunk of prompts together `[S, R]`, or of each of them alone `[N, S, R]`.
_Chunk = Callable[[Loss, bool], Float[Tensor, "... S R"]]


@verb
def attribution_scores(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = 1, rules: Rules = TRUE, progress: Progress = False
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
    rules
        What the backward pass takes the network's nonlinear parts for (`kcwb.models.rules`).
    progress
        Reported per chunk of prompts.

    Returns
    -------
    Tensor
        `[S, R]` float32 on the CPU, in the loss's units; 0 where there is no edge.
    """
    check_made_for(model, ablation)
    chunk = partial(_chunk_scores, model.network.under(rules), ablation=ablation, steps=steps)
    return _scores(model, loss, chunk, steps, progress)


def scores_by_fact(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = 1, rules: Rules = TRUE, progress: Progress = False
) -> Float[Tensor, "N S R"]:
    """What `attribution_scores` gives for each prompt alone, in one run: their mean is the score of them all."""
    chunk = partial(_chunk_scores, model.network.under(rules), ablation=ablation, steps=steps)
    return _scores(model, loss, chunk, steps, progress, by_fact=True)


def conductance_scores(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = STEPS, progress: Progress = False
) -> Float[Tensor, "S R"]:
    """Score every edge by conductance; parameters as in `attribution_scores`, progress per chunk of prompts."""
    chunk = partial(_conductance_chunk, model.network, ablation=ablation, steps=steps)
    return _scores(model, loss, chunk, steps + 1, progress)


def conductance_by_fact(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = STEPS, progress: Progress = False
) -> Float[Tensor, "N S R"]:
    """What `conductance_scores` gives for each prompt alone, in one run."""
    chunk = partial(_conductance_chunk, model.network, ablation=ablation, steps=steps)
    return _scores(model, loss, chunk, steps + 1, progress, by_fact=True)


def _scores(
    model: Model, loss: Loss, chunk: _Chunk, points: int, progress: Progress, by_fact: bool = False
) -> Float[Tensor, "... S R"]:
    """The scores of all prompts, as many at once as fit into memory at so many points."""

    def work(rows: slice) -> Tensor:
        part = loss.select(rows)
        found = chunk(part, by_fact)
        step(len(part.prompts))
        return found.cpu() if by_fact else found * (part.total / loss.total)

    with track(progress, len(loss.prompts), "attribution") as step:
        pieces = by_prompts(model.network, loss.prompts.tokens, work, _COPIES_PER_STEP * points, "attribution")
        return torch.cat([*pieces]) if by_fact else sum(pieces, torch.zeros(())).cpu()


def activation_scores(
    model: Model, loss: Loss, ablation: Ablation, *, steps: Count = STEPS, progress: Progress = False
) -> Float[Tensor, "S R"]:
    """Score every edge by EAP-IG, activations; parameters as in `attribution_scores`, progress per sender."""
    network, prompts = model.network, loss.prompts
    scores = torch.zeros(model.graph.exists.shape, device=model.device)

    def work(rows: slice) -> Tensor:
        part = loss.select(rows)
        found = _activation_chunk(network, part, ablation, steps, lambda: step(len(part.prompts)))
        return found * (part.total / loss.total)

    with track(progress, len(prompts) * model.graph.n_senders, "attribution") as step:
        for found in by_prompts(network, prompts.tokens, work, _COPIES_PER_STEP * steps, "attribution"):
            scores += found
    return scores.cpu()


def _activation_chunk(
    network: Network, loss: Loss, ablation: Ablation, steps: int, step: Callable[[], None]
) -> Float[Tensor, "S R"]:
    """The scores of some prompts, sender by sender."""
    graph, prompts = network.graph, loss.prompts
    ablated = ablation.values(prompts)
    with torch.no_grad():
        clean = forward(network, prompts.tokens, senders=True, receivers=True)
    shares = torch.arange(1, steps + 1, device=network.device, dtype=clean.residual.dtype) / steps
    scores = torch.zeros(graph.exists.shape, device=network.device)
    for sender, output in enumerate(clean.senders):
        change = -output if ablated is None else ablated[sender] - output
        first, attention, stream = _behind(graph, sender, clean)
        points = stream + (1 - shares[:, None, None, None]) * change
        gradients = _gradients(network, loss, points, first, attention)
        for columns, gradient in gradients:
            scores[sender, columns] = gradient.flatten(1) @ change.flatten().float()
        step()
    return scores


def _behind(graph: Graph, sender: int, clean: Pass) -> tuple[int, bool, Float[Tensor, "N T D"]]:
    """Where the first readers of a sender are, by layer and whether heads or MLP, and the stream that they read."""
    place = graph.node(graph.sender_names[sender])
    if place.kind == "head" and not graph.parallel:
        return place.layer, False, clean.receivers[place.layer][1]
    first = 0 if place.kind == "input" else place.layer + 1
    return first, True, clean.receivers[first][0][0] if first < graph.n_layers else clean.residual


def _chunk_scores(
    network: Network, loss: Loss, by_fact: bool, *, ablation: Ablation, steps: int
) -> Float[Tensor, "... S R"]:
    """Differences between the clean and the ablated outputs, times the gradients averaged over the points."""
    prompts, ablated = loss.prompts, ablation.values(loss.prompts)
    with torch.no_grad():
        clean = forward(network, prompts.tokens, senders=True).senders
    start = torch.zeros_like(clean[0]) if ablated is None else ablated[0]
    shares = torch.arange(1, steps + 1, device=network.device, dtype=clean.dtype) / steps
    points = start + shares[:, None, None, None] * (clean[0] - start)
    change = (-clean if ablated is None else ablated - clean).float()
    return _products(network.graph, change, _gradients(network, loss, points), by_fact)


def _conductance_chunk(
    network: Network, loss: Loss, by_fact: bool, *, ablation: Ablation, steps: int
) -> Float[Tensor, "... S R"]:
    """Differences between the outputs at neighbouring points, times the mean gradient of the two."""
    prompts, ablated = loss.prompts, ablation.values(loss.prompts)
    clean = network.embed(prompts.tokens)
    start = torch.zeros_like(clean) if ablated is None else ablated[0]
    shares = torch.arange(steps + 1, device=network.device, dtype=clean.dtype) / steps
    points = start + shares[:, None, None, None] * (clean - start)
    tokens = prompts.tokens.repeat(len(points), 1)
    with torch.no_grad():
        outputs = forward(network, tokens, embedding=points.flatten(0, 1), senders=True).senders
    outputs = outputs.float().unflatten(1, points.shape[:2])
    change = (outputs[:, :-1] - outputs[:, 1:]).transpose(1, 2)  # [S, N, m, T, D]

    def between(gradient: Float[Tensor, "r m N T D"]) -> Float[Tensor, "r N m T D"]:
        return (len(points) * (gradient[:, :-1] + gradient[:, 1:]) / 2).transpose(1, 2)

    gradients = ((columns, between(each)) for columns, each in _gradients(network, loss, points, summed=False))
    return _products(network.graph, change, gradients, by_fact)


def _products(
    graph: Graph,
    change: Float[Tensor, "S N ..."],
    gradients: Iterable[tuple[slice, Float[Tensor, "r N ..."]]],
    by_fact: bool,
) -> Float[Tensor, "... S R"]:
    """What senders change, times the gradients at receivers: summed over prompts, or of each alone."""
    n_prompts = change.shape[1]
    scores = torch.zeros((n_prompts if by_fact else 1, *graph.exists.shape), device=change.device)
    for columns, gradient in gradients:
        before = graph.senders_before(columns.start)
        if by_fact:  # the loss is a mean over prompts, of which this is one
            left, right = change[:before].flatten(2).transpose(0, 1), gradient.flatten(2).permute(1, 2, 0)
            scores[:, :before, columns] = n_prompts * (left @ right)
        else:
            scores[0, :before, columns] = change[:before].flatten(1) @ gradient.flatten(1).T
    return scores if by_fact else scores[0]


def _gradients(
    network: Network,
    loss: Loss,
    points: Float[Tensor, "m N T D"],
    first: int = 0,
    attention: bool = True,
    summed: bool = True,
) -> list[tuple[slice, Float[Tensor, "r ... N T D"]]]:
    """dM/dx_v averaged over points of the stream, from a layer on: the columns of each, and their gradients.

    If they are not `summed`, what each point contributes to the average, `[r, m, N, T, D]`.
    """
    graph, (steps, n_prompts) = network.graph, points.shape[:2]
    tokens = loss.prompts.tokens.repeat(steps, 1)
    with torch.enable_grad():
        start = points.flatten(0, 1).requires_grad_()
        run = forward(network, tokens, embedding=start, first=first, attention=attention, receivers=True)
        residual = run.residual.unflatten(0, (steps, n_prompts))
        value = loss(network.logits(at_answers(residual, loss.prompts))).mean()
        read: list[tuple[slice, Tensor]] = []
        for layer, (heads, mlp) in enumerate(run.receivers, first):
            column = graph.mlp_receiver(layer)
            read += [(graph.attention_receivers(layer), heads)] if len(heads) else []
            read.append((slice(column, column + 1), mlp))
        for _, x in read:
            x.register_hook(lambda _: cancel_point())
        read.append((slice(graph.n_receivers - 1, graph.n_receivers), run.residual))
        gradients = torch.autograd.grad(value, [x for _, x in read])

    def over_steps(gradient: Tensor) -> Tensor:
        of_points = gradient.unflatten(-3, (steps, n_prompts))
        if not summed:
            return of_points.float().reshape(-1, *points.shape)
        return of_points.sum(-4).float().reshape(-1, *points.shape[1:])

    return [(columns, over_steps(gradient)) for (columns, _), gradient in zip(read, gradients, strict=True)]
