"""Edits one after another, against edits that are put on top of each other and left in; and a model that comes back."""

from __future__ import annotations

import math
import signal
import sys
import time
from typing import Any

import pytest
import torch

from kcwb.editing.cases import EditCase
from kcwb.editing.change import kept_keys
from kcwb.editing.covariance import own_texts
from kcwb.editing.edit import edit
from kcwb.editing.scores import SCORES, Asked, case_scores, measure, score_summary
from kcwb.editing.sequence import perplexity, sequential_edits
from kcwb.editing.writing import text_digest, texts_as_now
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import load_model
from kcwb.progress import cancellable
from kcwb.tasks.relations import Fact
from tests.editing.conftest import same_bits, weights
from tests.tasks import prompt_ids

CASES = [
    EditCase(
        Fact(f"w{5 + i}", f"w{40 + i}"),
        f"w{50 + i}",
        "w80 {} w81",
        (f"w{5 + i} w82", f"w83 w{5 + i} w84"),
        (f"w80 w{6 + i} w81", f"w80 w{20 + i} w81"),
        other_subjects=(f"w71 w{30 + i}",),
        relation="words",
    )
    for i in range(4)
]
QUICK: dict[str, Any] = {"layer": 1, "steps": 3, "tokens": 3, "progress": False}
DELTA: dict[str, Any] = {**QUICK, "prefixes": 2}
OWN: dict[str, dict[str, Any]] = {
    "rome": DELTA,
    "memit": {**DELTA, "weight": 1e-2},
    "alphaedit": {**DELTA, "weight": 1e-2, "share": 0.3, "spread": 2},
    "ft_m": {**QUICK, "lr": 0.05, "clamp": 0.2},
}


@pytest.mark.parametrize("method", OWN)
def test_a_sequence_is_edits_put_on_top_of_each_other(model, method):
    """Each found in the weights that the others have left, and left in; prefixes and C of the unedited model.

    Two of them: the weights then differ in rounding, which Adam's first step makes a sign, so that a third differs.
    """
    before, digest = weights(model), model.digest
    own = {name: value for name, value in OWN[method].items() if name != "tokens"}
    found = sequential_edits(model, CASES, method, at=(1, 2), judged=2, **OWN[method])
    assert same_bits(model, before) and model.digest == digest and found.edit is not None
    plain = {layer: model.network.layers[layer].W_out.clone() for layer in (0, 1)}
    neighbours = [case.neighbours[1:] if i < 1 else case.neighbours for i, case in enumerate(CASES)]
    asked = [
        Asked(model, EditCase(**{**vars(case), "neighbours": near}))
        for case, near in zip(CASES, neighbours, strict=True)
    ]
    start, made = measure(model, asked, 3), []
    try:
        with texts_as_now(model):
            for n, case in enumerate(CASES[:2], 1):
                more = {**own, "template": case.template, "bound": math.inf}
                made.append(edit(model, case.fact, case.target, method, **more))
                made[-1].apply()
                rows = found.scores.query("edits == @n and run == @method")
                assert rows["which"].tolist() == ["first"] * n + ["last"] * n
                for row in rows.to_dict("records"):
                    i = row["case"]
                    expected = case_scores(asked[i], start[i], measure(model, [asked[i]], 3)[0])
                    assert {name: row[name] for name in SCORES} == pytest.approx(expected, abs=1e-4, nan_ok=True)
            for layer in found.edit.layers:
                whole = model.network.layers[layer].W_out
                assert torch.allclose(whole, plain[layer] + found.edit.deltas[layer], atol=1e-5)
                for own_keys, kept in zip(kept_keys(model.network, layer), found.edit.kept.get(layer, ()), strict=True):
                    assert torch.allclose(own_keys[0], kept, atol=1e-5)
    finally:
        for one in reversed(made):
            one.undo()
    assert same_bits(model, before) and text_digest(model) == model.digest


def test_states_are_what_is_measured_by_hand(model):
    found = sequential_edits(model, CASES, "ft_m", at=(2,), texts=3, **OWN["ft_m"])
    texts = torch.tensor(own_texts(model, 3, min(64, model.network.n_ctx), 0))
    assert len(texts) == 3 and found.states["perplexity"][0] == pytest.approx(perplexity(model, texts))
    assert found.edit is not None and found.states["edits"].tolist() == [0, 2]
    delta, weight = found.edit.deltas[1], model.network.layers[1].W_out
    assert found.states["norm"].tolist() == pytest.approx([0, float(delta.norm() / weight.norm())], rel=1e-4)
    assert found.states["failed"].tolist() == [0, 0] and found.states["perplexity"].nunique() == 2
    assert found.table.query("run == 'ft_m'")["perplexity"].unique().tolist() == found.states["perplexity"][1:].tolist()
    assert found.table.query("run == 'unedited'")["norm"].eq(0).all()


def test_perplexity_is_that_of_every_token_but_the_first(model):
    texts = torch.tensor([prompt_ids(model, "w1 w2 w3 w4"), prompt_ids(model, "w9 w8 w7 w6")])
    losses = []
    for row in texts:
        logs = model.logits(row[None])[0].log_softmax(-1)
        losses += [-float(logs[i, row[i + 1]]) for i in range(len(row) - 1)]
    assert perplexity(model, texts) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_the_table_and_the_summary_hold_the_means(model):
    found = sequential_edits(model, CASES, "ft_m", at=(1, 4, 100), judged=3, **OWN["ft_m"])
    table = found.table.set_index(["edits", "which", "run"])
    assert [tuple(one) for one in table.index] == [
        (n, which, run) for n in (1, 4) for which in ("first", "last") for run in ("unedited", "ft_m")
    ]
    part = found.scores.query("edits == 4 and which == 'last' and run == 'ft_m'")
    assert part["case"].tolist() == [1, 2, 3] and table.loc[(4, "last", "ft_m"), "ES"] == part["ES"].mean()
    rows = found.summary().query("edits == 4 and which == 'last' and run == 'ft_m'").set_index("score")
    expected = score_summary(part).set_index("score")
    assert rows["mean"].equals(expected["mean"]) and rows["low"].equals(expected["low"])


def test_all_edits_together_are_one_that_is_saved_and_says_what_it_is(model, tmp_path):
    found = sequential_edits(model, CASES, "alphaedit", at=(3,), **OWN["alphaedit"])
    made = found.edit
    assert made is not None and [fact.subject for fact in made.facts] == ["w5", "w6", "w7"]
    assert made.parameters["model"] == model.digest and made.parameters["one_after_another"] == 3
    assert sorted(made.losses["edit"].unique()) == [0, 1, 2] and len(made.kept[1]) == 3
    with made:
        changed, folder = weights(model), model.save(tmp_path / "edited")
    again = load_model(folder, device="cpu")
    assert same_bits(again, changed) and again.saved["edits"][0]["targets"] == ["w50", "w51", "w52"]
    assert found.provenance["at"] == [3] and found.provenance["cases"][0] == ["w5", "w40", "w50", "w80 {} w81"]


def test_an_edit_that_diverges_is_left_out_and_counted(model):
    found = sequential_edits(model, CASES[:2], "ft_m", at=(2,), **{**OWN["ft_m"], "lr": 3e37, "clamp": 1e38})
    assert found.edit is None and found.states["failed"].tolist() == [0, 2]
    assert found.states["perplexity"].nunique() == 1
    scores = found.scores.set_index("run")[list(SCORES)]
    assert scores.loc["ft_m"].reset_index(drop=True).equals(scores.loc["unedited"].reset_index(drop=True))


class Stop(Exception):
    """Something that may come at any time."""


@pytest.mark.parametrize("method", ["alphaedit", "ft_m"])
def test_stopped_at_any_point_the_model_is_what_it_was(model, method):
    """At a sample of all the points at which a cancel is heard, and so in edits, looks, and with edits in or out."""
    before, name, digest = weights(model), model.name, model.digest
    counted, edited, limit = 0, 0, 0

    def check() -> None:
        nonlocal counted, edited
        counted += 1
        edited += model.digest != digest
        if counted == limit:
            raise Stop

    def work() -> None:
        nonlocal counted
        counted = 0
        with cancellable(check):
            sequential_edits(model, CASES[:2], method, at=(1, 2), judged=1, **OWN[method])

    work()  # texts and their covariance are in the cache now
    work()
    whole = counted
    assert edited > 10
    for last in {*range(1, whole, max(1, whole // 12)), whole}:
        limit = last
        with pytest.raises(Stop):
            work()
        assert same_bits(model, before) and (model.name, model.digest) == (name, digest)
        assert model.edits == () and text_digest(model) == digest and not model.lock.mine


def test_ctrl_c_in_a_sequence_comes_after_the_weights_are_back(model):
    before, digest = weights(model), model.digest

    def progress(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sequential_edits(model, CASES, "ft_m", at=(4,), **{**OWN["ft_m"], "progress": progress})
    assert same_bits(model, before) and model.digest == digest and text_digest(model) == digest


def test_a_signal_at_any_time_leaves_the_model_as_it_was(model, monkeypatch):
    """A real timer, at other times of a short sequence; a second signal comes while the first is being handled."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # one that comes in a finaliser goes nowhere, by design
    before, name, digest = weights(model), model.name, model.digest
    more = {**OWN["ft_m"], "steps": 1, "tokens": 0, "at": (2,), "judged": 1}
    sequential_edits(model, CASES[:2], "ft_m", **more)
    started = time.perf_counter()
    sequential_edits(model, CASES[:2], "ft_m", **more)
    whole, came = time.perf_counter() - started, 0
    handler = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for i in range(16):
            try:
                signal.setitimer(signal.ITIMER_REAL, whole * (0.05 + 0.055 * i), 1e-3)
                try:
                    sequential_edits(model, CASES[:2], "ft_m", **more)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                came += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert same_bits(model, before) and (model.name, model.digest) == (name, digest), i
            assert text_digest(model) == digest and model.edits == ()
            if model.lock.mine:  # a signal came on the step that lets go
                model.lock.release()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert came > 4


@pytest.mark.parametrize(
    ("cases", "more", "error", "words"),
    [
        (CASES, {"at": ()}, SettingError, "4 cases, 0 looks"),
        ([], {}, SettingError, "0 cases"),
        ([*CASES[:2], CASES[0]], {"at": (3,)}, SettingError, "edited by case 0 already"),
        ([EditCase(Fact("w5", "w40"), "w40", "w80 {}", (), ())], {}, SettingError, "has already"),
        ([EditCase(Fact("w5", "w40"), "w50", "{} " + "w1 " * 70, (), ())], {}, DataError, "reads 64"),
        (CASES, {"method": "romee"}, SettingError, "rome"),
        (CASES, {"layer": 2}, SettingError, "layers 0 to 1"),
        (CASES, {"stepz": 2}, SettingError, "steps"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(model, cases, more, error, words, monkeypatch):
    monkeypatch.setattr("kcwb.editing.sequence.measure", lambda *a: pytest.fail("work was done"))
    with pytest.raises(error, match=words):
        sequential_edits(model, cases, **{"method": "ft_m", "at": (1,), "progress": False, **more})
