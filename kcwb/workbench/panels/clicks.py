"""Clicks in a panel's graph, told to Python.

How a click gets here: the graph's frame posts `{kcwb: "select", nodes: [...], edges: [...]}` to the page that holds
it; a listener in a frame of its own (``listener.html``) takes that message if it comes from this panel's graph, and
writes the names into a hidden text field, whose value Python sees. What names nothing of the model is left alone.
"""

from __future__ import annotations

import contextlib
import html
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import ipywidgets as W

from kcwb.errors import CircuitError
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
        Called with a change of the hidden field; `names` and `edges` read it.

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
        known = set(model.graph.node_names)
        return tuple(dict.fromkeys(name for name in _listed(value, "nodes") if isinstance(name, str) and name in known))

    @staticmethod
    def edges(value: str, model: Model) -> tuple[str, ...]:
        """The edges of the model that a value of the field names, as `sender->receiver`."""
        found = []
        for pair in _listed(value, "edges"):
            if isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair):
                with contextlib.suppress(CircuitError):
                    found.append(model.graph.edge_name(*model.graph.edge_index("->".join(pair))))
        return tuple(dict.fromkeys(found))


def _listed(value: str, name: str) -> list[Any]:
    """The first entries of a list in a value of the field."""
    try:
        listed = json.loads(value)[name]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return listed[:_MOST] if isinstance(listed, list) else []
