"""The workbench in a real JupyterLab: open 01_discovery, run all, move the slider, click a node, cancel and go on."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from tests.browser.conftest import ROOT, run_all
from tests.workbench.pages import asked, ready, spot

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

TESTED = re.compile("Hit@10 alone")
SMALL = "edges = 60\nn = 2\ndraws = 1\nrelation = 'country_language'"

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
    return serve(folder)


class Workbench:
    """The discovery panel on a page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.outputs = page.locator(".jp-OutputArea-output")
        self.panel = self.outputs.filter(has=page.locator(".kcwb-graph iframe")).first

    def control(self, name: str) -> Any:
        return self.panel.get_by_label(name, exact=True)

    def button(self, name: str) -> Any:
        return self.panel.locator("button").filter(has_text=re.compile(rf"^\s*{re.escape(name)}\s*$")).first

    def graph(self) -> Any:
        """The page inside the graph's frame, once it is drawn."""
        handle = self.panel.locator(".kcwb-graph iframe").element_handle(timeout=60_000)
        frame = handle.content_frame()
        frame.wait_for_selector("#kc-counts", timeout=60_000)
        return ready(frame)

    def counts(self) -> str:
        """What the graph says of itself, "47 nodes · 201 edges"."""
        return self.graph().inner_text("#kc-counts")

    def wait_for_other_counts(self, before: str) -> None:
        self.page.wait_for_function(
            """(before) => [...document.querySelectorAll(".kcwb-graph iframe")].some((frame) => {
                const shadow = frame.contentDocument?.querySelector(".kcwb-instrument")?.shadowRoot;
                const counts = shadow?.getElementById("kc-counts")?.textContent;
                return counts && counts !== before;
            })""",
            arg=before,
            timeout=120_000,
        )

    def click_head(self) -> str:
        """Click a head in the graph, as a person does; its name."""
        frame = self.graph()
        name = asked(frame, "graph.boxes().find((label) => /^a\\d+\\.h\\d+$/.test(label))")
        frame.locator("#kc-canvas").click(position=spot(frame, name))
        return name

    def clicked(self, message: dict[str, Any]) -> str:
        """What the panel has taken down of clicks after the page itself has sent a message."""
        return self.page.evaluate(
            """(message) => new Promise((done) => {
                const field = document.querySelector(".kcwb-clicked input");
                addEventListener("message", () => done(field.value), { once: true });  // after the panel's listener
                postMessage(message, "*");
            })""",
            message,
        )


def test_discovery_notebook_in_jupyterlab(lab, page):
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(f"{message.text} {message.location}"))
    run_all(page, lab, "01_discovery.ipynb")

    # The panel finds a circuit and tests it; the notebook runs to its end.
    bench = Workbench(page)
    bench.outputs.locator("iframe").first.wait_for(timeout=300_000)
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

    # A message of the page itself is no click; a click in the graph shows the node.
    taken = page.locator(".kcwb-clicked input").first.input_value()
    assert bench.clicked({"kcwb": "select", "nodes": ["m3"]}) == taken
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
    for control, value in (("τ, nats", "0.05"), ("Within", "100")):
        bench.control(control).fill(value)
        bench.control(control).press("Tab")
    bench.button("Run").click()
    bench.wait_for_other_counts(cut)
    sync_api.expect(bench.control("Shown").locator("option")).to_have_count(2)
    sync_api.expect(bench.control("Shown").locator("option").last).to_contain_text("within")

    # JupyterLab itself asks for things that are not there.
    assert not [error for error in errors if not re.search(r"favicon|/api/|/lsp/|ResizeObserver", error)]
