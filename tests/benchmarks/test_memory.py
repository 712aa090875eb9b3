"""Peaks of memory, predicted and measured, by the shapes of real models: random weights, a vocabulary of 94 words.

In stacks of all senders' outputs on one prompt (S x T x D numbers), what is at hand at the peak is about

- attribution with k points: 12 k for each prompt that is taken at once;
- the mean's reference and a circuit's run: 3 for each prompt that is taken at once;
- ACDC: 8 for each prompt (the state), and the changes of a batch of 512 rows, twice;
- the covariance of one layer's keys: two matrices in float32, and one more while it is added to.

How many prompts are taken at once follows the budget (1 GiB on a CPU, a quarter of what is free on a GPU); it is one at
least, so that for a large model the least is what one prompt takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover, score_edges
from kcwb.editing.covariance import covariance
from kcwb.evaluation.frontiers import _spent
from kcwb.models.graph import Graph
from kcwb.models.loading import Model, load_model
from kcwb.models.memory import memory_budget
from kcwb.tasks.task import Task, make_task
from tests.gpu.test_table import SHAPES
from tests.tasks import known_relation
from tests.tiny import tokenizer

_POINTS, _ROWS, _TOKENS = 5, 512, 8
#: Layers, heads, width, width of the MLP, bytes of a number.
_SEVEN = (32, 32, 4096, 11008, 2)


def predicted(
    shape: tuple[int, int, int, int, int], facts: int, reference: int, tokens: int, budget: int
) -> dict[str, float]:
    """Bytes at the peak of each kind of work."""
    layers, heads, width, hidden, size = shape
    senders = Graph(layers, heads).n_senders
    stack = senders * tokens * width * size

    def held(copies: int, held: int, prompts: int) -> float:
        return held * stack * max(1, min(prompts, budget // (copies * stack)))

    return {
        f"eap-ig, {_POINTS} points": held(24 * _POINTS, 12 * _POINTS, facts),
        "mean ablation": held(3, 3, reference),
        "run of a circuit": held(3, 3, facts),
        "acdc": 8 * stack * facts + 2 * senders * _ROWS * width * size,
        "covariance of a layer": 3 * 4 * hidden**2,
    }


def works(model: Model, task: Task) -> dict[str, Callable[[], Any]]:
    """The same works, to be run; the smallest first, for what one frees the next may use again."""
    cuts = make_ablation(model, task, "mean")
    circuit = random_circuit(model.graph, 200, 0)
    return {
        "mean ablation": lambda: make_ablation(model, task, "mean"),
        "run of a circuit": lambda: run_circuit(model, circuit, task.val, cuts),
        f"eap-ig, {_POINTS} points": lambda: score_edges(model, task, "eap-ig", steps=_POINTS, progress=False),
        "acdc": lambda: discover(model, task, "acdc", within="eap:500", checkpoint=False, progress=False),
        "covariance of a layer": lambda: covariance(model, model.graph.n_layers // 2, tokens=512, cache=False),
    }


@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith(("GPT-2 medium", "Tiny"))])
def test_peaks(shape: str) -> None:
    model = load_model(SHAPES[shape](), tokenizer(), device="cpu")
    network, graph = model.network, model.graph
    task = make_task(model, known_relation(model, 24), n=8)
    about = graph.n_layers, graph.n_heads, network.d_model, len(network.layers[0].W_out), network.dtype.itemsize
    said = predicted(about, len(task.val), len(task.reference), task.val.tokens.shape[1], memory_budget(model.device))
    for name, work in works(model, task).items():
        _, _, peak = _spent(model, work)
        print(f"| {shape} | {name} | {said[name] / 2**20:,.0f} | {peak:,.0f} |", flush=True)


def test_a_model_of_seven_billion_is_predicted() -> None:
    for name, peak in predicted(_SEVEN, 8, 32, _TOKENS, 16 * 2**30).items():
        print(f"| 7B, half precision, 16 GiB of budget | {name} | {peak / 2**20:,.0f} | not run here |", flush=True)
