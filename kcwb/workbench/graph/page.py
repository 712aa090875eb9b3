"""A circuit as an interactive picture: one HTML page that asks nothing of the network.

The page runs the instrument (`kcwb.workbench.graph.instrument`), the module that the widget runs too, on data that the
page holds; it is compressed and held by a small loader, so that a notebook of ten graphs stays small. What all pages
share is compressed once; drawing a circuit then only adds its data, so that a graph can follow a slider.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kcwb.files import write_text
from kcwb.outputs import PAGE, PAGE_MARK, check_output
from kcwb.settings import Count
from kcwb.verbs import verb
from kcwb.workbench.graph.drawing import COLOURS, ROLES, Drawing, Look, Roles, draw, draw_two
from kcwb.workbench.graph.instrument import scene, script

if TYPE_CHECKING:
    from pyvis.network import Network

    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.ensemble import Ensemble

__all__ = ["ROLES", "GraphView", "compare_view", "graph_view"]

_DATA = "__CIRCUIT__"  # where page.html has a circuit
_MOST = 100_000_000  # letters of a page
#: What is left of a frame, which no browser shows, in a notebook that was run elsewhere.
_UNTRUSTED = "This graph is shown in a notebook that is trusted: File, Trust Notebook."
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FILES = resources.files("kcwb.workbench.graph")
_LOADER = re.split("__TITLE__|__PAGE__", _FILES.joinpath("loader.html").read_text(encoding="utf-8"))
_LOADER[0] = _LOADER[0].replace("__MARK__", PAGE_MARK)
"""What stands before, between and after a graph's title and its compressed page."""


@dataclass(frozen=True)
class GraphView:
    """A drawn circuit: JupyterLab shows it as the value of a cell, ``to_html`` writes it as a page.

    A click posts ``{kcwb: "select", nodes: [names], edges: [[sender, receiver]]}`` to the window that holds the page.

    Attributes
    ----------
    page : str
        The complete page, in ASCII.
    height : int
        Height of the frame in a notebook, in pixels.
    title : str
        The page's title, as plain text.
    drawing : Drawing
        What is drawn and where.
    """

    page: str = field(repr=False)
    height: int
    title: str
    drawing: Drawing = field(repr=False)

    def _repr_html_(self) -> str:
        source, title = html.escape(self.page, quote=True), _ascii(self.title)
        return (
            f'<iframe srcdoc="{source}" title="{title}" width="100%" height="{self.height}" '
            f'style="border:0;display:block">{_UNTRUSTED}</iframe>'
        )

    def to_html(self, filename: str | os.PathLike[str] | None = None, *, force: bool = False) -> str | None:
        """Give the page as text, or write it to a file.

        Parameters
        ----------
        filename : path, optional
            Where to write. The file is complete or untouched: it is written aside and then renamed.
        force : bool
            Overwrite also a file that kcwb did not write.

        Returns
        -------
        str or None
            The page when no file name is given.

        Raises
        ------
        SettingError
            If the file cannot be written, or would replace one that is not ours.
        """
        if filename is None:
            return self.page
        check_output(Path(filename), PAGE, what="The graph", force=force, make_folder=True)
        write_text(Path(filename), self.page)
        return None

    def to_pyvis(self) -> Network:
        """The same nodes and edges, in the same places and (light) colours, as a network of pyvis to go on with.

        Returns
        -------
        pyvis.network.Network
            Nodes have their place in `drawing.nodes` as id, for a name may be any text and an id may not. There are no
            hover texts: pyvis would read some of them as HTML.
        """
        from pyvis.network import Network

        ink = COLOURS["light"]
        network = Network(height=f"{self.height}px", width="100%", directed=True, cdn_resources="in_line")
        network.toggle_physics(False)
        for i, node in enumerate(self.drawing.nodes):
            network.add_node(i, node.label or " ", shape="box", x=node.x, y=node.y, color=ink[node.tone])
        for edge in self.drawing.edges:
            network.add_edge(
                edge.start, edge.end, width=edge.width, color={"color": ink[edge.tone], "opacity": edge.strength}
            )
        return network


@verb
def graph_view(
    circuit: Circuit | Ensemble,
    *,
    roles: Roles | None = None,
    max_edges: Count = 20_000,
    height: Count = 640,
    title: str | None = None,
    details: Mapping[str, str] | None = None,
    ensemble: Ensemble | None = None,
) -> GraphView:
    """Draw a circuit.

    Parameters
    ----------
    circuit : Circuit or Ensemble
        Its ``edges`` and ``nodes`` are drawn; of an ensemble its consensus at one half, with its own draws.
    roles : mapping of node name to role, or DataFrame, optional
        ``"mover"``, ``"relation"``, ``"mixture"`` and ``"suppressor"`` colour a head; any other role is only
        named. Names that are not in the circuit are ignored. A table has the column ``role`` and either ``node`` or
        ``layer`` and ``head``.
    max_edges : int
        At most this many edges are drawn, the strongest; the page says so when some are left out. Of more than 2,000,
        each layer is drawn as one box, which a double click opens.
    height : int
        Height in a notebook, in pixels.
    title : str, optional
        A heading.
    details : mapping of node name to text, optional
        Plain text added to what hovering over a node shows.
    ensemble : Ensemble, optional
        Draws of this circuit: an edge is then as opaque as the share of them that keep it, and hovering tells how
        many do, and which source of chance alone removes it most often.

    Returns
    -------
    GraphView

    Raises
    ------
    SettingError
        If ``max_edges`` or ``height`` is not positive, or a table of roles lacks its columns.
    CircuitError
        If an edge names a node that ``circuit.nodes`` lacks, or the ensemble is of another graph.
    """
    return view_of(draw(circuit, Look(roles, max_edges, title, details, ensemble)), height)


@verb
def compare_view(
    left: Circuit,
    right: Circuit,
    *,
    names: Sequence[str] = ("left", "right"),
    roles: Roles | None = None,
    max_edges: Count = 20_000,
    height: Count = 640,
    title: str | None = None,
    details: Mapping[str, str] | None = None,
) -> GraphView:
    """Draw two circuits of one model in one picture: edges of the left one, of the right one and of both in colour.

    Scores of two methods have no common unit. So an edge's width, and what the slider hides, is its |score| as a
    share of the largest in its own circuit; for a shared edge, the larger of its two shares.

    Parameters
    ----------
    left, right : Circuit
        The circuits; edges are coloured, and nodes rimmed, by which of them holds them.
    names : two str
        What the legend calls them.
    roles, max_edges, height, title, details
        As in `graph_view`.

    Returns
    -------
    GraphView

    Raises
    ------
    CircuitError
        If the circuits' graphs differ.
    SettingError
        As in `graph_view`, or if ``names`` are not two.
    """
    return view_of(draw_two(left, right, names, Look(roles, max_edges, title, details)), height)


# --- the page ---


class _Shell(NamedTuple):
    """What the pages of all circuits share: all but the circuit, which is data between the two parts."""

    begun: bytes  # the first part, compressed
    compressor: Any  # by this, of which copies go on from there
    after: str


def is_graph_page(page: str) -> bool:
    """Whether a page is one that `GraphView` holds, of whatever circuit, and holds nothing else."""
    match = re.fullmatch("([^<>]*)".join(map(re.escape, _LOADER)), page)
    try:
        packed = base64.b64decode(match[2], validate=True) if match else b""
        text = zlib.decompressobj(wbits=31).decompress(packed, _MOST).decode("utf-8")
    except (ValueError, zlib.error):
        return False
    before, after = _text().split(_DATA)
    data = text.removeprefix(before).removesuffix(after)
    return f"{before}{data}{after}" == text and not re.search("[<>&]", data)


@cache
def script_hashes() -> tuple[str, ...]:
    """The scripts of all graphs' pages, as a content security policy names them; circuits are data in these pages."""
    scripts = [one for page in (_LOADER[-1], _text()) for one in re.findall(r"<script>(.*?)</script>", page, re.DOTALL)]
    digests = (hashlib.sha256(one.encode("utf-8")).digest() for one in scripts)
    return tuple(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)


def view_of(drawing: Drawing, height: int, state: Mapping[str, Any] | None = None) -> GraphView:
    """The page of a drawing; `state` has what a person did to it, by the names of the widget's traits."""
    shell = _shell()
    data = _json({"scene": scene(drawing), **(state or {})})
    compressor = shell.compressor.copy()
    packed = shell.begun + compressor.compress((data + shell.after).encode("utf-8")) + compressor.flush()
    title = drawing.title or "Knowledge circuit"
    before, between, after = _LOADER
    page = f"{before}{_ascii(title)}{between}{base64.b64encode(packed).decode('ascii')}{after}"
    return GraphView(page=page, height=int(height), title=title, drawing=drawing)


@cache
def _shell() -> _Shell:
    before, after = _text().split(_DATA)
    compressor = zlib.compressobj(9, wbits=31)  # gzip
    return _Shell(compressor.compress(before.encode("utf-8")), compressor, after)


@cache
def _text() -> str:
    """The page, but for its circuit."""
    return _FILES.joinpath("page.html").read_text(encoding="utf-8").replace("__SCRIPT__", script())


# --- text ---


def _json(value: Any) -> str:
    """JSON that may stand in a script: no character in it is one of HTML's, and all are ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _ascii(text: str) -> str:
    """Escaped for HTML, with every character beyond ASCII (lone surrogates too) as a reference."""
    shown = _CONTROLS.sub("\ufffd", text)  # of which references mean something else
    return html.escape(shown, quote=True).encode("ascii", "xmlcharrefreplace").decode("ascii")
