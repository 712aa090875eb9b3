"""A report shows what a notebook put out, and nothing of it acts: no script, no request, no way out of the page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kcwb.circuits.circuit import Circuit
from kcwb.models.graph import Graph
from kcwb.workbench import tables
from kcwb.workbench.graph.page import graph_view, is_graph_page, script_hashes
from kcwb.workbench.graph.widget import CircuitGraph
from kcwb.workbench.report.harmless import policy
from kcwb.workbench.report.page import notebook_body
from kcwb.workbench.report.write import report
from tests.workbench.pages import asked, colours, make_circuit, ready, spot, until

FORBIDDEN = ("script", "meta", "base", "link", "form", "button", "object", "embed", "area", "frame", "template", "set")
REL = "noopener noreferrer"
AWAY = "https://away.example"
RUN = "window.hacked = (window.hacked || 0) + 1; try { top.hacked = 1; } catch (e) {}"
ACTS = [
    f"<script>{RUN}; location = '{AWAY}/1'</script>",
    f"<script src='{AWAY}/2.js'></script><script type=module>{RUN}</script>",
    f"<script>window.open('{AWAY}/3'); document.title = 'hacked'</script>",
    f"<img src=x onerror=\"{RUN}\"><img src='{AWAY}/4.png'><svg onload=\"{RUN}\"><circle r=4 /></svg>",
    f"<details open ontoggle=\"{RUN}\"><summary>s</summary>t</details><input autofocus onfocus=\"{RUN}\">",
    f"<meta http-equiv=refresh content='0; url={AWAY}/5'><base href='{AWAY}/6' target=_top>",
    f"<form action='{AWAY}/7' target=_top><input name=a value=b><button class=press>send</button></form>",
    f"<a class=press href='{AWAY}/8' target=_top>top</a><a class=press href='{AWAY}/9' target=_blank>tab</a>",
    f"<a class=press href=\"javascript:{RUN}\">js</a><a class=press href=\"java&#10;script:{RUN}\">js</a>",
    f"<a class=press href='data:text/html,<script>{RUN}</script>'>data</a><a class=press href='//away.example'>a</a>",
    f"<a class=press href=#x ping='{AWAY}/10' onclick=\"{RUN}\">ping</a><a class=press href='file:///etc/passwd'>f</a>",
    f"<svg><a xlink:href=\"javascript:{RUN}\"><text class=press y=20>svg</text></a><animate onbegin=\"{RUN}\" /></svg>",
    f"<svg><set attributeName=href to='{AWAY}' /><use href='{AWAY}/11.svg#a' /><image href='{AWAY}/12' /></svg>",
    f"<math href='{AWAY}/13'><mi class=press href=\"javascript:{RUN}\">x</mi></math>",
    f"<map name=m><area shape=default href='{AWAY}/14'></map><img usemap=#m src='data:image/png;base64,AA=='>",
    f"<object data='{AWAY}/15'></object><embed src='{AWAY}/16'><applet code=x></applet><frameset onload=\"{RUN}\">",
    f"<iframe src='{AWAY}/17'></iframe><iframe src=\"javascript:{RUN}\"></iframe><iframe src='data:text/html,x'>",
    "<iframe srcdoc=\""
    + html.escape(f"<script>{RUN}; parent.location = '{AWAY}/18'</script>")
    + html.escape(f"<a class=press href='{AWAY}/19' target=_top>in</a>")
    + f"<meta http-equiv=refresh content='0; url={AWAY}/20'>\" sandbox='allow-scripts allow-top-navigation'></iframe>",
    f"<link rel=stylesheet href='{AWAY}/21.css'><link rel=prefetch href='{AWAY}/22'>",
    f"<style>@import '{AWAY}/23.css'; p {{ background: url({AWAY}/24) }} @font-face {{ src: url({AWAY}/25) }}</style>",
    f"<p style=\"background: url('{AWAY}/26'); background: u\\72l({AWAY}/27)\">p</p><table background='{AWAY}/28'>",
    f"<video src='{AWAY}/29' poster='{AWAY}/30'></video><audio><source src='{AWAY}/31'></audio>",
    f"<img srcset='{AWAY}/32 2x'><p style=\"content: image-set('{AWAY}/34' 1x); --x: url('{AWAY}/35')\">p</p>",
    f"<noscript><p title=\"</noscript><img src=x onerror='{RUN}'>\"></p></noscript><!--><script>{RUN}</script>-->",
    f"<template><script>{RUN}</script></template><xmp><script>{RUN}</script></xmp><plaintext><script>{RUN}</script>",
    f"<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror={RUN}&gt;\">",
    f"<svg></p><style><a title=\"</style><img src=x onerror='{RUN}'>\"></style></svg><select><script>{RUN}</script>",
    f"<a class=press href='{AWAY}/33' style='position:fixed;inset:0;z-index:99999;display:block'>over all</a>",
    "<style>main, .kc-title { display: none } * { color: transparent } body { opacity: 0 }</style><p>styled</p>",
    f"</div></div></div></div></main><h2 onclick=\"{RUN}\" class=press>outside</h2>",
]  # fmt: skip


def tree(page: str) -> BeautifulSoup:
    return BeautifulSoup(page, "html.parser", multi_valued_attributes=None)


def cells(*outputs: str | dict[str, Any], prose: str = "") -> BeautifulSoup:
    """The report of outputs, each in a cell of its own."""
    bundles = [{"text/html": one} if isinstance(one, str) else one for one in outputs]
    made = [new_code_cell("", outputs=[new_output("display_data", one)]) for one in bundles]
    body = notebook_body(new_notebook(cells=[*made, new_markdown_cell(prose)]), Path("/nowhere"))
    return tree(body.cells)


def page_of(soup: Any) -> list[Any]:
    """All elements, those of pages in frames that may not run scripts too."""
    found = soup.find_all(True)
    for frame in soup.select("iframe"):
        assert frame["sandbox"] in ("", "allow-scripts allow-downloads")
        if not is_graph_page(str(frame["srcdoc"])):
            assert frame["sandbox"] == ""
            found += page_of(tree(str(frame["srcdoc"])))
    return found


def assert_harmless(soup: BeautifulSoup) -> None:
    for tag in page_of(soup):
        assert tag.name not in FORBIDDEN, tag
        for name, value in tag.attrs.items():
            assert not name.startswith("on") and name not in ("action", "ping", "srcset", "poster", "background"), tag
            if name in ("href", "src", "xlink:href"):
                assert re.match(r"#|data:image/|[\w.]+\.html", str(value)) or tag["rel"] == REL, tag
        assert not re.search(
            r"url\((?!data:|#)|@import", tag.get_text() if tag.name == "style" else str(tag.get("style"))
        )


@pytest.mark.filterwarnings("ignore:The report lacks pictures")
@pytest.mark.parametrize("content", ACTS)
def test_nothing_that_acts_is_left(content: str) -> None:
    widget = {"text/html": "", "application/vnd.jupyter.widget-view+json": {"model_id": "m"}}
    for soup in (cells(content), cells({"text/markdown": content}), cells({"image/svg+xml": content}), cells(widget)):
        assert_harmless(soup)
    in_prose = cells(prose=content)
    assert_harmless(in_prose)
    assert len(in_prose.find_all(True, recursive=False)) == 1  # nothing leaves its cell


def test_attributes_of_pictures_are_no_way_in() -> None:
    png = {"image/png": "\"><script>1</script><img src='"}
    output = new_output(
        "display_data", png, metadata={"image/png": {"width": "1 onload=alert(1)", "height": "1><script>"}}
    )
    body = notebook_body(new_notebook(cells=[new_code_cell("", outputs=[output])]), Path("/nowhere"))
    assert_harmless(tree(body.cells))


def test_what_is_left_out_is_said_once_a_cell() -> None:
    soup = cells("<script>1</script><b>kept</b><script>2</script>", f"<iframe src='{AWAY}/a'></iframe>")
    notes = [note.get_text() for note in soup.select(".kc-missing")]
    told = "a frame from elsewhere is not part of this report: https://away.example/a"
    assert notes == ["a script is not part of this report", told]
    assert soup.b and soup.b.get_text() == "kept"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("<html><head><!-- of a whole page --><title>t</title></head><body>kept</body></html>", 0),
        ("<noscript><!-- x --><p>y</p></noscript>kept", 0),
        ("<object><!-- x --><?y ?><param name=z></object>kept", 1),
        (f"<video><source src='{AWAY}/a.mp4'><source src='{AWAY}/a.webm'></video>kept", 1),
        ("<![x and a <![CDATA[ section ]]>kept", 0),
    ],
)
def test_what_is_in_what_goes_goes_too(content: str, told: int) -> None:
    for page in (cells(content), cells(prose=content)):
        assert "kept" in page.get_text() and len(page.select(".kc-missing")) == told


def test_a_picture_stands_for_a_page_that_needs_scripts() -> None:
    soup = cells({"text/html": "<div id=p></div><script>draw('p')</script>", "image/png": "iVBORw0KGgo="})
    assert [str(one["src"]) for one in soup.select("img")] == ["data:image/png;base64,iVBORw0KGgo="]
    assert not soup.select(".kc-missing")


def test_links_in_prose_open_a_tab_and_those_of_outputs_are_told() -> None:
    soup = cells(
        f"<a href='{AWAY}'>a</a><a href='#b'>b</a><a href='c.html'>c</a>",
        prose=f"[a]({AWAY}) <{AWAY}> [m](mailto:a@b.c) [n](02_x.ipynb#y) [t](#top) [f](file:///x) [r](/x)",
    )
    out, prose = soup.select(".jp-CodeCell a"), soup.select(".jp-MarkdownCell a")
    assert [one.attrs for one in out] == [{"title": AWAY}, {"href": "#b"}, {}]
    assert [one.get("href") for one in prose] == [AWAY, AWAY, "mailto:a@b.c", "02_x.html#y", "#top", None, None]
    for one in prose[:4]:
        assert one["target"] == "_blank" and one["rel"] == "noopener noreferrer"


def test_style_sheets_hold_in_their_own_cell_only() -> None:
    soup = cells("<style>a, b:is(i, u) > p { color: red } :root { --x: 1 } @media print { a { color: blue } }</style>")
    css = " ".join(soup.select_one("style").get_text().split())
    assert css == (
        '[data-cell="0"] a, [data-cell="0"] b:is(i, u) > p { color: red } [data-cell="0"] { --x: 1 } '
        '@media print { [data-cell="0"] a { color: blue } }'
    )


def test_tables_and_drawings_keep_their_looks() -> None:
    frame = pd.DataFrame(np.arange(6.0).reshape(2, 3), columns=list("abc"))
    made = frame.style.background_gradient().to_html()
    svg = (
        "<svg viewBox='0 0 9 9'><defs><clipPath id=c><rect width=9 height=9 /></clipPath></defs><g clip-path='url(#c)'>"
    )
    svg += "<linearGradient id=g /><path d='M0 0L9 9' style='fill:url(#g)'/><use xlink:href='#c'/></g></svg>"
    soup = cells(frame._repr_html_(), made, tables.styled(tables.table(frame)), svg)
    plain, coloured, ours, drawing = soup.select(".jp-CodeCell")
    for cell, source in ((plain, frame._repr_html_()), (coloured, made)):
        wanted = tree(source)
        assert str(cell.table) == str(wanted.table).replace(
            ' border="1" class="dataframe"', ' border="1" class="dataframe"'
        )
    assert coloured.style.get_text().count("background-color") == made.count("background-color") > 1
    assert not ours.style.get_text() and "kc-table" in str(ours.table)  # the page has that style once
    assert [tag.name for tag in drawing.svg.find_all(True)] == [
        "defs",
        "clippath",
        "rect",
        "g",
        *("lineargradient", "path", "use"),
    ]
    assert drawing.path["style"] == "fill:url(#g)" and drawing.use["href"] == "#c"


# --- graphs ---


def test_a_graph_may_run_our_scripts_in_a_frame_without_a_way_out() -> None:
    view = graph_view(make_circuit(5))
    (frame,) = cells(view._repr_html_()).select("iframe")
    assert frame["sandbox"] == "allow-scripts allow-downloads" and frame["srcdoc"] == view.page
    assert "allow-same-origin" not in str(frame)


def test_a_widget_that_was_played_is_such_a_graph_with_all_that_was_done() -> None:
    circuit = Circuit.from_edges(Graph(n_layers=1, n_heads=1), ["input->a0.h0<v>", "a0.h0->logits"])
    graph = CircuitGraph(circuit, cut=["a0.h0->logits"], notes={"a0.h0": "<script>window.hacked = 1</script>"})
    (frame,) = cells(graph._repr_mimebundle_()[0]).select("iframe")
    assert frame["sandbox"] == "allow-scripts allow-downloads" and frame["srcdoc"] == graph.as_view().page


@pytest.mark.parametrize("change", ["<script>1</script>", "<img src=x onerror=1>", "<b>"])
def test_a_page_that_pretends_to_be_a_graph_may_run_nothing(change: str) -> None:
    page = graph_view(make_circuit(5), title="T").page
    for forged in (
        change + page,
        page + change,
        page.replace("<title>T", f"<title>T{change}"),
        page.replace("H4s", change),
    ):
        assert not is_graph_page(forged)
        (frame,) = cells(f'<iframe srcdoc="{html.escape(forged)}"></iframe>').select("iframe")
        assert frame["sandbox"] == "" and "<script" not in str(frame["srcdoc"])


def test_a_page_allows_scripts_only_by_our_hashes_and_only_with_graphs() -> None:
    assert "script-src 'none'" in policy()
    assert all(one in policy(graphs=True) for one in script_hashes()) and len(script_hashes()) == 2
    assert re.findall(r"script-src ([^;]*);", policy(graphs=True)) == [" ".join(script_hashes())]
    for said in (policy(), policy(graphs=True)):
        assert said.startswith("default-src 'none'; ")
        assert all(f"{name} 'none'" in said for name in ("frame-src", "base-uri", "form-action"))


# --- in Chromium ---

GRAPH = """
import sys
sys.path.insert(0, {root!r})
from kcwb.workbench.graph.page import graph_view
from tests.workbench.pages import make_circuit
graph_view(make_circuit(20, n_layers=4, n_heads=4), title="T", height=420)"""
FORGED = """
import base64, gzip, html
from kcwb.workbench.graph.page import _LOADER
page = base64.b64encode(gzip.compress({content!r}.encode())).decode()
from IPython.display import HTML
forged = "".join((_LOADER[0], "T", _LOADER[1], page, _LOADER[2]))
HTML('<iframe height=90 srcdoc="' + html.escape(forged) + '"></iframe>')"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of all that acts, in prose and outputs, beside a graph."""
    folder = tmp_path_factory.mktemp("acts")
    root = str(Path(__file__).parents[3])
    shown = [new_code_cell(GRAPH.format(root=root)), new_code_cell(FORGED.format(content=" ".join(ACTS)))]
    shown += [new_code_cell(f"from IPython.display import HTML\nHTML({one!r})") for one in ACTS]
    shown += [new_code_cell(f"from IPython.display import Javascript\nJavascript({RUN!r})")]
    written = [new_markdown_cell(f"text\n\n{one}") for one in ACTS if f"{AWAY}/9" not in one and "over all" not in one]
    nbformat.write(new_notebook(cells=[*shown, *written]), folder / "n.ipynb")
    with pytest.warns(UserWarning, match="lacks pictures"):
        return report(folder / "n.ipynb", folder / "n.html", progress=False)


@pytest.mark.browser
def test_a_hostile_report_stays_where_it_is_and_asks_for_nothing(hostile: Path, chromium: Any) -> None:
    context = chromium.new_context(viewport={"width": 1000, "height": 700})
    requests: list[str] = []
    pages: list[str] = []
    context.on("request", lambda r: requests.append(r.url))
    tab = context.new_page()
    context.on("page", lambda p: pages.append(p.url))
    tab.on("dialog", lambda d: (pages.append(d.message), d.dismiss()))
    tab.goto(hostile.as_uri())
    first = tab.wait_for_selector("iframe")
    graph = ready(first.content_frame())
    tab.wait_for_timeout(1500)
    for frame in tab.frames:
        for place in frame.locator(".jp-CodeCell .press, .press:not(.jp-Cell *)").all():
            if place.is_visible():
                place.click(force=True, timeout=5000)
    tab.wait_for_timeout(500)
    assert tab.url.partition("#")[0] == hostile.as_uri() and pages == []
    assert [url for url in requests if not url.startswith(("data:", "blob:", "about:"))] == [hostile.as_uri()]
    for frame in tab.frames:
        assert frame.evaluate("window.hacked") is None, frame.url
    assert (
        tab.title() == "outside" and tab.evaluate("getComputedStyle(document.querySelector('main')).display") == "block"
    )
    assert tab.evaluate("document.elementFromPoint(500, 20).closest('.press')") is None  # nothing lies over the page
    assert colours(graph) > 20
    context.close()


@pytest.mark.browser
def test_the_graph_of_a_hostile_report_is_alive(hostile: Path, chromium: Any) -> None:
    context = chromium.new_context(offline=True, viewport={"width": 1000, "height": 700}, accept_downloads=True)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("pageerror", lambda e: complaints.append(str(e)))
    tab.goto(hostile.as_uri())
    element = tab.wait_for_selector("iframe")
    graph = ready(element.content_frame())
    element.scroll_into_view_if_needed()
    name = asked(graph, "graph.boxes()")[1]
    graph.click("#kc-canvas", position=spot(graph, name))
    until(graph, "graph.model.get('selected').join() === arg", name)
    scale = asked(graph, "graph.view().scale")
    graph.click("#kc-in")
    until(graph, "graph.view().scale > arg", scale)
    graph.fill("#kc-search", "logits")
    graph.press("#kc-search", "Enter")
    until(graph, "graph.model.get('selected').join() === 'logits'")
    graph.locator("#kc-slider").fill("5")
    until(graph, "shadow.getElementById('kc-shown').textContent.includes('of 20 edges')")
    for button, ending in (("#kc-svg", "svg"), ("#kc-png", "png")):
        with tab.expect_download() as download:
            graph.click(button)
        assert download.value.suggested_filename == f"circuit.{ending}"
        assert Path(download.value.path()).stat().st_size > 1000
    assert complaints == []
    context.close()


@pytest.mark.browser
def test_a_link_in_prose_opens_a_tab_when_a_person_clicks_it(tmp_path: Path, chromium: Any) -> None:
    nbformat.write(new_notebook(cells=[new_markdown_cell("[next](next.ipynb)")]), tmp_path / "n.ipynb")
    (tmp_path / "next.html").write_text("<title>next</title><script>document.title += String(window.opener)</script>")
    page = report(tmp_path / "n.ipynb", tmp_path / "n.html", progress=False)
    context = chromium.new_context()
    tab = context.new_page()
    tab.goto(page.as_uri())
    with context.expect_page() as opened:
        tab.click("a")
    opened.value.wait_for_load_state()
    assert opened.value.title() == "nextnull" and tab.url == page.as_uri()
    context.close()
