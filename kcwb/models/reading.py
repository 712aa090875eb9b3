"""A name or a folder becomes a Hugging Face module and its tokenizer, whole, or an error that says what is missing.

Nothing that a folder brings is run: weights and settings are read, Python is not (`trust_remote_code=False`).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kcwb.errors import KcwbError, ModelError, SettingError
from kcwb.models.builtin import BUILTIN_NAME, with_builtin
from kcwb.models.cache import no_bars
from kcwb.models.families import ENCODERS, FAMILIES

#: Tensors of published files that are no weights of the model: masks that older versions kept, and the heads of BERT
#: that predict no masked token. What Hugging Face itself declares to be so comes on top.
_SURPLUS = re.compile(
    r"(attn|attention)\.(masked_)?bias$|(^|\.)pooler\.|^cls\.seq_relationship\.|rotary_emb\.inv_freq$"
)

#: How configurations name the number of layers, and the fewest tensors that a layer has.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_LEAST = 4
#: Entries of tables that are computed, not stored (rotations, masks), beside twice the bytes of the weights.
_TABLES = 10**7
#: The largest graph: that of 80 layers of 64 heads has 8 * 10**7 pairs.
_EDGES = 10**9


def read_pretrained(
    name: str,
    dtype: torch.dtype,
    covered: Callable[[Any], Any],
    masked: bool = False,
    device_map: str | Mapping[str, str | int] | None = None,
) -> tuple[Any, Any]:
    """The Hugging Face module and tokenizer of a name; only a name of the hub may reach the network.

    `covered` raises ModelError for a configuration that is not covered, and is asked before anything is built; `masked`
    is for a masked language model, instead of a causal one. ModelError also if it cannot be found or read, or its
    weights are not those that its configuration describes.
    """
    if name == BUILTIN_NAME:
        return with_builtin(lambda folder: _read(str(folder), name, dtype, covered, masked, device_map), dtype)
    return _read(name, name, dtype, covered, masked, device_map)


def split_revision(name: str) -> tuple[str, str | None]:
    """`name@revision` in its two parts; of a folder the folder of that revision, and None.

    A revision of a name of the hub is a branch, a tag or a commit, such as the checkpoints of Pythia, `step1000`. That
    of a folder is a folder in it, as `kcwb.world.train_world` keeps them.
    """
    base, found, revision = name.rpartition("@")
    if not found or Path(name).is_dir():
        return name, None
    if not base or not revision:
        raise SettingError(f"{name!r} is not a name, @ and a revision, such as 'EleutherAI/pythia-70m@step1000'.")
    if base == BUILTIN_NAME:
        raise SettingError(f"{BUILTIN_NAME} is built in, and has no revisions.")
    if not Path(base).is_dir():
        return base, revision
    kept = sorted(path.parent.name for path in Path(base).glob("*/config.json"))
    if revision not in kept:
        raise ModelError(f"The folder {base} has no revision {revision!r}; it has {', '.join(kept) or 'none'}.")
    return str(Path(base) / revision), None


def _read(source: str, name: str, dtype: Any, covered: Callable[[Any], Any], masked: bool, device_map: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    source, revision = split_revision(source)
    local = Path(source).is_dir()
    safe: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    if revision is not None:
        safe["revision"] = revision
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    try:
        with no_bars(local):
            stored = stored_weights(Path(source)) if local and name != BUILTIN_NAME else None
            _require_plain(source, stored, local_files_only=local, revision=revision)
            config = AutoConfig.from_pretrained(source, **safe)
            covered(config)
            if stored is not None:
                _require_room(config, kind, stored)
            loaded: Any = kind.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map=device_map,
                **safe,
            )
            module, found = loaded
            tokenizer = _tokenizer(source, safe)
            tokenizer("a")  # one without a token for the unknown fails here
    except ModelError:
        raise
    except Exception as error:  # a cut or foreign file fails in many ways
        reason = f"{' '.join(str(error).split()):.300}"
        if "trust_remote_code" in str(error):
            reason = "it comes with Python code of its own, which kcwb never runs."
        raise ModelError(
            f"The model {name!r} cannot be loaded: {reason} A name is {BUILTIN_NAME!r} (built in, works offline), the "
            "folder of a causal language model, or a name on the Hugging Face hub (needs the network, or its cache), "
            "with @ and a revision where it is not the main one."
        ) from error
    _require_whole(found, name)
    return module, tokenizer


def _tokenizer(source: str, safe: dict[str, Any]) -> Any:
    """The tokenizer of a name; where it says that it is what tokenizer.json says, not what its model's family has.

    Beside a Qwen2 model, AutoTokenizer would otherwise split every text as Qwen2 does, into no tokens at all.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    said = get_tokenizer_config(source, local_files_only=safe["local_files_only"], revision=safe.get("revision"))
    generic = said.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in said
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(source, **safe)


class Stored(NamedTuple):
    """What the files of weights of a folder hold."""

    tensors: int
    size: int


def stored_weights(folder: Path) -> Stored:
    """How many tensors and bytes a folder's files hold; their headers are read, nothing else."""
    from safetensors import safe_open

    tensors = size = 0
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        size += path.stat().st_size
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors += len(file.keys())
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                tensors += len(archive.namelist())
        else:  # the format of torch before 1.6
            tensors += path.stat().st_size // 64
    return Stored(tensors, size)


def _require_plain(source: str, stored: Stored | None, **where: Any) -> None:
    """Raise ModelError for a configuration that asks for foreign code, or for more layers than there are weights.

    It is looked at before Hugging Face makes an object of it, which writes out a list entry for each layer.
    """
    from transformers import PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(source, **where)
    kind = raw.get("model_type")
    if "auto_map" in raw and kind not in FAMILIES and kind not in ENCODERS:
        raise ModelError(f"The model {str(source)!r} comes with Python code of its own, which kcwb never runs.")
    for key, value in raw.items():
        if "attn_implementation" in key and "/" in str(value):
            raise ModelError(
                f"config.json of {str(source)!r} asks for code of the hub ({key}: {value!r:.60}); remove it."
            )
    layers = max([raw[key] for key in _LAYERS if isinstance(raw.get(key), int)], default=0)
    for _, times in raw.get("attention_types") or ():  # GPT-Neo
        layers = max(layers, times)
    if stored is not None and layers * _LEAST > stored.tensors:
        raise ModelError(
            f"config.json of {str(source)!r} describes {layers:,} layers, but its files of weights hold "
            f"{stored.tensors:,} tensors. Get the files again, or correct config.json."
        )


def _require_room(config: Any, kind: Any, stored: Stored) -> None:
    """Raise ModelError for a configuration of more weights than the files can hold, before any memory is taken."""
    with torch.device("meta"):
        empty = kind.from_config(config, trust_remote_code=False)
    weights = sum(parameter.numel() for parameter in empty.parameters())
    tables = sum(buffer.numel() for buffer in empty.buffers())
    if weights > 2 * stored.size or tables > 2 * stored.size + _TABLES:  # two weights in a byte: 4-bit quantisation
        raise ModelError(
            f"The configuration describes a {config.model_type} model of {weights:,} weights and {tables:,} entries of "
            f"tables, but its files hold {stored.size:,} bytes. Get the files again, or correct config.json."
        )
    edges = config.num_hidden_layers**2 * (config.num_attention_heads + 1) * (3 * config.num_attention_heads + 1)
    if edges > _EDGES:
        raise ModelError(
            f"The configuration describes {config.num_hidden_layers:,} layers of {config.num_attention_heads:,} heads: "
            f"a graph of {edges:,} pairs of sender and receiver; {_EDGES:,} at most are covered."
        )


def _require_whole(found: Mapping[str, Collection[Any]], name: str) -> None:
    """Raise ModelError if the files of a model lack weights, or hold others than its configuration describes."""
    shapes = {key: f": {tuple(stored)} instead of {tuple(wanted)}" for key, stored, wanted in found["mismatched_keys"]}
    surplus = [key for key in found["unexpected_keys"] if not _SURPLUS.search(key)]
    faults = {
        "missing": dict.fromkeys(found["missing_keys"], ""),
        "of another shape": shapes,
        "not the model's": dict.fromkeys(surplus, ""),
    }
    words = [
        f"{len(keys)} {fault} ({first}{keys[first]}{', ...' if len(keys) > 1 else ''})"
        for fault, keys in faults.items()
        for first in sorted(keys)[:1]
    ]
    if words or found["error_msgs"]:
        reason = ", ".join(words) or " ".join(map(str, found["error_msgs"]))[:300]
        raise ModelError(
            f"The weights of {name!r} are not those that its config.json describes: {reason}. Missing weights would be "
            "filled at random. Get the files again, or correct config.json."
        )


def named_or_given(
    model: Any, tokenizer: Any, read: Callable[[str], tuple[Any, Any]], verb: str, revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any, str]:  # fmt: skip
    """Module, tokenizer and name of what `read` makes of a name, or of a model in memory, for which `verb` is called.

    A `revision` becomes part of the name, so that whoever has the name can load the same model. SettingError if a
    tokenizer is missing or superfluous, or a model in memory has another precision than `dtype`.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise SettingError("A tokenizer is only taken beside a model in memory; a named model brings its own.")
        name = str(model) if revision is None else f"{model}@{revision}"
        return *read(name), name
    if revision is not None:
        raise SettingError("A model in memory is one revision already; a revision is of a name or a folder.")
    if tokenizer is None:
        raise SettingError(f"A model in memory needs its tokenizer: {verb}(model, tokenizer).")
    if dtype is not None and model.dtype != dtype:
        raise SettingError(
            f"A model in memory keeps its precision, {model.dtype}. Convert it first: model.to({dtype})."
        )
    return model, tokenizer, str(model.config.name_or_path or type(model).__name__)


def require_fit(tokenizer: Any, rows: int, name: str, needed: Collection[int | None] = ()) -> None:
    """Raise ModelError if a tokenizer gives ids beyond the rows of the embedding.

    Tokens that were added to its vocabulary count only where they are `needed`: some published models have more of
    them than rows, for pictures, and no text has them.
    """
    added = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id, *needed}
    highest = max(set(tokenizer.get_vocab().values()) - added, default=0)
    if highest >= rows:
        raise ModelError(
            f"The tokenizer of {name} has {len(tokenizer):,} tokens, with ids up to {highest:,}, but the model's "
            f"embedding has {rows:,} rows. Load it with its own tokenizer, or enlarge it (resize_token_embeddings)."
        )


def require_fast(tokenizer: Any, name: str) -> None:
    """Raise ModelError if a tokenizer reports no character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer of {name} reports no character offsets, which are needed to find a subject's tokens. "
            "Load the model with its fast tokenizer (tokenizer.json)."
        )


#: What options of a configuration raise that the code which runs a model does not foresee; a cancel is none of them.
UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def running(module: Any, name: str) -> Iterator[None]:
    """Have these become a ModelError of one clear line; errors of ours stay as they are."""
    try:
        yield
    except KcwbError:
        raise
    except UNFORESEEN as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}".removesuffix(": ")
        raise ModelError(
            f"{name} ({type(module).__name__}) cannot be run node by node ({reason}). An option of its configuration "
            "is not covered, or it does not fit into memory."
        ) from error
