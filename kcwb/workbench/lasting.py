"""A widget and its plain drawing, so that a saved notebook shows something without a kernel.

A notebook holds of a widget only a reference to what the kernel had. Opened without it, JupyterLab writes "Error
displaying widget" in the widget's place, whatever else that output holds. So the drawing is an output of its own, below
the widget's, and a style sheet in it hides the drawing while the widget lives, else what is left of the widget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from IPython.core.getipython import get_ipython
from IPython.display import display, update_display
from ipywidgets import DOMWidget

from kcwb.workbench import tables

VIEW = "application/vnd.jupyter.widget-view+json"
"""The type of an output that is a widget."""

_LIVES = ":has(.kcwb-w-ID:not(.jupyter-widgets-disconnected))"
_OUTPUT = ".jp-OutputArea-child:has({})"
_DRAWN = "> * > .kcwb-p-ID"  # right in an output: not in one that holds outputs itself, as those of `interact` do
_STYLE = (
    f"<style>:root{_LIVES} .kcwb-p-ID, .jp-OutputArea{_LIVES} {_OUTPUT.format(_DRAWN)},"
    f"{_OUTPUT.format('> .lm-Panel')}:has(+ * {_DRAWN}):not({_LIVES}) {{ display: none }}</style>"
)


class Place(NamedTuple):
    """Where a drawing stands: by which run of which cell, and what is drawn there."""

    cell: str
    run: str
    drawn: str


def here() -> tuple[str, str]:
    """The cell that is run, and which of its runs this is; in pages that do not name cells, each run is another."""
    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent() if kernel is not None else {}
    run = request.get("header", {}).get("msg_id", "")
    return request.get("metadata", {}).get("cellId", run), run


def drawn(draw: Callable[[], str]) -> str:
    """A plain drawing as HTML, or what went wrong with it: the widget lives on without it."""
    try:
        return draw()
    except Exception as error:
        words = f"This cannot be drawn. {type(error).__name__}: {error}"
        return tables.styled(f'<div class="kc-error">{tables.text(words, 1000)}</div>')


def show(widget: DOMWidget, bundle: Mapping[str, Any], places: dict[str, Place]) -> None:
    """Show a widget and its plain drawing, of a bundle by types of output, in two outputs.

    `places` gets the drawing's place by its display id, for `renew`; those of the cell's earlier runs are no longer.
    """
    cell, run = here()
    for key in [key for key, place in places.items() if place.cell == cell and place.run != run]:
        places.pop(key, None)
    if VIEW in bundle:
        widget.add_class(f"kcwb-w-{widget.model_id}")
        display({VIEW: bundle[VIEW], "text/html": "", "text/plain": ""}, raw=True)
    drawing = _drawing(widget, bundle)
    handle = display(drawing, raw=True, display_id=True)
    if handle is not None and VIEW in bundle:
        places[handle.display_id] = Place(cell, run, drawing["text/html"])


def renew(widget: DOMWidget, bundle: Mapping[str, Any], places: dict[str, Place]) -> None:
    """Draw anew where the drawing is another now; the widget stays as it is."""
    drawing = _drawing(widget, bundle)
    for key, place in list(places.items()):  # meanwhile another thread may show it once more
        if place.drawn != drawing["text/html"]:
            update_display(drawing, display_id=key, raw=True)
            places[key] = place._replace(drawn=drawing["text/html"])


def _drawing(widget: DOMWidget, bundle: Mapping[str, Any]) -> dict[str, Any]:
    """What the second output holds: all but the widget."""
    kept = {kind: shown for kind, shown in bundle.items() if kind != VIEW}
    if VIEW in bundle:
        name = widget.model_id
        kept["text/html"] = f'{_STYLE.replace("ID", name)}<div class="kcwb-p-{name}">{kept["text/html"]}</div>'
    return kept
