"""A transformer that takes two hops by hand, and a composition that it answers; see `tests.handmade`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kcwb.models.loading import Model, load_model
from kcwb.tasks.compose import Composition, compose
from kcwb.tasks.relations import Fact
from tests import handmade as by_hand

_FILLERS = 400


class TwoHop(NamedTuple):
    """A model, what it is asked, and the true edges of each question under mean ablation."""

    model: Model
    composition: Composition
    edges: dict[str, set[str]]


def two_hop_model() -> TwoHop:
    """Sixteen subjects in eight places with a capital each. Llama, three layers of four heads.

    - a0.h1 tells a subject that the word "place" came before it;
    - m0 turns a subject that was told so into its place (`place`), which the unembedding reads, too;
    - a1.h2 carries `place` from subject, or from the place's own name, to END, into `carried`;
    - a1.h1 tells END that the word "capital" came before it;
    - m1 turns `carried` into the capital if END was told so, else into the place's name.

    So "the capital of s3 is" has no answer: without the word "place" there is no bridge. Without "capital" the place
    is the answer. Filler words have logits between -3 and 3 of their own, so that a token that nothing speaks for ranks
    in the middle.
    """
    shape = (64, 16)
    at = by_hand._channels(
        64, name=16, flags=4, told=1, place=8, carried=8, asked=1, says=16, own=4, constant=2, filler=2
    )
    entity, end, place, capital = at["flags"]
    subjects, places, capitals = [f"s{i}" for i in range(16)], [f"b{i}" for i in range(8)], [f"o{i}" for i in range(8)]
    fillers = [f"f{i}" for i in range(_FILLERS)]
    words = ["the", "of", "is", "capital", "place", *subjects, *places, *capitals, *fillers]
    tokens = {word: i for i, word in enumerate(by_hand._vocabulary(words))}
    module = by_hand._llama(len(tokens), n_layers=3, n_heads=4, at=at, size=shape[0])
    for weights in map(by_hand._block, by_hand._blocks(module)):
        for weight in weights:
            weight *= 0.3
    embedding = torch.zeros(len(tokens), shape[0])
    for word, flag in (("is", end), ("place", place), ("capital", capital)):
        embedding[tokens[word], flag] = 1.0
    for i, word in enumerate(subjects):
        embedding[tokens[word], [entity, at["name"][i]]] = 1.0
    for i, word in enumerate(places):
        embedding[tokens[word], [entity, at["place"][i]]] = 1.0
    embedding[:, at["own"]] = 0.1 * torch.randn(len(tokens), 4)
    slow, strength = shape[1] // 2 - 1, math.sqrt(5.0 * math.sqrt(shape[1]))

    def head(asks: int, answers: int, reads: list[int], writes: list[int]) -> dict[str, torch.Tensor]:
        return {
            "q": by_hand._map(shape, [asks], [slow], strength),
            "k": by_hand._map(shape, [answers], [slow], strength),
            "v": by_hand._map(shape, reads, range(len(reads))),
            "o": by_hand._map(shape, writes, range(len(writes))).T,
        }

    by_hand._write_head(module, 0, 1, **head(entity, place, [place], at["told"]))
    by_hand._write_head(module, 1, 2, **head(end, entity, at["place"], at["carried"]))
    by_hand._write_head(module, 1, 1, **head(end, capital, [capital], at["asked"]))
    one = at["constant"][0]
    lookups = [(at["name"][i], at["told"][0], 1.0, -1.5, at["place"][i % 8]) for i in range(16)]
    answers = [(at["carried"][i], at["asked"][0], 1.0, -1.5, at["says"][8 + i]) for i in range(8)]
    answers += [(at["carried"][i], at["asked"][0], -1.0, -0.5, at["says"][i]) for i in range(8)]
    with torch.no_grad():
        for layer, neurons in ((0, lookups), (1, answers)):
            mlp = module.model.layers[layer].mlp
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight):
                weight.zero_()
            for i, (reads, condition, sign, bias, writes) in enumerate(neurons):
                mlp.gate_proj.weight[i, reads] = 8.0
                mlp.gate_proj.weight[i, condition] = 8.0 * sign
                mlp.gate_proj.weight[i, one] = 8.0 * bias / by_hand._CONSTANT
                mlp.up_proj.weight[i, one] = 1 / by_hand._CONSTANT
                mlp.down_proj.weight[writes, i] = 1 / 3.5
    by_hand._write_ends(module, at, embedding, says=[tokens[word] for word in (*places, *capitals)], strength=7.0)
    unembedding = module.get_output_embeddings().weight
    with torch.no_grad():
        for i, word in enumerate(places):
            unembedding[tokens[word], at["place"][i]] = 7.0
        unembedding[[tokens[word] for word in fillers], one] = torch.linspace(-3, 3, _FILLERS) / by_hand._CONSTANT
    first = by_hand._relation(
        "place", "the place of {} is", [Fact(word, places[i % 8]) for i, word in enumerate(subjects)]
    )
    second = by_hand._relation(
        "capital", "the capital of {} is", [Fact(*pair) for pair in zip(places, capitals, strict=True)]
    )
    composition = compose(first, second, wordings=[("the place of {}", "the capital of {} is")])
    both = {"a1.h2->m1", "m1->logits"}
    lookup = {"input->m0", "m0->a1.h2<v>", *both}
    return TwoHop(
        load_model(module, by_hand._tokenizer(words), device="cpu"),
        composition,
        {"hop 1": lookup, "hop 2": {"input->a1.h2<v>", *both}, "two-hop": lookup},
    )
