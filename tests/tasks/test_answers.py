"""Several right and wrong answers, corrupted prompts and spans of a fact's own, each against one prompt at a time."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from kcwb.circuits.ablation import make_ablation
from kcwb.discovery.acdc import Search
from kcwb.discovery.checkpoint import fingerprint
from kcwb.errors import DataError
from kcwb.tasks.metrics import answer_ranks, make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.ranks import NEVER, rank_of, rank_of_best
from kcwb.tasks.relations import Fact, Relation, load_relation
from kcwb.tasks.task import make_task
from kcwb.tasks.variants import with_other_partners, with_shuffled_answers
from tests.tiny import WORDS

# Prompts of 3 to 5 words: one answer and one wrong; several of both; two tokens, of which the last decides; none wrong.
FACTS = (
    Fact("w1 w2 w3", "w40", wrong=("w41",), corrupted="w1 w9 w3", span=(3, 5)),
    Fact("w4 w5 w6 w7", "w42", also=("w43", "w44"), wrong=("w45", "w46"), corrupted="w4 w5 w8 w9", span=(0, 5)),
    Fact("w7 w8 w9 w10 w11", "w50 w51", also=("w50 w52",), wrong=("w50 w53", "w50 w54 w2", "w55"), span=(6, 8)),
    Fact("w12 w13 w14", "w47", also=("w48",), corrupted="w12 w13", span=(0, 0)),
    Fact("w15 w16 w17", "w49", wrong=("w40 w3", "w41"), span=(0, 0)),
    Fact("w18 w19 w17", "w56", span=(0, 0)),
)


def id_of(word: str) -> int:
    return WORDS.index(word)


def relation(facts=FACTS) -> Relation:
    return Relation("own", "own prompts", "prompt", "answer", False, ("{}",), ("{}",), tuple(facts))


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def prompts(model):
    return encode(model, FACTS, "{}", relation().objects, seed=1)


def logits_of(model, fact: Fact) -> torch.Tensor:
    """`[A, V]`, of one prompt alone."""
    words = [*fact.subject.split(), *fact.object.split()[:-1]]
    tokens = torch.tensor([[*([1] if model.prepend_bos else []), *map(id_of, words)]])
    return model.logits(tokens)[0, -len(fact.object.split()) :].float()


def run(model, prompts) -> torch.Tensor:
    rows = torch.arange(len(prompts))[:, None]
    return model.logits(prompts.tokens)[rows, prompts.positions]


def test_nll_is_minus_the_logarithm_of_the_summed_probability_of_right_answers(model, prompts):
    found = make_loss(model, prompts, "nll").per_prompt(run(model, prompts))
    for fact, loss in zip(FACTS, found.tolist(), strict=True):
        logits = logits_of(model, fact)
        words = fact.object.split()
        before = math.prod(float(logits[i].softmax(-1)[id_of(word)]) for i, word in enumerate(words[:-1]))
        total = sum(before * float(logits[-1].softmax(-1)[id_of(name.split()[-1])]) for name in fact.right)
        assert loss == pytest.approx(-math.log(total) / len(words), abs=1e-5)


def test_logit_diff_is_of_the_token_that_decides_and_sums_right_and_wrong_answers(model, prompts):
    found = make_loss(model, prompts, "logit_diff").per_prompt(run(model, prompts)).tolist()
    compared = {  # fact -> place of the answer, right words, wrong words
        0: (0, ["w40"], ["w41"]),
        1: (0, ["w42", "w43", "w44"], ["w45", "w46"]),
        2: (1, ["w51", "w52"], ["w53", "w54"]),  # w55 has begun otherwise
        4: (0, ["w49"], ["w40", "w41"]),
    }
    for i, (place, right, wrong) in compared.items():
        logits = logits_of(model, FACTS[i])[place]
        own, foil = (sum(math.exp(float(logits[id_of(word)])) for word in words) for words in (right, wrong))
        assert found[i] == pytest.approx(math.log(foil) - math.log(own), abs=1e-5)
    assert int(prompts.foils[3]) not in {id_of("w47"), id_of("w48")}  # drawn from other answers, but not a right one


def test_ranks_are_those_of_the_best_right_answer_which_the_others_do_not_count_against(model, prompts):
    ranks = answer_ranks(run(model, prompts), prompts)
    assert ranks.equal(prompts.ranks)
    for fact, rank, decides in zip(FACTS, ranks.tolist(), prompts.decides.tolist(), strict=True):
        logits, words, expected = logits_of(model, fact), fact.object.split(), 1
        for i in range(decides + 1):
            right = {id_of(name.split()[i]) for name in fact.right} if i + 1 == len(words) else {id_of(words[i])}
            best = max(float(logits[i, token]) for token in right)
            expected *= 1 + sum(float(x) >= best for token, x in enumerate(logits[i]) if token not in right)
        assert rank == expected


def test_an_answer_is_told_apart_from_its_own_wrong_ones_or_else_from_other_answers(prompts):
    assert prompts.decides.tolist() == [0, 0, 1, 0, 0, 0]
    assert prompts.compared.tolist() == [0, 0, 1, 0, 0, 0]


def test_other_rows_answers_do_not_matter_where_wrong_ones_are_given(model):
    begun = Fact("w20 w21", "w40", wrong=("w41",), span=(0, 0))  # all tokens of w40 begin "w40 w3"
    longer = Fact("w22 w23", "w40 w3", wrong=("w41",), span=(0, 0))
    assert encode(model, [begun, longer], "{}", ["w40", "w40 w3"]).decides.tolist() == [0, 0]
    plain = [replace(fact, wrong=()) for fact in (begun, longer)]
    assert encode(model, plain, "{}", ["w40", "w40 w3"]).decides.tolist() == [NEVER, 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_of_the_best_is_that_of_a_slow_count(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(6, (4, 9), generator=generator).float()
    tokens = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(4)])
    tokens[0, 1:] = -1
    for row, own, rank in zip(logits, tokens.tolist(), rank_of_best(logits, tokens).tolist(), strict=True):
        right = [token for token in own if token >= 0]
        best = max(float(row[token]) for token in right)
        assert rank == 1 + sum(float(x) >= best for token, x in enumerate(row) if token not in right)
    assert rank_of_best(logits, tokens[:, :1]).equal(rank_of(logits, tokens[:, 0]))
    assert rank_of_best(torch.full((1, 9), math.nan), torch.tensor([[1, 2]])).item() >= 8


def test_subjects_and_corrupted_prompts_are_where_the_fact_says(model, prompts):
    bos = int(model.prepend_bos)
    spans = [(start - bos, stop - bos) for start, stop in zip(prompts.subject_start, prompts.subject_stop, strict=True)]
    assert [tuple(map(int, span)) for span in spans[:3]] == [(1, 2), (0, 2), (2, 3)]
    assert prompts.subject_start[3:].tolist() == prompts.subject_stop[3:].tolist() == [0, 0, 0]
    corrupted = [row[bos:length] for row, length in zip(prompts.corrupted.tolist(), prompts.lengths, strict=True)]
    assert corrupted[0] == [id_of(word) for word in ("w1", "w9", "w3")]
    assert corrupted[1] == [id_of(word) for word in ("w4", "w5", "w8", "w9")]
    assert prompts.paired.tolist() == [True, True, False, False, True, True]  # 3 is given one that is too short
    assert corrupted[4] in [[id_of(word) for word in fact.subject.split()] for fact in FACTS]  # drawn


def test_right_answers_that_differ_before_their_last_token_are_refused(model):
    facts = [Fact("w1 w2", "w40 w41", also=("w42 w43",), span=(0, 0))]
    with pytest.raises(DataError, match=r"'w1 w2'.*'w40 w41' \(2 tokens\) and 'w42 w43' \(2\)"):
        encode(model, facts, "{}", ["w40 w41"])


def test_partners_do_not_share_a_right_answer(model):
    facts = [Fact(f"w{i} w2", f"w{40 + i}", also=("w60",) if i < 3 else (), span=(0, 0)) for i in range(4)]
    prompts = encode(model, facts, "{}", [fact.object for fact in facts])
    partners = [row.split() for row in ("w3 w2", "w3 w2", "w3 w2")]
    bos = int(model.prepend_bos)
    assert prompts.corrupted[:3, bos : bos + 2].tolist() == [[id_of(word) for word in row] for row in partners]


def test_a_relation_of_prompts_is_saved_and_read_again(tmp_path):
    made = relation((*FACTS, replace(FACTS[0], subject="w1 w2 w4", space=False)))
    made.save(tmp_path / "own.json")
    again = load_relation(tmp_path / "own.json")
    assert again == made and again.digest == made.digest and again.of_prompts


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('"span": [2, 90]', r"samples\[0\]\.span: The span \[2, 90\] is none of 'w1 w2'"),
        ('"span": [2]', r"samples\[0\]\.span: expected two whole numbers"),
        ('"wrong": "w3"', r"samples\[0\]\.wrong: expected a list"),
        ('"also": ["w3", ""]', r"samples\[0\]\.also\[1\]: expected a text that is not empty"),
        ('"corrupted": "w3 "', r"samples\[0\]\.corrupted: 'w3 ' ends in white space"),
        ('"space": 1', r"samples\[0\]\.space: expected true or false"),
    ],
)
def test_a_malformed_sample_is_an_error_with_its_place(tmp_path, more, words):
    text = relation().to_json().split('"samples"')[0]
    path = tmp_path / "own.json"
    path.write_text(f'{text}"samples": [{{"subject": "w1 w2", "object": "w3", {more}}}]}}', encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_relation(path)


def some_facts(n: int = 12) -> list[Fact]:
    """Prompts of one length with two right answers and two wrong ones each, and a corrupted prompt."""
    return [
        Fact(
            f"w{i} w{i + 1} w30", f"w{40 + i}", also=(f"w{60 + i}",), wrong=(f"w{41 + i}", f"w{61 + i}"),
            corrupted=f"w{i} w31 w30", span=(0, 2),
        )
        for i in range(1, n + 1)
    ]  # fmt: skip


@pytest.fixture
def task(model):
    made = make_task(model, relation(some_facts()), n=6, seed=1)
    known = encode(model, made.val.facts, "{}", made.relation.objects)
    return replace(made, val=replace(known, ranks=torch.ones_like(known.ranks)))


def test_prompts_keep_their_own_corrupted_one_when_others_are_drawn(task):
    assert with_other_partners(task, 7).val.corrupted.equal(task.val.corrupted)


def test_shuffled_answers_bring_all_their_right_and_wrong_ones(model, task):
    dealt = with_shuffled_answers(model, task, seed=2).val
    again = encode(model, dealt.facts, "{}", task.relation.objects)
    for name in ("tokens", "answers", "decides", "also", "foils", "more_foils", "compared", "ranks", "corrupted"):
        assert getattr(dealt, name).equal(getattr(again, name)), name
    assert all(not set(a.right) & set(b.right) for a, b in zip(dealt.facts, task.val.facts, strict=True))


def test_shuffled_answers_without_wrong_ones_are_compared_with_another_answer(model):
    """Never with what was wrong of the fact that they are dealt to."""
    facts = [replace(fact, wrong=fact.wrong if i % 2 else ()) for i, fact in enumerate(some_facts())]
    made = make_task(model, relation(facts), n=6, seed=1)
    task = replace(made, val=encode(model, facts, "{}", made.relation.objects))
    firsts = {id_of(fact.object) for fact in facts}
    for seed in range(5):
        dealt = with_shuffled_answers(model, task, seed).val
        for fact, foil in zip(dealt.facts, dealt.foils.tolist(), strict=True):
            wrong = {id_of(word) for word in fact.wrong} or firsts - {id_of(word) for word in fact.right}
            assert foil in wrong


def test_answers_that_have_too_much_in_common_are_not_shuffled(model):
    facts = [replace(fact, also=("w39",), wrong=()) for fact in some_facts()]
    task = make_task(model, relation(facts), n=6)
    with pytest.raises(DataError, match="more than half of them have a right answer of"):
        with_shuffled_answers(model, task, seed=0)


def test_a_search_is_another_one_when_only_further_answers_differ(model, task):
    cuts = make_ablation(model, task, "zero")
    other = replace(task.val, also=task.val.also + 1)
    made = [Search(model, make_loss(model, prompts, "nll"), cuts, tau=0.1) for prompts in (task.val, other)]
    assert fingerprint(made[0]) != fingerprint(made[1])


def test_corrupted_prompts_of_another_length_are_counted(model):
    facts = [replace(fact, corrupted=f"{fact.corrupted} w9") if i < 3 else fact for i, fact in enumerate(some_facts())]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_task(model, relation(facts), n=4)
    assert any("3 of 12 corrupted prompts" in str(one.message) for one in caught)
