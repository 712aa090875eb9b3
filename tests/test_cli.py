"""The command line: results on stdout, one line on stderr for bad input, and nothing heavy before it is needed."""

from __future__ import annotations

import html
import inspect
import json
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import kcwb
from kcwb import cli
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.discover import discover
from kcwb.discovery.methods import METHODS
from kcwb.discovery.selection import SELECTIONS
from kcwb.evaluation.completeness import completeness
from kcwb.models.families import ENCODERS, FAMILIES
from kcwb.models.loading import load_model
from kcwb.tasks.metrics import METRICS
from kcwb.tasks.relations import load_relations, relation_files
from kcwb.tasks.task import make_task
from tests.tiny import tiny_hf, tokenizer

HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "numpy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model as a local folder."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_hf("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def file(tmp_path, words) -> str:
    """The relation of words as a file."""
    words.save(tmp_path / "words.json")
    return str(tmp_path / "words.json")


@pytest.fixture
def run(capsys):
    """Run a command in this process: its exit code, and the text that it printed."""

    def run(*argv: object) -> SimpleNamespace:
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def found(run, folder, file, tmp_path) -> Path:
    """The file of a circuit that the command line found on words."""
    path = tmp_path / "circuit.json"
    assert run("discover", file, "--model", folder, "--edges", 40, "--facts", 4, "--out", path, "--quiet").code == 0
    return path


@pytest.fixture
def no_model(monkeypatch) -> None:
    """No model may be loaded."""

    def refuse(*_, **__):
        raise AssertionError("a model is loaded before the arguments are checked")

    monkeypatch.setattr("kcwb.models.loading.load_model", refuse)


def refused(result: SimpleNamespace, *parts: str) -> bool:
    """Exit code 2, nothing on stdout, and exactly one line on stderr that holds all the parts."""
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("kcwb: error: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result
    assert [part for part in parts if part not in result.err] == [], result.err
    return True


def kcwb_process(*argv: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "kcwb.cli", *argv], text=True, timeout=100, check=False, **more)


@pytest.fixture
def notebook(tmp_path) -> Path:
    """A notebook that prints its parameters."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell("x = 1\ny = 2", metadata={"tags": ["parameters"]}), new_code_cell("print('got', [x, y])")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "n.ipynb")
    return tmp_path / "n.ipynb"


# help and version


@pytest.mark.parametrize("argv", [["--help"], ["discover", "--help"], ["relations"], ["--version"], ["discvoer"]])
def test_what_needs_no_model_imports_nothing_heavy(argv: list[str]) -> None:
    code = f"import sys\nfrom kcwb.cli import main\nmain({argv!r})\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(run) -> None:
    assert run("--version") == SimpleNamespace(code=0, out=f"kcwb {kcwb.__version__}\n", err="")


def test_the_help_names_every_command(run) -> None:
    text = run("--help").out
    for name in ("relations", "models", "discover", "completeness", "sweep", "world"):
        assert f"    {name}" in text
        assert run(name, "--help").out.startswith(f"usage: kcwb {name}")


def test_the_help_of_discover_names_every_choice_and_every_default(run) -> None:
    text = " ".join(run("discover", "--help").out.split()).replace(", ", " ").replace("(", "").replace(")", "").split()
    ours = [name for name, method in METHODS.items() if method.function.__module__.startswith("kcwb.")]  # not tests'
    for name in (*ours, *METRICS, *("zero", "mean", "resample"), *SELECTIONS, "float32", "bfloat16", "float16"):
        assert name in text, name
    for name in ("edges", "threshold", "select", "steps", "tau", "absolute"):
        assert f"--{name}" in text
    signature = inspect.signature(discover).parameters
    assert (signature["method"].default, signature["metric"].default) == ("gim", "nll")  # as the help says


def test_the_defaults_are_those_of_the_functions() -> None:
    args = cli._parser().parse_args(["discover", "words"])
    assert (args.device, args.model) == tuple(
        inspect.signature(load_model).parameters[name].default for name in ("device", "model")
    )
    assert (args.dtype, inspect.signature(load_model).parameters["dtype"].default) == ("float32", None)
    assert (args.facts, args.seed, args.template) == tuple(
        inspect.signature(make_task).parameters[name].default for name in ("n", "seed", "template")
    )
    args = cli._parser().parse_args(["completeness", "c.json"])
    assert (args.draws, args.k) == tuple(
        inspect.signature(completeness).parameters[name].default for name in ("draws", "k")
    )


# bad input


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["COMMAND", "kcwb --help"]),
        (["discvoer"], ["'discvoer'", "Did you mean 'discover'?"]),
        (["discover"], ["RELATION", "kcwb discover --help"]),
        (["discover", "country_capitol"], ["'country_capitol'", "'country_capital'"]),
        (["discover", "no/such/file.json"], ["no/such/file.json"]),
        (["discover", "country_capital", "--edgse", "3"], ["--edgse"]),
        (["discover", "country_capital", "--edges", "many"], ["--edges", "'many'"]),
        (["discover", "country_capital", "--method", "eap-gi"], ["--method", "'eap-gi'", "'eap-ig'"]),
        (["discover", "country_capital", "--metric", "nil"], ["--metric", "'nll'"]),
        (["discover", "country_capital", "--edges", "-5"], ["edges=-5"]),
        (["discover", "country_capital", "--template", "99"], ["template=99", "0 to 3"]),
        (["discover", "country_capital", "--ablation", "men"], ["--ablation", "'mean'"]),
        (["discover", "country_capital", "--method", "eap", "--metric", "kl"], ["kl is zero", "eap-ig"]),
        (["discover", "country_capital", "--facts", "0"], ["n=0"]),
        (["discover", "country_capital", "--select", "gredy"], ["--select", "'greedy'"]),
        (["discover", "country_capital", "--out", "no/such/folder/c.json"], ["--out", "no/such/folder"]),
        (["discover", "country_capital", "--out", "circuit"], ["--out", ".json"]),
        (["completeness", "no-such.json"], ["no-such.json"]),
        (["completeness", "."], ["circuit"]),
        (["relations", "--folder", "no/such/folder"], ["no/such/folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("no_model")
def test_bad_input_is_one_line_and_needs_no_model(run, argv: list[str], parts: list[str]) -> None:
    assert refused(run(*argv), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--edges", "0"], ["edges=0"]),
        (["--edges", "3", "--threshold", "0.1"], ["not both"]),
        (["--method", "eap", "--steps", "3"], ["eap takes", "steps"]),
        (["--method", "acdc", "--tau", "-1"], ["tau=-1"]),
        (["--facts", "0"], ["n=0"]),
        (["--template", "7"], ["template=7", "0 to 2"]),
        (["--template", "no place for it"], ["{}"]),
        (["--device", "warp"], ["warp", "'cpu'"]),
        (["--dtype", "float31"], ["float31", "float32"]),
        (["--model", "no/such"], ["no/such", "cannot be loaded"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_discover_refuses_is_one_line(run, folder, file, options: list[str], parts: list[str]) -> None:
    assert refused(run("discover", file, "--model", folder, *options, "--quiet"), *parts)


@pytest.mark.usefixtures("no_model")
def test_out_overwrites_only_circuits(run, file) -> None:
    before = Path(file).read_bytes()
    assert refused(run("discover", file, "--out", file), "--out", "only a circuit is overwritten")
    assert Path(file).read_bytes() == before


@pytest.mark.usefixtures("no_model")
def test_out_is_checked_before_a_model_is_loaded(run, file, tmp_path) -> None:
    taken, within = tmp_path / "taken.json", tmp_path / "within.json"
    taken.write_text('{"format": "mine"}')
    Circuit.empty(kcwb.Graph(1, 1)).save(within)
    (tmp_path / "link.json").symlink_to(within)
    (tmp_path / "folder.json").mkdir()
    within_is_read = ["--within", within, "--method", "acdc"]
    for out, options, part in [
        (taken, [], "only a circuit is overwritten, if kcwb wrote it. Choose another name, or force it (--force"),
        (tmp_path / "folder.json", ["--force"], "is a folder"),
        (tmp_path / "no" / "x.json", ["--force"], "is not a folder. Make it first"),
        (tmp_path / "x.txt", ["--force"], "ends in .json"),
        (file, ["--force"], "words.json, which is read"),
        (within, [*within_is_read, "--force"], "within.json, which is read"),
        (tmp_path / "link.json", within_is_read, "within.json, which is read"),
    ]:
        assert refused(run("discover", file, "--out", out, *options), "--out", part)
    assert taken.read_text() == '{"format": "mine"}'


def test_force_overwrites_and_a_circuit_is_overwritten_without(run, file, folder, tmp_path) -> None:
    out = tmp_path / "x.json"
    out.write_text("mine")
    how = ("discover", file, "--model", folder, "--edges", 40, "--facts", 4, "--quiet", "--out", out)
    assert run(*how, "--force").code == 0 and run(*how).code == 0
    assert Circuit.load(out).n_edges


def test_bad_input_in_a_process_of_its_own_has_no_traceback() -> None:
    done = kcwb_process("discover", "country_capitol", capture_output=True)
    assert refused(SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr), "'country_capital'")


# relations and models


def test_relations_are_those_of_the_package(run) -> None:
    rows, text = json.loads(run("relations", "--json").out), run("relations").out.splitlines()
    assert text[0].split() == ["name", "type", "facts", "zero-shot", "templates"] and len(text) == 1 + len(rows)
    expected = [
        {"name": r.name, "type": r.relation_type, "facts": len(r.facts), "templates": [*r.prompt_templates_zs]}
        for r in load_relations()
    ]
    assert [{key: row[key] for key in expected[0]} for row in rows] == expected
    assert [row["file"] for row in rows] == [str(path) for path in relation_files().values()]
    for line, row in zip(text[1:], rows, strict=True):
        assert line.split()[:3] == [row["name"], row["type"], str(row["facts"])] and row["templates"][0] in line


def test_relations_of_a_folder_show_the_files_to_name_them_by(run, file, tmp_path) -> None:
    assert file in run("relations", "--folder", tmp_path).out
    (tmp_path / "words.json").write_text("{}")
    assert refused(run("relations", "--folder", tmp_path), "words.json", "missing")
    (tmp_path / "words.json").unlink()
    assert refused(run("relations", "--folder", tmp_path), "no .json file")


def test_every_family_has_examples() -> None:
    assert all(one.examples for one in (FAMILIES | ENCODERS).values())
    assert "facebook/opt-350m" not in FAMILIES["opt"].examples  # the one that is refused


def test_models_lists_families_and_the_built_in_model_without_converting_it(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))
    data, text = json.loads(run("models", "--json").out), run("models").out
    assert data["built_in"]["name"] == "smollm2-135m" and data["built_in"]["converted"] is False
    families = {one["family"]: one for one in data["families"]}
    assert [*families] == [one.name for one in (FAMILIES | ENCODERS).values()]
    assert all(one["nodes"] for one in families.values())
    assert [name for name, one in families.items() if not one["edges"]] == ["BERT", "RoBERTa"]
    assert [name for name, one in families.items() if one["editing"]] == [
        name for name in families if not name.startswith(("Gemma 2", "Gemma 3", "BERT", "RoBERTa"))
    ]
    for words in ("smollm2-135m", *families, "gpt2-medium", "self-check at load", data["built_in"]["state"]):
        assert words in text
    assert not (tmp_path / "cache").exists()


@pytest.mark.model
def test_models_says_where_the_built_in_model_is(run, smollm2) -> None:
    from kcwb.models.builtin import builtin_folder

    state = json.loads(run("models", "--json").out)["built_in"]
    assert (state["converted"], state["folder"]) == (True, str(builtin_folder()))


# discover


def test_discover_json_equals_the_plain_function(run, folder, file, words) -> None:
    done = run("discover", file, "--model", folder, "--edges", 40, "--facts", 4, "--seed", 3, "--template", 1, "--json")
    model = load_model(folder)
    circuit = discover(model, make_task(model, words, n=4, seed=3, template=1), edges=40, progress=False)
    data = json.loads(done.out)
    assert done.code == 0 and data["out"] is None
    assert (data["n_edges"], data["n_nodes"]) == (circuit.n_edges, circuit.n_nodes)
    pd.testing.assert_frame_equal(pd.DataFrame(data["edges"]), circuit.edges, check_dtype=False, rtol=1e-6)
    changing = {"seconds": 0, "time": ""}
    assert data["provenance"] | changing == dict(circuit.provenance) | changing


def test_discover_passes_every_option_on(run, folder, file) -> None:
    def recorded(*options: object) -> dict:
        return json.loads(run("discover", file, "--model", folder, *options, "--json", "--quiet").out)["provenance"]

    origin = recorded(
        "--method", "eap-ig", "--steps", 2, "--threshold", 0.001, "--select", "absolute", "--metric", "kl"
    )
    expected = {"steps": 2, "threshold": 0.001, "select": "absolute"}
    assert origin["parameters"] | expected == origin["parameters"] and origin["metric"] == "kl"
    origin = recorded("--method", "acdc", "--tau", 0.5, "--absolute", "--ablation", "mean", "--facts", 2)
    expected = {"tau": 0.5, "absolute": True}
    assert origin["parameters"] | expected == origin["parameters"]
    assert (origin["ablation"], origin["n"]) == ("mean", 2)
    origin = recorded("--template", "w1 {} w2", "--dtype", "bfloat16", "--device", "cpu")
    assert origin["template"] == "w1 {} w2" and (origin["model"]["dtype"], origin["model"]["device"]) == (
        "bfloat16",
        "cpu",
    )


def test_discover_prints_the_ten_strongest_edges_and_writes_the_file(run, folder, file, tmp_path) -> None:
    path = tmp_path / "circuit.json"
    done = run("discover", file, "--model", folder, "--edges", 40, "--out", path)
    circuit = Circuit.load(path)
    lines = done.out.splitlines()
    assert lines[0].startswith(repr(circuit)) and folder in lines[0]
    assert lines[2].split() == ["sender", "receiver", "score"]
    assert [line.split()[:2] for line in lines[3:13]] == circuit.edges[["sender", "receiver"]].head(10).values.tolist()
    assert lines[-1] == f"Written to {path}"
    assert "attribution" in done.err  # the bar
    again = run("discover", file, "--model", folder, "--edges", 30, "--out", path, "--quiet")
    assert again.code == 0 and again.err == "" and Circuit.load(path).n_edges <= 30


def test_our_own_warnings_are_one_line_each(run, folder, words, tmp_path) -> None:
    longer = replace(words.facts[1], subject="w1 w2 w3 w4 w5")
    replace(words, facts=(longer, *words.facts[2:])).save(tmp_path / "uneven.json")
    options = ["--model", folder, "--facts", 11, "--ablation", "resample", "--edges", 20, "--quiet"]
    done = run("discover", tmp_path / "uneven.json", *options, "--seed", 1)
    warned = [line for line in done.err.splitlines() if line.startswith("kcwb: warning: resample ablation")]
    assert done.code == 0 and done.err.splitlines() == warned and len(warned) <= 1


def test_an_empty_circuit_is_pointed_out(run, folder, file) -> None:
    done = run("discover", file, "--model", folder, "--edges", 1, "--select", "signed", "--json", "--quiet")
    assert json.loads(done.out)["edges"] == []
    assert done.err.startswith("kcwb: warning: the circuit is empty") and done.err.count("\n") == 1


# sweep


@pytest.fixture
def sweep_file(folder, file, tmp_path) -> Path:
    """A sweep of two cells, one of which has no model."""
    path = tmp_path / "sweep.toml"
    models = json.dumps([folder, str(tmp_path / "nowhere")])
    path.write_text(f"models = {models}\nrelations = ['words.json']\nmethods = ['eap']\nstore = 'store'\nn = 4\n")
    return path


def test_sweep_prints_the_table_keeps_the_circuits_and_says_what_failed(run, sweep_file, tmp_path) -> None:
    text = run("sweep", sweep_file, "--quiet")
    assert text.code == 0 and "1 of 2 cells are done" in text.out and "ModelError" in text.out and text.err == ""
    data = json.loads(run("sweep", sweep_file, "--quiet", "--json").out)
    assert [one["status"] for one in data] == ["done", "failed"]
    assert Circuit.load(data[0]["circuit"]).n_edges == data[0]["n_edges"] and data[1]["circuit"] is None
    assert Path(data[0]["circuit"]).is_relative_to(tmp_path / "store")


@pytest.mark.parametrize(
    ("text", "argv", "parts"),
    [
        ("modles = []", [], ["sweep.toml", "'modles'", "'models'"]),
        ("models = ['gpt2']\nrelations = ['country_capitol']\nstore = 's'", [], ["'country_capital'"]),
        ("models = ['a']\nrelations = ['country_capital']\nstore = 's'\nmethods = ['acd']", [], ["'acd'", "'acdc'"]),
        ("", ["--workers", "0"], ["--workers 0"]),
        ("", ["--workers", "1", "--scheduler", "tcp://127.0.0.1:1"], ["--scheduler", "--workers"]),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_sweep_that_makes_no_sense_is_one_line_and_needs_no_model(run, tmp_path, text, argv, parts) -> None:
    (tmp_path / "sweep.toml").write_text(text)
    assert refused(run("sweep", tmp_path / "sweep.toml", *argv, "--quiet"), *parts)
    assert not (tmp_path / "s").exists()


# world


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of our own."""
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_world_keeps_relation_files_that_differ(run, cache, tmp_path, monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("models are trained before the files are checked")

    monkeypatch.setattr("kcwb.world.models.train_world", refuse)
    kcwb.world.make_world(0).save(tmp_path / "facts")
    one = next(iter(sorted((tmp_path / "facts").iterdir())))
    one.write_text(one.read_text() + " ")
    assert refused(run("world", "--relations", tmp_path / "facts"), "--relations", one.name, "is kept")
    (tmp_path / "file").write_text("")
    assert refused(run("world", "--relations", tmp_path / "file"), "is not a folder")


def test_world_trains_says_where_and_finds_again(run, cache, tmp_path) -> None:
    options = ["--architectures", "bert", "llama", "--steps", 2, "--seed", 3]
    first = run("world", *options, "--relations", tmp_path / "facts", "--json", "--quiet")
    data = json.loads(first.out)
    assert (first.code, first.err) == (0, "") and [one["architecture"] for one in data] == ["bert", "llama"]
    assert all(Path(one["folder"]).is_relative_to(cache) for one in data)
    assert [row["kind"] for row in data[0]["known"]] == ["atomic", "composed", "held out"]
    made = json.loads((Path(data[1]["folder"]) / "kcwb.json").read_text())["recipe"]
    assert (made["steps"], made["seed"]) == (2, 3)
    again = run("world", *options)
    assert again.code == 0 and again.out.startswith("168 facts, 396 sentences")
    lines = again.out.splitlines()
    assert lines[2].split() == ["model", "atomic", "composed", "held", "out", "folder"]
    assert [line.split()[-1] for line in lines[3:]] == [one["folder"] for one in data]
    found = run("relations", "--folder", tmp_path / "facts", "--json")
    assert len(json.loads(found.out)) == 7


def test_a_model_of_the_world_is_discovered_in_by_its_folder(run, cache, tmp_path) -> None:
    options = ["--architectures", "gpt2", "--steps", 2, "--relations", tmp_path, "--json", "--quiet"]
    folder = json.loads(run("world", *options).out)[0]["folder"]
    done = run("discover", tmp_path / "person_city.json", "--model", folder, "--edges", 500, "--json", "--quiet")
    assert done.code == 0 and json.loads(done.out)["provenance"]["model"]["name"] == folder


@pytest.mark.parametrize(
    ("option", "parts"), [(["--architectures", "lama"], ["'llama'"]), (["--steps", 0], ["steps=0"])]
)
def test_a_world_that_makes_no_sense_is_one_line_and_trains_nothing(run, cache, option, parts) -> None:
    assert refused(run("world", *option, "--quiet"), *parts)
    assert not cache.exists()


# completeness


def test_completeness_json_equals_the_plain_function(run, found, file, folder, words) -> None:
    done = run("completeness", found, "--relation", file, "--draws", 2, "--json", "--quiet")
    model = load_model(folder)
    frame = completeness(model, Circuit.load(found), make_task(model, words, n=4), draws=2, progress=False)
    assert (done.code, done.err) == (0, "")
    pd.testing.assert_frame_equal(pd.DataFrame(json.loads(done.out)), frame, check_dtype=False)


def test_completeness_is_on_the_facts_that_the_circuit_was_found_on(run, file, folder, tmp_path, monkeypatch) -> None:
    seen = {}

    def look(model, circuit, task, **more):
        seen.update(model=model, task=task, circuit=circuit, **more)
        return completeness(model, circuit, task, **more)

    monkeypatch.setattr("kcwb.evaluation.completeness.completeness", look)
    path = tmp_path / "circuit.json"
    run("discover", file, "--model", folder, "--facts", 3, "--seed", 5, "--template", 2, "--out", path)
    assert run("completeness", path, "--relation", file, "--draws", 1).code == 0
    task = seen["task"]
    assert [[fact.subject, fact.object] for fact in task.val.facts] == seen["circuit"].provenance["facts"]
    assert (seen["ablation"], seen["k"], seen["draws"], seen["seed"]) == (None, 10, 1, 5)
    options = ["--seed", 6, "--facts", 2, "--template", 0, "--ablation", "zero", "--k", 3, "--draws", 1]
    assert "Hit@3" in run("completeness", path, "--relation", file, *options).out
    assert (seen["task"].seed, seen["task"].n, seen["task"].template) == (6, 2, "w80 {} w81 w82")
    assert (seen["ablation"], seen["k"], seen["seed"]) == ("zero", 3, 6)


@pytest.mark.parametrize(
    ("option", "said"),
    [(["--draws", -1], "draws=-1"), (["--k", 0], "k=0"), (["--ablation", "men"], "'mean'"), (["--facts", 0], "n=0")],
)
def test_completeness_refuses_what_cannot_be_meant_before_a_model_is_loaded(
    run, found, file, monkeypatch, option, said
) -> None:
    monkeypatch.setattr("kcwb.models.loading.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert refused(run("completeness", found, "--relation", file, *option, "--quiet"), said)


def test_completeness_prints_a_rounded_table(run, found, file) -> None:
    lines = run("completeness", found, "--relation", file, "--draws", 1, "--quiet").out.splitlines()
    assert lines[0].startswith(repr(Circuit.load(found))) and lines[0].endswith("w80 {} w81 w82")
    assert lines[2].split() == ["run", "split", "edges", "nodes", "facts", "Hit@10", "low", "high", "nll"]
    assert len(lines) == 3 + 4 * 3
    assert all(len(number.split(".")[1]) == 2 for line in lines[3:] for number in line.split()[-4:] if number != "-")


def test_a_relation_of_ones_own_must_be_given_again(run, found) -> None:
    assert refused(run("completeness", found), "'words'", "does not come with the package", "--relation PATH.json")


def test_a_relation_with_other_contents_is_refused_unless_it_is_asked_for(run, folder, words, tmp_path) -> None:
    replace(words, name="country_capital").save(tmp_path / "country_capital.json")
    path = tmp_path / "circuit.json"
    options = ["--model", folder, "--edges", 30, "--facts", 4, "--quiet"]
    assert run("discover", tmp_path / "country_capital.json", *options, "--out", path).code == 0
    assert refused(run("completeness", path), "'country_capital'", "other contents", "--relation PATH.json")
    replace(words, facts=words.facts[:-1]).save(tmp_path / "fewer.json")
    done = run("completeness", path, "--relation", tmp_path / "fewer.json", "--draws", 1, "--quiet")
    assert done.code == 0 and done.err.startswith("kcwb: warning: ") and done.err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("provenance", "parts"),
    [
        ({}, ["--relation"]),
        ({"relation": {"name": "country_capital"}}, ["--model"]),
        ({"relation": "country_capital"}, ["damaged"]),
        ({"relation": {"name": "country_capital"}, "seed": "soon"}, ["damaged", "'soon'"]),
    ],
)
def test_what_a_circuit_does_not_say_is_asked_for(run, tiny, tmp_path, provenance: dict, parts: list[str]) -> None:
    replace(Circuit.full(tiny("llama").graph), provenance=provenance).save(tmp_path / "c.json")
    assert refused(run("completeness", tmp_path / "c.json"), *parts)


def test_a_circuit_of_another_model_is_refused(run, capsys, found, file, tmp_path) -> None:
    tiny_hf("llama", seed=1).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    capsys.readouterr()  # of saving
    done = run("completeness", found, "--relation", file, "--model", tmp_path / "other", "--quiet")
    assert refused(done, "found on", "other")


# manners


def noisy(args):
    """Do something, and talk."""
    print("chatter on stdout")
    warnings.warn("chatter in a warning", stacklevel=1)
    logging.getLogger("library").warning("chatter in a log")
    return {"ok": True}, "result"


def test_the_chatter_of_libraries_is_silent_and_comes_back_afterwards(run, monkeypatch, caplog) -> None:
    monkeypatch.setitem(cli.COMMANDS, "models", (noisy, (cli.option("--json"),)))
    assert run("models") == SimpleNamespace(code=0, out="result\n", err="")
    assert not caplog.records
    logging.getLogger("library").warning("heard again")
    assert caplog.records


def test_a_command_is_one_function(run, monkeypatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "greet", cli.COMMANDS["models"])  # and to be gone afterwards

    @cli.command(cli.option("--times", type=int, default=1))
    def greet(args):
        """Say 100% hello."""
        return {"times": args.times}, "hello " * args.times

    assert "Say 100% hello." in run("--help").out and "Say 100% hello." in run("greet", "--help").out
    assert json.loads(run("greet", "--times", 2, "--json").out) == {"times": 2}
    assert run("greet", "--times", 2).out == "hello hello \n"


def test_ctrl_c_is_one_line(run, folder, file, monkeypatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kcwb.discovery.discover.discover", interrupt)
    done = run("discover", file, "--model", folder)
    assert (done.code, done.out, done.err.splitlines()[-1]) == (130, "", "kcwb: interrupted.")


@pytest.mark.parametrize("argv", [["relations"], ["relations", "--json"], ["discover", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with os.fdopen(writer, "w") as stdout:
        done = kcwb_process(*argv, stdout=stdout, stderr=subprocess.PIPE, env=buffered)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_without_the_letters_is_no_error(words, tmp_path) -> None:
    replace(words, prompt_templates_zs=("Straße {} Ł",)).save(tmp_path / "words.json")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = kcwb_process("relations", "--folder", str(tmp_path), capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "Stra\\xdfe" in done.stdout


# report


def test_report_never_overwrites_the_notebook_or_a_file_of_anothers(run, notebook, tmp_path, monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the notebook is run before its output is checked")

    monkeypatch.setattr("kcwb.workbench.report.write.execute", refuse)
    monkeypatch.chdir(tmp_path)
    before = notebook.read_bytes()
    (tmp_path / "link.html").symlink_to(notebook)
    (tmp_path / "mine.html").write_text("mine")
    for force in ([], ["--force"]):
        assert refused(run("report", notebook, "-o", notebook, *force), "A report is an HTML file: name it n.html")
        assert refused(run("report", "n.ipynb", "-o", "link.html", *force), "is n.ipynb, which is read")
        assert refused(run("report", notebook, "-o", tmp_path, *force), "is a folder")
    assert refused(run("report", notebook, "-o", "mine.html"), "only a page is overwritten", "--force")
    assert notebook.read_bytes() == before and (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (("-5.5e-3", "['a', -1, true]"), [-0.0055, ["a", -1, True]]),
        (("--quiet", "-"), ["--quiet", "-"]),
        (('"7"', "{'a': [null, 'b']}"), ["7", {"a": [None, "b"]}]),
    ],
)
def test_report_gives_parameters_to_the_notebook_as_they_are_meant(run, notebook, tmp_path, texts, values) -> None:
    out = tmp_path / "out.html"
    done = run("report", "-p", "x", texts[0], notebook, "-p", "y", texts[1], "--json", "--quiet", "-o", out)
    assert done.code == 0 and json.loads(done.out)["parameters"] == dict(zip("xy", values, strict=True)), done.err
    assert html.escape(f"got {values}", quote=False) in out.read_text().replace("&#39;", "'")


def test_report_refuses_parameters_in_one_line(run, notebook) -> None:
    assert refused(run("report", notebook, "-p", "x", "[" * 3000), "'x' is a list or dict nested more than 100 deep")
    assert refused(run("report", notebook, "-p", "x"), "-p: expected 2 arguments")
    assert refused(run("report", notebook, "-p", "z", "-1"), "has no parameter 'z'")


def test_report_warns_of_missing_pictures_in_one_line(run, notebook, tmp_path) -> None:
    import nbformat
    from nbformat.v4 import new_markdown_cell, new_notebook

    nbformat.write(new_notebook(cells=[new_markdown_cell("![x](gone.png)")]), notebook)
    done = run("report", notebook, "-o", tmp_path / "out.html", "--quiet")
    assert done.code == 0 and done.err == "kcwb: warning: The report lacks pictures: missing picture: gone.png\n"


@pytest.mark.model
def test_the_circuit_of_capitals_from_discovery_to_completeness(run, tmp_path) -> None:
    path = tmp_path / "circuit.json"
    assert run("discover", "country_capital", "--edges", 300, "--out", path, "--quiet").err == ""
    circuit = Circuit.load(path)
    assert 0 < circuit.n_edges <= 300 and circuit.provenance["model"]["name"] == "smollm2-135m"
    done = run("completeness", path, "--draws", 1, "--json", "--quiet")
    hits = {row["run"]: row["hit"] for row in json.loads(done.out) if row["split"] == "D_val"}
    assert done.err == "" and hits["full model"] == 1.0
    assert hits["circuit"] > hits["random circuits"] and hits["circuit"] > hits["empty circuit"]
