"""Ensembles where something goes wrong: settings of one value, damaged runs, dead workers, full disks, edits."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from kcwb.circuits.ensemble import Ensemble
from kcwb.discovery.many import discover_many
from kcwb.errors import CircuitError, DataError, KcwbError, SettingError
from kcwb.evaluation.confidence import confidence_curve
from kcwb.models.loading import Model, load_model
from kcwb.tasks.shots import make_shots
from kcwb.tasks.task import Task, make_task
from tests.editing.conftest import large_edit
from tests.full_disk import full_disk
from tests.tasks import TEMPLATE, known_relation
from tests.tiny import tiny_hf, tiny_model, tokenizer

QUIET: dict[str, Any] = {"progress": False, "checkpoint": False}
#: Four searches: two draws, and a twin of the first for each source.
ACDC: dict[str, Any] = {"method": "acdc", "tau": 0.02, "draws": 2, "twins": 1, "vary": ["facts", "order"]}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def task(model) -> Task:
    return make_task(model, known_relation(model, 24), n=6)


@pytest.fixture(scope="module")
def expected(model, task) -> Ensemble:
    return discover_many(model, task, **ACDC, **QUIET)


def same(left: Ensemble, right: Ensemble) -> bool:
    return left.edges.equals(right.edges) and left.sources.equals(right.sources) and torch.equal(left.kept, right.kept)


def interrupted(model: Model, task: Task, folder: Path, runs: int, **settings: Any) -> list[Path]:
    """Stop after some runs; the files that were kept."""

    def stop(done: int, total: int, note: str) -> None:
        if done >= runs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover_many(model, task, checkpoint=folder, progress=stop, **settings)
    return sorted(one for one in folder.iterdir() if "search" not in one.name)


# --- what has one value ---


@pytest.mark.parametrize("source", ["template", "ablation"])
def test_with_one_level_there_is_nothing_to_vary(model, task, source):
    relation = replace(task.relation, prompt_templates_zs=(task.template, "w1 {} w2 w9"))
    with pytest.raises(SettingError, match=f"{source} cannot be varied: levels=1"):
        discover_many(model, replace(task, relation=relation), "eap", levels=1, vary=["facts", source], **QUIET)
    found = discover_many(model, task, "eap", levels=1, draws=4, vary=None, **QUIET)
    assert source in found.provenance["left_out"] and set(found.twins) == {"facts", "setting"}


def test_facts_none_of_which_has_a_partner_are_too_few(model, task):
    lonely = replace(task, val=replace(task.val, paired=torch.zeros_like(task.val.paired)))
    with pytest.raises(DataError, match="has 0 in D_val"):
        discover_many(model, lonely, "eap", ablation="resample", **QUIET)
    assert len(discover_many(model, lonely, "eap", draws=3, **QUIET)) == 3  # mean needs none


def test_a_task_after_demonstrations_is_drawn_in_its_own_words(model):
    shots = make_shots(model, replace(known_relation(model, 40), prompt_templates=(TEMPLATE,)), 1, n=12)
    found = discover_many(
        model, shots, "eap", ablation="resample", edges=30, draws=4, vary=["facts", "ablation"], **QUIET
    )
    assert set(found.twins) == {"facts", "ablation"} and found.size > 0
    with pytest.raises(SettingError, match="no other words"):
        discover_many(model, shots, "eap", vary=["template"], **QUIET)


# --- runs that were kept ---


@pytest.mark.parametrize(
    "damage", ["cut off", "empty", "names", "shape", "numbers", "edges that are none", "a score run"]
)
def test_a_kept_run_that_is_none_is_run_again(model, task, expected, tmp_path, damage):
    shape = model.graph.exists.shape
    kept, scores = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    contents = {
        "empty": b"",
        "names": save({"something": scores}),
        "shape": save({"kept": kept[:2], "scores": scores[:2]}),
        "numbers": save({"kept": scores.clone(), "scores": scores}),
        "edges that are none": save({"kept": ~kept, "scores": scores}),
        "a score run": save({"scores": scores[None]}),
    }
    files = interrupted(model, task, tmp_path / "runs", 2, **ACDC)
    assert len(files) == 2
    for file in files:
        file.write_bytes(contents.get(damage, file.read_bytes()[:-20]))
    assert same(discover_many(model, task, checkpoint=tmp_path / "runs", progress=False, **ACDC), expected)
    assert not (tmp_path / "runs").exists()


def test_kept_scores_of_other_facts_are_run_again(model, task, tmp_path):
    settings = {"method": "eap", "edges": 30, "select": "signed", "draws": 4, "vary": ["facts", "ablation"]}
    (file,) = interrupted(model, task, tmp_path / "runs", 1, **settings)
    file.write_bytes(save({"scores": torch.zeros(3, *model.graph.exists.shape)}))
    found = discover_many(model, task, checkpoint=tmp_path / "runs", progress=False, **settings)
    assert same(found, discover_many(model, task, **settings, **QUIET))


def test_a_folder_is_left_to_whom_else_it_belongs(model, task, expected, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with ThreadPoolExecutor(2) as threads:  # the same ensemble twice, and another one
        calls = [threads.submit(discover_many, model, task, checkpoint=tmp_path, progress=False, **ACDC) for _ in "ab"]
        other = threads.submit(discover_many, model, task, "eap", draws=3, checkpoint=tmp_path, progress=False)
        assert all(same(call.result(), expected) for call in calls) and len(other.result()) == 3
    assert [one.name for one in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("settings", [ACDC, {"method": "eap", "edges": 30, "draws": 4}], ids=["acdc", "eap"])
def test_a_full_disk_costs_a_warning_not_the_ensemble(model, task, tmp_path, settings):
    with full_disk(), pytest.warns(UserWarning, match="Runs cannot be kept"):
        found = discover_many(model, task, checkpoint=tmp_path / "runs", progress=False, **settings)
    assert same(found, discover_many(model, task, **settings, **QUIET))
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_worker_that_is_killed_leaves_what_was_done(tmp_path):
    folder = tmp_path / "model"
    tiny_hf("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model = load_model(str(folder))
    task = make_task(model, known_relation(model, 24), n=6)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        worker = pool.submit(os.getpid).result()

        def kill(done: int, total: int, note: str) -> None:
            if done == 1:
                os.kill(worker, signal.SIGKILL)

        with pytest.raises(KcwbError, match="workers died"):
            discover_many(model, task, checkpoint=tmp_path / "runs", executor=pool, progress=kill, **ACDC)
    assert list((tmp_path / "runs").iterdir())
    found = discover_many(model, task, checkpoint=tmp_path / "runs", progress=False, **ACDC)
    assert same(found, discover_many(model, task, **ACDC, **QUIET))


# --- other weights, other facts ---


def test_an_edited_model_has_ensembles_of_its_own(model, task):
    made = large_edit(model, task.val.facts[0], "w61")
    with made:
        with pytest.raises(SettingError, match="made for"):
            discover_many(model, task, "eap", **QUIET)
        edited = make_task(model, task.relation, n=6)
        found = discover_many(model, edited, "eap", draws=4, **QUIET)
        with ThreadPoolExecutor(1) as threads, pytest.raises(SettingError, match="have no edits"):
            discover_many(model, edited, "eap", draws=4, executor=threads, **QUIET)
        assert len(confidence_curve(model, found, edited, confidences=(0.5,), draws=0, progress=False)) == 2
    with pytest.raises(CircuitError, match="was found on"):
        confidence_curve(model, found, task, progress=False)


@pytest.mark.parametrize("halves", [None, 5, [[0], []], [[0, 1], [1, 2]], [[0], [99]], [[0.5], [1]], [[0], [1], [2]]])
def test_halves_that_a_file_lies_about_are_not_tested_on(model, task, halves):
    found = discover_many(model, task, "eap", draws=3, **QUIET)
    lie = replace(found, provenance={**found.provenance, "halves": halves})
    with pytest.raises(DataError, match="cannot be cross-fitted"):
        confidence_curve(model, lie, task, progress=False)
