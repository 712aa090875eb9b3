"""An editor from outside the package is edited with, undone, scored and listed like the package's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

import kcwb
from kcwb.editing.methods.base import EditMethod, Fit, Request
from kcwb.editing.registry import METHODS, edit_method, register
from kcwb.errors import SettingError
from kcwb.models.loading import Model
from kcwb.progress import Progress
from kcwb.settings import Positive
from kcwb.tasks.tokens import answer_tokens
from kcwb.verbs import noun
from kcwb.workbench.panels.edit import EditPanel
from tests.editing.conftest import FACT, TEMPLATE, same_bits, weights
from tests.tasks import known_relation


@noun
@dataclass(frozen=True)
class PushSettings:
    """How far every output of the MLP is pushed towards the answer."""

    scale: Positive = 0.05


def push(
    model: Model, requests: Sequence[Request], layer: int, settings: PushSettings, seed: int, progress: Progress
) -> Fit:
    """Add a multiple of the answer's unembedding direction to all rows of one MLP's down-projection."""
    request, network = requests[0], model.network
    token = answer_tokens(model, request.template, request.fact.subject, request.target)[0]
    delta = settings.scale * network.W_U[:, token].expand(network.layers[layer].W_out.shape)
    return Fit({layer: delta.contiguous()}, [{"step": 0, "loss": 0.0}], 0.0, [[request.template]])


PUSH = EditMethod("push", push, PushSettings, layer=lambda model: model.graph.n_layers - 1)
MORE = {"template": TEMPLATE, "bound": float("inf"), "progress": False}


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> Iterator[None]:
    monkeypatch.delitem(METHODS, "push", raising=False)  # so that it is taken out again after each test
    register(PUSH)
    yield
    METHODS.pop("push")


def test_it_edits_and_undo_restores_every_bit(model):
    before, own = weights(model), model.network.layers[1].W_out.clone()
    made = kcwb.edit(model, FACT, "w50", "push", scale=0.1, **MORE)
    assert (made.layers, made.parameters["scale"], made.method) == ((1,), 0.1, "push")  # its own layer, the last
    with made:
        assert torch.equal(model.network.layers[1].W_out, own + made.deltas[1]) and "push" in model.name
    assert same_bits(model, before)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"scale": 0.0}, "PushSettings: scale=0.0"), ({"scael": 1.0}, "Did you mean 'scale'")]
)
def test_its_settings_are_checked_by_their_annotations(model, wrong, words):
    with pytest.raises(SettingError, match=words):
        kcwb.edit(model, FACT, "w50", "push", **{**MORE, **wrong})


def test_it_takes_one_request_as_it_says_and_is_scored(model):
    case = kcwb.EditCase(FACT, "w50", TEMPLATE, ("w5 w6 w82",), ("w80 w9 w81",))
    table = kcwb.edit_scores(model, [case], "push", progress=False)
    assert table["run"].tolist() == ["unedited", "push"] and table["EM"].nunique() == 2
    with pytest.raises(SettingError, match="batches for memit or alphaedit alone"):
        kcwb.edit_scores(model, [case], "push", batch=2)


def test_the_panel_lists_it(model):
    relation = replace(known_relation(model, 16), prompt_templates_zs=("w1 {} w2", "w3 {} w4"))
    panel = EditPanel(model, relation, target="w61", method="push", compare=False, settings={"push": {"bound": 99.0}})
    assert "push" in panel._method.options and panel.settings["layer"] == 1
    panel.run()
    panel.wait(120.0)
    assert panel.edit is not None and panel.edit.method == "push"
    panel.undo()


def test_names_are_taken_once():
    register(PUSH)  # the same one again is no other
    with pytest.raises(SettingError, match="'push' already"):
        register(replace(PUSH, many=True))
    with pytest.raises(SettingError, match="Did you mean 'push'"):
        edit_method("psuh")
