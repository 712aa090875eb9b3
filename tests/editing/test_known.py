"""Models are recognised by family and shape, under whatever name they come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kcwb.editing.edit import default_layer
from kcwb.editing.known import KNOWN, known_settings
from kcwb.editing.registry import METHODS
from kcwb.models.loading import load_model


def shaped(family: str, n_layers: int, n_heads: int, d_model: int, d_mlp: int = 0) -> Any:
    """As much of a model as is looked at."""
    graph = SimpleNamespace(n_layers=n_layers, n_heads=n_heads)
    layers = [SimpleNamespace(W_out=range(d_mlp or 4 * d_model))]
    return SimpleNamespace(
        network=SimpleNamespace(family=family, graph=graph, d_model=d_model, layers=layers), graph=graph
    )


@pytest.mark.parametrize(
    ("shape", "method", "expected"),
    [
        (("gpt2", 24, 16, 1024), "rome", {"layer": 8, "clamp": 3}),
        (("gpt2", 36, 20, 1280), "rome", {"layer": 12, "clamp": 4}),
        (("gpt2", 48, 25, 1600), "rome", {"layer": 17, "clamp": 4}),
        (("gptj", 28, 16, 4096), "rome", {"layer": 5, "clamp": 4}),
        (("gpt_neox", 44, 64, 6144), "rome", {"layer": 15, "clamp": 4}),
        (("gpt2", 48, 25, 1600), "memit", {"layer": 17, "clamp": 0.75, "spread": 5, "weight": 20_000}),
    ],
)
def test_published_values_are_taken(shape, method, expected):
    """As in the files `hparams/` of the authors' repositories."""
    found, source = known_settings(shaped(*shape), method)
    assert found == {**expected, "steps": 20, "lr": 0.5, "decay": 0.5, "penalty": "norm", "kl": 0.0625}
    assert source.startswith("published for gpt")


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (("llama", 32, 32, 4096, 11008), "Llama-2-7B"),
        (("llama", 28, 24, 3072, 8192), "Llama-3.2-3B"),
        (("mistral", 32, 32, 4096, 14336), "Mistral-7B"),
        (("qwen2", 28, 28, 3584, 18944), "Qwen2.5-7B"),
    ],
)
def test_values_of_easyedit_are_taken_where_the_authors_have_none(shape, name):
    """As in `hparams/R-ROME` and `hparams/ROME` of EasyEdit."""
    found, source = known_settings(shaped(*shape), "rome")
    assert found == {
        "layer": 5, "steps": 25, "lr": 0.5, "decay": 1e-3, "penalty": "norm", "kl": 0.0625, "clamp": 4
    }  # fmt: skip
    assert source == f"published in EasyEdit for {name}"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("gpt2", 48, 25, 1600), {"layer": 17, "spread": 5, "steps": 20}),
        (("gptj", 28, 16, 4096), {"layer": 8, "spread": 6, "steps": 25}),
        (("llama", 32, 32, 4096, 14336), {"layer": 8, "spread": 5, "steps": 25, "lr": 0.1}),
    ],
)
def test_alphaedit_s_published_values_are_taken(shape, expected):
    """As in `hparams/AlphaEdit` of its authors; what is of their covariances' scale is not."""
    found, source = known_settings(shaped(*shape), "alphaedit")
    more = {"lr": 0.5, "decay": 0.5, "penalty": "norm", "kl": 0.0625, "clamp": 0.75, "weight": 10.0}
    assert found == {**more, **expected} and source.startswith("published")


def test_two_llamas_differ_in_the_width_of_their_mlps_alone():
    """ROME's and MEMIT's values for Llama-3-8B in the files of AlphaEdit's authors."""
    shape = ("llama", 32, 32, 4096, 14336)
    assert known_settings(shaped(*shape), "rome")[0] == known_settings(shaped(*shape[:4], 11008), "rome")[0]
    found = known_settings(shaped(*shape), "memit")[0]
    assert (found["lr"], found["clamp"], found["weight"], found["decay"]) == (0.1, 0.75, 15_000.0, 0.5)
    assert known_settings(shaped(*shape[:4], 11008), "memit")[0]["clamp"] == 4.0


def test_fine_tuning_with_a_constraint_has_the_authors_bounds():
    clamps = {24: 2e-3, 36: 1e-3, 48: 5e-4}
    for n_layers, n_heads, d_model in ((24, 16, 1024), (36, 20, 1280), (48, 25, 1600)):
        found = known_settings(shaped("gpt2", n_layers, n_heads, d_model), "ft_l")[0]
        assert found == {"layer": 0, "steps": 25, "lr": 5e-4, "clamp": clamps[n_layers]}


@pytest.mark.parametrize("shape", [("gpt2", 12, 12, 768), ("llama", 24, 16, 1024), ("gpt2", 24, 16, 1000)])
def test_an_unknown_model_gets_a_share_of_the_depth_and_is_told_so(shape):
    found, source = known_settings(shaped(*shape), "rome")
    assert found == {"layer": round(0.3 * shape[1])} and "no rome of this model is known" in source


def test_what_is_known_are_settings_of_the_methods():
    for one in KNOWN:
        for method, values in one.settings.items():
            settings = {name: value for name, value in values.items() if name != "layer"}
            METHODS[method].settings(**settings)
            assert 0 <= values["layer"] < one.shape.n_layers


@pytest.mark.model
def test_the_built_in_model_is_known_from_memory_too(smollm2):
    name = smollm2.name
    again = load_model(smollm2.bridge.original_model.config.name_or_path)  # its folder
    assert again.name != name
    for method, layer in (("rome", 3), ("ft_m", 3), ("ft_l", 3), ("memit", 5), ("alphaedit", 5)):
        assert default_layer(again, method) == default_layer(smollm2, method) == layer
