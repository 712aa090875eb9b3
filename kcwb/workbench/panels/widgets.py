"""The widgets and pieces of HTML that panels are put together from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from kcwb.errors import SettingError
from kcwb.workbench import tables
from kcwb.workbench.graph.widget import CircuitGraph

if TYPE_CHECKING:
    from kcwb.models.loading import Model

ROW = {
    "flex_flow": "row wrap",
    "align_items": "center",
    "grid_gap": "2px 14px",
    "width": "100%",
    "overflow": "visible",
}
"""The layout of widgets side by side, on a second line where there is no room."""


class Group:
    """Widgets that belong together; a panel that has one as an attribute closes them with its own."""


def check_edges(model: Model, **numbers: int | None) -> None:
    """Refuse a number of edges that the model has not."""
    for name, value in numbers.items():
        if value is not None and not 1 <= value <= model.graph.n_edges:
            raise SettingError(
                f"{name}={value}: {model.name} has {model.graph.n_edges:,} edges; ask for 1 to that many."
            )


def widgets_in(*values: Any) -> list[W.Widget]:
    """All widgets among values and what they hold: children, layouts, styles."""
    found: dict[int, W.Widget] = {}
    queue = list(values)
    while queue:
        one = queue.pop()
        if isinstance(one, Mapping):
            queue += one.values()
        elif isinstance(one, Group):
            queue += vars(one).values()
        elif isinstance(one, list | tuple):
            queue += one
        elif isinstance(one, W.Widget) and id(one) not in found:
            found[id(one)] = one
            queue += [getattr(one, key) for key in one.keys]
    return list(found.values())


def rows(*lines: Sequence[W.Widget] | W.Widget) -> list[W.Widget]:
    """Widgets from top to bottom; those of a list stand side by side."""
    return [line if isinstance(line, W.Widget) else W.HBox(line, layout=ROW) for line in lines]


def wide() -> W.HTML:
    """A place for HTML that fills the panel's width."""
    return W.HTML(layout=W.Layout(width="100%"))


def hidden_graph(height: int) -> CircuitGraph:
    """A place for a circuit, unseen until there is one."""
    graph = CircuitGraph(height=height, layout=W.Layout(width="100%", display="none"))
    graph.add_class("kcwb-graph")
    return graph


def room(least: int) -> W.Layout:
    """A widget that grows with the panel, from a width in pixels."""
    return W.Layout(flex=f"1 1 {least}px", min_width=f"min({least}px, 100%)", width="auto")


def button(words: str, icon: str, *, width: int = 96, **more: Any) -> W.Button:
    """A button."""
    return W.Button(description=words, icon=icon, layout=W.Layout(width=f"{width}px"), **more)


def dropdown(name: str, options: Any, value: Any, *, least: int = 250) -> W.Dropdown:
    """A menu with its name beside it, at least so many pixels wide."""
    return W.Dropdown(options=options, value=value, description=name, layout=room(least))


def numbered(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Options of a menu whose values are the texts' places."""
    return [(brief(text), i) for i, text in enumerate(texts)]


def offer(menu: W.Dropdown, options: Sequence[tuple[str, Any]], value: Any = None) -> None:
    """Give a menu other options, and choose a value, by default the first."""
    menu.options = options
    menu.value = options[0][1] if value is None and options else value


def brief(words: str, most: int = 120) -> str:
    """One line of a text, for menus: shortened where it would fill a screen, without what turns or breaks lines."""
    return tables.shorten("".join(c if c.isprintable() else " " for c in words), most)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02} s"


def the_file(path: str | Path, example: str) -> Path:
    """A file that a person named; SettingError if they named none."""
    if not str(path).strip():
        raise SettingError(f"Give the file a name, for example {example}.")
    return Path(os.path.expanduser(path))
