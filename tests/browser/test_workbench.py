"""The workbench in a real JupyterLab: open 01_discovery, run all, move the slider, click a node, cancel and go on."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from tests.browser.conftest import ROOT, run_all
from tests.notebooks import few
from tests.workbench.pages import asked, ready, spot, until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

TESTED = re.compile("Hit@10 alone")
SMALL = "edges = 60\nn = 2\ndraws = 1\nrelation = 'country_language.json'"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.model,
]


@pytest.fixture(scope="module")
def lab(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a JupyterLab over a copy of the notebook with small settings."""
    folder = tmp_path_factory.mktemp("notebooks")
    notebook = nbformat.read(ROOT / "notebooks" / "01_discovery.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    settings.source += f"\n{SMALL}"
    nbformat.write(notebook, folder / "01_discovery.ipynb")
    few(folder, "country_language")
    return serve(folder)


class Workbench:
    """The discovery panel on a page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.outputs = page.locator(".jp-OutputArea-output")
        self.panel = self.outputs.filter(has=page.locator(".kcwb-graph")).first

    def control(self, name: str) -> Any:
        return self.panel.get_by_label(name, exact=True)

    def button(self, name: str) -> Any:
        return self.panel.locator("button").filter(has_text=re.compile(rf"^\s*{re.escape(name)}\s*$")).first

    def counts(self) -> str:
        """What the graph says of itself, "47 nodes · 201 edges"."""
        return ready(self.page).inner_text("#kc-counts")

    def wait_for_other_counts(self, before: str) -> None:
        self.page.set_default_timeout(120_000)
        until(self.page, "![arg, ''].includes(shadow?.getElementById('kc-counts')?.textContent ?? '')", before)

    def click_head(self) -> str:
        """Click a head in the graph, as a person does; its name."""
        name = asked(self.page, "graph.boxes().find((label) => /^a\\d+\\.h\\d+$/.test(label))")
        self.page.locator("#kc-canvas").first.click(position=spot(self.page, name))
        return name


def test_discovery_notebook_in_jupyterlab(lab, page):
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(f"{message.text} {message.location}"))
    run_all(page, lab, "01_discovery.ipynb")

    # The panel finds a circuit and tests it; the notebook runs to its end.
    bench = Workbench(page)
    bench.panel.locator("#kc-canvas").first.wait_for(timeout=300_000)
    page.locator(".jp-CodeCell").last.locator(".jp-OutputArea-output").first.wait_for(timeout=600_000)
    page.get_by_text("(ipykernel) | Idle").wait_for(timeout=60_000)
    assert not page.locator("[data-mime-type='application/vnd.jupyter.error']").count()
    bench.panel.get_by_text(TESTED).first.wait_for(timeout=60_000)

    # The slider cuts the circuit anew.
    before = bench.counts()
    handle = bench.panel.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(6):
        handle.press("ArrowRight")
    bench.wait_for_other_counts(before)
    bench.panel.get_by_text(TESTED).first.wait_for(timeout=120_000)

    # A click in the graph shows the node.
    name = bench.click_head()
    bench.panel.get_by_text(re.compile(rf"^{re.escape(name)}: head")).wait_for(timeout=60_000)
    sync_api.expect(bench.panel.get_by_role("tab", name="Node", exact=True)).to_have_attribute("aria-selected", "true")
    bench.panel.get_by_role("img", name=f"Where {name} attends").wait_for(timeout=120_000)
    bench.panel.get_by_text("Writes", exact=True).wait_for(timeout=60_000)

    # A run of ACDC on the whole graph is cancelled, and the circuit stays.
    cut = bench.counts()
    bench.control("Method").select_option("acdc")
    bench.button("Run").click()
    bench.panel.get_by_text("Discovering the circuit (about").first.wait_for(timeout=180_000)
    bench.button("Cancel").click()
    sync_api.expect(bench.button("Cancel")).to_be_disabled(timeout=20_000)
    assert bench.counts() == cut

    # What goes wrong is said in the panel.
    bench.control("τ, nats").fill("-1")
    bench.control("τ, nats").press("Tab")
    bench.button("Run").click()
    bench.panel.locator(".kc-error").filter(has_text="above 0").wait_for(timeout=120_000)
    assert bench.counts() == cut

    # Another run of ACDC, within a few edges, is finished.
    for control, value in (("τ, nats", "0.05"), ("Within", "30")):
        bench.control(control).fill(value)
        bench.control(control).press("Tab")
    bench.button("Run").click()
    bench.wait_for_other_counts(cut)
    sync_api.expect(bench.control("Shown").locator("option")).to_have_count(2)
    sync_api.expect(bench.control("Shown").locator("option").last).to_contain_text("within")

    # JupyterLab itself asks for things that are not there.
    assert not [error for error in errors if not re.search(r"favicon|/api/|/lsp/|ResizeObserver", error)]
