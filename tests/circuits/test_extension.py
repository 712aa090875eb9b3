"""An ablation of one's own: one file and one line, and everything that takes an ablation takes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import kcwb
from kcwb.circuits.ablation import ABLATIONS, AblationKind, ablation_kind, make_ablation, register_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.cli import main
from kcwb.discovery.discover import discover, predict, score_edges
from kcwb.discovery.many import discover_many
from kcwb.errors import SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.evaluation.faithfulness import faithfulness_curve
from kcwb.models.loading import load_model
from kcwb.sweep.what import read_sweep_file, sweep
from kcwb.tasks.task import make_task
from kcwb.workbench.panels.controls import Controls
from tests.gaussian import GaussianNoise
from tests.tasks import known_relation
from tests.tiny import tiny_hf, tokenizer

NOISE = GaussianNoise(scale=0.5, seed=3)
TEXT = "gaussian-noise(scale=0.5, seed=3)"

ABLATIONS.pop("gaussian-noise", None)  # other tests go through all that there are


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(ABLATIONS, "gaussian-noise", GaussianNoise)


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


def test_a_kind_is_its_text_and_its_text_the_kind():
    assert ablation_kind(TEXT) == NOISE == ablation_kind(NOISE) and str(NOISE) == TEXT
    assert ablation_kind("gaussian-noise") == GaussianNoise()
    assert [str(ablation_kind(name)) for name in ("zero", "mean", "resample")] == ["zero", "mean", "resample"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gaussian", "'gaussian-noise'"),
        ("gaussian-noise(scale=-1)", "scale=-1 is not a number of at least 0"),
        ("gaussian-noise(seed=0.5)", "seed=0.5 is not a whole number"),
        ("gaussian-noise(size=1)", "takes scale, seed; 'size' is not one of them"),
        ("zero(scale=1)", "zero takes no settings"),
        ("gaussian-noise(1)", "not understood; write gaussian-noise"),
        ("gaussian-noise(scale=open('x'))", "not understood"),
        ("gaussian-noise(scale=1", "not understood"),
        ("gaussian-noise(scale=1)(seed=2)", "not understood"),
        ("gaussian-noise(" + "(" * 10_000, "not understood"),
    ],
)
def test_a_wrong_text_is_refused_in_one_line(text, said):
    with pytest.raises(SettingError) as caught:
        ablation_kind(text)
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_two_kinds_of_one_name_are_refused_and_the_same_one_again_is_not():
    class Other(AblationKind):
        name = "zero"

    with pytest.raises(SettingError, match="already"):
        register_ablation(Other)
    assert register_ablation(ABLATIONS["zero"]) is ABLATIONS["zero"]


def test_its_values_are_the_outputs_and_noise_of_the_asked_scale_whatever_is_asked_beside(model, task):
    clean = make_ablation(model, task, GaussianNoise(scale=0.0)).values(task.reference)
    noisy = make_ablation(model, task, NOISE).values(task.reference)
    assert clean is not None and noisy is not None
    assert float((noisy - clean).std()) == pytest.approx(0.5, rel=0.05)
    one = make_ablation(model, task, TEXT).values(task.reference.select([2]))
    assert one is not None
    torch.testing.assert_close(one[:, 0], noisy[:, 2, : one.shape[2]], atol=1e-5, rtol=1e-5)


def test_with_no_noise_cutting_any_edge_changes_nothing(model, task):
    cuts = make_ablation(model, task, GaussianNoise(scale=0.0))
    full, empty = (run_circuit(model, one, task.val, cuts) for one in (None, Circuit.empty(model.graph)))
    torch.testing.assert_close(full, empty, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["eap-ig", "exact", "acdc"])
def test_a_circuit_found_with_it_is_saved_loaded_and_evaluated_under_it_again(model, task, tmp_path, method):
    size = {"checkpoint": tmp_path / "state"} if method == "acdc" else {"edges": 40}
    found = discover(model, task, method, ablation=NOISE, progress=False, **size)
    assert found.provenance["ablation"] == TEXT == found.ablation and TEXT in repr(found)
    assert torch.equal(found.kept, discover(model, task, method, ablation=TEXT, progress=False, **size).kept)
    found.save(tmp_path / "circuit.json")
    loaded = Circuit.load(tmp_path / "circuit.json")
    table = completeness(model, loaded, task, draws=0, progress=False)
    same, other = (
        completeness(model, loaded, task, ablation=one, draws=0, progress=False) for one in (NOISE, GaussianNoise(2.0))
    )
    assert table.equals(same) and not np.allclose(table["nll"], other["nll"])


def test_scores_curves_ensembles_and_predictions_take_it(model, task):
    scores = score_edges(model, task, ablation=NOISE, progress=False)
    curve = faithfulness_curve(model, task, scores, ablation=NOISE, fractions=(0.1, 1.0), progress=False)
    assert curve["faithfulness"].iloc[-1] == pytest.approx(1.0, abs=1e-3)
    larger = make_task(model, known_relation(model, 12), n=4)
    drawn = discover_many(model, larger, "eap", ablation=TEXT, edges=40, draws=3, checkpoint=False, progress=False)
    assert "ablation" in drawn.twins  # whose seed is drawn
    assert predict(model, task, ablation=NOISE) > 0


def test_the_command_line_lists_and_takes_it(folder, words, tmp_path, capsys):
    relation, out = tmp_path / "words.json", tmp_path / "circuit.json"
    words_file = words.to_json()
    relation.write_text(words_file)
    quiet = ["--model", folder, "--facts", "3", "--device", "cpu", "--quiet"]
    assert main(["discover", str(relation), "--ablation", TEXT, "--edges", "40", "--out", str(out), *quiet]) == 0
    assert Circuit.load(out).ablation == TEXT
    assert main(["completeness", str(out), "--relation", str(relation), "--draws", "0", "--quiet", "--json"]) == 0
    capsys.readouterr()
    assert main(["discover", str(relation), "--ablation", "noise", *quiet]) == 2
    assert "gaussian-noise" in capsys.readouterr().err


def test_a_sweep_takes_it_by_object_text_and_file(folder, words, tmp_path):
    given = {"n": 3, "device": "cpu", "edges": 40, "progress": False, "store": tmp_path / "store"}
    table = sweep([folder], [words], ["eap"], ablations=["mean", NOISE], **given)
    assert table["ablation"].tolist() == ["mean", TEXT] and (table["status"] == "done").all()
    assert table.equals(sweep([folder], [words], ["eap"], ablations=["mean", TEXT], **given))
    assert Circuit.load(table["circuit"][1]).ablation == TEXT
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'models = [{json.dumps(folder)}]\nrelations = ["antonym"]\nstore = "s"\n'
        f'methods = ["eap"]\nablations = ["{TEXT}"]'
    )
    assert read_sweep_file(file)["ablations"] == [TEXT]


def test_a_panel_offers_it(model):
    settings = {"method": "eap-ig", "metric": "nll", "edges": 40, "tau": 0.1, "within": None}
    controls = Controls(model, ablation=NOISE, n=3, seed=0, **settings)
    offered = [value for _, value in controls.ablation.options]
    assert {"zero", "mean", "resample", "gaussian-noise", TEXT} <= set(offered)
    assert controls.settings["ablation"] == TEXT


def test_the_room_names_what_an_extension_needs():
    assert kcwb.circuits.AblationKind is AblationKind and kcwb.circuits.register_ablation is register_ablation
