"""Planted circuits of both hops are found, each from the scores of its chains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.discovery.attribution import attribution_scores
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.studies.two_hop.circuits import hop_circuits
from kcwb.studies.two_hop.lens import hop_lens
from kcwb.tasks.hops import ask_hops, make_hops
from kcwb.tasks.metrics import make_loss
from tests.studies.two_hop.conftest import some_hops


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


def test_another_models_hops_are_refused(tiny, hops):
    for call, more in ((hop_lens, {}), (hop_circuits, {"edges": 4})):
        with pytest.raises(SettingError, match="Make it again"):
            call(tiny("llama"), hops, progress=False, **more)


def test_resample_ablation_takes_chains_with_three_partners(planted, hops):
    made = hop_circuits(planted.model, hops, edges=4, ablation="resample", steps=1, progress=False)
    assert len(made.of_fact["two-hop"]) == 8
    alone = replace(planted.composition, chains=planted.composition.chains[:1])
    lonely = make_hops(ask_hops(planted.model, alone, progress=False))
    with pytest.raises(DataError, match="no chain has all three"):
        hop_circuits(planted.model, lonely, edges=4, ablation="resample", progress=False)
