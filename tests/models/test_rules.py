"""Rules of the backward pass: the forward pass is as without them, and slopes are those of straight lines."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kcwb.circuits.ablation import make_ablation
from kcwb.discovery.attribution import attribution_scores
from kcwb.models import network as functions
from kcwb.models.forward import forward
from kcwb.models.rules import GIM, RELP, TRUE, Rules
from kcwb.models.weights import Norm
from kcwb.tasks.metrics import at_answers, make_loss
from kcwb.tasks.task import make_task
from tests.tiny import tiny_model

EVERY = Rules(True, 3.0, 0.25, 0.5, 0.5, True, False)
FAMILIES = ["gpt2", "llama", "qwen3", "neox", "opt", "gptj", "gpt-neo", "phi", "gemma", "gemma2", "gemma3"]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("rules", [GIM, RELP, replace(RELP, freeze_patterns=True)])
def test_the_forward_pass_is_as_without_them(tiny, architecture: str, rules: Rules) -> None:
    network, tokens = tiny(architecture).network, torch.arange(4, 20).view(2, 8)
    plain = network.logits(forward(network, tokens).residual)
    other = network.under(rules)
    torch.testing.assert_close(other.logits(forward(other, tokens).residual), plain, atol=2e-5, rtol=1e-5)
    assert network._rules is TRUE


@dataclass
class Lines:
    """Nonlinear parts as straight lines through what they were in a first pass: a rule's slope, taken at its word."""

    rules: Rules
    points: list[Tensor]
    at: int | None = None

    def point(self, x: Tensor) -> Tensor:
        if self.at is None:
            self.points.append(x)
            return x
        self.at += 1
        return self.points[self.at - 1]

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        if not self.rules.freeze_norms:
            return norm(x)
        before = self.point(x)
        scale = before.square().mean(-1) if norm.rms else before.var(-1, correction=0)
        x = x if norm.rms else x - x.mean(-1, keepdim=True)
        x = x / (scale + norm.eps).sqrt()[..., None] * norm.weight
        return x if norm.bias is None else x + norm.bias

    def norm_factor(self, norm: Norm, x: Tensor) -> Tensor:
        return norm.factor(self.point(x) if self.rules.freeze_norms else x)

    def softmax(self, scores: Tensor) -> Tensor:
        before = self.point(scores)
        shown, flatter = before.softmax(-1), (before / self.rules.temperature).softmax(-1)
        slope = torch.diag_embed(flatter) - flatter[..., :, None] * flatter[..., None, :]
        change = torch.where(before == -math.inf, 0.0, scores - before)
        return shown + (slope @ change[..., None])[..., 0]

    def activation(self, function, x: Tensor) -> Tensor:
        if not self.rules.secant:
            return function(x)
        before = self.point(x)
        return function(before) / before * x

    def share(self, x: Tensor, part: float) -> Tensor:
        before = self.point(x)
        return before + part * (x - before)

    def __getattr__(self, name: str) -> float:
        return getattr(self.rules, name)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "gptj", "gemma2"])
@pytest.mark.parametrize("rules", [GIM, RELP, EVERY], ids=["gim", "relp", "every"])
def test_scores_are_what_cuts_cost_on_the_lines(words, monkeypatch, architecture: str, rules: Rules) -> None:
    """Edges deliver a bit of what they would if cut, all nonlinear parts are lines: the loss's slope is the score."""
    model = tiny_model(architecture)
    task = make_task(model, words, n=2)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    prompts = loss.prompts
    scores = attribution_scores(model, loss, cuts, rules=rules)
    clean = forward(model.network, prompts.tokens, senders=True).senders
    lines = Lines(rules, [])
    monkeypatch.setattr(model.network, "_rules", lines)
    monkeypatch.setattr(functions, "share", lines.share)

    def value(kept: Tensor, delivered: Tensor) -> float:
        lines.at = lines.at and 0
        residual = forward(model.network, prompts.tokens, kept=kept, ablated=delivered).residual
        return float(loss(model.network.logits(at_answers(residual, prompts))).double())

    value(model.graph.exists, clean)
    lines.at = 1
    edges, largest = model.graph.exists.nonzero(), 0.0
    generator = torch.Generator().manual_seed(1)
    strong = scores.abs().flatten().topk(6).indices
    some = torch.cat([edges[torch.randperm(len(edges), generator=generator)[:8]],
                      torch.stack([strong // scores.shape[1], strong % scores.shape[1]], 1)])  # fmt: skip
    for row, column in some.tolist():
        kept = model.graph.exists.clone()
        kept[row, column] = False

        def at(share: float, kept=kept, row=row) -> float:
            delivered = clean.clone()
            delivered[row] *= 1 - share
            return value(kept, delivered)

        slope = (at(0.01) - at(-0.01)) / 0.02
        assert float(scores[row, column]) == pytest.approx(slope, abs=1e-3, rel=2e-2)
        largest = max(largest, abs(slope))
    assert largest > 0.01


@pytest.mark.parametrize("rules", [GIM, RELP])
def test_they_are_eap_where_nothing_is_nonlinear_but_relu(words, rules: Rules) -> None:
    """No norm, no attention, no gate: a relu is a line through the origin on either side."""
    model = tiny_model("opt")
    network = model.network
    same = Norm(torch.ones(network.d_model), torch.zeros(network.d_model), 0.0, False)
    object.__setattr__(same, "frozen", lambda x: x)
    for layer in network.layers:
        layer.W_O.zero_()
        object.__setattr__(layer, "norm_attention", same)
        object.__setattr__(layer, "norm_mlp", same)
    network.norm_final = same
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    frozen = attribution_scores(model, loss, cuts, rules=Rules(freeze_norms=True))
    assert frozen.abs().max() > 1e-3
    torch.testing.assert_close(attribution_scores(model, loss, cuts, rules=rules), frozen, atol=1e-7, rtol=1e-5)


def test_no_rule_is_the_gradient(tiny, words) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    plain = attribution_scores(model, loss, cuts)
    assert torch.equal(attribution_scores(model, loss, cuts, rules=Rules()), plain)
    for rules in (GIM, RELP):
        assert not torch.allclose(attribution_scores(model, loss, cuts, rules=rules), plain, atol=1e-3)


def test_constant_patterns_leave_no_score_to_queries_and_keys(tiny, words) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    scores = attribution_scores(model, loss, cuts, rules=replace(RELP, freeze_patterns=True))
    kinds = ["q" if "<q>" in name else "k" if "<k>" in name else "" for name in model.graph.receiver_names]
    chosen = torch.tensor([kind != "" for kind in kinds])
    assert not scores[:, chosen].any()
    assert scores[:, ~chosen].any()


def test_zero_says_something_where_the_norm_is_constant(tiny, words) -> None:
    """A norm does not feel its input's scale: the first layer's edges from `input` get no score by the gradient."""
    model = tiny("gpt2")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    first = model.graph.attention_receivers(0)
    plain, gim = (attribution_scores(model, loss, cuts, rules=rules)[0, first] for rules in (TRUE, GIM))
    assert 30 * plain.abs().max() < gim.abs().max()  # but for the norm's epsilon
