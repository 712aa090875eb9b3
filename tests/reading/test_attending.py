"""Attention scores split by senders, against the scores themselves, gradients with norms held, and a head by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.models.forward import forward
from kcwb.models.loading import load_model
from kcwb.models.rules import Rules
from kcwb.reading.attending import BIASES, CUT, attending_pairs, why_attends
from kcwb.reading.nodes import attention_pattern
from kcwb.tasks.task import make_task
from tests.handmade import induction
from tests.tasks import known_relation
from tests.tiny import ARCHITECTURES, tiny_hf, tokenizer

CLOSE = {"abs": 2e-5, "rel": 1e-4}


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def llama(tiny):
    return tiny("llama")


def task_of(model, n=4):
    return make_task(model, known_relation(model, 9), n=n)


def whole_scores(network, layer, head, q, k):
    """Scores of one prompt before any bound, `[T, T]`, from what queries and keys read."""
    of_q, of_k = (q[[head]], k[[head]]) if len(q) > 1 else (q, k)
    chosen = torch.tensor([head])
    queries, keys = network.queries(layer, of_q, chosen), network.keys(layer, of_k, chosen)
    return (queries @ keys.transpose(-1, -2))[0, 0] * network.layers[layer].scale


def sums(table):
    return table.groupby("side")["score"].sum().to_dict()


# --- exact ---


def test_each_side_sums_to_the_score_of_queries_and_keys(model):
    task, network = task_of(model), model.network
    for i in (1, 2):
        prompts = task.val.select([i])
        run = forward(network, prompts.tokens, receivers=True)
        end, subject = int(prompts.ends), int(prompts.subject_stop) - 1
        for name in ("a0.h1", "a1.h0", "a1.h3"):
            place = model.graph.node(name)
            x = run.receivers[place.layer][0][:1]
            expected = float(whole_scores(network, place.layer, place.head, x, x)[end, subject])
            found = sums(why_attends(model, task, name, prompt=i))
            assert found == pytest.approx({"q": expected, "k": expected}, **CLOSE)


def test_the_difference_of_two_scores_is_the_ratio_of_the_attention(model):
    """Softcapped where the family does it: what is split is what is capped."""
    task, cap = task_of(model), model.network.layers[1].softcap

    def capped(score):
        return score if cap is None else cap * np.tanh(score / cap)

    end = int(task.val.ends[1])
    pattern = attention_pattern(model, task, "a1.h2", prompt=1).to_numpy()
    one, two = (sums(why_attends(model, task, "a1.h2", prompt=1, to=end - back))["q"] for back in (0, 1))
    assert capped(one) - capped(two) == pytest.approx(np.log(pattern[end, end] / pattern[end, end - 1]), **CLOSE)


def test_a_senders_part_is_its_product_with_the_gradient_where_norms_hold_their_scale(model):
    """By autograd through the network's own functions: a linear map is split by its gradient."""
    task = task_of(model)
    prompts, network = task.val.select([2]), model.network.under(Rules(freeze_norms=True))
    end, subject = int(prompts.ends), int(prompts.subject_stop) - 1
    run = forward(model.network, prompts.tokens, senders=True, receivers=True)
    x = run.receivers[1][0][:1]
    q, k = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole_scores(network, 1, 1, q, k)[end, subject].backward()
    n = model.graph.senders_before(model.graph.attention_receivers(1).start)
    table = why_attends(model, task, "a1.h1", prompt=2)
    for side, grad, place in (("q", q.grad, end), ("k", k.grad, subject)):
        expected = (run.senders[:n, 0, place] @ grad[0, 0, place]).tolist()
        found = table[table["side"] == side].set_index("sender")["score"]
        assert found[list(model.graph.sender_names[:n])].tolist() == pytest.approx(expected, **CLOSE)
        assert len(found) == n + 1 and found.index[np.abs(found).argmax()] == found.index[0]


def test_pairs_sum_to_both_splits(model):
    task = task_of(model)
    pairs, table = attending_pairs(model, task, "a1.h1", prompt=0), why_attends(model, task, "a1.h1", prompt=0)
    by_side = {side: part.set_index("sender")["score"] for side, part in table.groupby("side")}
    for side, axis in (("q", 1), ("k", 0)):
        expected = by_side[side][pairs.index]
        assert pairs.sum(axis=axis).tolist() == pytest.approx(expected.tolist(), **CLOSE)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "qwen3"])
def test_in_a_circuit_each_sender_delivers_what_its_edge_does(tiny, name, ablation):
    model = tiny(name)
    task, network = task_of(model), model.network
    kept = (torch.rand(model.graph.exists.shape) < 0.5) & model.graph.exists
    circuit = Circuit(model.graph, kept, provenance={"ablation": ablation})
    prompts = task.val.select([1])
    ablated = make_ablation(model, task, ablation).values(prompts)
    run = forward(network, prompts.tokens, kept=kept, ablated=ablated, receivers=True, senders=True)
    end, subject = int(prompts.ends), int(prompts.subject_stop) - 1
    q, k, _ = run.receivers[1][0].chunk(3)
    expected = float(whole_scores(network, 1, 2, q, k)[end, subject])
    table = why_attends(model, task, "a1.h2", prompt=1, circuit=circuit)
    assert sums(table) == pytest.approx({"q": expected, "k": expected}, **CLOSE)
    cut = [
        name for i, name in enumerate(model.graph.sender_names) if not kept[i, model.graph.receiver_index("a1.h2<q>")]
    ]
    queries = table[table["side"] == "q"].set_index("sender")["score"]
    before = [name for name in cut if name in queries.index]
    assert before and (queries[before] == 0).all()
    assert (queries[CUT] == 0) == (ablation == "zero")


def test_many_heads_at_once_are_each_by_itself(tiny):
    for name in ("qwen2", "gemma2"):
        model = tiny(name)
        task = task_of(model)
        table = why_attends(model, task)
        assert list(dict.fromkeys(table["head"])) == [n for n in model.graph.sender_names if n.startswith("a")]
        for head in ("a0.h3", "a1.h1"):
            alone = why_attends(model, task, head).set_index(["side", "sender"])["score"]
            both = table[table["head"] == head].set_index(["side", "sender"])["score"]
            assert both.to_dict() == pytest.approx(alone.to_dict(), **CLOSE)


def test_prompts_are_averaged_and_another_relations_are_taken_away(llama):
    task = task_of(llama)
    each = [why_attends(llama, task, "a1.h1", prompt=i).set_index(["side", "sender"])["score"] for i in range(4)]
    mean = why_attends(llama, task, "a1.h1").set_index(["side", "sender"])["score"]
    assert mean.to_dict() == pytest.approx((sum(each) / 4).to_dict(), **CLOSE)
    other = make_task(llama, known_relation(llama, 9, "w7 w8 {} w9"), n=3)
    both = why_attends(llama, task, "a1.h1", other=other).set_index(["side", "sender"])
    there = why_attends(llama, other, "a1.h1").set_index(["side", "sender"])["score"]
    assert both["contrast"].to_dict() == pytest.approx((mean - there).to_dict(), **CLOSE)
    order = both.loc["q"]["contrast"].abs().tolist()
    assert order == sorted(order, reverse=True)


def test_each_prompt_has_its_own_number_where_others_are_left_out(llama):
    """Under resampling, of the prompts the second has no partner."""
    task = task_of(llama)
    val = replace(task.val, paired=torch.tensor([True, False, True, True]))
    circuit, where = Circuit(llama.graph, llama.graph.exists), {"ablation": make_ablation(llama, task, "resample")}
    with pytest.warns(UserWarning, match="left out"):
        table = why_attends(llama, val, "a1.h1", circuit=circuit, each=True, **where)
    assert list(dict.fromkeys(table["prompt"])) == [0, 2, 3]
    for number, some in table.groupby("prompt"):
        alone = why_attends(llama, val, "a1.h1", circuit=circuit, prompt=number, each=True, **where)
        assert alone["prompt"].eq(number).all()
        assert some["score"].tolist() == pytest.approx(alone["score"].tolist(), abs=1e-5)


def test_prompts_in_parts_give_the_same(llama, monkeypatch):
    task = task_of(llama)
    expected = why_attends(llama, task).set_index(["head", "side", "sender"])["score"]
    monkeypatch.setattr("kcwb.models.memory.memory_budget", lambda device: 0)
    found = why_attends(llama, task).set_index(["head", "side", "sender"])["score"]
    assert found.to_dict() == pytest.approx(expected.to_dict(), **CLOSE)


def test_half_precision_is_split_in_single_precision():
    half = load_model(tiny_hf("llama").bfloat16(), tokenizer(), device="cpu")
    exact = load_model(tiny_hf("llama").bfloat16().float(), tokenizer(), device="cpu")
    task = task_of(exact)
    found, table = (
        why_attends(model, task.val, "a1.h1", prompt=0).set_index(["side", "sender"])["score"]
        for model in (half, exact)
    )
    assert found[table.index].tolist() == pytest.approx(table.tolist(), abs=0.02 * table.abs().max())
    pattern = attention_pattern(half, task.val, "a1.h1", prompt=0)
    why_attends(half, task.val, "a1.h1", prompt=0)
    assert attention_pattern(half, task.val, "a1.h1", prompt=0).equals(pattern)  # rotary tables are as they were


# --- by hand ---


def test_by_hand_the_token_makes_the_query_and_the_previous_token_head_the_key():
    """Induction: END's letter asks (`input`), what a0.h1 brought from the token before answers; their product is 6."""
    made = induction()
    task, circuit = make_task(made.model, made.relation, n=8), Circuit.from_edges(made.model.graph, sorted(made.edges))
    for i, fact in enumerate(task.val.facts[:3]):
        letters = fact.subject.split()
        where = {"prompt": i, "to": letters.index(letters[-1]) + 2}  # the full stop is at 0
        whole, alone = (why_attends(made.model, task, "a1.h3", circuit=one, **where) for one in (None, circuit))
        for side, maker in (("q", "input"), ("k", "a0.h1")):
            assert whole[whole["side"] == side]["sender"].iloc[0] == maker  # beside distractors
            scores = alone[alone["side"] == side].set_index("sender")["score"]
            assert scores[maker] == pytest.approx(6, abs=0.5)
            assert scores.drop(maker).abs().max() < 1e-5
        pairs = attending_pairs(made.model, task, "a1.h3", circuit=circuit, **where)
        assert pairs.loc["input", "a0.h1"] == pytest.approx(6, abs=0.5)
        assert pairs.abs().sum().sum() == pytest.approx(pairs.loc["input", "a0.h1"], rel=1e-4)


def test_all_heads_of_a_circuit_are_those_that_it_has(llama):
    circuit = Circuit.from_edges(llama.graph, ["input->a0.h1<v>", "a0.h1->a1.h2<k>", "a1.h2->logits"])
    table = why_attends(llama, task_of(llama), circuit=circuit)
    assert list(dict.fromkeys(table["head"])) == ["a0.h1", "a1.h2"]


# --- refused ---


def test_what_cannot_be_split_is_refused_in_one_line(llama, tiny):
    task = task_of(llama)
    with pytest.raises(CircuitError, match="'m0' is not an attention head"):
        why_attends(llama, task, "m0")
    with pytest.raises(DataError, match="comes after the query"):
        why_attends(llama, task, "a1.h1", at="first", to="end")
    with pytest.raises(SettingError, match="position 50 is not in all prompts"):
        why_attends(llama, task, "a1.h1", to=50)
    with pytest.raises(SettingError, match="why_attends: to='object' is not"):
        why_attends(llama, task, "a1.h1", to="object")
    with pytest.raises(SettingError, match="prompt=9: there are 4"):
        why_attends(llama, task, "a1.h1", prompt=9)
    far = make_task(tiny("mistral-window"), known_relation(tiny("mistral-window"), 6, "w1 {} w2 w3 w4 w5"), n=3)
    with pytest.raises(DataError, match=r"the window of a1.h1 keeps it out"):
        why_attends(tiny("mistral-window"), far, "a1.h1")


def test_heads_that_never_see_the_key_are_left_out_of_many(tiny):
    model = tiny("gpt-neo")  # a window of three tokens in the second layer
    task = make_task(model, known_relation(model, 6, "w1 {} w2 w3 w4 w5"), n=3)
    assert set(why_attends(model, task)["head"].str[:2]) == {"a0"}


def test_biases_are_all_that_comes_from_no_node(tiny):
    """Without any bias there is nothing left over; with them there is."""
    for name, there in (("llama", False), ("opt", True), ("gpt2", True)):
        table = why_attends(tiny(name), task_of(tiny(name)), "a1.h1")
        assert (table[table["sender"] == BIASES]["score"].abs().max() > 1e-6) == there


@pytest.mark.model
def test_on_the_builtin_model(smollm2):
    """Nine query heads that share three keys each, thirty layers deep."""
    task = make_task(smollm2, "country_capital", n=2)
    prompts = task.val.select([0])
    end, subject = int(prompts.ends), int(prompts.subject_stop) - 1
    x = forward(smollm2.network, prompts.tokens, receivers=True).receivers[20][0][:1]
    expected = float(whole_scores(smollm2.network, 20, 3, x, x)[end, subject])
    found = sums(why_attends(smollm2, task, "a20.h3", prompt=0))
    assert found == pytest.approx({"q": expected, "k": expected}, abs=2e-3)
