"""What a report says first, for whoever gets it by mail: how large the circuit is, and how it does alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from kcwb.circuits.provenance import part
from kcwb.workbench import tables

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from kcwb.circuits.circuit import Circuit

HEADLINE = "application/vnd.kcwb.headline+json"
"""The type of output whose content goes under the title of a report: `{"line": text}`."""
_MOST, _LETTERS = 6, 400  # lines of a report, letters of a line


def headline_of(circuit: Circuit, completeness: pd.DataFrame) -> str:
    """A line: edges, and Hit@k on D_test (D_val where there is none), beside full model and empty circuit."""
    graph, made = circuit.graph, circuit.provenance
    names = [part(made, key).get("name") for key in ("relation", "model")]
    what = " of ".join(str(name) for name in names if name)
    size = f"{circuit.n_edges:,} of {graph.n_edges:,} edges ({circuit.n_edges / graph.n_edges:.2%})"
    table = completeness[completeness["n"] > 0].set_index(["split", "run"])
    split = next((one for one in ("D_test", "D_val") if (one, "circuit") in table.index), None)
    line = f"{what}: {size}" if what else size
    if split is None:
        return f"{line}."
    found: Any = table.loc[split]
    rows = found.to_dict("index")
    hits = {run: tables.interval(row["hit"], row["low"], row["high"]) for run, row in rows.items()}
    others = "".join(f"; {run} {hits[run]}" for run in ("full model", "empty circuit") if run in hits)
    hit = f"{tables.hit_at(table)} {hits['circuit']}"
    return f"{line}. Alone it has {hit} on the {int(rows['circuit']['n']):,} facts of {split}{others}."


def headlines(notebook: NotebookNode) -> list[str]:
    """The lines that cells displayed, each once, in their order."""
    lines = [content.get("line") for content in displayed(notebook, HEADLINE)]
    found = [tables.shorten(line, _LETTERS) for line in lines if isinstance(line, str) and line.strip()]
    return list(dict.fromkeys(found))[:_MOST]


def displayed(notebook: NotebookNode, kind: str) -> Iterator[Mapping[str, Any]]:
    """What cells displayed of a type."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            content = output.get("data", {}).get(kind)
            if isinstance(content, Mapping):
                yield content
