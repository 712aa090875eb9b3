"""A line in a panel that says when the kernel does not hear, as while other cells run.

The page asks, when the panel appears and whenever somebody does something in it; while nothing comes back, it says that
what is done is answered later.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import anywidget
import ipywidgets as W


class Echo(anywidget.AnyWidget):
    """Answers the page, and shows nothing as long as it does so soon."""

    _esm = resources.files("kcwb.workbench.panels").joinpath("echo.js").read_text(encoding="utf-8")

    def __init__(self) -> None:
        super().__init__(layout=W.Layout(margin="0", width="100%"))
        self.on_msg(_answer)


def _answer(widget: Any, content: Any, buffers: Any) -> None:
    asked = content.get("asked") if isinstance(content, dict) else None
    if isinstance(asked, str):
        widget.send({"heard": asked[:100]})
