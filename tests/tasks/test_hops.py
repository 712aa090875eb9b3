"""What a model answers of each chain, which filter loses how many, and the tasks of what is left."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from kcwb.errors import DataError, SettingError
from kcwb.models.loading import load_model
from kcwb.tasks.compose import Composition, compose
from kcwb.tasks.hops import ASKED, HOPS, ask_hops, funnel, make_hops
from kcwb.tasks.relations import Fact, Relation
from tests.tasks import prompt_ids, slow_rank, spaced_tokenizer
from tests.tiny import tiny_hf
from tests.twohop import two_hop_model


@pytest.fixture(scope="module")
def planted():
    return two_hop_model()


def word_chains() -> Composition:
    """Chains over the tiny tokenizer's words, with names of one and two tokens; a tiny random model knows none."""
    first = [Fact(f"w{i}" if i % 3 else f"w{i} w{i + 1}", f"w{30 + i % 5}") for i in range(15)]
    second = [Fact(f"w{30 + i}", f"w{50 + i}" if i % 2 else f"w{50 + i} w7") for i in range(5)]
    relations = [
        Relation(name, "factual", "word", "word", False, templates, templates, tuple(facts))
        for name, templates, facts in (
            ("one", ("w80 {} w81", "w82 {}"), first),
            ("two", ("w83 {} w84 w85", "{} w86"), second),
        )
    ]
    wordings = [("w70 {} w71", "w72 {} w73"), ("w74 {}", "{} w75 w76")]
    return compose(*relations, wordings=wordings)


def rank(model, text: str, answer: str) -> int:
    """The slow way: one unpadded prompt through Hugging Face, and count."""
    logits = model.logits(torch.tensor([prompt_ids(model, text)]))[0, -1]
    token = model.tokenizer(answer, add_special_tokens=False)["input_ids"][0]
    return sum(1 for other in logits.tolist() if other >= float(logits[token]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ranks_are_those_of_one_prompt_at_a_time(tiny, name):
    model, chains = tiny(name), word_chains()
    steps = []
    asked = ask_hops(model, chains, template=1, first_template=1, progress=lambda *step: steps.append(step[:2]))
    found = asked.ranks
    for row in found.itertuples(index=False):
        subject, bridge, answer = row[:3]
        assert list(row[3:]) == [
            rank(model, f"w82 {subject}", bridge),
            rank(model, f"w83 {bridge} w84 w85", answer),
            rank(model, f"w74 {subject} w75 w76", answer),
            rank(model, f"w83 {subject} w84 w85", answer),
            rank(model, "w74 w75 w76", answer),
        ]
    assert list(found.columns) == ["subject", "bridge", "object", *ASKED]
    assert steps[-1] == (15 + 5 + 15 + 15 + 5, 15 + 5 + 15 + 15 + 5)  # what chains share is asked once


def test_every_right_answer_of_a_hop_is_right(tiny):
    """And what has no space before it in a hop has none in both: `w9` and ` w9` are two tokens."""
    model = load_model(tiny_hf("llama", 3), spaced_tokenizer(), device="cpu")
    first = [Fact(f"w{i}", f"w{30 + i}", also=(f"w{20 + i}",), space=False) for i in range(4)]
    second = [Fact(f"w{30 + i}", f"w{10 + i}", also=(f"w{14 + i}", f"w{24 + i}"), space=False) for i in range(4)]
    relations = [
        Relation(name, "factual", "", "", False, (text,), (text,), tuple(facts))
        for name, text, facts in (("one", "w41 {} w42", first), ("two", "w43 {} w42", second))
    ]
    chains = compose(*relations, wordings=[("w40 {} w39", "w38 {} w37")])
    asked = {"hop 1": "w41 {} w42", "hop 2": "w43 {} w42", "two-hop": "w38 w40 {} w39 w37"}
    found = ask_hops(model, chains, progress=False)
    for row, one, two in zip(found.ranks.to_dict("records"), first, second, strict=True):
        for name, fact in {"hop 1": one, "hop 2": two, "two-hop": replace(two, subject=one.subject)}.items():
            ids = prompt_ids(model, asked[name].replace("{}", fact.subject))
            logits = model.logits(torch.tensor([ids]))[0, -1]
            right = set(model.tokenizer.convert_tokens_to_ids([*fact.right]))
            best = max(float(logits[token]) for token in right)
            assert row[name] == 1 + sum(x >= best for token, x in enumerate(logits.tolist()) if token not in right)
    assert chains.relation.facts[0] == replace(second[0], subject="w0")


def test_answers_are_told_apart_from_all_objects_of_their_relation_also_those_in_no_chain(tiny):
    """Only w50 w1 is in a chain; w50 w2 tells that its first token decides nothing."""
    templates = ("w80 {} w81",)
    first, second = (
        Relation(name, "factual", "word", "word", False, templates, templates, tuple(facts))
        for name, facts in (
            ("one", [Fact("w10", "w30"), Fact("w11", "w31 w1"), Fact("w12", "w31 w2")]),
            ("two", [Fact("w30", "w50 w1"), Fact("w33", "w50 w2"), Fact("w31 w1", "w51")]),
        )
    )
    model = tiny("llama")
    found = ask_hops(model, compose(first, second, wordings=[("w70 {}", "{} w71")]), progress=False).ranks
    for row in found.itertuples(index=False):
        subject, bridge, answer = row[:3]
        assert list(row[3:]) == [
            slow_rank(model, Fact(subject, bridge), first.objects, "w80 {} w81"),
            slow_rank(model, Fact(bridge, answer), second.objects, "w80 {} w81"),
            slow_rank(model, Fact(subject, answer), second.objects, "w70 {} w71"),
            slow_rank(model, Fact(subject, answer), second.objects, "w80 {} w81"),
            slow_rank(model, Fact("w70 w71", answer), second.objects, "{}"),
        ]
    assert len(found) == 2 and (found["hop 2"] > [rank(model, "w80 w30 w81", "w50 w1"), 0]).all()


def test_the_funnel_counts_what_a_slow_search_counts():
    generator = torch.Generator().manual_seed(0)
    ranks = pd.DataFrame(torch.randint(1, 5, (60, 5), generator=generator).tolist(), columns=ASKED)
    for k, shortcut_k in ((1, 1), (2, 1), (3, 2), (3, None)):
        left = list(range(60))
        expected = [60]
        for name in ASKED if shortcut_k else HOPS:
            if name in HOPS:
                left = [i for i in left if ranks[name][i] <= k]
            else:
                left = [i for i in left if not ranks[name][i] <= (shortcut_k or 0)]
            expected.append(len(left))
        table = funnel(ranks, k, shortcut_k)
        assert table["left"].tolist() == expected and table["lost"].sum() == 60 - expected[-1]
        for i in range(1, len(expected)):
            assert table["share"][i] == expected[i] / expected[i - 1]


def test_the_planted_model_needs_both_hops(planted):
    ranks = ask_hops(planted.model, planted.composition, progress=False).ranks
    assert (ranks[list(HOPS)] == 1).all(axis=None) and (ranks[list(ASKED[3:])] > 100).all(axis=None)
    assert funnel(ranks)["left"].tolist() == [16] * 6


def test_the_tasks_are_about_the_same_chains(planted):
    hops = make_hops(ask_hops(planted.model, planted.composition, progress=False), n=11, seed=3)
    chains = hops.chains
    assert len(chains) == 11 and hops.ranks["kept"].all()
    truth = {chain.subject: chain for chain in planted.composition.chains}
    for i, row in enumerate(chains.itertuples(index=False)):
        assert (row.subject, row.bridge, row.object) == tuple(vars(truth[row.subject]).values())
        facts = [hops.tasks[name].val.facts[i] for name in HOPS]
        assert facts == [Fact(row.subject, row.bridge), Fact(row.bridge, row.object), Fact(row.subject, row.object)]
    texts = [hops.tasks[name].val.texts[0] for name in HOPS]
    first = chains.iloc[0]
    assert texts == [
        f"the place of {first.subject} is",
        f"the capital of {first.bridge} is",
        f"the capital of the place of {first.subject} is",
    ]
    counts = chains["bridge"].value_counts()
    assert len(counts) == 8 and counts.max() == 2  # every bridge before the second of any
    others = {fact.subject for fact in hops.tasks["two-hop"].test.facts}
    assert len(others) == 5 and not others & set(chains["subject"])
    assert "16 of 16 chains kept, 11 of them in D_val" in repr(hops)


def test_the_draw_follows_its_seed(planted):
    answers = ask_hops(planted.model, planted.composition, progress=False)
    subjects = [make_hops(answers, n=4, seed=seed).chains["subject"].tolist() for seed in (0, 0, 1)]
    assert subjects[0] == subjects[1] != subjects[2]


def test_only_kept_chains_are_studied(tiny):
    model, chains = tiny("llama"), word_chains()
    answers = ask_hops(model, chains, progress=False)
    ranks = answers.ranks
    k = int(ranks[list(HOPS)].max(axis=1).quantile(0.5))
    hops = make_hops(answers, k=k, shortcut_k=None, n=50)
    right = (ranks[list(HOPS)] <= k).all(axis=1)
    assert 0 < right.sum() < len(ranks)
    assert set(hops.chains["subject"]) == set(ranks.loc[right, "subject"])
    assert funnel(hops.ranks, k, None)["left"].iloc[-1] == right.sum() == len(hops.chains)
    assert len(hops.tasks["two-hop"].test) == 0


def test_a_model_that_takes_no_two_hops_is_told_with_counts(tiny):
    with pytest.raises(DataError, match=r"left after each filter: chains: 15, hop 1 right: \d+.*relax"):
        make_hops(ask_hops(tiny("llama"), word_chains(), progress=False))


@pytest.mark.parametrize("wrong", [{"template": 2}, {"first_template": 9}, {"second_template": -1}])
def test_templates_that_are_not_there_are_refused(tiny, wrong):
    with pytest.raises(SettingError):
        ask_hops(tiny("llama"), word_chains(), progress=False, **wrong)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"shortcut_k": 0}, {"n": 0}])
def test_settings_that_cannot_be_meant_are_refused(planted, wrong):
    with pytest.raises(SettingError):
        make_hops(ask_hops(planted.model, planted.composition, progress=False), **wrong)


def test_asking_can_be_cancelled(tiny):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_hops(tiny("llama"), word_chains(), progress=stop)
