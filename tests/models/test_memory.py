"""Pieces of prompts: all of them, in order, halved when memory runs out, and noted. Everything that takes prompts gives
the same whether memory lets it take all at once or one after the other."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

import kcwb
from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.gates import GatedLoss
from kcwb.editing import scores
from kcwb.editing.covariance import covariances
from kcwb.editing.partial_runs import make_rows, measured_nll, read_places
from kcwb.evaluation.referee.scores import Scores
from kcwb.interventions.at_end import logits_without
from kcwb.interventions.head_sets import answers_without
from kcwb.models import memory
from kcwb.models.loading import Model
from kcwb.models.memory import HeldPieces, by_prompts, halving, in_pieces, noted_pieces, noting_pieces
from kcwb.models.network import Network
from kcwb.reading.dla import attribute
from kcwb.reading.lens import lens_by_fact
from kcwb.reading.nodes import planned_run, written_logits
from kcwb.reading.trajectories import read_trajectories
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import full_ranks
from kcwb.tasks.task import Task, make_task
from tests.tasks import known_relation


@pytest.fixture
def model(tiny) -> Model:
    return tiny("llama")


@pytest.fixture
def task(model) -> Task:
    return make_task(model, known_relation(model, 9), n=4, seed=0)


@pytest.fixture
def room(monkeypatch):
    """Memory for so many rows (prompts x positions, points of an integral and candidates counted) and no more."""
    whole, failed = Network._mlp_hidden, []

    def limit(rows: int) -> list[int]:
        def limited(self: Network, layer: int, x: torch.Tensor) -> torch.Tensor:
            if layer and x[..., 0].numel() > rows:  # in the middle of the work
                failed.append(x[..., 0].numel())
                raise torch.OutOfMemoryError
            return whole(self, layer, x)

        monkeypatch.setattr(Network, "_mlp_hidden", limited)
        return failed

    return limit


def some_edges(model: Model) -> torch.Tensor:
    drawn = torch.rand(model.graph.exists.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return drawn & model.graph.exists


# --- the pieces ---


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_pieces_cover_all_rows_in_order(size: int) -> None:
    found = [*in_pieces(7, size, lambda rows: [*range(rows.start, rows.stop)])]
    assert [i for one in found for i in one] == [*range(7)]
    assert all(len(one) <= size for one in found)


def test_no_rows_are_no_pieces() -> None:
    assert [*in_pieces(0, 3, lambda rows: rows)] == []


def test_a_piece_is_as_large_as_the_budget_and_never_empty(model, monkeypatch) -> None:
    tokens = torch.zeros(100, 6, dtype=torch.long)
    each = 3 * model.graph.n_senders * 6 * model.network.d_model * 4
    for budget, expected in ((each * 7 + 1, 7), (1, 1), (each * 1000, 100)):
        monkeypatch.setattr(memory, "memory_budget", lambda device, budget=budget: budget)
        sizes = [*by_prompts(model.network, tokens, lambda rows: rows.stop - rows.start)]
        assert sizes[0] == expected and sum(sizes) == 100


def test_a_piece_is_halved_from_where_memory_runs_out() -> None:
    tried = []

    def work(rows: slice) -> list[int]:
        tried.append((rows.start, rows.stop))
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError
        return [*range(rows.start, rows.stop)]

    with noting_pieces():
        found = [*in_pieces(10, 10, work, "some")]
        assert noted_pieces() == {"some": [10, 5, 3]}
    assert noted_pieces() == {}
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert tried[:3] == [(0, 10), (0, 5), (0, 3)] and len(tried) == 6


def test_memory_for_less_than_one_is_the_callers() -> None:
    tried = []

    def never(size: int) -> None:
        tried.append(size)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        halving(5, never)
    assert tried == [5, 3, 2, 1]


def test_the_machines_own_memory_is_known_by_its_words() -> None:
    tried = []

    def run(size: int) -> int:
        tried.append(size)
        return len(torch.empty(1 if size < 3 else 10**15))

    assert halving(5, run) == 1 and tried == [5, 3, 2]


def test_another_error_is_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="else"):
        halving(4, lambda size: (_ for _ in ()).throw(RuntimeError("something else")))


def test_held_pieces_are_made_once_and_anew_when_memory_runs_out(model) -> None:
    tokens, made = torch.zeros(8, 4, dtype=torch.long), []

    def make(rows: slice) -> range:
        made.append((rows.start, rows.stop))
        if rows.stop - rows.start > 6:
            raise torch.OutOfMemoryError
        return range(rows.start, rows.stop)

    held = HeldPieces(model.network, tokens, make)
    assert made == [(0, 8), (0, 4), (4, 8)]
    assert [*map(list, held.run(lambda part: part))] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(made) == 3  # held

    def work(part: range) -> int:
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return sum(part)

    assert held.run(work) == [1, 5, 9, 13]
    assert made[3:] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert held.run(len) == [2] * 4 and len(made) == 7


def test_threads_that_run_out_of_memory_together_leave_nothing_out(model) -> None:
    held = HeldPieces(model.network, torch.zeros(16, 4, dtype=torch.long), lambda rows: range(rows.start, rows.stop))

    def work(part: range) -> list[int]:
        time.sleep(0.001)
        if len(part) > 2:
            raise torch.OutOfMemoryError
        return [*part]

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: [i for one in held.run(work) for i in one], range(24))]
    assert found == [[*range(16)]] * 24


# --- all that takes prompts ---


def _logits(model: Model, task: Task, kept: torch.Tensor | None) -> torch.Tensor:
    prompts = task.reference
    return run_circuit(model, kept, prompts, make_ablation(model, task, "resample"))[prompts.answer_mask]


def _completeness(model: Model, task: Task) -> list:
    circuit = kcwb.discover(model, task, "eap", edges=60, progress=False)
    return _table(kcwb.completeness(model, circuit, task, progress=False))


def _edited(model: Model, task: Task) -> list:
    rows = [(list(range(5 + i, 9 + i)), [20 + i, 30]) for i in range(7)]
    return [torch.cat([*scores._answer_logits(model, rows)])]


def _gates(model: Model, task: Task) -> list:
    gated = GatedLoss(model, make_loss(model, task.val), make_ablation(model, task, "mean"))
    kept = some_edges(model)
    edges, scores = gated.integrated(kept, [0.5, 1.0])
    return [edges, scores, torch.tensor(gated.of(kept))]


def _referee(model: Model, task: Task) -> list:
    runs = Scores(model, task.val, make_ablation(model, task, "mean"), ["nll"])
    kept = some_edges(model)
    one, others = runs.without_each(kept, kept.nonzero()[:5])
    return [torch.tensor(found.losses["nll"]) for found in (runs(kept), runs.empty, one, *others)]


def _places(model: Model, task: Task) -> list:
    rows = make_rows(model, [(fact, task.template) for fact in task.relation.facts])
    found = read_places(model.network, rows.tokens, rows.subjects, [0, 1])
    return [measured_nll(model, rows), *found[0], *found[1]]


def _trajectories(model: Model, task: Task) -> list:
    found = read_trajectories(model, task.reference)
    return [found.ranks, found.probabilities]


def _table(table: pd.DataFrame) -> list:
    return [torch.tensor(table.select_dtypes("number").to_numpy(dtype=float))]


def _scored(method: str, **settings):
    return lambda model, task: [kcwb.score_edges(model, task, method, progress=False, **settings)]


_SETS = [["a0.h1"], ["a1.h0", "a1.h2"], ["a0.h3"], []]
WORKS = {
    "run_circuit": lambda model, task: [_logits(model, task, some_edges(model))],
    "full model": lambda model, task: [_logits(model, task, None)],
    "mean": lambda model, task: [make_ablation(model, task, "mean").values(task.val)],
    "eap": _scored("eap"),
    "eap-ig": _scored("eap-ig", steps=3),
    "gim": _scored("gim", steps=2),
    "ceap": _scored("ceap", steps=2),
    "eap-ig-activations": _scored("eap-ig-activations", steps=2),
    "by fact": lambda model, task: [
        kcwb.discover(model, task, "eap", edges=40, stable=0.8, progress=False).scores.nan_to_num()
    ],
    "ig-prune": _scored("ig-prune", rounds=2, steps=2),
    "gates": _gates,
    "referee": _referee,
    "acdc": lambda model, task: [
        kcwb.discover(model, task, "acdc", tau=0.02, progress=False, checkpoint=False).kept.float()
    ],
    "ranks": lambda model, task: [full_ranks(model, task.reference, False).float()],
    "attribute": lambda model, task: [attribute(model, task.reference).by_source],
    "trajectories": _trajectories,
    "lens": lambda model, task: _table(lens_by_fact(model, task, progress=False)),
    "node": lambda model, task: [written_logits(model, planned_run(model, task, None, None, None), "a1.h0")],
    "completeness": _completeness,
    "edit scores": _edited,
    "heads taken out": lambda model, task: [
        torch.tensor(found, dtype=torch.double)
        for found in answers_without(model, task.reference, _SETS, progress=False)
    ],
    "heads put back": lambda model, task: [
        torch.cat([*logits_without(model, task.reference, [(i, j) for i in range(2) for j in range(4)])])
    ],
    "places": _places,
    "covariance": lambda model, task: [
        covariances(model, [1], tokens=2000, cache=False)[1].halves
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_what_memory_is_too_small_for_is_done_in_pieces(model, task, room, name: str) -> None:
    work = WORKS[name]
    expected = work(model, task)
    failed = room(int(_ROOM.get(name, 3) * task.reference.tokens.shape[1]))
    found = work(model, task)
    assert failed
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


#: So many prompts fit, three where nothing is said: ig-prune begins with an integral of five points, acdc holds a state
#: of all four prompts, and a text of the covariance is long.
_ROOM = {"ig-prune": 5, "acdc": 4, "covariance": 20, "heads taken out": 10, "heads put back": 9}


def test_a_circuit_records_how_many_were_computed_at_once(model, task, room) -> None:
    found = kcwb.discover(model, task, "eap", edges=40, select="signed", progress=False)
    assert found.provenance["at_once"] == {"mean": [len(task.reference)], "attribution": [len(task.val)]}
    room(2 * task.val.tokens.shape[1])
    again = kcwb.discover(model, task, "eap", edges=40, select="signed", progress=False)
    assert again.provenance["at_once"]["attribution"] == [4, 2]
    assert again.provenance["at_once"]["mean"][-1] == 2
    assert torch.equal(again.kept, found.kept)
