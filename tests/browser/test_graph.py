"""The played circuit in a real JupyterLab: hand and keys reach Python, its answers the page; a saved file keeps it."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.browser.conftest import run_all
from tests.workbench.pages import asked, spot, until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.browser

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}

MADE = """
import kcwb
edges = {"input->a0.h1<v>": 1, "a0.h1->m0": .5, "m0->a1.h0<v>": .3, "a1.h0->logits": .8, "a0.h1->logits": .2}
graph = kcwb.CircuitGraph(kcwb.Circuit.from_edges(kcwb.Graph(2, 2), edges), title="Played", height=500)
graph"""
SAYS = """
import ipywidgets
said = ipywidgets.Label()
def tell(change):
    said.value = f"cut {sorted(graph.cut)} forced {graph.forced} selected {graph.selected} names {graph.names}"
graph.observe(tell, ["cut", "forced", "selected", "names"])
said"""


def test_a_circuit_is_played_in_jupyterlab(serve: Any, page: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("graph")
    cells = [new_code_cell(MADE), new_code_cell(SAYS)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), folder / "graph.ipynb")
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    run_all(page, serve(folder), "graph.ipynb")
    page.wait_for_selector("#kc-canvas", timeout=120_000)
    until(page, "graph?.view().frames > 0")
    said = page.locator(".jp-OutputArea-output .widget-label")
    shown = page.locator(".jp-Notebook .jp-Cell")
    number = shown.count()

    page.locator("#kc-canvas").scroll_into_view_if_needed()
    page.click("#kc-canvas", position=spot(page, "m0"))
    sync_api.expect(said).to_contain_text("selected ['m0']", timeout=20_000)
    page.keyboard.press("x")
    sync_api.expect(said).to_contain_text("cut ['a0.h1->m0', 'm0->a1.h0<v>']")
    for keys, words in (
        ("Control+z", "cut []"),
        ("Control+Shift+Z", "cut ['a0.h1->m0', 'm0->a1.h0<v>']"),
        ("r", "cut []"),
    ):
        page.keyboard.press(keys)
        sync_api.expect(said).to_contain_text(words)
        until(page, "graph.model.get('cut').length === arg", 2 * ("m0" in words))  # which may come after the label's
    page.keyboard.press("e")
    until(page, "graph.model.get('paths').length > 0 && graph.model.get('asked') === ''")
    assert page.is_hidden("#kc-problem")
    page.keyboard.press("Escape")
    page.keyboard.press("F2")
    page.fill("#kc-ask input", "dd")  # in JupyterLab, two d outside of a field delete a cell
    page.keyboard.press("Enter")
    sync_api.expect(said).to_contain_text("names {'m0': 'dd'}")
    for key in ("d", "d", "a", "b", "Escape"):
        page.keyboard.press(key)
    page.fill("#kc-search", "input->m1")
    page.keyboard.press("Enter")
    sync_api.expect(said).to_contain_text("forced ['input->m1']")
    page.fill("#kc-search", "a1.h0->a1.h1<q>")  # no edge: they are computed side by side
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    sync_api.expect(said).to_contain_text("forced ['input->m1']")
    assert shown.count() == number

    # what only Python knows to be wrong is said in the widget, and the picture stays
    asked(page, "(graph.model.set('pinned', ['a7.h7']), graph.model.save_changes(), 0)")
    page.wait_for_selector("#kc-problem:not([hidden])")
    assert re.search(r"pinned: there is no node 'a7.h7'", page.inner_text("#kc-problem"))
    until(page, "graph.model.get('pinned').length === 0")
    assert asked(page, "graph.boxes().length") == 6
    assert not [error for error in errors if "ResizeObserver" not in error]


PANEL = """
from kcwb import panels
from kcwb.progress import track
from tests import tiny
from tests.tasks import known_relation
with track(True, 2, "Working") as step:
    step()
model = tiny.load_model(tiny.ARCHITECTURES["llama"](), tiny.tokenizer())
panel = panels.DiscoveryPanel(model, known_relation(model, 16), edges=20, n=4, draws=1)
panel"""
RUN = "panel.run()\npanel.wait()\ngraph.cut = ['a0.h1->m0']"
INSIDE = """
import ipywidgets
inside = ipywidgets.Output()
with inside:
    display(graph)
display(ipywidgets.HTML("before it"), inside)"""


def test_a_graph_within_an_output_is_seen_and_hides_nothing(
    serve: Any, page: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("inside")
    cells = [new_code_cell(MADE.removesuffix("graph")), new_code_cell(INSIDE)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), folder / "inside.ipynb")
    run_all(page, serve(folder), "inside.ipynb")
    sync_api.expect(page.locator(".kcwb-instrument")).to_be_visible(timeout=120_000)
    sync_api.expect(page.locator(".widget-html", has_text="before it")).to_be_visible()
    sync_api.expect(page.locator("iframe[srcdoc]:visible")).to_have_count(0)


def test_a_saved_notebook_shows_the_picture_without_its_kernel(
    serve: Any, page: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    cells = [new_code_cell(source) for source in (MADE, PANEL, RUN)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), folder / "saved.ipynb")
    address = serve(folder)
    run_all(page, address, "saved.ipynb")
    live, plain = page.locator(".kcwb-instrument"), page.locator("iframe[srcdoc]:visible")
    live.nth(1).wait_for(timeout=120_000)
    sync_api.expect(page.get_by_text("Hit@10 alone").first).to_be_visible(timeout=60_000)
    sync_api.expect(plain).to_have_count(0)
    page.get_by_text("(ipykernel) | Idle").wait_for(timeout=60_000)  # what the last cell cut after that is drawn, too
    page.keyboard.press("Control+s")
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")

    page.goto("about:blank")
    for session in json.load(urllib.request.urlopen(f"{address}/api/sessions")):
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/sessions/{session['id']}", method="DELETE"))
    page.goto(f"{address}/lab/tree/saved.ipynb?reset")
    sync_api.expect(plain).to_have_count(2, timeout=60_000)
    page.get_by_text("model not found").first.wait_for(state="attached", timeout=60_000)
    for words in ("Error displaying widget", "Loading widget", "Working"):
        sync_api.expect(page.locator(".jp-OutputArea-output", has_text=words).locator("visible=true")).to_have_count(0)
    frame = plain.first.element_handle().content_frame()
    until(frame, "graph?.view().frames > 0")
    assert asked(frame, "graph.model.get('cut')") == ["a0.h1->m0"]
    sync_api.expect(page.get_by_text("Hit@10 alone").first).to_be_visible()

    saved = (folder / "saved.ipynb").read_text().replace("Played", "Other")  # then it is not what was run here
    (folder / "other.ipynb").write_text(saved)
    page.goto(f"{address}/lab/tree/other.ipynb?reset")
    sync_api.expect(page.get_by_text("Trust Notebook.").locator("visible=true")).to_have_count(2, timeout=60_000)
