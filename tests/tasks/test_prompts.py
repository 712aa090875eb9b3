"""A relation becomes a task: split, tokens, spans, answers, foils and partners, each against one prompt at a time."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kcwb.errors import DataError, KcwbError, SettingError
from kcwb.models.loading import load_model
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.ranks import rank_of
from kcwb.tasks.relations import Fact
from kcwb.tasks.task import make_task
from tests.tasks import (
    TEMPLATE,
    answer_ids,
    known_relation,
    prompt_ids,
    relation_of,
    unpadded_logits,
    unpadded_tokens,
)
from tests.tiny import WORDS, tiny_hf, tokenizer

TEMPLATES = [
    TEMPLATE,
    "{} w2 w3",
    "w1 w2 {}",
    "w1 ({}) w2",  # tokens that touch the subject are not part of it
    "w10 {} w10",  # the first fact's subject is there before
]


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture(scope="module")
def bos_model():
    return load_model(tiny_hf("llama"), tokenizer(), device="cpu", prepend_bos=True)


def all_prompts(model, relation, template=TEMPLATE, **more) -> Prompts:
    return encode(model, relation.facts, template, relation.objects, **more)


def slow_rank(model, fact, template=TEMPLATE) -> int:
    """How many tokens are at least as likely as the answer's first."""
    first = unpadded_logits(model, fact, template)[0].tolist()
    return sum(value >= first[answer_ids(model, fact)[0]] for value in first)


def same(a: Prompts, b: Prompts) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(Prompts)]
    return all(x.equal(y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


# The split


@pytest.mark.parametrize("n", [1, 3, 6, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_by_subject_and_one_to_one(model, n, seed):
    task = make_task(model, known_relation(model, 12, unknown=3), n=n, seed=seed)
    val, test = ({fact.subject for fact in part.facts} for part in (task.val, task.test))
    assert not val & test
    assert len(val) == len(test) == len(task.val) == len(task.test) == min(n, 6)


def test_all_of_val_is_known_and_test_is_not_chosen_by_what_is_known(model):
    relation = known_relation(model, 12, unknown=6)
    known = {fact for fact in relation.facts if slow_rank(model, fact) <= 10}
    task = make_task(model, relation, n=6)
    assert len(known) == 6 == task.n_known and task.n_facts == 12
    assert set(task.val.facts) == known
    assert set(task.test.facts) == set(relation.facts) - known
    assert not task.test.known.any()


@pytest.mark.parametrize(
    ("n_facts", "unknown", "n", "n_val", "n_test"),
    [(12, 0, 4, 4, 4), (12, 0, 99, 6, 6), (13, 0, 99, 6, 6), (12, 10, 6, 2, 2), (3, 0, 9, 1, 1), (1, 0, 3, 1, 0)],
)
def test_n_is_limited_to_half_of_the_facts_and_to_the_known_ones(model, n_facts, unknown, n, n_val, n_test):
    task = make_task(model, known_relation(model, n_facts, unknown=unknown), n=n)
    assert (len(task.val), len(task.test)) == (n_val, n_test)


def test_a_seed_gives_the_same_task_and_another_seed_another(model):
    relation = known_relation(model, 16)
    one, again = make_task(model, relation, n=5, seed=7), make_task(model, relation, n=5, seed=7)
    for part in ("val", "test", "reference"):
        assert same(getattr(one, part), getattr(again, part))
    others = [make_task(model, relation, n=5, seed=seed) for seed in range(6)]
    assert len({other.val.facts for other in others}) > 3
    assert len({other.test.facts for other in others}) > 3
    assert len({tuple(other.reference.foils.tolist()) for other in others}) > 3
    assert len({tuple(other.reference.corrupted.flatten().tolist()) for other in others}) > 3


def test_the_reference_holds_val_and_at_most_32_of_the_other_facts(model):
    relation = known_relation(model, 80)
    task = make_task(model, relation, n=8)
    assert len(task.reference) == len(set(task.reference.facts)) == 32
    assert set(task.val.facts) <= set(task.reference.facts) <= set(relation.facts)
    small = make_task(model, known_relation(model, 9), n=3)
    assert set(small.reference.facts) == set(small.relation.facts)


# Tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "mistral-window"])
def test_right_padding_gives_the_logits_of_unpadded_prompts(tiny, name):
    model = tiny(name)
    prompts = all_prompts(model, known_relation(model))
    assert len(set(prompts.lengths.tolist())) == 3
    padded = model.logits(prompts.tokens)
    for n, fact in enumerate(prompts.facts):
        expected = unpadded_logits(model, fact)
        at = prompts.positions[n][prompts.answer_mask[n]]
        torch.testing.assert_close(padded[n, at], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("bos", [False, True])
def test_tokens_are_the_prompt_and_then_all_of_the_answer_but_its_last(model, bos_model, template, bos):
    model = bos_model if bos else model
    prompts = all_prompts(model, known_relation(model, template=template), template)
    for n, fact in enumerate(prompts.facts):
        expected = unpadded_tokens(model, fact, template)
        assert prompts.texts[n] == template.replace("{}", fact.subject)
        assert prompts.tokens[n, : len(expected)].tolist() == expected
        assert int(prompts.lengths[n]) == len(prompt_ids(model, prompts.texts[n]))
        assert (int(prompts.tokens[n, 0]) == WORDS.index("<bos>")) == bos
    assert prompts.tokens.shape[1] == max(len(unpadded_tokens(model, fact, template)) for fact in prompts.facts)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("bos", [False, True])
def test_spans_decode_to_the_subject(model, bos_model, template, bos):
    model = bos_model if bos else model
    prompts = all_prompts(model, known_relation(model, template=template), template)
    before = len(template[: template.index("{}")].split()) + bos
    for n, fact in enumerate(prompts.facts):
        start, stop = int(prompts.subject_start[n]), int(prompts.subject_stop[n])
        assert model.tokenizer.decode(prompts.tokens[n, start:stop]) == fact.subject
        assert start == before and stop <= prompts.lengths[n]


def test_a_subject_with_braces_is_taken_as_it_is(model):
    prompts = all_prompts(model, relation_of([Fact("w5{}w6", "w3"), Fact("w7", "w4")]))
    assert prompts.texts[0] == "w1 w5{}w6 w2"
    assert (prompts.subject_start[0], prompts.subject_stop[0]) == (1, 4)  # w5, {}, w6


def test_answers_are_all_of_the_objects_tokens_and_each_is_predicted_one_before_it(model):
    facts = [Fact("w10", "w20"), Fact("w11 w12", "w21 w22"), Fact("w13", "w23 w24 w25")]
    prompts = all_prompts(model, relation_of(facts))
    ids = {word: i for i, word in enumerate(WORDS)}
    assert prompts.answer_mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert prompts.answers[prompts.answer_mask].tolist() == [ids[f"w{i}"] for i in (20, 21, 22, 23, 24, 25)]
    assert prompts.ends.tolist() == [2, 3, 2]
    assert prompts.positions.tolist() == [[2, 2, 2], [3, 4, 3], [2, 3, 4]]
    for n in range(3):  # teacher forcing: what stands behind a predicting position is what is to be predicted
        for i, at in enumerate(prompts.positions[n, : int(prompts.answer_mask[n].sum()) - 1].tolist()):
            assert prompts.tokens[n, at + 1] == prompts.answers[n, i]


def test_ranks_count_the_tokens_that_are_at_least_as_likely(model):
    prompts = all_prompts(model, known_relation(model, 12, unknown=4))
    assert prompts.ranks.tolist() == [slow_rank(model, fact) for fact in prompts.facts]
    assert prompts.known.tolist() == [rank <= 10 for rank in prompts.ranks.tolist()]


def test_ties_count_against_a_token():
    assert rank_of(torch.zeros(7), torch.tensor(3)) == 7
    assert rank_of(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), torch.tensor([2])).tolist() == [2]
    assert rank_of(torch.tensor([1.0, 2.0, 2.5, 0.0]), torch.tensor(2)) == 1


@pytest.mark.parametrize("logits", [[torch.nan] * 20, [0.0] + [torch.nan] * 19])
def test_a_token_whose_logits_are_not_numbers_is_not_known(logits):
    assert rank_of(torch.tensor(logits), torch.tensor(0)) > 10


# Foils


def test_foils_are_first_tokens_of_other_objects_that_start_otherwise(model):
    relation = known_relation(model)
    first = {answer_ids(model, fact)[0] for fact in relation.facts}
    for seed in range(5):
        prompts = all_prompts(model, relation, seed=seed)
        assert (prompts.foils != prompts.answers[:, 0]).all()
        assert set(prompts.foils.tolist()) <= first


def test_a_relation_whose_objects_start_alike_has_no_foils(model):
    prompts = all_prompts(model, relation_of([Fact("w1", "w9 w2"), Fact("w2", "w9 w3"), Fact("w3", "w9")]))
    assert prompts.foils.tolist() == [-1, -1, -1]


def test_a_named_foil_is_everybodys(model):
    relation = known_relation(model)
    assert not any(fact.object.split()[0] == "w89" for fact in relation.facts)
    task = make_task(model, relation, foil="w89 w1")
    assert set(task.reference.foils.tolist()) == {WORDS.index("w89")}


@pytest.mark.parametrize("foil", ["w21 w22", "w21", "w21 w5"])
def test_a_named_foil_that_starts_as_an_answer_is_an_error_with_both(model, foil):
    relation = relation_of([Fact("w10", "w20"), Fact("w11", "w21 w22")])
    with pytest.raises(DataError, match=rf"foil '{foil}'.*answer 'w21 w22' of 'w11'"):
        all_prompts(model, relation, foil=foil)


# Partners


def test_partners_have_as_many_tokens_and_an_answer_that_starts_otherwise(model):
    facts = (*known_relation(model).facts, Fact("w1 w2 w3 w4", "w5"), Fact("w6 w7 w8 w9 w10", "w5 w6"))
    relation = relation_of(facts)
    for seed in range(5):
        prompts = all_prompts(model, relation, seed=seed)
        for n, fact in enumerate(facts):
            prompt = prompt_ids(model, TEMPLATE.replace("{}", fact.subject))
            partners = [
                other_prompt
                for other in facts
                if len(other_prompt := prompt_ids(model, TEMPLATE.replace("{}", other.subject))) == len(prompt)
                and answer_ids(model, other)[0] != answer_ids(model, fact)[0]
            ]
            assert bool(prompts.paired[n]) == bool(partners)
            found = prompts.corrupted[n].tolist()
            assert found[: len(prompt)] in (partners or [prompt])
            assert found[len(prompt) :] == prompts.tokens[n, len(prompt) :].tolist()  # the same answer is forced
        assert not prompts.paired[-2:].any()


# Parts


@pytest.mark.parametrize("rows", [[0], [3, 1], [0, 1, 2, 3, 4, 5], [2, 2], range(4, 6), []])
def test_select_keeps_rows_and_trims_padding(model, rows):
    prompts = all_prompts(model, known_relation(model, 6))
    part = prompts.select(rows)
    assert len(part) == len(rows) and part.tokens.shape == part.corrupted.shape
    for i, row in enumerate(rows):
        for field in fields(Prompts):
            whole, some = getattr(prompts, field.name)[row], getattr(part, field.name)[i]
            if isinstance(whole, torch.Tensor) and whole.ndim:
                kept, trimmed = whole[: len(some)], whole[len(some) :]
                assert some.equal(kept)
                assert not trimmed.any()  # padding is 0 in all of them
            else:
                assert some == whole
    if rows:
        assert part.tokens.shape[1] == max(len(unpadded_tokens(model, fact)) for fact in part.facts)
        assert part.answers.shape[1] == max(len(answer_ids(model, fact)) for fact in part.facts)


# What is refused


def test_a_prompt_that_fills_the_context_is_taken_and_one_token_more_is_an_error(model):
    context = model.network.n_ctx
    facts = [Fact("w10", "w20 w21"), Fact("w11", "w22")]
    fits = " ".join(["{}", *["w1"] * (context - 2)])  # the answer's first token is read as well
    assert all_prompts(model, relation_of(facts), fits).tokens.shape[1] == context
    with pytest.raises(DataError, match=rf"has {context + 1} tokens.* reads {context}\b"):
        all_prompts(model, relation_of(facts), fits + " w1")


def test_no_known_facts_is_an_error_with_how_many_were_tried_and_the_best_rank(model):
    relation = known_relation(model, 7, unknown=7)
    best = min(slow_rank(model, fact) for fact in relation.facts)
    assert best > 10
    with pytest.raises(DataError, match=rf"none of the 7 facts of tiny.*best rank is {best}\b"):
        make_task(model, relation)


@pytest.mark.parametrize("template", [1, -1, 99])
def test_a_template_that_is_not_there_is_an_error_with_those_that_are(model, template):
    with pytest.raises(SettingError, match=rf"template={template}: tiny has 1 zero-shot templates, 0 to 0"):
        make_task(model, known_relation(model), template=template)


@pytest.mark.parametrize("template", ["w1 w2", "{} {}", "{} ", "", "{} w1\n"])
def test_a_malformed_template_is_an_error(model, template):
    with pytest.raises(DataError, match="template"):
        make_task(model, known_relation(model), template=template)


@pytest.mark.parametrize("n_test", [0, 1, 3, 99])
def test_d_test_can_have_a_size_of_its_own(model, n_test):
    relation = known_relation(model)
    plain, sized = make_task(model, relation, n=2), make_task(model, relation, n=2, n_test=n_test)
    assert same(plain.val, sized.val) and same(plain.reference, sized.reference)
    assert len(sized.test) == min(n_test, len(relation.facts) - len(sized.val))
    assert not set(sized.test.facts) & set(sized.val.facts)


def test_a_negative_size_of_d_test_is_an_error(model):
    with pytest.raises(SettingError, match="n_test=-1"):
        make_task(model, known_relation(model), n_test=-1)


@pytest.mark.parametrize("n", [0, -3])
def test_n_below_one_is_an_error(model, n):
    with pytest.raises(SettingError, match=f"n={n}"):
        make_task(model, known_relation(model), n=n)


def test_a_relation_may_be_given_by_path_and_an_unknown_name_suggests(model, tmp_path):
    relation = known_relation(model)
    relation.save(tmp_path / "own.json")
    assert make_task(model, str(tmp_path / "own.json")).relation == relation
    with pytest.raises(DataError, match="country_capital"):
        make_task(model, "country_capitel")


@pytest.mark.parametrize(
    "change",
    [
        {"facts": ()},
        {"facts": (Fact("w10", "w20"), Fact("w10", "w21"))},
        {"facts": (Fact("", "w20"), Fact("w11", "w21"))},
        {"facts": (Fact("w10", ""), Fact("w11", "w21"))},
        {"prompt_templates_zs": ()},
        {"prompt_templates_zs": ("w1 w2",)},
        {"prompt_templates_zs": ("{} {}",)},
    ],
    ids=["no facts", "two objects of a subject", "empty subject", "empty object", "no templates", "no {}", "{} twice"],
)
def test_a_malformed_relation_made_in_memory_is_an_error_of_ours(model, change):
    with pytest.raises(KcwbError):
        make_task(model, replace(known_relation(model), **change))


def test_an_answer_that_merges_into_its_prompt_is_an_error_with_both():
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))  # splits nowhere
    merging = load_model(
        tiny_hf("llama"), PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>"), device="cpu"
    )
    with pytest.raises(DataError, match="answer 'w3' runs into the last token of 'w1 w10 w2'"):
        encode(merging, [Fact("w10", "w3")], TEMPLATE, ["w3"])


def test_a_prompt_of_the_same_tokens_is_no_partner(model):
    """Two unknown words are one token: what is asked of both is the same prompt, which corrupts nothing."""
    same = [Fact("x1", "w40"), Fact("x2", "w41")]
    assert not all_prompts(model, relation_of(same)).paired.any()
    prompts = all_prompts(model, relation_of([*same, Fact("w5", "w42")]), seed=3)
    for n in range(3):
        assert bool(prompts.paired[n]) and prompts.corrupted[n].tolist() != prompts.tokens[n].tolist()
    given = relation_of([replace(fact, corrupted="x9") for fact in same])
    assert not all_prompts(model, given).paired.any()
