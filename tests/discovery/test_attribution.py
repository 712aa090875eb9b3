"""Attribution: equal to TransformerLens's, to finite differences, and to the exact effect where the model is linear."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery import attribution
from kcwb.discovery.attribution import (
    activation_scores,
    attribution_scores,
    conductance_by_fact,
    conductance_scores,
    scores_by_fact,
)
from kcwb.errors import SettingError
from kcwb.models import memory
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.progress import cancellable
from kcwb.tasks.metrics import at_answers, make_loss
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import Task, make_task
from tests.tiny import tiny_model


def make(model: Model, words: Relation, n: int = 4) -> Task:
    """A task on a random model, which knows its facts by chance; some are enough."""
    return make_task(model, words, n=n)


@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_eap_equals_transformer_lens(words: Relation, architecture: str) -> None:
    model = tiny_model(architecture)
    task = make(model, words)
    ablation = make_ablation(model, task, "resample")
    loss = make_loss(model, ablation.usable(task.val), "nll")
    ours = attribution_scores(model, loss, ablation)
    theirs = torch.zeros_like(ours)
    model.bridge.original_model.requires_grad_(True)  # theirs starts its graph at the parameters
    for i in range(len(loss.prompts)):
        part = loss.select([i])

        def metric(logits: torch.Tensor, part=part) -> torch.Tensor:
            return part(logits[:, part.prompts.positions[0]])

        # Their gradient is taken on what they call the corrupt run, towards the other: for us, on the clean run.
        found = attribution_patch(
            model.bridge,
            clean=part.prompts.corrupted,
            corrupt=part.prompts.tokens,
            metric_fn=metric,
            config=EdgeAttributionConfig(granularity="edge"),
        )
        for (writer, reader), score in found.edge_scores.items():
            theirs[sender_row(model, writer), receiver_column(model, reader)] += score / len(loss.prompts)
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def sender_row(model: Model, node) -> int:
    names = {"embed": "input", "attn_head_out": f"a{node.layer}.h{node.head}", "mlp_out": f"m{node.layer}"}
    return model.graph.sender_index(names[node.kind])


def receiver_column(model: Model, node) -> int:
    kind = node.kind
    if kind == "logits":
        return model.graph.receiver_index("logits")
    name = f"m{node.layer}" if kind == "mlp_in" else f"a{node.layer}.h{node.head}<{kind[0]}>"
    return model.graph.receiver_index(name)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral-window", "qwen2", "neox", "opt"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
@pytest.mark.parametrize("metric", ["nll", "kl", "logit_diff"])
def test_eap_is_the_derivative_of_the_cut(tiny, words, architecture: str, ablation: str, metric: str) -> None:
    """Deliver (1 - e) a_u + e abl_u on one edge: the loss's derivative at e = 0, by finite differences."""
    model = tiny(architecture)
    task = make(model, words, n=2)
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    scores = attribution_scores(model, loss, cuts)
    if metric == "kl":  # which is at its minimum at the clean run, so that every derivative there is zero
        assert scores.abs().max() < 1e-4
        return
    prompts = loss.prompts
    clean = forward(model.network, prompts.tokens, senders=True).senders
    assert clean is not None
    ablated = cuts.values(prompts)
    ablated = torch.zeros_like(clean) if ablated is None else ablated
    edges = model.graph.exists.nonzero()
    for row, column in edges[torch.randperm(len(edges))[:12]].tolist():
        kept = model.graph.exists.clone()
        kept[row, column] = False

        def at(share: float, kept=kept, row=row) -> float:
            # A cut edge that delivers a mixture of both values; no other edge is cut, so that only this row is read.
            mixed = clean.clone()
            mixed[row] += share * (ablated[row] - clean[row])
            residual = forward(model.network, prompts.tokens, kept=kept, ablated=mixed).residual
            return float(loss(model.network.logits(at_answers(residual, prompts))))

        step = 2e-3
        derivative = (at(step) - at(-step)) / (2 * step)
        assert float(scores[row, column]) == pytest.approx(derivative, abs=2e-3, rel=2e-2)


def test_integrated_gradients_average_the_gradient_over_points(tiny, words: Relation, monkeypatch) -> None:
    model = tiny("llama")
    task = make(model, words)
    cuts = make_ablation(model, task, "mean")
    loss = make_loss(model, task.val)
    steps = 4
    batched = attribution_scores(model, loss, cuts, steps=steps)

    prompts = loss.prompts
    clean = forward(model.network, prompts.tokens, senders=True).senders
    ablated = cuts.values(prompts)
    assert clean is not None and ablated is not None
    one_by_one = torch.zeros_like(batched)
    for step in range(1, steps + 1):
        point = ablated[0] + step / steps * (clean[0] - ablated[0])
        for columns, gradients in attribution._gradients(model.network, loss, point[None]):
            for column, gradient in zip(range(columns.start, columns.stop), gradients, strict=True):
                for row in model.graph.exists[:, column].nonzero()[:, 0].tolist():
                    one_by_one[row, column] += ((ablated[row] - clean[row]) * gradient).sum() / steps
    torch.testing.assert_close(batched, one_by_one, atol=1e-5, rtol=1e-4)


class Replaced:
    """A network one of whose senders puts out what it is told, as a plain pass through all of it."""

    def __init__(self, model: Model, sender: int, output: torch.Tensor) -> None:
        self.network, self.place, self.output = (
            model.network,
            model.graph.node(model.graph.sender_names[sender]),
            output,
        )

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def embed(self, tokens):
        return self.output if self.place.kind == "input" else self.network.embed(tokens).requires_grad_()

    def head_outputs(self, layer, *qkv):
        outputs = self.network.head_outputs(layer, *qkv)
        if (self.place.kind, self.place.layer) != ("head", layer):
            return outputs
        here = torch.arange(len(outputs)) == self.place.head
        return torch.where(here[:, None, None, None], self.output, outputs)

    def mlp(self, layer, x):
        return self.output if (self.place.kind, self.place.layer) == ("mlp", layer) else self.network.mlp(layer, x)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "gemma2"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_activations_interpolate_one_sender_at_a_time(tiny, words: Relation, architecture: str, ablation: str) -> None:
    model, steps = tiny(architecture), 3
    task = make(model, words)
    cuts, loss = make_ablation(model, task, ablation), make_loss(model, task.val)
    prompts = loss.prompts
    clean = forward(model.network, prompts.tokens, senders=True).senders
    assert clean is not None
    ablated = cuts.values(prompts)
    ablated = torch.zeros_like(clean) if ablated is None else ablated
    slow = torch.zeros(model.graph.exists.shape)
    for row in range(len(clean)):
        for step in range(1, steps + 1):
            point = (ablated[row] + step / steps * (clean[row] - ablated[row])).requires_grad_()
            run = forward(Replaced(model, row, point), prompts.tokens, receivers=True)  # type: ignore[arg-type]
            value = loss(model.network.logits(at_answers(run.residual, prompts)))
            read = [x for pair in run.receivers for x in pair] + [run.residual]
            found = torch.autograd.grad(value, read, allow_unused=True, materialize_grads=True)
            gradients = torch.cat([x.reshape(-1, *point.shape) for x in found])
            slow[row] += torch.einsum("rntd,ntd->r", gradients, ablated[row] - clean[row]).detach() / steps
    slow = slow.masked_fill(~model.graph.exists, 0.0)
    assert slow.abs().max() > 0.01
    torch.testing.assert_close(activation_scores(model, loss, cuts, steps=steps), slow, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "neox"])
def test_activation_scores_of_a_sender_sum_to_what_ablating_it_costs(tiny, words: Relation, architecture: str) -> None:
    model = tiny(architecture)
    task = make(model, words)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    scores = activation_scores(model, loss, cuts, steps=200)
    full = float(loss(run_circuit(model, None, task.val, cuts)))
    costs = []
    for row in range(model.graph.n_senders):
        kept = model.graph.exists.clone()
        kept[row] = False
        costs.append(float(loss(run_circuit(model, kept, task.val, cuts))) - full)
    assert max(map(abs, costs)) > 0.05
    torch.testing.assert_close(scores.sum(1), torch.tensor(costs), atol=5e-3, rtol=2e-2)


def test_activation_scores_with_one_step_are_eap_and_chunks_change_nothing(tiny, words: Relation, monkeypatch) -> None:
    model = tiny("qwen2")
    task = make(model, words, n=5)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    whole = activation_scores(model, loss, cuts, steps=2)
    torch.testing.assert_close(
        activation_scores(model, loss, cuts, steps=1), attribution_scores(model, loss, cuts), atol=1e-6, rtol=1e-4
    )
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "prompts_at_once", lambda network, tokens, copies: 2)
    again = activation_scores(model, loss, cuts, steps=2, progress=lambda done, total, _: seen.append((done, total)))
    torch.testing.assert_close(again, whole, atol=1e-6, rtol=1e-4)
    assert seen[-1][0] == seen[-1][1] == len(task.val) * model.graph.n_senders


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "gemma2"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_conductance_follows_each_sender_along_the_path(
    tiny, words: Relation, architecture: str, ablation: str
) -> None:
    model, steps = tiny(architecture), 3
    task = make(model, words)
    cuts, loss = make_ablation(model, task, ablation), make_loss(model, task.val)
    tokens, delivered = task.val.tokens, cuts.values(task.val)
    clean = model.network.embed(tokens)
    start = torch.zeros_like(clean) if delivered is None else delivered[0]
    gradients, outputs = [], []
    for step in range(steps + 1):
        point = (start + step / steps * (clean - start)).requires_grad_()
        run = forward(model.network, tokens, embedding=point, senders=True, receivers=True)
        value = loss(model.network.logits(at_answers(run.residual, task.val)))
        found = torch.autograd.grad(value, [x for pair in run.receivers for x in pair] + [run.residual])
        gradients.append(torch.cat([x.reshape(-1, *point.shape) for x in found]))
        outputs.append(run.senders.detach())
    slow = torch.zeros(model.graph.exists.shape)
    for step in range(steps):
        mean = (gradients[step] + gradients[step + 1]) / 2
        slow += torch.einsum("sntd,rntd->sr", outputs[step] - outputs[step + 1], mean)
    slow = slow.masked_fill(~model.graph.exists, 0.0)
    assert slow.abs().max() > 0.01
    torch.testing.assert_close(conductance_scores(model, loss, cuts, steps=steps), slow, atol=1e-5, rtol=1e-4)
    each = conductance_by_fact(model, loss, cuts, steps=steps)
    torch.testing.assert_close(each.mean(0), slow, atol=1e-5, rtol=1e-4)
    alone = conductance_scores(model, loss.select([len(each) - 1]), cuts, steps=steps)
    torch.testing.assert_close(each[-1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_conductance_out_of_the_input_and_into_the_logits_is_what_the_input_costs(
    tiny, words: Relation, architecture: str
) -> None:
    model = tiny(architecture)
    task = make(model, words)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    scores = conductance_scores(model, loss, cuts, steps=250)
    kept = model.graph.exists.clone()
    kept[0] = False
    cost = float(loss(run_circuit(model, kept, task.val, cuts)) - loss(run_circuit(model, None, task.val, cuts)))
    assert abs(cost) > 0.05
    assert float(scores[0].sum()) == pytest.approx(cost, rel=1e-2)
    assert float(scores[:, -1].sum()) == pytest.approx(cost, rel=1e-2)


@pytest.mark.parametrize("steps", [1, 3])
def test_chunks_of_prompts_change_nothing(tiny, words: Relation, monkeypatch, steps: int) -> None:
    model = tiny("qwen2")
    task = make(model, words, n=5)
    cuts = make_ablation(model, task, "mean")
    loss = make_loss(model, task.val, "kl")
    whole = attribution_scores(model, loss, cuts, steps=steps)
    monkeypatch.setattr(memory, "prompts_at_once", lambda network, tokens, copies: 2)
    torch.testing.assert_close(attribution_scores(model, loss, cuts, steps=steps), whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize(
    ("ablation", "metric", "steps"), [("mean", "nll", 3), ("resample", "kl", 2), ("zero", "nll", 1)]
)
def test_scores_by_fact_are_those_of_each_fact_alone(
    tiny, words: Relation, monkeypatch, architecture: str, ablation: str, metric: str, steps: int
) -> None:
    model = tiny(architecture)
    task = make(model, words, n=5)
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    monkeypatch.setattr(attribution, "_COPIES_PER_STEP", 10**7)  # one prompt at a time, and
    chunked = scores_by_fact(model, loss, cuts, steps=steps)
    monkeypatch.undo()  # several together
    found = scores_by_fact(model, loss, cuts, steps=steps)
    for i, own in enumerate(found):
        alone = attribution_scores(model, loss.select([i]), cuts, steps=steps)
        torch.testing.assert_close(own, alone, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(chunked[i], alone, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found.mean(0), attribution_scores(model, loss, cuts, steps=steps), atol=2e-6, rtol=1e-4)


def test_scores_sum_to_the_change_where_the_model_is_linear(tiny, words: Relation) -> None:
    """All edges into the logits together carry the direct effect of every sender: M is linear in what `logits` reads
    but for the final norm and the softmax, so compare with their exact derivative along that direction."""
    model = tiny("gpt2")
    task = make(model, words)
    cuts = make_ablation(model, task, "zero")
    loss = make_loss(model, task.val, "logit_diff")
    scores = attribution_scores(model, loss, cuts)
    run = forward(model.network, task.val.tokens, senders=True)
    assert run.senders is not None
    at = run.residual.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model.network.logits(at_answers(at, task.val))), at)
    expected = -(run.senders.sum(0) * gradient).sum()
    torch.testing.assert_close(scores[:, -1].sum(), expected, atol=1e-5, rtol=1e-4)


def test_no_steps_is_refused(tiny, words: Relation) -> None:
    model = tiny("llama")
    task = make(model, words)
    with pytest.raises(SettingError, match="steps=0"):
        attribution_scores(model, make_loss(model, task.val), make_ablation(model, task, "zero"), steps=0)


def test_progress_counts_all_prompts_and_can_cancel(tiny, words: Relation) -> None:
    model = tiny("llama")
    task = make(model, words)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    seen: list[tuple[int, int]] = []
    attribution_scores(model, loss, cuts, progress=lambda done, total, note: seen.append((done, total)))
    assert seen[-1] == (len(task.val), len(task.val))

    def cancel(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribution_scores(model, loss, cuts, progress=cancel)


def test_the_gradients_can_be_cancelled_layer_by_layer(words: Relation) -> None:
    model = tiny_model("llama")
    task = make(model, words)
    loss, cuts, checks = make_loss(model, task.val), make_ablation(model, task, "zero"), []
    with cancellable(lambda: checks.append(torch.is_grad_enabled())):
        attribution_scores(model, loss, cuts)
    # Once a layer in the plain pass and in the differentiated one, twice a layer on the way back.
    assert len(checks) == 4 * model.graph.n_layers
