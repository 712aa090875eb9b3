"""Transformers whose weights are written by hand, so that every edge of their circuits is known.

Each function gives a model, a relation that the model answers, and the true edges. What they have in common:

- The residual stream has named channels (`says` is what the unembedding reads, say); a head or an MLP of the circuit
  reads and writes a few of them, with the strengths given in the code.
- **The norm is a known scale, whatever is cut.** The shared attention bias b_O of layer 0, which belongs to no edge,
  writes +C and -C into two channels that no distractor reads. C is large, so that every later norm divides by about
  the same number, and the norms' gains undo it: a norm gives what it reads. The heads of layer 0 read `input` alone,
  whose tokens all have the same length (two filler channels see to it).
- **Distractors**: all other heads and MLPs have small random weights: they read what the circuit reads and write into
  what it reads. A few are `decoys` on purpose: as strong as the circuit's heads, attending where they attend, but
  writing where nobody reads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from kcwb.models.loading import Model, load_model
from kcwb.tasks.relations import Fact, Relation

_SEED = 0  # of the distractors
_CONSTANT = 8.0  # C
_LENGTH = 2.0  # of every token's embedding
_NOISE = 0.12  # standard deviation of a distractor's weights


class Handmade(NamedTuple):
    """A model, the relation that it answers, and its circuit.

    Attributes
    ----------
    model, relation
        Loaded and self-checked; every fact is answered top-1 in template 0.
    edges
        The true edges, `sender->receiver`: those that it takes to answer when everything else is cut to zero.
    restored
        Ablation -> those of them that it does not take away, since they carry the same on every prompt (that END is
        END, which position this is) and the ablated value brings it back.
    """

    model: Model
    relation: Relation
    edges: frozenset[str]
    restored: dict[str, frozenset[str]]

    def truth(self, ablation: str) -> frozenset[str]:
        """The edges that are to be found under an ablation."""
        return self.edges - self.restored.get(ablation, frozenset())


def copying_head(
    score: float = 5.0, movers: tuple[int, ...] = (2,), n_layers: int = 2, decoys: bool = True
) -> Handmade:
    """A mover: a1.h2 copies the object's direction from the subject to END. GPT-2, layers of four heads.

    A subject's embedding holds its object's direction (`knows`) and a flag; END ("is") holds another flag. The query
    of a1.h2 reads END's flag and its key the subject's, with an attention score of `score` between them and 0
    elsewhere. Its value reads `knows`, its output goes to `says`, which the unembedding reads. Names have one or two
    tokens ("big s1"), of which the last is flagged. a0.h1 and a1.h0 are decoys: they attend and read alike and write
    to channels that nobody reads.

    With a score of 5 attention to the subject is about .95; with 15 it is 1 to six digits, and its derivative 0. With
    `movers=(1, 2)` a1.h1 is the same again: a backup.
    """
    n_objects, shape = 8, (32, 8)  # channels of the residual stream and of a head
    at = _channels(32, knows=8, says=8, unread=8, own=2, flags=2, constant=2, filler=2)
    subject, end = at["flags"]
    subjects, objects = [f"s{i}" for i in range(16)], [f"o{i}" for i in range(n_objects)]
    words = ["we", "think", "that", "the", "big", "is", *subjects, *objects]
    tokens = {word: i for i, word in enumerate(_vocabulary(words))}
    module = _gpt2(len(tokens), n_layers=n_layers, n_heads=4, at=at, size=shape[0])
    embedding = torch.zeros(len(tokens), 32)
    embedding[tokens["is"], end] = 1.0
    for i, word in enumerate(subjects):
        embedding[tokens[word], subject] = 1.0
        embedding[tokens[word], at["knows"][i % n_objects]] = 1.0
    embedding[:, at["own"]] = 0.3 * torch.randn(len(tokens), 2)  # what tells words apart; only distractors read it
    strength = math.sqrt(score * math.sqrt(shape[1]))
    mover: dict[str, Tensor] = {
        "q": _map(shape, [end], [0], strength),
        "k": _map(shape, [subject], [0], strength),
        "v": _map(shape, at["knows"], range(8)),
        "o": _map(shape, at["says"], range(8)).T,
    }
    for head in movers:
        _write_head(module, 1, head, **mover)
    for layer, head in ((0, 1), (1, 0)) if decoys else ():
        _write_head(module, layer, head, **{**mover, "o": _map(shape, at["unread"], range(8)).T})
    _write_ends(module, at, embedding, says=[tokens[word] for word in objects], strength=7.0)
    facts = [Fact(f"big {word}" if i % 3 == 0 else word, objects[i % n_objects]) for i, word in enumerate(subjects)]
    flags = frozenset(f"input->a1.h{head}<{letter}>" for head in movers for letter in "qk")
    content = frozenset(edge for head in movers for edge in (f"input->a1.h{head}<v>", f"a1.h{head}->logits"))
    return Handmade(
        load_model(module, _tokenizer(words), device="cpu"),
        _relation("copying", "we think that the {} is", facts),
        flags | content,
        {"mean": flags, "resample": flags},
    )


def induction() -> Handmade:
    """Two steps: "... b f ... b" is followed by f. GPT-2, two layers of five heads, learned positions.

    Every letter has a channel in `letter`, every position one in `place`. a0.h1 is the previous-token head: its query
    turns place t into t-1, its key is the place, so that it attends one back; it copies `letter` there into `before`.
    a1.h3 is the induction head: its query is the letter at END, its key what stands in `before` (composition by K),
    so that it attends to the letter that came after the same letter; it copies that `letter` into `says`. A full
    stop, which has no letter, stands first, since the first position has no position before it. Prompts have six or
    seven tokens and a mean counts positions from END, so that it mixes places and restores none of them. a1.h0 is a
    decoy: it attends as a1.h3 does and writes where nobody reads.
    """
    n_letters, shape = 8, (50, 10)
    at = _channels(50, letter=8, before=8, says=8, place=8, unread=8, own=6, constant=2, filler=2)
    letters = list("abcdefgh")
    words = [".", *letters]
    tokens = {word: i for i, word in enumerate(_vocabulary(words))}
    module = _gpt2(len(tokens), n_layers=2, n_heads=5, at=at, size=shape[0])
    embedding, places = torch.zeros(len(tokens), 50), torch.zeros(8, 50)
    for i, word in enumerate(letters):
        embedding[tokens[word], at["letter"][i]] = 1.0
    for place in range(8):
        places[place, at["place"][place]] = 1.0
    strength = math.sqrt(6.0 * math.sqrt(shape[1]))
    _write_head(
        module, 0, 1,
        q=_map(shape, at["place"][1:], range(7), strength),
        k=_map(shape, at["place"][:7], range(7), strength),
        v=_map(shape, at["letter"], range(8)),
        o=_map(shape, at["before"], range(8)).T,
    )  # fmt: skip
    inductor = {
        "q": _map(shape, at["letter"], range(8), strength),
        "k": _map(shape, at["before"], range(8), strength),
        "v": _map(shape, at["letter"], range(8)),
        "o": _map(shape, at["says"], range(8)).T,
    }
    _write_head(module, 1, 3, **inductor)
    _write_head(module, 1, 0, **{**inductor, "o": _map(shape, at["unread"], range(8)).T})
    _write_ends(module, at, embedding, says=[tokens[word] for word in letters], strength=7.0, places=places)
    draw = torch.Generator().manual_seed(0)
    facts = []
    for i in range(24):  # four or five different letters, the (i mod 3)-th of them once more
        order = [letters[j] for j in torch.randperm(n_letters, generator=draw)[: 4 + i % 2]]
        facts.append(Fact(" ".join([*order, order[i % 3]]), order[i % 3 + 1]))
    places_alone = frozenset({"input->a0.h1<q>", "input->a0.h1<k>"})
    carrying = {"input->a0.h1<v>", "a0.h1->a1.h3<k>", "input->a1.h3<q>", "input->a1.h3<v>", "a1.h3->logits"}
    return Handmade(
        load_model(module, _tokenizer(words), device="cpu"),
        _relation("induction", ". {}", facts),
        places_alone | carrying,
        {"resample": places_alone},
    )


def key_value_lookup() -> Handmade:
    """A lookup and a mover: m0 turns the subject into its object, a2.h1 carries it to END. Llama, 3 layers of 4 heads.

    A subject's embedding holds one channel of its own (`name`) and a flag; END ("is") holds another flag. Neuron i of
    m0 is gated by name i: SiLU(8 name_i), which is 8 for its subject and 0 for all else; its up-projection reads the
    constant, its down-projection writes direction `object` i mod 8. a2.h1 attends from END's flag to the subject's,
    on a channel that the rotary embedding hardly turns, and copies `object` into `says`. a1.h3 is a decoy: it carries
    the same to where nobody reads. The RMS norm of Llama divides by the length alone; its constant is in the bias of
    o_proj as in GPT-2's.
    """
    shape = (56, 14)
    at = _channels(56, name=16, object=8, says=8, unread=8, own=10, flags=2, constant=2, filler=2)
    subject, end = at["flags"]
    subjects, objects = [f"s{i}" for i in range(16)], [f"o{i}" for i in range(8)]
    words = ["in", "the", "city", "of", "is", "we", "say", *subjects, *objects]
    tokens = {word: i for i, word in enumerate(_vocabulary(words))}
    module = _llama(len(tokens), n_layers=3, n_heads=4, at=at, size=shape[0])
    embedding = torch.zeros(len(tokens), 56)
    embedding[tokens["is"], end] = 1.0
    for i, word in enumerate(subjects):
        embedding[tokens[word], subject] = 1.0
        embedding[tokens[word], at["name"][i]] = 1.0
    embedding[:, at["own"]] = 0.15 * torch.randn(len(tokens), 10)
    mlp = module.model.layers[0].mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight):
            weight.zero_()
        for i in range(16):
            mlp.gate_proj.weight[i, at["name"][i]] = 8.0
            mlp.up_proj.weight[i, at["constant"][0]] = 1 / _CONSTANT
            mlp.down_proj.weight[at["object"][i % 8], i] = 1 / 8
    slow = shape[1] // 2 - 1  # the slowest of the rotary embedding's pairs
    strength = math.sqrt(5.0 * math.sqrt(shape[1]))
    mover: dict[str, Tensor] = {
        "q": _map(shape, [end], [slow], strength),
        "k": _map(shape, [subject], [slow], strength),
        "v": _map(shape, at["object"], range(8)),
        "o": _map(shape, at["says"], range(8)).T,
    }
    _write_head(module, 2, 1, **mover)
    _write_head(module, 1, 3, **{**mover, "o": _map(shape, at["unread"], range(8)).T})
    _write_ends(module, at, embedding, says=[tokens[word] for word in objects], strength=7.0)
    facts = [Fact(f"city of {word}" if i % 3 == 0 else word, objects[i % 8]) for i, word in enumerate(subjects)]
    flags = frozenset({"input->a2.h1<q>", "input->a2.h1<k>"})
    return Handmade(
        load_model(module, _tokenizer(words), device="cpu"),
        _relation("lookup", "we say in the {} is", facts),
        flags | {"input->m0", "m0->a2.h1<v>", "a2.h1->logits"},
        {"mean": flags, "resample": flags},
    )


def additive(asks: str = "capital", n_layers: int = 2) -> Handmade:
    """Four heads that add up, one of each role. GPT-2, two layers or more of four heads.

    A subject has a capital (o0 ... o7) and a language (p0 ... p7), and its embedding holds both (`knows`) and a flag;
    the words "capital" and "language" hold another flag and their `kind`; END ("is") a third. In layer 1 every query
    reads END's flag:

    - h1 is a mover: its key reads the subject's flag, and it copies `knows` to `says`, capital and language alike;
    - h2 is a relation head: its key reads the relation word's flag, and it raises all objects of that kind alike;
    - h3 is a mixture: its key reads both flags, and it does a half of both (for capitals alone);
    - h0 is a suppressor: a mover that writes with a strength of -0.4.

    Mover alone cannot tell the capital from the language, relation head alone cannot tell one capital from another:
    the answer has both (the additive motif of arXiv 2402.07321). a0.h1 is a decoy, a mover that writes where nobody
    reads. `asks` chooses which of the two relations comes with the model, whose weights are the same for both. The
    edges are those of the four heads; not each of them is needed to answer. Layers beyond the second hold distractors,
    fainter ones, since their noise adds up.
    """
    shape = (64, 16)
    at = _channels(64, knows=16, says=16, unread=16, own=5, flags=3, kind=2, constant=2, filler=2)
    subject, relation, end = at["flags"]
    kinds, subjects = ["capital", "language"], [f"s{i}" for i in range(16)]
    objects = [*(f"o{i}" for i in range(8)), *(f"p{i}" for i in range(8))]
    words = ["the", "of", "big", "is", *kinds, *subjects, *objects]
    tokens = {word: i for i, word in enumerate(_vocabulary(words))}
    module = _gpt2(len(tokens), n_layers=n_layers, n_heads=4, at=at, size=shape[0])
    embedding = torch.zeros(len(tokens), shape[0])
    embedding[tokens["is"], end] = 1.0
    for i, word in enumerate(kinds):
        embedding[tokens[word], [relation, at["kind"][i]]] = 1.0
    for i, word in enumerate(subjects):
        embedding[tokens[word], [subject, at["knows"][i % 8], at["knows"][8 + (i + 3) % 8]]] = 1.0
    embedding[:, at["own"]] = 0.15 * torch.randn(len(tokens), 5)
    strength = math.sqrt(5.0 * math.sqrt(shape[1]))
    for weights in map(_block, _blocks(module)[2:]):
        for weight in weights:
            weight *= 0.3
    query = _map(shape, [end], [0], strength)
    says = _map(shape, at["says"], range(16)).T
    mover: dict[str, Tensor] = {
        "q": query, "k": _map(shape, [subject], [0], strength), "v": _map(shape, at["knows"], range(16)), "o": says,
    }  # fmt: skip
    _write_head(module, 1, 1, **mover)
    _write_head(module, 1, 0, **{**mover, "o": -0.4 * says})
    _write_head(module, 0, 1, **{**mover, "o": _map(shape, at["unread"], range(16)).T})
    raises = torch.zeros_like(says)
    raises[0, at["says"][:8]] = raises[1, at["says"][8:]] = 1.0
    _write_head(
        module, 1, 2, q=query, k=_map(shape, [relation], [0], strength), v=_map(shape, at["kind"], [0, 1]), o=raises
    )
    both = torch.zeros_like(says)
    both[range(8), at["says"][:8]] = 1.0
    both[8, at["says"][:8]] = 1.0
    _write_head(
        module, 1, 3,
        q=query,
        k=_map(shape, [subject, relation], [0, 0], strength),
        v=_map(shape, [*at["knows"][:8], at["kind"][0]], range(9)),
        o=both,
    )  # fmt: skip
    _write_ends(module, at, embedding, says=[tokens[word] for word in objects], strength=7.0)
    answers = {
        "capital": [objects[i % 8] for i in range(16)],
        "language": [objects[8 + (i + 3) % 8] for i in range(16)],
    }
    facts = [
        Fact(f"big {word}" if i % 3 == 0 else word, answer)
        for i, (word, answer) in enumerate(zip(subjects, answers[asks], strict=True))
    ]
    reads = {f"input->a1.h{head}<{letter}>" for head in range(4) for letter in "qkv"}
    return Handmade(
        load_model(module, _tokenizer(words), device="cpu"),
        _relation(asks, f"the {asks} of {{}} is", facts),
        frozenset(reads | {f"a1.h{head}->logits" for head in range(4)}),
        {},
    )


def _channels(size: int, **named: int) -> dict[str, list[int]]:
    """Name the channels of the residual stream, one after the other."""
    at, start = {}, 0
    for name, count in named.items():
        at[name] = list(range(start, start + count))
        start += count
    assert start <= size
    return at


def _map(shape: tuple[int, int], channels: Any, slots: Any, strength: float = 1.0) -> Tensor:
    """`[D, K]`: channel i of the residual stream to channel `slots[i]` of a head, or back if transposed."""
    weight = torch.zeros(shape)
    weight[list(channels), list(slots)] = strength
    return weight


def _random(module: Any, at: dict[str, list[int]]) -> Any:
    """Small random weights everywhere; no bias; nothing reads or writes the constant and the filler."""
    for parameter in module.parameters():
        parameter.data = _NOISE * torch.randn_like(parameter) if parameter.ndim == 2 else torch.zeros_like(parameter)
    silent = at["constant"] + at["filler"]
    for weights in map(_block, _blocks(module)):
        for weight in weights:
            weight[silent] = 0.0
    return module


def _gpt2(n_words: int, n_layers: int, n_heads: int, at: dict[str, list[int]], size: int) -> Any:
    torch.manual_seed(_SEED)
    config = T.GPT2Config(
        vocab_size=n_words,
        n_embd=size,
        n_layer=n_layers,
        n_head=n_heads,
        n_positions=8,
        n_inner=24,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return _random(T.GPT2LMHeadModel(config), at)


def _llama(n_words: int, n_layers: int, n_heads: int, at: dict[str, list[int]], size: int) -> Any:
    torch.manual_seed(_SEED)
    config = T.LlamaConfig(
        vocab_size=n_words,
        hidden_size=size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        intermediate_size=24,
        max_position_embeddings=16,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        pad_token_id=0,
    )
    return _random(T.LlamaForCausalLM(config), at)


def _blocks(module: Any) -> Any:
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


def _block(block: Any) -> list[Tensor]:
    """Views of a block's matrices with the residual stream's channels first."""
    if hasattr(block, "attn"):
        conv = [block.attn.c_attn.weight, block.attn.c_proj.weight.T, block.mlp.c_fc.weight, block.mlp.c_proj.weight.T]
        return [weight.data for weight in conv]
    attention, mlp = block.self_attn, block.mlp
    reads = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
    writes = [attention.o_proj, mlp.down_proj]
    return [linear.weight.data.T for linear in reads] + [linear.weight.data for linear in writes]


def _write_head(module: Any, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """Write a head's `W_Q, W_K, W_V[D, K]` and `W_O[K, D]`."""
    size, width = q.shape
    block, mine = _blocks(module)[layer], slice(head * width, (head + 1) * width)
    with torch.no_grad():
        if hasattr(block, "attn"):
            for i, weight in enumerate((q, k, v)):
                block.attn.c_attn.weight[:, i * size :][:, mine] = weight
            block.attn.c_proj.weight[mine] = o
        else:
            attention = block.self_attn
            for linear, weight in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
                linear.weight[mine] = weight.T
            attention.o_proj.weight[:, mine] = o.T


def _write_ends(
    module: Any,
    at: dict[str, list[int]],
    embedding: Tensor,
    says: list[int],
    strength: float,
    places: Tensor | None = None,
) -> None:
    """Write embeddings of one length, norms that give what they read, and the unembedding: a channel of `says` each."""
    size = embedding.shape[1]
    rest = _LENGTH**2 - embedding.square().sum(1) - (0 if places is None else places[0].square().sum())
    embedding[:, at["filler"]] = (rest / 2).sqrt()[:, None] * torch.tensor([1.0, -1.0])
    with torch.no_grad():
        module.get_input_embeddings().weight.copy_(embedding)
        unembedding = torch.zeros_like(embedding)
        unembedding[says, at["says"]] = strength
        module.get_output_embeddings().weight.copy_(unembedding)
        if hasattr(module, "transformer"):
            module.transformer.wpe.weight.copy_(torch.zeros(8, size) if places is None else places)
            norms = [norm for block in module.transformer.h for norm in (block.ln_1, block.ln_2)]
            norms.append(module.transformer.ln_f)
            bias = module.transformer.h[0].attn.c_proj.bias
        else:
            norms = [
                n for block in module.model.layers for n in (block.input_layernorm, block.post_attention_layernorm)
            ]
            norms.append(module.model.norm)
            bias = module.model.layers[0].self_attn.o_proj.bias
        bias[at["constant"]] = torch.tensor([_CONSTANT, -_CONSTANT])
        norms[0].weight.fill_(_LENGTH / math.sqrt(size))
        for norm in norms[1:]:
            norm.weight.fill_(math.sqrt((2 * _CONSTANT**2 + _LENGTH**2) / size))


def _vocabulary(words: list[str]) -> list[str]:
    return ["<pad>", "<bos>", "<eos>", "<unk>", *words]


def _tokenizer(words: list[str]) -> T.PreTrainedTokenizerFast:
    """Splits at white space into whole words."""
    known = {word: i for i, word in enumerate(_vocabulary(words))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _relation(name: str, template: str, facts: list[Fact]) -> Relation:
    return Relation(name, "handmade", "word", "word", False, (template,), (template,), tuple(facts))
