"""Facts that a tiny random model knows, and what the Hugging Face model says of one unpadded prompt at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import tokenizers
import transformers
from torch import Tensor, tensor

from kcwb.models.loading import Model
from kcwb.tasks.ranks import WORST
from kcwb.tasks.relations import Fact, Relation

TEMPLATE = "w1 {} w2"


def relation_of(facts, *templates: str) -> Relation:
    """A relation in memory."""
    return Relation("tiny", "factual", "word", "word", False, ("{} w0",), templates or (TEMPLATE,), tuple(facts))


def known_relation(model: Model, n: int = 12, template: str = TEMPLATE, unknown: int = 0) -> Relation:
    """`n` facts with subjects of one to three tokens and objects of one or two; the last `unknown` rank worst.

    Objects of one name apart, each begins with a token of its own. What a model was asked once is kept.
    """
    kept, how = _KNOWN.setdefault(model, {}), (model.digest, n, template, unknown)
    if how not in kept:
        kept[how] = _known_relation(model, n, template, unknown)
    return kept[how]


_KNOWN: weakref.WeakKeyDictionary[Model, dict[tuple[object, ...], Relation]] = weakref.WeakKeyDictionary()


def _known_relation(model: Model, n: int, template: str, unknown: int) -> Relation:
    facts, long = [], {}
    for i in range(n):
        subject = " ".join([f"w{10 + i % 70}", f"w{3 + i // 70}", "w5"][: 1 + i % 3] if n <= 70 else [f"w{i}", "w5"])
        ranked = [token for token in _ranked(model, template, subject) if token >= 4]
        wanted = ranked[::-1] if i >= n - unknown else ranked[i % 5 :]
        first = next(token for token in wanted if long.setdefault(token, i % 4 == 1) == (i % 4 == 1))
        rest = [f"w{(first + 56) % 90}"] if i % 4 == 1 else []
        facts.append(Fact(subject, " ".join([f"w{first - 4}", *rest])))
    return relation_of(facts, template)


def _ranked(model: Model, template: str, subject: str) -> list[int]:
    prompt = prompt_ids(model, template.replace("{}", subject))
    return model.logits(tensor([prompt]))[0, -1].argsort(descending=True).tolist()


def prompt_ids(model: Model, text: str) -> list[int]:
    """Token ids of a text on its own, after BOS where the model wants one."""
    bos = [model.tokenizer.bos_token_id] if model.prepend_bos else []
    return bos + model.tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_ids(model: Model, fact: Fact) -> list[int]:
    """Token ids of an object; words are tokenised one by one, whatever they follow."""
    return model.tokenizer(fact.object, add_special_tokens=False)["input_ids"]


def unpadded_tokens(model: Model, fact: Fact, template: str = TEMPLATE) -> list[int]:
    """One prompt and its answer's tokens but the last."""
    return prompt_ids(model, template.replace("{}", fact.subject)) + answer_ids(model, fact)[:-1]


def unpadded_logits(model: Model, fact: Fact, template: str = TEMPLATE) -> Tensor:
    """The Hugging Face model's logits for each of a fact's answer tokens, `[A, V]`, the prompt being run on its own."""
    tokens = unpadded_tokens(model, fact, template)
    return model.logits(tensor([tokens]))[0, -len(answer_ids(model, fact)) :]


def slow_rank(model: Model, fact: Fact, objects: Iterable[str], template: str = TEMPLATE) -> int:
    """The product of the ranks of an object's tokens, a run for each, up to the first that tells it from all others."""
    prompt, answer, rank = prompt_ids(model, template.replace("{}", fact.subject)), answer_ids(model, fact), 1
    others = [answer_ids(model, Fact("", name)) for name in objects if name != fact.object]
    for i, token in enumerate(answer):
        logits = model.logits(tensor([prompt + answer[:i]]))[0, -1]
        rank *= sum(value >= float(logits[token]) for value in logits.tolist())
        if not any(other[: i + 1] == answer[: i + 1] for other in others):
            return min(rank, WORST)
    return WORST


def spaced_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every word is a token, and another one after a space, as with the tokenizers of most models."""
    names = [*(f"w{i}" for i in range(44)), *(f" w{i}" for i in range(44)), "\n"]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *names])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?w\d+|\n"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
