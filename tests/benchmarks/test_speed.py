"""Speed and memory on the built-in model, as ratios in one run. Prints a table; asserts nothing about time."""

from __future__ import annotations

import copy
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

from kcwb.circuits.ablation import Ablation, make_ablation
from kcwb.circuits.masked import MaskedRuns
from kcwb.discovery.acdc import Search, acdc, predict_seconds
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.many import discover_many
from kcwb.evaluation.referee.referee import referee
from kcwb.models import loading, network
from kcwb.models.forward import forward
from kcwb.models.loading import Model, load_model
from kcwb.models.selfcheck import self_check
from kcwb.tasks.metrics import Loss, at_answers, make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.task import make_task
from kcwb.workbench.graph.page import graph_view
from tests.tiny import tokenizer, word_relation

_SAMPLES = 50
_ROWS: list[tuple[str, str]] = []


def say(what: str, value: str) -> None:
    """Add a row to the table that is printed at the end."""
    _ROWS.append((what, value))


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    yield
    say("peak memory of the whole run", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    width = max(len(what) for what, _ in _ROWS)
    print(f"\n\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    for what, value in _ROWS:
        print(f"{what:{width}}  {value}")


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The median of a few runs after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]


def matrix_rate() -> float:
    """Multiplications and additions per second of a large float32 matrix product."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / seconds(lambda: a @ b, 5)


@contextmanager
def operations() -> Iterator[list[int]]:
    """Count the multiplications and additions of all linear maps (projections, MLPs, unembedding) meanwhile."""
    count, plain = [0], {name: getattr(network, name) for name in ("_affine", "_project")}

    def counting(name: str) -> Callable[..., Tensor]:
        def counted(x: Tensor, weight: Tensor, *more: Tensor | None) -> Tensor:
            out = plain[name](x, weight, *more)
            count[0] += 2 * out.numel() * weight.shape[-2]
            return out

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in plain:
            patch.setattr(network, name, counting(name))
        yield count


def test_self_check() -> None:
    taken: list[float] = []

    def timed(*arguments: Any) -> dict[str, float]:
        started = time.perf_counter()
        found = self_check(*arguments)
        taken.append(time.perf_counter() - started)
        return found

    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "self_check", timed)
        load_model()  # the first one imports, and fills the cache
        for _ in range(5):
            started = time.perf_counter()
            load_model()
            shares.append(taken[-1] / (time.perf_counter() - started))
    say(
        "self-check / loading the built-in model",
        f"{sorted(shares)[2]:.0%} (5 runs: {min(shares):.0%} to {max(shares):.0%})",
    )


def test_attribution(smollm2: Model) -> None:
    task = make_task(smollm2, "country_capital", n=8)
    for steps, name in ((1, "EAP"), (5, "EAP-IG, 5 steps")):

        def work(steps=steps) -> Tensor:
            cuts = make_ablation(smollm2, task, "mean")
            return attribution_scores(smollm2, make_loss(smollm2, task.val), cuts, steps=steps)

        say(f"{name}, 8 capital prompts, mean ablation and all", f"{seconds(work, 1):.1f} s")


@torch.no_grad()
def test_ensembles(smollm2: Model) -> None:
    """100 draws of attribution beside one run; a draw of ACDC; moving the slider of confidence."""
    task = make_task(smollm2, "country_capital", n=16)
    quiet: dict[str, Any] = {"edges": 300, "progress": False}
    one = seconds(lambda: discover(smollm2, task, "eap-ig", **quiet))
    for vary in (["facts"], ["facts", "setting"], ["facts", "setting", "ablation"], None):
        started = time.perf_counter()
        found = discover_many(smollm2, task, "eap-ig", vary=vary, draws=100, checkpoint=False, **quiet)
        taken = time.perf_counter() - started
        words = ", ".join(found.twins)
        say(f"100 EAP-IG draws of {words} / one run, 16 facts", f"{taken / one:.1f} ({taken:.0f} s / {one:.1f} s)")
    levels = itertools.cycle((0.5, 0.6, 0.7, 0.8))
    say("consensus at another confidence", f"{seconds(lambda: found.consensus(next(levels))):.3f} s")
    drawn = seconds(lambda: graph_view(found.consensus(next(levels))))
    say("consensus at another confidence, and its graph drawn", f"{drawn:.3f} s")
    few = make_task(smollm2, "country_capital", n=8)
    within = discover(smollm2, few, "eap-ig", edges=2000, select="absolute", progress=False)
    started = time.perf_counter()
    with operations() as count:
        discover_many(
            smollm2, few, "acdc", within=within, ablation="mean", vary=["facts", "order"], draws=2, twins=0,
            checkpoint=False, progress=False,
        )  # fmt: skip
    taken, floor = (time.perf_counter() - started) / 2, count[0] / matrix_rate() / 2
    say("a draw of ACDC within 2,000 edges, 8 facts", f"{taken:.0f} s; its operations at the matrix rate {floor:.0f} s")


def test_masked_pass(smollm2: Model) -> None:
    tokens = make_task(smollm2, "country_capital", n=8).val.tokens
    plain = seconds(lambda: smollm2.network.logits(forward(smollm2.network, tokens).residual), 5)
    for edges in (300, 60_000):
        kept = random_circuit(smollm2.graph, edges, 0).kept
        masked = seconds(
            lambda kept=kept: smollm2.network.logits(forward(smollm2.network, tokens, kept=kept).residual), 5
        )
        say(f"masked pass of {edges:,} edges / plain pass", f"{masked / plain:.2f}")
    task = make_task(smollm2, "country_capital", n=32)
    runs = MaskedRuns(smollm2.network, task.val, make_ablation(smollm2, task, "mean").values(task.val))
    plain = seconds(
        lambda: smollm2.network.logits(at_answers(forward(smollm2.network, task.val.tokens).residual, task.val))
    )
    few = random_circuit(smollm2.graph, 200, 0)
    for what, kept in {"200 edges": few.kept, "all but 200 edges": few.complement().kept}.items():
        dense = seconds(lambda kept=kept: forward(smollm2.network, task.val.tokens, kept=kept), 1)
        taken = seconds(lambda kept=kept: runs.logits(kept))
        say(
            f"a circuit of {what} / plain pass, 32 facts",
            f"{taken / plain:.2f} (computing everything: {dense / plain:.2f})",
        )
    say("plain pass / Hugging Face forward", f"{plain / seconds(lambda: smollm2.logits(tokens), 5):.2f}")


def test_referee(smollm2: Model) -> None:
    """A judgement of a circuit of 200 edges, quick, and in full on 50 facts."""
    task = make_task(smollm2, "country_capital", n=8)
    circuit = discover(smollm2, task, "eap-ig", edges=300, progress=False)
    for words, settings in {"quick": {"quick": True}, "50 facts": {"facts": 50}}.items():
        started = time.perf_counter()
        found = referee(smollm2, circuit, task, cache=False, progress=False, **settings)
        say(f"a judgement of {circuit.n_edges} edges, {words}", f"{time.perf_counter() - started:.0f} s")
    say("... which questions were answered", ", ".join(f"{q}: {a}" for q, a in found.answers.items()))


def say_floor(executed: int, seconds: float) -> None:
    """How much of some seconds the operations of linear maps would take at the matrix rate, measured now."""
    rate = matrix_rate()
    floor = executed / rate
    say(
        "  operations of linear maps / matrix rate",
        f"{floor:.0f} s = {floor / seconds:.0%} of its time ({rate / 1e9:.0f} GFLOP/s)",
    )


def language_prompts(model: Model, n: int) -> tuple[Loss, Ablation]:
    """Prompts of six tokens, first the example of Knowledge Circuits: "The official language of France is"."""
    task = make_task(model, "country_language", n=60, template="The official language of {} is")
    six = [i for i, length in enumerate(task.val.lengths.tolist()) if length == 6]
    first = next(i for i in six if task.val.facts[i].subject == "France")
    prompts = task.val.select([first, *(i for i in six if i != first)][:n])
    return make_loss(model, prompts), make_ablation(model, task, "zero")


@torch.no_grad()
def test_acdc(smollm2: Model) -> None:
    loss, cuts = language_prompts(smollm2, 1)
    search = Search(smollm2, loss, cuts, tau=0.01)
    predicted = predict_seconds(search)
    with operations() as executed:
        started = time.perf_counter()
        pruned = acdc(search)
        fast = time.perf_counter() - started
    decided = int((~pruned.increases.isnan()).sum())
    say("ACDC, one prompt of 6 tokens, zero, tau .01", f"{fast:.0f} s")
    say("  predicted beforehand", f"{predicted:.0f} s")
    say("  edges kept / visited / evaluated", f"{int(pruned.kept.sum()):,} / {decided:,} / {pruned.evaluations:,}")
    say("  near ties", str(pruned.near_ties))

    # The sequential definition: one run per visited candidate, sampled over the order of visits, and extrapolated.
    visits = (~pruned.increases.isnan()).nonzero()
    sample = visits[torch.linspace(0, len(visits) - 1, _SAMPLES).long()].tolist()
    masks = []
    for row, column in sample:
        kept = smollm2.graph.exists.clone()
        kept[:, column + 1 :] = pruned.kept[:, column + 1 :]
        kept[row, column] = False
        masks.append(kept)
    hooks = time_of(lambda kept: through_hooks(smollm2, loss, kept), masks)
    plain = time_of(lambda kept: loss(smollm2.logits(loss.prompts.tokens)[:, loss.prompts.positions[0]]), masks)
    ours = time_of(lambda kept: masked_loss(smollm2, loss, kept), masks)
    for name, each in (("hooks", hooks), ("masked passes", ours), ("plain forwards", plain)):
        say(
            f"  sequential through {name}, {_SAMPLES} sampled, extrapolated / fast",
            f"{each * decided / fast:.0f}x ({each:.3f} s each)",
        )

    say_floor(executed[0], fast)


@torch.no_grad()
@pytest.mark.skipif(not os.environ.get("KCWB_LONG"), reason="takes an hour, by estimate: KCWB_LONG=1 make bench")
def test_acdc_on_eight_prompts(smollm2: Model) -> None:
    loss, cuts = language_prompts(smollm2, 8)
    search = Search(smollm2, loss, cuts, tau=0.01)
    predicted = predict_seconds(search)
    with operations() as executed:
        started = time.perf_counter()
        pruned = acdc(search)
        taken = time.perf_counter() - started
    say("ACDC, eight prompts of 6 tokens, zero, tau .01", f"{taken:.0f} s")
    say("  predicted beforehand", f"{predicted:.0f} s")
    say_floor(executed[0], taken)
    decided = int((~pruned.increases.isnan()).sum())
    say("  edges kept / visited / evaluated", f"{int(pruned.kept.sum()):,} / {decided:,} / {pruned.evaluations:,}")


def time_of(run: Callable[[Tensor], Tensor], masks: list[Tensor]) -> float:
    """Seconds per mask."""
    run(masks[0])
    started = time.perf_counter()
    for kept in masks:
        run(kept)
    return (time.perf_counter() - started) / len(masks)


def masked_loss(model: Model, loss: Loss, kept: Tensor) -> Tensor:
    residual = forward(model.network, loss.prompts.tokens, kept=kept).residual
    return loss(model.network.logits(at_answers(residual, loss.prompts)))


def through_hooks(model: Model, loss: Loss, kept: Tensor) -> Tensor:
    """Zero ablation as hook libraries do it: every receiver's input is rebuilt from recorded outputs by a hook.

    The bridge has one key and value input per group of heads; the mask of a group's first head stands for it, which
    takes the same time.
    """
    bridge, graph, outputs = model.bridge, model.graph, []
    weights = kept.float()
    group = graph.n_heads // model.network.n_kv_heads

    def record(x: Tensor, hook: object) -> None:
        outputs.append(x[None])

    def record_heads(x: Tensor, hook: object) -> None:
        outputs.append(x.permute(2, 0, 1, 3))

    def rebuild(columns: list[int]) -> Callable[..., Tensor]:
        def hook_function(x: Tensor, hook: object) -> Tensor:
            read = torch.einsum("sr,s...->r...", weights[: sum(map(len, outputs)), columns], torch.cat(outputs))
            return read.permute(1, 2, 0, 3) if x.ndim == 4 else read[0]

        return hook_function

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = [("blocks.0.hook_in", record)]
    for layer in range(graph.n_layers):
        start = graph.attention_receivers(layer).start
        for i, kind in enumerate("qkv"):
            heads = range(0, graph.n_heads, 1 if kind == "q" else group)
            columns = [start + i * graph.n_heads + head for head in heads]
            hooks.append((f"blocks.{layer}.attn.hook_{kind}_input", rebuild(columns)))
        hooks.append((f"blocks.{layer}.attn.hook_result", record_heads))
        hooks.append((f"blocks.{layer}.ln2.hook_in", rebuild([graph.mlp_receiver(layer)])))
        hooks.append((f"blocks.{layer}.mlp.hook_out", record))
    hooks.append(("ln_final.hook_in", rebuild([graph.n_receivers - 1])))
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_attn_result(True)
    try:
        logits = bridge.run_with_hooks(loss.prompts.tokens, fwd_hooks=hooks, prepend_bos=False)
    finally:
        bridge.set_use_split_qkv_input(False)
        bridge.set_use_attn_result(False)
    return loss(logits[:, loss.prompts.positions[0]])


def test_eap_beside_transformer_lens() -> None:
    """A random model of GPT-2's depth and heads at a quarter of its width: TransformerLens's takes no GQA."""
    torch.manual_seed(0)
    config = T.GPT2Config(vocab_size=94, n_embd=192, n_layer=12, n_head=12, n_positions=64)
    model = load_model(T.GPT2LMHeadModel(config), tokenizer(), device="cpu")
    model.bridge.original_model.requires_grad_(True)  # theirs starts its graph at the parameters
    relation = word_relation()
    prompts = encode(model, relation.facts, relation.prompt_templates_zs[0], relation.objects)
    loss = make_loss(model, prompts.select([i for i, n in enumerate(prompts.lengths.tolist()) if n == 4][:8]))
    part = copy.copy(loss.prompts)

    def theirs() -> None:
        attribution_patch(
            model.bridge,
            clean=part.corrupted,
            corrupt=part.tokens,
            metric_fn=lambda logits: -logits[0, 3].log_softmax(-1)[5],
            config=EdgeAttributionConfig(granularity="edge"),
        )

    ours = seconds(lambda: attribution_scores(model, loss, make_ablation(model, None, "resample")))
    say("EAP of TransformerLens / ours, 8 prompts, 12 layers x 12 heads", f"{seconds(theirs, 1) / ours:.0f}x")
