"""A widget and its plain drawing, so that a saved notebook shows something without a kernel.

A notebook holds of a widget only a reference to what the kernel had. Opened without it, JupyterLab writes "Error
displaying widget" in the widget's place, whatever else that output holds. So the drawing is an output of its own, below
the widget's, and a style sheet in it hides the drawing while the widget lives, else what is left of the widget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from IPython.display import display, update_display
from ipywidgets import DOMWidget

VIEW = "application/vnd.jupyter.widget-view+json"
"""The type of an output that is a widget."""

_LIVES = ":has(.kcwb-w-ID:not(.jupyter-widgets-disconnected))"
_OUTPUT = ".jp-OutputArea-child:has({})"
_STYLE = (
    f"<style>:root{_LIVES} .kcwb-p-ID, .jp-OutputArea{_LIVES} {_OUTPUT.format('.kcwb-p-ID')},"
    f"{_OUTPUT.format('> .lm-Panel')}:has(+ * .kcwb-p-ID):not({_LIVES}) {{ display: none }}</style>"
)


def show(widget: DOMWidget, bundle: Mapping[str, Any], places: dict[str, str]) -> None:
    """Show a widget and its plain drawing in two outputs.

    Parameters
    ----------
    widget
        What lives.
    bundle
        By types of output: the widget, its drawing as ``text/html``, and what else goes with that.
    places
        Gets the display id of the drawing and what is drawn there, for `renew`.
    """
    if VIEW in bundle:
        widget.add_class(f"kcwb-w-{widget.model_id}")
        display({VIEW: bundle[VIEW], "text/html": "", "text/plain": ""}, raw=True)
    drawn = _drawing(widget, bundle)
    handle = display(drawn, raw=True, display_id=True)
    if handle is not None and VIEW in bundle:
        places[handle.display_id] = drawn["text/html"]


def renew(widget: DOMWidget, bundle: Mapping[str, Any], places: dict[str, str]) -> None:
    """Draw anew where the drawing is another now; the widget stays as it is."""
    drawn = _drawing(widget, bundle)
    for key, before in places.items():
        if before != drawn["text/html"]:
            update_display(drawn, display_id=key, raw=True)
            places[key] = drawn["text/html"]


def _drawing(widget: DOMWidget, bundle: Mapping[str, Any]) -> dict[str, Any]:
    """What the second output holds: all but the widget."""
    kept = {kind: shown for kind, shown in bundle.items() if kind != VIEW}
    if VIEW in bundle:
        name = widget.model_id
        kept["text/html"] = f'{_STYLE.replace("ID", name)}<div class="kcwb-p-{name}">{kept["text/html"]}</div>'
    return kept
