"""First paint and frame rate of drawn circuits in Chromium. Prints a table; asserts nothing about time."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from kcwb.workbench.graph.instrument import module
from kcwb.workbench.graph.page import graph_view
from tests.workbench.conftest import chromium  # noqa: F401
from tests.workbench.pages import asked, make_circuit, ready, spot

_SIZES = (200, 2000, 20_000)
_GAPS = """(() => {
    window.gaps = [];
    let last = performance.now();
    const tick = (now) => { window.gaps.push(now - last); last = now; window.counting = requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
})()"""


@pytest.mark.browser
@pytest.mark.parametrize("edges", _SIZES)
def test_first_paint_and_frames(chromium: Any, tmp_path: Path, edges: int) -> None:  # noqa: F811
    view = graph_view(make_circuit(edges, n_heads=18))
    rows = [("page", f"{len(view.page) / 1000:.0f} kB, of which the module {len(module()) / 1000:.0f} kB uncompressed")]
    view.to_html(tmp_path / "graph.html")
    page = chromium.new_page(viewport={"width": 1400, "height": 800})
    page.goto((tmp_path / "graph.html").as_uri())
    ready(page)
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    rows.append(("first contentful paint after navigation", f"{painted:.0f} ms"))
    rows.append(("painting all of it once", f"{asked(page, 'graph.view().cost'):.0f} ms"))
    box = page.locator("#kc-canvas").bounding_box()
    for what, zoomed in (("drag, whole", 0), ("drag, zoomed in", 4)):
        for _ in range(zoomed):
            page.press("#kc-canvas", "+")
        page.wait_for_timeout(500)
        page.mouse.move(box["x"] + 300, box["y"] + 300)
        page.mouse.down()
        before, started = asked(page, "graph.view().frames"), time.perf_counter()
        page.evaluate(_GAPS)
        for i in range(150):
            page.mouse.move(box["x"] + 300 + 2 * i, box["y"] + 300 + i % 40)
        seconds, frames = time.perf_counter() - started, asked(page, "graph.view().frames") - before
        page.mouse.up()
        gaps = page.evaluate("(cancelAnimationFrame(counting), gaps)")
        slow = sorted(gaps)[int(0.95 * len(gaps))]
        rate = 1000 / statistics.median(gaps)
        told = f"{frames / seconds:.0f} pictures a second; {rate:.0f} frames a second in the median"
        rows.append((what, f"{told}, 95% within {slow:.0f} ms"))
    page.press("#kc-canvas", "0")
    page.wait_for_timeout(300)
    started = time.perf_counter()
    page.hover("#kc-canvas", position=spot(page, "m15"))
    page.wait_for_function("document.querySelector('.kcwb-instrument').graph.lit() !== null")
    rows.append(("hovering, until the way is lit", f"{1000 * (time.perf_counter() - started):.0f} ms"))
    print(f"\n\n{edges:,} edges, 1400 x 800, one core")
    for what, value in rows:
        print(f"{what:42}  {value}")
