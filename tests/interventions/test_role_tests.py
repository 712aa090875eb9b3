"""Causal checks of roles: the runs equal transformer_lens's, and hand-written heads do what their roles claim."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.run import run_circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.interventions.at_end import logits_without, patched_answers
from kcwb.interventions.role_tests import RoleCheck, check_roles, faithful_story
from kcwb.models.forward import forward
from kcwb.models.loading import Model, load_model
from kcwb.reading.roles import TOO_FEW, head_roles
from kcwb.statistics import matched_head_sets
from kcwb.tasks.pairs import read_pairs
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Fact, Relation, load_relation
from kcwb.tasks.task import Task, make_task
from tests.ensembles import certain, drawn
from tests.handmade import Handmade, additive, copying_head, key_value_lookup
from tests.tasks import prompt_ids, relation_of, spaced_tokenizer
from tests.tiny import tiny_hf, tokenizer


@cache
def handmade(make, *args) -> tuple[Handmade, Task, pd.DataFrame]:
    found = make(*args)
    task = make_task(found.model, found.relation, n=8)
    return found, task, head_roles(found.model, None, task, progress=False)


@cache
def checked(asks: str) -> RoleCheck:
    """The roles that were written by hand, of a model of six layers, whose other 20 heads do little."""
    found, task, roles = handmade(additive, asks, 6)
    written = roles["D_S"].abs() + roles["D_R"].abs() > 0.5
    roles = roles.assign(role=roles["role"].where(written, "other"))
    return check_roles(found.model, roles, task, progress=False)


# --- runs ---


@torch.no_grad()
def bridge_logits(model: Model, prompts: Prompts, row: int, layer: int, head: int) -> torch.Tensor:
    """transformer_lens: one prompt, one head's output zeroed at END by a hook."""
    length = int(prompts.lengths[row])

    def silence(z: torch.Tensor, hook) -> torch.Tensor:
        z = z.clone().unflatten(-1, (-1, model.network.d_head)) if z.ndim == 3 else z.clone()
        z[:, -1, head] = 0.0
        return z

    return model.bridge.run_with_hooks(
        prompts.tokens[row : row + 1, :length], fwd_hooks=[(f"blocks.{layer}.attn.hook_z", silence)]
    )[0, -1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-biases", "mistral-window", "neox", "opt"])
def test_ablation_at_end_equals_a_hook(tiny, words, name):
    model = tiny(name)
    prompts = make_task(model, words, n=2).reference
    heads = [(1, 3), (0, 0), (1, 0), (0, 2)]  # in no order
    logits = torch.cat(list(logits_without(model, prompts, heads)))
    assert logits.shape == (4, len(prompts), model.network.d_vocab)
    for i, (layer, head) in enumerate(heads):
        for row in (0, 1, 5):
            expected = bridge_logits(model, prompts, row, layer, head)
            torch.testing.assert_close(logits[i, row], expected, atol=1e-4, rtol=1e-4)


def test_batches_of_heads_give_the_same(tiny, words, monkeypatch):
    model = tiny("llama")
    prompts = make_task(model, words, n=2).reference
    heads = [(layer, head) for head in range(4) for layer in range(2)]
    whole = torch.cat(list(logits_without(model, prompts, heads)))
    monkeypatch.setattr("kcwb.interventions.at_end._ROWS", 3 * prompts.tokens.numel())
    monkeypatch.setattr("kcwb.interventions.at_end._LOGIT_BYTES", 1)
    parts = list(logits_without(model, prompts, heads))
    assert [len(part) for part in parts] == [1] * 8
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_a_patched_path_equals_a_circuit_without_that_edge(tiny, words, name):
    """Under resample ablation, the model without the one edge head -> logits."""
    model = tiny(name)
    task = make_task(model, words, n=8)
    prompts = task.reference.select(task.reference.paired.nonzero()[:, 0].tolist())
    heads = [(0, 1), (1, 2)]
    found = patched_answers(model, prompts, heads)

    def answer(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0].log_softmax(-1).gather(-1, prompts.answers[:, :1])[:, 0]

    cuts = make_ablation(model, task, "resample")
    before = answer(run_circuit(model, None, prompts, cuts))
    for value, (layer, head) in zip(found, heads, strict=True):
        kept = model.graph.exists.clone()
        kept[model.graph.edge_index(f"a{layer}.h{head}->logits")] = False
        after = answer(run_circuit(model, kept, prompts, cuts))
        assert value == pytest.approx(float((after - before).mean()), abs=1e-4)


# --- hand-written roles ---


def test_without_the_mover_other_objects_gain_and_without_the_relation_head_generic_tokens_do():
    heads = checked("language").heads.set_index("node")
    mover, relation, suppressor = heads.loc["a1.h1"], heads.loc["a1.h2"], heads.loc["a1.h0"]
    assert mover["answer"] < -1 and mover["others"] > 0.5
    assert relation["answer"] < -1 and relation["generic"] > 1 and relation["others"] < -1
    assert suppressor["answer"] > 0
    assert heads["verdict"].to_dict() == {"a1.h1": "holds", "a1.h2": "holds", "a1.h0": "holds"}
    assert (heads["random_heads"] == 21).all() and (heads["layers_away"] > 0.5).all()
    assert heads["p_generic"].isna().to_dict() == {"a1.h1": True, "a1.h2": False, "a1.h0": True}  # claims of its own


def test_another_subject_changes_what_a_mover_brings_and_not_what_a_relation_head_brings():
    heads = checked("language").heads.set_index("node")
    assert heads.loc["a1.h1", "direct"] < -2
    assert abs(heads.loc["a1.h2", "direct"]) < 0.05
    assert heads.loc["a1.h1", "p_direct"] <= 0.05 < heads.loc["a1.h2", "p_direct"]


def test_a_role_that_another_head_backs_up_fails():
    """For capitals the mixture head does the relation head's work as well: without the latter nothing is lost."""
    heads = checked("capital").heads.set_index("node")
    assert heads.loc["a1.h2", "answer"] > -0.1 and heads.loc["a1.h2", "verdict"] == "fails"
    assert heads.loc["a1.h1", "verdict"] == "holds"


def test_other_objects_are_those_that_follow_a_prompt_as_its_answer_does():
    """After a line break without a space, after a word with one."""
    model = load_model(tiny_hf("llama"), spaced_tokenizer(), device="cpu")
    rows = {"clean": ["w1 w2 w3", "w4 w5\n", "w6 w7 w8", "w9 w3\n"], "subject": ["w1", "w4", "w6", "w9"]}
    facts = read_pairs(pd.DataFrame(rows | {"answer": ["w10", "w11", "w12", "w13"]})).facts
    prompts = encode(model, facts, "{}", [fact.object for fact in facts])
    parts = {"val": prompts, "test": prompts.select([]), "reference": prompts}
    task = Task(model.name, model.digest, relation_of(facts, "{}"), "{}", 4, 0, **parts, n_known=4, n_facts=4)
    roles = pd.DataFrame({"node": ["a1.h1"], "layer": [1], "head": [1], "role": ["mover"]})
    found = check_roles(model, roles, task, progress=False).every.set_index("node").loc["a1.h1", "others"]
    change = []
    for number, logits in enumerate(next(logits_without(model, prompts, [(1, 1)]))[0]):
        fact, before = facts[number], model.logits(torch.tensor([prompt_ids(model, facts[number].subject)]))[0, -1]
        others = [f"{' ' * fact.space}{one.object}" for one in facts if one is not fact]
        tokens = model.tokenizer.convert_tokens_to_ids(others)
        own = [float(one.softmax(-1)[tokens].sum().log()) for one in (logits, before)]
        change.append(own[0] - own[1])
    assert found == pytest.approx(np.mean(change), abs=1e-5)


def test_effects_are_log_probabilities_of_the_ablated_run():
    """Recomputed by hand from the ablated logits, for one head."""
    found, task, _ = handmade(additive, "language", 6)
    model, prompts, check = found.model, task.val, checked("language")
    logp = next(iter(logits_without(model, prompts, [(1, 1)])))[0].log_softmax(-1)
    with torch.no_grad():
        residual = forward(model.network, prompts.tokens).residual[torch.arange(len(prompts)), prompts.ends]
    full = model.network.logits(residual).log_softmax(-1)
    objects = [model.tokenizer.convert_tokens_to_ids(f"p{i}") for i in range(8)]
    generic = [model.tokenizer.convert_tokens_to_ids(word) for word in check.generic]
    values: dict[str, list[float]] = {"answer": [], "others": [], "generic": []}
    for n in range(len(prompts)):
        own = int(prompts.answers[n, 0])
        for name, tokens in {
            "answer": [own],
            "others": [token for token in objects if token != own],
            "generic": generic,
        }.items():
            values[name].append(math.log(logp[n, tokens].exp().sum()) - math.log(full[n, tokens].exp().sum()))
    row = check.heads.set_index("node").loc["a1.h1"]
    for name, each in values.items():
        assert row[name] == pytest.approx(np.mean(each), abs=1e-4)
    subjects = {int(prompts.tokens[n, prompts.subject_stop[n] - 1]) for n in range(len(prompts))}
    assert not set(generic) & (set(objects) | subjects)


def test_of_several_right_answers_none_is_another_object_or_a_generic_token():
    """Against plain sums of probabilities: each object is right for the fact before, too, as later years are."""
    model = load_model(tiny_hf("llama"), tokenizer(), device="cpu")
    names = ["w10", "w11", "w12", "w13"]
    facts = [Fact(f"w{i + 1}", name, also=(names[i - 1], f"w{60 + i}")) for i, name in enumerate(names)]
    prompts = encode(model, facts, "{} w30 w31", names)
    parts = {"val": prompts, "test": prompts.select([]), "reference": prompts}
    task = Task(
        model.name, model.digest, relation_of(facts, "{} w30 w31"), "{} w30 w31", 4, 0, **parts, n_known=4, n_facts=4
    )
    roles = pd.DataFrame({"node": ["a1.h1"], "layer": [1], "head": [1], "role": ["mover"]})
    check = check_roles(model, roles, task, progress=False)
    ids = model.tokenizer.convert_tokens_to_ids
    change = {"answer": [], "others": []}
    for fact, logits in zip(facts, next(logits_without(model, prompts, [(1, 1)]))[0], strict=True):
        before = model.logits(torch.tensor([prompt_ids(model, f"{fact.subject} w30 w31")]))[0, -1]
        for name, tokens in {
            "answer": [*fact.right],
            "others": [one for one in names if one not in fact.right],
        }.items():
            after, own = (float(one.softmax(-1)[ids(tokens)].sum().log()) for one in (logits, before))
            change[name].append(after - own)
    row = check.every.set_index("node").loc["a1.h1"]
    cuts, kept = make_ablation(model, task, "resample"), model.graph.exists.clone()
    kept[model.graph.edge_index("a1.h1->logits")] = False
    direct = []
    for fact, *both in zip(facts, *(run_circuit(model, one, prompts, cuts)[:, 0] for one in (kept, None)), strict=True):
        after, own = (float(one.softmax(-1)[ids([*fact.right])].sum().log()) for one in both)
        direct.append(after - own)
    assert row["direct"] == pytest.approx(np.mean(direct), abs=1e-5)
    assert row["answer"] == pytest.approx(np.mean(change["answer"]), abs=1e-5)
    assert row["others"] == pytest.approx(np.mean(change["others"]), abs=1e-5)
    assert not {name for fact in facts for name in fact.right} & {*check.generic}


def test_p_is_the_share_of_comparable_heads_and_of_random_sets():
    check = checked("language")
    effects = check.every.set_index("node")["answer"]
    named = set(check.heads["node"])
    chance = effects[[node for node in effects.index if node not in named]]
    row = check.heads.set_index("node").loc["a1.h2"]
    assert row["p_answer"] == pytest.approx((1 + (chance <= row["answer"]).sum()) / (1 + len(chance)))
    role = check.roles.loc["relation"]
    assert role["heads"] == 1 and role["holds"] == 1 and role["low"] < 0.3  # of a single head little can be said
    assert role["p_answer"] >= 1 / 22 and role["random_answer"] == pytest.approx(chance.mean(), abs=0.1)


def test_too_few_heads_to_compare_with_are_too_few_to_say():
    found, task, roles = handmade(copying_head)
    check = check_roles(found.model, roles.head(1), task, progress=False)
    assert check.heads["verdict"].tolist() == [TOO_FEW] and check.heads["random_heads"].tolist() == [7]


def test_the_same_seed_gives_the_same_check():
    found, task, roles = handmade(copying_head)
    one, two = (check_roles(found.model, roles.head(1), task, seed=3, progress=False) for _ in range(2))
    pd.testing.assert_frame_equal(one.roles, two.roles)
    pd.testing.assert_frame_equal(one.heads, two.heads)


# --- the story ---


def test_a_story_of_the_true_heads_and_mlps_keeps_the_answer():
    found, task, _ = handmade(key_value_lookup)
    circuit = Circuit.from_edges(found.model.graph, sorted(found.edges), provenance={"ablation": "zero"})
    roles = head_roles(found.model, circuit, task, progress=False)
    assert roles["role"].tolist() == ["mover"]
    table = faithful_story(found.model, circuit, roles, task, draws=4, progress=False).set_index("run")
    assert table.loc["story", "edges"] == table.loc["circuit", "edges"] == 5
    for run in ("full model", "circuit", "story", "named heads and MLPs"):
        assert table.loc[run, "hit"] == 1 and table.loc[run, "nll"] < 1
    for run in ("MLPs alone", "empty circuit"):
        assert table.loc[run, "nll"] > 2
    assert table.loc["random heads and MLPs", "nll"] > table.loc["named heads and MLPs", "nll"]
    assert table["heads"].to_dict()["random heads and MLPs"] == 1


def test_a_story_without_the_relation_head_costs_more():
    """The mover alone cannot tell the capital from the language."""
    found, task, roles = handmade(additive)
    circuit = replace(Circuit.full(found.model.graph), provenance={"ablation": "zero"})
    mover = roles[roles["node"] == "a1.h1"]
    alone = faithful_story(found.model, circuit, mover, task, draws=2, progress=False).set_index("run")
    both = faithful_story(found.model, circuit, roles.head(4), task, draws=2, progress=False).set_index("run")
    assert alone.loc["story", "nll"] > both.loc["story", "nll"] + 0.5
    assert both.loc["story", "nll"] == pytest.approx(both.loc["full model", "nll"], abs=0.1)


def test_the_story_keeps_exactly_the_edges_between_its_nodes():
    found, task, roles = handmade(additive)
    graph = found.model.graph
    circuit = replace(Circuit.full(graph), provenance={"ablation": "zero"})
    table = faithful_story(found.model, circuit, roles.head(2), task, draws=1, progress=False).set_index("run")
    inside = {"input", "m0", "m1", "logits", *roles["node"].head(2)}
    edges = Circuit.full(graph).edges
    count = (edges["sender"].isin(inside) & edges["receiver"].str.partition("<")[0].isin(inside)).sum()
    assert table.loc["story", "edges"] == table.loc["named heads and MLPs", "edges"] == count


def test_a_storys_random_heads_are_all_others_of_the_layer():
    """Each of the other three heads as a story of its own; the mean over them."""
    found, task, roles = handmade(additive)
    circuit = replace(Circuit.full(found.model.graph), provenance={"ablation": "zero"})
    row = roles[roles["node"] == "a1.h1"]
    run = "named heads and MLPs"
    alone = {
        node: faithful_story(found.model, circuit, row.assign(node=node), task, draws=9, progress=False).set_index(
            "run"
        )
        for node in (f"a1.h{head}" for head in range(4))
    }
    others = [one.loc[run] for node, one in alone.items() if node != "a1.h1"]
    chance = alone["a1.h1"].loc["random heads and MLPs"]
    assert chance["nll"] == pytest.approx(np.mean([one["nll"] for one in others]), abs=1e-5)
    assert chance["hit"] == pytest.approx(np.mean([one["hit"] for one in others]))


def test_the_story_of_an_ensemble_is_that_of_its_consensus():
    found, task, roles = handmade(additive)
    graph = found.model.graph
    circuit = replace(Circuit.full(graph), provenance={"ablation": "zero"})
    expected = faithful_story(found.model, circuit, roles.head(4), task, draws=2, progress=False)
    sure = faithful_story(found.model, certain(circuit), roles.head(4), task, draws=2, progress=False)
    pd.testing.assert_frame_equal(sure, expected)
    # the mover in all draws, the relation head in one of three
    alone = replace(Circuit.from_edges(graph, ["input->a1.h1<v>", "a1.h1->logits"]), provenance={"ablation": "zero"})
    both = alone | Circuit.from_edges(graph, ["input->a1.h2<k>", "a1.h2->logits"])
    ensemble = drawn(alone, both, alone)
    named = head_roles(found.model, ensemble, task, progress=False)
    assert named["pi"].tolist() == pytest.approx([1.0, 1 / 3]) or named["pi"].tolist() == pytest.approx([1 / 3, 1.0])
    story = faithful_story(found.model, ensemble, named, task, draws=2, progress=False).set_index("run")
    assert story.loc["story", ["heads", "edges"]].tolist() == [1, 2]
    assert story.loc["circuit", ["heads", "edges"]].tolist() == [1, 2]
    with pytest.raises(DataError, match="half of the draws"):
        faithful_story(found.model, ensemble, named[named["pi"] < 0.5], task, progress=False)


def test_effects_of_roles_are_weighted_by_pi_and_random_ones_likewise():
    found, task, roles = handmade(copying_head)
    some = roles.head(2).assign(role="mover")
    model, more = found.model, {"random_heads": 20, "draws": 30, "progress": False}
    even = check_roles(model, some, task, **more)
    pd.testing.assert_frame_equal(check_roles(model, some.assign(pi=0.5), task, **more).roles, even.roles)
    uneven = check_roles(model, some.assign(pi=[1.0, 0.25]), task, **more)
    first, second = (uneven.heads.set_index("node").loc[node, "answer"] for node in some["node"])
    assert uneven.roles.loc["mover", "answer"] == pytest.approx((first + 0.25 * second) / 1.25)
    assert uneven.roles.loc["mover", "heads"] == 2 and uneven.heads["pi"].tolist() == [1.0, 0.25]
    # random pairs, the head that stands for the surer one counting four times: those of all others
    order = some.assign(pi=[1.0, 0.25]).sort_values(["layer", "head"])
    effects = uneven.every.set_index("node")["answer"]
    sets = matched_head_sets(model.graph, some["node"], 30, 0, least=20, taken=some["node"])
    weighted = [np.average(effects[heads], weights=order["pi"]) for heads in sets]
    assert uneven.roles.loc["mover", "random_answer"] == pytest.approx(np.mean(weighted))


def test_more_heads_with_a_role_than_without_leave_the_role_without_p():
    found, task, roles = handmade(copying_head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the table says it
        check = check_roles(found.model, roles.head(5).assign(role="mover"), task, progress=False)
    assert check.heads["random_heads"].tolist() == [3] * 5
    assert np.isnan(check.roles.loc["mover", "p_answer"]) and np.isfinite(check.roles.loc["mover", "answer"])


# --- what is refused ---


def test_what_cannot_be_checked_is_refused(tiny, words):
    found, task, roles = handmade(copying_head)
    model = found.model
    with pytest.raises(SettingError, match="random_heads=5"):
        check_roles(model, roles, task, random_heads=5, progress=False)
    with pytest.raises(DataError, match="too few to say"):
        check_roles(model, roles.assign(role=TOO_FEW), task, progress=False)
    with pytest.raises(DataError, match="No head of 8 has a role"):
        check_roles(model, roles.assign(role="other"), task, progress=False)
    with pytest.raises(DataError, match="none to compare with"):
        check_roles(model, roles.assign(role="mover"), task, progress=False)
    with pytest.raises(SettingError, match="made for"):
        check_roles(tiny("gpt2"), roles, task, progress=False)
    circuit = Circuit.from_edges(model.graph, ["input->a0.h0<v>", "a0.h0->logits"])
    with pytest.raises(CircuitError, match=r"'a0.h1' has a role but is not in the circuit|'a1.h2' has a role"):
        faithful_story(model, circuit, roles, task, progress=False)
    with pytest.raises(SettingError, match="draws=0"):
        faithful_story(model, circuit, roles, task, draws=0, progress=False)


def test_a_relation_with_one_object_has_no_others_that_could_gain():
    found, task, roles = handmade(copying_head)
    facts = tuple(Fact(f"s{i}", "o0") for i in (8, 0, 1, 2))
    alike = Relation("alike", "handmade", "word", "word", False, (task.template,), (task.template,), facts)
    task = make_task(found.model, alike, n=2)
    with pytest.raises(DataError, match="All objects of alike begin alike"):
        check_roles(found.model, roles.head(1), task, progress=False)


def test_progress_only_grows_and_ends_at_its_total():
    found, task, roles = handmade(copying_head)
    seen: list[tuple[int, int]] = []
    check_roles(found.model, roles.head(1), task, progress=lambda done, total, note: seen.append((done, total)))
    assert all(a < b for (a, _), (b, _) in pairwise(seen)) and seen[-1][0] == seen[-1][1]


# --- the built-in model ---


@pytest.mark.model
def test_the_first_mover_of_capitals_holds(smollm2):
    relation = load_relation("country_capital")
    task = make_task(smollm2, replace(relation, facts=relation.facts[:12]), n=5)
    roles = head_roles(smollm2, None, task, progress=False)
    check = check_roles(smollm2, roles[roles["node"] == "a23.h4"], task, progress=False)
    row = check.heads.iloc[0]
    assert (row["role"], row["verdict"], row["random_heads"]) == ("mover", "holds", 50)
    assert row["answer"] < -0.5 and row["others"] > 0 and row["direct"] < -0.5
