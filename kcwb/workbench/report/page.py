"""An executed notebook as one HTML page that asks nothing of the network.

nbconvert turns cells into HTML, with the folder ``template`` for the look. What it leaves to be wished for:

1. widgets become plain HTML: their own ``text/html`` if they have one, else their last state as text;
2. math becomes MathML, which browsers draw by themselves: no script, no font, no request;
3. pictures are embedded (`pictures`); what else would be fetched, runs or navigates is replaced by a note (`harmless`),
   and a content security policy forbids the rest;
4. the first heading and its first paragraph are taken out for the title block and the index of a series.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from kcwb.errors import DataError, warn
from kcwb.outputs import PAGE_MARK
from kcwb.workbench import tables
from kcwb.workbench.lasting import VIEW
from kcwb.workbench.report.harmless import make_harmless, missing, parsed
from kcwb.workbench.report.pictures import Pictures, data_uri
from kcwb.workbench.tables import shorten
from kcwb.workbench.tables import text as escaped

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from jinja2 import Environment
    from nbformat import NotebookNode

TEMPLATE = Path(__file__).parent / "template"
_STATE = "application/vnd.jupyter.widget-state+json"
_PREFER = ["text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain"]

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # nbconvert's remarks go nowhere unless somebody listens


class Body(NamedTuple):
    """The cells as HTML, and what a title block and an index need of them."""

    cells: str
    heading: str | None  # HTML
    title: str | None  # text
    summary: str  # text
    graphs: bool  # whether there is a graph of a circuit among them


def notebook_body(notebook: NotebookNode, folder: Path, *, hide_code: bool = False) -> Body:
    """Turn an executed notebook's cells into HTML that needs nothing else; its widgets become HTML in place.

    The pictures that its prose names are embedded from `folder`; those that are missing are warned of, and noted.
    """
    _widgets_to_html(notebook)
    lacking: list[str] = []
    exporter = _exporter(hide_code, folder, lacking)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": "report", "path": str(folder)}})
    soup = parsed(page)
    make_harmless(soup)
    for number, picture in enumerate(soup.select('img[alt^="No description"]'), 1):
        picture["alt"] = f"Figure {number}"
    if lacking:
        warn(f"The report lacks pictures: {'; '.join(dict.fromkeys(lacking))}")
    return _take_title(soup)


def render(template: str, **values: Any) -> str:
    """Fill one of the page templates; text in it is escaped."""
    page = _environment().get_template(template).render(**values)
    return page.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def facts_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A small HTML table of provenance entries: what it is, its name, its digest, and details."""
    rows = []
    for entry in entries:
        details = {key: value for key, value in entry.items() if key not in ("kind", "name", "digest")}
        notes = "; ".join(f"{key} {_value(value, 80)}" for key, value in details.items() if value not in (None, ""))
        digest = f'<br><code class="kc-digest">{escaped(entry["digest"], 80)}</code>' if entry.get("digest") else ""
        cells = [escaped(entry.get("kind", ""), 40), escaped(entry.get("name", ""), 120) + digest, escaped(notes, 1000)]
        rows.append(f"<tr><th>{cells[0]}</th><td>{cells[1]}</td><td>{cells[2]}</td></tr>")
    head = "<thead><tr><th></th><th>Name and SHA-256</th><th>Details</th></tr></thead>"
    return f'<table class="kc-facts">{head}<tbody>{"".join(rows)}</tbody></table>'


# --- the pages ---


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATE), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.globals["style"] = Markup((TEMPLATE / "style.css").read_text(encoding="utf-8") + tables.CSS)
    environment.globals["mark"] = Markup(PAGE_MARK)
    environment.filters |= {"value": _value, "shorten": shorten, "date": _date, "duration": _duration, "size": _size}
    return environment


def _value(value: Any, length: int) -> str:
    """A parameter's value in few characters."""
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, Mapping):
        value = ", ".join(f"{key} {_value(item, length)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(_value(item, length) for item in value)
    return shorten(str(value), length)


def _date(iso: str) -> str:
    moment = datetime.fromisoformat(iso)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


# --- cells ---


def _exporter(hide_code: bool, folder: Path, lacking: list[str]) -> Any:
    """Nbconvert's exporter with our rules; what pictures are missing is added to `lacking`."""
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        """Prose as nbconvert renders it, but for its math and its pictures."""

        def inline_math(self, body: str) -> str:
            return tex_to_html(body)

        def block_math(self, body: str) -> str:
            return tex_to_html(body, block=True)

        def latex_environment(self, name: str, body: str) -> str:
            return tex_to_html(f"\\begin{{{name}}}{body}\\end{{{name}}}", block=True)

        def _embed_image_or_attachment(self, src: str) -> str:
            return src  # as those in HTML: see `_embedded`

    def of_folder(source: str) -> str:
        return _embedded(source, Pictures(folder), lacking)

    def drawing(source: str) -> str:
        try:
            return f'<img alt="" src="{data_uri(source.encode("utf-8", "replace"))}">'
        except DataError:  # browsers draw in a page also what is not well formed
            return of_folder(source)

    class Exporter(HTMLExporter):
        """nbconvert's, with that renderer."""

        @pass_context
        def markdown2html(self, context: Any, source: str) -> str:
            prose = MarkdownWithMath(Renderer(escape=False)).render(source)
            return _embedded(prose, Pictures(folder, context.get("cell", {}).get("attachments")), lacking)

    exporter = Exporter(
        log=_log,
        template_name=TEMPLATE.name,
        extra_template_basedirs=[str(TEMPLATE.parent)],
        exclude_input=hide_code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={
            "tex2html": lambda text: tex_to_html(text.strip().strip("$"), block=text.strip().startswith("$$")),
            "with_pictures": of_folder,
            "drawing": drawing,
        },
    )
    exporter.config.NbConvertBase.display_data_priority = _PREFER
    return exporter


def _embedded(source: str, pictures: Pictures, lacking: list[str]) -> str:
    """HTML with its pictures in it, and all of its tags closed."""
    soup = parsed(source)
    for tag in soup.select("img, image"):
        name = "src" if tag.name == "img" else "href" if tag.has_attr("href") else "xlink:href"
        named = str(tag.get(name) or re.split(r"[\s,]", str(tag.get("srcset") or "").strip())[0])
        try:
            tag[name] = pictures.embedded(named)
        except DataError as error:
            lacking.append(str(error))
            tag.replace_with(missing(str(error)))
    return str(soup)


def _take_title(soup: BeautifulSoup) -> Body:
    """Move the first heading, if prose begins with it, out of the cells; copy the first paragraph."""
    heading = soup.select_one(".jp-MarkdownOutput :is(h1, h2, h3)")
    first = soup.select_one(".jp-Cell")
    paragraph = next((p for p in soup.select(".jp-MarkdownOutput > p") if p.get_text(strip=True)), None)
    summary = _plain(paragraph) if paragraph else ""
    graphs = soup.select_one('iframe[sandbox~="allow-scripts"]') is not None
    if heading is None:
        return Body(str(soup), None, None, summary, graphs)
    for anchor in heading.select(".anchor-link"):
        anchor.decompose()
    title, markup = _plain(heading), heading.decode_contents()
    if first is not None and first in heading.parents and heading.name == "h1":
        heading.extract()
        if not first.get_text(strip=True) and not first.find(["img", "svg"]):
            first.decompose()
    return Body(str(soup), markup, title, summary, graphs)


def _plain(tag: Any) -> str:
    return shorten(" ".join(tag.get_text().split()), 400)


# --- math ---

_PARTS = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
_BETTER = {"~": "∼", "⧵": "∖"}  # drawn as an operator; found in more fonts
_NUMBERED = re.compile(r"\\(begin|end)\{(?:aligned|split|align|eqnarray|gathered|gather)\*?\}")
_ALONE = re.compile(r"\\(?:begin|end)\{(?:equation|displaymath|math)\*?\}|\\(?:label\{[^}]*\}|nonumber|notag)")


def tex_to_html(tex: str, *, block: bool = False) -> str:
    """TeX math as MathML, or as its source where it is not understood."""
    from latex2mathml.converter import convert_to_element

    source = _NUMBERED.sub(r"\\\1{align*}", _ALONE.sub("", tex.replace("\n", " "))).strip()
    try:
        root = convert_to_element(source, display="block" if block else "inline")
    except Exception:  # the package has no common exception, and a typo in a formula must not cost the report
        root = None
    if root is None or not all(map(_understood, root.iter())):
        code = f'<code class="kc-tex">{html.escape(tex.strip())}</code>'
        return f"<p>{code}</p>" if block else code
    for node in list(root.iter()):
        node.text = html.unescape(node.text) if node.text else node.text
    for node in list(root.iter()):
        _mend(node)
    root.attrib = {"display": "block"} if block else {}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _understood(node: ElementTree.Element) -> bool:
    """False for a command that is left as it was, and for a fraction without a denominator and the like."""
    return not re.match(r"\\[A-Za-z]", node.text or "") and len(node) == _PARTS.get(node.tag, len(node))


def _mend(node: ElementTree.Element) -> None:
    """Make an element proper: letters and spaces as TeX has them, nothing that acts."""
    for name in ("href", "style", "class", "id"):
        node.attrib.pop(name, None)
    if node.tag == "mo" and re.fullmatch(r"[A-Za-z ]{2,}", node.text or ""):
        node.tag, node.attrib = "mi", {}
    if node.tag in ("mi", "mo") and node.text in _BETTER:
        node.tag, node.text = "mo", _BETTER[node.text]
    if node.tag == "mi" and re.fullmatch("[Α-Ω]", node.text or ""):
        node.set("mathvariant", "normal")  # as TeX does
    children = list(node)
    if node.tag != "mrow" and node.tag != "mtd":
        return
    for place in range(len(children) - 1, 0, -1):
        if _is_function(children[place - 1]) and children[place].tag not in ("mo", "mspace"):
            node.insert(place, ElementTree.Element("mspace", width="0.167em"))


def _is_function(node: ElementTree.Element) -> bool:
    """Whether an element is a name like `log`, perhaps with an index."""
    while node.tag in ("msub", "msup", "msubsup", "munder", "mover") and len(node):
        node = node[0]
    return node.tag in ("mi", "mo") and len(node.text or "") > 1 and (node.text or "").isalpha()


# --- widgets ---


def _widgets_to_html(notebook: NotebookNode) -> None:
    """Replace widgets, which live only with a kernel, by what they showed last; progress bars go."""
    states = notebook.metadata.pop("widgets", {}).get(_STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _show(output, states)]


def _show(output: Any, states: Mapping[str, Any]) -> bool:
    """Give an output that is a widget its text/html; False if there is nothing to show."""
    data = output.get("data", {})
    kind = next((kind for kind in data if kind.startswith("image/")), None)
    if kind is not None and ("<script" in str(data.get("text/html", "")) or not data.keys() & _PREFER[:-1]):
        # a picture beside a page that would need its scripts, or of a kind that nbconvert does not know
        data["text/html"] = f'<img alt="" src="data:{escaped(kind, 40)};base64,{html.escape("".join(data[kind]))}">'
    view = data.pop(VIEW, None)
    if view is None or "text/html" in data:
        return "data" not in output or any(data.values())
    model = str(view.get("model_id", ""))
    if shown := _widget(model, states):
        output.data["text/html"] = f'<div class="kc-widgets">{shown}</div>'
    elif model in states:
        return False
    return bool(output.data)


def _widget(reference: str, states: Mapping[str, Any]) -> str:
    """The last state of one of ipywidgets' own widgets as HTML; empty for one that shows nothing on paper."""
    entry = states.get(reference.removeprefix("IPY_MODEL_"), {})
    state, kind = entry.get("state", {}), str(entry.get("model_name", "")).removesuffix("Model")
    layout = states.get(str(state.get("layout", "")).removeprefix("IPY_MODEL_"), {}).get("state", {})
    if layout.get("display") == "none" or kind in ("Button", "Password") or "Progress" in kind:
        return ""
    if "children" in state:
        kinds = [states.get(str(c).removeprefix("IPY_MODEL_"), {}).get("model_name", "") for c in state["children"]]
        if kind == "HBox" and any("Progress" in name for name in kinds):
            return ""  # a progress bar with its texts, as tqdm draws it: done when the report is read
        children = "".join(_widget(str(child), states) for child in state["children"])
        row = " row" if kind == "HBox" else ""
        return f'<div class="kc-widgets{row}">{children}</div>' if children else ""
    if kind == "Output":
        return "".join(map(_captured, state.get("outputs", ())))
    if kind in ("HTML", "HTMLMath"):
        return f"<div>{state.get('value', '')}</div>"
    if kind == "Image" and entry.get("buffers"):
        return f'<img alt="" src="data:image/{escaped(state["format"], 20)};base64,{entry["buffers"][0]["data"]}">'
    value = _selected(state) if "_options_labels" in state else state.get("value")
    if value is None:
        return ""
    if isinstance(value, Mapping) and "month" in value:
        value = {**value, "month": value["month"] + 1}  # JavaScript's first is 0
    name = f"<span>{escaped(state.get('description') or '', 120)}</span>" if state.get("description") else ""
    return f'<div class="kc-setting">{name}<bdi>{html.escape(_value(value, 600))}</bdi></div>'


def _selected(state: Mapping[str, Any]) -> str | None:
    labels, index = state["_options_labels"], state.get("index")
    chosen = index if isinstance(index, list | tuple) else [index]
    return ", ".join(str(labels[i]) for i in chosen if i is not None) or None


def _captured(output: Mapping[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return f"<div>{data['text/html']}</div>"
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{data["image/png"]}">'
    text = output.get("text") or data.get("text/plain") or output.get("evalue") or ""
    return f"<pre>{html.escape(str(text))}</pre>"
