"""AlphaEdit against its formula solved directly, and what it promises: protected keys and earlier edits stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcwb.editing.covariance import covariance
from kcwb.editing.edit import edit
from kcwb.editing.methods.alphaedit import AlphaSettings, _null_space, null_space, projected_change
from kcwb.editing.methods.memit import spread_change
from kcwb.editing.partial_runs import make_rows, read_places
from kcwb.tasks.relations import Fact
from tests.editing.conftest import FACT, QUICK, TEMPLATE, keys_and_outputs, same_bits, weights
from tests.editing.methods.test_methods import last_of_subject, whole
from tests.tiny import tiny_model

MORE: dict[str, Any] = {**QUICK, "layer": 1, "weight": 1e-6}
OTHER = Fact("w7", "w41")


@pytest.fixture
def parts():
    """K, R, K_p and C, in float64."""
    torch.manual_seed(4)
    keys, change, earlier, text = (torch.randn(*shape).double() for shape in ((3, 12), (3, 5), (4, 12), (12, 12)))
    return keys, change, earlier, text @ torch.diag(torch.logspace(-3, 1, 12).double()) @ text.T


@pytest.mark.parametrize("weight", [1e-2, 10.0])
def test_the_change_is_the_published_formula(parts, weight):
    """(P (K_p K_pᵀ + K Kᵀ) + λI)⁻¹ P K Rᵀ, keys as columns, by the full matrices."""
    keys, change, earlier, c = parts
    space, largest = null_space(c, 0.1)
    values, vectors = torch.linalg.eigh(c)
    small = vectors[:, values <= largest]
    assert (
        0 < small.shape[1] < 12
        and values[: small.shape[1]].sum() <= 0.1 * c.trace() < values[: small.shape[1] + 1].sum()
    )
    p = small @ small.T
    expected = torch.linalg.solve(
        p @ (earlier.T @ earlier + keys.T @ keys) + weight * torch.eye(12).double(), p @ keys.T @ change
    )
    assert torch.allclose(projected_change(space, keys, change, earlier, weight), expected, atol=1e-9)


def test_protected_directions_are_not_changed_at_all(parts):
    keys, change, earlier, c = parts
    space, _ = null_space(c, 0.1)
    delta = projected_change(space, keys, change, earlier, 1e-3)
    protected = torch.linalg.eigh(c).eigenvectors[:, space.shape[1] :]
    assert (protected.T @ delta).abs().max() < 1e-9 < delta.abs().max()


def test_with_a_vanishing_weight_requests_are_met_and_earlier_edits_stay(parts):
    keys, change, earlier, _ = parts
    delta = projected_change(None, keys, change, earlier, 1e-9)
    assert torch.allclose(keys @ delta, change, atol=1e-6) and (earlier @ delta).abs().max() < 1e-6
    assert (earlier @ projected_change(None, keys, change, earlier[:0], 1e-9)).abs().max() > 1e-2


def test_without_text_and_earlier_edits_it_is_memit_with_c_the_identity(parts):
    keys, change, earlier, _ = parts
    expected = spread_change(torch.eye(12).double(), keys, change, 0.7, 0.0)
    assert torch.allclose(projected_change(None, keys, change, earlier[:0], 0.7), expected, atol=1e-9)
    assert null_space(torch.eye(12), 1.0)[0].shape == (12, 12)


def test_where_nothing_is_small_enough_nothing_is_changed(parts):
    keys, change, earlier, _ = parts
    space, largest = null_space(torch.eye(12), 0.01)
    assert space.shape == (12, 0) and largest is None
    assert not projected_change(space, keys, change, earlier, 1.0).any()


# --- in a model ---


def test_an_edit_on_top_of_another_is_the_formula_with_its_keys(model):
    """One layer: K, R and K_p read from the model, C of its text."""
    before = weights(model)
    more = {**MORE, "spread": 1, "share": 0.2, "weight": 0.3}
    first = edit(model, FACT, "w50", "alphaedit", **more)
    with first:
        c = covariance(model, 1).matrix.double()  # of the model as it is then
        second = edit(model, OTHER, "w51", "alphaedit", **more)
        rows = make_rows(model, [(Fact("w7", "w51"), TEMPLATE)])
        place = read_places(model.network, rows.tokens, rows.subjects, [1])[1]
    assert second.keys is not None and second.values is not None
    space, largest = null_space(c, 0.2)
    p, k, k_p = space @ space.T, second.kept[1].double().T, first.kept[1].double().T
    sides = p @ k @ (second.values.double() - place.after.double())
    expected = torch.linalg.solve(p @ (k_p @ k_p.T + k @ k.T) + 0.3 * torch.eye(48).double(), sides)
    assert torch.allclose(second.deltas[1].double(), expected, atol=1e-4)
    assert torch.equal(second.keys, second.kept[1]) and same_bits(model, before)
    assert second.details["earlier_keys"] == 1 and first.details["earlier_keys"] == 0
    assert second.details["null_space"] == {
        1: {"dimensions": space.shape[1], "of": 48, "largest": pytest.approx(largest)}
    }


@pytest.mark.parametrize("below", ["alphaedit", "memit", "rome"])
def test_an_edit_leaves_the_earlier_one_s_keys_to_it_whoever_made_it(model, below):
    own: dict[str, Any] = {"rome": {"covariance": "identity"}}.get(below, {"spread": 1, "covariance": "identity"})
    first = edit(model, FACT, "w50", below, layer=1, **own, **QUICK)
    with first:
        alone = model.network.layers[1].W_out.clone()
        second = edit(model, OTHER, "w51", "alphaedit", spread=1, covariance="identity", **MORE)
        key, own_key = first.kept[1], second.kept[1]
        with second:
            changed = model.network.layers[1].W_out
            moved = (key @ changed - key @ alone).norm()
            assert moved < 1e-3 * (own_key @ changed - own_key @ alone).norm()


def test_what_text_never_wakes_is_all_that_changes_on_a_model_of_relus(tiny):
    """OPT's dead units are an exact null space: the outputs over the text stay as they were."""
    model = tiny("opt")
    matrix = covariance(model, 1).matrix
    made = edit(model, FACT, "w50", "alphaedit", share=1e-9, spread=1, **{**MORE, "template": "w80 {}"})
    assert made.details["null_space"][1]["dimensions"] >= (matrix.diagonal() == 0).sum() > 0
    root = torch.linalg.cholesky(matrix.double() + 1e-12 * torch.eye(len(matrix)))
    lost = (root.T @ made.deltas[1].double()).norm() / made.deltas[1].double().norm()
    assert lost < 1e-4 * root.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_every_request_is_brought_to_its_stream(name):
    """Over two layers, with a vanishing λ and no text; the Hugging Face model's own keys are what is met."""
    model = tiny_model(name, seed=3)
    facts, targets = [FACT, OTHER], ["w50", "w51 w52"]
    before = weights(model)
    made = edit(model, facts, targets, "alphaedit", covariance="identity", spread=2, **{**MORE, "prefixes": 0})
    assert made.layers == (0, 1) and same_bits(model, before) and made.values is not None
    for i, fact in enumerate(facts):
        tokens, last = whole(model, TEMPLATE, fact.subject, ""), last_of_subject(model, TEMPLATE, fact.subject)
        rows = make_rows(model, [(Fact(fact.subject, "w50"), TEMPLATE)])
        apart = (read_places(model.network, rows.tokens, rows.subjects, [1])[1].after - made.values[i]).norm()
        with made:
            key = keys_and_outputs(model, 1, tokens)[0].reshape(len(tokens[0]), -1)[last]
            assert torch.allclose(key, made.kept[1][i], atol=1e-4)
            after = read_places(model.network, rows.tokens, rows.subjects, [1])[1].after
            assert (after - made.values[i]).norm() < 0.02 * apart


def test_the_null_space_is_that_of_the_asked_share(model):
    few, many = (
        edit(model, FACT, "w50", "alphaedit", spread=1, share=share, **MORE).details["null_space"][1]
        for share in (0.05, 0.5)
    )
    assert few["dimensions"] < many["dimensions"] and few["largest"] < many["largest"]


def test_the_null_space_is_of_the_text_that_this_model_reads():
    """The same weights may read less, so that their covariance is of other texts."""
    long, short = (tiny_model("llama", max_position_embeddings=n) for n in (64, 8))
    assert long.digest == short.digest
    for model in (long, short):
        space, _ = _null_space(model, 1, AlphaSettings(spread=1), 1, 0, False)
        own, _ = null_space(covariance(model, 1).matrix, AlphaSettings().share)
        assert torch.allclose(space @ space.T, own @ own.T, atol=1e-6)
