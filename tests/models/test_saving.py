"""A saved model loads again bit for bit, edits in it; a folder is whole or as it was."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import check_same_model
from kcwb.editing.edit import edit
from kcwb.errors import CircuitError, ModelError, SettingError
from kcwb.models import saving
from kcwb.models.digest import weights_digest
from kcwb.models.loading import Model, load_model
from kcwb.models.plain import plain_copy
from tests.editing.conftest import FACT, QUICK
from tests.tiny import ARCHITECTURES, POST_NORM, tiny_hf, tiny_model, tokenizer

TOKENS = torch.arange(10).reshape(2, 5)


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in plain_copy(model.bridge.original_model).state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def llama() -> Model:
    return tiny_model("llama")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_model_loads_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    folder = model.save(tmp_path / "saved")
    again = load_model(folder, device="cpu")
    assert again.digest == model.digest and same(state(again), state(model))
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))
    assert again.tokenizer("w1 w2 x").input_ids == model.tokenizer("w1 w2 x").input_ids
    module, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()) and weights_digest(module) == model.digest
    assert names(tmp_path) == ["saved"] and {"config.json", "model.safetensors", "kcwb.json"} <= set(names(folder))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in POST_NORM])
def test_an_edited_model_is_saved_with_its_edit_and_says_so(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    made, plain, before = edit(model, FACT, "w50", layer=0, **QUICK), model.digest, state(model)
    with made:
        folder, edited, logits, joint = (
            model.save(tmp_path / "edited"),
            state(model),
            model.logits(TOKENS),
            model.digest,
        )
    assert same(state(model), before) and model.digest == plain
    again = load_model(folder, device="cpu")
    assert same(state(again), edited) and torch.equal(again.logits(TOKENS), logits)
    assert again.digest == weights_digest(again.bridge.original_model) and again.digest not in (plain, joint)
    assert again.edits == () and [one["targets"] for one in again.saved["edits"]] == [["w50"]]
    assert again.saved["edits"][0]["digest"] == made.digest and again.saved["unedited_digest"] == plain
    found = Circuit.full(model.graph)
    check_same_model(again, replace(found, provenance={"model": {"name": "x", "digest": joint}}))
    with pytest.raises(CircuitError, match="found on"):
        check_same_model(again, replace(found, provenance={"model": {"name": "x", "digest": plain}}))


def test_edits_before_and_after_a_save_are_both_recorded(llama: Model, tmp_path: Path) -> None:
    with edit(llama, FACT, "w50", layer=0, **QUICK):
        again = load_model(llama.save(tmp_path / "one"), device="cpu")
    with edit(again, FACT, "w51", layer=1, **QUICK):
        last = load_model(again.save(tmp_path / "two"), device="cpu")
    assert [one["targets"] for one in last.saved["edits"]] == [["w50"], ["w51"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_saved_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_model(tiny_hf("gpt2").to(dtype), tokenizer(), device="cpu")
    again = load_model(model.save(tmp_path / "half"), dtype=dtype, device="cpu")
    assert again.digest == model.digest and same(state(again), state(model))


def test_whether_prompts_begin_with_bos_is_saved_and_can_be_said_otherwise(tmp_path: Path) -> None:
    model = load_model(tiny_hf("llama"), tokenizer(), prepend_bos=True, device="cpu")
    folder = model.save(tmp_path / "bos")
    assert load_model(folder, device="cpu").prepend_bos
    assert not load_model(folder, device="cpu", prepend_bos=False).prepend_bos
    half = load_model(folder, device="cpu", dtype="bfloat16")  # other weights, of which the record does not speak
    assert half.prepend_bos and half.saved == {}
    again = load_model(folder.parent, revision=folder.name, device="cpu")  # the same folder, named otherwise
    assert again.prepend_bos and again.saved == load_model(folder, device="cpu").saved != {}


def test_a_record_counts_only_for_the_weights_that_it_was_written_for(llama: Model, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "saved")
    tiny_hf("llama", seed=1).save_pretrained(folder)
    again = load_model(folder, device="cpu")
    assert again.digest != llama.digest and again.saved == {} and not again.has_weights(llama.digest)
    for text in ("", "[]", '{"format": "kcwb-model-1"}', "[" * 10**5):
        (folder / "kcwb.json").write_text(text)
        assert load_model(folder, device="cpu").saved == {}


def test_a_record_is_ready_for_people_and_other_programs(llama: Model, tmp_path: Path) -> None:
    record = json.loads((llama.save(tmp_path / "saved") / "kcwb.json").read_text())
    assert record["digest"] == record["model_digest"] == record["unedited_digest"] == llama.digest
    assert record["dtype"] == "float32" and record["edits"] == [] and set(record["files"]) == set(record["sha256"])


# --- where it is written ---


def test_a_folder_that_was_saved_here_is_replaced_and_others_are_not(llama: Model, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "a" / "b")
    assert tiny_model("gpt2").save(folder) == folder
    assert load_model(folder, device="cpu").network.family == "gpt2"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match=r"1 files that are not of a model saved here \('notes\.txt'\).*force=True"):
        llama.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    llama.save(folder, force=True)
    assert "notes.txt" not in names(folder) and load_model(folder, device="cpu").digest == llama.digest
    assert names(folder.parent) == ["b"]


def test_a_foreign_model_is_replaced_with_force_alone(llama: Model, tmp_path: Path) -> None:
    tiny_hf("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SettingError, match="not of a model saved here"):
        llama.save(tmp_path / "gpt2")
    llama.save(tmp_path / "gpt2", force=True)
    assert load_model(tmp_path / "gpt2", device="cpu").digest == llama.digest


@pytest.mark.parametrize("force", [False, True])
def test_files_and_folders_of_folders_are_never_replaced(llama: Model, tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home" / "work").mkdir(parents=True)
    for place, words in (("file", "is a file"), ("home", "holds folders")):
        with pytest.raises(SettingError, match=words):
            llama.save(tmp_path / place, force=force)
    with pytest.raises(ModelError, match=r"cannot be saved as .*a file is where a folder has to be"):
        llama.save(tmp_path / "file" / "below", force=force)
    assert names(tmp_path) == ["file", "home"] and (tmp_path / "file").read_text() == "mine"


def test_a_model_can_be_saved_over_the_folder_that_it_was_loaded_from(llama: Model, tmp_path: Path) -> None:
    again = load_model(llama.save(tmp_path / "saved"), device="cpu")
    logits = again.logits(TOKENS)
    again.save(tmp_path / "saved")
    assert torch.equal(again.logits(TOKENS), logits)
    assert load_model(tmp_path / "saved", device="cpu").digest == llama.digest


def test_a_link_to_a_folder_stays_a_link(llama: Model, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    llama.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and "config.json" in names(tmp_path / "real")


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["save_model", "read_pretrained", "file_digests", "rename"])
def test_what_stops_a_save_leaves_the_old_folder_and_nothing_else(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, trouble: BaseException
) -> None:
    folder = llama.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = os.rename

    def stop(*arguments, **_):
        if where == "rename" and not str(arguments[0]).endswith(".tmp"):
            return rename(*arguments)
        raise trouble

    monkeypatch.setattr(os if where == "rename" else saving, where, stop)
    with pytest.raises((ModelError, KeyboardInterrupt), match=r"No space left|^$"):
        tiny_model("gpt2").save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and names(tmp_path) == ["saved"]


# --- what cannot be saved ---


def test_weights_that_something_else_has_changed_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.network.layers[0].W_out[0] += 1
    with pytest.raises(ModelError, match="something other than an Edit has changed them"):
        model.save(tmp_path / "saved")
    assert names(tmp_path) == []


def test_what_does_not_read_back_as_it_is_is_refused(tmp_path: Path) -> None:
    module = tiny_hf("llama").double()
    module.model.norm.float()  # one precision cannot say both
    model = load_model(tiny_hf("llama"), tokenizer(), device="cpu")
    object.__setattr__(model.bridge, "original_model", module)
    object.__setattr__(model, "digest", weights_digest(module))
    with pytest.raises(ModelError, match=r"does not read back as it is: its configuration"):
        model.save(tmp_path / "saved")
    assert names(tmp_path) == []


def test_a_tokenizer_that_does_not_read_back_is_refused(tmp_path: Path) -> None:
    words = tokenizer()
    model = load_model(tiny_hf("llama"), words, device="cpu")
    write = words.save_pretrained

    def other(folder, **_):
        tokenizer().save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        path.write_text(path.read_text().replace('"w1":', '"w1000":', 1))

    words.save_pretrained = other  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"The tokenizer .* does not read back"):
        model.save(tmp_path / "saved")
    words.save_pretrained = write  # type: ignore[method-assign]
    model.save(tmp_path / "saved")


# --- the built-in model ---


@pytest.mark.model
def test_the_built_in_model_is_saved_and_loads_again(smollm2: Model, tmp_path: Path) -> None:
    again = load_model(smollm2.save(tmp_path / "saved"))
    tokens = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert again.digest == smollm2.digest and torch.equal(again.logits(tokens), smollm2.logits(tokens))
