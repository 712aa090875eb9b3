"""Two sessions of one circuit side by side: what two people, or one of them twice, did to it.

The circuit as the one left it and as the other left it are drawn as `compare_view` draws two circuits: an edge that
only one has cut, or forced in, has the colour of the other, or of this one. What both group is drawn as a group; what
either pins is pinned; a node has the name that both, or the only one who named it, gave it, else both names. All that
differs is listed beside the picture, each line a button that leads to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kcwb.settings import Count
from kcwb.verbs import verb
from kcwb.workbench.graph.drawing import Drawing, Look, Roles, draw_two
from kcwb.workbench.graph.page import GraphView, view_of
from kcwb.workbench.tables import shorten

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.session import Session

_NAME = 120  # letters of a node's name


@verb
def compare_sessions_view(
    circuit: Circuit,
    left: Session,
    right: Session,
    *,
    names: Sequence[str] = ("left", "right"),
    roles: Roles | None = None,
    max_edges: Count = 20_000,
    height: Count = 640,
    title: str | None = None,
) -> GraphView:
    """Draw two sessions of a circuit in one picture, with the list of what differs.

    Parameters
    ----------
    circuit : Circuit
        The circuit that both are of.
    left, right : Session
        As `CircuitGraph.session` gives them, or a loaded circuit's `session`.
    names : two str
        What the legend and the list call them.
    roles, max_edges, height, title
        As in `graph_view`.

    Returns
    -------
    GraphView

    Raises
    ------
    CircuitError
        If a session is of another circuit, or names what this one has not.
    SettingError
        As in `graph_view`, or if ``names`` are not two.
    """
    drawing, _, state = two_sessions(circuit, left, right, names, Look(roles, max_edges, title, None))
    return view_of(drawing, height, state)


def two_sessions(
    circuit: Circuit, left: Session, right: Session, names: Sequence[str], look: Look
) -> tuple[Drawing, Circuit, dict[str, Any]]:
    """The drawing, the circuit of all its edges, and what is pinned, grouped and named in it."""
    from kcwb.circuits.session import played, session_of

    left, right = session_of(circuit, left), session_of(circuit, right)
    one, other = played(circuit, left), played(circuit, right)
    drawing, both = draw_two(one, other, names, look), one | other
    known = {*both.nodes["node"]}

    def said(what: str) -> dict[str, tuple[str, str]]:
        """What either says of a node."""
        ours, theirs = getattr(left, what), getattr(right, what)
        pairs = {node: (ours.get(node, ""), theirs.get(node, "")) for node in dict.fromkeys([*ours, *theirs])}
        return {node: pair for node, pair in pairs.items() if node in known and any(pair)}

    state: dict[str, Any] = {
        "pinned": [node for node in dict.fromkeys([*left.pinned, *right.pinned]) if node in known],
        "groups": {name: list(some) for name, some in left.groups.items() if right.groups.get(name) == some},
        "names": {
            node: shorten(" / ".join(dict.fromkeys(filter(None, pair))), _NAME) for node, pair in said("names").items()
        },
        "notes": {
            node: "\n".join(f"{name}: {text}" for name, text in zip(names, pair, strict=True) if text)[:4000]
            for node, pair in said("notes").items()
        },
    }
    rows = left.compare(right)[["part", "what", "left", "right"]].values.tolist()
    return drawing._replace(differences=[[*map(str, names)], *rows] if rows else []), both, state
