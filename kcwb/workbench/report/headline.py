"""What a report says first, for whoever gets it by mail: how large the circuit is, and how it does alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from kcwb.workbench import tables

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from kcwb.circuits.circuit import Circuit

HEADLINE = "application/vnd.kcwb.headline+json"
"""The type of output whose content goes under the title of a report: `{"line": text}`."""
_MOST, _LETTERS = 6, 400  # lines of a report, letters of a line


def headline_of(circuit: Circuit, completeness: pd.DataFrame) -> str:
    """A line: edges, and Hit@10 on D_test (D_val where there is none), beside full model and empty circuit."""
    graph, made = circuit.graph, circuit.provenance
    names = [made[key].get("name") for key in ("relation", "model") if isinstance(made.get(key), Mapping)]
    what = " of ".join(str(name) for name in names if name)
    size = f"{circuit.n_edges:,} of {graph.n_edges:,} edges ({circuit.n_edges / graph.n_edges:.2%})"
    table = completeness[completeness["n"] > 0].set_index(["split", "run"])
    split = next((one for one in ("D_test", "D_val") if (one, "circuit") in table.index), None)
    line = f"{what}: {size}" if what else size
    if split is None:
        return f"{line}."
    hits: dict[str, str] = {}
    for run in ("circuit", "full model", "empty circuit"):
        if (split, run) in table.index:
            row: Any = table.loc[(split, run)]
            hits[run] = tables.interval(row["hit"], row["low"], row["high"])
    n = int(table.loc[(split, "circuit"), "n"])  # pyright: ignore[reportArgumentType]
    others = "".join(f"; {run} {hit}" for run, hit in hits.items() if run != "circuit")
    hit = f"Hit@{completeness.attrs.get('k', 10)}"
    return f"{line}. Alone it has {hit} {hits['circuit']} on the {n:,} facts of {split}{others}."


def headlines(notebook: NotebookNode) -> list[str]:
    """The lines that cells displayed, each once, in their order."""
    found: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            content = output.get("data", {}).get(HEADLINE)
            line = content.get("line") if isinstance(content, Mapping) else None
            if isinstance(line, str) and line.strip():
                found.append(tables.shorten(line, _LETTERS))
    return list(dict.fromkeys(found))[:_MOST]
