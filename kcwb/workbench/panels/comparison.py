"""Two runs of a discovery panel side by side."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as W

from kcwb.evaluation.compare import compare_circuits
from kcwb.workbench import tables
from kcwb.workbench.panels.results import Found
from kcwb.workbench.panels.widgets import Group, dropdown, hidden_graph, offer, rows


class Comparison(Group):
    """A menu of the other runs, and the one on screen beside the one chosen there: in numbers, and in colour."""

    def __init__(self, height: int) -> None:
        self.other = dropdown("Against", [], None, least=400)
        self.numbers, self.graph = W.HTML(tables.styled(tables.muted("Press Run."))), hidden_graph(height)
        self.widget = W.VBox(rows([self.other], self.numbers, self.graph))

    def offer(self, history: Sequence[Found], shown: Found) -> None:
        """The runs but the one on screen; the choice stays if it can, and is the latest if not."""
        others = [(one.label, i) for i, one in enumerate(history) if one is not shown]
        known = self.other.value in [i for _, i in others]
        offer(self.other, others, self.other.value if known else others[-1][1] if others else None)

    def draw(self, history: Sequence[Found], shown: Found | None) -> None:
        """Both circuits."""
        if self.other.value is None or shown is None:
            words = "Run once more, with other settings, to compare two circuits."
            self.numbers.value, self.graph.layout.display = tables.styled(tables.muted(words)), "none"
            return
        other = history[self.other.value]
        table = compare_circuits(shown.circuit, other.circuit)
        names = {"left": "shown", "right": "other", "only_left": "only shown", "only_right": "only other"}
        self.numbers.value = tables.styled(tables.table(table.rename(columns=names).reset_index(names="")))
        self.graph.compare(shown.circuit, other.circuit, names=("shown", "other"))
        self.graph.layout.display = ""
