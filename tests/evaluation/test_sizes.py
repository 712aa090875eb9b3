"""Circuits of growing size: each row is what completeness says of that circuit."""

from __future__ import annotations

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.selection import resize
from kcwb.errors import CircuitError, SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.evaluation.sizes import size_curve
from kcwb.tasks.task import make_task
from tests.tasks import known_relation


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 16, unknown=6), n=5)


def test_each_size_is_the_resized_circuit_run_alone(model, task):
    circuit = discover(model, task, edges=40, progress=False)
    table = size_curve(model, circuit, task, sizes=(50, 20, 10**6, 20), k=3, progress=False)
    assert list(zip(table["asked"], table["split"], strict=True)) == [
        (size, split) for size in (20, 50) for split in ("D_val", "D_test")
    ]
    for size, part in table.groupby("asked"):
        alone = completeness(model, resize(circuit, edges=size), task, k=3, draws=0, progress=False)
        alone = alone[(alone["run"] == "circuit") & (alone["split"] != "D_test, known")]
        columns = ["edges", "split", "n", "hit", "low", "high", "nll"]
        assert part[columns].values.tolist() == alone[columns].values.tolist()


def test_what_cannot_be_resized_or_is_too_small_is_refused(model, task):
    with pytest.raises(CircuitError, match="score"):
        size_curve(model, Circuit.full(model.graph), task, progress=False)
    with pytest.raises(SettingError, match="at least one up to"):
        size_curve(model, discover(model, task, edges=40, progress=False), task, sizes=(10**6,), progress=False)
