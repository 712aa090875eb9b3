"""Circuits before and after an edit, of the size asked for, and what their comparison says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble, weighted_iou
from kcwb.discovery.discover import score_edges
from kcwb.discovery.selection import matched_circuit
from kcwb.editing.edit import EditError
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.reading.roles import strongest_movers
from kcwb.studies.editing_account import comparison
from kcwb.studies.editing_account.comparison import compare_edit
from kcwb.studies.editing_account.transport import transport
from kcwb.studies.fact_circuits import FactDraw
from kcwb.tasks.task import make_task
from tests.editing.conftest import large_edit, same_bits, weights
from tests.tasks import prompt_ids
from tests.tiny import tiny_model


def test_circuits_have_the_size_asked_for_and_say_whose_they_are(model, found):
    for name, circuit in found.circuits.items():
        assert abs(circuit.n_edges - 60) <= 6, name
        assert circuit.n_edges == circuit.without_dangling().n_edges
    digests = {name: circuit.provenance["model"]["digest"] for name, circuit in found.circuits.items()}
    assert digests.pop("after") != model.digest and set(digests.values()) == {model.digest}
    for name in ("after", "new answer", "paraphrase"):
        iou = found.circuits["before"].iou(found.circuits[name])
        assert found.overlap.loc[name, "edge_iou"] == pytest.approx(iou)
    assert found.summary["edge_iou"] == pytest.approx(found.circuits["before"].iou(found.circuits["after"]))


@pytest.mark.parametrize("edges", [1, 30, 100])
def test_a_matched_circuit_is_nearest_to_the_size_among_all_beginnings(model, task, edges):
    scores = score_edges(model, task, "eap", progress=False)
    circuit = matched_circuit(model.graph, scores, edges)
    from kcwb.discovery.selection import select_edges

    sizes = [
        Circuit(model.graph, select_edges(model.graph, scores, edges=n)).without_dangling().n_edges
        for n in range(1, model.graph.n_edges + 1)
    ]
    assert abs(circuit.n_edges - edges) <= min(abs(size - edges) for size in sizes) + 1


def test_movers_that_are_no_heads_are_refused(model, task, found):
    for movers, error in ((["m0"], CircuitError), (["input"], CircuitError), ([], SettingError)):
        with pytest.raises(error, match="head"):
            compare_edit(model, found.edit, task, edges=30, movers=movers, draws=5, progress=False)


def test_so_few_edges_that_there_is_no_circuit_are_refused(model, task, found, monkeypatch):
    """Two empty circuits have all edges in common."""
    monkeypatch.setattr(comparison, "matched_circuit", lambda graph, scores, edges: Circuit.empty(graph))
    with pytest.raises(CircuitError, match="are not connected: no circuit of about 2 edges"):
        compare_edit(model, found.edit, task, edges=2, movers=["a0.h0"], draws=5, progress=False)


def test_the_change_is_shared_out_over_layers(model, found):
    rows, columns = (found.circuits["before"].kept ^ found.circuits["after"].kept).nonzero(as_tuple=True)
    share = np.zeros(4)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        for name in (model.graph.sender_names[row], model.graph.receiver_names[column].split("<")[0]):
            share[model.graph.node(name).layer + 1] += 0.5 / len(rows)
    assert found.layers["change"].tolist() == pytest.approx(share[1:3])
    assert found.layers["edited"].tolist() == [True, False]
    assert share.sum() == pytest.approx(1)
    assert found.summary["edited_share"] == pytest.approx(share[1])


# --- lens and roles ---


def test_the_lens_ends_in_the_models_own_answer(model, task, found):
    fact = task.val.facts[0]
    tokens = task.val.select([0]).tokens[:, : int(task.val.ends[0]) + 1]
    table = found.lens.set_index(["state", "quantity", "who", "layer"])["value"]
    for state in ("before", "after"):
        if state == "after":
            found.edit.apply()
        try:
            logits = model.logits(tokens)[0, -1]
        finally:
            found.edit.undo()
        for who, name in (("old", fact.object), ("new", "w61")):
            token = prompt_ids(model, name)[int(model.prepend_bos)]
            assert table[state, "rank", f"{who}, END", 1] == int((logits >= logits[token]).sum())
            assert table[state, "probability", f"{who}, END", 1] == pytest.approx(
                float(logits.softmax(-1)[token]), abs=1e-5
            )
    assert found.summary["rank_new_after"] <= found.summary["rank_new_before"]


def test_roles_follow_the_contributions(found):
    assert set(found.roles.loc[found.roles["mover"], "node"]) <= {"a0.h1", "a1.h0", "a1.h2"}
    for state in ("before", "after"):
        s, r, role = (found.roles[f"{what}_{state}"] for what in ("D_S", "D_R", "role"))
        size = s.abs() + r.abs()
        assert (role[size < 0.1] == "other").all()
        counted = size >= 0.1
        assert ((s + r < 0) == (role == "suppressor"))[counted].all()
        assert (s.abs()[role == "mover"] > 10 * r.abs()[role == "mover"]).all()
        assert (r.abs()[role == "relation"] > 10 * s.abs()[role == "relation"]).all()


def test_what_cannot_be_compared_is_refused(model, task, relation):
    fact = task.val.facts[0]
    made = large_edit(model, fact, "w61")
    other = make_task(model, relation, n=4, template=1)
    for wrong, error in [
        ({"task": other}, SettingError),
        ({"edges": 0}, SettingError),
        ({"draws": 0}, SettingError),
        ({"movers": 0}, SettingError),
    ]:
        with pytest.raises(error):
            compare_edit(model, made, **{"task": task, "edges": 40, "progress": False, **wrong})
    with made, pytest.raises(EditError, match="undo it"):
        compare_edit(model, made, task, edges=40)
    with pytest.raises(EditError, match="other weights"):
        theirs = tiny_model("llama", seed=9)
        compare_edit(theirs, made, task, edges=40)
    first = f"{fact.object.split()[0]} w9"
    with pytest.raises(DataError, match="same token"):
        compare_edit(model, large_edit(model, fact, first), task, edges=40)


def test_an_edit_is_compared_on_its_own_model_not_on_one_with_equal_weights(model, task):
    """The other load stays unedited: every TE would be undefined there, and after the same as the new answer."""
    made, twin = large_edit(model, task.val.facts[0], "w61"), tiny_model("llama", seed=3)
    assert twin.digest == model.digest
    with pytest.raises(SettingError, match="another Model object"):
        compare_edit(twin, made, task, edges=40, progress=False)
    prompt = task.val.select([0])
    with pytest.raises(SettingError, match="another Model object"):
        transport(twin, made, prompt, [], [], {}, prompt.answers[0, [0, 0]], ["a0.h0"], 2, 0)


def test_another_edit_of_the_fact_is_compared_with_what_is_known_of_the_unedited_model(model, task, found, monkeypatch):
    from kcwb.studies.editing_account import comparison as module

    other, more = large_edit(model, task.val.facts[0], "w61", "rome"), {"edges": 60, "draws": 25, "progress": False}
    more["movers"] = ["a0.h1", "a1.h0", "a1.h2"]  # as in `found`
    alone = compare_edit(model, other, task, **more)
    asked = []
    monkeypatch.setattr(
        module, "_circuit", lambda *args, of=module._circuit, **how: asked.append(1) or of(*args, **how)
    )
    again = compare_edit(model, other, task, **more, like=found)
    assert again.summary == pytest.approx(alone.summary, nan_ok=True) and len(asked) == 1
    assert all(torch.equal(again.circuits[name].kept, alone.circuits[name].kept) for name in alone.circuits)
    for what in ({"seed": 1}, {"edges": 50}, {"movers": ["a0.h1"]}, {"paraphrase": "w3 {}"}):
        with pytest.raises(SettingError, match="like is of another"):
            compare_edit(model, other, task, **{**more, **what}, like=found)
    elsewhere = large_edit(model, task.val.facts[0], "w62")
    with pytest.raises(SettingError, match="like is of another"):
        compare_edit(model, elsewhere, task, **more, like=found)


def test_movers_are_the_task_s_strongest(model, task):
    from kcwb.reading.roles import head_roles

    table = head_roles(model, None, task, shuffles=50, resamples=1, progress=False)
    movers = table[table["role"] == "mover"].sort_values("D_S", ascending=False)["node"].tolist()
    if not movers:
        with pytest.raises(DataError, match="mover"):
            strongest_movers(model, task)
    else:
        assert strongest_movers(model, task, 2) == movers[:2]


# --- drawn circuits

SMALL = {"movers": ["a0.h1", "a1.h0", "a1.h2"], "draws": 25, "progress": False}


def test_draws_that_are_all_the_same_compare_as_the_circuits_do(model, task, found, monkeypatch):
    once = lambda graph, edges, draws, ablations, seed: [FactDraw(0, edges, False)] * draws  # noqa: E731
    monkeypatch.setattr("kcwb.studies.editing_account.comparison.fact_draws", once)
    made = large_edit(model, task.val.facts[0], "w61")
    drawn = compare_edit(model, made, task, edges=60, circuit_draws=3, **SMALL)
    for name in ("overlap", "layers", "lens", "roles", "transport"):
        pd.testing.assert_frame_equal(getattr(drawn, name), getattr(found, name), check_dtype=False)
    assert drawn.summary == pytest.approx(found.summary, nan_ok=True)


def test_drawn_circuits_are_weighed_by_pi(model, task):
    made, before = large_edit(model, task.val.facts[0], "w61"), weights(model)
    drawn = compare_edit(model, made, task, edges=40, circuit_draws=6, **SMALL)
    assert same_bits(model, before)
    first = drawn.circuits["before"]
    for name in ("after", "new answer", "paraphrase"):
        other = drawn.circuits[name]
        assert isinstance(first, Ensemble) and isinstance(other, Ensemble) and len(other) == 6
        assert other.provenance["drawn"] == first.provenance["drawn"]  # the same draws of all four
        assert drawn.overlap.loc[name, "edge_iou"] == pytest.approx(weighted_iou(first, other))
        assert drawn.overlap.loc[name, "edges"] == pytest.approx(other.size)
    assert {one["edges"] for one in first.provenance["drawn"]} <= {20, 28, 40, 57, 80}
    apart = (first.inclusion - drawn.circuits["after"].inclusion).abs()
    layers = np.array([model.graph.node(name).layer for name in model.graph.node_names])
    share = np.zeros(4)
    for row, column in apart.nonzero().tolist():
        for layer in (layers[row], layers[model.graph.receiver_node[column]]):
            share[layer + 1] += float(apart[row, column]) / (2 * float(apart.sum()))
    assert drawn.layers["change"].tolist() == pytest.approx(share[1:3])
    pi = [one.nodes.set_index("node")["pi"] for one in (first, drawn.circuits["after"])]
    expected = pd.concat(pi, axis=1).fillna(0.0).max(axis=1)
    assert drawn.roles.set_index("node")["pi"].to_dict() == pytest.approx(expected[drawn.roles["node"]].to_dict())
    changed = drawn.roles["role_before"] != drawn.roles["role_after"]
    assert drawn.summary["roles_changed"] == pytest.approx(np.average(changed, weights=drawn.roles["pi"]))
    sources = first.sources.set_index("source")
    assert set(sources.index) == {"setting", "ablation", "everything"} and sources.loc["everything", "edges"] > 0


def test_a_draw_is_the_circuit_of_its_scores_size_and_reference_prompts(model, task, found):
    """The first draw that is against the prompts themselves and by signed score, against a circuit of that size."""
    made = large_edit(model, task.val.facts[0], "w61")
    drawn = compare_edit(model, made, task, edges=60, circuit_draws=20, **SMALL).circuits["before"]
    scores = found.circuits["before"].scores
    checked = 0
    for one, kept in zip(drawn.provenance["drawn"], drawn.kept, strict=True):
        if one["ablation"] == 0:
            expected = matched_circuit(model.graph, scores.abs() if one["absolute"] else scores, one["edges"])
            assert drawn.places[kept].tolist() == expected.kept.nonzero().tolist()
            checked += 1
    assert checked > 2
    with pytest.raises(SettingError, match="circuit_draws=1"):
        compare_edit(model, made, task, circuit_draws=1)
