"""A model that needs the format of its demonstrations, and tiny models with tasks of some shots."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kcwb.models.loading import load_model
from kcwb.studies.in_context.study import in_context
from kcwb.tasks.relations import Fact, Relation
from kcwb.tasks.shots import make_shots
from tests import handmade as H
from tests.tasks import known_relation, relation_of
from tests.tiny import tiny_model

N_HEADS, SIZE = 8, 128
FORMAT = ["a1.h3", "a2.h5"]
DECOYS = ["a1.h0", "a2.h2"]


def format_model():
    """A model that knows two objects of every subject and learns from demonstrations which of them is asked for.

    GPT-2, three layers of eight heads. a0.h1 copies both objects, a capital and a stronger language, from the last
    subject to END ("is"): its key reads the subject's flag and how near it is, by a cosine of positions. So without a
    shot the language is said, and the capital comes second. Capitals in the context hold a flag; a1.h3 and a2.h5
    attend to it from END and raise *all* capitals; either alone is enough, without both the language is said again.
    a1.h0 and a2.h2 are decoys: they attend alike and write where nobody reads.
    """
    shape = (SIZE, SIZE // N_HEADS)
    at = H._channels(
        SIZE, knows=16, says=16, unread=16, own=5, subject=1, end=1, capital=1, place=2, constant=2, filler=2
    )
    subjects, capitals, languages = (
        [f"{letter}{i}" for i in range(n)] for letter, n in (("s", 36), ("c", 8), ("l", 8))
    )
    fillers = [f"x{i}" for i in range(12)]
    words = ["is", *subjects, *capitals, *languages, *fillers]
    tokens = {word: i for i, word in enumerate(H._vocabulary(words))}
    module = H._gpt2(len(tokens), n_layers=3, n_heads=N_HEADS, at=at, size=SIZE)
    for weights in map(H._block, H._blocks(module)):
        for weight in weights:
            weight *= 0.3  # there are many distractors here
    n_ctx = 32
    module.config.n_positions = n_ctx
    module.transformer.wpe = torch.nn.Embedding(n_ctx, SIZE)
    embedding, places = torch.zeros(len(tokens), SIZE), torch.zeros(n_ctx, SIZE)
    angle = math.pi / n_ctx * torch.arange(n_ctx)
    places[:, at["place"]] = torch.stack([angle.cos(), angle.sin()], 1)
    embedding[tokens["is"], at["end"]] = 1.0
    for i, word in enumerate(subjects):
        embedding[tokens[word], at["subject"]] = 1.0
        embedding[tokens[word], at["knows"][i % 8]] = 0.8
        embedding[tokens[word], at["knows"][8 + (i + 3) % 8]] = 1.0
    for word in capitals:
        embedding[tokens[word], at["capital"]] = 1.0
    embedding[:, at["own"]] = 0.15 * torch.randn(len(tokens), 5)

    def sharp(score: float) -> float:
        return math.sqrt(score * math.sqrt(shape[1]))

    near = H._map(shape, at["place"], [1, 2], sharp(120.0))
    mover: dict[str, Tensor] = {
        "q": H._map(shape, at["end"], [0], sharp(8.0)) + near,
        "k": H._map(shape, at["subject"], [0], sharp(8.0)) + near,
        "v": H._map(shape, at["knows"], range(16)),
        "o": H._map(shape, at["says"], range(16)).T,
    }
    H._write_head(module, 0, 1, **mover)
    raises = torch.zeros(shape[1], SIZE)
    raises[0, at["says"][:8]] = 0.4
    reader: dict[str, Tensor] = {
        "q": H._map(shape, at["end"], [0], sharp(6.0)),
        "k": H._map(shape, at["capital"], [0], sharp(6.0)),
        "v": H._map(shape, at["capital"], [0]),
    }
    unread = torch.zeros_like(raises)
    unread[0, at["unread"]] = 0.4
    for layer, head, out in ((1, 3, raises), (2, 5, raises), (1, 0, unread), (2, 2, unread)):
        H._write_head(module, layer, head, **reader, o=out)
    says = [tokens[word] for word in [*capitals, *languages]]
    H._write_ends(module, at, embedding, says=says, strength=7.0, places=places)
    facts = tuple(Fact(word, capitals[i % 8]) for i, word in enumerate(subjects))
    relation = Relation("capital", "handmade", "word", "word", False, ("{} is",), ("{} is",), facts)
    others = [
        Relation(f"filler {j}", "handmade", "word", "word", False, ("{} x0",), ("{} x0",),
                 tuple(Fact(f"x{i}", f"x{i + j}") for i in range(1, 7)))
        for j in range(1, 4)
    ]  # fmt: skip
    return load_model(module, H._tokenizer(words), device="cpu"), relation, others


@pytest.fixture(scope="module")
def planted():
    return format_model()


def study(planted, **more):
    model, relation, others = planted
    size = {"edges": 10, "steps": 2, "resamples": 30, "n": 8, "n_test": 16}
    return in_context(model, relation, 3, unrelated=others, progress=False, **{**size, **more})


@pytest.fixture(scope="module")
def found(planted):
    return study(planted, beside=[(3, "shuffled"), (3, "unrelated")])


@pytest.fixture(scope="module")
def made():
    """make("llama"): a tiny model, and a task of it."""
    known = {}

    def make(name: str):
        if name not in known:
            model = tiny_model(name)
            relation = replace(known_relation(model, 24), prompt_templates=("w1 {} w2",))
            known[name] = model, make_shots(model, relation, 2, n=4, n_test=6, sets=2, unrelated=[_filler()])
        return known[name]

    return make


def _filler() -> Relation:
    return replace(
        relation_of([Fact(f"u{i}", f"v{i}") for i in range(6)]), name="filler", prompt_templates=("u {} is",)
    )
