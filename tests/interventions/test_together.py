"""The interaction of pairs of heads, against four plain runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kcwb.errors import CircuitError, SettingError
from kcwb.interventions import together as module
from kcwb.interventions.together import heads_together
from kcwb.models.forward import forward
from kcwb.tasks.task import make_task
from tests.handmade import copying_head
from tests.tasks import known_relation

HEADS = ["a0.h1", "a1.h2", "a1.h0"]


def losses_without(model, prompts, heads):
    """Each fact's loss of its answer's first token, by one masked run in which all edges out of the heads are cut."""
    kept = model.graph.exists.clone()
    for head in heads:
        kept[model.graph.sender_index(head)] = False
    residual = forward(model.network, prompts.tokens, kept=kept).residual
    logits = model.network.logits(residual[torch.arange(len(prompts)), prompts.ends])
    return torch.nn.functional.cross_entropy(logits, prompts.answers[:, 0], reduction="none").numpy()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2"])
def test_interactions_are_those_of_four_plain_runs(tiny, name):
    model = tiny(name)
    prompts = make_task(model, known_relation(model, 9), n=4).val
    prompts = prompts.select(prompts.told_at_end.nonzero()[:, 0].tolist())
    table = heads_together(model, prompts, HEADS, draws=3, progress=False)
    assert len(table) == 3 and table["interaction"].abs().is_monotonic_decreasing
    smallest_first = table["p"].sort_values(kind="stable")
    steps = np.minimum(1, np.maximum.accumulate(smallest_first.to_numpy() * [3, 2, 1]))
    assert table["holm"][smallest_first.index].tolist() == pytest.approx(steps.tolist())
    whole = losses_without(model, prompts, [])
    for row in table.itertuples():
        left, right, both = (losses_without(model, prompts, some) for some in ([row.left], [row.right], row[1:3]))
        each = both - left - right + whole
        assert row.interaction == pytest.approx(each.mean(), abs=1e-4)
        assert row.low <= row.interaction <= row.high
        assert row.without_both == pytest.approx((both - whole).mean(), abs=1e-4)
        assert row.without_left == pytest.approx((left - whole).mean(), abs=1e-4)
        assert row.without_right == pytest.approx((right - whole).mean(), abs=1e-4)


def test_chance_is_that_of_random_pairs_of_the_same_layers(tiny, monkeypatch):
    model = tiny("gpt2")
    prompts = make_task(model, known_relation(model, 9), n=4).val
    prompts = prompts.select(prompts.told_at_end.nonzero()[:, 0].tolist())
    drawn, draw = [], module.matched_head_sets
    monkeypatch.setattr(module, "matched_head_sets", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    (row,) = heads_together(model, prompts, HEADS[:2], draws=5, progress=False).itertuples()
    (pairs,) = drawn
    assert len(pairs) == row.draws == 5
    assert all([name[:2] for name in pair] == ["a0", "a1"] and not {*pair} & {*HEADS[:2]} for pair in pairs)
    whole, chance = losses_without(model, prompts, []), []
    for pair in pairs:
        one, two, both = (losses_without(model, prompts, some) for some in ([pair[0]], [pair[1]], pair))
        chance.append((both - one - two + whole).mean())
    assert row.chance == pytest.approx(np.mean(chance), abs=1e-4)
    as_large = sum(abs(value) >= abs(row.interaction) for value in chance)
    assert row.p == pytest.approx((1 + as_large) / 6)


def test_a_backup_interacts_and_a_head_that_nobody_reads_does_not():
    """Of two movers that do the same either is enough; a decoy is worth nothing with or without a mover."""
    made = copying_head(score=15.0, movers=(1, 2))
    task = make_task(made.model, made.relation, n=8)
    prompts = task.val.select(task.val.told_at_end.nonzero()[:, 0].tolist())
    table = heads_together(made.model, prompts, ["a1.h2", "a1.h1", "a1.h0"], draws=0, progress=False)
    assert (table["left"][0], table["right"][0]) == ("a1.h2", "a1.h1")
    assert table["interaction"][0] > 0.5 and table["low"][0] > 0
    assert table["interaction"][0] > 10 * table["interaction"][1:].abs().max()
    assert table[["p", "holm"]].isna().all(axis=None) and (table["draws"] == 0).all()


def test_too_few_heads_and_what_is_none_are_refused(tiny):
    model = tiny("llama")
    prompts = make_task(model, known_relation(model, 9), n=4).val
    with pytest.raises(SettingError, match="at least two different heads"):
        heads_together(model, prompts, ["a0.h1", "a0.h1"])
    with pytest.raises(CircuitError, match="'m0' is not an attention head"):
        heads_together(model, prompts, ["a0.h1", "m0"])
