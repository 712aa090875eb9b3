"""A method of one's own: one function and one line, and every verb, command and sweep takes it."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import EntryPoint
from multiprocessing import get_context

import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS
from kcwb.circuits.circuit import Circuit
from kcwb.cli import main
from kcwb.discovery.discover import discover, predict, score_edges
from kcwb.discovery.many import discover_many
from kcwb.discovery.methods import METHODS
from kcwb.discovery.registry import Method, register_method
from kcwb.discovery.selection import resize
from kcwb.discovery.tuning import SHARES
from kcwb.errors import CircuitError, SettingError
from kcwb.models.loading import load_model
from kcwb.sweep.what import sweep
from kcwb.tasks.task import make_task
from kcwb.workbench.panels.controls import Controls
from tests import ownmethods
from tests.gaussian import GaussianNoise
from tests.tasks import known_relation
from tests.tiny import tiny_hf, tokenizer

ABLATIONS.pop("gaussian-noise", None)
OWN = {name: METHODS.pop(name) for name in ("toy-scores", "toy-prunes")}  # other tests go through all that there are


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for name, method in OWN.items():
        monkeypatch.setitem(METHODS, name, method)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("gpt2")
    tiny_hf("gpt2").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def model(folder):
    return load_model(folder, device="cpu")


@pytest.fixture
def task(model, words):
    return make_task(model, words, n=3)


def test_a_method_that_scores_takes_what_all_such_methods_take_and_its_own(model, task):
    found = discover(model, task, "toy-scores", edges=20, seed=5, progress=False)
    same = discover(model, task, "toy-scores", edges=20, seed=5, progress=False)
    other = discover(model, task, "toy-scores", edges=20, progress=False)
    assert torch.equal(found.kept, same.kept) and not torch.equal(found.kept, other.kept)
    assert found.ablation == "mean"
    told = dict(found.provenance["parameters"])
    assert told.pop("select") in SHARES and told == {"edges": 20, "seed": 5}
    scores = score_edges(model, task, "toy-scores", seed=5, progress=False)
    exists = model.graph.exists
    assert found.scores is not None and torch.equal(scores[exists], found.scores[exists])
    assert torch.equal(resize(found, edges=20).kept, found.kept)
    larger = make_task(model, known_relation(model, 12), n=4)
    assert len(discover_many(model, larger, "toy-scores", edges=20, draws=3, checkpoint=False, progress=False)) == 3


def test_a_method_that_prunes_says_what_is_kept_and_what_is_recorded(model, task, monkeypatch):
    found = discover(model, task, "toy-prunes", share=0.25, progress=False)
    assert found.n_edges == round(0.25 * model.graph.n_edges) and found.ablation == "zero"
    assert found.provenance["parameters"] == {"share": 0.25} and found.provenance["looked_at"] == model.graph.n_edges
    with pytest.raises(CircuitError, match="toy-prunes"):
        resize(found, edges=20)
    with pytest.raises(SettingError, match=r"toy-prunes.*is not known"):
        score_edges(model, task, "toy-prunes", progress=False)
    monkeypatch.setattr("kcwb.discovery.discover.make_ablation", None)
    with pytest.raises(SettingError, match="does not say how long"):  # before anything is computed
        predict(model, task, "toy-prunes")


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("toy-scores", {"seed": -1}, "seed=-1 is not a whole number"),
        (
            "toy-scores",
            {"share": 0.5},
            "toy-scores takes edges, threshold, select, stable, seed; share is not one of them.",
        ),
        ("toy-scores", {"edges": 2.5}, "edges=2.5"),
        ("toy-scores", {"select": "best"}, "The selection 'best'"),
        ("toy-prunes", {"share": 1.5}, "share=1.5 is not a number above 0 and at most 1"),
        ("toy-prunes", {"edges": 5}, "toy-prunes takes share; edges is not one of them."),
    ],
)
def test_settings_that_it_cannot_mean_are_refused_in_one_line(model, task, method, settings, said):
    with pytest.raises(SettingError) as caught:
        discover(model, task, method, progress=False, **settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_and_a_sweep_take_both(folder, words, tmp_path, capsys):
    relation, out = tmp_path / "words.json", tmp_path / "circuit.json"
    relation.write_text(words.to_json())
    quiet = ["--model", folder, "--facts", "3", "--device", "cpu", "--quiet", "--json"]
    for method, setting, value in (("toy-scores", "seed", 5), ("toy-prunes", "share", 0.25)):
        words_given = ["--method", method, "--set", setting, str(value), "--out", str(out)]
        assert main(["discover", str(relation), *words_given, *quiet]) == 0
        assert json.loads(capsys.readouterr().out)["provenance"]["parameters"][setting] == value
        assert Circuit.load(out).provenance["method"] == method
    assert main(["discover", str(relation), "--method", "toy", *quiet]) == 2
    assert "toy-prunes, toy-scores" in capsys.readouterr().err
    given = {"n": 3, "device": "cpu", "progress": False, "store": tmp_path / "store", "taus": [0.1, 0.2]}
    table = sweep([folder], [words], ["toy-scores", "toy-prunes"], edges=20, **given)
    assert (table["status"] == "done").all() and table["method"].tolist() == ["toy-scores", "toy-prunes"]
    assert table["edges"].fillna(0).tolist() == [20, 0] and table["tau"].isna().all()


def test_a_sweeps_worker_processes_get_a_method_and_an_ablation_from_outside_the_package(
    folder, words, tmp_path, monkeypatch
):
    monkeypatch.setitem(ABLATIONS, "gaussian-noise", GaussianNoise)
    given = {"n": 3, "device": "cpu", "progress": False, "edges": 20, "ablations": ["gaussian-noise(scale=0.5)"]}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        table = sweep([folder], [words], ["toy-scores"], store=tmp_path / "pool", executor=executor, **given)
    assert table["error"].isna().all(), table["error"][0]
    alone = sweep([folder], [words], ["toy-scores"], store=tmp_path / "alone", **given)
    drop = ["seconds", "worker", "circuit"]
    assert table.drop(columns=drop).equals(alone.drop(columns=drop))


def test_the_command_line_imports_what_installed_packages_name(monkeypatch, capsys):
    monkeypatch.setattr(
        "kcwb.discovery.registry.entry_points",
        lambda group: [EntryPoint("good", "tests.ownmethods", group), EntryPoint("bad", "no.such_module", group)],
    )
    assert main(["discover", "country_capital", "--method", "toy-scores", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "The extension 'bad' (no.such_module) cannot be imported: No module named 'no'" in said


def test_a_panel_offers_both(model):
    settings = {"metric": "nll", "edges": 40, "tau": 0.1, "within": None, "ablation": None}
    controls = Controls(model, method="toy-prunes", n=3, seed=0, **settings)
    assert {"toy-scores", "toy-prunes"} <= set(controls.method.options) and not controls.sized
    learned = Controls(model, method="edge-pruning", n=3, seed=0, **settings)  # prunes, to a number of edges
    assert learned.sized and learned.settings["edges"] == 40 and "tau" not in learned.settings


def test_another_function_under_a_name_that_is_taken_is_refused():
    register_method(METHODS["toy-scores"])
    with pytest.raises(SettingError, match="already"):
        register_method(Method("acdc", ownmethods.keep_some))
