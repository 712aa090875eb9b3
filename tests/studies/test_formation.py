"""Circuits over training, against plain runs in each checkpoint's weights."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch

import kcwb
from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.discovery.baselines import random_circuit
from kcwb.discovery.discover import discover
from kcwb.errors import CircuitError, DataError, ModelError, SettingError
from kcwb.models.loading import Model, load_model
from kcwb.reading.roles import head_roles
from kcwb.studies.formation import over_training
from kcwb.tasks.metrics import answer_ranks, make_loss
from kcwb.tasks.task import ask_again, make_task
from kcwb.world.facts import make_world
from kcwb.world.models import Recipe, train_world
from tests.tasks import known_relation
from tests.tiny import tiny_model

RECIPE = Recipe(layers=2, heads=2, width=16, steps=60, batch=32, lr=1e-2, warmup=10)
MORE = {"edges": 20, "n": 6, "n_test": 10, "k": 1, "draws": 3, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCWB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return train_world(["llama"], recipe=RECIPE, checkpoints=[0, 20], progress=False)["llama"]


def test_every_number_is_that_of_plain_runs_in_these_weights(folder):
    relation = make_world().relation("city_country")
    load = partial(load_model, folder, device="cpu")
    table = over_training(lambda name: load(revision=name), ["step0", "step20", "step20"], [relation], **MORE)
    assert table["revision"].tolist() == ["step0", "step20", "step20"]
    last = load(revision="step20")
    task = make_task(last, relation, n=6, n_test=10)
    final = discover(last, task, edges=20, ablation="mean", progress=False)
    for row in table[:2].itertuples():
        model = load(revision=str(row.revision))
        again = ask_again(model, task)
        own = discover(model, again, edges=20, ablation="mean", progress=False)
        cuts, loss = make_ablation(model, again, "mean"), make_loss(model, again.test, "nll")

        def ask(kept, model=model, again=again, cuts=cuts, loss=loss):
            logits = run_circuit(model, kept, again.test, cuts)
            return float((answer_ranks(logits, again.test) <= 1).double().mean()), float(loss(logits))

        (known, full), (_, empty) = ask(None), ask(Circuit.empty(model.graph))
        random = [random_circuit(model.graph, final.n_edges, i) for i in range(3)]
        sides = {"": [own], "_last": [final], "_random": random}
        assert row.facts == len(again.test) and row.known == pytest.approx(known)
        for ending, circuits in sides.items():
            hits, losses = np.mean([ask(Circuit(model.graph, one.kept)) for one in circuits], 0)
            assert getattr(row, f"hit{ending}") == pytest.approx(hits)
            share = (empty - losses) / (empty - full)
            found = getattr(row, f"faithfulness{ending}")
            assert np.isnan(found) if empty - full <= 0.05 else found == pytest.approx(share, rel=1e-3, abs=1e-3)
        assert row.iou == pytest.approx(own.iou(Circuit(model.graph, final.kept)))
        roles = head_roles(model, None, again, shuffles=50, resamples=1, progress=False)
        movers = roles[roles["role"] == "mover"]
        assert row.movers == len(movers) and pytest.approx(movers["D_S"].sum(), abs=1e-4) == row.D_S
    same = table.iloc[2]
    assert same["iou"] == 1 and same["hit"] == same["hit_last"]
    assert table["known"].iloc[2] > table["known"].iloc[0]  # something was learnt


def test_one_checkpoint_is_held_at_a_time(folder):
    loaded: list[weakref.ref[Model]] = []

    def load(revision: str) -> Model:
        gc.collect()
        assert not [one for one in loaded if one() is not None]
        model = load_model(folder, device="cpu", revision=revision)
        loaded.append(weakref.ref(model))
        return model

    table = over_training(load, ["step0", "step20", "step0", "step20"], [make_world().relation("city_country")], **MORE)
    assert len(loaded) == 2 and table["revision"].tolist() == ["step0", "step20", "step0", "step20"]


def test_the_same_facts_are_asked_of_other_weights():
    one, other = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    task = make_task(one, known_relation(one), n=4)
    again, plain = ask_again(other, task), make_task(other, known_relation(one), n=1, n_test=11)
    assert again.model_digest == other.digest != task.model_digest
    assert again.val.facts == task.val.facts and torch.equal(again.val.tokens, task.val.tokens)
    ranks = {
        fact: rank
        for part in (plain.val, plain.test)
        for fact, rank in zip(part.facts, part.ranks.tolist(), strict=True)
    }
    both = [fact for fact in again.test.facts if fact in ranks]
    assert both and all(ranks[fact] == again.test.ranks.tolist()[again.test.facts.index(fact)] for fact in both)
    facts = {*again.val.facts, *again.test.facts, *again.reference.facts}
    assert (again.n_facts, again.n_known) == (len(facts), sum(ranks[fact] <= 10 for fact in facts))
    assert ask_again(one, again).val.ranks.tolist() == task.val.ranks.tolist()
    kcwb.discover(other, again, edges=20, progress=False)


def test_other_tokens_are_refused():
    one = tiny_model("llama", seed=1)
    task = make_task(one, known_relation(one), n=4)
    with pytest.raises(SettingError, match=r"other tokens.*make_task"):
        ask_again(load_elsewhere(), task)


def load_elsewhere():
    from tests.handmade import copying_head

    return copying_head().model


def test_what_is_no_series_is_said(folder):
    relation = make_world().relation("city_country")
    load = partial(load_model, folder, device="cpu")
    with pytest.raises(SettingError, match="1 revisions"):
        over_training(lambda name: load(revision=name), ["step20"], [relation], **MORE)
    with pytest.raises(ModelError, match="another shape"):
        models = {"a": tiny_model("llama"), "b": load(revision="step20")}
        over_training(models.__getitem__, ["a", "b"], [relation], **MORE)
    with pytest.raises(CircuitError, match="are not connected"):
        over_training(lambda name: load(revision=name), ["step0", "step20"], [relation], **{**MORE, "edges": 1})
    with pytest.raises(DataError, match="smaller n"):
        over_training(lambda name: load(revision=name), ["step0", "step20"], [relation], **{**MORE, "n_test": 0})
