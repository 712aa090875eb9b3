"""`kcwb referee`: what is asked of which circuit, what is printed and written, and what is refused beforehand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.interchange import save_mib
from kcwb.models.graph import Graph
from kcwb.models.loading import load_model
from tests.test_cli import file, folder, found, no_model, refused, run  # noqa: F401
from tests.workbench.ensembles import ensemble_of
from tests.workbench.judgements import judgement_of

DRAWN = 'digraph "" {\n  embed -> "<m0>";\n  "<m0>" -> "<resid_post>";\n}\n'


@pytest.fixture
def asked(monkeypatch) -> list[SimpleNamespace]:
    """What the referee was asked, instead of asking it."""
    calls: list[SimpleNamespace] = []

    def judge(model: Any, circuit: Any, task: Any, **more: Any) -> Any:
        calls.append(SimpleNamespace(model=model, circuit=circuit, task=task, **more))
        return judgement_of()

    def rank(model: Any, circuits: Any, task: Any, **more: Any) -> Any:
        calls.append(SimpleNamespace(model=model, circuits=circuits, task=task, **more))
        table = pd.DataFrame({"circuit": list(circuits), "yes": range(len(circuits))})
        return table, {name: judgement_of() for name in circuits}

    monkeypatch.setattr("kcwb.evaluation.referee.referee.referee", judge)
    monkeypatch.setattr("kcwb.evaluation.referee.compare.rank_circuits", rank)
    return calls


def test_a_file_says_what_it_is_judged_on(run, asked, found, folder, file) -> None:  # noqa: F811
    done = run("referee", found, "--relation", file, "--quiet")
    (call,) = asked
    assert done.code == 0 and call.model.name == load_model(folder).name
    assert (call.task.n, call.task.seed, call.facts, call.seed, call.quick, call.progress) == (
        4, 0, None, 0, False, False,
    )  # fmt: skip
    assert call.circuit.digest == Circuit.load(found).digest
    assert "minimality" in done.out and "No page is written" in done.out
    assert "Alone it is closer to the model than 100% of 100 random" in done.out


def test_options_override_what_a_file_says(run, asked, found, file, words) -> None:  # noqa: F811
    options = ["--facts", 3, "--seed", 5, "--template", 1, "--metric", "logit_diff", "--ablation", "zero", "--quick"]
    assert run("referee", found, "--relation", file, *options, "--dtype", "float32", "--quiet").code == 0
    (call,) = asked
    assert (call.facts, call.seed, call.metric, call.ablation, call.quick) == (3, 5, "logit_diff", "zero", True)
    assert (call.task.n, call.task.seed) == (4, 0)  # as the circuit was found
    assert call.task.template == words.prompt_templates_zs[1]


def test_what_cannot_be_meant_is_told_before_a_model_is_loaded(run, found, file, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("kcwb.models.loading.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    for files in ([found], [found, "--compare", file]):
        assert refused(run("referee", *files, "--facts", 0, "--relation", file, "--quiet"), "referee: facts=0")


def test_json_is_the_whole_judgement(run, asked, found, file) -> None:  # noqa: F811
    data = json.loads(run("referee", found, "--relation", file, "--json", "--quiet").out)
    assert data["output"] is None and data["format"] == "kcwb-judgement/1"
    assert len(data["questions"]["data"]) == len(judgement_of().questions)


def test_a_page_is_written(run, asked, found, file, tmp_path) -> None:  # noqa: F811
    page = tmp_path / "page.html"
    done = run("referee", found, "--relation", file, "-o", page, "--quiet")
    assert done.code == 0 and f"Written to {page}" in done.out
    assert "300 edges of smollm2-135m" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("argv", [["a", "--compare", "b"], ["--compare", "a", "b"]])
def test_several_are_ranked_on_the_same_facts(run, asked, found, file, tmp_path, argv) -> None:  # noqa: F811
    circuit = Circuit.load(found)
    circuit.save(tmp_path / "a")
    save_mib(circuit, tmp_path / "b")
    page = tmp_path / "page.html"
    done = run(
        "referee", *[word if word[0] == "-" else tmp_path / word for word in argv], "--relation", file, "-o", page
    )
    (call,) = asked
    assert done.code == 0 and [*call.circuits] == ["a", "b"] and call.task.n == 4
    assert done.out.splitlines()[0].startswith("2 circuits in ") and "a" in done.out
    assert page.read_text(encoding="utf-8").count("<details>") == 2
    data = json.loads(run("referee", "--compare", tmp_path / "a", found, "--relation", file, "--json").out)
    assert [row["circuit"] for row in data["ranking"]] == ["a", "circuit"] == [*data["judgements"]]


def test_files_of_one_name_are_told_apart_by_their_folders(run, asked, found, file, tmp_path) -> None:  # noqa: F811
    (tmp_path / "other").mkdir()
    Circuit.load(found).save(tmp_path / "other" / "circuit.json")
    assert run("referee", found, "--compare", tmp_path / "other" / "circuit.json", "--relation", file).code == 0
    assert [*asked[0].circuits] == [str(found), str(tmp_path / "other" / "circuit.json")]


def test_files_of_others_are_judged_too(run, asked, folder, file, tmp_path) -> None:  # noqa: F811
    graph = load_model(folder).graph
    (tmp_path / "kc.gv").write_text(DRAWN)
    save_mib(Circuit.from_edges(graph, ["input->m0", "m0->logits"]), tmp_path / "mib.json")
    ensemble_of({"input->m0": "11", "m0->logits": "11"}, graph=graph).save(tmp_path / "ensemble.json")
    for name in ("kc.gv", "mib.json", "ensemble.json"):
        assert run("referee", tmp_path / name, "--model", folder, "--relation", file, "--quiet").code == 0, name
    drawn, mib, ensemble = (call.circuit for call in asked)
    assert isinstance(ensemble, Ensemble) and set(mib.edges["sender"]) == set(drawn.edges["sender"]) == {"input", "m0"}


@pytest.mark.usefixtures("found", "asked", "no_model")
def test_what_is_missing_or_misspelt_is_told_before_a_model_is_loaded(run, found, file, tmp_path) -> None:  # noqa: F811
    (tmp_path / "kc.gv").write_text(DRAWN)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "taken.html").write_text("mine")
    Circuit.empty(Graph(1, 1)).save(tmp_path / "bare.json")
    for argv, parts in [
        ([], ["FILE", "--compare"]),
        (["gone.json"], ["gone.json", "cannot be read"]),
        ([tmp_path / "notes.txt"], ["notes.txt", "MIB's JSON"]),
        ([tmp_path / "kc.gv"], ["kc.gv says neither model nor relation", "--model and --relation"]),
        ([tmp_path / "bare.json"], ["--model and --relation"]),
        ([tmp_path / "kc.gv", "--relation", file], ["does not say which model", "--model"]),
        ([tmp_path / "kc.gv", "--model", "gpt2"], ["does not say which relation", "--relation"]),
        ([found], ["words", "--relation PATH.json"]),
        ([found, "--relation", file, "--metric", "nil"], ["--metric", "'nll'"]),
        ([found, "--relation", file, "--metric", "kl"], ["--metric", "nll"]),
        ([found, "--relation", file, "--ablation", "men"], ["--ablation", "'mean'"]),
        ([found, "--compare", found, "--relation", file], ["named twice"]),
        ([found, "-o", tmp_path / "taken.html"], ["The page", "is kept"]),
        ([found, "-o", tmp_path / "page.json"], ["ends in .html"]),
    ]:
        assert refused(run("referee", *argv), *parts), argv
    assert (tmp_path / "taken.html").read_text() == "mine"


def test_a_circuit_of_another_model_is_refused(run, asked, folder, file, tmp_path) -> None:  # noqa: F811
    Circuit.empty(Graph(1, 1)).save(tmp_path / "small.json")
    done = run("referee", tmp_path / "small.json", "--model", folder, "--relation", file, "--quiet")
    assert refused(done, "The circuit is part of") and not asked
