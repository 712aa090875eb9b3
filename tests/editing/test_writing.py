"""What a model writes is by its own logits alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcwb.editing.covariance import sample_texts
from kcwb.editing.scores import generate
from kcwb.errors import DataError
from tests.tasks import prompt_ids
from tests.tiny import tiny_model


def greedy(model, text: str, tokens: int) -> str:
    """By the definition: the likeliest next token, again and again, until the text ends."""
    ids = prompt_ids(model, text)
    start, end = len(ids), model.bridge.original_model.generation_config.eos_token_id
    while len(ids) < start + tokens and ids[-1] != end:
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "neox"])
def test_settings_that_came_with_a_model_do_not_change_what_it_writes(tiny, name):
    """As Qwen2.5-Instruct's files bring a penalty on repetition."""
    model = tiny(name)
    module: Any = model.bridge.original_model
    expected, sampled = greedy(model, "w1 w2", 8), sample_texts(model, ["w1", "w2 w3"], 8, 0)
    assert generate(model, "w1 w2", 8) == expected
    for setting, value in (("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("min_p", 0.9), ("num_beams", 3)):
        before = getattr(module.generation_config, setting)
        setattr(module.generation_config, setting, value)
        try:
            assert generate(model, "w1 w2", 8) == expected, setting
            assert sample_texts(model, ["w1", "w2 w3"], 8, 0) == sampled, setting
            assert getattr(module.generation_config, setting) == value
        finally:
            setattr(module.generation_config, setting, before)


def test_a_text_ends_with_the_context():
    model = tiny_model("gpt2", n_positions=8)
    text = "w1 w2 w3 w4"
    room = 8 - len(prompt_ids(model, text))
    assert generate(model, text, 50) == greedy(model, text, room)
    with pytest.raises(DataError, match="reads 8"):
        generate(model, " ".join(["w1"] * 9), 3)
