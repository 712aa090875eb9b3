"""Clicks in a panel's graph, told to Python.

How a click gets here: the graph's frame posts `{kcwb: "select", nodes: [...]}` to the page that holds it; a listener in
a frame of its own (``listener.html``) takes that message if it comes from this panel's graph, and writes the names into
a hidden text field, whose value Python sees. What names no node of the model is left alone.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import ipywidgets as W

from kcwb.models.loading import Model
from kcwb.workbench.panels.widgets import Group

GRAPH_CLASS = "kcwb-graph"
"""The CSS class of the widget whose graph is listened to."""

_MOST = 64  # nodes


class GraphClicks(Group):
    """What is clicked in a panel's graph, told to Python.

    Parameters
    ----------
    on_click
        Called with a change of the hidden field; `names` reads it.

    Attributes
    ----------
    widget
        The field and the listener, invisible; it must stand in the same panel as the graph, where it is always there.
    """

    def __init__(self, on_click: Callable[[Any], None]) -> None:
        self.field = W.Text(layout=W.Layout(display="none"))
        self.field.add_class("kcwb-clicked")
        self.field.observe(on_click, "value")
        page = resources.files("kcwb.workbench.panels").joinpath("listener.html").read_text(encoding="utf-8").strip()
        source = html.escape(page, quote=True)
        listener = W.HTML(
            f'<iframe srcdoc="{source}" title="" aria-hidden="true" tabindex="-1" width="0" height="0" '
            'style="border:0;position:absolute"></iframe>'
        )
        self.widget = W.Box([self.field, listener], layout=W.Layout(height="0", margin="0", overflow="hidden"))

    @staticmethod
    def names(value: str, model: Model) -> tuple[str, ...]:
        """The nodes of the model that a value of the field names; what else it holds is left alone."""
        try:
            nodes = json.loads(value)["nodes"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return ()
        known = set(model.graph.node_names)
        listed = nodes[:_MOST] if isinstance(nodes, list) else []
        return tuple(dict.fromkeys(name for name in listed if isinstance(name, str) and name in known))
