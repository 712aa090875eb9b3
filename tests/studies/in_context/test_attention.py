"""Attention to demonstrations is that of the heads' patterns, and is compared with heads of the same layers."""

from __future__ import annotations

import numpy as np
import pytest

from kcwb.reading.nodes import attention_pattern
from kcwb.reading.patterns import pattern_scores
from kcwb.studies.in_context.attention import demonstration_attention, reading_summary
from kcwb.tasks.shots import GROUPS


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_attention_to_demonstrations_equals_the_heads_patterns(made, name):
    model, task = made(name)
    heads = demonstration_attention(model, task)
    assert np.allclose(heads[list(GROUPS)].sum(axis=1), 1, atol=1e-5)
    groups = task.groups(model, task.test)
    for node in ("a0.h1", "a1.h3"):
        mass = np.zeros(len(GROUPS))
        for i in range(len(task.test)):
            row = attention_pattern(model, task.test, node, prompt=i).iloc[-1].to_numpy()
            mass += groups[:, i, : len(row)].numpy() @ row / len(task.test)
        assert np.allclose(heads.set_index("node").loc[node, list(GROUPS)].astype(float), mass, atol=1e-5)
    scores = pattern_scores(model)
    assert heads["induction"].tolist() == scores["induction"].flatten().tolist()


def test_reading_is_compared_with_heads_of_the_same_layers(made):
    model, task = made("llama")
    heads = demonstration_attention(model, task).assign(status="in neither")
    heads.loc[heads["node"] == "a1.h2", "status"] = "new"
    heads.loc[heads["node"].isin(["a0.h0", "a1.h0"]), "status"] = ["shared", "unsure"]
    row = reading_summary(model, heads, draws=300).set_index("quantity").T.to_dict()["object"]
    values = heads.set_index("node")["object"].to_dict()
    assert row["new heads"] == values["a1.h2"]
    assert row["other heads"] == pytest.approx((values["a0.h0"] + values["a1.h0"]) / 2)
    rest = [values[name] for name in ("a1.h0", "a1.h1", "a1.h3")]
    assert row["random heads"] == pytest.approx(np.mean(rest), abs=0.03)
    assert (row["p"] <= 0.25) == (values["a1.h2"] > max(rest))
