"""An executed notebook as one HTML page that asks nothing of the network.

nbconvert turns cells into HTML, with the folder ``template`` for the look. What it leaves to be wished for:

1. widgets become plain HTML: their own ``text/html`` if they have one, else their last state as text;
2. math becomes MathML, which browsers draw by themselves: no script, no font, no request;
3. what would be fetched when the page is opened is replaced by a note, and a content security policy forbids the rest;
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

from kcwb.workbench.tables import text as escaped

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from jinja2 import Environment
    from nbformat import NotebookNode

TEMPLATE = Path(__file__).parent / "template"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "media-src data: blob:; frame-src data: blob:; base-uri 'none'; form-action 'none'"
)
_VIEW = "application/vnd.jupyter.widget-view+json"
_STATE = "application/vnd.jupyter.widget-state+json"
_LOADS = ("src", "href", "srcset", "data", "poster", "xlink:href", "background")
_LOADERS = "img,script,link,iframe,frame,embed,object,source,track,video,audio,input,image,use,base,body,table,td"
_INSIDE = re.compile(r"\s*(?:data:|blob:|about:|#|$)", re.IGNORECASE)
_CSS_URL = re.compile(r"@import[^;]*;?|url\(\s*['\"]?\s*(?!['\"]?\s*(?:data:|#))[^)]*\)", re.IGNORECASE)
_SCRIPT_URL = re.compile(r"""\bimport\b[^;]{0,200}?["'](?:https?:)?//|requirejs|require\.config""")
_OUTWARD = re.compile(r"""<\w+\b[^>]*?\b(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(""", re.IGNORECASE)
_PREFER = ["text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain"]

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # nbconvert's remarks go nowhere unless somebody listens


class Body(NamedTuple):
    """The cells as HTML, and what a title block and an index need of them."""

    cells: str
    heading: str | None  # HTML
    title: str | None  # text
    summary: str  # text


def notebook_body(notebook: NotebookNode, folder: Path, *, hide_code: bool = False) -> Body:
    """Turn an executed notebook's cells into HTML that needs nothing else.

    Parameters
    ----------
    notebook
        The executed notebook; it is changed (widgets become HTML).
    folder
        Where the pictures that its prose names are found; they are embedded.
    hide_code
        Leave the code out.
    """
    from bs4 import BeautifulSoup

    _widgets_to_html(notebook)
    exporter = _exporter(hide_code)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": "report", "path": str(folder)}})
    soup = BeautifulSoup(page, "html.parser")
    _stay_offline(soup)
    for number, picture in enumerate(soup.select('img[alt^="No description"]'), 1):
        picture["alt"] = f"Figure {number}"
    for link in soup.select("a[href]"):
        link["href"] = re.sub(r"^(?!\w+:)([^#?]*)\.ipynb(?=$|#)", r"\1.html", str(link["href"]))
    return _take_title(soup)


def render(template: str, **values: Any) -> str:
    """Fill one of the page templates; text in it is escaped."""
    page = _environment().get_template(template).render(policy=POLICY, **values)
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
    environment.globals["style"] = Markup((TEMPLATE / "style.css").read_text(encoding="utf-8"))
    environment.filters |= {"value": _value, "shorten": _shorten, "date": _date, "duration": _duration, "size": _size}
    return environment


def _value(value: Any, length: int) -> str:
    """A parameter's value in few characters."""
    if isinstance(value, float):
        value = f"{value:g}"
    elif isinstance(value, Mapping):
        value = ", ".join(f"{key} {_value(item, length)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(_value(item, length) for item in value)
    return _shorten(str(value), length)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


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


def _exporter(hide_code: bool) -> Any:
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import InvalidNotebook, IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        """Prose as nbconvert renders it, but for its math, and a picture that is missing does not stop it."""

        def inline_math(self, body: str) -> str:
            return tex_to_html(body)

        def block_math(self, body: str) -> str:
            return tex_to_html(body, block=True)

        def latex_environment(self, name: str, body: str) -> str:
            return tex_to_html(f"\\begin{{{name}}}{body}\\end{{{name}}}", block=True)

        def image(self, text: str, url: str, title: str | None = None) -> str:
            try:
                return super().image(text, url, title)
            except InvalidNotebook as error:
                return f'<span class="kc-missing">{html.escape(str(error))}</span>'

    class Exporter(HTMLExporter):
        """nbconvert's, with that renderer."""

        @pass_context
        def markdown2html(self, context: Any, source: str) -> str:
            path = context["resources"]["metadata"]["path"]
            attachments = context.get("cell", {}).get("attachments", {})
            renderer = Renderer(escape=False, embed_images=True, path=path, attachments=attachments)
            return MarkdownWithMath(renderer).render(source)

    exporter = Exporter(
        log=_log,
        template_name=TEMPLATE.name,
        extra_template_basedirs=[str(TEMPLATE.parent)],
        exclude_input=hide_code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"tex2html": lambda text: tex_to_html(text.strip().strip("$"), block=text.strip().startswith("$$"))},
    )
    exporter.config.NbConvertBase.display_data_priority = _PREFER
    return exporter


def _take_title(soup: BeautifulSoup) -> Body:
    """Move the first heading, if prose begins with it, out of the cells; copy the first paragraph."""
    heading = soup.select_one(".jp-MarkdownOutput :is(h1, h2, h3)")
    first = soup.select_one(".jp-Cell")
    paragraph = next((p for p in soup.select(".jp-MarkdownOutput > p") if p.get_text(strip=True)), None)
    summary = _plain(paragraph) if paragraph else ""
    if heading is None:
        return Body(str(soup), None, None, summary)
    for anchor in heading.select(".anchor-link"):
        anchor.decompose()
    title, markup = _plain(heading), heading.decode_contents()
    if first is not None and first in heading.parents and heading.name == "h1":
        heading.extract()
        if not first.get_text(strip=True) and not first.find(["img", "svg"]):
            first.decompose()
    return Body(str(soup), markup, title, summary)


def _plain(tag: Any) -> str:
    return _shorten(" ".join(tag.get_text().split()), 400)


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
    view = output.get("data", {}).pop(_VIEW, None)
    if view is None or "text/html" in output.data:
        return True
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
    name = f"<span>{escaped(state.get('description') or '', 120)}</span>" if state.get("description") else ""
    return f'<div class="kc-setting">{name}<bdi>{html.escape(_value(value, 600))}</bdi></div>'


def _selected(state: Mapping[str, Any]) -> str | None:
    labels, index = state["_options_labels"], state.get("index")
    chosen = index if isinstance(index, list | tuple) else [index]
    return ", ".join(str(labels[i]) for i in chosen if i is not None) or None


def _captured(output: Mapping[str, Any]) -> str:
    """What an Output widget holds."""
    data = output.get("data", {})
    if "text/html" in data:
        return f"<div>{data['text/html']}</div>"
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{data["image/png"]}">'
    text = output.get("text") or data.get("text/plain") or output.get("evalue") or ""
    return f"<pre>{html.escape(str(text))}</pre>"


# --- the network ---


def _stay_offline(soup: BeautifulSoup) -> None:
    """Replace by a note whatever would be fetched when the page is opened."""
    for tag in soup.select(_LOADERS):
        if tag.decomposed or tag.parent is None:
            continue
        outward = [str(tag[name]) for name in _LOADS if name in tag.attrs and not _INSIDE.match(str(tag[name]))]
        if not outward and not (tag.name == "script" and _SCRIPT_URL.search(tag.get_text())):
            continue
        if tag.name in ("table", "td", "body", "use"):
            for name in _LOADS:
                tag.attrs.pop(name, None)
            continue
        if tag.name in ("link", "base", "source", "track"):
            tag.decompose()
            continue
        note = soup.new_tag("span", attrs={"class": "kc-missing"})
        what = "a script" if tag.name == "script" else "a picture" if tag.name in ("img", "image") else "a frame"
        where = f": {_shorten(', '.join(outward), 200)}" if outward else ""
        note.string = f"{what} from elsewhere is not part of this report{where}"
        tag.replace_with(note)
    for tag in soup.select("meta[http-equiv]"):
        tag.decompose()
    for tag in soup.find_all("style"):
        if tag.string and _CSS_URL.search(tag.string):
            tag.string = _CSS_URL.sub("none", tag.string)
    for tag in soup.select("[style]"):
        tag["style"] = _CSS_URL.sub("none", str(tag["style"]))
    for tag in soup.select("a[href]"):
        if re.match(r"\s*(?:javascript|vbscript):", str(tag["href"]), re.IGNORECASE):
            del tag["href"]
    for tag in soup.select("iframe[srcdoc]"):
        if _OUTWARD.search(str(tag["srcdoc"])):
            inner = type(soup)(str(tag["srcdoc"]), "html.parser")
            _stay_offline(inner)
            tag["srcdoc"] = str(inner)
