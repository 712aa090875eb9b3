"""What a person has done to a circuit: pins, groups, names, notes, and the edges that are cut out and forced in.

A session belongs to one circuit, which it knows by its digest, and is kept in that circuit's file, under a key of its
own with a version of its own:

    {"format": "kcwb-circuit/1", ..., "session": {"format": 1, "circuit": "<digest>", "pinned": [...], "groups": {...},
     "names": {...}, "notes": {...}, "cut": [...], "forced": [...]}, "edges": [...]}

Who does not know the key reads the circuit without it. A session that is damaged, or another circuit's, is left out
with a warning when a file is read: the circuit is worth more. Text is text: it is written and read as it is, and it is
for whoever shows it to escape it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from kcwb.errors import CircuitError, KcwbError, SettingError, nearest, shown, warn
from kcwb.settings import fits
from kcwb.verbs import noun, verb

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.models.graph import Graph

_FORMAT = 1
_NAME, _TEXT = 120, 4000  # letters of a name, and of a note


@noun
@dataclass(frozen=True)
class Session:
    """What a person has done to a circuit; `Circuit.with_session` checks it against the circuit and keeps it with it.

    Attributes
    ----------
    pinned
        Nodes.
    groups
        Name -> nodes; a node is in one group at most.
    names, notes
        Node -> what a person calls it, and has to say of it.
    cut, forced
        Edges of the circuit that are cut out of it; edges of its graph, not in it, that are forced in.
    circuit
        The digest of the circuit; empty as long as it belongs to none.
    """

    pinned: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    cut: Sequence[str] = ()
    forced: Sequence[str] = ()
    circuit: str = ""

    def __post_init__(self) -> None:
        """Take copies, so that nothing changes it, and refuse what is too long, or said twice."""
        for name in ("pinned", "cut", "forced"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        object.__setattr__(self, "groups", {name: tuple(dict.fromkeys(some)) for name, some in self.groups.items()})
        for name, longest in (("names", _NAME), ("notes", _TEXT)):
            object.__setattr__(self, name, dict(getattr(self, name)))
            for node, text in getattr(self, name).items():
                if not fits(text, str) or len(text) > longest:
                    raise SettingError(
                        f"{name}, {shown(node)}: {shown(text)} is not text of at most {longest} letters."
                    )
        for name, nodes in self.groups.items():
            if not fits(name, str) or not name or len(name) > _NAME or not nodes:
                raise SettingError(f"groups: {shown(name)} has no nodes, or no name of at most {_NAME} letters.")
        one_group_each("groups", self.groups)

    @verb
    def compare(self, other: Session) -> pd.DataFrame:
        """What differs between two sessions.

        Returns
        -------
        DataFrame
            One row per difference: `part` (`pinned`, `groups`, ..., or `circuit` where they are of two), `what` (the
            node, group or edge), and `left` and `right`, what this session and the other one say of it; empty where
            they say nothing.
        """
        rows = []
        for one in fields(self):
            left, right = (_told(one.name, getattr(session, one.name)) for session in (self, other))
            for what in dict.fromkeys([*left, *right]):
                if left.get(what) != right.get(what):
                    rows.append((one.name, what, left.get(what, ""), right.get(what, "")))
        return pd.DataFrame(rows, columns=["part", "what", "left", "right"])


def session_of(circuit: Circuit, session: Session) -> Session:
    """A session as that of a circuit, for `Circuit.with_session`, which says what is refused."""
    if session.circuit not in ("", circuit.digest):
        raise CircuitError(
            f"The session is of the circuit {shown(session.circuit[:12])}, not of this one, {circuit.digest:.12}."
        )
    named = {f"groups, {shown(group)}": nodes for group, nodes in session.groups.items()}
    for where, nodes in {"pinned": session.pinned, **named, "names": session.names, "notes": session.notes}.items():
        check_nodes(where, nodes, circuit.graph)
    check_edges("cut", session.cut, circuit, kept=True)
    check_edges("forced", session.forced, circuit, kept=False)
    return replace(session, circuit=circuit.digest)


def check_nodes(where: str, nodes: Iterable[str], graph: Graph) -> None:
    """Refuse nodes that a graph has not; CircuitError."""
    known = set(graph.node_names)
    for node in nodes:
        if node not in known:
            raise CircuitError(
                f"{where}: there is no node {shown(node)}. {nearest(node[:60], graph.node_names, few=6)}"
            )


def check_edges(where: str, edges: Iterable[str], circuit: Circuit, kept: bool | None = None) -> list[str]:
    """The full names of edges; CircuitError if the graph has not got them, or (not) the circuit, as `kept` says."""
    graph, names = circuit.graph, {}
    for edge in edges:
        try:
            place = graph.edge_index(edge)
        except CircuitError as error:
            ends = edge.split("->")
            if len(ends) == 2 and ends[0] in graph.sender_names and ends[1] in graph.receiver_names:
                raise CircuitError(f"{where}: {' '.join(str(error).split())[:300]}") from None
            raise CircuitError(f"{where}: there is no edge {shown(edge)}; they are written input->a0.h0<q>.") from None
        if kept is not None and bool(circuit.kept[place]) != kept:
            raise CircuitError(f"{where}: {edge} is {'not in' if kept else 'in'} the circuit.")
        names[graph.edge_name(*place)] = None
    return list(names)


def one_group_each(where: str, groups: Mapping[str, Iterable[str]]) -> None:
    """Refuse a node that is in two groups; SettingError."""
    owner: dict[str, str] = {}
    for name, nodes in groups.items():
        for node in nodes:
            if owner.setdefault(node, name) != name:
                raise SettingError(f"{where}: {shown(node)} is in {shown(owner[node])} and in {shown(name)}.")


def played(circuit: Circuit, session: Session) -> Circuit:
    """A circuit without what a session of it cuts, and with what it forces in; see `session_of` for what is refused."""
    from kcwb.circuits.circuit import Circuit

    own, kept = session_of(circuit, session), circuit.kept.clone()
    for names, value in ((own.cut, False), (own.forced, True)):
        for name in names:
            kept[circuit.graph.edge_index(name)] = value
    told = {**circuit.provenance, "cut": list(own.cut), "forced": list(own.forced)}
    return Circuit(circuit.graph, kept, circuit.scores, told)


def session_json(session: Session) -> dict[str, Any]:
    """A session as a circuit's file has it."""
    return {"format": _FORMAT, "circuit": session.circuit} | {
        one.name: getattr(session, one.name) for one in fields(session) if one.name != "circuit"
    }


def with_session_of_json(circuit: Circuit, data: Any, where: object) -> Circuit:
    """A circuit with the session that its file has; without it, and with a warning, where it cannot be used."""
    try:
        if not isinstance(data, Mapping):
            raise CircuitError(f"expected an object, found {shown(data)}.")
        if data.get("format") != _FORMAT:
            raise CircuitError(f"its format is {shown(data.get('format'))}, which this version does not read.")
        given = {one.name: data[one.name] for one in fields(Session) if one.name in data}
        if not given.get("circuit"):
            raise CircuitError("it does not say of which circuit it is.")
        return circuit.with_session(Session(**given))
    except (KcwbError, TypeError, ValueError, AttributeError, RecursionError) as error:
        warn(f"The session in {where} is left out: {error}")
        return circuit


def _told(part: str, value: Any) -> dict[str, str]:
    """What a part of a session says, thing by thing."""
    if isinstance(value, Mapping):
        return {key: one if isinstance(one, str) else ", ".join(one) for key, one in value.items()}
    return {"": value} if isinstance(value, str) else dict.fromkeys(value, part)
