"""Hostile text through every view: it is there as text, it does not run, and nothing of the page is lost to it."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup, Tag
from matplotlib.text import Text
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kcwb.circuits.circuit import Circuit
from kcwb.errors import SettingError
from kcwb.models.graph import Graph
from kcwb.workbench import plots, tables
from kcwb.workbench.graph.page import compare_view, graph_view
from kcwb.workbench.graph.svg import graph_svg
from kcwb.workbench.report.page import facts_table
from kcwb.workbench.report.write import index, report
from tests.hostile import HOSTILE, SURROGATE
from tests.workbench.pages import (
    TOLD,
    about,
    asked,
    colours,
    drawn,
    graph_of,
    hostile_view,
    inner,
    make_circuit,
    ready,
    spot,
    until,
)

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parsed(page: str) -> BeautifulSoup:
    return BeautifulSoup(page, "html.parser")


def tags(soup: Tag) -> Counter[str]:
    return Counter(tag.name for tag in soup.find_all(True))


def assert_inert(soup: Tag, scripts: int) -> None:
    """No handlers, no addresses that run, no more scripts than ours."""
    for tag in soup.find_all(True):
        for name, value in tag.attrs.items():
            assert not name.lower().startswith("on"), (tag.name, name)
            assert not re.match(r"\s*(?:javascript|vbscript|https?:|//)", str(value), re.IGNORECASE), (name, value)
    assert len(soup.find_all("script")) == scripts
    assert not soup.find_all(["object", "embed", "base", "form", "animate"])


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def test_there_are_enough_of_them() -> None:
    assert len(set(HOSTILE)) >= 30 and max(map(len, HOSTILE)) == 10_000


# --- graphs ---


def test_graph_page_holds_names_roles_details_and_titles_as_data() -> None:
    view = hostile_view()
    harmless = graph_view(graph_of([f"n{i}" for i in range(len(HOSTILE))]))
    assert tags(parsed(inner(view))) == tags(parsed(inner(harmless)))
    assert view.page.isascii() and tags(parsed(view.page)) == tags(parsed(harmless.page))
    assert_inert(parsed(view.page), scripts=2)  # one of them holds the compressed page
    nodes = drawn(view, "nodes")
    assert {node["name"] for node in nodes} == {"input", *HOSTILE}
    texts = dict(zip(TOLD, TOLD[::-1], strict=True))
    for node in nodes[1:]:
        assert node["lines"][0] == shortened(node["name"], 120)
        if text := texts.get(node["name"]):
            assert node["lines"][1].endswith(f"role: {shortened(text, 120)}")
            assert node["lines"][-1] == shortened(text, 600)
        assert len(node["label"]) <= 12 and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e\u2066]", node["label"])
    assert {edge["lines"][0] for edge in drawn(view, "edges")} >= {f"input → {HOSTILE[0]}<q>"}


def test_graph_title_is_text_in_the_page_and_in_the_frame() -> None:
    circuit = make_circuit(3)
    for text in TOLD:
        view, shown = graph_view(circuit, title=text), CONTROLS.sub("\ufffd", shortened(text, 120))
        head = parsed(view.page.partition("</head>")[0])
        assert head.title and head.title.get_text() == shown
        opening, srcdoc, rest = re.split(r'srcdoc="([^"]*)"', view._repr_html_())
        assert html.unescape(srcdoc) == view.page
        (element,) = parsed(opening + rest).find_all(True)
        assert element.name == "iframe" and set(element.attrs) == {"title", "width", "height", "style"}
        assert element["title"] == shown


def test_comparison_takes_names_as_text() -> None:
    graph = Graph(n_layers=2, n_heads=2)
    left = Circuit.from_edges(graph, ["input->a0.h1<v>", "a0.h1->logits"])
    right = Circuit.from_edges(graph, ["input->a0.h1<v>", "a0.h1->logits", "input->m1", "m1->logits"])
    harmless = tags(parsed(inner(compare_view(left, right))))
    for i, (one, other) in enumerate(pairwise(TOLD)):
        view = compare_view(left, right, names=(one, other), roles={"a0.h1": one}, details={"m1": other}, title=one)
        node = next(node for node in drawn(view, "nodes") if node["name"] == "m1")
        assert node["lines"][1].endswith(f", only {shortened(other, 40)}")
        assert about(view)["sides"]["left"] == f"only {shortened(one, 40)} (0)"
        if i % 9 == 0:  # parsing takes a while; that all text is data only is seen of each in the JSON
            assert tags(parsed(inner(view))) == harmless


def test_svg_holds_text_and_shapes_only() -> None:
    texts = dict(zip(TOLD, TOLD[::-1], strict=True))
    svg = ElementTree.fromstring(graph_svg(graph_of(HOSTILE), roles=texts, details=texts, title=HOSTILE[1]))
    names = {element.tag.rpartition("}")[2] for element in svg.iter()}
    assert names == {"svg", "title", "rect", "text", "path", "g"}
    assert not any(name.startswith("on") or "href" in name for element in svg.iter() for name in element.attrib)
    shown = [element.text or "" for element in svg.iter() if element.tag.endswith("}title")]
    for text in HOSTILE:
        wanted = NOT_XML.sub("\ufffd", shortened(text, 120)).replace("\r\n", "\n")  # as XML reads the end of a line
        assert any(title.split("\n" + "head, layer")[0] == wanted for title in shown), text[:80]


@pytest.mark.parametrize("text", [SURROGATE, "a\0b"], ids=ascii)
def test_what_no_file_can_hold_is_refused_as_a_title_a_role_or_a_name(text: str) -> None:
    circuit = make_circuit(3)
    for draw in (graph_view, graph_svg):
        for more in ({"title": text}, {"roles": {"a0.h1": text}}, {"details": {text: "x"}}):
            with pytest.raises(SettingError, match="is not"):
                draw(circuit, **more)
    with pytest.raises(SettingError, match="names"):
        compare_view(circuit, circuit, names=(text, "x"))


# --- tables ---


def test_tables_hold_text_only() -> None:
    frame = pd.DataFrame({"token": HOSTILE, "answer": HOSTILE[::-1], HOSTILE[0]: range(len(HOSTILE))})
    soup = parsed(tables.styled(tables.heading(HOSTILE[3]), tables.muted(HOSTILE[1]), tables.table(frame, scroll=True)))
    assert_inert(soup, scripts=0)
    assert tags(soup) == Counter(
        {"div": 4, "style": 1, "table": 1, "thead": 1, "tbody": 1, "tr": 1 + len(frame), "th": 3, "td": 3 * len(frame)}
    )
    rows = [[cell.get_text() for cell in row.find_all("td")] for row in soup.select("tbody tr")]
    assert [row[:2] for row in rows] == [
        [shortened(a, 160), shortened(b, 160)] for a, b in zip(HOSTILE, HOSTILE[::-1], strict=True)
    ]
    assert soup.find_all("th")[2].get_text() == HOSTILE[0]


@pytest.mark.parametrize("text", [*HOSTILE, SURROGATE])
def test_pairs_lines_and_facts_hold_text_only(text: str) -> None:
    pairs = parsed(tables.pairs({text: text}))
    whole, shown = text.replace("\ud800", "?"), shortened(text, 160).replace("\ud800", "?")
    assert [cell.get_text() for cell in pairs.find_all(["th", "td"])] == [shown, shown]
    facts = parsed(facts_table([{"kind": "relation", "name": text, "digest": text, "template": text}]))
    assert tags(facts) == tags(parsed(facts_table([{"kind": "relation", "name": "x", "digest": "x", "template": "x"}])))
    assert shortened(whole, 120) in facts.find_all("td")[0].get_text()


# --- plots ---


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("start", range(0, len(HOSTILE), 15))
def test_plots_draw_text_as_it_is(start: int) -> None:
    some = HOSTILE[start : start + 15]
    shown = [plots.plain(text) for text in some]
    short = [plots.plain(text, 24) for text in some]
    square = pd.DataFrame(np.eye(len(some)), some, some)
    attention = plots.plot_attention(square, title=some[0])
    assert [label.get_text() for label in attention.axes[0].get_xticklabels()] == short
    assert [label.get_text() for label in attention.axes[0].get_yticklabels()] == short
    lens = pd.DataFrame({"who": some[:5], "layer": 0, "quantity": "rank", "value": 1.0, "low": 1.0, "high": 2.0})
    curves = plots.plot_lens(lens, ["rank"], title=some[0])
    curve = pd.DataFrame({"fraction": [0.1, 1.0], "faithfulness": [0.0, 1.0], "low": 0.0, "high": 1.0})
    faithful = plots.plot_faithfulness(dict.fromkeys(some[5:10], curve), title=some[0])
    for figure, part in ((curves, shown[:5]), (faithful, shown[5:10])):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == part
    rows = pd.DataFrame({"x": some, "pane": some[0], "value": 1.0, "low": 0.0, "high": 1.0})
    bars = plots.plot_bars(rows, "x", column="pane", label=some[0], title=some[0])
    assert [label.get_text() for label in bars.axes[0].get_xticklabels()] == short
    assert bars.axes[0].get_title() == shown[0] == bars.axes[0].get_ylabel()
    heads = pd.DataFrame({"layer": [0], "head": [0], some[0]: [1.0]})
    known = pd.DataFrame({"relation": some[10:], "category": some[10:], "hit_10": 1.0, "hit_1": 0.5, "answers": 3})
    runs = pd.DataFrame({"run": ["circuit"], "split": ["D_val"], "n": [4], "hit": [0.5], "low": [0.0], "high": [1.0]})
    for figure in (
        attention, curves, faithful, bars, plots.plot_heads(heads, some[0], title=some[0]),
        plots.plot_knowledge(known), plots.plot_completeness({some[0]: runs}),
    ):  # fmt: skip
        assert figure._repr_png_()[0].startswith(b"\x89PNG")
        for text in figure.findobj(Text):
            written = text.get_text()
            if not written.startswith(r"$\mathdefault{"):  # matplotlib's own powers of ten
                assert not text._preprocess_math(written)[1], written


# --- reports ---

CELLS = [
    "print(*texts, sep='\\n')",
    "import pandas as pd\npd.DataFrame({'token': texts})",
    "from kcwb.workbench import plots, tables\nfrom IPython.display import HTML\n"
    "HTML(tables.styled(*(tables.heading(text) for text in texts), tables.table(pd.DataFrame({'token': texts}))))",
    "plots.plot_bars(pd.DataFrame({'x': texts[:5], 'value': 1, 'low': 0, 'high': 2}), 'x', title=texts[1])",
    "from tests.workbench.pages import hostile_view\nhostile_view()",
    "import ipywidgets\nipywidgets.VBox([ipywidgets.Text(value=text, description=text) for text in texts])",
    "texts",
    "raise ValueError(''.join(texts[:4]))",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with hostile parameters and outputs."""
    folder = tmp_path_factory.mktemp("hostile")
    root = str(Path(__file__).parents[2])
    cells = [new_markdown_cell("# Hostile"), new_code_cell("texts = []", metadata={"tags": ["parameters"]})]
    cells.append(new_code_cell(f"import sys\nsys.path.insert(0, {root!r})"))
    cells += [new_code_cell(source, metadata={"tags": ["raises-exception"]}) for source in CELLS]
    nbformat.write(new_notebook(cells=cells), folder / "hostile.ipynb")
    return report(folder / "hostile.ipynb", folder / "hostile.html", {"texts": HOSTILE}, progress=False)


def test_report_holds_text_only(page: Path) -> None:
    content = page.read_bytes().decode("utf-8")
    soup = parsed(content)
    assert_inert(soup, scripts=1)
    (script,) = soup.find_all("script")
    assert script["id"] == "kcwb-report" and json.loads(script.get_text())["parameters"]["texts"] == HOSTILE
    assert json.loads(script.get_text())["error"] is None
    assert [tag.name for tag in soup.find_all(["iframe", "img", "input", "link", "meta"])] == [
        *["meta"] * 5,
        "img",
        "iframe",
    ]
    assert all("refresh" not in str(meta) for meta in soup.find_all("meta"))
    (frame,) = soup.find_all("iframe")
    assert_inert(parsed(str(frame["srcdoc"])), scripts=2)
    cells = [cell.get_text() for cell in soup.select(".kcwb td")]
    assert cells == [shortened(text, 160).replace("\0", "\ufffd") for text in HOSTILE]
    printed = soup.select(".jp-RenderedText pre")[0].get_text()
    for text in HOSTILE:
        if not re.search(r"[\x00-\x1f\x7f-\x9f]", text):  # a terminal's controls colour what is printed, and go
            assert text in printed, text[:80]
    assert HOSTILE[0] in soup.select(".kc-error")[0].get_text()


def test_index_of_hostile_reports_holds_text_only(page: Path, tmp_path: Path) -> None:
    listed = parsed(index([page], tmp_path / "index.html").read_text(encoding="utf-8"))
    assert_inert(listed, scripts=0)
    assert "<script>" in listed.select(".kc-parameters")[0].get_text()


# --- in Chromium ---


@pytest.mark.browser
def test_hostile_graph_does_not_run(show: Any) -> None:
    page = ready(show(hostile_view().page))
    assert colours(page) > 20
    for name in HOSTILE[::3]:
        page.hover("#kc-canvas", position=spot(page, name))
        until(page, "shadow.getElementById('kc-tip').firstChild?.textContent === arg", shortened(name, 120))
    for name in HOSTILE[::5]:
        page.fill("#kc-search", name)
        page.keyboard.press("Enter")
    svg = ElementTree.fromstring(saved(page, "#kc-svg"))
    assert {element.tag.rpartition("}")[2] for element in svg.iter()} == {"svg", "title", "rect", "text", "path", "g"}
    assert page.evaluate("window.hacked") is None
    assert asked(page, "shadow.querySelectorAll('img, a, h1, link, iframe, script').length") == 0
    assert page.evaluate("document.querySelectorAll('img, a, h1, link, iframe, form').length") == 0


def saved(page: Any, button: str) -> bytes:
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_bytes()


@pytest.mark.browser
def test_hostile_report_does_not_run(page: Path, show: Any) -> None:
    tab = show(page.read_text(encoding="utf-8"))
    frame = ready(tab.wait_for_selector("iframe").content_frame())
    assert colours(frame) > 20
    for where in (tab, frame):
        assert where.evaluate("window.hacked") is None
    assert tab.evaluate("document.querySelectorAll('script, form, link, object, [onload], [onerror]').length") == 1
    assert HOSTILE[0] in tab.inner_text(".jp-RenderedText")
    assert len(tab.screenshot()) > 20_000
