"""What edges against the answer count for: the definition in a loop, its bounds, and what is recorded of it."""

from __future__ import annotations

import pytest
import torch

import kcwb
from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.selection import resize, select_edges
from kcwb.discovery.tuning import SHARES, Tuning
from kcwb.errors import SettingError
from kcwb.models.graph import Graph
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.tasks import known_relation


@pytest.fixture(params=["llama", "gpt2", "neox"])
def model(request, tiny):
    return tiny(request.param)


def task_of(model):
    return make_task(model, known_relation(model, 9), n=4, seed=0)


def scores_of(graph: Graph, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.masked_fill(~graph.exists, 0)


def test_a_share_of_0_is_signed_and_of_1_absolute() -> None:
    graph = Graph(2, 4)
    scores = scores_of(graph)
    for share, name in ((0, "signed"), (0.0, "signed"), (1, "absolute"), (1.0, "absolute")):
        found = select_edges(graph, scores, edges=80, select=share)
        assert torch.equal(found, select_edges(graph, scores, edges=80, select=name))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("edges", [5, 40, 100])
def test_a_negative_score_counts_for_its_share(share: float, edges: int) -> None:
    graph = Graph(2, 4)
    scores = scores_of(graph)
    worth = {
        (i, j): s if s > 0 else -share * s for i, row in enumerate(scores.tolist()) for j, s in enumerate(row)
        if graph.exists[i, j]
    }  # fmt: skip
    best = sorted(worth, key=worth.__getitem__, reverse=True)[:edges]
    assert {*map(tuple, select_edges(graph, scores, edges=edges, select=share).nonzero().tolist())} == {*best}
    threshold = worth[best[-1]]
    kept = select_edges(graph, scores, threshold=threshold, select=share)
    assert {*map(tuple, kept.nonzero().tolist())} == {*best}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_other_numbers_are_refused(share: float) -> None:
    graph = Graph(2, 4)
    with pytest.raises(SettingError, match="between 0 and 1"):
        select_edges(graph, scores_of(graph), edges=5, select=share)


def test_scores_alone_cannot_be_tuned_by() -> None:
    graph = Graph(2, 4)
    with pytest.raises(SettingError, match="runs circuits on D_val"):
        select_edges(graph, scores_of(graph), edges=5, select="tuned")


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_the_share_is_the_one_whose_circuit_is_nearest_to_the_model(model, ablation: str, metric: str) -> None:
    task = task_of(model)
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    for seed in range(3):
        scores, losses = scores_of(model.graph, seed), []
        for share in SHARES:
            kept = select_edges(model.graph, scores, edges=60, select=share)
            circuit = Circuit(model.graph, kept).without_dangling()
            losses.append(float(loss(run_circuit(model, circuit, loss.prompts, cuts))))
        whole = float(loss(run_circuit(model, None, loss.prompts, cuts)))
        away = [abs(one - whole) for one in losses]
        found = Tuning(model, loss, cuts).share(scores, edges=60)
        assert away[SHARES.index(found)] == pytest.approx(min(away), abs=1e-5)


def test_discover_records_what_it_found_and_resize_goes_on_with_it(model) -> None:
    task = task_of(model)
    tuned = kcwb.discover(model, task, "eap", edges=60, select="tuned", progress=False)
    share = tuned.provenance["parameters"]["select"]
    assert share in SHARES
    same = kcwb.discover(model, task, "eap", edges=60, select=share, progress=False)
    assert torch.equal(tuned.kept, same.kept)
    smaller = resize(tuned, edges=30)
    assert torch.equal(smaller.kept, kcwb.discover(model, task, "eap", edges=30, select=share, progress=False).kept)


def test_a_tuned_circuit_survives_its_file(model, tmp_path) -> None:
    found = kcwb.discover(model, task_of(model), "eap", edges=60, select="tuned", progress=False)
    found.save(tmp_path / "c.json")
    again = kcwb.Circuit.load(tmp_path / "c.json")
    assert torch.equal(resize(again, edges=40).kept, resize(found, edges=40).kept)


def test_an_ensemble_is_tuned_once_on_all_facts(model) -> None:
    task = task_of(model)
    share = kcwb.discover(model, task, "eap", edges=60, select="tuned", progress=False).provenance["parameters"][
        "select"
    ]
    how = {"edges": 60, "draws": 4, "vary": ["facts"], "checkpoint": False, "progress": False}
    tuned = kcwb.discover_many(model, task, "eap", select="tuned", **how)
    assert tuned.provenance["parameters"]["select"] == share
    assert torch.equal(tuned.kept, kcwb.discover_many(model, task, "eap", select=share, **how).kept)


def test_the_frontier_is_tuned_at_every_size(model) -> None:
    from kcwb.evaluation import frontier

    task = make_task(model, known_relation(model, 12), n=4, seed=0)
    methods = {"tuned": {"method": "eap", "select": "tuned"}, "signed": {"method": "eap"}}
    curves, summary = frontier(model, task, methods, sizes=[20, 40, 80], known=False, progress=False)
    assert (curves.groupby("method")["asked"].count() == 3).all()
    assert summary["seconds"].notna().all()
    for size in (20, 40, 80):
        circuit = kcwb.discover(model, task, "eap", edges=size, select="tuned", progress=False)
        row = curves[(curves["method"] == "tuned") & (curves["asked"] == size)]
        assert row["edges"].item() == circuit.n_edges
