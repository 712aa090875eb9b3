"""Patching END: the runs equal transformer_lens's hooks, a head that was written to matter rescues, others do not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.interventions.at_end import at_end, head_masks, logits_with
from kcwb.models.forward import forward
from kcwb.models.loading import Model, load_model
from kcwb.reading.dla import attribute, head_outputs
from kcwb.statistics import proportion_interval
from kcwb.studies.hallucination.rescue import RUNS, Rescue, _Asked, _Pair, _patch_relation, rescue
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Fact, Relation
from tests.handmade import copying_head
from tests.tasks import known_relation, prompt_ids
from tests.tiny import tiny_hf, tiny_model, tokenizer

#: The mover's query reads a flag that "is" has and "the" has not: in the second template it looks at all tokens alike,
#: and moves most from s4, which is there three times. Only the two subjects whose object is that of s4 stay right.
TEMPLATES = ("we think that the {} is", "s4 s4 s4 the {} the")


@cache
def copying() -> tuple[Model, Relation]:
    found = copying_head()
    return found.model, replace(found.relation, prompt_templates_zs=TEMPLATES)


def parts(count: int) -> list[Relation]:
    """The relation's facts dealt out to several relations."""
    _, relation = copying()
    return [replace(relation, name=f"part{i}", facts=relation.facts[i::count]) for i in range(count)]


@cache
def rescued(movers: str) -> Rescue:
    model, _ = copying()
    return rescue(model, parts(4), pairs=4, movers=movers.split(), draws=60, progress=False)


# --- runs ---


def two_runs(model: Model) -> tuple[Prompts, Prompts, torch.Tensor]:
    """The same facts in two templates of unequal length, and what heads write in the first."""
    relation = known_relation(model, 6)
    source, target = (encode(model, relation.facts, text, relation.objects) for text in ("w3 {} w4 w8", "w1 {} w2"))
    return source, target, head_outputs(model.network, attribute(model, source))


@torch.no_grad()
def hooked(model: Model, source: Prompts, target: Prompts, row: int, chosen: torch.Tensor) -> torch.Tensor:
    """transformer_lens: one prompt, some heads' `hook_z` at END overwritten with the other prompt's."""
    tokens = [one.tokens[row : row + 1, : int(one.lengths[row])] for one in (source, target)]
    _, cache = model.bridge.run_with_cache(tokens[0])
    hooks = []
    for layer in range(model.graph.n_layers):
        given = cache[f"blocks.{layer}.attn.hook_z"]

        def overwrite(z: torch.Tensor, hook, layer=layer, given=given) -> torch.Tensor:
            shape, z, other = z.shape, z.clone(), given
            z, other = (one.unflatten(-1, (-1, model.network.d_head)) if one.ndim == 3 else one for one in (z, other))
            z[:, -1, chosen[layer]] = other[:, -1, chosen[layer]]
            return z.reshape(shape)

        hooks.append((f"blocks.{layer}.attn.hook_z", overwrite))
    return model.bridge.run_with_hooks(tokens[1], fwd_hooks=hooks)[0, -1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-biases", "mistral-window", "neox", "opt"])
def test_patching_at_end_equals_hooks(tiny, name):
    model = tiny(name)
    source, target, outputs = two_runs(model)
    sets = torch.zeros(4, 2, 4, dtype=torch.bool)
    sets[1, 0, 1] = sets[2, 1, 0] = sets[2, 1, 3] = True
    sets[3] = True
    logits = torch.cat(list(logits_with(model, target, outputs, sets)))
    assert logits.shape == (4, 6, model.network.d_vocab)
    for i, chosen in enumerate(sets):
        for row in (0, 2, 5):
            expected = hooked(model, source, target, row, chosen)
            torch.testing.assert_close(logits[i, row], expected, atol=1e-4, rtol=1e-4)


def test_what_heads_write_anyway_changes_nothing_and_batches_give_the_same(tiny, monkeypatch):
    model = tiny("llama")
    _, target, outputs = two_runs(model)
    alone = [(f"a{layer}.h{head}",) for layer, head in ((1, 0), (0, 1), (0, 0), (1, 2), (0, 3), (1, 1))]
    sets = head_masks(model.graph, [("a0.h0", "a0.h2", "a1.h3"), *alone])
    assert [[tuple(at) for at in one.nonzero().tolist()] for one in sets[:2]] == [[(0, 0), (0, 2), (1, 3)], [(1, 0)]]
    own = head_outputs(model.network, attribute(model, target))
    with torch.no_grad():
        clean = model.network.logits(at_end(forward(model.network, target.tokens).residual, target))
    same = torch.cat(list(logits_with(model, target, own, sets)))
    torch.testing.assert_close(same, clean.expand_as(same), atol=1e-4, rtol=1e-4)
    whole = torch.cat(list(logits_with(model, target, outputs, sets)))
    assert not torch.allclose(whole, clean.expand_as(whole), atol=1e-2)
    monkeypatch.setattr("kcwb.interventions.at_end._ROWS", 3 * target.tokens.numel())
    monkeypatch.setattr("kcwb.interventions.at_end._LOGIT_BYTES", 1)
    batches = list(logits_with(model, target, outputs, sets))
    assert [len(one) for one in batches] == [1] * 7
    torch.testing.assert_close(torch.cat(batches), whole, atol=1e-5, rtol=1e-5)


# --- planted ---


def test_the_head_that_matters_rescues_and_random_heads_seldom_do():
    found = rescued("a1.h2")
    runs = found.summary.set_index("heads")
    assert runs["facts"].tolist() == [14] * 4
    assert runs.loc["movers", "rescued"] == 1 and runs.loc["movers", "rise"] > 3
    assert runs.loc["all heads", "rescued"] == 1
    assert runs.loc["random heads", "rescued"] < 0.2  # the mover itself is not among them
    assert runs.loc["movers", "p_rescued"] == runs.loc["movers", "p_rise"] == 1 / 4  # its layer has three others
    assert tuple(runs.loc["movers", ["rescued_low", "rescued_high"]]) == proportion_interval([1] * 14)
    difference = runs.loc["movers - random heads"]
    assert difference["rescued"] == pytest.approx(1 - runs.loc["random heads", "rescued"])
    assert difference["rise_low"] > 1 and np.isnan(difference["rescued_low"])  # every fact alike: no spread is seen


def test_any_of_several_right_answers_rescues():
    """The object that the model says is another right answer of each fact; what is called its object it never says."""
    model, relation = copying()
    facts = tuple(replace(fact, object="we", also=(fact.object,)) for fact in relation.facts)
    more = {"pairs": 6, "movers": ["a1.h2"], "draws": 20, "progress": False}
    own, also = (rescue(model, [replace(relation, facts=some)], **more) for some in (relation.facts, facts))
    columns = ["subject", "predicted", *(f"rescued, {run}" for run in RUNS)]
    assert also.pairs[columns].equals(own.pairs[columns]) and own.pairs["rescued, movers"].all()


def test_a_head_that_does_not_matter_rescues_nothing():
    runs = rescued("a1.h1").summary.set_index("heads")
    assert runs.loc["movers", "rescued"] == 0 and abs(runs.loc["movers", "rise"]) < 0.5
    assert runs.loc["movers", "p_rescued"] > 0.5 and runs.loc["movers", "p_rise"] > 0.05
    assert runs.loc["movers - random heads", "rescued"] < 0


def test_a_decoy_that_looks_like_the_mover_rescues_nothing():
    runs = rescued("a1.h0 a0.h1").summary.set_index("heads")
    assert runs.loc["movers", "rescued"] == 0 and abs(runs.loc["movers", "rise"]) < 0.5


def test_movers_are_found_on_facts_that_are_in_no_pair(monkeypatch):
    model, relation = copying()
    asked = []

    def spy(model, task, most, seed):
        asked.extend(fact.subject for fact in task.val.facts)
        return ["a1.h2"]

    monkeypatch.setattr("kcwb.studies.hallucination.rescue.strongest_movers", spy)
    found = rescue(model, [relation], pairs=6, draws=20, progress=False)
    assert len(found.pairs) == 6 and len(asked) == 10
    assert not set(asked) & set(found.pairs["subject"])


def test_the_movers_of_a_relation_are_found_and_named():
    model, relation = copying()
    found = rescue(model, [relation], pairs=6, draws=20, progress=False)
    assert found.relations["movers"].tolist() == ["a1.h2"]
    assert found.summary.set_index("heads").loc["movers", "rescued"] == 1


# --- tables ---


def test_pairs_say_what_was_asked_and_what_became_of_it():
    model, _ = copying()
    pairs = rescued("a1.h2").pairs
    assert (pairs["right_in"] == TEMPLATES[0]).all() and (pairs["wrong_in"] == TEMPLATES[1]).all()
    assert (pairs["gap"] < 0).all() and (pairs["predicted"] != pairs["object"]).all()
    for one in pairs.head(3).to_dict("records"):
        text = TEMPLATES[1].replace("{}", one["subject"])
        logits = model.logits(torch.tensor([model.tokenizer(text)["input_ids"]]))[0, -1]
        own, other = (int(model.tokenizer.convert_tokens_to_ids(one[name])) for name in ("object", "predicted"))
        assert int(logits.argmax()) == other
        assert one["gap"] == pytest.approx(float(logits[own] - logits[other]), abs=1e-4)
    summary = rescued("a1.h2").summary.set_index("heads")
    for run in RUNS:
        assert summary.loc[run, "rise"] == pytest.approx(pairs[f"rise, {run}"].mean())


def test_relations_are_counted_and_those_without_pairs_passed_over():
    model, relation = copying()
    only_right = replace(relation, name="right", prompt_templates_zs=(TEMPLATES[0], "we think the {} is"))
    found = rescue(model, [only_right, *parts(2)], pairs=3, movers=["a1.h2"], draws=20, progress=False)
    assert found.relations["relation"].tolist() == ["right", "part0", "part1"]
    assert found.relations["mixed"].tolist() == [0, 6, 8] and found.relations["pairs"].tolist() == [0, 3, 3]
    assert found.relations["always_right"].tolist() == [16, 2, 0]
    assert np.isnan(found.relations["rescued, movers"][0]) and found.relations["rescued, movers"][1] == 1


def test_the_same_seed_gives_the_same_table():
    model, relation = copying()
    one, two = (rescue(model, [relation], pairs=4, draws=20, seed=2, progress=False) for _ in range(2))
    pd.testing.assert_frame_equal(one.summary, two.summary)
    pd.testing.assert_frame_equal(one.pairs, two.pairs)


def test_a_wrong_answer_that_ties_with_the_right_one_is_another():
    """A tie counts against the right answer, as it may be one in half precision."""
    module, ids = tiny_hf("llama"), torch.tensor([prompt_ids(tiny_model("llama"), "w1 w10 w2")])
    with torch.no_grad():
        gold = int(module(ids).logits[0, -1].argmax())
        twin = gold + 1
        module.lm_head.weight[twin] = module.lm_head.weight[gold]
    model = load_model(module, tokenizer(), device="cpu")
    fact = Fact("w10", model.tokenizer.decode([gold]))
    texts = ["w3 {} w4", "w1 {} w2"]
    prompts = [encode(model, [fact], text, (fact.object, "w7")) for text in texts]
    asked = _Asked(replace(copying()[1], facts=(fact,)), texts, prompts)
    found = _patch_relation(model, asked, [_Pair(0, 0, 1)], ["a1.h0"], 2, 0).table
    assert (found["gap"][0], found["predicted"][0]) == (0.0, model.tokenizer.decode([twin]))


# --- what is refused ---


def test_nothing_to_patch_is_refused_with_counts():
    model, relation = copying()
    always = replace(relation, prompt_templates_zs=(TEMPLATES[0], "we think the {} is"))
    with pytest.raises(DataError, match=r"16 facts, 16 right and 0 wrong in all templates, 0 mixed"):
        rescue(model, [always], progress=False)
    with pytest.raises(DataError, match=r"no mover heads.*14 mixed"):
        rescue(model, [relation], pairs=16, progress=False)


def test_what_cannot_be_meant_is_refused_before_the_model_runs(monkeypatch):
    model, relation = copying()
    monkeypatch.setattr("kcwb.studies.hallucination.rescue.encode", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(DataError, match="no relation"):
        rescue(model, [], progress=False)
    with pytest.raises(DataError, match="is given twice"):
        rescue(model, [relation, relation], progress=False)
    with pytest.raises(CircuitError, match="not an attention head"):
        rescue(model, [relation], movers=["m0"], progress=False)
    for wrong in ({"templates": (0, 0)}, {"templates": (0, 2)}, {"n": 2}, {"pairs": 0}, {"draws": 3}, {"movers": []}):
        with pytest.raises(SettingError, match=r"template|n=|pairs=|draws=|movers="):
            rescue(model, [relation], progress=False, **wrong)


def test_it_can_be_cancelled():
    def stop(done, total, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rescue(copying()[0], [copying()[1]], progress=stop)
