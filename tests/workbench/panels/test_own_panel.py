"""A panel from outside the package: a class in one's own file and one line make it a panel like the others."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pandas as pd
import pytest
from ipywidgets.widgets import widget as registry_of_widgets
from nbformat.v4 import new_code_cell, new_notebook, new_output

import kcwb
from kcwb.errors import SettingError
from kcwb.workbench import panels
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.registry import PANELS, open_panel
from kcwb.workbench.report.page import notebook_body
from tests.tasks import known_relation
from tests.tiny import tiny_model

SOON = 60.0
FILE = """
import pandas as pd

import kcwb
from kcwb.workbench import tables
from kcwb.workbench.panels.base import Panel
from kcwb.workbench.panels.picker import Picker
from kcwb.workbench.panels.widgets import button


class RanksPanel(Panel):
    pages = ("Ranks",)

    def __init__(self, model, relation="country_capital"):
        super().__init__(model, button("Rank", "list"))
        self.table = None
        self.picker = Picker(self, relation)
        self._lay_out([self.picker.relation, self.picker.template])

    @property
    def settings(self):
        return {"relation": self.picker.relation.value, "template": self.picker.wording}

    def _job(self):
        relation, template = self.picker.chosen, self.picker.number

        def job(progress):
            self._enter("Asking", progress)
            return kcwb.make_task(self.model, relation, 4, template=template, progress=progress)

        return job

    def _take(self, task):
        self.table = pd.DataFrame({"prompt": task.val.texts, "rank": task.val.ranks.tolist()})
        self._summarise(f"{len(self.table)} facts were asked for.")
        return {"Ranks": tables.table(self.table)}
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_panels.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_panels", raising=False)
    monkeypatch.setitem(PANELS, "ranks", "own_panels:RanksPanel")  # the line


def test_it_runs_is_shown_and_is_closed_without_a_trace(model) -> None:
    relation, before = known_relation(model, 16), set(registry_of_widgets._instances)
    with open_panel("ranks", model, relation) as panel:
        assert relation.prompt_templates_zs[0] in panel.to_html()
        panel._run_button.click()
        panel.wait(SOON)
        task = kcwb.make_task(model, relation, 4, progress=False)
        expected = pd.DataFrame({"prompt": task.val.texts, "rank": task.val.ranks.tolist()})
        pd.testing.assert_frame_equal(panel.table, expected)
        page = panel.to_html()
        assert "4 facts were asked for." in page and all(text in page for text in task.val.texts)
    gc.collect()
    assert panel.closed and set(registry_of_widgets._instances) <= before


def test_a_report_shows_it_without_widgets(model, tmp_path) -> None:
    with open_panel("ranks", model, known_relation(model, 16)) as panel:
        panel.run()
        panel.wait(SOON)
        output = new_output("display_data", panel._repr_mimebundle_())
    cell = new_code_cell("panel", outputs=[output])
    body = notebook_body(new_notebook(cells=[cell]), tmp_path)
    assert "4 facts were asked for." in body.cells and "kc-table" in body.cells


def test_what_goes_wrong_in_it_is_said(model) -> None:
    with open_panel("ranks", model, known_relation(model, 16)) as panel:
        panel.picker.relations["broken"] = Path("nowhere.json")
        panel.picker.relation.options = [*panel.picker.relation.options, ("broken", "broken")]
        panel.picker.relation.value = "broken"
        assert "nowhere" in panel._message.value


def test_every_panel_of_the_package_has_a_name() -> None:
    names = {"context", "discovery", "edit", "ensemble", "hallucination", "hop", "node"}
    assert names <= set(PANELS)
    for name in names:
        assert PANELS[name] == f"kcwb.workbench.panels:{name.capitalize()}Panel"
        assert issubclass(getattr(panels, f"{name.capitalize()}Panel"), Panel)


def test_a_name_that_is_no_panel_is_refused_with_the_nearest(model) -> None:
    with pytest.raises(SettingError, match="discovery"):
        open_panel("discover", model)
