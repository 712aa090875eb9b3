"""Circuits before and after an edit, and transport, against hooks on the Hugging Face model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.discovery.discover import score_edges
from kcwb.editing.compare import (
    _head_outputs,
    _matched_sets,
    _trace,
    account,
    compare_edit,
    compare_edits,
    heads_put_back,
    matched_circuit,
    outputs_put_back,
    strongest_movers,
)
from kcwb.editing.edit import EditError, edit
from kcwb.editing.scores import EditCase
from kcwb.errors import DataError, SettingError
from kcwb.tasks.prompts import make_task
from kcwb.tasks.relations import Fact
from tests.editing.conftest import same_bits, weights
from tests.tasks import known_relation, prompt_ids
from tests.tiny import tiny_model

TEMPLATES = ("w1 {} w2", "w3 {} w4")


def large_edit(model, fact: Fact, target: str, method: str = "ft_m"):
    more = {"lr": 0.1, "clamp": 0.3} if method == "ft_m" else {"prefixes": 2, "clamp": 3.0, "covariance": "identity"}
    return edit(
        model, fact, target, method, template=TEMPLATES[0], layer=0, steps=4, bound=99.0, progress=False, **more
    )


@pytest.fixture(scope="module")
def relation(model):
    from dataclasses import replace

    return replace(known_relation(model, 16), prompt_templates_zs=TEMPLATES)


@pytest.fixture(scope="module")
def task(model, relation):
    return make_task(model, relation, n=6)


@pytest.fixture(scope="module")
def found(model, task):
    fact = task.val.facts[0]
    made = large_edit(model, fact, "w61")
    before = weights(model)
    comparison = compare_edit(model, made, task, edges=60, movers=["a0.h1", "a1.h0", "a1.h2"], draws=25, progress=False)
    assert same_bits(model, before)
    return comparison


# --- transport ---


def hooked(model, tokens: torch.Tensor, heads: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    """Logits at END of the Hugging Face model when some heads' outputs at END are replaced, through o_proj's input."""
    module: Any = model.bridge.original_model
    handles = []
    for layer in {layer for layer, _ in heads}:
        chosen = {head: value for (at, head), value in heads.items() if at == layer}

        def hook(_module: Any, inputs: Any, output: torch.Tensor, layer=layer, chosen=chosen) -> torch.Tensor:
            weight = model.network.layers[layer].W_O
            output = output.clone()
            z = inputs[0].unflatten(-1, (weight.shape[0], -1))
            for head, value in chosen.items():
                output[:, -1] += value - z[:, -1, head] @ weight[head]
            return output

        handles.append(module.model.layers[layer].self_attn.o_proj.register_forward_hook(hook))
    try:
        return model.logits(tokens)[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def test_heads_put_back_is_the_hooked_model(model, task):
    tokens = task.val.select([0]).tokens[:, : int(task.val.ends[0]) + 1]
    clean = _head_outputs(model.network, tokens, _trace(model.network, tokens))
    with large_edit(model, task.val.facts[0], "w61"):
        trace = _trace(model.network, tokens)
        sets = torch.zeros(4, 2, 4, dtype=torch.bool)
        sets[1, 0, 1], sets[2, 0, :], sets[3, 1, 2], sets[3, 0, 3] = True, True, True, True
        logits = model.network.logits(heads_put_back(model.network, tokens, clean, trace, sets))
        for one, row in zip(sets, logits, strict=True):
            heads = {(layer, head): clean[layer, head] for layer, head in one.nonzero().tolist()}
            assert torch.allclose(row, hooked(model, tokens, heads), atol=2e-4)
        assert torch.allclose(logits[0], logits[2], atol=1e-4)  # those heads are below the edited MLP
        assert not torch.allclose(logits[0], logits[3], atol=1e-3)


def test_outputs_put_back_everywhere_is_the_unedited_model(model, task):
    tokens = task.val.select([0]).tokens[:, : int(task.val.ends[0]) + 1]
    clean, unedited = _trace(model.network, tokens), model.logits(tokens)
    with large_edit(model, task.val.facts[0], "w61") as edited:
        before = {0: model.network.mlp_output(0, clean[0].hidden) - clean[0].hidden @ _delta(model)}
        everywhere = torch.ones(tokens.shape[1], dtype=torch.bool)
        final = outputs_put_back(model.network, tokens, before, everywhere)
        assert torch.allclose(model.network.logits(final), unedited, atol=2e-4)
        nowhere = outputs_put_back(model.network, tokens, before, ~everywhere)
        assert torch.allclose(model.network.logits(nowhere), edited.logits(tokens), atol=2e-4)


def _delta(model) -> torch.Tensor:
    from kcwb.editing.edit import _stack

    return _stack(model.network)[-1].edit.deltas[0]


def test_te_is_the_share_of_the_edits_effect(model, task, found):
    """From logits of the Hugging Face model, edited, unedited and patched."""
    fact, made = task.val.facts[0], found.edit
    tokens = task.val.select([0]).tokens[:, : int(task.val.ends[0]) + 1]
    old, new = (prompt_ids(model, name)[int(model.prepend_bos)] for name in (fact.object, "w61"))
    clean = _head_outputs(model.network, tokens, _trace(model.network, tokens))
    before = model.logits(tokens)[0, -1]
    with made:
        after = model.logits(tokens)[0, -1]
        patched = hooked(model, tokens, {at: clean[at] for at in [(0, 1), (1, 0), (1, 2)]})
    clean_ld, edit_ld, patched_ld = (float(row[new] - row[old]) for row in (before, after, patched))
    te = (edit_ld - patched_ld) / (edit_ld - clean_ld)
    assert found.transport.set_index("what").loc["mover heads", "TE"] == pytest.approx(te, abs=1e-3)
    assert found.summary["te_movers"] == pytest.approx(te, abs=1e-3)
    assert 1 / 26 <= found.p <= 1


def test_random_sets_have_as_many_heads_in_each_layer():
    chosen = torch.zeros(3, 8, dtype=torch.bool)
    chosen[0, 2], chosen[2, [1, 5, 6]] = True, True
    sets = _matched_sets(chosen, 200, seed=0)
    assert (sets.sum(-1) == torch.tensor([1, 0, 3])).all()
    assert (sets.float().mean(0)[0] > 0.05).all()  # every head has its turn
    assert torch.equal(sets, _matched_sets(chosen, 200, 0)) and not torch.equal(sets, _matched_sets(chosen, 200, 1))


# --- circuits ---


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


# --- many edits, and what is refused ---


def test_many_edits_are_the_single_ones(model, relation, monkeypatch):
    from kcwb.editing import compare as module

    monkeypatch.setattr(module, "strongest_movers", lambda *args: ["a1.h0"])
    monkeypatch.setattr(module, "make_task", lambda model, _name, **more: make_task(model, relation, **more))
    facts = make_task(model, relation, n=4).val.facts[:2]
    cases = [EditCase(fact, "w61", TEMPLATES[0], (), (), relation="words") for fact in facts]
    same = EditCase(facts[0], f"{facts[0].object.split()[0]} w9", TEMPLATES[0], (), (), relation="words")
    more = {"layer": 0, "steps": 4, "lr": 0.1, "clamp": 0.3, "bound": 99.0, "edges": 40, "draws": 4, "n": 4}
    before = weights(model)
    with pytest.warns(UserWarning, match="1 of 3 edits left out"):
        table = compare_edits(model, [*cases, same], "ft_m", progress=False, **more)
    assert same_bits(model, before) and table["subject"].tolist() == [fact.subject for fact in facts]
    made = large_edit(model, facts[1], "w61")
    task = make_task(model, relation, n=4)
    single = compare_edit(model, made, task, edges=40, movers=["a1.h0"], draws=4, progress=False).summary
    for name, value in single.items():
        assert table.iloc[1][name] == pytest.approx(value, nan_ok=True), name


def test_the_account_says_yes_no_or_undecided():
    n = 40
    draw = np.random.default_rng(0)
    table = pd.DataFrame({"te_subject": 0.9 + 0.02 * draw.standard_normal(n), "te_end": 0.1, "edge_iou": 0.5})
    table["te_movers"], table["te_random"] = 0.5 + 0.4 * draw.standard_normal(n), 0.2
    table["edge_iou_paraphrase"] = table["edge_iou_answer"] = 0.5 + 0.01 * draw.standard_normal(n)
    table["edited_share"], table["node_share"] = 0.02, 0.03
    rows = account(table).set_index("quantity")
    assert rows["holds"].to_dict() == {
        "te_subject": "yes",
        "te_end": "no",
        "te_movers - te_random": "yes",
        "te_movers": "undecided",
        "edge_iou_paraphrase - edge_iou": "undecided",
        "edge_iou_answer - edge_iou": "undecided",
        "edited_share - node_share": "no",
    }
    assert (rows["n"] == n).all() and (rows["low"] <= rows["mean"]).all()


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


def test_movers_are_the_task_s_strongest(model, task):
    from kcwb.analysis.heads import head_roles

    table = head_roles(model, None, task, shuffles=50, resamples=1, progress=False)
    movers = table[table["role"] == "mover"].sort_values("D_S", ascending=False)["node"].tolist()
    if not movers:
        with pytest.raises(DataError, match="mover"):
            strongest_movers(model, task)
    else:
        assert strongest_movers(model, task, 2) == movers[:2]
