"""Circuits overlap as a slow count says, beside chance and controls."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import weighted_iou
from kcwb.discovery.baselines import random_circuit
from kcwb.errors import CircuitError, SettingError
from kcwb.models.graph import Graph
from kcwb.studies.two_hop.backwards import both_ways
from kcwb.studies.two_hop.circuits import hop_circuits
from kcwb.studies.two_hop.deletion import delete_first_hop
from kcwb.studies.two_hop.lens import hop_arrival, hop_lens
from kcwb.studies.two_hop.overlap import PARTS, hop_overlap
from kcwb.tasks.compose import compose
from kcwb.tasks.hops import ask_hops, make_hops
from kcwb.tasks.task import make_task
from tests.ensembles import certain, drawn
from tests.studies.two_hop.conftest import made_by_hand


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


def test_ensembles_of_one_circuit_overlap_as_it_does(planted, hops):
    graph = planted.model.graph
    some = [[random_circuit(graph, 30 + i, seed=10 * j + i) for i in range(3)] for j in range(4)]
    made = made_by_hand(hops, *some)
    expected = hop_overlap(made, draws=5, resamples=5, progress=False)
    for names in (["two-hop", "hop 1", "hop 2", "control"], ["hop 1"], ["two-hop"]):
        ensembles = {name: certain(made.circuits[name]) for name in names}
        table = hop_overlap(made, ensembles=ensembles, draws=5, resamples=5, progress=False)
        ends = ["low", "high", "jaccard_low", "jaccard_high"]  # of resampled draws, which are all alike
        pd.testing.assert_frame_equal(table.drop(columns=ends), expected.drop(columns=ends))
        single = table[table["level"] == "one fact"]
        pd.testing.assert_frame_equal(single, expected[expected["level"] == "one fact"])
    ensembles = {name: certain(one) for name, one in made.circuits.items() if name != "integrated"}
    both = hop_overlap(made, ensembles=ensembles, draws=2, resamples=5, progress=False)
    both = both[both["level"] == "all facts"]
    assert (both["low"] == both["share"]).all() and (both["jaccard_high"] == both["jaccard"]).all()


def test_the_overlap_of_hop_ensembles_is_weighted(planted, hops):
    graph = planted.model.graph
    some = [[random_circuit(graph, 30 + i, seed=10 * j + i) for i in range(3)] for j in range(4)]
    names = ("two-hop", "hop 1", "hop 2", "control")
    ensembles = {name: drawn(*one) for name, one in zip(names, some, strict=True)}
    table = hop_overlap(made_by_hand(hops, *some), ensembles=ensembles, draws=5, resamples=40, progress=False)
    table = table.set_index(["level", "circuit", "part"]).loc["all facts"]
    pi = {name: one.inclusion for name, one in ensembles.items()}
    pi["integrated"] = pi["hop 1"].maximum(pi["hop 2"])
    for name in ("hop 1", "hop 2", "control", "integrated"):
        row = table.loc[(name, "edges")]
        both = float(pi["two-hop"].minimum(pi[name]).sum())
        assert row["share"] == pytest.approx(both / float(pi[name].sum()))
        assert row["size"] == pytest.approx(float(pi[name].sum()))
        if name != "integrated":
            assert row["jaccard"] == pytest.approx(weighted_iou(ensembles["two-hop"], ensembles[name]))
        assert row["low"] <= row["high"] and 0 < row["random"] < 1 and np.isnan(row["p"])
        assert table.loc[(name, "nodes"), "p"] > 0
    a, b = (ensembles[name].nodes.set_index("node") for name in ("two-hop", "hop 1"))
    pairs = pd.concat([one.loc[one["kind"] == "head", "pi"] for one in (a, b)], axis=1).fillna(0.0)
    assert table.loc[("hop 1", "heads"), "share"] == pytest.approx(pairs.min(axis=1).sum() / pairs.iloc[:, 1].sum())


def test_ensembles_of_something_else_are_refused(found):
    graph = found.circuits["hop 1"].graph
    for ensembles, error in [
        ({"hop 3": certain(found.circuits["hop 1"])}, SettingError),
        ({"integrated": certain(found.circuits["integrated"])}, SettingError),
        ({"hop 1": certain(random_circuit(Graph(2, 2), 5, seed=0))}, CircuitError),
        ({"hop 1": certain(Circuit.empty(graph))}, CircuitError),
    ]:
        with pytest.raises(error):
            hop_overlap(found, ensembles=ensembles, progress=False)


def test_controls_are_beside_the_hops(planted, hops):
    task = make_task(planted.model, planted.composition.second, n=3)
    made = hop_circuits(planted.model, hops, controls={"other": task}, edges=4, steps=1, progress=False)
    assert made.singles == ["hop 1", "hop 2", "integrated", "other"] and len(made.of_fact["other"]) == 8
    table = hop_overlap(made, draws=2, resamples=2, progress=False)
    assert set(table["circuit"]) == set(made.singles)
    deleted = delete_first_hop(planted.model, made, draws=2, progress=False)
    assert set(deleted["cut"]) == {"hop 1 only", "hop 2 only", "other only"}


def test_settings_of_draws_that_cannot_be_meant_are_refused(planted, found):
    for call in (
        lambda: hop_overlap(found, draws=0),
        lambda: hop_overlap(found, resamples=0),
        lambda: delete_first_hop(planted.model, found, draws=0),
    ):
        with pytest.raises(SettingError):
            call()


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
