"""Circuits before and after an edit, of the size asked for, and what their comparison says."""

from __future__ import annotations

import numpy as np
import pytest

from kcwb.discovery.discover import score_edges
from kcwb.discovery.selection import matched_circuit
from kcwb.editing.edit import EditError
from kcwb.errors import DataError, SettingError
from kcwb.reading.roles import strongest_movers
from kcwb.studies.editing_account.comparison import (
    compare_edit,
)
from kcwb.studies.editing_account.transport import transport
from kcwb.tasks.prompts import make_task
from tests.editing.conftest import large_edit
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
    from kcwb.circuits.circuit import Circuit
    from kcwb.discovery.selection import select_edges

    sizes = [
        Circuit(model.graph, select_edges(model.graph, scores, edges=n)).without_dangling().n_edges
        for n in range(1, model.graph.n_edges + 1)
    ]
    assert abs(circuit.n_edges - edges) <= min(abs(size - edges) for size in sizes) + 1


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


def test_movers_are_the_task_s_strongest(model, task):
    from kcwb.reading.roles import head_roles

    table = head_roles(model, None, task, shuffles=50, resamples=1, progress=False)
    movers = table[table["role"] == "mover"].sort_values("D_S", ascending=False)["node"].tolist()
    if not movers:
        with pytest.raises(DataError, match="mover"):
            strongest_movers(model, task)
    else:
        assert strongest_movers(model, task, 2) == movers[:2]
