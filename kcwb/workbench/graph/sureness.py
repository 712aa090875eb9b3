"""How sure each edge of an ensemble is, as a graph shows it: how opaque it is, and what hovering tells.

An edge is as opaque as its inclusion probability; what few draws keep is drawn faint, but never invisible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from kcwb.errors import CircuitError
from kcwb.workbench.tables import estimate, shorten

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.circuits.ensemble import Ensemble

FAINTEST = 0.12
"""How opaque an edge is that hardly any draw keeps."""

_ALONE = {
    "facts": "with other facts alone",
    "template": "in another wording alone",
    "setting": "with another setting alone",
    "ablation": "with the ablation drawn again alone",
    "order": "in another order alone",
}


def with_sureness(table: pd.DataFrame, circuit: Circuit, ensemble: Ensemble) -> pd.DataFrame:
    """A circuit's edges with `pi`, their inclusion probability, and `told`, lines of text about it."""
    if ensemble.graph != circuit.graph:
        raise CircuitError(f"The ensemble is of {ensemble.graph}; the circuit is of {circuit.graph}.")
    known = table[["sender", "receiver"]].merge(ensemble.edges, "left", ["sender", "receiver"])
    told = [
        told_of(row, ensemble) if math.isfinite(row["pi"]) else [f"kept in none of {len(ensemble)} draws"]
        for row in known.to_dict("records")
    ]
    return table.assign(pi=known["pi"].fillna(0.0).to_numpy(), told=pd.Series(told, table.index, dtype=object))


def told_of(row: Mapping[Any, Any], ensemble: Ensemble) -> list[str]:
    """What a row of `Ensemble.edges` says, in lines: how many draws kept it, and what removes it most often."""
    kept = f"kept in {row['draws']:.0f} of {len(ensemble)} draws: {estimate(row['pi'], row['low'], row['high'])}"
    lost = {name: row[name] for name in ensemble.twins if math.isfinite(row[name])}
    if not lost:
        return [kept]
    name = max(lost, key=lambda one: lost[one])
    of_them = "them" if len(ensemble.twins[name]) == len(ensemble) else "those drawn again"
    if not lost[name]:
        return [kept, "no source of chance removes it alone"]
    return [kept, f"{alone(name)} it is gone from {lost[name]:.0%} of {of_them}"]


def alone(source: str) -> str:
    """What is meant by drawing one source again."""
    return _ALONE.get(source, f"with another {shorten(source, 40)} alone")
