"""The frontier: shares recomputed by hand, where a curve reaches a level, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover, score_edges
from kcwb.discovery.selection import select_edges
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.evaluation.frontiers import edges_for, frontier
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.tasks import known_relation


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 12), n=4)


def test_shares_are_those_of_runs_one_by_one(model, task) -> None:
    sizes = (10, 40, 80)
    curves, summary = frontier(model, task, ["eap", "ig-prune"], sizes=sizes, known=False, progress=False)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.test)
    of = lambda kept: float(loss(run_circuit(model, kept, task.test, cuts)))  # noqa: E731
    empty, full = of(Circuit.empty(model.graph)), of(None)
    for method in ("eap", "ig-prune"):
        scores = score_edges(model, task, method, progress=False)
        own = curves[curves["method"] == method]
        for size, (_, row) in zip(sizes, own.iterrows(), strict=True):
            circuit = Circuit(model.graph, select_edges(model.graph, scores, edges=size)).without_dangling()
            assert (row["asked"], row["edges"], row["n"]) == (size, circuit.n_edges, len(task.test))
            assert row["faithfulness"] == pytest.approx((empty - of(circuit)) / (empty - full), abs=1e-4)
    assert summary["method"].tolist() == ["eap", "ig-prune"] and (summary["seconds"] > 0).all()
    assert (summary["low_90"] <= summary["high_90"]).all()


def test_settings_names_and_circuits_of_the_callers(model, task) -> None:
    found = [random_circuit(model.graph, size, 0) for size in (60, 20)]
    methods = {"gim, 3 steps": {"method": "gim", "steps": 3, "select": "absolute"}, "eap": {}}
    curves, summary = frontier(
        model, task, methods, circuits={"random": found}, sizes=(20, 60, 10**6), known=False, progress=False
    )
    assert summary["method"].tolist() == ["gim, 3 steps", "eap", "random"]
    mine = curves[curves["method"] == "random"]
    assert mine["edges"].tolist() == [20, 60] and mine["asked"].isna().all()
    assert math.isnan(summary["seconds"].iloc[2])
    three = discover(model, task, "gim", steps=3, edges=20, select="absolute", progress=False)
    assert curves["edges"].iloc[0] == three.n_edges and len(curves) == 6


def test_where_a_curve_reaches_a_level() -> None:
    edges = [10, 100, 1000]
    assert float(edges_for(edges, np.array([0.0, 0.8, 1.0]), 0.9)) == pytest.approx(10**2.5)
    assert float(edges_for(edges, np.array([0.95, 0.2, 1.0]), 0.9)) == pytest.approx(10)
    assert float(edges_for(edges, np.array([0.0, 0.5, 0.6]), 0.9)) == math.inf
    assert float(edges_for(edges, np.array([0.0, 0.9, 0.6]), 0.9)) == pytest.approx(100)
    many = edges_for(edges, np.array([[0.0, 0.8, 1.0], [0.0, 0.5, 0.6]]), 0.9)
    assert many.tolist() == pytest.approx([10**2.5, math.inf])


def test_the_whole_graph_is_faithful_and_its_area_one(model, task) -> None:
    whole = {"all": [Circuit.full(model.graph)]}
    curves, summary = frontier(model, task, [], circuits=whole, known=False, progress=False)
    assert curves["faithfulness"].tolist() == pytest.approx([1.0], abs=1e-5)
    assert summary["area"].tolist() == pytest.approx([1.0], abs=1e-5)
    assert summary["distance"].tolist() == pytest.approx([0.0], abs=1e-5)
    assert summary["edges_90"].tolist() == pytest.approx([model.graph.n_edges])


def test_what_cannot_be_meant_is_refused(model, task, tiny) -> None:
    with pytest.raises(SettingError, match="acdc"):
        frontier(model, task, ["acdc"], progress=False)
    with pytest.raises(SettingError, match="must grow"):
        frontier(model, task, sizes=(20, 10), progress=False)
    with pytest.raises(CircuitError):
        other = Circuit.full(tiny("neox").graph)
        frontier(model, task, [], circuits={"other": [other]}, known=False, progress=False)
    alone = make_task(model, known_relation(model, 12), n=4, n_test=1)
    with pytest.raises(DataError, match="two at least"):
        frontier(model, alone, known=False, progress=False)


def test_what_cannot_be_compared_is_refused_before_edges_are_scored(model, task, tiny, monkeypatch) -> None:
    monkeypatch.setattr("kcwb.evaluation.frontiers.score_edges", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(CircuitError):
        other = Circuit.full(tiny("neox").graph)
        frontier(model, task, ["eap"], circuits={"other": [other]}, known=False, progress=False)
    for methods, circuits in ((["eap"], {"none": []}), ([], None)):
        with pytest.raises(SettingError, match="nothing to compare"):
            frontier(model, task, methods, circuits=circuits, known=False, progress=False)


@pytest.mark.parametrize("select", ["signed", "tuned"])
def test_circuits_of_stable_edges_are_those_that_are_discovered(model, task, select) -> None:
    how = {"method": "gim", "stable": 0.8, "select": select}
    curves, _ = frontier(model, task, {"sure": how}, sizes=(10, 90), known=False, progress=False)
    found = [discover(model, task, edges=size, progress=False, **how).n_edges for size in (10, 90)]
    plain = discover(model, task, "gim", edges=90, select=select, progress=False).n_edges
    assert curves["edges"].tolist() == found and found[1] != plain
