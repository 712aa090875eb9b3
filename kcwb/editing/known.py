"""What is known to work on which model: what was published for it, and settings of sweeps of ours.

A model is recognised by its family and its shape, since it may come from the hub, a folder or memory, under any name,
in any precision, and edited. What is not known here has the method's own defaults, which are the same for all models;
`Edit.parameters["defaults"]` says which values were taken, and from where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kcwb.editing.registry import METHODS
from kcwb.models.loading import Model


class Shape(NamedTuple):
    """By what a model is recognised."""

    family: str
    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int


class Known(NamedTuple):
    """What is known of the models of one shape, from where, in words: method -> values of `layer` and its settings."""

    shape: Shape
    source: str
    settings: Mapping[str, Mapping[str, Any]]


# As in the authors' files: their decay multiplies |δ| / |m|², and its value is for that.
_DELTA: dict[str, Any] = {"steps": 20, "lr": 0.5, "decay": 0.5, "penalty": "norm", "kl": 0.0625}
_EASY: dict[str, Any] = {"steps": 25, "lr": 0.5, "decay": 1e-3, "penalty": "norm", "kl": 0.0625, "clamp": 4.0}
_EASY_MEMIT: dict[str, Any] = {"layer": 8, "spread": 5, "weight": 15_000.0, **_EASY}
_EASY_BOTH: dict[str, Any] = {"rome": {"layer": 5, **_EASY}, "memit": _EASY_MEMIT}
_LLAMA_3: dict[str, Any] = {"layer": 8, "spread": 5, "clamp": 0.75, **_DELTA, "steps": 25, "lr": 0.1}
_TUNING: dict[str, Any] = {"layer": 0, "steps": 25, "lr": 5e-4}

#: From the files `hparams/` of github.com/kmeng01/rome (ROME; FT with a constraint, which is our `ft_l`) and of
#: github.com/kmeng01/memit (MEMIT); r-ROME's authors (arXiv 2403.07175) take ROME's. For Llama, Mistral and Qwen from
#: `hparams/{R-ROME,ROME,MEMIT}` of github.com/zjunlp/EasyEdit, whose ROME leaves C out (its README: to be quick).
#: AlphaEdit's, and Llama-3-8B's, from `hparams/` of github.com/jianghoucheng/AlphaEdit, but for the bound of the null
#: space, which is of its covariances' scale (`kcwb.editing.methods.alphaedit`). Covariances are of Wikipedia there,
#: and ours of text that the project makes.
#: SmolLM2-135M: over eight facts (`layer_sweep` on `edit_cases(model, n=8, seed=1)`), ES is 1 at layers 1 to 9 and PS
#: .88 (.81 at 9). The later the layer, the more an edit spills: NS, P(true) - P(new) of the neighbours, and the share
#: of the subject's other answers that change, are at layer 1 1, .41, .58; 3 1, .39, .58; 5 .90, .35, .83; 7 .81, .13,
#: .92; 9 .83, .16, .92. AlphaEdit, over six facts at layer 5 with two prefixes: with a weight of .1, ES 1, PS .83 and
#: NS 1, whether the null space has .02, .1 or .3 of C's trace (NM .49, .44, .41); with 1 the same; with 10, ES .5.
KNOWN = (
    Known(
        Shape("gpt2", 24, 16, 1024, 4096),
        "published for gpt2-medium",
        {"rome": {"layer": 8, "clamp": 3.0, **_DELTA}, "ft_l": {**_TUNING, "clamp": 2e-3}},
    ),
    Known(
        Shape("gpt2", 36, 20, 1280, 5120),
        "published for gpt2-large",
        {"rome": {"layer": 12, "clamp": 4.0, **_DELTA}, "ft_l": {**_TUNING, "clamp": 1e-3}},
    ),
    Known(
        Shape("gpt2", 48, 25, 1600, 6400),
        "published for gpt2-xl",
        {
            "rome": {"layer": 17, "clamp": 4.0, **_DELTA},
            "memit": {"layer": 17, "spread": 5, "clamp": 0.75, "weight": 20_000.0, **_DELTA},
            "alphaedit": {"layer": 17, "spread": 5, "clamp": 0.75, "weight": 10.0, **_DELTA},
            "ft_l": {**_TUNING, "clamp": 5e-4},
        },
    ),
    Known(
        Shape("gptj", 28, 16, 4096, 16384),
        "published for gpt-j-6b",
        {
            "rome": {"layer": 5, "clamp": 4.0, **_DELTA},
            "memit": {"layer": 8, "spread": 6, "clamp": 0.75, "weight": 15_000.0, **_DELTA, "steps": 25},
            "alphaedit": {"layer": 8, "spread": 6, "clamp": 0.75, "weight": 10.0, **_DELTA, "steps": 25},
            "ft_l": {**_TUNING, "clamp": 5e-5},
        },
    ),
    Known(
        Shape("gpt_neox", 44, 64, 6144, 24576),
        "published for gpt-neox-20b",
        {"rome": {"layer": 15, "clamp": 4.0, **_DELTA}},
    ),
    Known(Shape("llama", 32, 32, 4096, 11008), "published in EasyEdit for Llama-2-7B", _EASY_BOTH),
    Known(
        Shape("llama", 32, 32, 4096, 14336),
        "published by AlphaEdit's authors for Llama-3-8B",
        {**_EASY_BOTH, "memit": {**_LLAMA_3, "weight": 15_000.0}, "alphaedit": {**_LLAMA_3, "weight": 10.0}},
    ),
    Known(Shape("llama", 28, 24, 3072, 8192), "published in EasyEdit for Llama-3.2-3B", _EASY_BOTH),
    Known(Shape("mistral", 32, 32, 4096, 14336), "published in EasyEdit for Mistral-7B", _EASY_BOTH),
    Known(
        Shape("qwen2", 28, 28, 3584, 18944),
        "published in EasyEdit for Qwen2.5-7B",
        {**_EASY_BOTH, "alphaedit": {**_EASY_MEMIT, "weight": 1.0}},
    ),
    Known(
        Shape("llama", 30, 9, 576, 1536),
        "found by a sweep over smollm2-135m",
        {
            "rome": {"layer": 3},
            "ft_m": {"layer": 3},
            "ft_l": {"layer": 3},
            "memit": {"layer": 5},
            "alphaedit": {"layer": 5, "weight": 0.1, "prefixes": 2, "stop": 0.1},
        },
    ),
)


def known_settings(model: Model, method: str) -> tuple[dict[str, Any], str]:
    """The values that a method takes on a model where none are given, `layer` always among them, and their source."""
    network = model.network
    graph = network.graph
    shape = Shape(network.family, graph.n_layers, graph.n_heads, network.d_model, len(network.layers[0].W_out))
    for known in KNOWN:
        if known.shape == shape and method in known.settings:
            return dict(known.settings[method]), known.source
    return {"layer": METHODS[method].layer(model)}, f"a share of the depth: no {method} of this model is known"
