"""What a notebook puts out, made harmless for a page that is sent to others.

Of prose and outputs stays what is shown: text, tables, pictures that are in the page, math, drawings, and their looks.
What acts goes: scripts, forms, frames from elsewhere, whatever would load, navigate or refresh. Graphs of circuits are
the exception: their frame may run scripts, and the page's policy (`policy`) allows it ours only, by their hashes. The
frame has an origin of its own, no windows to open, and nowhere to go.

Tags and attributes are allowed by name; text is escaped again. So nothing else comes through, however a browser reads
what was written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import tinycss2
from bs4 import BeautifulSoup, Tag
from bs4.element import PreformattedString
from bs4.exceptions import ParserRejectedMarkup
from tinycss2.ast import IdentToken

from kcwb.workbench import tables
from kcwb.workbench.graph.page import is_graph_page, script_hashes

_TAG_NAMES = """
    a abbr article aside audio b bdi bdo big blockquote br caption center cite code col colgroup dd del details dfn div
    dl dt em figcaption figure font footer h1 h2 h3 h4 h5 h6 header hr i iframe img input ins kbd label li mark meter
    nav ol p pre progress q rp rt ruby s samp section small source span strike strong style sub summary sup table tbody
    td tfoot th thead time tr tt u ul var video wbr
    math menclose merror mfenced mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow ms mspace
    msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover
    svg circle clippath defs desc ellipse g image line lineargradient marker mask path pattern polygon polyline
    radialgradient rect stop symbol text textpath title tspan use
"""
_ATTRIBUTE_NAMES = """
    align alt bgcolor border cellpadding cellspacing checked class color cols colspan controls datetime dir disabled
    face headers height hidden id lang loop max min muted open reversed role rows rowspan scope size span start style
    summary title type valign value width
    accent accentunder columnalign columnlines columnspacing columnspan depth display displaystyle fence frame
    largeop linethickness lspace mathbackground mathcolor mathsize mathvariant maxsize minsize movablelimits notation
    rowalign rowlines rowspacing rspace scriptlevel separator stretchy symmetric voffset
    clip-path clip-rule clippathunits cx cy d dominant-baseline dx dy fill fill-opacity fill-rule font-family font-size
    font-style font-weight fx fy gradienttransform gradientunits letter-spacing marker-end marker-mid marker-start
    markerheight markerunits markerwidth mask offset opacity orient paint-order patterncontentunits patterntransform
    patternunits points preserveaspectratio r refx refy rotate rx ry startoffset stop-color stop-opacity stroke
    stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin stroke-miterlimit stroke-opacity stroke-width
    text-anchor text-decoration textlength transform vector-effect version viewbox visibility x x1 x2 xmlns y y1 y2
"""
_TAGS, _ATTRIBUTES = frozenset(_TAG_NAMES.split()), frozenset(_ATTRIBUTE_NAMES.split())
_NAMED = re.compile(r"(?:aria|data)-[a-z-]+")
_GONE = {"script": "a script", "object": "a frame", "embed": "a frame", "applet": "a frame", "frame": "a frame"}
_SILENT = ("base", "head", "link", "meta", "noscript", "param", "template", "track")
_MEDIA = re.compile(r"\s*data:(?:image|audio|video)/[\w.+-]+[;,]", re.IGNORECASE)
_STYLED = ("style", "fill", "stroke", "mask", "clip-path", "marker-start", "marker-mid", "marker-end")
_LOADS = ("url", "src", "image", "image-set", "-webkit-image-set", "cross-fade", "-webkit-cross-fade")
_CONTROLS = re.compile("[\x00-\x1f]")  # which browsers leave out of an address
_OUTWARD = re.compile(r"(?:https?|mailto):", re.IGNORECASE)
_BESIDE = re.compile(r"(?![\\/])(?![A-Za-z][A-Za-z\d+.-]*:)")  # no scheme, no root, no other machine


def policy(*, graphs: bool = False) -> str:
    """The content security policy of a page: nothing is loaded, and no script runs but those of our graphs."""
    scripts = " ".join(script_hashes()) if graphs else "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "media-src data: blob:; frame-src 'none'; base-uri 'none'; form-action 'none'"
    )


def make_harmless(page: BeautifulSoup) -> None:
    """Take out of a page's cells, as nbconvert writes them, what acts or would be fetched; notes stand for it.

    Links in prose open a new tab, if a person clicks them; those in outputs are only told.
    """
    for number, cell in enumerate(page.find_all(True, recursive=False)):
        cell["data-cell"] = str(number)
        _clean(cell, f'[data-cell="{number}"]', links="jp-MarkdownCell" in cell.get_attribute_list("class"))


def parsed(source: str) -> BeautifulSoup:
    """HTML as a tree, without remarks on what it looks like."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return BeautifulSoup(source, "html.parser")
        except ParserRejectedMarkup:  # as of <![x
            return BeautifulSoup(source.replace("<![", "&lt;!["), "html.parser")


def missing(words: str) -> Tag:
    """A note for what is not in a report."""
    note = BeautifulSoup().new_tag("span", attrs={"class": "kc-missing"})
    note.string = tables.shorten(words, 300)
    return note


def _clean(root: Tag, scope: str, *, links: bool) -> None:
    """The rules for all that a cell, or a page in a frame, holds; its style sheets are confined to `scope`."""
    told: set[str] = set()
    for node in list(root.descendants):
        if node.decomposed:
            continue
        if isinstance(node, PreformattedString):
            node.extract()
        if not isinstance(node, Tag):
            continue
        name = node.name
        if name in _GONE:
            words = f"{_GONE[name]} is not part of this report"
            _replace(node, "" if words in told else words)
            told.add(words)
        elif name in _SILENT or (name == "title" and node.find_parent("svg") is None):
            node.decompose()
        elif name not in _TAGS or (name == "input" and node.get("type") not in ("checkbox", "radio")):
            node.unwrap()
        else:
            _clean_tag(node, scope, links)


def _clean_tag(tag: Tag, scope: str, links: bool) -> None:
    given = {key.lower(): str(tag[key]) if isinstance(tag[key], str) else " ".join(tag[key]) for key in tag.attrs}
    kept = {key: value for key, value in given.items() if key in _ATTRIBUTES or _NAMED.fullmatch(key)}
    tag.attrs = {
        key: _css(tinycss2.parse_component_value_list(value)) if key in _STYLED else value
        for key, value in kept.items()
    }
    address = _CONTROLS.sub("", given.get("href") or given.get("xlink:href") or "").strip()
    if tag.name == "style":
        css = tag.get_text()
        rules = tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)
        tag.string = "" if css.strip() == tables.CSS else "\n".join(_rules(rules, scope))
    elif tag.name == "a":
        tag.attrs |= _link(address, links) | ({"id": given["name"]} if "name" in given else {})
    elif tag.name == "iframe":
        _clean_frame(tag, given)
    elif tag.name in ("img", "audio", "video", "source"):
        _clean_media(tag, given.get("src") or given.get("srcset", ""))
    elif (tag.name == "image" and _MEDIA.match(address)) or address.startswith("#"):
        tag["href"] = address


def _link(address: str, links: bool) -> dict[str, str]:
    """The attributes of a link: within the page as it is, elsewhere in a new tab or not at all."""
    if address.startswith("#"):
        return {"href": address}
    if address and links and _BESIDE.match(address):
        address = re.sub(r"^([^#?]*)\.ipynb(?=$|#)", r"\1.html", address)
    elif not _OUTWARD.match(address):
        return {}
    if not links:
        return {"title": address}
    return {"href": address, "target": "_blank", "rel": "noopener noreferrer"}


def _clean_media(tag: Tag, source: str) -> None:
    """What is in the page stays; of the rest a note tells."""
    if tag.name == "source" and (tag.parent is None or tag.parent.name not in ("audio", "video")):
        tag.decompose()
    elif _MEDIA.match(source):
        tag["src"] = source
    elif source:
        what = "a picture" if tag.name == "img" else "a film or sound"
        whole = tag.parent if tag.name == "source" and tag.parent is not None else tag
        _replace(whole, f"{what} from elsewhere is not part of this report: {source}")


def _clean_frame(tag: Tag, given: dict[str, str]) -> None:
    """A graph keeps its scripts; another page in a frame is cleaned like a cell, and may do nothing."""
    inside = given.get("srcdoc")
    if inside is None:
        _replace(tag, f"a frame from elsewhere is not part of this report: {given.get('src', '')}")
    elif is_graph_page(inside):
        tag.attrs |= {"srcdoc": inside, "sandbox": "allow-scripts allow-downloads"}
    else:
        page = parsed(inside)
        _clean(page, "", links=False)
        tag.attrs |= {"srcdoc": str(page), "sandbox": ""}


def _replace(tag: Tag, words: str) -> None:
    if words:
        tag.insert_before(missing(words))
    tag.decompose()


def _rules(rules: Iterable[Any], scope: str) -> Iterator[str]:
    """The rules of a style sheet, for what stands under `scope` only, and without what would be fetched."""
    for rule in rules:
        if rule.type == "qualified-rule":
            yield f"{', '.join(_selectors(rule.prelude, scope))} {{{_css(rule.content)}}}"
        elif rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports") and rule.content is not None:
            inner = "\n".join(_rules(tinycss2.parse_rule_list(rule.content), scope))
            yield f"@{rule.lower_at_keyword} {_css(rule.prelude)} {{\n{inner}\n}}"


def _selectors(prelude: Iterable[Any], scope: str) -> Iterator[str]:
    parts: list[list[Any]] = [[]]
    for token in prelude:
        if token == ",":
            parts.append([])
        else:
            parts[-1].append(token)
    for part in parts:
        selector = _css(part).strip()
        whole = scope and selector in (":root", "html", "body")
        yield scope if whole else f"{scope} {selector}".strip()


def _css(tokens: list[Any]) -> str:
    """CSS again, as it may stand in a page; `none` for what would be fetched."""
    _keep_inside(tokens)
    return tinycss2.serialize(tokens).replace("<", "\\3c ")


def _keep_inside(tokens: list[Any]) -> None:
    for i, token in enumerate(tokens):
        inner = getattr(token, "arguments", None) or getattr(token, "content", None) or []
        if token.type == "url" or (token.type == "function" and token.lower_name in _LOADS):
            named = [one.value for one in [token, *inner] if one.type in ("string", "url")]
            if not all(re.match("data:|#", address) for address in named):
                tokens[i] = IdentToken(token.source_line, token.source_column, "none")
        _keep_inside(inner)
