"""A loaded model becomes a Hugging Face folder that loads again bit for bit; edits that are in it stay in.

The folder has what `from_pretrained` reads, under Hugging Face's own names, and `kcwb.json`:

- `digest`: that of the weights in the files, which `load_model(folder)` gives the model;
- `model_digest`: what the model's was when it was saved. The two differ while an edit is in: then a model's digest is
  that of the unedited weights and of the edits together, so that circuits say what they were found on. Those circuits
  are taken as the loaded model's own (`Model.has_weights`);
- `edits`: what was edited, the latest last; in the files it cannot be taken out;
- `prepend_bos`: what `load_model(folder)` does where nothing else is said; and sizes and digests of the files.

The folder is whole or not there: it is written beside its place, read back and compared, and renamed.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcwb.errors import KcwbError, ModelError, SettingError
from kcwb.models.cache import MANIFEST, file_digests, put_folder, read_manifest, save_model
from kcwb.models.digest import weights_digest
from kcwb.models.families import covered_family
from kcwb.models.plain import plain_copy
from kcwb.models.reading import UNFORESEEN, read_pretrained
from kcwb.versions import versions

if TYPE_CHECKING:
    from kcwb.models.loading import Model

FORMAT = "kcwb-model-1"
_TEXTS = ("The capital of France is Paris.", " a\n\tb  c", "Москва 東京 1984 😀", "w1 w2")


def save_folder(model: Model, folder: str | Path, force: bool = False) -> Path:
    """Write a model as a Hugging Face folder; see `Model.save`."""
    try:
        target = Path(folder).expanduser().resolve()
        _require_free(target, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            beside.mkdir()
            _write(model, beside)
            _require_free(target, force)
            put_folder(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except KcwbError:
        raise
    except (OSError, *UNFORESEEN) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error!s:.200}"
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "a file is where a folder has to be"
        raise ModelError(f"{model.name} cannot be saved as {str(folder)!r:.200}: {reason}.") from error
    return target


def saved_record(folder: str | Path) -> Mapping[str, Any]:
    """What a folder that was written here says about the model; empty for others."""
    kinds = {"digest": str, "model_digest": str, "edits": list, "prepend_bos": bool}
    try:
        record = read_manifest(Path(folder))
        right = all(isinstance(record[key], kind) for key, kind in kinds.items())
        return record if record["format"] == FORMAT and right else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _require_free(target: Path, force: bool) -> None:
    """Raise SettingError if the place is taken by something that must not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise SettingError(f"{target} is a file. Choose another folder.")
    found = sorted(path.name for path in target.iterdir())
    if any(path.is_dir() for path in target.iterdir()):
        raise SettingError(
            f"{target} holds folders, which a model's folder does not; they are not replaced. Choose another."
        )
    try:
        ours = read_manifest(target)
        own = {*ours["files"], MANIFEST} if ours["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    foreign = [name for name in found if name not in own]
    if foreign and not force:
        raise SettingError(
            f"{target} holds {len(foreign)} files that are not of a model saved here ({foreign[0]!r:.60}). Choose "
            "another folder; force=True replaces it with all that is in it."
        )


def _write(model: Model, folder: Path) -> None:
    """Write the folder and compare what is read back."""
    module = plain_copy(model.bridge.original_model)
    if getattr(module, "hf_quantizer", None) is not None:
        raise ModelError(f"{model.name} is quantised, which cannot be saved. Load it in float32 or bfloat16.")
    digest = save_model(module, model.tokenizer, folder)
    if not model.edits and digest != model.digest:
        raise ModelError(
            f"The weights of {model.name} are not those that it was loaded with ({digest[:12]}, {model.digest[:12]}): "
            "something other than an Edit has changed them. Load it again to save it as it is."
        )
    read, tokenizer = read_pretrained(str(folder), model.dtype, covered_family)
    if weights_digest(read) != digest:
        raise ModelError(
            f"{model.name} does not read back as it is: its configuration (tied weights, precision) says something "
            "else than its weights. Nothing was saved."
        )
    if any(tokenizer(text).input_ids != model.tokenizer(text).input_ids for text in _TEXTS):
        raise ModelError(
            f"The tokenizer of {model.name} ({type(model.tokenizer).__name__}) does not read back as it is. Nothing "
            "was saved."
        )
    record = {
        "format": FORMAT,
        "name": model.name,
        "digest": digest,
        "model_digest": model.digest,
        "unedited_digest": model.unedited_digest,
        "edits": [*model.saved.get("edits", ()), *model.edits],
        "dtype": str(model.dtype).removeprefix("torch."),
        "prepend_bos": model.prepend_bos,
        "versions": versions(),
        **file_digests(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
