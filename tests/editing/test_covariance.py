"""The covariance of keys: what it is, where it is kept, and that it is of these weights."""

from __future__ import annotations

import pytest
import torch

from kcwb.editing import covariance as module
from kcwb.editing.covariance import Covariance, covariance, covariances, sample_texts, whiten
from kcwb.editing.edit import edit
from kcwb.errors import SettingError
from kcwb.models.loading import load_model
from tests.editing.conftest import FACT, QUICK, keys_and_outputs
from tests.tiny import tiny_hf, tokenizer


def test_it_is_the_mean_of_the_outer_products_of_the_models_own_keys(model, tmp_path):
    found = covariances(model, [0, 1], tokens=600, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    texts = module._load(folder / "texts.safetensors")[0]["texts"]
    assert found[0].n_tokens == len(texts) * (texts.shape[1] - 1) >= 600
    assert len({tuple(text) for text in texts.tolist()}) > len(texts) // 2 - 2  # samples differ from each other
    for layer in (0, 1):
        keys = keys_and_outputs(model, layer, texts)[0].reshape(*texts.shape, -1)[:, 1:].double()
        for half, part in zip(found[layer].halves, keys.chunk(2), strict=True):
            expected = torch.einsum("nti,ntj->ij", part, part) / part[..., 0].numel()
            assert torch.allclose(half.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[layer].matrix, found[layer].halves.mean(0))


def test_it_is_kept_by_weights_and_made_again_when_damaged(model, tmp_path, monkeypatch):
    first = covariance(model, 1, tokens=300, cache=tmp_path)
    made = []
    monkeypatch.setattr(module, "_accumulate", lambda *a, real=module._accumulate: made.append(1) or real(*a))
    assert torch.equal(covariance(model, 1, tokens=300, cache=tmp_path).halves, first.halves) and not made
    (path,) = tmp_path.rglob("layer1.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.allclose(covariance(model, 1, tokens=300, cache=tmp_path).halves, first.halves) and made == [1]
    covariance(model, 1, tokens=300, seed=1, cache=tmp_path)
    with edit(model, FACT, "w50", "ft_m", layer=0, **{k: QUICK[k] for k in QUICK if k != "prefixes"}):
        other = covariance(model, 1, tokens=300, cache=tmp_path)
    assert made == [1, 1, 1] and not torch.allclose(other.halves, first.halves)


def test_sampled_texts_repeat_and_leave_the_random_state_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (sample_texts(model, ["w1", "w2 w3"], 6, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert one == same != other
    bos = int(model.prepend_bos)
    assert [len(text) for text in one] == [7 + bos, 8 + bos]


def test_whitening_solves_the_ridged_system():
    keys = torch.randn(40, 6)
    matrix = keys.T @ keys / 40
    key = torch.randn(6)
    ridged = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(6)
    assert torch.allclose(ridged @ whiten(matrix, key, 0.1), key, atol=1e-5)
    assert torch.allclose(whiten(torch.eye(6), key, 0.0), key)


def test_a_singular_matrix_needs_a_ridge():
    matrix = torch.ones(4, 4)
    with pytest.raises(SettingError, match="ridge"):
        whiten(matrix, torch.ones(4), 0.0)
    assert torch.isfinite(whiten(matrix, torch.ones(4), 0.01)).all()


def test_agreement_is_one_for_equal_halves_and_less_for_others():
    torch.manual_seed(0)
    keys, key = torch.randn(2, 30, 5), torch.randn(5)
    halves = keys.transpose(1, 2) @ keys / 30
    assert Covariance(0, halves[:1].expand(2, -1, -1), 60).agreement(key, 0.01) == pytest.approx(1, abs=1e-5)
    assert Covariance(0, halves, 60).agreement(key, 0.01) < 0.999


@pytest.mark.parametrize("wrong", [{"layer": 2}, {"layer": -1}, {"layer": 0, "tokens": 5}])
def test_what_cannot_be_meant_is_refused(model, wrong):
    with pytest.raises(SettingError):
        covariance(model, **wrong)


def test_texts_are_those_of_the_tokenizer_and_of_its_first_token(tmp_path):
    """The same weights with and without BOS, or with other words, write other texts."""
    module, others = tiny_hf("llama", seed=3), tokenizer()
    others.backend_tokenizer.add_tokens(["w5 w6"])
    found = [
        covariance(load_model(module, words, device="cpu", prepend_bos=bos), 0, tokens=300, cache=tmp_path)
        for words, bos in ((tokenizer(), True), (tokenizer(), False), (others, True))
    ]
    assert len(list(tmp_path.iterdir())) == 3
    assert not torch.allclose(found[0].halves, found[1].halves)


def test_a_narrow_mlp_and_a_short_context_have_a_covariance(tmp_path):
    for more in ({"intermediate_size": 2}, {"max_position_embeddings": 2}, {"max_position_embeddings": 8}):
        model = load_model(tiny_hf("llama", **more), tokenizer(), device="cpu")
        assert covariance(model, 0, cache=tmp_path).n_tokens >= 128
    model = load_model(tiny_hf("gpt2", n_positions=4), tokenizer(), device="cpu")
    assert covariance(model, 0, cache=tmp_path).n_tokens >= 128
    assert all(len(text) <= 4 for text in sample_texts(model, ["w1", "w2 w3 w4 w5 w6"], 10, 0))


def test_the_same_weights_with_a_shorter_context_have_texts_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KCWB_CACHE", str(tmp_path))
    long, short = (load_model(tiny_hf("gptj", n_positions=n), tokenizer(), device="cpu") for n in (64, 8))
    assert long.digest == short.digest
    whole = covariance(long, 0)
    assert covariance(short, 0).n_tokens != whole.n_tokens


def test_the_users_folder_may_be_told_from_home(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KCWB_CACHE", "~/kept")
    monkeypatch.chdir(tmp_path)
    covariance(model, 1, tokens=300)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and len([*tmp_path.rglob("layer1.safetensors")]) == 1
