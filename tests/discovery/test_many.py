"""Ensembles, against finding every draw's circuit anew; and against models whose circuits are known."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.discovery import runs as module
from kcwb.discovery.discover import discover
from kcwb.discovery.draws import GRID, make_plan
from kcwb.discovery.many import discover_many
from kcwb.discovery.methods import check_method
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import load_model
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.task import make_task
from tests.discovery.sequential import acdc_sequential
from tests.handmade import copying_head, induction, key_value_lookup
from tests.tasks import TEMPLATE, known_relation, relation_of
from tests.tiny import tiny_hf, tokenizer

QUIET: dict[str, Any] = {"progress": False, "checkpoint": False}


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def task(model):
    return make_task(model, known_relation(model, 24), n=6)


def taken(counts: Sequence[int]) -> list[int]:
    """The rows of a draw's facts, each as often as it was drawn."""
    return np.repeat(np.arange(len(counts)), counts).tolist()


def draws_of(ensemble: Ensemble) -> list[Circuit]:
    """Each draw as a circuit."""
    circuits = []
    for kept in ensemble.kept:
        mask = torch.zeros_like(ensemble.graph.exists)
        mask[*ensemble.places[kept].T] = True
        circuits.append(Circuit(ensemble.graph, mask))
    return circuits


# --- a draw is what the method finds on what it drew ---


@pytest.mark.parametrize(
    ("method", "ablation", "metric", "size"),
    [
        ("eap", "mean", "nll", {"edges": 40}),
        ("eap-ig", "resample", "logit_diff", {"edges": 40, "steps": 2}),
        ("eap-ig", "mean", "kl", {"threshold": 0.001}),
        ("eap-ig-activations", "mean", "nll", {"edges": 30, "steps": 1}),
        ("eap", "mean", "nll", {"edges": 40, "select": "greedy"}),
    ],
)
def test_a_draw_of_facts_and_setting_is_discovered_anew(tiny, method, ablation, metric, size):
    model = tiny("gpt2")
    task = make_task(model, known_relation(model, 24), n=5)
    how = {"metric": metric, "ablation": ablation}
    found = discover_many(model, task, method, draws=5, vary=["facts", "setting"], seed=3, **how, **size, **QUIET)
    drawn = found.provenance["drawn"]
    for counts, setting, circuit in zip(drawn["facts"], drawn["setting"], draws_of(found), strict=True):
        assert sum(counts) == len(counts)
        facts = replace(task, val=make_ablation(model, task, ablation).usable(task.val).select(taken(counts)))
        expected = discover(model, facts, method, progress=False, **how, **size | setting)
        assert torch.equal(circuit.kept, expected.kept)
    assert len({str(one) for one in drawn["setting"]}) > 1


def test_a_draw_of_everything_runs_on_its_condition(model):
    facts = known_relation(model, 24).facts
    relation = relation_of(facts, TEMPLATE, "w1 w1 {} w2", "{} w2")
    task = make_task(model, relation, n=12)
    settled = check_method("eap", "nll", None, edges=40)
    given = {"draws": 6, "twins": 6, "levels": 3, "halves": False, "shuffled": False, "seed": 1}
    plan = make_plan(model, task, settled, None, **given)
    found = discover_many(model, task, "eap", edges=40, draws=6, seed=1, **QUIET)
    assert len({one.task.template for one in plan.conditions}) > 1 and "order" in plan.left_out
    assert set(found.twins) == {"facts", "template", "setting", "ablation"}
    runs = [(plan.draws, found.kept), *((plan.twins[name], found.twins[name]) for name in found.twins)]
    for draws, masks in runs:
        for draw, kept in zip(draws, masks, strict=True):
            one = plan.conditions[draw.condition]
            facts = replace(one.task, val=one.task.val.select(taken(draw.counts)))
            expected = discover(model, facts, "eap", ablation=one.ablation, progress=False, **draw.settings)
            mask = torch.zeros_like(model.graph.exists)
            mask[*found.places[kept].T] = True
            assert torch.equal(mask, expected.kept)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_a_draw_of_acdc_is_the_sequential_search_in_its_order(tiny, name):
    model = tiny(name)
    task = make_task(model, known_relation(model, 24), n=4)
    within = discover(model, task, "eap", ablation="zero", edges=80, select="absolute", progress=False)
    sources = ["facts", "setting", "order"]
    found = discover_many(model, task, "acdc", tau=0.003, within=within, draws=4, twins=1, vary=sources, **QUIET)
    drawn = found.provenance["drawn"]
    cuts = make_ablation(model, task, "zero")
    columns = zip(*(drawn[source] for source in sources), draws_of(found), strict=True)
    for counts, setting, order, circuit in columns:
        loss = make_loss(model, task.val.select(taken(counts)))
        pruned = acdc_sequential(model, loss, cuts, within=within.kept, order=order, **setting)
        assert torch.equal(circuit.kept, pruned.kept)
    assert found.searched == within.n_edges and len(set(drawn["order"])) == 4


def test_a_twin_differs_in_its_source_alone(model, task):
    settled = check_method("acdc", "nll", "mean", tau=0.01)
    plan = make_plan(
        model, task, settled, None, draws=8, twins=5, levels=3, halves=True, shuffled=False, seed=0
    )  # fmt: skip
    parts = {"facts": lambda d: d.counts, "ablation": lambda d: d.condition, "order": lambda d: d.settings["order"]}
    parts["setting"] = lambda d: {name: d.settings[name] for name in ("tau", "absolute")}
    assert plan.twins.keys() == parts.keys()
    for source, twins in plan.twins.items():
        assert len(twins) == 5
        for k, twin in enumerate(twins):
            for name, of in parts.items():
                assert of(twin) == of(plan.draws[(k + 1) % 8 if name == source else k])
    used = [np.array([draw.counts for draw in half.draws]).any(0) for half in plan.halves]
    assert (used[0] ^ used[1]).all() and [half.facts for half in plan.halves] == [list(one) for one in used]


def test_settings_are_on_a_grid_around_what_was_asked(model, task):
    found = discover_many(model, task, "eap", edges=40, draws=200, vary=["setting"], **QUIET)
    sizes = {one["edges"] for one in found.provenance["drawn"]["setting"]}
    assert sizes == {round(40 * by) for by in GRID}
    assert {one["select"] for one in found.provenance["drawn"]["setting"]} == {"signed", "absolute"}


# --- ground truth ---


@pytest.mark.parametrize(
    ("make", "method"),
    [  # of induction's true edges two are so weak under mean that attribution to few facts ranks others above them
        (copying_head, "acdc"), (induction, "acdc"), (key_value_lookup, "acdc"),
        (copying_head, "eap-ig"), (key_value_lookup, "eap-ig"),
    ],
)  # fmt: skip
def test_true_edges_are_sure_and_others_are_not(make, method):
    model, relation, *_ = found = make()
    task = make_task(model, relation, n=8)
    ablation = "zero" if method == "acdc" else "mean"
    truth = {model.graph.edge_index(name) for name in found.truth(ablation)}
    size = {"tau": 0.1} if method == "acdc" else {"edges": len(truth)}
    sources = ["facts", "setting", "order"] if method == "acdc" else ["facts", "ablation"]  # half the size loses some
    ensemble = discover_many(model, task, method, ablation=ablation, draws=16, twins=0, vary=sources, **size, **QUIET)
    pi = ensemble.inclusion
    assert {place for place in truth if pi[place] < 1} == set()
    false = torch.tensor([p for place, p in np.ndenumerate(pi.numpy()) if place not in truth])
    for row in ensemble.bound((0.6, 0.75, 0.9, 1.0)).itertuples():
        assert int((false >= row.confidence).sum()) <= row.bound
    assert float(false.max()) < 0.75


def test_of_two_heads_that_do_the_same_each_draw_keeps_one():
    """Without the one the other suffices: which of them stays is the order's to say, about half of the time each."""
    model, relation, *_ = copying_head(movers=(1, 2))
    task = make_task(model, relation, n=6)
    found = discover_many(model, task, "acdc", tau=0.3, draws=40, twins=4, vary=["order"], **QUIET)
    nodes = found.nodes.set_index("node")["pi"]
    assert nodes["a1.h1"] + nodes["a1.h2"] == 1
    assert 0.25 < nodes["a1.h1"] < 0.75
    columns = [found.edges["receiver"].eq("logits") & found.edges["sender"].eq(f"a1.h{head}") for head in (1, 2)]
    assert all(
        found.edges.loc[column, "low"].item() < 0.5 < found.edges.loc[column, "high"].item() for column in columns
    )


def test_shuffled_answers_leave_little_that_is_sure():
    model, relation, *_ = copying_head()
    task = make_task(model, relation, n=8)
    both = [discover_many(model, task, "eap", edges=6, draws=30, shuffled=one, **QUIET) for one in (False, True)]
    mover = [one.inclusion[model.graph.edge_index("a1.h2->logits")] for one in both]
    assert mover[0] == 1 and mover[1] < 0.5
    assert both[1].provenance["shuffled"] and both[1].provenance["facts"] != both[0].provenance["facts"]
    table = both[0].bound((0.9,), null=both[1])
    assert table["null"].item() < table["edges"].item()


# --- the same wherever and whenever ---


def same(left: Ensemble, right: Ensemble) -> bool:
    return (
        left.edges.equals(right.edges) and left.sources.equals(right.sources) and torch.equal(left.kept, right.kept)
    )  # fmt: skip


def test_the_seed_determines_it(model, task):
    one, again, other = (discover_many(model, task, "eap", edges=40, draws=8, seed=s, **QUIET) for s in (5, 5, 6))
    assert same(one, again) and not same(one, other)
    assert all(same(*halves) for halves in zip(one.halves, again.halves, strict=True))


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_any_executor_gives_the_same(pool, tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    task = make_task(model, known_relation(model, 24), n=5)
    settings = {"tau": 0.01, "draws": 3, "twins": 1, "vary": ["facts", "order"], **QUIET}
    context = {"mp_context": get_context("spawn")} if pool == "processes" else {}
    kind: Any = ProcessPoolExecutor if pool == "processes" else ThreadPoolExecutor
    with kind(2, **context) as executor:
        assert same(
            discover_many(model, task, "acdc", **settings),
            discover_many(model, task, "acdc", executor=executor, **settings),
        )
        scored = [discover_many(model, task, "eap", edges=30, draws=4, executor=e, **QUIET) for e in (None, executor)]
    assert same(*scored)


def test_workers_of_other_weights_are_refused(tiny, tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    task = make_task(model, known_relation(model, 24), n=5)
    tiny_hf("llama", seed=1).save_pretrained(tmp_path)
    with ThreadPoolExecutor(1) as executor, pytest.raises(SettingError, match="has weights"):
        discover_many(model, task, "eap", edges=30, draws=3, executor=executor, **QUIET)


@pytest.mark.parametrize(("method", "size"), [("eap", {"edges": 40}), ("acdc", {"tau": 0.01})])
def test_an_ensemble_goes_on_from_what_was_finished(model, task, method, size, tmp_path, monkeypatch):
    settings = {"draws": 4, "twins": 0, "checkpoint": tmp_path / "kept", **size}
    whole = discover_many(model, task, method, **{**settings, **QUIET})
    computed: list[int] = []
    compute = module.Run.compute

    def counted(run: Any, *args: Any) -> Any:
        output = compute(run, *args)
        computed.append(1)
        return output

    def stop(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Run, "compute", counted)
    with pytest.raises(KeyboardInterrupt):
        discover_many(model, task, method, progress=stop, **settings)
    assert len(computed) == 2 and len([*(tmp_path / "kept").iterdir()]) == 2
    (tmp_path / "kept" / "mine.txt").write_text("a file of somebody's")
    calls: list[tuple[int, int]] = []
    again = discover_many(model, task, method, progress=lambda *call: calls.append(call[:2]), **settings)
    assert same(whole, again) and len(computed) == calls[-1][1] == calls[-1][0]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.txt"]


# --- what cannot be meant ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vary": ["template"]}, "template cannot be varied: .* a single template"),
        ({"vary": ["order"]}, "order cannot be varied: eap looks at all edges at once"),
        ({"vary": ["ablation"], "ablation": "zero"}, "ablation cannot be varied: nothing in zero ablation"),
        ({"vary": ["ablation"], "levels": 1}, "ablation cannot be varied: levels=1"),
        ({"vary": []}, "name what is left to chance"),
        ({"vary": ["fact"]}, "facts"),
        ({"draws": 1}, "draws=1 is not a whole number of at least 2"),
        ({"levels": 0}, "levels=0"),
        ({"tau": 0.1}, "tau is not one of them"),
        ({"edges": 10**6}, "edges=1000000"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(model, task, settings, words):
    with pytest.raises(SettingError, match=words) as refused:
        discover_many(model, task, "eap", **{**QUIET, **settings})
    assert "\n" not in str(refused.value)


def test_fewer_than_four_facts_are_too_few(model):
    with pytest.raises(DataError, match=r"at least 4 facts .* has 3 in D_val"):
        discover_many(model, make_task(model, known_relation(model, 12), n=3), "eap", edges=30, **QUIET)


def test_facts_without_partners_are_too_few_for_resampling(model):
    facts = [fact for fact in known_relation(model, 24).facts if len(fact.subject.split()) == 2]
    alone = [fact for fact in known_relation(model, 24).facts if len(fact.subject.split()) == 1][:1]
    task = make_task(model, relation_of([*facts[:3], *alone]), n=4, n_test=0)
    with pytest.raises(DataError, match="at least 4 facts"):
        discover_many(model, task, "eap", ablation="resample", edges=30, **QUIET)


def test_a_wording_that_the_model_does_not_know_is_left_out_with_a_notice(model):
    unknown = "w9 w9 {} w9 w9"
    task = make_task(model, relation_of(known_relation(model, 24).facts, TEMPLATE, unknown), n=6)
    with pytest.warns(UserWarning, match=r"does not vary the template: .*in 'w9 w9 \{\} w9 w9' it knows [0-3]"):
        found = discover_many(model, task, "eap", edges=30, draws=3, **QUIET)
    assert "template" in found.provenance["left_out"] and "template" not in found.twins
