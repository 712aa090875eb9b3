"""A table in a panel that is sorted by its heads, filtered by a text, and whose rows lead to what they are about."""

from __future__ import annotations

from importlib import resources
from typing import Any

import anywidget
import pandas as pd
import traitlets as T

from kcwb.workbench.tables import headed, shorten

_TEXT = 160  # letters of a cell


class Ranked(anywidget.AnyWidget):
    """A DataFrame as a table that is played with; numbers are sorted by size, whatever their sign.

    Attributes
    ----------
    columns, rows, numeric
        What is shown, see `show`.
    names : list of str
        What each row is about.
    chosen : str
        That of the row that was clicked; empty before.
    most : int
        So many rows are shown at once.
    """

    _esm = resources.files("kcwb.workbench.panels").joinpath("ranked.js").read_text(encoding="utf-8")

    _css = """
.kcwb-ranked .kc-line { display: flex; align-items: center; gap: 10px; margin: 2px 0 6px; }
.kcwb-ranked input { font: inherit; color: inherit; background: none; border: 1px solid var(--kc-line);
  border-radius: 4px; padding: 2px 7px; width: 200px; }
.kcwb-ranked th button { all: unset; cursor: pointer; white-space: nowrap; }
.kcwb-ranked th button:focus-visible { outline: 2px solid #0072b2; }
.kcwb-ranked tbody tr { cursor: pointer; }
.kcwb-ranked tbody tr:is(:hover, :focus-visible) td { background: var(--kc-band); }
.kcwb-ranked tbody tr[aria-selected=true] td { background: var(--kc-band); font-weight: 600; }
"""

    columns = T.List().tag(sync=True)
    rows = T.List().tag(sync=True)
    names = T.List().tag(sync=True)
    numeric = T.List().tag(sync=True)
    chosen = T.Unicode("").tag(sync=True)
    most = T.Int(200).tag(sync=True)

    def show(self, frame: pd.DataFrame, names: list[str]) -> None:
        """Show another table, with the name of what each of its rows is about."""
        numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
        with self.hold_sync():
            self.columns, self.numeric, self.names, self.chosen = list(map(headed, frame.columns)), numeric, names, ""
            self.rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take from the page which row was clicked, if there is such a row, and nothing else."""
        if sync_data.get("chosen") in self.names:
            super().set_state({"chosen": sync_data["chosen"]})


def _cell(value: Any) -> Any:
    """A number, None where it is none, or text that can be sent."""
    if isinstance(value, str):
        return shorten(value, _TEXT).encode("utf-8", "replace").decode("utf-8")
    return None if pd.isna(value) else int(value) if float(value).is_integer() else float(value)
