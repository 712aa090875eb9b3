"""Sweeps: every cell once, whatever dies; a store that is always whole; bad input refused before any compute."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from filelock import FileLock

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.methods import METHODS
from kcwb.errors import DataError, KcwbError, SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.models import worker
from kcwb.models.loading import load_model
from kcwb.sweep import what as module
from kcwb.sweep.run import Cell
from kcwb.sweep.what import connect, read_sweep, read_sweep_file, sweep
from kcwb.tasks.relations import Relation, load_relation
from kcwb.tasks.task import make_task
from tests.full_disk import full_disk
from tests.tiny import tiny_hf, tokenizer

ROOT = str(Path(__file__).parents[2])
QUIET: dict[str, Any] = {"progress": False, "n": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Tiny models as local folders."""
    made = {}
    for name in ("gpt2", "llama"):
        path = tmp_path_factory.mktemp(name)
        tiny_hf(name).save_pretrained(path)
        tokenizer().save_pretrained(path)
        made[name] = str(path)
    return made


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))


def files(store: Path) -> set[str]:
    return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file() and path.name != ".lock"}


def same(left: pd.DataFrame, right: pd.DataFrame) -> bool:
    """Whether two tables agree in all but who computed them, where, and how long it took."""
    drop = ["seconds", "worker", "circuit"]
    pd.testing.assert_frame_equal(left.drop(columns=drop), right.drop(columns=drop), rtol=1e-5)
    return True


def whole(store: Path, cells: int) -> bool:
    """Every cell once, each that is done with a circuit that loads, and nothing half-written."""
    table = read_sweep(store)
    assert len(table) == cells and not table.duplicated(["model", "relation", "method", "ablation", "tau"]).any()
    done = table[table["status"] == "done"]
    assert [Circuit.load(path).n_edges for path in done["circuit"]] == done["n_edges"].tolist()
    circuits = {name for name in files(store) if name.startswith("circuits/") and "scores" not in name}
    assert len(circuits) == len(done)
    return not [name for name in files(store) if name.endswith(".tmp")]


def test_the_table_holds_what_the_functions_give_one_by_one(folders, words: Relation, tmp_path: Path) -> None:
    other = replace(words, name="others", facts=words.facts[:12])
    store = tmp_path / "store"
    given: dict[str, Any] = {"methods": ["eap", "acdc"], "taus": [0.3, 0.05], "ablations": ["zero", "mean"]}
    table = sweep([folders["gpt2"]], [words, other], **given, store=store, edges=20, **QUIET)
    assert len(table) == 2 * 2 * (1 + 2) and (table["status"] == "done").all() and table["error"].isna().all()
    assert table["relation"].tolist() == ["words"] * 6 + ["others"] * 6
    assert table["tau"].fillna(0).tolist() == [0, 0.3, 0.05] * 4
    model = load_model(folders["gpt2"], device="cpu")
    for number, relation in ((1, words), (9, other)):  # acdc at 0.3, zero; eap, mean
        row, task = table.iloc[number], make_task(model, relation, n=3)
        settings: dict[str, Any] = {"tau": 0.3} if row["method"] == "acdc" else {"edges": 20}
        found = discover(model, task, row["method"], ablation=row["ablation"], progress=False, **settings)
        assert torch.equal(found.kept, Circuit.load(row["circuit"]).kept)
        score = completeness(model, found, task, draws=0, progress=False).set_index(["run", "split"])
        assert (row["n_edges"], row["share"]) == (found.n_edges, found.n_edges / model.graph.n_edges)
        assert row["hit_val"] == score.loc[("circuit", "D_val"), "hit"]
        assert row["hit_test"] == score.loc[("circuit", "D_test"), "hit"]
        assert row["full_hit_test"] == score.loc[("full model", "D_test"), "hit"]
        assert row["nll_val"] == pytest.approx(score.loc[("circuit", "D_val"), "nll"], rel=1e-5)
    assert whole(store, 12)


def test_finished_cells_are_skipped_and_a_wider_sweep_adds_its_own(folders, words, tmp_path, monkeypatch) -> None:
    ran: list[str] = []
    run = module.run_cell
    monkeypatch.setattr(module, "run_cell", lambda cell, device: (ran.append(cell.ablation), run(cell, device))[1])
    store = tmp_path / "store"
    first = sweep([folders["gpt2"]], [words], ["eap"], store=store, **QUIET)
    before = files(store)
    again = sweep([folders["gpt2"]], [words], ["eap"], store=store, **QUIET)
    assert ran == ["mean"] and first.equals(again) and files(store) == before
    sweep([folders["gpt2"]], [words], ["eap"], ablations=["zero", "mean"], store=store, **QUIET)
    assert ran == ["mean", "zero"]
    sweep([folders["gpt2"]], [words], ["eap"], store=store, **{**QUIET, "n": 2})
    assert ran == ["mean", "zero", "mean"] and len(read_sweep(store)) == 3


def test_cells_of_a_version_with_other_defaults_are_other_cells(words: Relation, monkeypatch) -> None:
    cells = {
        method: Cell("m", words, 0, method, "mean", None, None, "nll", 4, 0, "float32")
        for method in ("eap-ig", "gim", "acdc")
    }
    before = {name: cell.digest for name, cell in cells.items()}

    def points(model, loss, ablation, *, steps: int = 7, progress=False) -> None: ...

    monkeypatch.setitem(METHODS, "gim", replace(METHODS["gim"], function=points))
    assert {name: cell.digest == before[name] for name, cell in cells.items()} == {
        "eap-ig": True,
        "gim": False,
        "acdc": True,
    }


def test_a_model_is_loaded_once_for_all_of_its_cells(folders, words, tmp_path, monkeypatch) -> None:
    loaded: list[str] = []
    load = worker.load_model
    monkeypatch.setattr(worker, "load_model", lambda name, **more: (loaded.append(name), load(name, **more))[1])
    both = [folders["gpt2"], folders["llama"]]
    sweep(both, [words], ["eap", "eap-ig"], ablations=["zero", "mean"], store=tmp_path / "store", **QUIET)
    assert loaded == both


def test_equal_weights_under_two_names_are_asked_each_in_its_own_way(folders, words, tmp_path: Path) -> None:
    bos = load_model(folders["llama"], device="cpu", prepend_bos=True).save(tmp_path / "bos")
    table = sweep([folders["llama"], bos], [words], ["eap"], store=tmp_path / "store", **QUIET)
    for row, folder in zip(table.itertuples(), (folders["llama"], bos), strict=True):
        model = load_model(folder, device="cpu")
        score = completeness(model, Circuit.load(row.circuit), make_task(model, words, n=3), draws=0, progress=False)
        score = score.set_index(["run", "split"])
        assert row.full_nll_val == pytest.approx(score.loc[("full model", "D_val"), "nll"], rel=1e-5)
    assert table["full_nll_val"].nunique() == 2


def test_a_failure_is_recorded_stops_nothing_and_is_tried_again(folders, words, tmp_path: Path) -> None:
    late = tmp_path / "late"
    given: dict[str, Any] = {"methods": ["eap"], "store": tmp_path / "store", **QUIET}
    table = sweep([str(late), folders["gpt2"]], [words], **given)
    assert table["status"].tolist() == ["failed", "done"]
    assert f"ModelError: The model '{late}' cannot be loaded" in table["error"][0]
    assert table["worker"][0] == f"{socket.gethostname()}:{os.getpid()}" and pd.isna(table["circuit"][0])
    late.symlink_to(folders["llama"])
    assert sweep([str(late), folders["gpt2"]], [words], **given)["status"].tolist() == ["done", "done"]
    assert whole(tmp_path / "store", 2)


def test_other_weights_under_a_models_name_are_an_error(folders, words, tmp_path: Path) -> None:
    link, store = tmp_path / "model", tmp_path / "store"
    link.symlink_to(folders["gpt2"])
    sweep([str(link)], [words], ["eap"], store=store, **QUIET)
    link.unlink()
    link.symlink_to(folders["llama"])
    table = sweep([str(link)], [words], ["eap-ig"], store=store, **QUIET)
    assert "has weights" in table["error"][0] and "the same model" in table["error"][0]
    assert whole(store, 2)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_any_executor_gives_the_same_table(folders, words: Relation, tmp_path: Path, kind: str) -> None:
    given: dict[str, Any] = {"methods": ["eap", "acdc"], "taus": [0.1], **QUIET}
    both = [folders["gpt2"], folders["llama"]]
    alone = sweep(both, [words], **given, store=tmp_path / "alone")
    made: Executor = (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) if kind == "processes" else ThreadPoolExecutor(2)
    )
    with made as executor:
        shared = sweep(both, [words], **given, store=tmp_path / "shared", executor=executor)
    assert same(alone, shared) and whole(tmp_path / "shared", 4)


class Dying(Executor):
    """An executor whose workers die after the first cell."""

    def __init__(self) -> None:
        self.ran = 0

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        self.ran += 1
        if self.ran == 1:
            future.set_result(fn(*args, **kwargs))
        else:
            future.set_exception(BrokenProcessPool("killed"))
        return future


def test_workers_that_die_lose_nothing_that_was_finished(folders, words: Relation, tmp_path: Path) -> None:
    store = tmp_path / "store"
    given: dict[str, Any] = {"methods": ["eap"], "ablations": ["zero", "mean"], "store": store, **QUIET}
    with pytest.raises(KcwbError, match=r"workers died.*goes on from there"):
        sweep([folders["gpt2"]], [words], **given, executor=Dying())
    assert whole(store, 1)
    assert (sweep([folders["gpt2"]], [words], **given)["status"] == "done").all() and whole(store, 2)


_SWEEPER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch; torch.set_num_threads(1)
from kcwb.sweep.what import sweep
from tests.tiny import word_relation
sweep([sys.argv[2]], [word_relation()], ["acdc"], taus=[0.3, 0.2, 0.1, 0.05], ablations=["zero", "mean"],
      store=sys.argv[3], n=3, device="cpu", progress=lambda done, total, note: print(done, flush=True))
"""


def test_a_killed_sweep_goes_on_and_two_at_once_are_refused(folders, words: Relation, tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = [sys.executable, "-c", _SWEEPER, ROOT, folders["gpt2"], str(store)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if int(line) == 2:
                break
        os.kill(running.pid, signal.SIGSTOP)  # it holds the store for as long as this looks
        with pytest.raises(SettingError, match="Another sweep is writing"):
            sweep([folders["gpt2"]], [words], ["eap"], store=store, **QUIET)
        os.kill(running.pid, signal.SIGKILL)
    left = read_sweep(store)
    assert 2 <= len(left) < 8 and (left["method"] == "acdc").all() and whole(store, len(left))
    seen: list[int] = []
    given: dict[str, Any] = {"methods": ["acdc"], "taus": [0.3, 0.2, 0.1, 0.05], "ablations": ["zero", "mean"], **QUIET}
    given["progress"] = lambda done, total, note: seen.append(done)
    table = sweep([folders["gpt2"]], [words], **given, store=store)
    assert (seen[0], seen[-1]) == (len(left), 8) and (table["status"] == "done").all() and whole(store, 8)
    assert same(table, sweep([folders["gpt2"]], [words], **given, store=tmp_path / "alone"))


_POOL = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from kcwb.sweep.what import sweep
from tests.tiny import word_relation


def pid(_):
    time.sleep(1)  # so that each worker has one
    return os.getpid()


def progress(done, total, note):
    if done:
        print(*pids, flush=True)
        time.sleep(600)  # until it is killed


if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=get_context(sys.argv[4])) as executor:
        pids = set(executor.map(pid, range(2)))
        sweep([sys.argv[2]], [word_relation()], ["eap", "eap-ig", "exact"], store=sys.argv[3], n=4, device="cpu",
              executor=executor, progress=progress)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and not been waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the workers in Linux's /proc")
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_do_not_outlive_a_killed_sweep(folders, tmp_path: Path, start: str) -> None:
    script = tmp_path / "pool.py"
    script.write_text(_POOL)
    arguments = [sys.executable, str(script), ROOT, folders["gpt2"], str(tmp_path / "store"), start]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        workers = [int(pid) for pid in running.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        running.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_a_full_disk_ends_a_sweep_in_one_line_and_loses_nothing(folders, words: Relation, tmp_path: Path) -> None:
    store = tmp_path / "store"
    given: dict[str, Any] = {"store": store, **QUIET}
    sweep([folders["gpt2"]], [words], ["eap"], **given)
    before = files(store)
    for left in (0, 1000):  # for nothing, and for less than a circuit's scores
        with full_disk(left), pytest.raises(KcwbError, match=r"(cannot be (saved as|written)).*File too large"):
            sweep([folders["gpt2"]], [words], ["eap", "eap-ig"], **given)
        assert files(store) == before and whole(store, 1)
    with full_disk(), pytest.raises(KcwbError, match="cannot be written"):
        sweep([folders["gpt2"]], [words], ["eap"], store=tmp_path / "new", **QUIET)
    assert (sweep([folders["gpt2"]], [words], ["eap", "eap-ig"], **given)["status"] == "done").all()


_WRITER = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kcwb.sweep.what import read_sweep
from kcwb.sweep.store import finished, open_store, write_cell
from kcwb.sweep.run import Cell, Outcome
from tests.circuits.test_circuit import random_circuit
from tests.tiny import word_relation

store = Path(sys.argv[2])
cell = Cell("m", word_relation(), 0, "eap", "mean", None, None, "nll", 4, 0, "float32")
done = 0
for turn in range(40):
    if (child := os.fork()) == 0:
        with open_store(store) as folder:
            for seed in range(done, done + 10_000):
                outcome = Outcome("w", 1.0, "0", {"n_edges": seed}, random_circuit(seed=seed, scored=True))
                write_cell(folder, replace(cell, seed=seed), outcome)
    while len(list(store.glob("cells/*.json"))) <= done:  # it has begun
        time.sleep(1e-3)
    time.sleep(random.Random(turn).random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open_store(store) as folder:
        table = read_sweep(folder)
        assert table["seed"].tolist() == table["n_edges"].tolist() and (table["status"] == "done").all()
        assert sorted(table["seed"]) == list(range(len(table))) and len(table) > done
        done = len(table)
        assert all(finished(folder, replace(cell, seed=seed)) for seed in range(done))
print(done)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill a writer without loading torch for each")
def test_a_store_whose_writer_is_killed_at_random_moments_keeps_every_cell(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _WRITER, ROOT, str(tmp_path / "store")]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert ended.stdout and int(ended.stdout) >= 40, ended.stderr


# a cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """A Dask scheduler and two workers, each a process of its own, on loopback."""
    pytest.importorskip("distributed")
    where = tmp_path / "scheduler.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    quiet["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    dask, here = [sys.executable, "-m", "dask"], ["--host", "127.0.0.1"]
    started: list[subprocess.Popen] = []
    try:
        scheduler = [*dask, "scheduler", *here, "--port", "0", "--no-dashboard", "--scheduler-file", str(where)]
        started.append(subprocess.Popen(scheduler, **quiet))
        deadline = time.monotonic() + 60
        while not (where.exists() and where.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        address = json.loads(where.read_text())["address"]
        worker = [*dask, "worker", address, *here, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
        for _ in range(2):
            started.append(subprocess.Popen([*worker, "--local-directory", str(tmp_path)], **quiet))
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_dask_worker_killed_half_way_loses_nothing_and_doubles_nothing(
    cluster, folders, words: Relation, tmp_path: Path
) -> None:
    address, workers = cluster
    store, killed, reports = tmp_path / "store", [], []
    given: dict[str, Any] = {"methods": ["acdc"], "taus": [0.3, 0.2, 0.1, 0.05], "ablations": ["zero", "mean"], **QUIET}

    def kill_one(done: int, total: int, note: str) -> None:
        """Kill, after two cells, a worker that did one of them."""
        reports.append(done)
        if done >= 2 and not killed:
            ran = {int(name.rpartition(":")[2]) for name in read_sweep(store)["worker"]}
            worker = next(one for one in workers if one.pid in ran)
            worker.kill()
            killed.append(worker.pid)

    with connect(address, timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
        executor = client.get_executor(pure=False)
        table = sweep([folders["gpt2"]], [words], **{**given, "progress": kill_one}, store=store, executor=executor)
    assert killed and reports == list(range(9))  # each cell came back once
    assert (table["status"] == "done").all() and whole(store, 8)
    by_worker = {int(name.rpartition(":")[2]) for name in table["worker"]}
    assert by_worker <= {one.pid for one in workers} and by_worker - set(killed)
    assert same(table, sweep([folders["gpt2"]], [words], **given, store=tmp_path / "alone"))


def test_a_scheduler_that_is_not_there_is_refused() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(SettingError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:1 "):
        connect("tcp://127.0.0.1:1", timeout=1)


# devices


def test_each_process_of_a_machine_has_a_number_of_its_own(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    folder = tmp_path / f"kcwb-workers-{worker.getpass.getuser()}"
    folder.mkdir()
    others = [FileLock(folder / f"{number}.lock") for number in range(3)]
    for busy, device in enumerate(["cuda:0", "cuda:1", "cuda:0", "cuda:1"]):
        monkeypatch.setattr(worker, "_SLOTS", [])
        assert worker.pinned_device("auto") == worker.pinned_device("auto") == device
        worker._SLOTS[0].release()
        if busy < 3:
            others[busy].acquire(timeout=0)
    assert worker.pinned_device("cuda:7") == "cuda:7" and worker.pinned_device("cpu") == "cpu"


# bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["eap", "acdcc"]}, "'acdcc'.*'acdc'"),
        ({"methods": "eap"}, "methods='eap' is not a list"),
        ({"models": []}, "models=.*give a list"),
        ({"models": [3]}, "is not a list of: text or a path"),
        ({"ablations": ["men"]}, "'men'.*'mean'"),
        ({"taus": [0.1, 0.0]}, r"taus=\[0\.1, 0\.0\] is not a list of: a number above 0"),
        ({"taus": [float("nan")]}, "taus=.nan."),
        ({"metric": "nil"}, "'nll'"),
        ({"metric": "kl", "methods": ["eap-ig", "eap"]}, "kl is zero"),
        ({"dtype": "float31"}, "'float32'"),
        ({"n": 0}, "n=0"),
        ({"edges": 0}, "edges=0"),
        ({"template": 9}, "template=9"),
        ({"relations": ["country_capitol"]}, "'country_capital'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_is_done(
    words: Relation, tmp_path: Path, monkeypatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(worker, "load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    given = {"models": ["gpt2"], "relations": [words], "methods": ["eap"], "store": tmp_path / "store"}
    with pytest.raises((SettingError, DataError), match=said):
        sweep(**{**given, **QUIET, **change})
    assert not (tmp_path / "store").exists()


def test_a_file_whose_method_has_no_gradient_is_refused_when_it_is_read(tmp_path: Path) -> None:
    lines = ['models = ["gpt2"]', 'relations = ["antonym"]', 'store = "s"', 'metric = "kl"', 'methods = ["eap"]']
    (tmp_path / "sweep.toml").write_text("\n".join(lines))
    with pytest.raises(SettingError, match="kl is zero"):
        read_sweep_file(tmp_path / "sweep.toml")


def test_each_method_has_its_own_ablation_where_none_is_named(folders, words: Relation, tmp_path: Path) -> None:
    table = sweep([folders["gpt2"]], [words], ["acdc", "eap"], taus=[0.3], edges=40, store=tmp_path / "s", **QUIET)
    assert dict(zip(table["method"], table["ablation"], strict=True)) == {"acdc": "zero", "eap": "mean"}


def test_a_folder_that_is_no_store_is_left_alone(folders, words: Relation, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds files and is not the store"):
        sweep([folders["gpt2"]], [words], ["eap"], store=tmp_path, **QUIET)
    with pytest.raises(DataError, match="is a file"):
        sweep([folders["gpt2"]], [words], ["eap"], store=tmp_path / "notes.txt", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(DataError, match="not the store of a sweep"):
        read_sweep(tmp_path)


def test_a_damaged_cell_is_named_and_a_damaged_circuit_is_computed_again(folders, words, tmp_path: Path) -> None:
    store = tmp_path / "store"
    table = sweep([folders["gpt2"]], [words], ["eap"], store=store, **QUIET)
    Path(table["circuit"][0]).write_text("half of")
    again = sweep([folders["gpt2"]], [words], ["eap"], store=store, **QUIET)
    assert Circuit.load(again["circuit"][0]).n_edges == table["n_edges"][0]
    record = next((store / "cells").glob("*.json"))
    text = record.read_text()
    data = json.loads(text)
    huge = [{**data, "seconds": 10**400}, {**data, "numbers": {"n_edges": 10**400}}, {**data, "seconds": "1"}]
    strange = [{**data, "cell": []}, {**data, "cell": {}}, {**data, "numbers": [1]}]
    strange.append({**data, "cell": {**data["cell"], "tau": "a"}})
    for damage in (text[:50], "[" * 10**6, *map(json.dumps, [*huge, *strange])):
        record.write_text(damage)
        with pytest.raises(DataError, match=rf"{record.name} is damaged.*Delete it"):
            sweep([folders["gpt2"]], [words], ["eap"], store=store, **QUIET)
        with pytest.raises(DataError, match=rf"{record.name} is damaged"):
            read_sweep(store)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = [", "not TOML"),
        ("modles = ['a']", "'modles'.*'models'"),
        ("models = 'gpt2'", "must be a list of text"),
        ("taus = ['a']", "must be a list of numbers"),
        ("n = true", "must be a whole number"),
        ("n = 0x" + "f" * 9999, "n is a number of thousands of digits; it must be a whole number"),
        (f"taus = [0x{'f' * 9999}]", "must be a list of numbers"),
        ("seed = 9223372036854775808", "must be a whole number"),
        ("a" + ".a" * 400_000 + " = 1", "a key of more than 100 parts"),
        ("[" + '"a".' * 200_000 + "a]", "a key of more than 100 parts"),
        ("taus = " + "[" * 900_000, "not TOML"),
        ("taus = " + "{a=" * 300_000, "not TOML"),
        ("models = ['gpt2']\nrelations = ['a']", "lacks store"),
    ],
)
def test_a_sweep_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sweep.toml").write_text(text)
    started = time.process_time()
    with pytest.raises((SettingError, DataError), match=rf"sweep\.toml.*{said}") as caught:
        read_sweep_file(tmp_path / "sweep.toml")
    assert time.process_time() - started < 5 and len(str(caught.value)) < 600


def test_a_sweep_file_is_the_arguments_with_paths_from_its_folder(words: Relation, tmp_path: Path) -> None:
    words.save(tmp_path / "mine.json")
    (tmp_path / "own.csv").write_text("clean,answer\nw1 w2,w3\n")
    lists = "models = ['gpt2']\nrelations = ['mine.json', 'country_capital', 'own.csv']\ntaus = [1, 0.5]\n"
    (tmp_path / "sweep.toml").write_text(f"{lists}store = 'results'\nn = 4\n")
    found = read_sweep_file(tmp_path / "sweep.toml")
    assert load_relation(found["relations"][0]) == words and found["relations"][1] == "country_capital"
    assert load_relation(found["relations"][2]).facts[0].object == "w3"
    assert (found["store"], found["taus"], found["n"]) == (str(tmp_path / "results"), [1, 0.5], 4)
