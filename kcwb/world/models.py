"""Tiny models of several architectures, trained on one world: whatever differs between them, their facts do not.

Each is an ordinary Hugging Face model from its own configuration class, started from random weights, trained with
AdamW on the sentences of a world (`kcwb.world.facts`): decoders on the next word, encoders on masked words. They are
kept in the user's cache as ordinary folders, which `load_model`, `load_encoder` and Hugging Face's own loaders read.

A folder's name holds the digest of all that determines its weights: the world's sentences, the architecture, the recipe
and the versions of torch and transformers. Asked for again, it is found and not trained again. It is whole or not there
(`kcwb.models.cache`): training that is interrupted leaves the models that were finished before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.errors import KcwbError, ModelError, SettingError, choose
from kcwb.models.cache import build_folder, model_cache, read_manifest, save_model
from kcwb.models.encoder import Encoder, load_encoder, run_encoder
from kcwb.models.families import ENCODERS
from kcwb.models.loading import Model, load_model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, NotNegative, Seed, Share
from kcwb.statistics import mean_interval, proportion_interval
from kcwb.tasks.masked import at_masks
from kcwb.tasks.prompts import encode
from kcwb.tasks.ranks import rank_of
from kcwb.tasks.relations import Relation
from kcwb.verbs import noun, verb
from kcwb.versions import versions
from kcwb.world.facts import World, make_world, world_tokenizer

_CONTEXT = 64
#: Raised with every change of how models are made that the recipe does not show.
_FORMAT = 1


@noun
@dataclass(frozen=True)
class Recipe:
    """What the weights of a model depend on, beside its world and its architecture.

    Attributes
    ----------
    layers, heads, width
        The model's size: blocks, heads of a block, d_model.
    steps, encoder_steps, batch
        Updates of the weights of a decoder, and of an encoder, which is asked for fewer words in each; and sentences
        in each.
    lr, warmup, decay
        AdamW's learning rate, which rises over the first `warmup` steps and then falls to 0 along a cosine, and its
        weight decay.
    masked
        For encoders: the share of words that are masked; at least one of each sentence is.
    seed
        Of the first weights and of the batches.
    """

    layers: Count = 4
    heads: Count = 8
    width: Count = 64
    steps: Count = 1200
    encoder_steps: Count = 3000
    batch: Count = 64
    lr: Share = 3e-3
    warmup: Natural = 100
    decay: NotNegative = 0.1
    masked: Share = 0.3
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.width % (2 * self.heads):
            raise SettingError(f"width={self.width} with heads={self.heads}: a head's width must be an even number.")
        if self.masked == 1:
            raise SettingError(f"masked={self.masked}: a sentence of masks alone says nothing; take a share below 1.")


#: Hugging Face `model_type` of what can be trained; `bert` is an encoder.
ARCHITECTURES = ("gpt2", "llama", "opt", "bert")


def _settings(architecture: str, recipe: Recipe) -> dict[str, Any]:
    """An architecture's own names for its size; no dropout anywhere."""
    width, mlp = recipe.width, 4 * recipe.width
    size = {"hidden_size": width, "num_hidden_layers": recipe.layers, "num_attention_heads": recipe.heads}
    size |= {"max_position_embeddings": _CONTEXT}
    gated = round(2 / 3 * mlp)  # as many weights as the others' MLPs, which have no gate
    short = {"n_embd": width, "n_layer": recipe.layers, "n_head": recipe.heads, "n_positions": _CONTEXT}
    return {
        "gpt2": {**short, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "llama": {**size, "intermediate_size": gated},
        "opt": {**size, "ffn_dim": mlp, "word_embed_proj_dim": width, "dropout": 0.0, "attention_dropout": 0.0},
        "bert": {**size, "intermediate_size": mlp, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }[architecture]


@verb
def train_world(
    architectures: Sequence[str] = ARCHITECTURES,
    *,
    world: World | None = None,
    recipe: Recipe | None = None,
    checkpoints: Sequence[Natural] = (),
    progress: Progress = True,
) -> dict[str, Path]:
    """Train a model of each architecture on a world, or find those that were trained before.

    Parameters
    ----------
    architectures
        Some of `ARCHITECTURES`.
    world
        Whose sentences are shown; default `make_world()`.
    recipe
        Sizes, steps and seed; default `Recipe()`.
    checkpoints
        After how many steps the model is kept, too (0: before the first): in folders `step<n>` of its folder, for
        `load_world(folder, revision="step<n>")`. Training is the same with them and without.
    progress
        Reported per step. An exception that it raises stops the training, and what is not finished is lost.

    Returns
    -------
    dict
        Architecture -> its folder in the user's cache, for `load_model` or, for `bert`, `load_encoder`.

    Raises
    ------
    SettingError
        If an architecture is not known.
    ModelError
        If the cache cannot be written.
    KcwbError
        If a training diverges.
    """
    for name in architectures:
        choose("The architecture", name, ARCHITECTURES)
    world, recipe = world or make_world(), recipe or Recipe()
    kept = tuple(sorted(set(checkpoints)))
    for name in architectures:
        steps = recipe.encoder_steps if name in ENCODERS else recipe.steps
        if kept and kept[-1] > steps:
            raise SettingError(f"checkpoints: {kept[-1]} is more than the {steps} steps that {name} is trained for.")
    found = {}
    for name in architectures:
        folder = world_folder(name, world, recipe, kept)
        build = partial(_build, name, world, recipe, kept, progress)
        try:
            waiting = f"Another process is training {folder.name}; waiting for it."
            found[name] = build_folder(folder, build, waiting if progress else "")
        except OSError as error:
            raise ModelError(
                f"The model cannot be written to {folder.parent}: {error}. Free some space, or set the environment "
                "variable KCWB_CACHE to a folder that can be written."
            ) from error
    return found


def world_folder(architecture: str, world: World, recipe: Recipe, checkpoints: Sequence[int] = ()) -> Path:
    """Where the model of a world lies, or will."""
    origin = _origin(architecture, world, recipe, checkpoints)
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    return model_cache() / f"world-{architecture}-{digest[:12]}"


def _origin(architecture: str, world: World, recipe: Recipe, checkpoints: Sequence[int]) -> dict[str, Any]:
    """What determines the weights, up to the number of threads, on which sums depend, and what is kept of them."""
    libraries = {name: versions()[name] for name in ("torch", "transformers")}
    origin = {"format": _FORMAT, "architecture": architecture, "world": world.digest, "recipe": asdict(recipe)}
    kept = {"checkpoints": list(checkpoints)} if checkpoints else {}
    return {**origin, **kept, "versions": libraries}


def _build(
    architecture: str, world: World, recipe: Recipe, checkpoints: Sequence[int], progress: Progress, folder: Path
) -> dict[str, Any]:
    """Train, write the model to the folder, and say how."""
    tokenizer = world_tokenizer(world, masked=architecture in ENCODERS)
    module = new_model(architecture, tokenizer, recipe)

    def keep(steps: int) -> None:
        if steps in checkpoints:
            save_model(module, tokenizer, folder / f"step{steps}")

    losses = train(module, tokenizer, world.sentences, recipe, progress, keep)
    digest = save_model(module, tokenizer, folder)
    return {**_origin(architecture, world, recipe, checkpoints), "weights_sha256": digest, "loss": round(losses[-1], 4)}


def new_model(architecture: str, tokenizer: Any, recipe: Recipe) -> Any:
    """A Hugging Face model with random weights; the generators of torch are left as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **tokens, **_settings(architecture, recipe))
    kind = AutoModelForMaskedLM if architecture in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return kind.from_config(config)


def train(
    module: Any, tokenizer: Any, sentences: Sequence[str], recipe: Recipe, progress: Progress = False,
    keep: Callable[[int], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train a model on sentences, in place; the loss of each step (nats per word that is asked).

    `keep` is called with the number of steps done, before the first and after each.

    A decoder is asked for every word, given those before it; an encoder, which is told by its tokenizer's mask, for the
    masked words.
    """
    texts = tokenizer(list(sentences), padding=True, return_tensors="pt")
    tokens, real = texts.input_ids, texts.attention_mask.bool()
    fixed = torch.tensor(tokenizer.all_special_ids)
    draw = torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.AdamW(module.parameters(), lr=recipe.lr, weight_decay=recipe.decay)
    steps = recipe.steps if tokenizer.mask_token_id is None else recipe.encoder_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_rate, steps, recipe.warmup))
    losses, order = [], torch.empty(0, dtype=torch.long)
    module.train()
    with torch.enable_grad(), track(progress, steps, f"training {module.config.model_type}") as step:
        for done in range(steps + 1):
            if keep is not None:
                keep(done)
            if done == steps:
                break
            while len(order) < recipe.batch:
                order = torch.cat([order, torch.randperm(len(tokens), generator=draw)])
            rows, order = order[: recipe.batch], order[recipe.batch :]
            inputs, wanted, seen = tokens[rows], tokens[rows], real[rows]
            if tokenizer.mask_token_id is None:
                logits, wanted = module(input_ids=inputs, attention_mask=seen.long()).logits[:, :-1], inputs[:, 1:]
                asked = seen[:, 1:]
            else:
                asked = draw_masks(seen & ~torch.isin(inputs, fixed), recipe.masked, draw)
                hidden = inputs.masked_fill(asked, tokenizer.mask_token_id)
                logits = module(input_ids=hidden, attention_mask=seen.long()).logits
            loss = F.cross_entropy(logits[asked], wanted[asked])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise KcwbError(f"The training of {module.config.model_type} diverged in step {len(losses)}: lower lr.")
            step(note=f"loss {losses[-1]:.3f}")
    module.eval()
    return losses


def _rate(steps: int, warmup: int, step: int) -> float:
    """The share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))


def draw_masks(words: Bool[Tensor, "N T"], share: float, draw: torch.Generator) -> Bool[Tensor, "N T"]:
    """Which of the words to mask: each with probability `share`, and one of each row that would have none."""
    chance = torch.rand(words.shape, generator=draw).masked_fill(~words, 2.0)
    return (chance < share) | (chance == chance.min(1, keepdim=True).values) & words


@verb
def load_world(folder: str | Path, **more: Any) -> Model | Encoder:
    """Load a model that `train_world` wrote, or a checkpoint (`revision`); other parameters as in `load_model`."""
    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
    return load_encoder(folder, **more) if kind in ENCODERS else load_model(folder, **more)


def known_facts(model: Model | Encoder, world: World, template: int | None = None) -> pd.DataFrame:
    """The table of the world (`World.table`) with a column `known`: the answer is a model's first choice of all words.

    In one template, by its number; None for all, where a fact counts by the share of its templates that are answered.
    """
    known = []
    for relation in world.relations.values():
        templates = relation.prompt_templates_zs if template is None else [relation.template(template)]
        known.append(torch.stack([_ranks(model, relation, one) == 1 for one in templates]).double().mean(0))
    return world.table().assign(known=torch.cat(known).numpy())


@verb
def world_knowledge(
    model: Model | Encoder,
    world: World,
    *,
    template: int | None = None,
    by: Sequence[str] = ("kind",),
    seed: Seed = 0,
) -> pd.DataFrame:
    """How many facts of a world a model knows.

    Parameters
    ----------
    model, world, template
        As in `known_facts`.
    by
        Columns of its table: a row for each of their combinations.
    seed
        Of the bootstrap.

    Returns
    -------
    DataFrame
        `facts`, the share `known`, `low` and `high`, and `chance`, the share of the answer which stands most often in
        the facts of the row's relations, in the mean over these. `low` and `high` are the 95% bootstrap interval of the
        mean over facts (of shares of templates; NaN where all facts are alike), or of one template Wilson's interval of
        the share of facts.
    """
    for name in by:
        choose("by: the column", name, ("relation", "subject", "object", "steps", "kind"))
    rows = []
    for key, some in known_facts(model, world, template).groupby([*by], observed=True):
        known = some["known"].to_numpy()
        low, high = mean_interval(known, seed) if template is None else proportion_interval(known)
        commonest = (
            some.groupby("relation", observed=True)["object"].agg(lambda objects: objects.value_counts().iloc[0]).sum()
        )
        numbers = (len(some), known.mean(), low, high, commonest / len(some))
        rows.append((*(key if isinstance(key, tuple) else (key,)), *numbers))
    return pd.DataFrame(rows, columns=[*by, "facts", "known", "low", "high", "chance"])


def _ranks(model: Model | Encoder, relation: Relation, template: str) -> Int[Tensor, " N"]:
    """The rank of each fact's answer, on the CPU."""
    if isinstance(model, Model):
        return encode(model, relation.facts, template, relation.objects).ranks.cpu()
    tokenizer: Any = model.tokenizer
    prompts = [f"{template.replace('{}', fact.subject)} {tokenizer.mask_token} ." for fact in relation.facts]
    texts = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    answers = tokenizer([fact.object for fact in relation.facts], add_special_tokens=False, return_tensors="pt")
    masks = (texts.input_ids == tokenizer.mask_token_id).int().argmax(1)
    logits: Float[Tensor, "N V"] = at_masks(run_encoder(model, texts.input_ids, texts.attention_mask.bool()), masks)
    return rank_of(logits, answers.input_ids[:, 0].to(model.device)).cpu()


@verb
def read_training(folder: str | Path) -> dict[str, Any]:
    """How the model in a folder was trained: `world`, `recipe`, `versions`, the last `loss`, `weights_sha256`."""
    return read_manifest(Path(folder))
