"""One verb for every method: defaults, provenance, refusals before any compute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.run import run_circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.discover import discover, score_edges, tau_from_kc, tau_path
from kcwb.discovery.many import discover_many
from kcwb.discovery.methods import METHODS, check_method
from kcwb.discovery.selection import resize
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import Model
from kcwb.progress import cancellable
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.task import Task, make_task
from tests.tiny import word_relation


@pytest.fixture
def model(tiny) -> Model:
    return tiny("llama")


@pytest.fixture
def task(model: Model, words: Relation) -> Task:
    return make_task(model, words, n=3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_circuit_twice_and_says_where_it_comes_from(model, task, method: str) -> None:
    size = {} if method == "acdc" else {"edges": 40}
    first, second = (discover(model, task, method, progress=False, **size) for _ in range(2))
    assert torch.equal(first.kept, second.kept)
    assert first.n_edges > 0
    provenance = first.provenance
    json.dumps(provenance)
    assert provenance["method"] == method and provenance["metric"] == "nll"
    assert provenance["ablation"] == ("zero" if method == "acdc" else "mean")
    assert provenance["model"]["digest"] == model.digest
    assert provenance["relation"] == {"name": "words", "digest": task.relation.digest}
    assert provenance["facts"] == [[fact.subject, fact.object] for fact in task.val.facts]
    assert set(provenance["versions"]) >= {"torch", "kcwb", "transformer_lens"}
    assert provenance["seconds"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_cancelled_within_a_pass_changes_nothing(model, task, method: str) -> None:
    size = {} if method == "acdc" else {"edges": 40}
    whole = discover(model, task, method, progress=False, **size)

    class Cancelled(BaseException):
        pass

    def countdown(left: float) -> Callable[[], None]:
        def check() -> None:
            nonlocal left
            left -= 1
            passed.append(left)
            if left == 0:
                raise Cancelled

        return check

    passed: list[float] = []
    with cancellable(countdown(math.inf)):
        discover(model, task, method, progress=False, **size)
    total = len(passed)
    assert total >= 2 * model.graph.n_layers
    for at in (1, total // 2):
        with pytest.raises(Cancelled), cancellable(countdown(at)):
            discover(model, task, method, progress=False, **size)
    again = discover(model, task, method, progress=False, **size)
    assert torch.equal(again.kept, whole.kept)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "exact"])
def test_attribution_keeps_the_asked_edges_less_the_dangling_ones(model, task, method: str) -> None:
    circuit = discover(model, task, method, edges=40, progress=False)
    assert 0 < circuit.n_edges <= 40
    assert torch.equal(circuit.kept, circuit.without_dangling().kept)
    assert circuit.provenance["parameters"]["edges"] == 40
    assert circuit.scores is not None
    assert torch.equal(circuit.scores.isnan(), ~model.graph.exists)


def test_resizing_equals_discovering_at_that_size(model, task) -> None:
    large = discover(model, task, "eap-ig", edges=60, progress=False)
    small = discover(model, task, "eap-ig", edges=20, progress=False)
    resized = resize(large, edges=20)
    assert torch.equal(resized.kept, small.kept)
    assert resized.provenance["parameters"] == {**small.provenance["parameters"], "threshold": None}


def test_score_edges_gives_the_scores_that_discover_selects_from(model, task) -> None:
    scores = score_edges(model, task, "eap", progress=False)
    circuit = discover(model, task, "eap", edges=5, progress=False)
    assert circuit.scores is not None
    torch.testing.assert_close(scores[model.graph.exists], circuit.scores[model.graph.exists])


def test_exact_beats_nothing_by_construction(model, task) -> None:
    """The exact effects are the definition of what attribution estimates: on this model they correlate."""
    exact, estimate = (score_edges(model, task, method, progress=False) for method in ("exact", "eap-ig"))
    exists = model.graph.exists
    both = torch.stack([exact[exists], estimate[exists]])
    assert torch.corrcoef(both)[0, 1] > 0.5


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("eap-gi", {}, "eap-ig"),
        ("eap", {"tau": 0.1}, "tau is not one of them"),
        ("eap", {"steps": 3}, "steps is not one of them"),
        ("acdc", {"edges": 3}, "edges is not one of them"),
        ("acdc", {"tau": 0.0}, "above 0"),
        ("acdc", {"tau": -1.0}, "above 0"),
        ("acdc", {"tau": float("nan")}, "above 0"),
        ("eap", {"edges": 0}, "edges=0"),
        ("eap", {"edges": 10**9}, "edges=1000000000"),
        ("eap", {"edges": 3, "threshold": 0.1}, "not both"),
        ("eap-ig", {"steps": 0}, "steps=0"),
        ("eap", {"select": "best"}, "The selection 'best'"),
        ("eap", {"metric": "nil"}, "nll"),
        ("eap", {"metric": "kl"}, "gradient at the full model.*kl is zero.*eap-ig"),
        ("eap-ig", {"metric": "kl", "steps": 1}, "single step.*kl is zero"),
        ("eap", {"ablation": "meen"}, "mean"),
    ],
)
def test_senseless_settings_are_refused_before_any_compute(
    model, task, monkeypatch, method: str, setting: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("kcwb.discovery.discover.make_ablation", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr("kcwb.discovery.discover.make_loss", lambda *_: pytest.fail("computed"))
    with pytest.raises(SettingError, match=message):
        discover(model, task, method, progress=False, **setting)


@pytest.mark.parametrize(
    ("method", "steps"), [("eap", None), ("eap", 5), ("eap-ig", 1)], ids=["eap", "eap with steps", "a single step"]
)
def test_kl_has_no_gradient_at_the_full_model_and_every_verb_says_so(model, task, monkeypatch, method, steps):
    """KL is at its minimum there: what is left are rounding errors, and their largest make a circuit like any other."""
    for place in ("discovery.discover", "discovery.runs", "studies.two_hop.circuits"):
        monkeypatch.setattr(f"kcwb.{place}.make_ablation", lambda *_: pytest.fail("computed"))
    more = {"metric": "kl", "steps": steps, "progress": False}
    calls = [
        lambda: discover(model, task, method, **more),
        lambda: score_edges(model, task, method, **more),
        lambda: discover_many(model, task, method, **more),
    ]
    for call in calls:
        with pytest.raises(SettingError, match="where that of kl is zero"):
            call()
    check_method("eap-ig", "kl", steps=2)
    check_method("exact", "kl")
    check_method("acdc", "kl")


def test_every_verb_of_acdc_takes_its_defaults_from_one_place(model, task) -> None:
    usual = METHODS["acdc"].defaults["tau"]
    found = discover(model, task, "acdc", progress=False, checkpoint=False)
    assert (found.ablation, found.provenance["parameters"]["tau"]) == ("zero", usual)
    along = tau_path(model, task, [usual], progress=False)[usual]
    assert along.ablation == "zero" and torch.equal(along.kept, found.kept)


def kc_match_nll(model: Model, prompts: Prompts) -> float:
    """The mean over prompts and all T - 1 positions of minus the log-probability of the answer's tokens, else 0."""
    sequences = [
        [*tokens[: int(length)], *answer[: int(size)]]
        for tokens, length, answer, size in zip(
            prompts.tokens.tolist(),
            prompts.lengths.tolist(),
            prompts.answers.tolist(),
            prompts.answer_mask.sum(1).tolist(),
            strict=True,
        )
    ]
    total, longest = 0.0, max(map(len, sequences))
    for sequence, length in zip(sequences, prompts.lengths.tolist(), strict=True):
        logs = model.logits(torch.tensor([sequence]))[0].log_softmax(-1)
        total -= sum(float(logs[i - 1, sequence[i]]) for i in range(length, len(sequence)))
    return total / (len(sequences) * (longest - 1))


@pytest.mark.parametrize("size", [1, 2])
def test_tau_converts_from_the_scale_of_knowledge_circuits_and_both_are_recorded(model, size: int) -> None:
    subjects = ["w10", "w11 w3", "w12", "w13 w3 w5", "w14"]
    facts = [Fact(subject, " ".join(f"w{40 + i + j}" for j in range(size))) for i, subject in enumerate(subjects)]
    prompts = encode(model, facts, "w1 {} w2", [fact.object for fact in facts])
    task = replace(make_task(model, word_relation(), n=3), val=prompts)
    ratio = float(make_loss(model, prompts)(run_circuit(model, None, prompts, make_ablation(model, None, "zero"))))
    assert tau_from_kc(task, 1.0) == pytest.approx(ratio / kc_match_nll(model, prompts), rel=1e-4)
    assert tau_from_kc(task, 1.0) == pytest.approx((5 + size - 1) / size)  # w1, a subject of three, w2, the answer
    tau = tau_from_kc(task, 0.02)
    for found in (
        discover(model, task, "acdc", tau=tau, progress=False, checkpoint=False),
        *tau_path(model, task, [tau], progress=False).values(),
    ):
        assert found.provenance["parameters"]["tau"] == tau
        assert found.provenance["tau_kc"] == pytest.approx(0.02)
    assert "tau_kc" not in discover(model, task, "acdc", metric="kl", progress=False, checkpoint=False).provenance


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_acdc_within_a_circuit_cuts_as_that_circuit_was_found(model, task, ablation: str) -> None:
    start = discover(model, task, "eap-ig", edges=60, ablation=ablation, progress=False)
    found = discover(model, task, "acdc", within=start, progress=False, checkpoint=False)
    assert found.ablation == ablation
    same = discover(model, task, "acdc", within=start, ablation=ablation, progress=False, checkpoint=False)
    assert torch.equal(same.kept, found.kept)
    assert next(iter(tau_path(model, task, [0.01], within=start, progress=False).values())).ablation == ablation


def test_a_task_of_other_weights_is_refused(tiny, task) -> None:
    with pytest.raises(SettingError, match="Make it again"):
        discover(tiny("gpt2"), task, "eap", progress=False)


def test_resample_without_partners_is_refused(model) -> None:
    facts = tuple(Fact(" ".join(["w5"] * (i + 1)), f"w{i}") for i in range(4))  # no two prompts of one length
    lonely = Relation("lonely", "factual", "", "", False, ("{} w9",), ("{} w9",), facts)
    task = make_task(model, lonely, n=2) if any_known(model, lonely) else None
    if task is None:
        pytest.fail("the random model of this seed should know one of four facts; choose another seed")
    with pytest.raises(DataError, match="as many tokens"):
        discover(model, task, "eap", ablation="resample", progress=False)


def any_known(model: Model, relation: Relation) -> bool:
    try:
        make_task(model, relation, n=1)
    except DataError:
        return False
    return True


@pytest.mark.model
def test_attribution_finds_a_circuit_for_capitals_on_the_builtin_model(smollm2: Model) -> None:
    task = make_task(smollm2, "country_capital", n=4)
    circuit = discover(smollm2, task, "eap-ig", edges=1000, progress=False)
    assert 300 < circuit.n_edges <= 1000
    assert circuit.n_nodes < 300 / 2


@pytest.mark.parametrize("ablation", [None, "zero"])
def test_acdc_within_a_circuit_in_words_finds_that_circuit_first(model, task, ablation: str | None) -> None:
    start = discover(model, task, "gim", edges=60, ablation=ablation, progress=False)
    how = {"progress": False, "checkpoint": False}
    found = discover(model, task, "acdc", within="gim:60", ablation=ablation, **how)
    same = discover(model, task, "acdc", within=start, **how)
    assert found.ablation == same.ablation == (ablation or "mean")
    assert torch.equal(found.kept, same.kept)
    assert found.provenance["parameters"]["within"]["method"] == "gim"
    taus = tau_path(model, task, [0.01], within="gim:60", ablation=ablation, progress=False)
    assert torch.equal(taus[0.01].kept, found.kept)


@pytest.mark.parametrize("within", ["gim", "gim:", "gim:0", "gim:many", "acdc:200", "rome:200", ":5", ""])
def test_words_that_name_no_circuit_are_refused(model, task, within: str) -> None:
    with pytest.raises(SettingError, match="such as 'gim:2000'"):
        discover(model, task, "acdc", within=within, progress=False)


def test_stable_keeps_edges_whose_sign_is_sure(model, task) -> None:
    """Against the plain loop over resamples of the scores of each fact."""
    how = {"edges": 60, "progress": False}
    found = discover(model, task, "eap", stable=0.9, **how)
    loss, cuts = make_loss(model, task.val), make_ablation(model, task, "mean")
    each = torch.stack([attribution_scores(model, loss.select([i]), cuts) for i in range(len(task.val))])
    rng, agree = np.random.default_rng(0), torch.zeros_like(each[0])
    for counts in rng.multinomial(len(each), np.full(len(each), 1 / len(each)), 200):
        drawn = torch.cat([each[i].expand(count, *each[i].shape) for i, count in enumerate(counts) if count])
        agree += (drawn.mean(0) > 0) == (each.mean(0) > 0)
    sure = (agree / 200 >= 0.9) & model.graph.exists
    assert 0 < int(sure.sum()) < model.graph.n_edges
    assert not (found.kept & ~sure).any() and found.provenance["parameters"]["stable"] == 0.9
    torch.testing.assert_close(found.scores[sure], each.mean(0)[sure], atol=1e-5, rtol=1e-4)
    plain = discover(model, task, "eap", **how)
    assert not torch.equal(found.kept, plain.kept)
    with pytest.raises(SettingError, match="no mean over facts"):
        discover(model, task, "ig-prune", stable=0.9, **how)
    with pytest.raises(SettingError, match="pi says how sure"):
        discover_many(model, task, "eap", stable=0.9, draws=3, progress=False)


@pytest.mark.parametrize("select", ["signed", "absolute", 0.5])
def test_resizing_keeps_to_the_stable_edges(model, words, select) -> None:
    task, how = make_task(model, words, n=8), {"select": select, "stable": 0.8, "progress": False}
    large, small = (discover(model, task, "gim", edges=edges, **how) for edges in (90, 10))
    assert torch.equal(resize(small, edges=90).kept, large.kept)
    assert not (resize(small, threshold=-1e9).kept & (small.scores == 0)).any()
    scores = score_edges(model, task, "gim", stable=0.8, progress=False)
    assert torch.equal(scores[model.graph.exists], small.scores[model.graph.exists])


def test_optimal_needs_a_size(model, task) -> None:
    with pytest.raises(SettingError, match="give edges, not threshold"):
        discover(model, task, "eap", threshold=0.1, select="optimal", progress=False)
    found = discover(model, task, "eap", edges=25, select="optimal", progress=False)
    assert 0 < found.n_edges <= 25


def test_a_single_prompt_is_no_mean(model, task, monkeypatch) -> None:
    """Its mean is the prompt itself: no cut would change a thing, and any circuit would do as well as the model."""
    fact = task.val.facts[0]
    lonely = make_task(model, replace(task.relation, facts=(fact,)))
    assert float(score_edges(model, lonely, "exact", ablation="zero", progress=False).abs().max()) > 0.01
    monkeypatch.setattr("kcwb.discovery.discover.make_ablation", lambda *_: pytest.fail("work was done"))
    with pytest.raises(DataError, match="averages over the prompts of words, and there is only one"):
        discover(model, lonely, "gim", progress=False)
