"""A folder is read whole and its Python is never run, or it is refused with what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kcwb.errors import ModelError
from kcwb.models.encoder import load_encoder
from kcwb.models.loading import load_model
from tests.tiny import ARCHITECTURES, tiny_hf, tokenizer

# gpt2: fused and transposed; neox: other names in the file than in memory; phi3: fused; gemma2: tied; gemma3: not
FAMILIES = ("gpt2", "llama", "neox", "opt", "phi3", "gemma2", "gemma3")


def write(folder: Path, name: str = "llama", **more) -> Path:
    """A tiny model as a folder."""
    tiny_hf(name, **more).save_pretrained(folder)
    words = tokenizer()
    if name in ("bert", "roberta"):
        words.mask_token = "w89"
    words.save_pretrained(folder)
    return folder


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) take out tensors of a folder, their names with `__` for each dot."""
    path = folder / "model.safetensors"
    stored = load_file(path) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, path, {"format": "pt"})


def configure(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def layer_key(name: str) -> str:
    """How a family's configuration names the number of layers."""
    return "n_layer" if name in ("gpt2", "gptj") else "num_layers" if name == "gpt-neo" else "num_hidden_layers"


# --- incomplete weights ---


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_tensor_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    stored = load_file(write(tmp_path, name) / "model.safetensors")
    lost = next(key for key in sorted(stored) if ".1." in key and key.endswith("weight"))
    change(tmp_path, **{lost.replace(".", "__"): None})
    with pytest.raises(ModelError, match=rf"config\.json.*: 1 missing \(\S*{lost.rpartition('.1.')[2]}\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("gemma")])
def test_a_layer_more_or_less_than_the_weights_is_refused(name: str, tmp_path: Path) -> None:
    configure(write(tmp_path, name), **{layer_key(name): 3})
    with pytest.raises(ModelError, match=r"\d+ missing \(.*2\..*, \.\.\.\)"):
        load_model(tmp_path)
    configure(tmp_path, **{layer_key(name): 1})
    with pytest.raises(ModelError, match=r"\d+ not the model's \(.*1\..*, \.\.\.\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
def test_weights_of_something_else_are_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name) / "model.safetensors"
    save_file({"x": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="2 layers, but its files of weights hold 1 tensors"):
        load_model(tmp_path)
    save_file({f"x{i}": torch.zeros(10_000) for i in range(9)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"\d+ missing \(.*9 not the model's \(x0, \.\.\.\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(name: str, tmp_path: Path) -> None:
    key = {"gpt2": "transformer.h.1.mlp.c_fc.weight", "llama": "model.layers.1.mlp.up_proj.weight"}[name]
    wanted = tuple(load_file(write(tmp_path, name) / "model.safetensors")[key].shape)
    change(tmp_path, **{key.replace(".", "__"): torch.zeros(5, 7)})
    with pytest.raises(ModelError, match=r"1 of another shape") as refused:
        load_model(tmp_path)
    assert f"{key}: (5, 7) instead of {wanted}" in str(refused.value)


def test_a_surplus_tensor_is_refused(tmp_path: Path) -> None:
    change(write(tmp_path), model__layers__1__self_attn__q_proj__bias=torch.zeros(32))
    with pytest.raises(ModelError, match=r"1 not the model's \(model\.layers\.1\.self_attn\.q_proj\.bias\)"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt-neo", "transformer.h.0.attn.attention.masked_bias"),
        ("gptj", "transformer.h.0.attn.masked_bias"),
        ("neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    ],
)
def test_masks_and_tables_that_older_files_hold_are_no_surplus(name: str, key: str, tmp_path: Path) -> None:
    plain = load_model(write(tmp_path, name), device="cpu").digest
    change(tmp_path, **{key.replace(".", "__"): torch.zeros(4)})
    assert load_model(tmp_path, device="cpu").digest == plain


def test_missing_weights_are_refused_on_several_devices_too(tmp_path: Path) -> None:
    change(write(tmp_path), model__norm__weight=None)
    with pytest.raises(ModelError, match=r"1 missing \(model\.norm\.weight\)"):
        load_model(tmp_path, device_map={"": "cpu"})


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_with_missing_weights_is_refused_and_one_with_other_heads_is_not(name: str, tmp_path: Path) -> None:
    plain = load_encoder(write(tmp_path, name), device="cpu").digest
    heads = {"cls__seq_relationship__weight": torch.zeros(2, 32), f"{name}__pooler__dense__weight": torch.zeros(32, 32)}
    change(tmp_path, **heads)
    assert load_encoder(tmp_path, device="cpu").digest == plain
    change(tmp_path, **{f"{name}__encoder__layer__1__output__dense__weight": None})
    with pytest.raises(ModelError, match=r"1 missing \(\w+\.encoder\.layer\.1\.output\.dense\.weight\)"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_of_weights_is_refused_in_words(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes({"cut": path.read_bytes()[:-100], "empty": b"", "text": b"hello " * 50}[damage])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)


# --- configurations that ask for too much ---


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gpt2", {"n_layer": 10**7}, r"10,000,000 layers, but its files of weights hold \d+ tensors"),
        ("llama", {"num_hidden_layers": 10**9}, r"1,000,000,000 layers, but"),
        ("gpt-neo", {"num_layers": 10**8, "attention_types": [[["global", "local"], 10**8]]}, "100,000,000 layers"),
        ("gpt-neo", {"attention_types": [[["global", "local"], 10**9]]}, "1,000,000,000 layers"),
        ("neox", {"hidden_size": 4 * 10**7, "num_attention_heads": 4}, r"[\d,]{15,} weights"),
        ("llama", {"intermediate_size": 10**10}, r"[\d,]{15,} weights"),
        ("opt", {"vocab_size": 10**12}, r"[\d,]{15,} weights"),
        ("qwen3", {"head_dim": 10**8}, r"[\d,]{14,} weights"),
        ("gptj", {"n_positions": 10**7}, r"entries of tables"),
        ("llama", {"hidden_size": 0}, "cannot be loaded|cannot be run|describes"),
        ("llama", {"max_position_embeddings": -1}, "reads -1 tokens"),
        ("llama", {"attn_implementation": "someone/kernel"}, "code of the hub"),
    ],
)
def test_a_configuration_of_more_than_the_files_hold_is_refused_at_once(
    name: str, settings: dict, words: str, tmp_path: Path
) -> None:
    configure(write(tmp_path, name), **settings)
    started = time.process_time()
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path)
    assert time.process_time() - started < 5


def test_the_weights_of_a_folder_in_the_old_format_are_counted_too(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    torch.save(tiny_hf("llama").state_dict(), tmp_path / "pytorch_model.bin")
    configure(tmp_path, num_hidden_layers=10**7)
    with pytest.raises(ModelError, match="10,000,000 layers"):
        load_model(tmp_path)


def test_an_encoder_of_too_many_layers_is_refused_at_once(tmp_path: Path) -> None:
    configure(write(tmp_path, "bert"), num_hidden_layers=10**7)
    with pytest.raises(ModelError, match="10,000,000 layers"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000, '{"n_layer": 1e999}'], ids=range(6))
def test_a_config_that_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (write(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folders_tokenizer_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    texts = ["w1 w2 w89", "what is <unk>", ""]
    read = load_model(write(tmp_path, name), device="cpu").tokenizer
    assert [read(text).input_ids for text in texts] == [tokenizer()(text).input_ids for text in texts]


def test_a_tokenizer_that_cannot_read_a_word_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "tokenizer.json"
    words = {"type": "WordLevel", "vocab": {"w1": 1}, "unk_token": "<unk>"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": words, "added_tokens": []}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)


# --- one model, one digest ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_digest_does_not_depend_on_how_a_model_is_stored(name: str, tmp_path: Path) -> None:
    module = tiny_hf(name)
    expected = load_model(module, tokenizer(), device="cpu").digest
    folders = [write(tmp_path / kind, name) for kind in ("whole", "shards", "bin", "twice")]
    (tmp_path / "shards" / "model.safetensors").unlink()
    module.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    twice = {key: value.clone() for key, value in module.state_dict().items()}  # tied weights under each name
    save_file(twice, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    assert {load_model(folder, device="cpu").digest for folder in folders} == {expected}
    assert load_model(folders[0], device_map={"": "cpu"}).digest == expected


# --- foreign code ---

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    return None
"""
AUTO = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForMaskedLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


def evil(folder: Path, model_type: str = "evil", generation: bool = False) -> Path:
    """A folder whose module leaves a mark when it is imported; returns the mark's path."""
    write(folder)
    mark = folder / "mark"
    code = EVIL.format(mark=str(mark))
    (folder / "evil.py").write_text(code)
    configure(folder, model_type=model_type, auto_map=AUTO)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO, "tokenizer_class": "EvilTokenizer"}))
    if generation:
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
    return mark


def answer(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own whose standard input says yes, often."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("loader", ["kcwb.load_model", "kcwb.load_encoder"])
def test_a_folders_python_is_never_run_whatever_the_answer(loader: str, tmp_path: Path) -> None:
    mark = evil(tmp_path)
    ran = answer(f"import sys, kcwb; {loader}(sys.argv[1])", str(tmp_path))
    assert not mark.exists()
    assert "Do you wish to run" not in ran.stdout + ran.stderr
    assert "kcwb.errors.ModelError" in ran.stderr and "which kcwb never runs" in ran.stderr


def test_a_covered_model_with_code_beside_it_loads_without_it(tmp_path: Path) -> None:
    mark = evil(tmp_path, "llama", generation=True)
    ran = answer("import sys, kcwb; print(kcwb.load_model(sys.argv[1], device='cpu'))", str(tmp_path))
    assert not mark.exists() and "Do you wish to run" not in ran.stdout + ran.stderr
    assert ran.returncode == 0 or "which kcwb never runs" in ran.stderr


def test_a_circuit_whose_provenance_names_such_a_folder_does_not_run_it(tmp_path: Path) -> None:
    mark = evil(tmp_path / "model")
    code = """
import sys, kcwb
from kcwb.models.graph import Graph
provenance = {"model": {"name": sys.argv[1], "digest": "0" * 64}, "relation": {"name": "country_capital"}}
kcwb.Circuit.from_edges(Graph(2, 4, False), {}, provenance=provenance).save(sys.argv[2])
from kcwb.cli import main
sys.exit(main(["completeness", sys.argv[2]]))
"""
    ran = answer(code, str(tmp_path / "model"), str(tmp_path / "circuit.json"))
    assert not mark.exists() and "Do you wish to run" not in ran.stdout + ran.stderr
    assert ran.returncode != 0 and "which kcwb never runs" in ran.stderr and "Traceback" not in ran.stderr
