"""What cut edges deliver, against a plain loop over unpadded prompts."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch

from kcwb.circuits.ablation import ABLATIONS, AblationKind, ablation_kind, make_ablation
from kcwb.errors import DataError, SettingError
from kcwb.models import memory
from kcwb.models.forward import forward
from kcwb.models.loading import load_model
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact, load_relation
from kcwb.tasks.task import make_task
from tests.tasks import known_relation, relation_of
from tests.tiny import tiny_hf, tokenizer

ARCHITECTURES = ["llama", "gpt2", "neox"]


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny):
    return tiny(request.param)


def task_of(model, n_facts=9, n=4, **more):
    """Subjects of one to three tokens and answers of one and two."""
    task = make_task(model, known_relation(model, n_facts, **more), n=n)
    assert len(set(task.reference.lengths.tolist())) > 1 or n_facts > 32
    return task


def outputs(model, tokens) -> torch.Tensor:
    """Every sender's output on one prompt, `[S, T, D]`."""
    return forward(model.network, torch.tensor([tokens]), senders=True).senders[:, 0]


def real(prompts, n) -> int:
    """How many of a prompt's tokens are not padding."""
    return int(prompts.lengths[n] + prompts.answer_mask[n].sum()) - 1


def test_zero_is_zero(model):
    task = task_of(model)
    assert make_ablation(model, task, "zero").values(task.val) is None


def slow_means(model, prompts, anchors):
    """Class of positions -> senders' outputs there, by a loop over unpadded prompts: "first", or the offset."""
    at = defaultdict(list)
    for n, anchor in enumerate(anchors):
        for position, output in enumerate(outputs(model, prompts.tokens[n, : real(prompts, n)].tolist()).unbind(1)):
            at["first" if position == 0 else position - anchor].append(output)
    return at


def slow_value(at, position, anchor, least=3):
    """The mean that belongs to a position: of position 0, or of the nearest offset that enough prompts have."""
    offsets = sorted(place for place in at if place != "first")
    if position == 0 or not offsets:
        return torch.stack(at["first"]).mean(0)
    enough = [o for o in offsets if len(at[o]) >= min(least, max(len(at[o]) for o in offsets))]
    return torch.stack(at[min(enough, key=lambda o: (abs(o - (position - anchor)), o))]).mean(0)


def assert_means_are_the_slow_ones(model, task, *asked):
    reference = task.reference
    at = slow_means(model, reference, (reference.lengths - 1).tolist())
    ablation = make_ablation(model, task, "mean")
    for prompts in (task.val, reference, *asked):
        found = ablation.values(prompts)
        assert found.shape == (model.graph.n_senders, *prompts.tokens.shape, model.network.d_model)
        for n in range(len(prompts)):
            for position in range(real(prompts, n)):
                expected = slow_value(at, position, int(prompts.lengths[n]) - 1)
                torch.testing.assert_close(found[:, n, position], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("n_facts", [9, 70])
def test_mean_is_the_mean_over_the_reference_at_the_same_place_from_the_end(model, n_facts, bos):
    model = replace(model, prepend_bos=bos)
    assert_means_are_the_slow_ones(model, task_of(model, n_facts))


@pytest.mark.parametrize("subjects", [1, 2, 5, 11])
@pytest.mark.parametrize("bos", [False, True])
def test_mean_keeps_position_0_apart_on_prompts_of_any_length(model, subjects, bos):
    """Prompts of one to six tokens, some of them alone with their length, and one longer than all of the reference."""
    model = replace(model, prepend_bos=bos)
    sizes = [1, 1, 3, 2, 6, 1, 2, 2, 3, 1, 2][:subjects]
    facts = [
        Fact(" ".join(f"w{10 + i + j}" for j in range(size)), f"w{50 + i}" + " w7" * (i % 3))
        for i, size in enumerate(sizes)
    ]
    prompts = encode(model, facts, "{}", [fact.object for fact in facts])
    longer = encode(model, [Fact("w1 w2 w3 w4 w5 w6 w8 w9", "w20 w21 w22 w23")], "{}", ["w20"])
    task = task_of(model)
    assert_means_are_the_slow_ones(model, replace(task, reference=prompts, val=prompts), longer)


def test_mean_never_delivers_a_sink_in_the_middle_of_a_prompt():
    """A model whose first position is two hundred times as long as the others, and prompts of one to five tokens."""
    module = tiny_hf("gpt2")
    module.transformer.wpe.weight.data[0] *= 200
    model = load_model(module, tokenizer(), device="cpu")
    facts = [Fact(" ".join(f"w{10 + i + j}" for j in range(i % 4 + 1)), f"w{50 + i}") for i in range(12)]
    prompts = encode(model, facts, "{} w2", [fact.object for fact in facts])
    ablation = make_ablation(model, replace(task_of(model), reference=prompts), "mean")
    norms = ablation.values(prompts)[0].norm(dim=-1)
    assert norms[:, 0].min() > 50 > 10 > norms[:, 1:].max()


@pytest.mark.model
@pytest.mark.parametrize("relation", ["city_country", "country_capital", "president_birth_year"])
def test_mean_of_the_builtin_model_delivers_its_sink_at_position_0_alone(smollm2, relation):
    some = load_relation(relation)
    task = make_task(smollm2, replace(some, facts=some.facts[:40]), n=8)
    norms = make_ablation(smollm2, task, "mean").values(task.val)[smollm2.graph.sender_index("m2")].norm(dim=-1)
    assert norms[:, 0].min() > 400 > 60 > norms[:, 1:5].max()


@pytest.mark.parametrize("size", [1, 2, 100])
def test_mean_does_not_depend_on_pieces(model, monkeypatch, size):
    task = task_of(model)
    whole = make_ablation(model, task, "mean").values(task.val)
    monkeypatch.setattr(memory, "prompts_at_once", lambda network, tokens, copies: size)
    torch.testing.assert_close(make_ablation(model, task, "mean").values(task.val), whole, atol=1e-5, rtol=1e-5)


def test_resample_is_the_output_on_the_corrupted_prompt(model):
    task = task_of(model)
    prompts = task.val
    assert prompts.paired.all()
    found = make_ablation(model, task, "resample").values(prompts)
    for n in range(len(prompts)):
        expected = outputs(model, prompts.corrupted[n, : real(prompts, n)].tolist())
        torch.testing.assert_close(found[:, n, : real(prompts, n)], expected, atol=1e-4, rtol=1e-4)
        assert not expected.allclose(outputs(model, prompts.tokens[n, : real(prompts, n)].tolist()))


@pytest.fixture
def lonely(tiny):
    """A task some of whose facts have no partner: their subjects alone have two and three tokens."""
    model = tiny("llama")
    facts = known_relation(model, 9).facts
    chosen = [fact for fact in facts if len(fact.subject.split()) == 1][:3]
    chosen += [next(fact for fact in facts if len(fact.subject.split()) == size) for size in (2, 3)]
    return model, make_task(model, relation_of(chosen), n=2)


def test_resample_leaves_out_facts_without_a_partner_and_says_which(lonely):
    model, task = lonely
    prompts = task.reference
    without = [fact.subject for fact in prompts.facts if len(fact.subject.split()) > 1]
    assert len(without) == 2
    with pytest.warns(UserWarning, match="resample") as caught:
        usable = make_ablation(model, task, "resample").usable(prompts)
    assert len(caught) == 1
    assert all(f"'{subject}'" in str(caught[0].message) for subject in without)
    assert usable.facts == tuple(fact for fact in prompts.facts if fact.subject not in without)
    assert usable.paired.all()


def test_resample_with_no_partners_at_all_is_an_error(lonely):
    model, task = lonely
    alone = task.reference.select([i for i, paired in enumerate(task.reference.paired.tolist()) if not paired])
    with pytest.raises(DataError, match="Use zero or mean"):
        make_ablation(model, task, "resample").usable(alone)


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_other_ablations_use_every_prompt_without_a_warning(lonely, kind):
    model, task = lonely
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_ablation(model, task, kind).usable(task.reference) is task.reference


def test_values_under_resample_have_a_row_for_every_prompt_or_are_refused(tiny):
    """Two prompts of equal width, one without a partner: fewer rows of values would be spread over both unseen."""
    model = tiny("llama")
    facts = [Fact("w10", "w20 w21"), Fact("w11", "w22"), Fact("w12 w13", "w23")]
    prompts = encode(model, facts, "w1 {} w2", ["w20 w21", "w22", "w23"]).select([0, 2])
    assert prompts.paired.tolist() == [True, False]
    task = task_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = make_ablation(model, task, "resample").values(prompts)
        except DataError as error:
            assert "w12 w13" in str(error)
        else:
            assert values.shape[1] == len(prompts)


def test_what_is_by_chance_in_an_ablation_is_drawn_again(tiny):
    model = tiny("llama")
    task = make_task(model, known_relation(model, 24), n=5)
    assert ablation_kind("zero").drawn_again(task, 1) is None
    kind, other = ablation_kind("mean").drawn_again(task, 1)
    assert str(kind) == "mean" and other.val is task.val
    rows = [task.reference.facts.index(fact) for fact in other.reference.facts]
    assert len(rows) == len(task.reference) and len(set(rows)) < len(rows) and rows == sorted(rows)
    same = make_ablation(model, replace(task, reference=task.reference.select(rows)), "mean").values(task.val)
    assert torch.equal(make_ablation(model, other, "mean").values(task.val), same)
    _, partners = ablation_kind("resample").drawn_again(task, 2)
    assert not torch.equal(partners.val.corrupted, task.val.corrupted) and partners.reference is task.reference

    @dataclass(frozen=True)
    class Noise(AblationKind):
        scale: float
        seed: int

    assert Noise(2.0, 3).drawn_again(task, 8) == (Noise(2.0, 8), task)


def test_an_unknown_ablation_suggests_the_nearest(tiny):
    model = tiny("llama")
    with pytest.raises(SettingError, match=r"'means'.*'mean'"):
        make_ablation(model, task_of(model), "means")
    assert tuple(ABLATIONS) == ("zero", "mean", "resample")
