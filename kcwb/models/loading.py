"""A name becomes a Model: the built-in model, a model of the hub, a local folder, or one that is already in memory."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from kcwb.errors import ModelError, SettingError, nearest
from kcwb.locks import Exclusive, WeightsLock, lock_of
from kcwb.models.builtin import BUILTIN_NAME, builtin_digest
from kcwb.models.digest import state_digest, weights_digest
from kcwb.models.families import FAMILIES, covered_family
from kcwb.models.graph import Graph
from kcwb.models.network import Network
from kcwb.models.plain import plain_copy
from kcwb.models.reading import named_or_given, read_pretrained, require_fast, require_fit, running, split_revision
from kcwb.models.saving import save_folder, saved_record
from kcwb.models.selfcheck import self_check
from kcwb.progress import Progress
from kcwb.verbs import verb

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded, self-checked model.

    Attributes
    ----------
    bridge
        The `transformer_lens` bridge around the Hugging Face module: hooks and caches.
    tokenizer
        The Hugging Face tokenizer.
    network
        The transformer as functions of nodes.
    name, digest
        What it was loaded by, and the SHA-256 of its weights.
    device, dtype
        Where and in what precision it is.
    prepend_bos
        Whether prompts start with the BOS token.
    edits
        What edits are in the weights, ready for JSON, the latest last; each says the digest `onto` which it was put.
    saved
        What the folder says that it was loaded from, if `save` has written it (`kcwb.models.saving`); else empty.
    """

    bridge: TransformerBridge
    tokenizer: PreTrainedTokenizerBase
    network: Network
    name: str
    digest: str
    device: torch.device
    dtype: torch.dtype
    prepend_bos: bool
    edits: tuple[Mapping[str, Any], ...] = ()
    saved: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Be known to those that are loaded from the same module."""
        with _GUARD:
            _LOADED.add(self)

    @property
    def siblings(self) -> list[Model]:
        """All models that have the same tensors as their weights, this one among them: what edits one edits all."""
        return _sharing(self.network.W_E)

    @property
    def unedited_digest(self) -> str:
        """The digest of the weights without the edits that are in them."""
        return self.edits[0]["onto"] if self.edits else self.digest

    @property
    def graph(self) -> Graph:
        """The model's computation graph."""
        return self.network.graph

    def has_weights(self, digest: str) -> bool:
        """Whether a digest is that of the weights, or was: before they were saved, or in files of earlier versions."""
        before = self.saved.get("model_digest") if not self.edits else None
        return digest in (self.digest, before) or digest == _former_digest(self)

    @verb
    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the model as a Hugging Face folder: configuration, tokenizer, weights, and `kcwb.json`, a record.

        Edits that are in the weights stay in; the record says which. What is loaded from the folder has these weights
        bit for bit, given the same `dtype`, and so the digest of an unedited model; an edited model's digest, in
        memory, is that of the unedited weights and the edits, but circuits that have it are taken as its own. The
        folder is read back and compared before it gets its name, which needs memory for the weights once more.

        Parameters
        ----------
        folder
            A new or empty folder, or one that `save` has written, which is replaced.
        force
            Whether to replace any folder of files, with all that is in it.

        Returns
        -------
        Path
            The folder, absolute.

        Raises
        ------
        SettingError
            If the folder must not be replaced.
        ModelError
            If it cannot be written, or does not read back as it is.
        """
        return save_folder(self, folder, force)

    @cached_property
    def lock(self) -> WeightsLock:
        """Held by whoever reads or writes the weights; one for all models that share them."""
        return lock_of(self.network.W_E)

    def exclusive(self, progress: Progress = True) -> Exclusive:
        """Keep other threads from running or editing the model, for several verbs in a row: `with` it."""
        return Exclusive([self.lock], progress)

    @verb
    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "N T"]) -> Tensor:
        """The Hugging Face model's own logits, `[N, T, V]`."""
        return self.bridge.original_model(tokens.to(self.device)).logits

    def __repr__(self) -> str:
        """One line: name, size, device and precision."""
        graph = self.graph
        return (
            f"Model({self.name!r}: {graph.n_layers} layers x {graph.n_heads} heads, {graph.n_edges:,} edges, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )


_LOADED: weakref.WeakSet[Model] = weakref.WeakSet()
_GUARD = threading.Lock()


def _sharing(weight: Tensor) -> list[Model]:
    """The loaded models that have this tensor as their embedding."""
    with _GUARD:
        return [model for model in _LOADED if model.network.W_E.data_ptr() == weight.data_ptr()]


@verb
def load_model(
    model: str | Path | PreTrainedModel = BUILTIN_NAME,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    device_map: str | Mapping[str, str | int] | None = None,
    dtype: str | torch.dtype | None = None,
    prepend_bos: bool | None = None,
) -> Model:
    """Load a model, wrap it, and check that its graph computes what it computes.

    Parameters
    ----------
    model
        `"smollm2-135m"` (built in, offline), the path of a local folder, a name on the Hugging Face hub such as
        `"gpt2-medium"`, or a Hugging Face causal language model in memory, which stays as it is, but for the device it
        is on and the gradients of its parameters: a copy is wrapped that has the same tensors as its weights. It may be
        loaded several times; an edit of one of these models edits all.
    tokenizer
        The tokenizer of a model in memory; otherwise the model's own.
    revision
        Of a name on the hub a branch, tag or commit, such as a checkpoint of Pythia's training, `"step1000"`; of a
        folder a folder in it (`kcwb.world.train_world`). `"name@revision"` is the same, and the model's name then.
    device
        `"auto"` takes CUDA if there is one, else the CPU.
    device_map
        For a named model that does not fit on one GPU: where its layers go, instead of `device`, in Hugging Face's
        terms (`"auto"`, `"balanced"`, or module names -> devices). Prompts and all senders' outputs are on the device
        of the embedding, which needs room for them; circuits of edges are covered, roles and editing are not. Layers
        that are kept on disk, or in memory for a GPU to fetch, are refused.
    dtype
        `"float32"` (None), `"bfloat16"` or `"float16"`; a model in memory keeps its own, and another is refused.
    prepend_bos
        Whether prompts start with the BOS token; None does what the model's tokenizer does by itself, or what a folder
        that `Model.save` has written says.

    Returns
    -------
    Model
        Ready to use; it has passed `kcwb.models.selfcheck.self_check`.

    Raises
    ------
    ModelError
        If the model cannot be found, its architecture is not covered, or its self-check fails; or if an edit is in
        the weights of a model in memory that was loaded before.
    SettingError
        If device or precision are not known.
    """
    if device_map is not None and str(device) != "auto":
        raise SettingError(f"Give either device={device!r} or device_map, not both.")
    for place in device_map.values() if isinstance(device_map, Mapping) else ():
        if place != "disk":
            known_device(f"cuda:{place}" if isinstance(place, int) else place)
    device, precision = known_device(device), None if dtype is None else known_dtype(dtype)
    read = partial(read_pretrained, dtype=precision or torch.float32, covered=covered_family, device_map=device_map)
    module, tokenizer, name = named_or_given(model, tokenizer, read, "load_model", revision, precision)
    if module is model and device_map is not None:
        raise SettingError("A model in memory is where it is; device_map is for one that is loaded by its name.")
    covered_family(module.config)
    require_fast(tokenizer, name)
    if getattr(module, "hf_device_map", None) is None:
        module = module.to(device)
    _require_in_place(module, name)
    with Exclusive([lock_of(module.get_input_embeddings().weight)]):  # no edit of a sibling meanwhile
        return _taken_apart(module, tokenizer, name, module is model, prepend_bos)


def _taken_apart(module: Any, tokenizer: Any, name: str, in_memory: bool, prepend_bos: bool | None) -> Model:
    """A Model around a Hugging Face module; a copy of one that is the user's."""
    module.requires_grad_(False)
    if in_memory:
        module = plain_copy(module)
        _require_unedited(module, name)
    recorded = not in_memory and name == BUILTIN_NAME and module.dtype == torch.float32
    digest = (builtin_digest() if recorded else None) or weights_digest(module)
    record = {} if in_memory else saved_record(split_revision(name)[0])
    saved = record if record.get("digest") == digest else {}  # in another precision these are other weights
    bos = _prepends_bos(tokenizer, name, record.get("prepend_bos") if prepend_bos is None else prepend_bos)
    needed = [tokenizer.bos_token_id] if bos else []
    require_fit(tokenizer, module.get_input_embeddings().weight.shape[0], name, needed)
    with running(module, name):
        bridge = _wrap(module.eval(), tokenizer, name)
        module.requires_grad_(False)  # once more: the bridge makes parameters of its own for fused weights
        network = Network(bridge)
        self_check(bridge, network, name)
    return Model(bridge, tokenizer, network, name, digest, network.device, network.dtype, bos, saved=saved)


def _former_digest(model: Model) -> str:
    """What `digest` was when it depended on the names that a bridge gives; computed where the two may be compared."""
    if model.digest not in _FORMER:
        _FORMER[model.digest] = state_digest(model.bridge.original_model)
    return _FORMER[model.digest]


#: Digest -> the former one of the same weights.
_FORMER: dict[str, str] = {}


def known_device(device: str | torch.device) -> torch.device:
    """The device of a name; SettingError if it cannot be used here."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"The device {device!r} cannot be used here: {error}. Try 'auto' or 'cpu'.") from error


def known_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The precision of a name; SettingError if it is not known."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise SettingError(f"The precision {dtype!r} is not known. {nearest(dtype, _DTYPES)}")
    return _DTYPES[dtype]


def _require_in_place(module: Any, name: str) -> None:
    """Raise ModelError if some weights are not where they are computed with: kept on disk, or in memory for a GPU."""
    away = [key for key, value in module.named_parameters() if value.is_meta]
    if away:
        raise ModelError(
            f"device_map leaves {len(away)} weights of {name} on disk or in memory, away from the device that computes "
            f"with them ({away[0]}, ...). Every layer must fit on a device: use more GPUs, dtype='bfloat16', or a "
            "smaller model."
        )


def _require_unedited(module: Any, name: str) -> None:
    """Raise ModelError if the module was loaded before and an edit is in its weights: they would pass for its own."""
    for other in _sharing(module.get_input_embeddings().weight):
        if other.edits:
            made = " + ".join(one["targets"][0] for one in other.edits)
            raise ModelError(
                f"{name} was loaded before, and an edit is in its weights ({made!r:.60}). Take it out first (`undo` of "
                "the Edit, in the reverse order of several), go on with that Model, or make the module anew."
            )


def _wrap(module: Any, tokenizer: Any, name: str) -> Any:
    """A TransformerBridge around a module in memory, with the settings without which it reads the hub or misreports."""
    from transformer_lens.model_bridge import TransformerBridge

    module.config.architectures = [FAMILIES[module.config.model_type].adapter or type(module).__name__]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs.setdefault("name_or_path", f"local/{Path(name).name}")
    tokenizer.init_kwargs["add_bos_token"] = True
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TransformerBridge.boot_transformers(
        f"local/{Path(name).name}", hf_model=module, tokenizer=tokenizer, device=str(module.device), dtype=module.dtype
    )


def _prepends_bos(tokenizer: Any, name: str, wanted: bool | None) -> bool:
    if wanted and tokenizer.bos_token_id is None:
        raise SettingError(f"prepend_bos=True, but the tokenizer of {name} has no BOS token.")
    if wanted is not None:
        return wanted
    first = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
