"""A circuit's two files beside other circuits, other readers and writers, kills, full disks, and foreign files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.circuitfile import edges_digest
from kcwb.errors import CircuitError
from kcwb.models.graph import Graph
from tests.circuits.test_circuit import assert_same, edited, random_circuit, refused, saved, scores_file
from tests.full_disk import full_disk

ROOT = str(Path(__file__).parents[2])
NAMES = ["tau_0.json", "tau_0.01.json", "tau_0", "tau_0.0123456789ab.json", "tau_0.json.json", "tau_[0-9].json", "tau"]


@pytest.mark.parametrize("last", NAMES)
def test_saving_a_circuit_leaves_the_scores_of_all_others(tmp_path, last):
    circuits = {name: random_circuit(seed=i, scored=True) for i, name in enumerate(NAMES)}
    for name in [*(name for name in NAMES if name != last), last]:
        saved(tmp_path, circuits[name], name)
        circuits[name] = random_circuit(seed=len(name) * 31, scored=True)
        saved(tmp_path, circuits[name], name)
    for name, circuit in circuits.items():
        assert_same(Circuit.load(tmp_path / name), circuit)
    assert len(list(tmp_path.iterdir())) == 2 * len(NAMES)  # and nothing is left of the first ones


def test_scores_beside_a_file_without_ending_are_read_under_the_name_that_they_had_before(tmp_path):
    circuit = random_circuit(scored=True)
    path = saved(tmp_path, circuit, "tau_0")
    found = scores_file(tmp_path)
    found.rename(tmp_path / found.name.replace("tau_0..", "tau_0."))
    assert_same(Circuit.load(path), circuit)


_SETUP = f"""
import itertools, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from kcwb.circuits.circuit import Circuit
from tests.circuits.test_circuit import assert_same, random_circuit
path = Path(sys.argv[1])
both = [random_circuit(seed=seed, scored=True, share=share) for seed, share in ((1, 0.2), (2, 0.5))]
both[0].save(path)
"""


def test_a_reader_beside_a_writer_misses_no_scores(tmp_path):
    """The writer alternates between two circuits, so that a file that was read may be gone and there again."""
    path = tmp_path / "circuit.json"
    writer = _SETUP + "print(flush=True)\nfor circuit in itertools.cycle(both): circuit.save(path)"
    with subprocess.Popen([sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None and running.stdout.readline()
            both = [random_circuit(seed=seed, scored=True, share=share) for seed, share in ((1, 0.2), (2, 0.5))]
            seen = []
            for _ in range(150):
                found = Circuit.load(path)
                seen.append(int(found.n_edges == both[1].n_edges))
                assert_same(found, both[seen[-1]])
        finally:
            running.kill()
    assert 0 < sum(seen) < len(seen)


_KILLED = (
    _SETUP
    + """
for turn in range(40):
    before = path.stat().st_mtime_ns
    if (child := os.fork()) == 0:
        for circuit in itertools.cycle(both):
            circuit.save(path)
    while path.stat().st_mtime_ns == before:  # it has begun
        time.sleep(1e-3)
    time.sleep(random.Random(turn).random() * 0.02)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = Circuit.load(path)
    assert_same(found, both[found.n_edges == both[1].n_edges])
both[0].save(path)
assert_same(Circuit.load(path), both[0])
print("whole")
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill a writer without loading torch for each")
def test_a_writer_killed_at_random_moments_leaves_a_whole_circuit(tmp_path):
    path = tmp_path / "circuit.json"
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], capture_output=True, text=True, timeout=300)
    assert done.stdout == "whole\n", done.stderr
    assert len([one for one in tmp_path.iterdir() if one.suffix != ".tmp"]) == 2


def test_writers_of_one_file_at_the_same_time_leave_a_whole_circuit(tmp_path):
    path = tmp_path / "circuit.json"
    circuits = [random_circuit(seed=seed, scored=True, share=0.1 + seed / 10) for seed in range(4)]

    def write(start: int) -> None:
        for turn in range(20):
            circuits[(start + turn) % 4].save(path)

    threads = [threading.Thread(target=write, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Circuit.load(path)
    assert_same(found, next(one for one in circuits if one.digest == found.digest))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_both_files_have_the_permissions_of_a_plainly_written_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        saved(tmp_path)
        (tmp_path / "plain").write_text("x")
    finally:
        os.umask(before)
    assert len({oct(one.stat().st_mode) for one in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("left", [0, 1000])
def test_a_full_disk_is_one_line_and_leaves_the_old_circuit(tmp_path, left):
    """Room for nothing, and for the scores alone."""
    old, new = (random_circuit(seed=seed, scored=True) for seed in (1, 2))
    path = saved(tmp_path, old)
    with full_disk(left), pytest.raises(CircuitError, match=r"circuit cannot be saved as .*circuit\.json: File too"):
        new.save(path)
    assert_same(Circuit.load(path), old)
    new.save(path)
    assert_same(Circuit.load(path), new)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "notes", '{"cells": []}', '{"cfg": {}, "edges": {}}', "\0" * 9])
def test_a_file_that_is_no_circuit_is_overwritten_only_by_force(tmp_path, content):
    path = tmp_path / "notebook.ipynb"
    path.write_text(content)
    circuit = random_circuit(scored=True)
    with pytest.raises(CircuitError, match=r"notebook\.ipynb is there and is no circuit.*force=True"):
        circuit.save(path)
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]
    circuit.save(path, force=True)
    assert_same(Circuit.load(path), circuit)


def test_folders_and_devices_are_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", Path(os.devnull)):
        with pytest.raises(CircuitError, match="is there and is no circuit"):
            random_circuit().save(path)
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize(
    "beginning", [lambda text: text[:60], lambda text: json.dumps(json.loads(text), sort_keys=True)]
)
def test_a_cut_and_a_rewritten_circuit_are_replaced(tmp_path, beginning):
    path = saved(tmp_path)
    path.write_text(beginning(path.read_text()))
    circuit = random_circuit(seed=3, scored=True)
    circuit.save(path)
    assert_same(Circuit.load(path), circuit)


# Files that would take long


@pytest.mark.parametrize(
    "size",
    [(10**9, 1), (1, 10**9), (10**4, 10**4), (10**4000, 10**4000), (True, 1), (1, 2.0)],
    ids=["layers", "heads", "both", "thousands of digits", "a truth", "a fraction"],
)
def test_a_graph_that_no_model_has_is_refused_at_once(tmp_path, size):
    path = edited(saved(tmp_path), lambda data: data["graph"].update(n_layers=size[0], n_heads=size[1]))
    started = time.process_time()
    refused(path, "is damaged")
    assert time.process_time() - started < 2


def test_a_score_of_thousands_of_digits_and_a_digest_with_a_path_are_refused(tmp_path):
    refused(edited(saved(tmp_path), lambda data: data["edges"][0].update(score=10**4000)), "is damaged")
    refused(edited(saved(tmp_path), lambda data: data.update(scores="/../../../a.b")), "digest of its scores")


def test_a_graph_of_the_largest_size_loads_in_seconds(tmp_path):
    """A megabyte names some ten thousand edges; the mask behind them has a hundred million entries."""
    graph, names = Graph(4080, 1), [f"input->m{layer}" for layer in range(4080)]
    text = {
        "format": "kcwb-circuit/1",
        "graph": {"n_layers": 4080, "n_heads": 1, "parallel": False},
        "digest": edges_digest(graph, sorted(names)),
        "scores": None,
        "provenance": {},
        "edges": [{"edge": name, "score": None} for name in names],
    }
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(text))
    started = time.process_time()
    assert Circuit.load(path).n_edges == len(names)
    assert time.process_time() - started < 5


def test_long_lists_are_read_or_refused_in_seconds(tmp_path):
    for edges in ([[]] * 300_000, [{"edge": f"m{i}->logits", "score": 1.0} for i in range(20_000)], "x" * 10**6):
        started = time.process_time()
        refused(edited(saved(tmp_path), lambda data, edges=edges: data.update(edges=edges)), "is damaged")
        assert time.process_time() - started < 5
