"""Deletion takes the first hop away and leaves the second."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.errors import DataError, SettingError
from kcwb.studies.two_hop.deletion import DIFFERENCE, delete_first_hop
from tests.studies.two_hop.conftest import made_by_hand


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


def test_circuits_of_other_weights_are_not_deleted(planted, found):
    """Of a twin, a model of the same shape and tokens, the costs would be numbers without a meaning."""
    twin = replace(planted.model, digest="0" * 64)
    with pytest.raises(SettingError, match=r"was made for .* with weights"):
        delete_first_hop(twin, found, draws=19, progress=False)
