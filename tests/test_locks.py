"""One lock per model: what one thread runs is one state of the weights, whatever another does meanwhile."""

from __future__ import annotations

import copy
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from kcwb.discovery.discover import discover
from kcwb.editing.edit import EditError, edit
from kcwb.errors import SettingError
from kcwb.locks import WAITING, Exclusive, lock_of
from kcwb.models.loading import load_model
from kcwb.progress import cancellable
from kcwb.tasks.task import make_task
from tests.editing.conftest import FACT, QUICK
from tests.tasks import known_relation
from tests.tiny import tiny_hf, tiny_model, tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def made(model):
    tuning = {key: value for key, value in QUICK.items() if key != "prefixes"}
    return edit(model, FACT, "w50", "ft_m", layer=0, lr=0.3, clamp=0.7, **tuning)


@pytest.fixture(scope="module")
def relation(model):
    return known_relation(model)


class Busy:
    """Another thread that has the model until it is told to let go."""

    def __init__(self, model):
        self.model, self.has, self.enough = model, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold)

    def hold(self):
        with self.model.exclusive():
            self.has.set()
            self.enough.wait(20)

    def __enter__(self):
        self.thread.start()
        self.has.wait(20)
        return self

    def __exit__(self, *_):
        self.enough.set()
        self.thread.join()


@pytest.mark.parametrize("method", ["eap-ig", "acdc"])
def test_an_edit_put_in_or_out_during_a_discovery_waits_for_its_end(model, made, relation, method):
    def found(task, progress):
        more = {"tau": 0.05, "checkpoint": False} if method == "acdc" else {"edges": 60}
        return discover(model, task, method, progress=progress, **more)

    tasks, expected = {}, {}
    for name, state in (("clean", nullcontext()), ("edited", made)):
        with state:
            tasks[name] = make_task(model, relation if name == "clean" else known_relation(model), n=4)
            expected[name] = model.digest, found(tasks[name], False).digest
    assert len(set(expected.values())) == 2
    with ThreadPoolExecutor(1) as pool:
        for name, change in 2 * (("clean", made.apply), ("edited", made.undo)):
            changes = []

            def meanwhile(*_, change=change, changes=changes):
                if not changes:
                    changes.append(pool.submit(change))
                    wait(changes, 0.3)

            circuit = found(tasks[name], meanwhile)
            assert (circuit.provenance["model"]["digest"], circuit.digest) == expected[name]
            changes[0].result(60)


def test_a_discovery_beside_edits_in_a_loop_is_of_one_state_and_says_which(model, made, relation):
    task, digest = make_task(model, relation, n=4), model.digest
    expected = discover(model, task, edges=60, progress=False).digest
    stop = threading.Event()

    def swap():
        while not stop.wait(0.005):
            with made:
                stop.wait(0.005)

    done = 0
    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(swap)
        while done < 10:
            try:
                circuit = discover(model, task, edges=60, progress=False)
            except SettingError as error:
                assert "was made for" in str(error)  # the edit is in
            else:
                done += 1
                assert (circuit.provenance["model"]["digest"], circuit.digest) == (digest, expected)
            stop.wait(0.005)
        stop.set()
        swapping.result(60)


def test_a_verb_waits_for_the_other_thread_and_says_so(model, relation):
    notes = []
    with Busy(model) as busy:

        def hear(done, total, note):
            notes.append((done, total, note))
            busy.enough.set()

        task = make_task(model, relation, n=2, progress=hear)
    assert notes[0] == (0, 1, WAITING)
    assert len(task.val) == 2


def test_a_wait_is_drawn_where_no_callback_was_given(model, capsys):
    with Busy(model) as busy:
        threading.Timer(0.3, busy.enough.set).start()
        model.logits(torch.tensor([[1, 5]]))
    assert WAITING in capsys.readouterr().err


def test_a_wait_can_be_cancelled_by_the_callback_and_by_the_check(model, relation):
    def cancel(*_):
        raise KeyboardInterrupt

    with Busy(model):
        with pytest.raises(KeyboardInterrupt):
            make_task(model, relation, progress=cancel)
        with pytest.raises(KeyboardInterrupt), cancellable(cancel):
            make_task(model, relation, progress=False)
    assert len(make_task(model, relation, n=1).val) == 1  # the lock is free again


def test_the_model_is_its_threads_from_an_edit_in_to_the_edit_out(model, made):
    with ThreadPoolExecutor(1) as pool:
        before = model.logits(torch.tensor([[1, 5, 6]]))
        with made as edited:
            other = pool.submit(edited.logits, torch.tensor([[1, 5, 6]]))
            threading.Event().wait(0.2)
            assert not other.done()
            assert not torch.equal(edited.logits(torch.tensor([[1, 5, 6]])), before)
        assert torch.equal(other.result(20), before)


def test_an_edit_put_in_without_with_leaves_the_model_to_others(model, made):
    with ThreadPoolExecutor(1) as pool:
        before = model.logits(torch.tensor([[1, 5, 6]]))
        made.apply()
        try:
            assert not torch.equal(pool.submit(model.logits, torch.tensor([[1, 5, 6]])).result(20), before)
        finally:
            pool.submit(made.undo).result(20)
        assert torch.equal(model.logits(torch.tensor([[1, 5, 6]])), before)


def test_an_edit_that_cannot_go_in_lets_the_model_go(model, made):
    with made, pytest.raises(EditError), made:
        pass
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model.logits, torch.tensor([[1]])).result(20)


def test_models_that_share_weights_share_a_lock_and_others_do_not():
    module = tiny_hf("gpt2")
    model = load_model(module, tokenizer(), device="cpu")
    assert load_model(module, tokenizer(), device="cpu").lock is model.lock
    assert load_model(model.bridge.original_model, tokenizer(), device="cpu").lock is model.lock
    assert replace(model, name="again").lock is model.lock
    assert tiny_model("gpt2").lock is not model.lock
    assert copy.deepcopy(model.lock) is not model.lock


def test_a_lock_goes_with_those_who_keep_it():
    weight = torch.zeros(3)
    kept = lock_of(weight)
    assert lock_of(weight[:2]) is kept and lock_of(torch.zeros(3)) is not kept
    lock = weakref.ref(kept)
    del kept
    assert lock() is None


def test_two_threads_that_each_want_both_models_get_on(model):
    other = tiny_model("llama")

    def often(models):
        for _ in range(200):
            with Exclusive([one.lock for one in models], progress=False):
                pass
        return True

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(often, pair) for pair in ((model, other), (other, model))]
        assert all(run.result(60) for run in runs)
