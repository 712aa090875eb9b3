"""The pictures that a notebook names, put into its report.

A name is looked up as browsers and JupyterLab do: percent-encoded or not, in any Unicode normalisation, with or without
a query. What is found is embedded if it is a picture, which its content says and not its name. So a report can hold
pictures from beside or above the notebook (`../figures/a.png`), but no other file of the machine that made it; absolute
paths and addresses elsewhere are not followed.
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

from kcwb.errors import DataError

_ATTACHMENT, _DATA = "attachment:", "data:"
_DRAWN = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp", "image/x-icon")
_SVG = "http://www.w3.org/2000/svg"


class Pictures:
    """Those of one cell: in the notebook's folder, or attached to it (name -> type -> content in base64)."""

    def __init__(self, folder: Path, attachments: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._folder, self._attachments = folder, attachments or {}

    def embedded(self, source: str) -> str:
        """The picture that an `src` names, as a data URI; DataError, in a few words, if there is none to embed."""
        source = source.strip()
        if source[: len(_DATA)].lower() == _DATA:
            return source
        if source[: len(_ATTACHMENT)].lower() == _ATTACHMENT:
            return self._attached(source[len(_ATTACHMENT) :])
        path = next(filter(None, map(self._found, _names(source))), None)
        if path is None:
            elsewhere = re.match(r"[\\/]|[A-Za-z][A-Za-z\d+.-]*:", source)
            raise DataError(
                f"a picture from elsewhere is not part of this report: {source}"
                if elsewhere
                else f"missing picture: {unquote(source)}"
            )
        try:
            return data_uri(path.read_bytes())
        except (OSError, DataError) as error:
            raise DataError(f"not a picture that can be shown: {unquote(source)}") from error

    def _attached(self, name: str) -> str:
        wanted = {_composed(one) for one in (name, unquote(name))}
        bundle = next((some for key, some in self._attachments.items() if _composed(key) in wanted), None)
        if bundle is None:
            raise DataError(f"missing attachment: {unquote(name)}")
        for content in bundle.values():
            try:
                return data_uri(_content("".join(content)))
            except (DataError, TypeError):
                continue
        raise DataError(f"not a picture that can be shown: {unquote(name)}")

    def _found(self, name: str) -> Path | None:
        """The file of a name, or one whose name differs only in its Unicode normalisation."""
        path = self._folder
        if Path(name).is_absolute():
            return None
        try:
            for part in Path(name).parts:
                exact = path / part
                if part != ".." and not exact.exists():
                    alike = [one for one in path.iterdir() if _composed(one.name) == _composed(part)]
                    exact = alike[0] if alike else exact
                path = exact
            return path if path.is_file() else None
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return None


def data_uri(content: bytes) -> str:
    """A picture as a data URI; DataError if it is none that browsers draw."""
    kind = _kind(content)
    if kind == "image/svg+xml":
        content = _with_namespace(content)
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _kind(content: bytes) -> str:
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            kind = image.get_format_mimetype() or ""
            kind = "image/jpeg" if kind == "image/mpo" else kind  # JPEG, then more that browsers leave out
    except Exception:  # what pillow's readers of many formats raise
        kind = "image/svg+xml" if _is_svg(content) else ""
    if kind not in (*_DRAWN, "image/svg+xml"):
        raise DataError("no picture that browsers draw")
    return kind


def _is_svg(content: bytes) -> bool:
    try:
        return ElementTree.fromstring(content).tag in ("svg", f"{{{_SVG}}}svg")
    except (ElementTree.ParseError, ValueError, LookupError):
        return False


def _with_namespace(content: bytes) -> bytes:
    """An SVG that was written to stand in a page, where it needs none."""
    if ElementTree.fromstring(content).tag == "svg":
        return re.sub(rb"<svg\b", f'<svg xmlns="{_SVG}"'.encode(), content, count=1)
    return content


def _content(text: str) -> bytes:
    """What base64 holds; SVG may stand in a notebook as it is."""
    try:
        return base64.b64decode(text, validate=False) if "<" not in text else text.encode("utf-8")
    except ValueError as error:
        raise DataError("damaged base64") from error


def _names(source: str) -> Iterator[str]:
    """What an address may mean as a name of a file, the likeliest first."""
    yield unquote(source)
    yield source
    try:
        path = unquote(urlsplit(source).path)
    except ValueError:  # brackets that hold no address
        return
    yield path
    yield path.replace("\\", "/")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
