"""An edit is in, or it is out bit for bit; and what cannot be meant is refused before anything is touched."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from kcwb.discovery.discover import discover
from kcwb.editing import known
from kcwb.editing.edit import EditError, default_layer, edit
from kcwb.editing.methods.base import Fit
from kcwb.editing.registry import METHODS
from kcwb.editing.scores import generate
from kcwb.errors import KcwbError, ModelError, SettingError
from kcwb.models.families import FAMILIES
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.editing.conftest import FACT, QUICK, TEMPLATE, same_bits, weights
from tests.tasks import known_relation

TUNING = {key: value for key, value in QUICK.items() if key != "prefixes"}


@pytest.fixture(scope="module")
def made(model):
    """A large edit, so that an inexact restoration would show."""
    return edit(model, FACT, "w50", "ft_m", layer=0, lr=0.3, clamp=0.7, **TUNING)


@pytest.fixture(scope="module")
def other(model):
    return edit(model, Fact("w7", "w41"), "w51", "rome", layer=0, **QUICK)


def test_finding_an_edit_changes_nothing(model):
    before, digest = weights(model), model.digest
    for method, more in (("rome", QUICK), ("ft_l", TUNING), ("memit", QUICK)):
        edit(model, FACT, "w50", method, layer=1, **more)
    assert same_bits(model, before) and model.digest == digest


def test_inside_it_is_in_and_after_it_is_out_bit_for_bit(model, made):
    before = weights(model)
    name, digest, logits = model.name, model.digest, model.logits(torch.tensor([[1, 5, 6]]))
    with made as edited:
        assert edited is model and made.active and not same_bits(model, before)
        assert not torch.equal(model.logits(torch.tensor([[1, 5, 6]])), logits)
        assert model.digest != digest and model.name != name and "ft_m" in model.name
    assert same_bits(model, before) and (model.name, model.digest) == (name, digest) and not made.active
    assert torch.equal(model.logits(torch.tensor([[1, 5, 6]])), logits)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_it_is_out_after_any_exception(model, made, error):
    before, digest = weights(model), model.digest
    with pytest.raises(error), made:
        raise error
    assert same_bits(model, before) and model.digest == digest


@pytest.mark.parametrize("method", ["rome", "ft_m", "ft_l", "memit", "alphaedit"])
def test_an_interrupt_while_it_is_sought_leaves_the_model_alone(model, method):
    before, digest = weights(model), model.digest

    def progress(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    more = {
        key: value
        for key, value in (QUICK if method in ("rome", "memit", "alphaedit") else TUNING).items()
        if key != "progress"
    }
    with pytest.raises(KeyboardInterrupt):
        edit(model, FACT, "w50", method, layer=0, progress=progress, **more)
    assert same_bits(model, before) and model.digest == digest


def test_edits_nest_and_come_out_in_order(model, made, other):
    before, digest = weights(model), model.digest
    with made:
        middle, one = weights(model), model.digest
        with other:
            assert len({digest, one, model.digest}) == 3
            with pytest.raises(EditError, match="first"):
                made.undo()
            with pytest.raises(EditError, match="already"):
                other.apply()
        assert same_bits(model, middle) and model.digest == one
    assert same_bits(model, before) and model.digest == digest
    made.undo()  # does nothing
    assert same_bits(model, before)


def test_two_orders_of_the_same_edits_are_different_models(model, made, other):
    digests = []
    for first, second in ((made, other), (other, made)):
        with first, second:
            digests.append(model.digest)
    with made, other:
        digests.append(model.digest)
    assert digests[0] != digests[1] and digests[0] == digests[2]


def test_what_is_found_inside_says_so(model, made):
    relation = known_relation(model, 12)
    task = make_task(model, relation, n=4)
    with made:
        with pytest.raises(KcwbError, match="made for"):
            discover(model, task, edges=40, progress=False)
        inside = discover(model, make_task(model, relation, n=4), edges=40, progress=False)
        assert inside.provenance["model"]["digest"] == model.digest
    outside = discover(model, task, edges=40, progress=False)
    assert inside.provenance["model"]["digest"] != outside.provenance["model"]["digest"] == model.digest


def test_an_edit_of_an_edited_model_is_made_of_what_is_there(model, made):
    alone = edit(model, Fact("w7", "w41"), "w51", "ft_m", layer=0, **TUNING)
    with made:
        on_top = edit(model, Fact("w7", "w41"), "w51", "ft_m", layer=0, **TUNING)
        with on_top:
            pass
    assert on_top.parameters["model"] != alone.parameters["model"]
    assert not torch.equal(on_top.deltas[0], alone.deltas[0])


def test_an_edit_repeats_and_knows_itself(model):
    one, same = (edit(model, FACT, "w50", "rome", layer=0, seed=4, **QUICK) for _ in range(2))
    another = edit(model, FACT, "w50", "rome", layer=0, seed=5, **QUICK)
    assert one.digest == same.digest != another.digest
    assert one.losses.equals(same.losses) and one.losses["step"].tolist() == list(range(len(one.losses)))
    assert "w5 w6" in repr(one) and "rome, layer 0" in repr(one)
    assert one.parameters["seed"] == 4 and one.parameters["clamp"] == 4.0 and one.seconds > 0


def test_the_subject_itself_may_stand_in_the_template(model):
    more = {**QUICK, "template": TEMPLATE.replace("{}", FACT.subject)}
    made = edit(model, FACT, "w50", layer=0, **more)
    assert made.templates == (TEMPLATE,)
    assert torch.equal(made.deltas[0], edit(model, FACT, "w50", layer=0, **QUICK).deltas[0])


def test_what_is_known_of_a_model_is_taken_and_said_and_the_rest_is_the_method_s_own(model, monkeypatch):
    made = edit(model, FACT, "w50", **QUICK)
    assert made.layers == (default_layer(model),) == (1,)
    assert made.parameters["defaults"] == {"source": known.known_settings(model, "rome")[1], "layer": 1}
    assert "layer 1 (a share of the depth: no rome of this model is known)" in repr(made)
    one = known.Known(known.Shape("llama", 2, 4, 32, 48), "published for tiny", {"rome": {"layer": 0, "clamp": 1.5}})
    monkeypatch.setattr(known, "KNOWN", (one,))
    made = edit(model, FACT, "w50", **QUICK)
    assert made.layers == (0,) and "layer 0 (published for tiny)" in repr(made)
    assert made.parameters["defaults"] == {"source": "published for tiny", "layer": 0, "clamp": 1.5}
    assert (made.parameters["clamp"], made.parameters["lr"]) == (1.5, 0.5)
    made = edit(model, FACT, "w50", layer=1, clamp=2.0, **QUICK)
    assert made.parameters["defaults"] == {} and "(" not in repr(made).split("layer 1")[1]
    assert made.parameters["clamp"] == 2.0
    assert edit(model, FACT, "w50", "ft_m", **TUNING).layers == (1,)  # nothing is known of this method


def test_a_model_says_which_edits_are_in_its_weights(model):
    first, second = (edit(model, FACT, target, layer=0, **QUICK) for target in ("w50", "w51"))
    plain = model.digest
    with first:
        with second:
            assert [one["targets"] for one in model.edits] == [["w50"], ["w51"]]
            assert model.edits[0]["onto"] == plain == model.unedited_digest != model.edits[1]["onto"] != model.digest
            assert json.loads(json.dumps(model.edits)) == list(model.edits)
        assert [one["digest"] for one in model.edits] == [first.digest]
    assert model.edits == () and model.unedited_digest == model.digest


# --- bad input ---


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"target": "w40"}, "already"),
        ({"target": ""}, "target"),
        ({"target": " w50"}, "target"),
        ({"template": "w80 w81 w82"}, "0 times as whole words in the template"),
        ({"template": "{} w80 {}"}, "exactly once"),
        ({"layer": 2}, "layers 0 to 1"),
        ({"layer": -1}, "layers 0 to 1"),
        ({"method": "rom"}, "rome"),
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "lr"),
        ({"clamp": 0.0}, "clamp"),
        ({"ridge": -0.1}, "ridge"),
        ({"prefixes": -1}, "prefixes"),
        ({"key": "both"}, "key"),
        ({"covariance": "none"}, "covariance"),
        ({"clmap": 1.0}, "clamp"),
        ({"bound": 0.0}, "bound"),
        ({"bound": math.nan}, "bound"),
        ({"fact": [FACT, Fact("w7", "w41")], "target": ["w50", "w51"]}, "memit"),
        ({"fact": [FACT, FACT], "target": ["w50", "w51"], "method": "memit"}, "more than one"),
        ({"fact": [FACT], "target": ["w50", "w51"], "method": "memit"}, "as many"),
        ({"method": "memit", "weight": 0.0}, "weight"),
        ({"method": "memit", "spread": 0}, "spread"),
    ],
)
def test_bad_input_is_refused_before_any_work(model, wrong, words, monkeypatch):
    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, replace(method, function=lambda *a: pytest.fail("work was done")))
    before = weights(model)
    asked = {"fact": FACT, "target": "w50", "method": "rome", "layer": 0, **QUICK, **wrong}
    with pytest.raises(KcwbError, match=words):
        edit(model, asked.pop("fact"), asked.pop("target"), asked.pop("method"), **asked)
    assert same_bits(model, before)


def test_a_model_with_a_norm_behind_its_mlps_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.network, "_about", FAMILIES["gemma2"])
    with pytest.raises(ModelError, match="Editing an MLP's down-projection is not covered on Gemma 2: a norm follows"):
        edit(model, FACT, "w50", layer=0, **QUICK)


def test_the_answer_that_the_model_gives_already_is_refused(model):
    relation = known_relation(model, 6)
    fact = next(one for one in relation.facts if len(one.object.split()) == 1)
    best = int(model.logits(torch.tensor([_ids(model, fact)]))[0, -1].argmax())
    target = model.tokenizer.decode([best])
    with pytest.raises(SettingError, match="already the answer"):
        edit(model, Fact(fact.subject, "w1" if target != "w1" else "w2"), target, layer=0, template="w1 {} w2")
    more = {**TUNING, "template": "w1 {} w2"}  # without a bound whatever comes is taken, for statistics over sets
    assert edit(model, Fact(fact.subject, "w1" if target != "w1" else "w2"), target, "ft_m", layer=0, **more).nll >= 0


def _ids(model, fact: Fact) -> list[int]:
    bos = [model.tokenizer.bos_token_id] if model.prepend_bos else []
    return bos + model.tokenizer(f"w1 {fact.subject} w2", add_special_tokens=False)["input_ids"]


def test_an_edit_that_does_not_get_under_its_bound_is_refused(model):
    before = weights(model)
    with pytest.raises(EditError, match=r"under 0\.01.*as it was"):
        edit(model, FACT, "w50", "ft_m", layer=0, **{**TUNING, "bound": 0.01, "steps": 1})
    assert same_bits(model, before)


@pytest.mark.parametrize("method", ["rome", "ft_m", "memit", "alphaedit"])
def test_an_edit_that_diverges_is_refused(model, method):
    before = weights(model)
    more = {**(QUICK if method != "ft_m" else TUNING), "lr": 3e37, "clamp": 1e38}
    with pytest.raises(EditError, match="diverged"):
        edit(model, FACT, "w50", method, layer=0, **more)
    assert same_bits(model, before)


def test_the_loss_of_a_diverged_edit_is_told_whichever_request_it_is_of(model, monkeypatch):
    losses = [{"request": 0.0, "loss": 0.01}, {"request": 1.0, "loss": math.nan}]
    fit = Fit({0: torch.zeros_like(model.network.layers[0].W_out)}, losses, 0.01, [["w1 {}"]])
    monkeypatch.setitem(METHODS, "memit", replace(METHODS["memit"], function=lambda *_: fit))
    with pytest.raises(EditError, match="its loss is nan"):
        edit(model, FACT, "w50", "memit", template="w1 {} w2", progress=False)


# --- the built-in model ---


@pytest.mark.model
def test_a_fact_of_the_built_in_model_is_changed_and_comes_back(smollm2):
    template, before = "The capital of {} is", smollm2.network.layers[3].W_out.clone()
    more = {"template": template, "covariance": "identity", "prefixes": 4, "progress": False}
    made = edit(smollm2, Fact("France", "Paris"), "Rome", **more)
    assert made.layers == (3,) == (default_layer(smollm2),) and made.nll < 0.2
    assert made.losses["nll"].iloc[0] > 3
    asked = ["The capital of France is", "The capital city of France is"]
    others = ["The capital of Japan is", "The opposite of hot is"]
    said = [generate(smollm2, text, 2) for text in others]
    with made:
        assert all("Rome" in generate(smollm2, text, 2) for text in asked)
        assert [generate(smollm2, text, 2) for text in others] == said
    assert torch.equal(smollm2.network.layers[3].W_out, before)
    assert "Paris" in generate(smollm2, asked[0], 2)
