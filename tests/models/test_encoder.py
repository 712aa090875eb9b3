"""Encoders: node ablation equals the same change made in the weights; edges are refused, and why."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import transformers as T
from tokenizers.normalizers import Lowercase

from kcwb.errors import DataError, ModelError, SettingError
from kcwb.interventions.encoder import _ablated, _mean_nodes, ablate_encoder
from kcwb.models.encoder import Encoder, load_encoder, record_nodes, run_encoder
from kcwb.models.loading import load_model
from kcwb.tasks.masked import at_masks, make_masked_task
from kcwb.tasks.relations import Fact, Relation
from tests.tasks import spaced_tokenizer
from tests.tiny import ENCODERS, tiny_encoder, tiny_hf, tokenizer

_MADE: dict[str, Encoder] = {}


@pytest.fixture(params=ENCODERS)
def encoder(request) -> Encoder:
    if request.param not in _MADE:
        _MADE[request.param] = tiny_encoder(request.param)
    return _MADE[request.param]


@pytest.fixture
def bert() -> Encoder:
    if "bert" not in _MADE:
        _MADE["bert"] = tiny_encoder("bert")
    return _MADE["bert"]


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of five, seven and four tokens, padded."""
    tokens = torch.randint(4, 80, (3, 7))
    real = torch.arange(7)[None] < torch.tensor([5, 7, 4])[:, None]
    return tokens * real, real


def without(encoder: Encoder, node: str) -> T.PreTrainedModel:
    """The model with weights of zero where a node is added."""
    module = tiny_hf(encoder.module.config.model_type)
    layer, _, head = node[1:].partition(".h")
    block = module.base_model.encoder.layer[int(layer)]
    with torch.no_grad():
        if head:
            width = 32 // encoder.n_heads
            block.attention.output.dense.weight[:, int(head) * width : (int(head) + 1) * width] = 0
        else:
            block.output.dense.weight.zero_()
            block.output.dense.bias.zero_()
    return module


def test_untouched_it_is_the_hugging_face_model_and_padding_changes_nothing(encoder) -> None:
    tokens, real = some_tokens()
    ours = run_encoder(encoder, tokens, real)
    alone = tiny_hf(encoder.module.config.model_type)
    for row, length in enumerate(real.sum(1).tolist()):
        torch.testing.assert_close(ours[row, :length], alone(tokens[row : row + 1, :length]).logits[0])


@pytest.mark.parametrize("node", ["a0.h0", "a1.h3", "m0", "m1"])
def test_zero_ablation_equals_zero_weights(encoder, node: str) -> None:
    tokens, real = some_tokens()
    ours = run_encoder(encoder, tokens, real, {node: 0.0})
    theirs = without(encoder, node)(input_ids=tokens, attention_mask=real.long()).logits
    torch.testing.assert_close(ours[real], theirs[real])
    assert not torch.allclose(ours[real], run_encoder(encoder, tokens, real)[real])


def test_what_nodes_compute_put_back_changes_nothing_and_hooks_are_gone(encoder) -> None:
    tokens, real = some_tokens()
    before = run_encoder(encoder, tokens, real)
    own = record_nodes(encoder, tokens, real)
    assert tuple(own) == encoder.nodes
    assert torch.equal(run_encoder(encoder, tokens, real, own), before)
    assert torch.equal(run_encoder(encoder, tokens, real), before)
    with pytest.raises(SettingError, match=r"'a0\.h9' is not known.*'a0\.h3'"):
        run_encoder(encoder, tokens, real, {"a0.h9": 0.0})


def test_a_task_asks_at_the_mask_and_leaves_longer_objects_out(bert, words: Relation) -> None:
    task = make_masked_task(bert, words, n=4, template=0)
    assert task.n_left_out == 6 and task.n_facts == 18  # every fourth object has two words
    assert 1 <= len(task.val) <= 4 and len(task.test) == len(task.val)
    assert not set(task.val.facts) & set(task.test.facts)
    prompts = task.val
    assert bool((prompts.tokens.gather(1, prompts.masks[:, None])[:, 0] == bert.tokenizer.mask_token_id).all())
    logits = at_masks(run_encoder(bert, prompts.tokens, prompts.real), prompts.masks)
    own = logits.gather(1, prompts.answers[:, None])
    assert torch.equal((logits >= own).sum(1), prompts.ranks) and bool((prompts.ranks <= 10).all())
    for fact, answer, text in zip(prompts.facts, prompts.answers.tolist(), prompts.texts, strict=True):
        assert bert.tokenizer.decode(answer) == fact.object and fact.subject in text


def test_objects_that_are_one_token_together_are_left_out(words: Relation) -> None:
    """An uncased tokenizer does not tell w41 from W41."""
    uncased = tokenizer()
    uncased.mask_token = "w89"
    uncased.backend_tokenizer.normalizer = Lowercase()
    encoder = load_encoder(tiny_hf("bert"), uncased, device="cpu")
    facts = tuple(replace(fact, object=fact.object.upper()) if i == 2 else fact for i, fact in enumerate(words.facts))
    facts = tuple(replace(fact, object="w42") if i == 3 else fact for i, fact in enumerate(facts))
    task = make_masked_task(encoder, replace(words, facts=facts), n=12, template=0)
    assert facts[2].object == "W42" and task.n_facts == 16 and task.n_left_out == 8
    assert not {facts[2], facts[3]} & {*task.val.facts, *task.test.facts, *task.reference.facts}


def by_hand(encoder: Encoder, node: str, prompts) -> torch.Tensor:
    """The answers' losses with a node ablated to zero, one prompt at a time and without padding."""
    module, losses = without(encoder, node), []
    for row, length in enumerate(prompts.real.sum(1).tolist()):
        logits = module(prompts.tokens[row : row + 1, :length]).logits[0, prompts.masks[row]]
        losses.append(-logits.log_softmax(-1)[prompts.answers[row]])
    return torch.stack(losses)


def test_the_table_of_zero_ablations_is_what_each_edited_model_says(bert, words: Relation) -> None:
    task = make_masked_task(bert, words, n=3)
    table = ablate_encoder(bert, task, ablation="zero", progress=False)
    assert table.groupby("split", sort=False)["node"].apply(tuple).to_dict() == {
        split: ("none", *bert.nodes) for split in ("D_val", "D_test")
    }
    for split, prompts in (("D_val", task.val), ("D_test", task.test)):
        rows = table[table["split"] == split].set_index("node")
        for node in ("a0.h1", "a1.h2", "m0"):
            expected = float(by_hand(bert, node, prompts).mean())
            assert rows.loc[node, "nll"] == pytest.approx(expected, abs=1e-5)
            assert rows.loc[node, "change"] == pytest.approx(expected - rows.loc["none", "nll"], abs=1e-5)
    assert table.loc[table["node"] == "none", "change"].eq(0).all()
    assert set(table["kind"]) == {"none", "head", "mlp"} and table["change"].abs().max() > 0.01


def test_all_right_answers_of_a_mask_are_right(bert, words: Relation) -> None:
    single = [fact for fact in words.facts if " " not in fact.object]
    facts = tuple(replace(fact, also=(f"w{70 + i % 9}", "w60 w61", "nobody")) for i, fact in enumerate(single))
    task = make_masked_task(bert, replace(words, facts=facts), n=6)
    prompts = task.val
    logits = at_masks(run_encoder(bert, prompts.tokens, prompts.real), prompts.masks)
    losses, hits = [], 0
    for fact, values, rank in zip(prompts.facts, logits.tolist(), prompts.ranks.tolist(), strict=True):
        right = set(bert.tokenizer.convert_tokens_to_ids(fact.right[:2]))
        best = max(values[token] for token in right)
        assert rank == 1 + sum(value >= best for token, value in enumerate(values) if token not in right)
        losses.append(-math.log(sum(torch.tensor(values).softmax(-1)[token].item() for token in right)))
        hits += rank <= 3
    none = ablate_encoder(bert, task, ablation="zero", k=3, progress=False).iloc[0]
    assert none["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5) and none["hit"] == hits / len(losses)


def test_a_mask_follows_its_prompt_as_the_answer_would() -> None:
    words = spaced_tokenizer()
    words.add_special_tokens({"mask_token": "[M]"})
    encoder = load_encoder(tiny_hf("bert"), words, device="cpu")
    facts = tuple(Fact(f"w{i}", f"w{20 + i}", space=False) for i in range(9))
    relation = Relation("r", "factual", "", "", False, ("{} w1",), ("{} w1",), facts)
    prompts = make_masked_task(encoder, relation, n=4, ending="\n").val
    named = [words.convert_ids_to_tokens(one) for one in prompts.answers.tolist()]
    assert named == [fact.object for fact in prompts.facts]


def test_the_mean_is_over_the_same_place_counted_from_the_mask(bert, words: Relation) -> None:
    task = make_masked_task(bert, words, n=3, template=1)
    only = replace(task, reference=task.val.select([0]), val=task.val.select([0]), test=task.val.select([]))
    table = ablate_encoder(bert, only, ablation="mean", progress=False)
    assert table["change"].abs().max() < 1e-5  # the mean over itself is itself
    other = ablate_encoder(bert, replace(only, reference=task.reference), ablation="mean", progress=False)
    assert other["change"].abs().max() > 1e-3


def test_the_mean_keeps_position_0_apart_and_rare_places_take_the_nearest(bert, monkeypatch) -> None:
    monkeypatch.setattr("kcwb.tasks.prompts.KNOWN_RANK", 100)
    subjects = ["w10", "w11", "w12", "w13 w3", "w14 w3", "w15 w3", "w16 w3 w5", "w17 w3 w5 w6 w7"]
    relation = Relation("r", "factual", "", "", False, ("{} w1",), ("{} w1",), tuple(Fact(s, "w40") for s in subjects))
    task = make_masked_task(bert, relation, n=4)
    prompts, at = task.reference, defaultdict(list)
    every = record_nodes(bert, prompts.tokens, prompts.real)
    for n, (mask, real) in enumerate(zip(prompts.masks.tolist(), prompts.real.tolist(), strict=True)):
        for position in range(sum(real)):
            at["first" if position == 0 else position - mask].append(every["m0"][n, position])
    enough = [place for place in at if place != "first" and len(at[place]) >= 3]
    assert len(enough) < len(at) - 1
    found = _ablated(bert, prompts, "mean", _mean_nodes(bert, prompts))["m0"]
    for n, (mask, real) in enumerate(zip(prompts.masks.tolist(), prompts.real.tolist(), strict=True)):
        for position in range(sum(real)):
            place = "first" if position == 0 else min(enough, key=lambda o, at=position - mask: abs(o - at))
            torch.testing.assert_close(found[n, position], torch.stack(at[place]).mean(0))


def test_resample_takes_the_partners_values(bert, words: Relation) -> None:
    task = make_masked_task(bert, words, n=4)
    prompts = task.val.select(task.val.paired.nonzero()[:, 0].tolist())
    table = ablate_encoder(bert, task, ablation="resample", progress=False)
    theirs = record_nodes(bert, prompts.corrupted, prompts.real)["m0"]
    logits = at_masks(run_encoder(bert, prompts.tokens, prompts.real, {"m0": theirs}), prompts.masks)
    expected = torch.nn.functional.cross_entropy(logits, prompts.answers)
    row = table[(table["node"] == "m0") & (table["split"] == "D_val")].iloc[0]
    assert (row["n"], row["nll"]) == (len(prompts), pytest.approx(float(expected), abs=1e-5))
    answers = dict(zip(map(tuple, task.reference.tokens.tolist()), task.reference.answers.tolist(), strict=True))
    for row_, answer in zip(prompts.corrupted.tolist(), prompts.answers.tolist(), strict=True):
        assert answers.get(tuple(row_), -1) != answer


# bad input


def test_edges_of_an_encoder_are_refused_with_the_reason_and_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"BERT.*norm after each sum.*edges.*not defined.*load_encoder"):
        load_model(tiny_hf("bert"), tokenizer())


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'gpt2' is no encoder.*BERT.*load_model"):
        load_encoder(tiny_hf("gpt2"), tokenizer())
    with pytest.raises(ModelError, match="no mask token"):
        load_encoder(tiny_hf("bert"), tokenizer())
    with pytest.raises(SettingError, match="needs its tokenizer"):
        load_encoder(tiny_hf("bert"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder("no/such/encoder")


def test_tasks_and_settings_that_make_no_sense_are_refused(bert, words: Relation) -> None:
    task = make_masked_task(bert, words, n=2)
    with pytest.raises(SettingError, match=r"'zeros'.*'zero'"):
        ablate_encoder(bert, task, ablation="zeros", progress=False)
    with pytest.raises(SettingError, match="k=0"):
        ablate_encoder(bert, task, k=0, progress=False)
    with pytest.raises(SettingError, match="was made for"):
        ablate_encoder(bert, replace(task, model_digest="0" * 64), progress=False)
    with pytest.raises(SettingError, match="n=0"):
        make_masked_task(bert, words, n=0)
    longer = replace(words, facts=(Fact("w1", "w2 w3"), Fact("w4", "w5 w6")))
    with pytest.raises(DataError, match="one token"):
        make_masked_task(bert, longer)
    with pytest.raises(DataError, match="2 mask tokens"):
        make_masked_task(bert, words, template="w89 {} w1")
