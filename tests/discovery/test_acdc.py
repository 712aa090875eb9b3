"""Fast ACDC equals the sequential definition; a killed search resumes to the same circuit."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.acdc import Search, acdc, predict_seconds
from kcwb.discovery.checkpoint import Checkpoint, _state_digest
from kcwb.discovery.discover import discover, tau_path
from kcwb.discovery.sequential import NEAR_TIE, Pruned
from kcwb.errors import CircuitError, SettingError
from kcwb.files import write_tensors
from kcwb.models.loading import Model, load_model
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Relation, load_relation
from kcwb.tasks.task import make_task
from tests.discovery.sequential import acdc_sequential
from tests.full_disk import full_disk
from tests.tiny import ARCHITECTURES, tiny_model


def assert_same(fast: Pruned, slow: Pruned, tau: float) -> None:
    """The same edges, unless an increase lay so near tau that the order of summation decides."""
    if slow.near_ties == 0 and fast.near_ties == 0:
        assert torch.equal(fast.kept, slow.kept)
        torch.testing.assert_close(fast.increases, slow.increases, atol=5e-5, rtol=1e-3, equal_nan=True)
        assert fast.loss == pytest.approx(slow.loss, abs=5e-5)
    else:  # up to the first tie, in the order of visits, they still agree
        assert fast.near_ties > 0 and ((slow.increases.abs() - tau).abs() < 10 * NEAR_TIE).any()


CASES = [
    # ablation, metric, absolute, tau, prompts, template: subjects and answers of one and two tokens mix the lengths
    ("zero", "nll", False, 0.05, 3, 0),
    ("zero", "nll", True, 0.3, 2, 1),
    ("zero", "kl", True, 0.1, 3, 2),
    ("zero", "logit_diff", False, 0.02, 1, 0),
    ("mean", "nll", False, 0.02, 4, 1),
    ("mean", "kl", False, 0.01, 3, 0),
    ("mean", "logit_diff", True, 0.1, 2, 2),
    ("resample", "nll", True, 0.05, 3, 2),
    ("resample", "kl", False, 0.3, 2, 1),
    ("resample", "logit_diff", False, 1e-3, 2, 0),
]


def turns() -> list[tuple[Any, ...]]:
    """Every case on an architecture of each kind; on the others one of each ablation, all of them in turn."""
    of = {kind: [case for case in CASES if case[0] == kind] for kind in ("zero", "mean", "resample")}
    return [
        (architecture, *case)
        for i, architecture in enumerate(ARCHITECTURES)
        for case in (
            CASES if architecture in ("gpt2", "llama", "neox") else [some[i % len(some)] for some in of.values()]
        )
    ]


@pytest.mark.parametrize(("architecture", "ablation", "metric", "absolute", "tau", "n", "template"), turns())
def test_acdc_equals_the_sequential_oracle(
    tiny, words: Relation, architecture, ablation, metric, absolute, tau, n, template
) -> None:
    model = tiny(architecture)
    task = make_task(model, words, n=n, seed=n, template=template)
    cuts = make_ablation(model, task, ablation)
    loss = make_loss(model, cuts.usable(task.val), metric)
    fast = acdc(Search(model, loss, cuts, tau=tau, absolute=absolute))
    assert_same(fast, acdc_sequential(model, loss, cuts, tau=tau, absolute=absolute), tau)


@pytest.mark.parametrize("seed", range(6))
def test_acdc_equals_the_oracle_on_deeper_random_models(words: Relation, seed: int) -> None:
    model = tiny_model("llama", seed=seed, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    task = make_task(model, words, n=2, seed=seed)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val, "kl")
    assert_same(acdc(Search(model, loss, cuts, tau=0.05)), acdc_sequential(model, loss, cuts, tau=0.05), tau=0.05)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "neox"])
def test_acdc_within_a_circuit_equals_the_oracle_within_it(tiny, words: Relation, architecture: str) -> None:
    model = tiny(architecture)
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    within = model.graph.exists & (torch.rand(model.graph.exists.shape) < 0.7)
    fast = acdc(Search(model, loss, cuts, tau=0.02, within=within))
    assert_same(fast, acdc_sequential(model, loss, cuts, tau=0.02, within=within), tau=0.02)
    assert not (fast.kept & ~within).any()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "gemma2"])
@pytest.mark.parametrize("order", [0, 1])
def test_acdc_in_a_drawn_order_equals_the_oracle_in_it(tiny, words: Relation, architecture: str, order: int) -> None:
    model = tiny(architecture)
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    slow = acdc_sequential(model, loss, cuts, tau=0.02, order=order)
    assert_same(acdc(Search(model, loss, cuts, tau=0.02, order=order)), slow, tau=0.02)


def test_a_search_in_another_order_is_another_search(tiny, words: Relation, tmp_path: Path) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=2)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    searches = [Search(model, loss, cuts, tau=0.02, order=order) for order in (None, 3, 4)]
    Checkpoint(tmp_path / "state", searches[1]).write()
    Checkpoint(tmp_path / "state", Search(model, loss, cuts, tau=0.02, order=3)).resume()
    for other in (searches[0], searches[2]):
        with pytest.raises(CircuitError, match="belongs to another search"):
            Checkpoint(tmp_path / "state", other).resume()
    found = discover(model, task, "acdc", tau=0.02, order=3, checkpoint=False, progress=False)
    assert found.provenance["parameters"]["order"] == 3 and "as drawn from 3" in found.provenance["order"]


@pytest.mark.model
@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_acdc_equals_the_oracle_on_the_last_layers_of_the_builtin_model(smollm2: Model, ablation: str) -> None:
    """The last two blocks of the real model between its embedding and unembedding, on real prompts."""
    module = copy.deepcopy(smollm2.bridge.original_model)
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(module.config)
    config.num_hidden_layers, config.layer_types = 2, None
    piece = LlamaForCausalLM(config).eval()
    whole = {k.replace("_original_component.", ""): v for k, v in module.state_dict().items()}
    state = {}
    for name in piece.state_dict():
        source = name
        for layer in (0, 1):
            source = (
                source.replace(f"layers.{layer}.", f"layers.{28 + layer}.") if f"layers.{layer}." in name else source
            )
        state[name] = whole[source]
    piece.load_state_dict(state)
    model = load_model(piece, smollm2.tokenizer, device="cpu")
    relation = load_relation("country_capital")
    everything = encode(model, relation.facts, relation.prompt_templates_zs[0], relation.objects)
    prompts = everything.select([i for i, paired in enumerate(everything.paired.tolist()) if paired][:1])
    cuts, loss = make_ablation(model, None, ablation), make_loss(model, prompts)
    fast = acdc(Search(model, loss, cuts, tau=0.01))
    assert_same(fast, acdc_sequential(model, loss, cuts, tau=0.01), tau=0.01)
    assert 0 < fast.kept.sum() < model.graph.n_edges


def test_the_state_never_drifts_from_the_circuit(tiny, words: Relation) -> None:
    """After the last receiver the loss that the search holds is that of a fresh pass through what it kept."""
    model = tiny("gpt2")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    search = Search(model, loss, cuts, tau=0.03)
    pruned = acdc(search)
    fresh = Search(model, loss, cuts, tau=0.03, within=pruned.kept)
    assert fresh.value == pytest.approx(pruned.loss, abs=1e-5)


def test_batches_of_any_size_decide_alike(tiny, words: Relation, monkeypatch) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val, "kl")
    whole = acdc(Search(model, loss, cuts, tau=0.05))
    monkeypatch.setattr("kcwb.discovery.acdc._ROWS", 1)
    monkeypatch.setattr("kcwb.discovery.acdc._SMALLEST", 1)
    assert torch.equal(acdc(Search(model, loss, cuts, tau=0.05)).kept, whole.kept)


def test_logits_decide_alike_with_and_without_the_shares_of_each_sender(tiny, words: Relation, monkeypatch) -> None:
    model = tiny("gpt2")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "mean"), make_loss(model, task.val)
    shared = acdc(Search(model, loss, cuts, tau=0.02))
    monkeypatch.setattr("kcwb.discovery.acdc._SHARES", 0)
    direct = acdc(Search(model, loss, cuts, tau=0.02))
    assert torch.equal(direct.kept, shared.kept)
    torch.testing.assert_close(direct.increases, shared.increases, atol=1e-5, rtol=1e-3, equal_nan=True)


def test_a_batch_too_large_for_the_memory_is_halved(tiny, words: Relation, monkeypatch) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val, "kl")
    whole = acdc(Search(model, loss, cuts, tau=0.05))
    sizes: list[int] = []

    def smaller(most: int) -> None:
        method = Search._losses

        def limited(self, one, batch):
            sizes.append(batch.stop - batch.start)
            if sizes[-1] > most:
                raise torch.OutOfMemoryError
            return method(self, one, batch)

        monkeypatch.setattr(Search, "_losses", limited)

    smaller(5)
    found = acdc(Search(model, loss, cuts, tau=0.05))
    assert torch.equal(found.kept, whole.kept)
    assert max(sizes) > 5 and sum(size <= 5 for size in sizes) > sum(size > 5 for size in sizes)
    smaller(0)
    with pytest.raises(torch.OutOfMemoryError):
        acdc(Search(model, loss, cuts, tau=0.05))


def test_the_tau_path_gives_what_single_searches_give(tiny, words: Relation) -> None:
    model = tiny("qwen2")
    task = make_task(model, words, n=3)
    path = tau_path(model, task, [0.2, 0.05, 0.01], progress=False)
    assert list(path) == [0.2, 0.05, 0.01]
    for tau, circuit in path.items():
        alone = discover(model, task, "acdc", tau=tau, progress=False, checkpoint=False)
        assert torch.equal(circuit.kept, alone.kept)
        assert circuit.provenance["parameters"] == alone.provenance["parameters"]
        assert circuit.provenance["evaluations"] == alone.provenance["evaluations"]


def test_within_another_models_circuit_is_refused(tiny, words: Relation) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=2)
    with pytest.raises(CircuitError, match="parallel"):
        discover(model, task, "acdc", within=Circuit.full(tiny("neox").graph), progress=False)
    with pytest.raises(SettingError, match="above 0"):
        tau_path(model, task, [0.1, 0.0], progress=False)


def test_the_prediction_comes_before_the_work_and_progress_counts_every_edge(tiny, words: Relation) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=2)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    assert 0 < predict_seconds(Search(model, loss, cuts, tau=0.1)) < 100
    seen: list[tuple[int, int, str]] = []
    acdc(Search(model, loss, cuts, tau=0.1), progress=lambda *report: seen.append(report))
    assert seen[0][0] == 0 and "takes about" in seen[0][2]
    assert seen[-1][:2] == (model.graph.n_edges, model.graph.n_edges)
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)


# Checkpoints


class Stopped(Exception):
    """What a cancelled search raises."""


def stop_after(reports: int):
    """A progress callback that cancels after so many reports."""
    seen = 0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal seen
        seen += 1
        if seen > reports:
            raise Stopped

    return progress


def test_a_cancelled_tau_path_goes_on_behind_the_thresholds_that_are_done(tiny, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path))
    model, taus = tiny("gpt2"), [0.2, 0.05, 0.01]
    task = make_task(model, words, n=3)
    visits, visit = [], Search.visit
    monkeypatch.setattr(Search, "visit", lambda self, step: visits.append(self.tau) or visit(self, step))
    whole = tau_path(model, task, taus, checkpoint=False, progress=False)
    each, visits[:] = visits.count(0.2), []
    seen = [0]

    def cancel(done: int, total: int, note: str) -> None:  # within the second search
        seen[0] += visits.count(0.05) == each // 2
        if seen[0]:
            raise Stopped

    with pytest.raises(Stopped):
        tau_path(model, task, taus, progress=cancel)
    visits.clear()
    found = tau_path(model, task, taus, progress=False)
    assert visits.count(0.2) == 0 and visits.count(0.05) == each - each // 2 + 1 and visits.count(0.01) == each
    for tau, circuit in found.items():
        assert torch.equal(circuit.kept, whole[tau].kept)
        assert circuit.provenance["evaluations"] == whole[tau].provenance["evaluations"]
    assert not [one for one in tmp_path.rglob("*") if one.is_file()]


@pytest.mark.parametrize("reports", [2, 5, 9, 14, 20, 26])
def test_a_cancelled_search_resumes_to_the_identical_result(tiny, words, tmp_path: Path, reports: int) -> None:
    model = tiny("gpt2")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    whole = acdc(Search(model, loss, cuts, tau=0.05))
    path = tmp_path / "search.safetensors"
    with pytest.raises(Stopped):
        acdc(Search(model, loss, cuts, tau=0.05), progress=stop_after(reports), checkpoint=path)
    assert path.exists() or reports < 3
    resumed = acdc(Search(model, loss, cuts, tau=0.05), checkpoint=path)
    assert torch.equal(resumed.kept, whole.kept)
    assert torch.equal(resumed.increases.nan_to_num(), whole.increases.nan_to_num())
    assert (resumed.loss, resumed.evaluations) == (whole.loss, whole.evaluations)
    assert not path.exists()


def interrupted(model: Model, words: Relation, path: Path, tau: float = 0.05) -> Search:
    """A search whose checkpoint lies at `path`, and a new one like it."""
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    with pytest.raises(Stopped):
        acdc(Search(model, loss, cuts, tau=tau), progress=stop_after(9), checkpoint=path)
    return Search(model, loss, cuts, tau=tau)


def test_a_damaged_checkpoint_is_refused_and_left_alone(tiny, words: Relation, tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    search = interrupted(tiny("llama"), words, path)
    content = bytearray(path.read_bytes())
    for damage in (content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damage)
        with pytest.raises(CircuitError, match=r"search\.safetensors is damaged.*Delete it"):
            acdc(search, checkpoint=path)
        assert path.read_bytes() == damage


def test_a_checkpoint_of_another_search_is_refused(tiny, words: Relation, tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    search = interrupted(tiny("llama"), words, path)
    with pytest.raises(CircuitError, match="another search"):
        acdc(search.again(tau=0.06), checkpoint=path)
    with pytest.raises(CircuitError, match="another search"):
        acdc(interrupted(tiny("qwen2"), words, tmp_path / "other"), checkpoint=path)


@pytest.mark.parametrize("trouble", ["full disk", "no folder"])
def test_a_checkpoint_that_cannot_be_written_is_one_warning_and_the_search_goes_on(
    tiny, words: Relation, tmp_path: Path, trouble: str
) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=3)
    cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)
    whole = acdc(Search(model, loss, cuts, tau=0.05))
    (tmp_path / "file").write_text("kept")
    path = tmp_path / ("file/search" if trouble == "no folder" else "search")
    disk = full_disk() if trouble == "full disk" else contextlib.nullcontext()
    with pytest.warns(UserWarning, match=r"No checkpoint can be kept in .*search") as caught, disk:
        found = acdc(Search(model, loss, cuts, tau=0.05), checkpoint=path)
    assert len(caught) == 1
    assert torch.equal(found.kept, whole.kept) and found.loss == whole.loss
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_discovery_goes_on_without_the_users_cache(tiny, words: Relation, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "file"))
    model = tiny("llama")
    task = make_task(model, words, n=2)
    with pytest.warns(UserWarning, match="No checkpoint can be kept") as caught:
        found = discover(model, task, "acdc", progress=False)
    assert len(caught) == 1
    assert torch.equal(found.kept, discover(model, task, "acdc", checkpoint=False, progress=False).kept)


def test_a_disk_that_has_room_again_gets_its_checkpoint(tiny, words: Relation, tmp_path: Path) -> None:
    model = tiny("llama")
    task = make_task(model, words, n=3)
    search = Search(model, make_loss(model, task.val), make_ablation(model, task, "zero"), tau=0.05)
    kept = Checkpoint(tmp_path / "search", search)
    with pytest.warns(UserWarning, match="No checkpoint"), full_disk():
        kept.write()
    kept.write()
    kept.resume()
    assert (tmp_path / "search").exists()


@pytest.mark.parametrize("change", [{"visited": 10**9}, {"visited": -1}, {"visited": "3"}, {"value": None}], ids=str)
def test_a_checkpoint_with_an_impossible_state_is_refused(tiny, words: Relation, tmp_path: Path, change) -> None:
    from safetensors import safe_open

    path = tmp_path / "search.safetensors"
    search = interrupted(tiny("llama"), words, path)
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in ("kept", "increases")}
    text = json.dumps({**state, **change})
    write_tensors(path, tensors, {"state": text, "digest": _state_digest(text, tensors)})
    with pytest.raises(CircuitError, match="is damaged"):
        acdc(search, checkpoint=path)


_CHILD = """
import os, random, signal, sys, threading, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from safetensors.torch import save_file
from kcwb.circuits.ablation import make_ablation
from kcwb.discovery.acdc import Search, acdc
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.tiny import tiny_model, word_relation

model = tiny_model("gpt2")
task = make_task(model, word_relation(), n=3)
cuts, loss = make_ablation(model, task, "zero"), make_loss(model, task.val)


def search(path, reports):
    now = threading.Event()

    def killer():
        now.wait()
        time.sleep(random.Random(reports).random() * 3e-3)  # in a batch, a commit, or the writing of a file
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=killer, daemon=True).start()
    seen = 0

    def progress(*_):
        nonlocal seen
        seen += 1
        if seen == reports:
            now.set()

    found = acdc(Search(model, loss, cuts, tau=0.05), checkpoint=Path(path), progress=progress)
    save_file({"kept": found.kept.to(torch.uint8), "increases": found.increases}, path + ".result")
    os._exit(0)


for job in sys.stdin:  # a checkpoint's path and when to kill: torch is loaded once, the search forked for each
    path, reports = job.rsplit(" ", 1)
    if (child := os.fork()) == 0:
        search(path, int(reports))
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill a search without loading torch for each")
def test_a_search_killed_at_random_moments_resumes_to_the_identical_result(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    command = [sys.executable, "-c", _CHILD, str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None and parent.stdout is not None

        def run(path: Path, kill_at: int) -> bool:
            """Start or resume a search, to be killed soon after so many reports; whether it was."""
            parent.stdin.write(f"{path} {kill_at}\n")
            parent.stdin.flush()
            status = int(parent.stdout.readline())
            assert status in (0, signal.SIGKILL)
            return status != 0

        assert not run(tmp_path / "whole", 10**9)
        whole = load_file(tmp_path / "whole.result")
        killed = left = 0
        for kill_at in range(1, 27, 2):
            path = tmp_path / f"search{kill_at}"
            while run(path, kill_at):
                killed += 1
                left += path.exists()
                kill_at *= 2
            found = load_file(f"{path}.result")
            assert torch.equal(found["kept"], whole["kept"])
            assert torch.equal(found["increases"].nan_to_num(), whole["increases"].nan_to_num())
            assert not path.exists()
        parent.stdin.close()
    assert killed >= 10
    assert left >= 5  # kills left a checkpoint to resume from
