"""What the table of families says holds on a tiny random model of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as T

from kcwb.circuits.circuit import Circuit
from kcwb.discovery.discover import discover
from kcwb.errors import ModelError, SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.models.families import ENCODERS, FAMILIES, Family, register
from kcwb.models.loading import load_model
from kcwb.tasks.relations import Relation
from kcwb.tasks.task import make_task
from tests import tiny as zoo


def test_every_family_has_a_tiny_model() -> None:
    tested = {zoo.tiny_hf(name).config.model_type for name in (*zoo.ARCHITECTURES, *zoo.ENCODERS)}
    assert tested == FAMILIES.keys() | ENCODERS.keys()


def test_where_heads_share_a_norm_roles_and_editing_are_not_claimed(tiny) -> None:
    for name in zoo.ARCHITECTURES:
        network = tiny(name).network
        family = FAMILIES[network.family]
        assert network.post_norms == (name in zoo.POST_NORM) == bool(family.note)
        assert family.edges and family.nodes and family.roles == family.editing == (not network.post_norms)


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_completeness_of_the_full_circuit_is_the_models_and_a_parts_is_not(tiny, words: Relation, architecture) -> None:
    model = tiny(architecture)
    task = make_task(model, words, n=3)
    everything = completeness(model, Circuit.full(model.graph), task, ablation="mean", draws=0, progress=False)
    rows = everything.set_index(["run", "split"])["nll"]
    assert rows["circuit", "D_val"] == pytest.approx(rows["full model", "D_val"], abs=1e-4)
    assert rows["circuit", "D_test"] == pytest.approx(rows["full model", "D_test"], abs=1e-4)
    part = discover(model, task, "eap-ig", edges=40, progress=False)
    alone = completeness(model, part, task, draws=0, progress=False).set_index(["run", "split"])["nll"]
    assert 0 < part.n_edges <= 40 and abs(alone["circuit", "D_val"] - rows["full model", "D_val"]) > 1e-3


class ToyConfig(T.LlamaConfig):
    """A Llama whose later layers attend more sharply."""

    model_type = "toy"


class ToyForCausalLM(T.LlamaForCausalLM):
    """As its configuration says; what no other family does."""

    config_class = ToyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn.scaling = 0.2 * (index + 1)


@pytest.fixture
def toy() -> Iterator[Any]:
    """The toy with random weights; its family is forgotten afterwards."""
    torch.manual_seed(0)
    yield ToyForCausalLM(ToyConfig(**zoo._GROUPED, pad_token_id=0, initializer_range=0.3)).eval()
    FAMILIES.pop("toy", None)


def test_a_family_is_added_from_outside_by_one_call(toy: Any, words: Relation) -> None:
    with pytest.raises(ModelError, match="architecture 'toy' is not covered"):
        load_model(toy, zoo.tokenizer(), device="cpu")
    plain = Family("Toy", ("somebody/toy",), adapter="LlamaForCausalLM")
    register("toy", plain)
    with pytest.raises(ModelError, match=r"self-check 'attention scores' at a0\.h0"):
        load_model(toy, zoo.tokenizer(), device="cpu")
    right = replace(plain, scale=lambda config, layer, d_head: 0.2 * (layer + 1))
    with pytest.raises(SettingError, match="There is a family of 'toy' already: Toy"):
        register("toy", right)
    del FAMILIES["toy"]
    register("toy", right)
    model = load_model(toy, zoo.tokenizer(), device="cpu")
    circuit = discover(model, make_task(model, words, n=3), "eap", edges=30, progress=False)
    assert 0 < circuit.n_edges <= 30 and model.network.family == "toy"
