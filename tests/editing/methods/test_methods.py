"""The editors, against the Hugging Face model, a plain training loop, and direct solutions of what they minimise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcwb.editing.covariance import covariance
from kcwb.editing.edit import EditError, edit
from kcwb.editing.methods.memit import spread_change
from kcwb.editing.methods.rome import ESSENCE, context_templates, rank_one
from kcwb.errors import DataError, SettingError
from kcwb.models.loading import load_model
from kcwb.tasks.relations import Fact
from tests.editing.conftest import FACT, QUICK, TEMPLATE, added, keys_and_outputs, same_bits, weights
from tests.tasks import prompt_ids
from tests.tiny import ARCHITECTURES, POST_NORM, tiny_hf, tiny_model, tokenizer

TUNING = {key: value for key, value in QUICK.items() if key != "prefixes"}
SUBJECT_END = 2  # of "w80 w5 w6 w81 w82"


def whole(model, template: str, subject: str, answer: str) -> torch.Tensor:
    return torch.tensor([prompt_ids(model, f"{template.replace('{}', subject)} {answer}")])


def last_of_subject(model, template: str, subject: str) -> int:
    return len(prompt_ids(model, template[: template.index("{}")] + subject)) - 1


def loss_of(model, text: str, answer: str) -> float:
    """Of the answer's tokens by the Hugging Face model as it is, nats per token."""
    ids = prompt_ids(model, f"{text} {answer}")
    logs, own = model.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1), len(answer.split())
    return -float(logs[-own:][range(own), ids[-own:]].mean())


# --- all of them ---


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "ft_m", "ft_l"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt"])
def test_an_edit_s_loss_is_that_of_the_edited_weights(tiny, name, method):
    """On the prompt itself and over those with prefixes, the worst of several requests; `bound` judges the first."""
    model, several = tiny(name), method in ("memit", "alphaedit")
    facts, targets = [FACT, Fact("w7", "w41")][: 1 + several], ["w50 w51", "w52"][: 1 + several]
    more: dict[str, Any] = {"covariance": "identity", **QUICK} if method in ("rome", "memit", "alphaedit") else TUNING
    before, contexts = weights(model), context_templates(model, TEMPLATE, 3, 0)[1:]
    made = edit(model, facts, targets, method, layer=0, **more)
    with made:
        asked = list(zip(facts, targets, strict=True))
        own = [loss_of(model, TEMPLATE.replace("{}", fact.subject), target) for fact, target in asked]
        prefixed = [
            sum(loss_of(model, text.replace("{}", fact.subject), target) for text in contexts) / len(contexts)
            for fact, target in asked
        ]
    assert same_bits(model, before)
    assert made.nll == pytest.approx(max(own), abs=1e-3)
    if method in ("rome", "memit", "alphaedit"):
        assert made.nll_prefixed == pytest.approx(max(prefixed), abs=1e-3)
    else:
        assert made.nll_prefixed is None
    ends = made.losses.groupby("request")["loss"].last() if several else made.losses["loss"].tail(1)
    assert made.objective == ends.max()
    taken = edit(model, facts, targets, method, layer=0, **{**more, "bound": made.nll + 1e-3})
    assert taken.nll == pytest.approx(made.nll, abs=1e-4)
    with pytest.raises(EditError, match="did not take"):
        edit(model, facts, targets, method, layer=0, **{**more, "bound": made.nll - 1e-3})
    assert same_bits(model, before)


REQUESTS = {
    "several tokens": (FACT, "w50 w51 w52", TEMPLATE),
    "subject is the whole prompt": (FACT, "w50", "{}"),
    "subject first": (FACT, "w50", "{} w81"),
    "subject last": (FACT, "w50", "w80 {}"),
}


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "ft_m", "ft_l"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in POST_NORM])
def test_every_family_takes_every_kind_of_request(tiny, name, method):
    model = tiny(name)
    before, digest = weights(model), model.digest
    own: dict[str, Any] = {"prefixes": 0} if method in ("rome", "memit", "alphaedit") else {}
    for fact, target, template in REQUESTS.values():
        more = {**own, "steps": 1, "bound": float("inf"), "progress": False, "template": template}
        made = edit(model, fact, target, method, **more)
        assert all(not torch.equal(delta, 0 * delta) for delta in made.deltas.values())
        with made:
            assert made.nll == pytest.approx(loss_of(model, template.replace("{}", fact.subject), target), abs=1e-3)
        assert same_bits(model, before) and model.digest == digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_half_precision_is_edited_and_undone_too(name, dtype):
    model = load_model(tiny_hf(name, seed=3).to(dtype), tokenizer(), device="cpu")
    before = weights(model)
    for method in ("rome", "memit", "alphaedit", "ft_m", "ft_l"):
        more = QUICK if method in ("rome", "memit", "alphaedit") else TUNING
        made = edit(model, FACT, "w50", method, layer=0, **more)
        with made:
            assert made.nll == pytest.approx(loss_of(model, TEMPLATE.replace("{}", FACT.subject), "w50"), rel=0.03)
            assert model.network.layers[0].W_out.dtype == dtype
        assert same_bits(model, before)


@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "ft_m"])
def test_a_change_is_found_in_float32_and_rounded_once_into_half_precision(method):
    """And the edit and the model's own record say what rounding costs."""
    model = load_model(tiny_hf("llama", seed=3).bfloat16(), tokenizer(), device="cpu")
    made = edit(model, FACT, "w50", method, layer=1, **(QUICK if method != "ft_m" else TUNING))
    lost = whole_change = 0.0
    for layer, delta in made.deltas.items():
        assert delta.dtype == torch.float32
        before = model.network.layers[layer].W_out.clone()
        expected = (before.float() + delta).bfloat16()
        with made:
            assert torch.equal(model.network.layers[layer].W_out, expected)
            assert model.edits[0]["rounding"] == made.rounding
        lost += float((expected.double() - before.double() - delta.double()).square().sum())
        whole_change += float(delta.double().square().sum())
    assert made.rounding == pytest.approx((lost / whole_change) ** 0.5) and made.rounding > 1e-3
    if method == "rome":  # k* is mapped to v* by the unrounded weights
        assert made.keys is not None and made.values is not None
        layer = model.network.layers[1]
        assert torch.allclose(made.keys @ (layer.W_out.float() + made.deltas[1]), made.values, atol=1e-4)


def test_in_float32_rounding_costs_nearly_nothing(model):
    assert 0 < edit(model, FACT, "w50", layer=0, **QUICK).rounding < 1e-5


def test_the_decay_counts_in_float16_too_where_a_square_overflows():
    module = tiny_hf("gpt2", seed=3)
    torch.nn.init.constant_(module.transformer.h[0].mlp.c_proj.bias, 100.0)  # the norm of m is 566: its square is inf
    model = load_model(module.half(), tokenizer(), device="cpu")
    made = edit(model, FACT, "w50", layer=0, decay=0.5, kl=0.0, clamp=0.1, covariance="identity", **QUICK)
    for row in made.losses.iloc[1:].itertuples():
        assert row.loss - row.nll == pytest.approx(0.5 * row.norm**2, rel=0.05) and row.norm > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gptj"])
@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit"])
def test_prompts_that_do_not_fit_with_their_prefixes_are_refused_before_the_search(name, method, monkeypatch):
    context = {"n_positions": 8} if name in ("gpt2", "gptj") else {"max_position_embeddings": 8}
    model = load_model(tiny_hf(name, **context), tokenizer(), device="cpu")
    assert model.network.n_ctx == 8
    made = edit(model, FACT, "w50", method, layer=0, **{**QUICK, "prefixes": 0})
    assert made.nll_prefixed is None
    monkeypatch.setattr("kcwb.editing.methods.rome.optimise_delta", lambda *a, **b: pytest.fail("work was done"))
    with pytest.raises(DataError, match=r"reads 8.*take prefixes=0"):
        edit(model, FACT, "w50", method, layer=0, **QUICK)
    monkeypatch.setattr("kcwb.editing.methods.rome.sample_texts", lambda *a, **b: pytest.fail("work was done"))
    with pytest.raises(DataError, match="reads 8"):
        edit(model, FACT, "w50", method, layer=0, **{**QUICK, "template": "w1 w2 w3 w4 {} w5 w6 w7"})


# --- ROME ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("key", ["prompt", "mean"])
def test_the_edited_key_is_mapped_to_v(name, key):
    model = tiny_model(name, seed=3)
    made = edit(model, FACT, "w50 w51", "rome", layer=1, key=key, **QUICK)
    tokens, last = whole(model, TEMPLATE, FACT.subject, "w50"), last_of_subject(model, TEMPLATE, FACT.subject)
    assert made.values is not None and made.keys is not None
    with made:
        own, output = (value.reshape(-1, value.shape[-1]) for value in keys_and_outputs(model, 1, tokens))
        assert torch.allclose(model.network.mlp_output(1, own[last]), output[last], atol=1e-4)
        at = own[last] if key == "prompt" else made.keys[0]
        assert (model.network.mlp_output(1, at) - made.values[0]).abs().max() <= 1e-4
    assert (model.network.mlp_output(1, at) - made.values[0]).abs().max() > 1e-2  # not so without the edit


def test_the_closed_form_is_the_constrained_least_squares_solution():
    """min over W' of |W'K - V|^2 with W'k = v, V = WK: solved as one linear system of stationarity and constraint."""
    torch.manual_seed(1)
    keys, weight = torch.randn(5, 40).double(), torch.randn(3, 5).double()
    key, value = torch.randn(5).double(), torch.randn(3).double()
    c = keys @ keys.T
    # Stationarity: 2 W' C + m kᵀ = 2 V Kᵀ; constraint: W' k = v. Unknowns: W' row by row, and m.
    system = torch.zeros(6, 6).double()
    system[:5, :5], system[:5, 5], system[5, :5] = 2 * c, key, key
    sides = torch.cat([2 * c @ weight.T, value[None]])
    expected = torch.linalg.solve(system, sides)[:5]
    found = rank_one(torch.linalg.solve(c, key), key, value - weight @ key)
    assert torch.allclose(weight.T + found, expected, atol=1e-9)


def test_the_mean_key_stands_in_both_places_where_nothing_is_said(model):
    more = {"layer": 0, **QUICK}
    made, mean, prompt = (
        edit(model, FACT, "w50", **more),
        *(edit(model, FACT, "w50", key=key, **more) for key in ("mean", "prompt")),
    )
    assert torch.equal(made.deltas[0], mean.deltas[0]) and not torch.allclose(mean.deltas[0], prompt.deltas[0])
    assert made.parameters["key"] == "mean"


def test_rome_takes_the_direction_from_the_covariance_or_from_the_key(model):
    by_text = edit(model, FACT, "w50", "rome", layer=0, key="mean", ridge=0.1, **QUICK)
    by_key = edit(model, FACT, "w50", "rome", layer=0, key="mean", covariance="identity", **QUICK)
    assert by_text.keys is not None and by_key.keys is not None
    matrix = covariance(model, 0).matrix
    ridged = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(len(matrix))
    for made, direction in ((by_text, torch.linalg.solve(ridged, by_text.keys[0])), (by_key, by_key.keys[0])):
        left = torch.linalg.svd(made.deltas[0]).U[:, 0]
        assert torch.linalg.matrix_rank(made.deltas[0], rtol=1e-4) == 1
        assert abs(torch.nn.functional.cosine_similarity(left, direction, dim=0)) == pytest.approx(1, abs=1e-3)
    assert by_text.details["direction_agreement"] <= 1
    assert torch.equal(by_text.values, by_key.values)  # v* does not depend on C


def test_rome_s_loss_is_what_the_whole_model_says(model):
    """Loss, KL and norm of the last step, with δ added to the Hugging Face model prompt by prompt."""
    made = edit(model, FACT, "w50 w51", "rome", layer=0, clamp=1.5, decay=0.3, kl=0.7, **QUICK)
    first = keys_and_outputs(model, 0, whole(model, TEMPLATE, FACT.subject, ""))[1].reshape(-1, 32)
    m0 = first[last_of_subject(model, TEMPLATE, FACT.subject)]
    assert made.values is not None
    delta = made.values[0] - m0
    losses = []
    contexts = context_templates(model, TEMPLATE, 3, 0)
    assert len(set(contexts)) == 4 and contexts[0] == TEMPLATE
    for context in contexts:
        tokens = whole(model, context, FACT.subject, "w50")
        with added(model, 0, last_of_subject(model, context, FACT.subject), delta):
            logs = model.logits(tokens)[0, -2:].log_softmax(-1)
        answer = prompt_ids(model, "w50 w51")[-2:]
        losses.append(-float(logs[[0, 1], answer].mean()))
    tokens, last = whole(model, ESSENCE, FACT.subject, ""), last_of_subject(model, ESSENCE, FACT.subject)
    before = model.logits(tokens)[0, last].log_softmax(-1)
    with added(model, 0, last, delta):
        after = model.logits(tokens)[0, last].log_softmax(-1)
    kl, norm = float((after.exp() * (after - before)).sum()), float(delta.norm() / m0.norm())
    row = made.losses.iloc[-1]
    assert row["nll"] == pytest.approx(sum(losses) / 4, abs=1e-3) and made.objective == row["loss"]
    assert row["kl"] == pytest.approx(kl, abs=1e-3) and row["norm"] == pytest.approx(norm, abs=1e-4)
    assert row["loss"] == pytest.approx(row["nll"] + 0.7 * row["kl"] + 0.3 * row["norm"] ** 2, abs=1e-4)
    assert norm <= 1.5 + 1e-5
    assert made.losses["nll"].iloc[-1] < made.losses["nll"].iloc[0]


def test_the_decay_weighs_the_square_or_as_the_authors_have_it_the_norm(model):
    """`square` is (|δ| / |m|)², `norm` is |δ| / |m|²."""
    scale = keys_and_outputs(model, 0, whole(model, TEMPLATE, FACT.subject, ""))[1].reshape(-1, 32)
    size = float(scale[last_of_subject(model, TEMPLATE, FACT.subject)].norm())
    for penalty, decay in (("square", lambda share: share**2), ("norm", lambda share: share / size)):
        made = edit(model, FACT, "w50", layer=0, decay=0.7, kl=0.0, penalty=penalty, covariance="identity", **QUICK)
        for row in made.losses.itertuples():
            assert row.loss - row.nll == pytest.approx(0.7 * decay(row.norm), abs=1e-4)


# --- fine-tuning ---


@pytest.mark.parametrize("method", ["ft_m", "ft_l"])
@pytest.mark.parametrize("target", ["w50", "w50 w51 w52"])
def test_fine_tuning_is_a_plain_training_loop(method, target):
    model = tiny_model("llama", seed=3)
    made = edit(model, FACT, target, method, layer=0, clamp=1e-3, lr=4e-4, **TUNING)
    assert made.deltas[0].abs().max() <= 1e-3 + 1e-9
    prompt = prompt_ids(model, TEMPLATE.replace("{}", FACT.subject))
    answer = prompt_ids(model, target)[int(model.prepend_bos) :]
    tokens = torch.tensor([prompt + answer[:-1]])
    module: Any = model.bridge.original_model
    weight = module.model.layers[0].mlp.down_proj.weight
    start = weight.detach().clone()
    weight.requires_grad_(True)
    optimiser = torch.optim.Adam([weight], lr=4e-4)
    losses = []
    for number in range(5):
        logs = module(tokens).logits[0].log_softmax(-1)
        at = (
            range(len(prompt) - 1, len(prompt) - 1 + len(answer))
            if method == "ft_m"
            else [len(prompt) - 1] * len(answer)
        )
        loss = -logs[list(at), answer].mean()
        losses.append(float(loss.detach()))
        if number == 4:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            weight.copy_(start + (weight - start).clamp(-1e-3, 1e-3))
    assert made.losses["loss"].tolist() == pytest.approx(losses, abs=1e-3)
    assert torch.allclose(made.deltas[0], (weight.detach() - start).T, atol=2e-5)


# --- MEMIT ---


def test_memit_s_closed_form_is_ridge_regression():
    """argmin over D of λ tr(Dᵀ C D) + |Kᵀ D - R|^2, by a stacked least-squares solve."""
    torch.manual_seed(2)
    keys, change, factor = torch.randn(3, 6).double(), torch.randn(3, 4).double(), torch.randn(6, 6).double()
    c, weight = factor.T @ factor, 0.7
    stacked = torch.cat([keys, weight**0.5 * factor])
    sides = torch.cat([change, torch.zeros(6, 4).double()])
    expected = torch.linalg.lstsq(stacked, sides).solution
    assert torch.allclose(spread_change(c, keys, change, weight, 0.0), expected, atol=1e-9)
    raised = torch.linalg.cholesky(c + 0.2 * c.diagonal().mean() * torch.eye(6).double()).T
    expected = torch.linalg.lstsq(torch.cat([keys, weight**0.5 * raised]), sides).solution
    assert torch.allclose(spread_change(c, keys, change, weight, 0.2), expected, atol=1e-9)


def test_memit_does_with_units_that_no_text_wakes(tiny):
    """OPT's are ReLUs: some never fire, so that C is singular without a ridge."""
    model = tiny("opt")
    dead = covariance(model, 1).matrix.diagonal() == 0
    assert dead.any()
    more = {**QUICK, "template": "w80 {}"}  # at the last layer only END matters
    made = edit(model, FACT, "w50", "memit", layer=1, weight=1e-2, **more)
    assert made.losses["nll"].iloc[-1] < made.losses["nll"].iloc[0] and (made.deltas[1][dead] == 0).all()
    with pytest.raises(SettingError, match="larger ridge"):
        edit(model, FACT, "w50", "memit", layer=1, ridge=0.0, **more)


def test_memit_brings_every_request_to_its_stream(model):
    """With a vanishing λ nothing is held back, and the last layer closes what the others left."""
    facts = [FACT, Fact("w7", "w41"), Fact("w8 w9 w10", "w42")]
    targets = ["w50", "w51 w52", "w53"]
    before = weights(model)
    more = {**QUICK, "prefixes": 0}
    made = edit(model, facts, targets, "memit", layer=1, spread=2, weight=1e-6, **more)
    assert made.layers == (0, 1) and same_bits(model, before) and made.values is not None
    assert set(made.losses["request"]) == {0, 1, 2}

    def streams() -> torch.Tensor:
        found = []
        for fact in facts:
            tokens = whole(model, TEMPLATE, fact.subject, "")
            states = model.bridge.original_model.model(tokens, output_hidden_states=True)
            seen: list[torch.Tensor] = []
            handle = model.bridge.ln_final.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0])
            )
            model.logits(tokens)
            handle.remove()
            assert states is not None
            found.append(seen[0][0, last_of_subject(model, TEMPLATE, fact.subject)])
        return torch.stack(found)

    apart = (streams() - made.values).norm()
    with made:
        assert (streams() - made.values).norm() < 0.02 * apart
    assert same_bits(model, before)


def test_memit_of_identity_covariance_and_one_layer(model):
    made = edit(model, FACT, "w50", "memit", layer=1, spread=1, covariance="identity", **QUICK)
    assert made.layers == (1,) and torch.linalg.matrix_rank(made.deltas[1], rtol=1e-4) == 1
