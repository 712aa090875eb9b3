"""Two hops: the lens finds a planted bridge, circuits overlap as they should, and deletion takes the first hop away."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.studies.two_hop.circuits import PARTS, HopCircuits, hop_circuits, hop_overlap
from kcwb.studies.two_hop.deletion import DIFFERENCE, delete_first_hop
from kcwb.studies.two_hop.lens import both_ways, hop_arrival, hop_lens, lens_summary, reversal
from kcwb.tasks.compose import compose, reverse
from kcwb.tasks.hops import ask_hops, make_hops
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import make_task
from kcwb.tasks.relations import Fact
from tests.tasks import prompt_ids, relation_of, slow_rank
from tests.tasks.test_hops import rank, word_chains
from tests.twohop import two_hop_model


@pytest.fixture(scope="module")
def planted():
    return two_hop_model()


@pytest.fixture(scope="module")
def hops(planted):
    return some_hops(planted, 8)


@pytest.fixture(scope="module")
def found(planted, hops):
    return hop_circuits(planted.model, hops, edges=4, progress=False)


def loose(model, **more):
    """Chains of a random model, which knows none: every rank is right enough."""
    return make_hops(ask_hops(model, word_chains(), progress=False), k=1000, shortcut_k=None, **more)


def some_hops(planted, n: int):
    return make_hops(ask_hops(planted.model, planted.composition, progress=False), n=n)


# --- lens ---


def test_the_lens_reads_what_hugging_face_has_after_each_layer(tiny):
    model, words = tiny("llama"), loose(tiny("llama"), n=5)
    module = model.bridge.original_model
    table = hop_lens(model, words, progress=False).set_index(["subject", "layer", "place", "who"])
    chains = words.chains
    answers = {
        "bridge": [model.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in chains["bridge"]],
        "object": [model.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in chains["object"]],
    }
    for i, chain in enumerate(chains.itertuples()):
        ids = prompt_ids(model, f"w72 w70 {chain.subject} w71 w73")
        states = module(torch.tensor([ids]), output_hidden_states=True).hidden_states
        length = len(chain.subject.split())
        bos = len(ids) - length - 4
        places = {"subject": bos + 1 + length, "description": bos + 2 + length, "END": bos + 3 + length}
        assert places["END"] == len(ids) - 1
        for layer, state in enumerate(states[:-1], start=-1):  # the last one is normed already
            logits = module.lm_head(module.model.norm(state))[0]
            for place, at in places.items():
                for who, tokens in answers.items():
                    ranks = {t: int((logits[at] >= logits[at, t]).sum()) for t in set(tokens)}
                    own, others = ranks.pop(tokens[i]), list(ranks.values())
                    row = table.loc[chain.subject, layer, place, who]
                    assert row["rank"] == own and row["hit_10"] == (own <= 10)
                    beside = table.loc[chain.subject, layer, place, f"other {who}s"]
                    assert beside["rank"] == pytest.approx(stats.gmean(others))
                    assert beside["hit_10"] == pytest.approx(np.mean([rank <= 10 for rank in others]))


def test_the_last_layer_is_the_models_own_answer(planted, hops):
    table = hop_lens(planted.model, hops, progress=False)
    last = table[(table["layer"] == 2) & (table["place"] == "END") & (table["who"] == "object")]
    assert last["rank"].tolist() == hops.tasks["two-hop"].val.ranks.tolist()


def test_a_planted_bridge_is_found_at_the_subject_and_not_at_the_end(planted, hops):
    table = hop_lens(planted.model, hops, progress=False)
    assert set(table["place"]) == {"subject", "END"}  # the description ends with the subject
    found = hop_arrival(table)
    assert found["bridge_before"].tolist() == [0] * 8 and found["object_at_end"].tolist() == [1] * 8
    assert found["bridge_at_end"].isna().all() and (found["advantage"] > 2).all()
    others = table[(table["who"] == "other bridges") & (table["place"] == "subject")]
    assert (others["rank"] > 100).all() and (others["hit_10"] == 0).all()


def test_without_the_first_lookup_no_bridge_is_found(planted):
    model = planted.model
    hops = some_hops(planted, 8)
    weight = model.bridge.original_model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        found = hop_arrival(hop_lens(model, hops, progress=False))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert found["bridge_before"].isna().all() and found["object_at_end"].isna().all()
    assert (found["advantage"].abs() < 0.5).all()


def test_one_chain_has_no_others_to_compare_with(planted):
    hops = some_hops(planted, 1)
    table = hop_lens(planted.model, hops, progress=False)
    assert set(table["who"]) == {"bridge", "object"}
    assert hop_arrival(table)["advantage"].isna().all() and lens_summary(table)["facts"].eq(1).all()


def test_the_summary_is_a_geometric_mean_with_its_interval():
    ranks = {"a": 1.0, "b": 10.0, "c": 10_000.0}
    table = pd.DataFrame(
        [(s, "x", "y", 0, "END", "bridge", rank, float(rank <= 10)) for s, rank in ranks.items()],
        columns=["subject", "bridge", "object", "layer", "place", "who", "rank", "hit_10"],
    )
    summary = lens_summary(table).set_index("quantity")
    assert summary.loc["rank", "value"] == pytest.approx(10 ** (5 / 3)) and summary.loc["rank", "facts"] == 3
    assert 1 <= summary.loc["rank", "low"] < summary.loc["rank", "value"] < summary.loc["rank", "high"] <= 10_001
    assert summary.loc["hit_10", "value"] == pytest.approx(2 / 3)


# --- circuits ---


def test_planted_circuits_are_found(planted, found):
    for name, edges in planted.edges.items():
        kept = set(found.circuits[name].edges["sender"] + "->" + found.circuits[name].edges["receiver"])
        assert edges <= kept and len(kept) <= 5, name
    union = found.circuits["hop 1"] | found.circuits["hop 2"]
    assert found.circuits["integrated"].digest == union.digest
    assert [len(one) for one in found.of_fact.values()] == [8] * 4


def test_a_circuit_of_all_facts_comes_from_the_mean_of_their_scores(planted, hops, found):
    task = hops.tasks["two-hop"]
    cuts = make_ablation(planted.model, task, "mean")
    scores = attribution_scores(planted.model, make_loss(planted.model, task.val), cuts, steps=5)
    assert torch.allclose(found.scores["two-hop"].mean(0), scores, atol=1e-5)
    assert found.circuits["two-hop"].provenance["parameters"] == {"edges": 4, "select": "signed", "steps": 5}


def test_chains_of_one_bridge_share_the_scores_of_their_second_hop(planted):
    hops = some_hops(planted, 9)
    made = hop_circuits(planted.model, hops, edges=4, steps=1, progress=False)
    twice = hops.chains.index[hops.chains["bridge"].duplicated(keep=False)].tolist()
    assert len(twice) == 2
    assert torch.equal(*made.scores["hop 2"][twice]) and not torch.equal(*made.scores["hop 1"][twice])


def test_the_planted_first_hop_is_all_of_the_two_hop_circuit(found):
    table = (
        hop_overlap(found, draws=19, resamples=10, progress=False).set_index(["level", "circuit", "part"]).sort_index()
    )
    for level in ("one fact", "all facts"):
        assert table.loc[(level, "hop 1"), "share"].eq(1.0).all()
        second = table.loc[(level, "hop 2", "edges")]
        assert second["share"] <= 2 / 3 and second["share"] < table.loc[(level, "integrated", "nodes"), "share"]
        assert table.loc[(level, "hop 1", "edges"), "p"] == 1 / 20
        assert table.loc[(level, "hop 1", "edges"), "random"] < 0.3
    spread = table.dropna(subset=["low"])  # without those in which every chain is alike
    assert (spread["low"] <= spread["high"]).all() and table["random"].between(0, 1).all()
    assert table.loc[("one fact", "hop 1", "edges"), ["low", "high"]].isna().all()


def made_by_hand(hops, two_hop, hop_1, hop_2, control) -> HopCircuits:
    """Circuits with these edges, of all facts and of each of two facts."""
    graph_of = {"two-hop": two_hop, "hop 1": hop_1, "hop 2": hop_2, "control": control}
    circuits = {name: one[0] for name, one in graph_of.items()}
    circuits["integrated"] = circuits["hop 1"] | circuits["hop 2"]
    of_fact = {name: one[1:] for name, one in graph_of.items()}
    of_fact["integrated"] = [a | b for a, b in zip(of_fact["hop 1"], of_fact["hop 2"], strict=True)]
    scores = {
        name: torch.stack([torch.where(one.kept, 1.0, 0.0) for one in some[1:]]) for name, some in graph_of.items()
    }
    circuits = {name: replace(one, scores=torch.where(one.kept, 1.0, 0.0)) for name, one in circuits.items()}
    return HopCircuits(hops, circuits, of_fact, scores, {"control": hops.tasks["hop 1"]}, {"ablation": "mean"})


def test_overlap_is_what_a_slow_count_finds(planted, hops):
    graph = planted.model.graph
    names = ("two-hop", "hop 1", "hop 2", "control")
    some = {name: [random_circuit(graph, 30 + i, seed=10 * j + i) for i in range(3)] for j, name in enumerate(names)}
    table = hop_overlap(made_by_hand(hops, *some.values()), draws=5, resamples=5, progress=False)
    table = table.set_index(["level", "circuit", "part"]).sort_index()

    def parts(circuit: Circuit) -> list[set[str]]:
        edges = set(circuit.edges["sender"] + circuit.edges["receiver"])
        nodes = set(circuit.nodes.loc[circuit.nodes["kind"].isin(["head", "mlp"]), "node"])
        return [edges, nodes, {name for name in nodes if name[0] == "a"}]

    some["integrated"] = [a | b for a, b in zip(some["hop 1"], some["hop 2"], strict=True)]
    for name in ("hop 1", "hop 2", "control", "integrated"):
        for level, which in (("all facts", [0]), ("one fact", [1, 2])):
            for i, part in enumerate(PARTS):
                pairs = [(parts(some["two-hop"][j])[i], parts(some[name][j])[i]) for j in which]
                row = table.loc[level, name, part]
                assert row["share"] == pytest.approx(np.mean([len(a & b) / len(b) for a, b in pairs]))
                assert row["jaccard"] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
                assert row["size"] == np.mean([len(b) for _, b in pairs]) and row["facts"] == 2


def test_unrelated_circuits_are_within_chance_and_equal_ones_far_beyond(planted, hops):
    graph = planted.model.graph
    same = [random_circuit(graph, 40, seed=1)] * 3
    other = [random_circuit(graph, 40, seed=seed) for seed in (2, 3, 4)]
    table = hop_overlap(made_by_hand(hops, same, same, other, other), draws=39, resamples=2, progress=False)
    table = table[table["part"] == "edges"].set_index(["level", "circuit"])
    assert table.loc[("all facts", "hop 1"), "share"] == 1.0 and table.loc[("all facts", "hop 1"), "p"] == 1 / 40
    for level in ("all facts", "one fact"):
        row = table.loc[(level, "control")]
        assert row["p"] > 0.05 and row["share"] == pytest.approx(row["random"], abs=0.15)


def test_a_draws_random_share_is_that_of_circuits_drawn_one_by_one(planted, hops):
    graph = planted.model.graph
    same = [random_circuit(graph, 40, seed=1)] * 3
    table = hop_overlap(made_by_hand(hops, same, same, same, same), draws=30, resamples=1, progress=False)
    expected = []
    for seed in range(1000, 1030):
        left, right = (random_circuit(graph, 40, seed=2 * seed + side) for side in (0, 1))
        expected.append((left & right).n_edges / right.n_edges)
    row = table[(table["circuit"] == "hop 1") & (table["part"] == "edges") & (table["level"] == "all facts")].iloc[0]
    error = np.std(expected) * math.sqrt(2 / 30)
    assert row["random"] == pytest.approx(np.mean(expected), abs=4 * error)


def test_controls_are_beside_the_hops(planted, hops):
    task = make_task(planted.model, planted.composition.second, n=3)
    made = hop_circuits(planted.model, hops, controls={"other": task}, edges=4, steps=1, progress=False)
    assert made.singles == ["hop 1", "hop 2", "integrated", "other"] and len(made.of_fact["other"]) == 8
    table = hop_overlap(made, draws=2, resamples=2, progress=False)
    assert set(table["circuit"]) == set(made.singles)
    deleted = delete_first_hop(planted.model, made, draws=2, progress=False)
    assert set(deleted["cut"]) == {"hop 1 only", "hop 2 only", "other only"}


# --- deletion ---


def test_without_the_first_hops_circuit_the_two_hop_answer_goes_and_the_second_hop_stays(planted, found):
    table = delete_first_hop(planted.model, found, draws=39, progress=False).set_index(["cut", "asked"])
    gone, stays = table.loc[("hop 1 only", "two-hop")], table.loc[("hop 1 only", "hop 2")]
    assert gone["hit_before"] == 1.0 and gone["hit"] == 0.0 and gone["low"] > 3 and gone["p"] == 1 / 40
    assert stays["hit"] == 1.0 and abs(stays["cost"]) < 0.1
    more = table.loc[("hop 1 only", DIFFERENCE)]
    assert more["cost"] == pytest.approx(gone["cost"] - stays["cost"]) and more["p"] == 1 / 40
    assert abs(gone["random_cost"]) < 0.5 and gone["random_hit"] == 1.0
    other = table.loc[("hop 2 only", "two-hop")]
    assert other["hit"] == 1.0 and table.loc[("hop 2 only", "hop 2"), "hit"] == 0.0


def test_an_edge_that_does_not_matter_deletes_nothing(planted, hops, found):
    graph = planted.model.graph
    idle = Circuit.from_edges(graph, {"input->a2.h0<q>": 1.0, "a2.h0->logits": 1.0})
    other = made_by_hand(hops, *([one] * 9 for one in (idle, idle, found.circuits["hop 2"], idle)))
    table = delete_first_hop(planted.model, other, draws=19, progress=False).set_index(["cut", "asked"])
    row = table.loc[("hop 1 only", "two-hop")]
    assert row["hit"] == 1.0 and abs(row["cost"]) < 0.3


def test_a_first_hop_within_the_second_cannot_be_deleted(planted, hops, found):
    one = [found.circuits["hop 1"]] * 9
    with pytest.raises(DataError, match="no edge to delete"):
        delete_first_hop(planted.model, made_by_hand(hops, one, one, one, one), progress=False)


@pytest.mark.parametrize("wrong", [{"edges": 0}, {"edges": 10**9}, {"ablation": "men"}, {"steps": 0}])
def test_settings_of_circuits_that_cannot_be_meant_are_refused(planted, hops, wrong):
    with pytest.raises(SettingError):
        hop_circuits(planted.model, hops, progress=False, **wrong)


def test_a_circuit_that_falls_apart_is_refused(planted, hops):
    with pytest.raises(CircuitError, match="are not connected"):
        hop_circuits(planted.model, hops, edges=1, progress=False)


def test_a_control_may_not_have_the_name_of_a_hop(planted, hops):
    with pytest.raises(SettingError, match="hop 1"):
        hop_circuits(planted.model, hops, controls={"hop 1": hops.tasks["hop 2"]}, edges=4, progress=False)


def test_settings_of_draws_that_cannot_be_meant_are_refused(planted, found):
    for call in (
        lambda: hop_overlap(found, draws=0),
        lambda: hop_overlap(found, resamples=0),
        lambda: delete_first_hop(planted.model, found, draws=0),
    ):
        with pytest.raises(SettingError):
            call()


def test_another_models_hops_are_refused(tiny, hops):
    for call, more in ((hop_lens, {}), (hop_circuits, {"edges": 4})):
        with pytest.raises(SettingError, match="Make it again"):
            call(tiny("llama"), hops, progress=False, **more)


def test_long_loops_can_be_cancelled(planted, hops, found):
    def stop(*_):
        raise KeyboardInterrupt

    for call in (
        lambda: hop_lens(planted.model, hops, progress=stop),
        lambda: hop_circuits(planted.model, hops, edges=4, progress=stop),
        lambda: hop_overlap(found, progress=stop),
        lambda: delete_first_hop(planted.model, found, progress=stop),
        lambda: both_ways(planted.model, planted.composition.second, planted.composition.first, progress=stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()


def test_resample_ablation_takes_chains_with_three_partners(planted, hops):
    made = hop_circuits(planted.model, hops, edges=4, ablation="resample", steps=1, progress=False)
    assert len(made.of_fact["two-hop"]) == 8
    alone = replace(planted.composition, chains=planted.composition.chains[:1])
    lonely = make_hops(ask_hops(planted.model, alone, progress=False))
    with pytest.raises(DataError, match="no chain has all three"):
        hop_circuits(planted.model, lonely, edges=4, ablation="resample", progress=False)


# --- backwards ---


def test_a_fact_is_asked_both_ways(tiny):
    model = tiny("llama")
    facts = [Fact(f"w{i}", f"w{40 + max(i, 2)}") for i in range(9)]  # three subjects have w42
    forward = relation_of(facts, "w1 {} w2")
    found = both_ways(
        model, forward, reverse(forward, templates=["w3 {}", "w4 {} w5"]), back_template=1, progress=False
    )
    assert found["subject"].tolist() == [f"w{i}" for i in range(3, 9)]
    for row in found.itertuples():
        assert row.forward == rank(model, f"w1 {row.subject} w2", row.object)
        assert row.backward == rank(model, f"w4 {row.object} w5", row.subject)


def test_answers_both_ways_are_told_apart_from_all_objects(tiny):
    model = tiny("llama")
    facts = [Fact("w1", "w40 w1"), Fact("w2", "w40 w2"), Fact("w3", "w41"), Fact("w4", "w40 w2"), Fact("w5", "w42")]
    found = both_ways(
        model, relation_of(facts, "w1 {} w2"), reverse(relation_of(facts), templates=["w4 {} w5"]), progress=False
    )
    assert found["subject"].tolist() == ["w1", "w3", "w5"]  # w40 w2 has two subjects
    for row in found.itertuples():
        fact = Fact(row.subject, row.object)
        assert row.forward == slow_rank(model, fact, ["w40 w1", "w40 w2", "w41", "w42"], "w1 {} w2")


def test_reversal_counts_by_hand():
    table = pd.DataFrame({"forward": [1, 1, 1, 1, 1, 2, 9, 1], "backward": [1, 5, 5, 5, 5, 1, 9, 5]})
    found = reversal(table).set_index("asked")
    assert found["known"].tolist() == [6, 2, 1, 1, 1] and found["of"].tolist() == [8, 8, 8, 6, 2]
    # of the six that are known one way only, five are known forward: 2 (6 + 1) / 2^6
    assert found.loc["forward", "p"] == pytest.approx(2 * 7 / 64) and found["p"].isna().sum() == 4
    assert (found["low"] <= found["share"]).all() and (found["share"] <= found["high"]).all()
    none = reversal(pd.DataFrame({"forward": [2], "backward": [2]}))
    assert none.loc[0, "p"] == 1.0 and none["share"].isna().sum() == 2
    with pytest.raises(SettingError):
        reversal(table, k=0)


# --- the built-in model ---


@pytest.mark.model
def test_the_built_in_model_takes_two_hops_from_some_landmarks(smollm2):
    every = compose("landmark_country", "country_capital")
    some = tuple(chain for chain in every.chains if chain.subject in ("Eiffel Tower", "Colosseum", "Charles Bridge"))
    hops = make_hops(ask_hops(smollm2, replace(every, chains=some), progress=False))
    assert hops.ranks["kept"].tolist() == [True, False, True]  # it does not know where Charles Bridge is
    assert hops.chains["object"].tolist() == ["Paris", "Rome"]
    table = hop_lens(smollm2, hops, progress=False)
    assert set(table["place"]) == {"subject", "description", "END"} and len(table) == 2 * 31 * 3 * 4
    assert hop_arrival(table)["object_at_end"].ge(20).all()
    found = hop_circuits(smollm2, hops, edges=300, steps=3, progress=False)
    overlap = hop_overlap(found, draws=2, resamples=1, progress=False).set_index(["level", "circuit", "part"])
    both = overlap.loc[("one fact", "hop 1", "edges")]
    assert both["share"] > 10 * both["random"] and both["size"] == pytest.approx(300, abs=15)
