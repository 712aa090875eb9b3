"""The uncentred covariance C = E[k kᵀ] of an MLP's hidden activations, over text that the project makes.

ROME and MEMIT need it to know which directions of k ordinary text uses, so that an edit can avoid them. Half of the
text are sentences of the relations that come with the package, in all their templates; the other half is sampled from
the model. Position 0 of each text is left out: its activations are like no others. Texts and matrices are kept in the
user's cache under the digest of the weights.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.editing.writing import continued, text_digest, text_store, text_tokens, writer
from kcwb.errors import DataError, KcwbError, SettingError, warn
from kcwb.files import user_folder, write_tensors
from kcwb.interventions.block import run_blocks
from kcwb.models.loading import Model
from kcwb.models.memory import in_pieces
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.tasks.relations import load_relations
from kcwb.verbs import verb

#: Sampled texts begin with one of these words.
OPENINGS = ("The", "In", "A", "When", "If", "People", "You", "We", "Today", "There")
#: Tokens of text per dimension of k.
TOKENS_PER_DIMENSION = 10
_LENGTH = 64  # tokens of a text
_BATCH = 16
_TEXTS = 128  # that are sampled together: what is drawn for one depends on how many there are
#: Raised with every change of what the text is.
_VERSION = 2


@dataclass(frozen=True, eq=False)
class Covariance:
    """E[k kᵀ] of one layer, from two halves of text that share nothing.

    Attributes
    ----------
    layer
        Whose MLP.
    halves
        `[2, M, M]` float32: the mean of k kᵀ over each half; their mean is C.
    n_tokens
        How many tokens both halves have.
    """

    layer: int
    halves: Float[Tensor, "2 M M"]
    n_tokens: int

    @property
    def matrix(self) -> Float[Tensor, "M M"]:
        """C, over all the text."""
        return self.halves.mean(0)

    def agreement(self, key: Float[Tensor, " M"], ridge: float) -> float:
        """The cosine between C⁻¹k of one half and of the other: 1 when the text is enough for this key."""
        one, other = (whiten(half, key, ridge) for half in self.halves)
        return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def whiten(matrix: Float[Tensor, "M M"], keys: Float[Tensor, "M *n"], ridge: float) -> Float[Tensor, "M *n"]:
    """(C + λ·tr(C)/d·I)⁻¹ k in float64, λ the ridge.

    Raises
    ------
    SettingError
        If the ridge is negative, or without one C is singular.
    """
    if not 0 <= ridge < math.inf:
        raise SettingError(f"ridge={ridge}: the share of C's mean diagonal to add must be 0 or above (try 0.01).")
    raised = matrix.double() + ridge * matrix.diagonal().double().mean() * torch.eye(len(matrix), device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(raised)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise SettingError(f"The covariance of k is singular at ridge={ridge}; use a larger ridge, such as 0.01.")
    columns = keys.double()[:, None] if keys.ndim == 1 else keys.double()
    return torch.cholesky_solve(columns, factor).reshape(keys.shape).to(keys.dtype)


@verb
def covariance(model: Model, layer: int, **more: Any) -> Covariance:
    """The covariance of one layer's MLP activations; parameters and errors as in `covariances`."""
    return covariances(model, [layer], **more)[layer]


@verb
def covariances(
    model: Model,
    layers: Sequence[int],
    *,
    tokens: Count | None = None,
    seed: Seed = 0,
    cache: str | Path | bool = True,
    progress: Progress = False,
) -> dict[int, Covariance]:
    """The covariances of some layers' MLP activations, from the cache or over new text.

    Parameters
    ----------
    model, layers
        The model as it is now, and the layers; all that are not in the cache are taken in one pass.
    tokens
        How many tokens of text; default ten for each dimension of k, and at least two texts.
    cache
        Where to keep the texts and matrices: a folder, True for the user's cache (or `KCWB_CACHE`), False for nowhere.

    Returns
    -------
    dict
        Layer -> Covariance, on the model's device. The first call takes a minute or two for the built-in model, another
        layer some seconds, and what is in the cache milliseconds.

    Raises
    ------
    SettingError
        If there is no such layer, or there are fewer tokens than two texts have.
    DataError
        If the model reads no more than one token.
    """
    n_layers, width = model.graph.n_layers, len(model.network.layers[0].W_out)
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise SettingError(f"layer={layer}: {model.name} has layers 0 to {n_layers - 1}.")
    if model.network.n_ctx < 2:
        raise DataError(f"{model.name} reads one token: its texts have no position after the first.")
    wanted = max(TOKENS_PER_DIMENSION * width, 2 * _LENGTH) if tokens is None else tokens
    if wanted < 2 * _LENGTH:
        raise SettingError(f"tokens={tokens}: a covariance needs at least {2 * _LENGTH}.")
    short = (model.network.n_ctx,) if model.network.n_ctx < _LENGTH else ()  # the same weights may read less
    about = (_VERSION, text_digest(model), str(model.dtype), writer(model), wanted, seed, *short)
    name = hashlib.sha256(repr(about).encode()).hexdigest()[:24]
    folder = user_folder("covariances") / name if cache is True else Path(cache) / name if cache else None
    held = text_store(model)
    found = {layer: held.get((name, layer)) or _read(folder, layer, width) for layer in layers}
    missing = [layer for layer, one in found.items() if one is None]
    if missing and text_digest(model) != model.digest:
        raise KcwbError(
            f"The covariance of layer {missing[0]} is not known of the weights as they were before the edits."
        )
    if missing:
        halves, counted = _accumulate(model, _texts(model, wanted, seed, folder), missing, progress)
        for layer in missing:
            found[layer] = Covariance(layer, halves[layer], counted)
            if folder is not None:
                _keep(folder / f"layer{layer}.safetensors", {"halves": halves[layer]}, {"tokens": str(counted)})
    held.update({(name, layer): one for layer, one in found.items()})
    return {layer: Covariance(layer, one.halves.to(model.device), one.n_tokens) for layer, one in found.items() if one}


def sample_texts(model: Model, openings: Sequence[str], length: int, seed: int, top_k: int = 50) -> list[list[int]]:
    """Token ids of one text per opening: its own, and `length` more, each sampled from the `top_k` likeliest.

    Fewer where the context ends before.
    """
    starts = [text_tokens(model, word)[: model.network.n_ctx - 1] for word in openings]
    groups: dict[int, list[int]] = {}
    for i, start in enumerate(starts):
        groups.setdefault(len(start), []).append(i)
    texts: list[list[int]] = [[] for _ in openings]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for rows in groups.values():
            ids = torch.tensor([starts[i] for i in rows], device=model.device)
            most = min(length, model.network.n_ctx - ids.shape[1])

            def sampled(part: slice, ids: Tensor = ids, most: int = most) -> list[list[int]]:
                return continued(model, ids[part], most, do_sample=True, top_k=top_k, min_new_tokens=most).tolist()

            found = itertools.chain(*in_pieces(len(ids), _TEXTS, sampled, "sampled texts"))
            for i, text in zip(rows, found, strict=True):
                texts[i] = text
    return texts


def own_texts(model: Model, n: int, length: int, seed: int, without: Collection[str] = ()) -> list[list[int]]:
    """Token ids of at most n texts of this length: shuffled sentences of the package's relations, one after the other.

    Those about subjects in `without`, or with such an object, are left out.
    """
    sentences = [
        f"{template.replace('{}', fact.subject)} {fact.object}."
        for relation in load_relations()
        for template in (*relation.prompt_templates_zs, *relation.prompt_templates)
        for fact in relation.facts
        if fact.subject not in without and fact.object not in without
    ]
    random.Random(seed).shuffle(sentences)
    flat: list[int] = []
    for sentence in sentences:
        flat += model.tokenizer(f" {sentence}" if flat else sentence, add_special_tokens=False)["input_ids"]
        if len(flat) >= n * length:
            break
    return [flat[start : start + length] for start in range(0, len(flat) - length + 1, length)][:n]


def _texts(model: Model, wanted: int, seed: int, folder: Path | None) -> Int[Tensor, "N T"]:
    """Equally long texts, sentences of the relations and samples in turn; from the folder if they are in it."""
    path = None if folder is None else folder / "texts.safetensors"
    found = None if path is None else _load(path)
    if found is not None and "texts" in found[0]:
        return found[0]["texts"].to(model.device)
    each = min(_LENGTH, model.network.n_ctx)
    n_texts = 2 * math.ceil(wanted / (2 * (each - 1)))
    made = own_texts(model, n_texts // 2, each, seed)
    openings = [OPENINGS[i % len(OPENINGS)] for i in range(n_texts - len(made))]
    sampled = [text[:each] for text in sample_texts(model, openings, each - 1, seed)]
    # Each half of the list has both kinds, and no text is in both.
    texts = torch.tensor([*made[::2], *sampled[::2], *made[1::2], *sampled[1::2]], device=model.device)
    if path is not None:
        _keep(path, {"texts": texts})
    return texts


@torch.no_grad()
def _accumulate(
    model: Model, texts: Int[Tensor, "N T"], layers: Sequence[int], progress: Progress
) -> tuple[dict[int, Float[Tensor, "2 M M"]], int]:
    """The mean of k kᵀ per layer and half of the texts, and how many tokens there were."""
    network = model.network
    width = len(network.layers[0].W_out)
    sums = {layer: torch.zeros(2, width, width, device=model.device) for layer in layers}
    middle, each = len(texts) // 2, texts.shape[1] - 1

    def keys(texts: Int[Tensor, "n T"]) -> dict[int, Float[Tensor, "nT M"]]:
        blocks = enumerate(run_blocks(network, texts, max(layers) + 1))
        return {layer: block.hidden[:, 1:].flatten(0, 1).float() for layer, block in blocks if layer in sums}

    with track(progress, len(texts), "covariance") as step:
        for half, some in enumerate((texts[:middle], texts[middle:])):
            for of_layer in in_pieces(len(some), _BATCH, lambda rows, some=some: keys(some[rows])):
                for layer, k in of_layer.items():
                    sums[layer][half].addmm_(k.T, k, alpha=1 / (each * len(some)))
                step(len(next(iter(of_layer.values()))) // each)
    if not all(bool(torch.isfinite(one).all()) for one in sums.values()):
        raise KcwbError(f"The activations of {model.name} are not numbers: they overflow. Use float32.")
    return sums, len(texts) * each


def _read(folder: Path | None, layer: int, width: int) -> Covariance | None:
    """One layer from the folder; None if it is not there or is damaged, in which case it is made again."""
    found = None if folder is None else _load(folder / f"layer{layer}.safetensors")
    try:
        if found is None or found[0]["halves"].shape != (2, width, width):
            return None
        halves = found[0]["halves"].float()
        return Covariance(layer, halves, int(found[1]["tokens"])) if bool(torch.isfinite(halves).all()) else None
    except (KeyError, ValueError):
        return None


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _keep(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Into the cache, or with a warning nowhere: what is at hand is used either way."""
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        warn(f"{path} cannot be kept ({error.strerror}): it is made anew the next time.")
