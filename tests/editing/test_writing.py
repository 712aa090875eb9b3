"""What a model writes is by its own logits alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcwb.editing.covariance import sample_texts
from kcwb.editing.scores import generate
from kcwb.editing.writing import continuations
from kcwb.errors import DataError, SettingError
from tests.tasks import prompt_ids
from tests.tiny import ARCHITECTURES, tiny_model


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_texts_of_any_length_are_continued_together_as_each_alone(tiny, name):
    model = tiny(name)
    texts = ["w1 w2", "w3", "w4 w5 w6 w7 w8", "w9 w10", "w11 w12 w13"]
    assert generate(model, texts, 6) == [greedy(model, text, 6) for text in texts]
    assert generate(model, [], 6) == []


@pytest.mark.model
def test_the_built_in_model_writes_what_hugging_face_has_it_write(smollm2):
    texts = ["The capital of France is", "The opposite of hot is", "The Colosseum is in the country of"]
    module: Any = smollm2.bridge.original_model
    expected = []
    for text in texts:
        ids = torch.tensor([prompt_ids(smollm2, text)])
        found = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        expected.append(smollm2.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    assert continuations(smollm2, texts, 6) == expected and "Paris" in expected[0]


def test_texts_stop_where_they_are_told_each_at_its_own_place(tiny):
    model = tiny("gpt2")
    texts = ["w1 w2", "w3", "w4 w5 w6", "w7", "w8 w9"]
    whole = [greedy(model, text, 8).split() for text in texts]
    stop = next(text[2] for text in whole if len(text) > 4 and not any(text[2] in word for word in text[:2]))
    ends = [next((i + 1 for i, word in enumerate(text) if stop in word), len(text)) for text in whole]
    expected = [text[:end] for text, end in zip(whole, ends, strict=True)]
    assert 3 in ends and expected != whole and max(ends) > 3
    assert [text.split() for text in continuations(model, texts, 8, [stop])] == expected


def test_texts_near_the_context_s_end_are_continued_to_it_and_the_others_are_not_cut():
    model = tiny_model("gpt2", n_positions=8)
    texts = ["w1 w2", "w1 w2 w3 w4 w5 w6", "w3"]
    lengths = [len(prompt_ids(model, text)) for text in texts]
    expected = [greedy(model, text, min(4, 8 - n)) for text, n in zip(texts, lengths, strict=True)]
    assert continuations(model, texts, 4) == expected


def test_a_text_ends_with_the_context():
    model = tiny_model("gpt2", n_positions=8)
    text = "w1 w2 w3 w4"
    room = 8 - len(prompt_ids(model, text))
    assert generate(model, text, 50) == greedy(model, text, room)
    with pytest.raises(DataError, match="reads 8"):
        generate(model, " ".join(["w1"] * 9), 3)


def test_nothing_goes_on_after_no_token_or_for_no_tokens(tiny):
    with pytest.raises(DataError, match="has no token"):
        generate(tiny("llama"), "")
    with pytest.raises(SettingError, match="tokens=0"):
        generate(tiny("llama"), "w1", 0)
