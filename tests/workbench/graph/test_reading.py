"""What is read of a node, against the plain functions one prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kcwb.circuits.ablation import make_ablation
from kcwb.discovery.discover import discover
from kcwb.errors import CircuitError, SettingError
from kcwb.reading.attending import why_attends
from kcwb.reading.nodes import attention_pattern, component_logits
from kcwb.tasks.task import make_task
from kcwb.workbench.graph.reading import read_node
from kcwb.workbench.graph.widget import CircuitGraph
from tests.tasks import known_relation

CLOSE = {"abs": 1e-5, "rel": 1e-4}


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama")


@pytest.fixture
def task(model: Any) -> Any:
    return make_task(model, known_relation(model, 16, unknown=6), n=4)


@pytest.fixture(params=[False, True])
def more(request: Any, model: Any, task: Any) -> dict[str, Any]:
    """Nothing for the full model; or a circuit."""
    if not request.param:
        return {}
    circuit = discover(model, task, edges=60, progress=False)
    return {"circuit": circuit, "ablation": make_ablation(model, task, circuit.ablation)}


def top(pairs: list[list[Any]], names: Any, values: Any, k: int) -> None:
    """The pairs are those of the k largest |values|, in their order."""
    wanted = sorted(((abs(value), value, name) for name, value in zip(names, values, strict=True)), reverse=True)
    wanted = [one for one in wanted if one[0] > 0][:k]
    assert [value for _, value in pairs] == pytest.approx([value for _, value, _ in wanted], **CLOSE)
    assert len({name for name, _ in pairs}) == len(pairs)


def test_each_prompt_has_what_the_plain_functions_give(model: Any, task: Any, more: dict[str, Any]) -> None:
    head = "a1.h2"
    mean, *each = read_node(model, task, head, k=5, **more)
    assert len(each) == len(task.val) == 4 and mean["prompt"] == "mean over 4 prompts"
    shares = {part: 0.0 for part in mean["tokens"]}
    for i, one in enumerate(each):
        assert (one["prompt"], one["answer"]) == (task.val.texts[i], task.val.facts[i].object)
        pattern = attention_pattern(model, task, head, prompt=i, **more)
        assert one["attention"] == pytest.approx(pattern.iloc[-1].tolist(), **CLOSE)
        assert [f"{j}:{token}" for j, token in enumerate(one["tokens"])] == list(pattern.columns)
        start, stop, end = int(task.val.subject_start[i]), int(task.val.subject_stop[i]), len(one["tokens"]) - 1
        assert one["at"] == stop - 1
        for j, share in enumerate(one["attention"]):
            inside, first = start <= j < stop, j == 0
            part = "END" if j == end else "subject" if inside else "first token" if first else "relation"
            shares[part] += share / len(each)
        why = why_attends(model, task, head, prompt=i, **more)
        for name, side in (("query", "q"), ("key", "k")):
            some = why[why["side"] == side]
            top(one[name], some["sender"], some["score"], 5)
        tokens = component_logits(model, task, head, k=5, prompt=i, **more).head(5)
        assert [token for token, _ in one["writes"]] == tokens["token"].tolist()
        assert [value for _, value in one["writes"]] == pytest.approx(tokens["above_mean"].tolist(), **CLOSE)
    assert mean["attention"] == pytest.approx(list(shares.values()), **CLOSE)
    assert sum(mean["attention"]) == pytest.approx(1)
    why = why_attends(model, task, head, **more)
    top(mean["query"], why[why["side"] == "q"]["sender"], why[why["side"] == "q"]["score"], 5)
    tokens = component_logits(model, task, head, k=5, **more)
    assert [token for token, _ in mean["writes"]] == tokens["token"].tolist()
    graph = CircuitGraph(more.get("circuit") or discover(model, task, edges=60, progress=False))
    graph.reading = {"node": head, "runs": [{"run": "the full model", "prompts": [mean, *each]}]}
    assert graph.reading["runs"][0]["prompts"][1] == each[0]


@pytest.mark.parametrize("node", ["a1.h2", "m1"])
def test_all_heads_of_the_layer_are_read_as_one_head_is(
    model: Any, task: Any, more: dict[str, Any], node: str, monkeypatch: Any
) -> None:
    _, *each = read_node(model, task, node, **more)
    for i, one in enumerate(each):
        layer = one["layer"]
        assert layer["number"] == 1 and len(layer["heads"]) == 4
        for h, head in enumerate(layer["heads"]):
            pattern = attention_pattern(model, task, f"a1.h{h}", prompt=i, **more)
            assert [f"{j}:{token}" for j, token in enumerate(layer["tokens"])] == list(pattern.columns)
            rows = [pattern.iloc[query, key] for query in range(len(pattern)) for key in range(query + 1)]
            assert [share / 1000 for share in head] == pytest.approx(rows, abs=5.1e-4)
    monkeypatch.setattr("kcwb.workbench.graph.reading._MOST", 2)
    _, *short = read_node(model, task, node, **more)
    for one, whole in zip(short, each, strict=True):
        assert one["layer"]["tokens"] == whole["layer"]["tokens"][-2:]
        ends = [[head[-len(whole["layer"]["tokens"]) - 1], *head[-2:]] for head in whole["layer"]["heads"]]
        assert one["layer"]["heads"] == ends


def test_each_in_a_table_is_one_prompt_after_the_other(model: Any, task: Any) -> None:
    table = why_attends(model, task, ["a0.h1", "a1.h0"], each=True)
    assert set(table["prompt"]) == {0, 1, 2, 3} and len(table) == 4 * len(why_attends(model, task, ["a0.h1", "a1.h0"]))
    with pytest.raises(SettingError, match="takes no other"):
        why_attends(model, task, "a1.h0", each=True, other=task)


def test_what_does_not_attend_only_writes(model: Any, task: Any) -> None:
    for node in ("m0", "input", "logits"):
        for one in read_node(model, task, node):
            assert set(one) - {"layer"} == {"prompt", "answer", "writes"}
            assert ("layer" in one) == (node == "m0" and one["answer"] != "")
    (only,) = read_node(model, task, "m1", facts=1)
    assert only["prompt"] == task.val.texts[0]
    with pytest.raises(CircuitError):
        read_node(model, task, "a9.h9")


def test_without_a_subject_the_key_is_where_end_attends_most(model: Any, task: Any) -> None:
    facts = tuple(replace(fact, span=(0, 0)) for fact in task.val.facts)
    found = read_node(model, replace(task.val, facts=facts), "a1.h2", k=3)
    assert "tokens" not in found[0] and "query" not in found[0]
    for i, one in enumerate(found[1:]):
        assert one["attention"][one["at"]] == max(one["attention"])
        why = why_attends(model, task, "a1.h2", prompt=i, to=one["at"])
        top(one["key"], why[why["side"] == "k"]["sender"], why[why["side"] == "k"]["score"], 3)
