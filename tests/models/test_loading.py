"""A name becomes a model, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

from kcwb.editing.edit import EditError, edit
from kcwb.errors import ModelError, SettingError
from kcwb.models.digest import weights_digest
from kcwb.models.encoder import load_encoder
from kcwb.models.forward import forward
from kcwb.models.loading import Model, load_model
from tests.editing.conftest import FACT, QUICK
from tests.tiny import ARCHITECTURES, tiny_hf, tokenizer


def test_a_local_folder_gives_the_same_model_as_memory(tmp_path: Path) -> None:
    module = tiny_hf("llama")
    module.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    here, there = load_model(module, tokenizer(), device="cpu"), load_model(tmp_path, device="cpu")
    tokens = torch.randint(94, (2, 5))
    assert here.digest == there.digest
    assert torch.equal(here.logits(tokens), there.logits(tokens))


@pytest.mark.parametrize("name", ["no-such/model", "./no/such/folder"])
def test_a_name_that_is_nowhere_is_refused_with_what_a_name_can_be(name: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded.*smollm2-135m.*built in.*folder.*hub"):
        load_model(name)


def test_a_revision_of_a_name_is_that_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two snapshots in a cache of the hub, as Hugging Face's library lays them out; offline."""
    repository = tmp_path / "models--tiny--pythia"
    for seed, (commit, name) in enumerate([("a" * 40, "main"), ("b" * 40, "step1000")]):
        snapshot = repository / "snapshots" / commit
        tiny_hf("neox", seed).save_pretrained(snapshot)
        tokenizer().save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    main, early = load_model("tiny/pythia"), load_model("tiny/pythia", revision="step1000")
    assert [main.digest, early.digest] == [weights_digest(tiny_hf("neox", seed)) for seed in (0, 1)]
    assert early.name == "tiny/pythia@step1000" and load_model(early.name).digest == early.digest
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model("tiny/pythia@step7")


def test_a_revision_of_a_folder_is_a_folder_in_it(tmp_path: Path) -> None:
    for seed, folder in enumerate([tmp_path, tmp_path / "step3"]):
        tiny_hf("llama", seed).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    early = load_model(tmp_path, revision="step3")
    assert early.digest == load_model(tmp_path / "step3").digest != load_model(tmp_path).digest
    assert early.name == f"{tmp_path}@step3" and load_model(early.name).digest == early.digest
    for missing in ("step4", "..", "step3/../step3"):
        with pytest.raises(ModelError, match=r"no revision.*it has step3"):
            load_model(tmp_path, revision=missing)


def test_what_has_no_revisions_is_refused() -> None:
    with pytest.raises(SettingError, match="built in, and has no revisions"):
        load_model("smollm2-135m", revision="step1")
    with pytest.raises(SettingError, match="in memory is one revision"):
        load_model(tiny_hf("llama"), tokenizer(), revision="step1")
    with pytest.raises(SettingError, match="not a name, @ and a revision"):
        load_model("tiny/pythia@")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)


def test_a_model_in_memory_needs_its_tokenizer() -> None:
    with pytest.raises(SettingError, match="needs its tokenizer"):
        load_model(tiny_hf("llama"))


def test_a_named_model_brings_its_own_tokenizer() -> None:
    with pytest.raises(SettingError, match="brings its own"):
        load_model("smollm2-135m", tokenizer())


def test_a_tokenizer_without_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ModelError, match="offsets"):
        load_model(tiny_hf("llama"), slow)


@pytest.mark.parametrize(("setting", "words"), [({"device": "warp"}, "warp"), ({"dtype": "float31"}, "float32")])
def test_unknown_settings_are_refused(setting: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        load_model(tiny_hf("llama"), tokenizer(), **setting)  # type: ignore[arg-type]


def test_half_precision_passes_its_own_bound() -> None:
    model = load_model(tiny_hf("llama").to(torch.bfloat16), tokenizer(), device="cpu")
    assert model.dtype == torch.bfloat16


def test_bos_follows_the_tokenizer_unless_said() -> None:
    assert not load_model(tiny_hf("llama"), tokenizer(), device="cpu").prepend_bos
    assert load_model(tiny_hf("llama"), tokenizer(), device="cpu", prepend_bos=True).prepend_bos


def test_wrapping_leaves_the_callers_tokenizer_alone() -> None:
    mine = tokenizer()
    before = dict(mine.init_kwargs)
    load_model(tiny_hf("llama"), mine, device="cpu")
    assert mine.init_kwargs == before


def test_parameters_keep_no_gradients(tiny) -> None:
    assert not any(p.requires_grad for p in tiny("gpt2").bridge.original_model.parameters())


@pytest.mark.model
def test_the_builtin_model_knows_paris(smollm2: Model) -> None:
    assert smollm2.graph.n_edges == 123_211 and not smollm2.prepend_bos
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    probabilities = smollm2.logits(ids)[0, -1].softmax(-1)
    assert smollm2.tokenizer.decode(probabilities.argmax()) == " Paris"
    assert probabilities.max().item() == pytest.approx(0.77, abs=0.01)


# --- one module, loaded again ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_module_can_be_loaded_again_and_all_its_models_compute_the_same(name: str) -> None:
    module, tokens = tiny_hf(name), torch.randint(94, (2, 5))
    first = load_model(module, tokenizer(), device="cpu")
    logits = first.logits(tokens)
    again = load_model(module, tokenizer(), device="cpu")
    wrapped = load_model(again.bridge.original_model, tokenizer(), device="cpu")
    for model in (again, wrapped, first):
        assert (model.digest, model.name) == (first.digest, first.name)
        assert torch.equal(model.logits(tokens), logits)
        assert torch.equal(forward(model.network, tokens).residual, forward(first.network, tokens).residual)
    assert set(first.siblings) == {first, again, wrapped}


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "neox"])
def test_a_module_is_not_loaded_again_while_an_edit_is_in_it_and_is_after(name: str) -> None:
    module = tiny_hf(name)
    model = load_model(module, tokenizer(), device="cpu")
    made = edit(model, FACT, "w50", layer=0, **QUICK)
    with made:
        for again in (module, model.bridge.original_model):
            with pytest.raises(ModelError, match=r"loaded before, and an edit is in its weights \('w50'\).*undo"):
                load_model(again, tokenizer(), device="cpu")
    assert load_model(module, tokenizer(), device="cpu").digest == model.digest == weights_digest(module)


def test_an_edit_of_one_model_is_said_by_all_over_the_same_tensors() -> None:
    module, tokens = tiny_hf("llama"), torch.randint(94, (2, 5))
    first, second = (load_model(module, tokenizer(), device="cpu") for _ in range(2))
    apart = load_model(tiny_hf("llama"), tokenizer(), device="cpu")
    plain = first.digest
    made, other = (edit(model, FACT, "w50", layer=0, **QUICK) for model in (first, second))
    with made:
        assert first.digest == second.digest != plain == apart.digest
        assert second.edits == first.edits and second.name == first.name and not apart.edits
        assert torch.equal(second.logits(tokens), first.logits(tokens))
        made.require_own(second)
        with pytest.raises(SettingError, match="another Model object"):
            made.require_own(apart)
        other.apply()
        with pytest.raises(EditError, match="undo that first"):
            made.undo()
        other.undo()
    assert first.digest == second.digest == plain and not second.edits


# --- options of a configuration ---

# What each family's own code gives with them is what the nodes give, beside the tiny models of tests.tiny.
ODD = {
    "gpt2": [{"tie_word_embeddings": False}, {"n_inner": 20}, {"n_head": 1}, {"layer_norm_epsilon": 0}],
    "llama": [{"head_dim": 6}, {"num_key_value_heads": 1}, {"rms_norm_eps": 0}],
    "mistral-window": [{"sliding_window": None}, {"head_dim": 12}, {"tie_word_embeddings": True}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}],
    "qwen3": [{"attention_bias": True, "head_dim": 8}],
    "neox": [{"rotary_pct": 1.0}, {"tie_word_embeddings": True}, {"hidden_act": "relu"}],
    "opt": [
        {"layer_norm_elementwise_affine": False},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False, "enable_bias": False},
        {"tie_word_embeddings": False},
    ],
    "gptj": [{"rotary_dim": 2}, {"tie_word_embeddings": True}],
    "gpt-neo": [{"attention_types": [[["local"], 2]]}, {"tie_word_embeddings": False}],
    "phi": [{"partial_rotary_factor": 1.0}, {"tie_word_embeddings": True}],
    "phi3": [{"sliding_window": None}, {"partial_rotary_factor": 0.5}],
    "gemma": [{"hidden_activation": "relu"}, {"attention_bias": True}, {"head_dim": 12}],
    "gemma2": [{"tie_word_embeddings": False}, {"hidden_activation": "relu"}],
    "gemma3": [{"final_logit_softcapping": 3.0}, {"head_dim": 12}],
}


@pytest.mark.parametrize(("name", "more"), [(name, more) for name, options in ODD.items() for more in options], ids=str)
def test_the_odd_options_of_a_family_are_computed_as_hugging_face_computes_them(name: str, more: dict) -> None:
    module = tiny_hf(name, **more)
    module.set_attn_implementation("eager")
    tokens = torch.randint(94, (2, 7))
    right = module(tokens).logits
    model = load_model(module, tokenizer(), device="cpu")
    ours = model.network.logits(forward(model.network, tokens).residual)
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("neox", {"attention_bias": False}, "without attention biases"),
        ("gpt2", {"scale_attn_weights": False}, "unscaled attention"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("opt", {"do_layer_norm_before": False}, "post-layer-norm"),
        ("opt", {"word_embed_proj_dim": 16}, "projected embeddings"),
        ("opt", {"_remove_final_layer_norm": True}, "final layer norm"),
        ("phi", {"qk_layernorm": True}, "query and key norms"),
        ("gemma2", {"attention_bias": True}, "attention biases"),
        ("gemma3", {"attn_logit_softcapping": 2.0}, "bound on attention scores"),
        ("gemma", {"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_options_that_are_not_covered_are_refused_by_name(name: str, more: dict, words: str) -> None:
    with pytest.raises(ModelError, match=rf"{words}.* is not covered"):
        load_model(tiny_hf(name, **more), tokenizer(), device="cpu")


def test_an_option_that_nobody_foresaw_is_refused_in_one_line() -> None:
    module = tiny_hf("llama")
    module.config.num_attention_heads = 3
    with pytest.raises(ModelError, match=r"cannot be run node by node \(\w+: .*\)\. An option"):
        load_model(module, tokenizer(), device="cpu")


def test_prompts_end_where_a_rotation_depends_on_their_length() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long = tiny_hf("llama", rope_parameters={**rope, "factor": 2.0, "original_max_position_embeddings": 32})
    assert load_model(long, tokenizer(), device="cpu").network.n_ctx == 32


# --- tokenizers ---


def larger(added: bool) -> T.PreTrainedTokenizerFast:
    """A tokenizer of 96 tokens, two more than the tiny models have."""
    if added:
        words = tokenizer()
        words.add_special_tokens({"additional_special_tokens": ["<picture>", "<sound>"]})
        return words
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w2", mask_token="w1")


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"96 tokens, with ids up to 95, .* has 94 rows"):
        load_model(tiny_hf("llama"), larger(added=False))
    with pytest.raises(ModelError, match=r"ids up to 95, .* has 94 rows"):
        load_encoder(tiny_hf("bert"), larger(added=False))
    tiny_hf("llama").save_pretrained(tmp_path)
    larger(added=False).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"ids up to 95, .* has 94 rows"):
        load_model(tmp_path)


def test_added_tokens_that_no_text_has_may_lie_beyond_the_embedding() -> None:
    words = larger(added=True)
    assert load_model(tiny_hf("llama"), words, device="cpu").tokenizer is words
    words.bos_token = "<sound>"
    with pytest.raises(ModelError, match=r"ids up to 95"):
        load_model(tiny_hf("llama"), words, device="cpu", prepend_bos=True)


# --- several devices ---

_PARTS = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama of two layers."""
    tiny_hf("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def placed(**changes: str) -> dict[str, str]:
    """Every part on the CPU, but those said otherwise."""
    return {**{f"model.{part}": "cpu" for part in _PARTS}, "lm_head": "cpu"} | {
        f"model.{name.replace('_', '.')}": place for name, place in changes.items()
    }


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", placed()], ids=["whole", "name", "parts"])
def test_a_device_map_gives_the_same_model(folder: Path, device_map) -> None:
    plain, mapped = load_model(folder, device="cpu"), load_model(folder, device_map=device_map)
    tokens = torch.randint(94, (2, 5))
    assert mapped.digest == plain.digest and mapped.device == torch.device("cpu") == mapped.network.device
    assert torch.equal(mapped.logits(tokens), plain.logits(tokens)) and mapped.network.devices == [mapped.device]


def test_layers_on_disk_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"9 weights of .* away from the device.*layers\.1\.self_attn.*more GPUs"):
        load_model(folder, device_map=placed(layers_1="disk"))


def test_device_maps_that_cannot_be_meant_are_refused(folder: Path) -> None:
    with pytest.raises(SettingError, match="device='cpu' or device_map, not both"):
        load_model(folder, device="cpu", device_map="auto")
    with pytest.raises(SettingError, match="where it is"):
        load_model(tiny_hf("llama"), tokenizer(), device_map="auto")
    with pytest.raises(SettingError, match=r"keeps its precision, torch.float32.*\.to\(torch.bfloat16\)"):
        load_model(tiny_hf("llama"), tokenizer(), dtype="bfloat16")
    assert load_model(tiny_hf("llama").bfloat16(), tokenizer(), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    with pytest.raises(SettingError, match="'warp'"):
        load_model(folder, device_map={"": "warp"})
    with pytest.raises(SettingError, match=f"'cuda:{torch.cuda.device_count()}'"):
        load_model(folder, device_map={"": torch.cuda.device_count()})
    with pytest.raises(ModelError, match=r"cannot be loaded.*nowhere"):
        load_model(folder, device_map="nowhere")
