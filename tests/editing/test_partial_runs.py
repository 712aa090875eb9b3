"""Running only what a change reaches gives what running everything gives."""

from __future__ import annotations

import pytest
import torch

from kcwb.editing.partial_runs import answer_logits, answer_nll, make_rows, make_tail, read_places
from kcwb.errors import DataError
from kcwb.tasks.relations import Fact
from tests.editing.conftest import added, keys_and_outputs
from tests.tasks import prompt_ids

ASKED = [
    (Fact("w5 w6", "w40 w7 w8"), "w80 {} w81 w82"),
    (Fact("w9", "w41"), "{} w81"),
    (Fact("w1 w2 w3", "w42 w9"), "w70 w71 w72 w73 {} w81"),
    (Fact("w30", "w43"), "w85 w86 {}"),
]
ARCHITECTURES = ["llama", "gpt2", "neox", "neox-sequential", "opt", "mistral-window"]


def alone(model, asked) -> list[tuple[torch.Tensor, int, list[int]]]:
    """Per prompt its tokens with the answer's but the last, the subject's last position, the answer's tokens."""
    rows = []
    for fact, template in asked:
        prompt, answer = prompt_ids(model, template.replace("{}", fact.subject)), prompt_ids(model, fact.object)
        before, bos = template.index("{}"), int(model.prepend_bos)
        last = len(template[:before].split()) + len(fact.subject.split()) - 1 + bos
        answer = answer[bos:]
        rows.append((torch.tensor([prompt + answer[:-1]]), last, answer))
    return rows


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_change_at_the_subject_gives_the_whole_models_logits(tiny, name, layer):
    model = tiny(name)
    rows = make_rows(model, ASKED)
    tail = make_tail(model.network, rows, layer, rows.subjects)
    change = torch.zeros_like(tail.after)
    change[:, 0] = torch.randn(len(ASKED), model.network.d_model)
    logits = answer_logits(model.network, tail, tail.run(change), rows)
    for n, (tokens, last, answer) in enumerate(alone(model, ASKED)):
        assert int(rows.subjects[n]) == last
        with added(model, layer, last, change[n, 0]):
            expected = model.logits(tokens)[0, -len(answer) :]
        assert torch.allclose(logits[n, : len(answer)], expected, atol=2e-4)
        nll = -expected.log_softmax(-1)[range(len(answer)), answer].mean()
        assert answer_nll(logits, rows)[n] == pytest.approx(float(nll), abs=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_and_outputs_are_the_models_own(tiny, name):
    model = tiny(name)
    rows = make_rows(model, ASKED)
    places = read_places(model.network, rows.tokens, rows.subjects, [0, 1])
    for n, (tokens, last, _) in enumerate(alone(model, ASKED)):
        for layer in (0, 1):
            key, output = keys_and_outputs(model, layer, tokens)
            assert torch.allclose(places[layer].key[n], key.reshape(-1, key.shape[-1])[last], atol=1e-4)
            assert torch.allclose(places[layer].output[n], output.reshape(-1, output.shape[-1])[last], atol=1e-4)


def test_changed_weights_are_read_as_if_they_were_in_the_model(tiny):
    model = tiny("llama")
    rows = make_rows(model, ASKED)
    delta = 0.1 * torch.randn_like(model.network.layers[0].W_out)
    found = read_places(model.network, rows.tokens, rows.subjects, [0, 1], {0: delta})
    weight, before = model.network.layers[0].W_out, model.network.layers[0].W_out.clone()
    weight.add_(delta)
    try:
        expected = read_places(model.network, rows.tokens, rows.subjects, [0, 1])
    finally:
        weight.copy_(before)
    for layer in (0, 1):
        for one, other in zip(found[layer], expected[layer], strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_gradients_reach_the_change(tiny):
    """Against a difference quotient in double precision of the same loss by the Hugging Face model."""
    model = tiny("llama")
    rows = make_rows(model, ASKED[:1])
    tail = make_tail(model.network, rows, 0, rows.subjects)
    width = tail.positions.shape[1]
    delta = (0.1 * torch.randn(model.network.d_model)).requires_grad_()
    change = torch.nn.functional.pad(delta[None, None], (0, 0, 0, width - 1))
    loss = answer_nll(answer_logits(model.network, tail, tail.run(change), rows), rows).sum()
    (gradient,) = torch.autograd.grad(loss, delta)
    (tokens, last, answer) = alone(model, ASKED[:1])[0]
    direction = torch.randn(model.network.d_model)

    def at(step: float) -> float:
        with added(model, 0, last, delta.detach() + step * direction):
            logs = model.logits(tokens)[0, -len(answer) :].double().log_softmax(-1)
        return -float(logs[range(len(answer)), answer].mean())

    assert float(gradient @ direction) == pytest.approx((at(1e-2) - at(-1e-2)) / 2e-2, rel=2e-2, abs=2e-3)


def test_a_prompt_beyond_the_context_is_refused(tiny):
    model = tiny("llama")
    with pytest.raises(DataError, match="64"):
        make_rows(model, [(Fact("w1", "w2"), "{} " + " ".join(["w3"] * 70))])
