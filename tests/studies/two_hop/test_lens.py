"""The lens finds a planted bridge at the subject, and no bridge where there is none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from kcwb.studies.two_hop.lens import hop_arrival, hop_lens, lens_summary
from tests.studies.two_hop.conftest import loose, some_hops
from tests.tasks import prompt_ids


def test_the_lens_reads_what_hugging_face_has_after_each_layer(tiny):
    model, words = tiny("llama"), loose(tiny("llama"), n=5)
    module = model.bridge.original_model
    table = hop_lens(model, words, progress=False).set_index(["subject", "layer", "place", "who"])
    chains = words.chains
    answers = {
        "bridge": [model.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in chains["bridge"]],
        "object": [model.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in chains["object"]],
    }
    for i, chain in enumerate(chains.itertuples()):
        ids = prompt_ids(model, f"w72 w70 {chain.subject} w71 w73")
        states = module(torch.tensor([ids]), output_hidden_states=True).hidden_states
        length = len(chain.subject.split())
        bos = len(ids) - length - 4
        places = {"subject": bos + 1 + length, "description": bos + 2 + length, "END": bos + 3 + length}
        assert places["END"] == len(ids) - 1
        for layer, state in enumerate(states[:-1], start=-1):  # the last one is normed already
            logits = module.lm_head(module.model.norm(state))[0]
            for place, at in places.items():
                for who, tokens in answers.items():
                    ranks = {t: int((logits[at] >= logits[at, t]).sum()) for t in set(tokens)}
                    own, others = ranks.pop(tokens[i]), list(ranks.values())
                    row = table.loc[chain.subject, layer, place, who]
                    assert row["rank"] == own and row["hit_10"] == (own <= 10)
                    beside = table.loc[chain.subject, layer, place, f"other {who}s"]
                    assert beside["rank"] == pytest.approx(stats.gmean(others))
                    assert beside["hit_10"] == pytest.approx(np.mean([rank <= 10 for rank in others]))


def test_the_last_layer_is_the_models_own_answer(planted, hops):
    table = hop_lens(planted.model, hops, progress=False)
    last = table[(table["layer"] == 2) & (table["place"] == "END") & (table["who"] == "object")]
    assert last["rank"].tolist() == hops.tasks["two-hop"].val.ranks.tolist()


def test_a_planted_bridge_is_found_at_the_subject_and_not_at_the_end(planted, hops):
    table = hop_lens(planted.model, hops, progress=False)
    assert set(table["place"]) == {"subject", "END"}  # the description ends with the subject
    found = hop_arrival(table)
    assert found["bridge_before"].tolist() == [0] * 8 and found["object_at_end"].tolist() == [1] * 8
    assert found["bridge_at_end"].isna().all() and (found["advantage"] > 2).all()
    others = table[(table["who"] == "other bridges") & (table["place"] == "subject")]
    assert (others["rank"] > 100).all() and (others["hit_10"] == 0).all()


def test_without_the_first_lookup_no_bridge_is_found(planted):
    model = planted.model
    hops = some_hops(planted, 8)
    weight = model.bridge.original_model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        found = hop_arrival(hop_lens(model, hops, progress=False))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert found["bridge_before"].isna().all() and found["object_at_end"].isna().all()
    assert (found["advantage"].abs() < 0.5).all()


def test_one_chain_has_no_others_to_compare_with(planted):
    hops = some_hops(planted, 1)
    table = hop_lens(planted.model, hops, progress=False)
    assert set(table["who"]) == {"bridge", "object"}
    assert hop_arrival(table)["advantage"].isna().all() and lens_summary(table)["facts"].eq(1).all()


def test_the_summary_is_a_geometric_mean_with_its_interval():
    ranks = {"a": 1.0, "b": 10.0, "c": 10_000.0}
    table = pd.DataFrame(
        [(s, "x", "y", 0, "END", "bridge", rank, float(rank <= 10)) for s, rank in ranks.items()],
        columns=["subject", "bridge", "object", "layer", "place", "who", "rank", "hit_10"],
    )
    summary = lens_summary(table).set_index("quantity")
    assert summary.loc["rank", "value"] == pytest.approx(10 ** (5 / 3)) and summary.loc["rank", "facts"] == 3
    assert 1 <= summary.loc["rank", "low"] < summary.loc["rank", "value"] < summary.loc["rank", "high"] <= 10_001
    assert summary.loc["hit_10", "value"] == pytest.approx(2 / 3)
