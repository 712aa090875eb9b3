"""Losses and Hit@k, each against one unpadded prompt at a time through the Hugging Face model."""

from __future__ import annotations

import math

import pytest
import torch

from kcwb.errors import DataError, KcwbError, SettingError
from kcwb.tasks.metrics import METRICS, answer_ranks, at_answers, hit_at_k, make_loss
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact
from tests.tasks import TEMPLATE, answer_ids, known_relation, relation_of, unpadded_logits


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def prompts(model):
    """Subjects of one to three tokens, objects of one and two, some of them not known."""
    relation = known_relation(model, 9, unknown=2)
    return encode(model, relation.facts, TEMPLATE, relation.objects)


@pytest.fixture
def logits(model, prompts):
    """The full model's logits at the answers, run padded."""
    return at_answers(model.logits(prompts.tokens), prompts)


def noisy(logits, *leading):
    return logits + torch.randn(*leading, *logits.shape, generator=torch.Generator().manual_seed(1))


def slow_loss(metric, model, prompts, n, logits):
    """A prompt's loss from the logits of its answer tokens alone, `[a, V]`, in double precision and plain loops."""
    answer = answer_ids(model, prompts.facts[n])
    logs = [row.double().log_softmax(-1) for row in logits[: len(answer)]]
    if metric == "nll":
        return -sum(float(row[token]) for row, token in zip(logs, answer, strict=True)) / len(answer)
    if metric == "logit_diff":
        return float(logits[0, prompts.foils[n]] - logits[0, answer[0]])
    full = [row.double().log_softmax(-1) for row in unpadded_logits(model, prompts.facts[n])]
    divergences = [
        sum(math.exp(p) * (p - q) for p, q in zip(a.tolist(), b.tolist(), strict=True))
        for a, b in zip(full, logs, strict=True)
    ]
    return sum(divergences) / len(answer)


@pytest.mark.parametrize("metric", METRICS)
def test_loss_of_the_full_model_equals_that_of_unpadded_prompts(model, prompts, logits, metric):
    expected = [
        slow_loss(metric, model, prompts, n, unpadded_logits(model, fact)) for n, fact in enumerate(prompts.facts)
    ]
    loss = make_loss(model, prompts, metric)
    torch.testing.assert_close(loss.per_prompt(logits), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert float(loss(logits)) == pytest.approx(sum(expected) / len(expected), abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_loss_of_any_candidate_equals_the_slow_one(model, prompts, logits, metric):
    candidates = noisy(logits, 2, 3)
    loss = make_loss(model, prompts, metric)
    found = loss.per_prompt(candidates)
    assert found.shape == (2, 3, len(prompts)) and loss(candidates).shape == (2, 3)
    for i in range(2):
        for j in range(3):
            expected = [slow_loss(metric, model, prompts, n, candidates[i, j, n]) for n in range(len(prompts))]
            torch.testing.assert_close(found[i, j], torch.tensor(expected), atol=1e-4, rtol=1e-4)
            assert float(loss(candidates)[i, j]) == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_kl_is_zero_for_the_full_model_and_positive_for_others(model, prompts, logits):
    loss = make_loss(model, prompts, "kl")
    assert float(loss(logits)) == pytest.approx(0, abs=1e-5)
    assert (loss.per_prompt(noisy(logits)) > 0.01).all()


@pytest.mark.parametrize("metric", METRICS)
def test_what_stands_where_an_answer_has_no_token_does_not_matter(model, prompts, logits, metric):
    changed = torch.where(prompts.answer_mask[..., None], logits, noisy(100 * logits))
    assert not changed.equal(logits)
    loss = make_loss(model, prompts, metric)
    assert loss.per_prompt(changed).equal(loss.per_prompt(logits))


@pytest.mark.parametrize("metric", METRICS)
def test_a_resample_is_the_loss_of_prompts_that_are_repeated(model, prompts, logits, metric):
    loss, counts = make_loss(model, prompts, metric), [2, 0, 1, 3, 0, 1, 1, 0, 1]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    own = [row for row, count in enumerate(counts) if count]
    some, drawn = noisy(logits, 3), loss.resampled(counts)
    width = drawn.prompts.answers.shape[1]
    repeated = make_loss(model, prompts.select(rows), metric)(some[:, rows, :width])
    torch.testing.assert_close(drawn(some[:, own, :width]), repeated, atol=1e-5, rtol=1e-5)
    assert (len(drawn.prompts), drawn.total, drawn.select([0, 3]).counts) == (6, 9, (2, 1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [[0], [7, 2, 3], [1, 5]])
def test_a_part_of_a_loss_is_the_loss_of_the_part(model, prompts, logits, metric, rows):
    loss = make_loss(model, prompts, metric)
    part = loss.select(rows)
    width = part.prompts.answers.shape[1]
    changed = noisy(logits)
    torch.testing.assert_close(part.per_prompt(changed[rows, :width]), loss.per_prompt(changed)[rows])


@pytest.mark.parametrize("metric", METRICS)
def test_losses_of_low_precision_logits_are_taken_in_float32(model, prompts, logits, metric):
    low = logits.bfloat16()
    loss = make_loss(model, prompts, metric)
    assert loss(low).dtype == torch.float32
    assert loss(low).equal(loss(low.float()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_logits_that_are_not_numbers_are_an_error(model, prompts, logits, metric, bad):
    broken = logits.clone()
    broken[2, 0] = bad
    with pytest.raises(KcwbError, match=f"{metric}.*not a number"):
        make_loss(model, prompts, metric)(broken)
    candidates = torch.stack([logits, broken])
    with pytest.raises(KcwbError, match="not a number"):
        make_loss(model, prompts, metric)(candidates)


def test_logit_diff_without_a_foil_is_an_error_with_the_subject(model):
    relation = relation_of([Fact("w10", "w20 w1"), Fact("w11", "w20 w2")])
    prompts = encode(model, relation.facts, TEMPLATE, relation.objects)
    with pytest.raises(DataError, match=r"foil for 'w10'.*'w20 w1'.*foil="):
        make_loss(model, prompts, "logit_diff")


def test_an_unknown_metric_suggests_the_nearest(model, prompts):
    with pytest.raises(SettingError, match=r"'logit_dif'.*'logit_diff'"):
        make_loss(model, prompts, "logit_dif")


# Ranks and Hit@k


def test_ranks_equal_the_place_in_the_sorted_vocabulary(model, prompts, logits):
    candidates = noisy(logits, 2, 3)
    found = answer_ranks(candidates, prompts)
    assert found.shape == (2, 3, len(prompts))
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(len(prompts))).tolist():
        i, j, n = index
        order = sorted(candidates[i, j, n, 0].tolist(), reverse=True)
        own = float(candidates[i, j, n, 0, answer_ids(model, prompts.facts[n])[0]])
        assert int(found[i, j, n]) == order.index(own) + 1


@pytest.mark.parametrize("k", [1, 3, 10])
def test_hits_are_ranks_up_to_k(model, prompts, logits, k):
    found = hit_at_k(noisy(logits, 4), prompts, k)
    assert found.shape == (4, len(prompts)) and found.dtype == torch.bool
    assert found.equal(answer_ranks(noisy(logits, 4), prompts) <= k)
    expected = []
    for fact in prompts.facts:
        top = unpadded_logits(model, fact)[0].topk(k).indices.tolist()
        expected.append(answer_ids(model, fact)[0] in top)
    assert hit_at_k(logits, prompts, k).tolist() == expected


def test_ranks_of_the_full_model_are_those_of_the_prompts(prompts, logits):
    assert answer_ranks(logits, prompts).equal(prompts.ranks)


@pytest.mark.parametrize(("tied", "hit"), [(9, True), (10, False), (93, False)])
def test_ties_count_against_the_answer(prompts, logits, tied, hit):
    flat = torch.zeros_like(logits) - 1
    for n, token in enumerate(prompts.answers[:, 0].tolist()):
        others = [other for other in range(logits.shape[-1]) if other != token][:tied]
        flat[n, 0, [token, *others]] = 0
    assert answer_ranks(flat, prompts).tolist() == [tied + 1] * len(prompts)
    assert hit_at_k(flat, prompts).tolist() == [hit] * len(prompts)


def test_logits_that_are_not_numbers_are_no_hit(prompts, logits):
    assert not hit_at_k(torch.full_like(logits, torch.nan), prompts).any()
