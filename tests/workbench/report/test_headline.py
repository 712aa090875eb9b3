"""What a report says first."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_notebook

from kcwb.circuits.circuit import Circuit
from kcwb.errors import SettingError
from kcwb.evaluation.completeness import completeness
from kcwb.models.graph import Graph
from kcwb.tasks.task import make_task
from kcwb.workbench.plots import plot_completeness
from kcwb.workbench.report.headline import HEADLINE, headline_of
from kcwb.workbench.report.provenance import provenance
from kcwb.workbench.report.write import index, report
from kcwb.workbench.tables import completeness_rows
from tests.hostile import HOSTILE
from tests.tasks import known_relation

MADE = {"relation": {"name": "country_capital", "digest": "1"}, "model": {"name": "SmolLM2", "digest": "2"}}
ROWS = [
    ("full model", "D_val", 8, 1.0, 0.68, 1.0), ("circuit", "D_val", 8, 1.0, 0.68, 1.0),
    ("full model", "D_test", 10, 0.9, 0.6, 0.98), ("circuit", "D_test", 10, 0.7, 0.4, 0.89),
    ("empty circuit", "D_test", 10, 0.0, 0.0, 0.28),
]  # fmt: skip


def table(rows: list[Any] = ROWS) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["run", "split", "n", "hit", "low", "high"])


@pytest.fixture
def circuit() -> Circuit:
    return Circuit.from_edges(Graph(n_layers=1, n_heads=1), ["input->m0", "m0->logits"], provenance=MADE)


def test_it_says_size_and_hits_with_intervals_beside_both_ends(circuit: Circuit) -> None:
    assert headline_of(circuit, table()) == (
        f"country_capital of SmolLM2: 2 of {circuit.graph.n_edges} edges ({2 / circuit.graph.n_edges:.2%}). "
        "Alone it has Hit@10 .70 [.40, .89] on the 10 facts of D_test; full model .90 [.60, .98]; "
        "empty circuit .00 [.00, .28]."
    )
    only = headline_of(Circuit.from_edges(circuit.graph, ["input->m0", "m0->logits"]), table(ROWS[:2]))
    assert only.startswith("2 of") and "1.00 [.68, 1.00] on the 8 facts of D_val; full model 1.00" in only
    assert headline_of(circuit, table([("circuit", "D_val", 0, None, None, None)])).endswith("%).")


def test_of_a_table_that_was_computed_it_says_its_k(tiny: Any) -> None:
    model = tiny("llama")
    found = completeness(
        model, Circuit.full(model.graph), make_task(model, known_relation(model, 9), n=4), k=3, draws=0
    )
    row = found[(found["run"] == "circuit") & (found["split"] == "D_test")].iloc[0]
    assert f"Hit@3 {row['hit']:.2f}".replace(" 0.", " .") in headline_of(Circuit.full(model.graph), found)
    kept = pd.read_csv(io.StringIO(found.to_csv(index=False)))  # which drops what pandas calls attrs, as a merge does
    assert headline_of(Circuit.full(model.graph), kept) == headline_of(Circuit.full(model.graph), found)
    (axes,) = plot_completeness({"": found}).axes
    assert axes.get_ylabel() == "Hit@3" and any("Hit@3, D_test" in name for name in completeness_rows(found))
    assert plot_completeness({"a": found, "b": found.assign(k=1)}).axes[0].get_ylabel() == "Hit@k"


def test_provenance_displays_it_beside_what_results_come_from(circuit: Circuit, monkeypatch: Any) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    provenance(None, circuit, completeness=table())
    assert shown[0][HEADLINE] == {"line": headline_of(circuit, table())}
    with pytest.raises(SettingError, match="pass the circuit, too"):
        provenance(None, completeness=table())


def test_a_report_and_an_index_say_it_under_the_title_once_and_as_text(tmp_path: Path) -> None:
    lines = ["country_capital: 2 of 9 edges.", HOSTILE[0], "country_capital: 2 of 9 edges."]
    shown = [{"text/plain": "x", HEADLINE: {"line": line}} for line in lines] + [{"text/plain": "y", HEADLINE: 5}]
    cells = [new_code_cell(f"from IPython.display import display\nfor one in {shown!r}:\n    display(one, raw=True)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "one.ipynb")
    page = report(tmp_path / "one.ipynb", tmp_path / "one.html", progress=False)
    for one in (page, tmp_path / "index.html"):
        if one != page:
            index([page], one)
        soup = BeautifulSoup(one.read_text(encoding="utf-8"), "html.parser")
        said = [line.get_text() for line in soup.select(".kc-headline")]
        assert said[0] == lines[0] and len(said) == 2
        assert not soup.select(".kc-headline *")
    about = json.loads(BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select_one("#kcwb-report").string)
    assert about["headlines"][0] == lines[0]
