"""The pictures of a notebook are in its report, however they are named; nothing else of the machine is."""

from __future__ import annotations

import base64
import io
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from kcwb.errors import DataError
from kcwb.workbench.report.page import notebook_body
from kcwb.workbench.report.pictures import Pictures, data_uri

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'


def picture(kind: str = "PNG", shade: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (shade, 20, 30)).save(buffer, kind)
    return buffer.getvalue()


PNG = picture()


def sources(folder: Path, prose: str, **attachments: Any) -> list[bytes]:
    """The content of each picture in the report of a cell."""
    cell = new_markdown_cell(prose)
    if attachments:
        cell["attachments"] = attachments["attachments"]
    with warnings.catch_warnings(action="error"):
        page = notebook_body(new_notebook(cells=[cell]), folder).cells
    return [
        base64.b64decode(str(tag["src"]).partition("base64,")[2]) for tag in BeautifulSoup(page, "html.parser")("img")
    ]


NAMES = [
    ("a b.png", "![x](a%20b.png)"),
    ("a b.png", "![x](<a b.png>)"),
    ("a b.png", '<img src="a b.png">'),
    ("a b.png", "<img alt='x' SRC='a%20b.png' width=3>"),
    ("img/é.png", "![x](img/é.png)"),
    ("img/é.png", "![x](./img/%C3%A9.png)"),
    ("img/é.png", unicodedata.normalize("NFD", "![x](img/é.png)")),
    (unicodedata.normalize("NFD", "ordnér/é.png"), unicodedata.normalize("NFC", "![x](ordnér/é.png)")),
    ("日本 🦜.png", "![x](<日本 🦜.png>)"),
    ("a(1).png", "![x](a(1).png)"),
    ("a (1).png", "![x](<a (1).png> 'a \"title\"')"),
    ("a(1.png", "![x](a\\(1.png)"),
    ("r.png", "![x][ref]\n\n[ref]: r.png 'title'"),
    ("r s.png", "![ref]\n\n[ref]: <r s.png>"),
    ("a#b.png", "![x](a%23b.png)"),
    ("a#b.png", "![x](a#b.png)"),
    ("a?b.png", "![x](a%3Fb.png)"),
    ("a.png", "![x](a.png?version=2#top)"),
    ("a&b.png", "![x](a&b.png)"),
    ("a&b.png", '<img src="a&amp;b.png">'),
    ("100%.png", "![x](100%.png)"),
    ("a%20b.png", "![x](a%20b.png)"),
    ("a%20b.png", "![x](a%2520b.png)"),
    ("a_b_c.png", "![x](a_b_c.png)"),
    ("a'b\".png", "![x](a'b\\\".png)"),
    ("in/a.png", "![x](in\\a.png)"),
    ("picture", "![no ending](picture)"),
    ("a.PNG", "[![linked](a.PNG)](b.html)"),
    ("a.png", "| a |\n|---|\n| ![in a table](a.png) |"),
    ("a.png", "<figure><picture><source srcset='b.webp'><img src='a.png'></picture></figure>"),
    ("a.png", "<img srcset='a.png 2x, b.png 1x'>"),
    ("C: x.png", "![x](<./C: x.png>)"),
]


@pytest.mark.parametrize(("name", "prose"), NAMES)
def test_a_picture_of_any_legal_name_is_embedded(tmp_path: Path, name: str, prose: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(PNG)
    assert sources(tmp_path, prose) == [PNG]


def test_a_name_as_it_is_comes_before_what_else_it_may_mean(tmp_path: Path) -> None:
    for shade, name in enumerate(["a b.png", "a%20b.png", "c.png", "c.png#d"]):
        (tmp_path / name).write_bytes(picture(shade=shade))
    assert sources(tmp_path, "![x](a%20b.png) ![x](c.png#d)") == [picture(shade=0), picture(shade=3)]


def test_pictures_above_and_beside_the_notebook_are_embedded(tmp_path: Path) -> None:
    for folder in ("notebooks", "figures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(PNG)
    (tmp_path / "notebooks" / "link.png").symlink_to("../figures/a.png")
    assert sources(tmp_path / "notebooks", "![x](../figures/a.png) ![x](link.png)") == [PNG, PNG]


@pytest.mark.parametrize(
    ("prose", "name"),
    [
        ("![x](attachment:my%20image.png)", "my image.png"),
        ("![x](<attachment:my image.png>)", "my image.png"),
        ("![x](attachment:a%20b.png)", "a%20b.png"),
        ('<img src="attachment:a.png"/>', "a.png"),
        ("![x](attachment:é.png)", unicodedata.normalize("NFD", "é.png")),
        ("![x](attachment:a(1).png)", "a(1).png"),
    ],
)
def test_an_attachment_of_any_name_is_embedded(tmp_path: Path, prose: str, name: str) -> None:
    attachments = {name: {"image/png": base64.b64encode(PNG).decode()}}
    assert sources(tmp_path, prose, attachments=attachments) == [PNG]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_the_content_says_what_a_picture_is_and_not_its_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(picture(kind))
    (uri,) = [Pictures(tmp_path).embedded("a.txt")]
    assert uri.startswith(f"data:image/{kind.lower()};base64,")


def test_drawings_are_embedded_also_without_a_namespace_or_as_text(tmp_path: Path) -> None:
    bare = SVG.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    (tmp_path / "a.svg").write_text(f'<?xml version="1.0"?>\n<!-- drawn -->\n{bare}')
    attachments = {"b.svg": {"image/svg+xml": SVG}, "c.svg": {"image/svg+xml": base64.b64encode(SVG.encode()).decode()}}
    prose = "![x](a.svg) ![x](attachment:b.svg) ![x](attachment:c.svg)"
    first, *others = sources(tmp_path, prose, attachments=attachments)
    assert b'<svg xmlns="http://www.w3.org/2000/svg" width="9"' in first and others == [SVG.encode()] * 2


def test_pictures_that_outputs_name_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    outputs = [new_output("display_data", {"text/html": "<img src='a%20b.png'>"})]
    outputs += [new_output("display_data", {"text/markdown": "![x](<a b.png>)"})]
    gif = base64.b64encode(picture("GIF")).decode()
    outputs += [new_output("display_data", {"image/gif": gif, "text/plain": "<Image>"})]
    page = notebook_body(new_notebook(cells=[new_code_cell("", outputs=outputs)]), tmp_path).cells
    assert page.count(f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"') == 2
    assert f'src="data:image/gif;base64,{gif}"' in page and "&lt;Image&gt;" not in page


def test_what_is_no_picture_is_not_embedded(tmp_path: Path) -> None:
    (tmp_path / "n").mkdir()
    (tmp_path / "secret.png").write_text("root:x:0:0:")
    (tmp_path / "page.svg").write_text("<html xmlns='http://www.w3.org/1999/xhtml'><script>1</script></html>")
    pictures = Pictures(tmp_path / "n")
    for name in ("../secret.png", "../page.svg"):
        with pytest.raises(DataError, match="not a picture that can be shown"):
            pictures.embedded(name)
    (tmp_path / "n" / "a.png").write_bytes(PNG)
    whole = str(tmp_path / "n" / "a.png")
    for name in (whole, f"file://{whole}", whole.replace("/", "%2F"), "https://example.org/a.png", "//host/a.png"):
        with pytest.raises(DataError, match=r"from elsewhere is not part|missing picture"):
            pictures.embedded(name)
    for name in (
        "/dev/zero",
        "../" * 30 + "dev/zero",
        "../" * 30 + "etc/passwd",
        "a\0b",
        "x" * 5000,
        "",
        ".",
        "n/../..",
        "http://[host/a.png",
        "//a]b/c.png",
    ):
        with pytest.raises(DataError):
            pictures.embedded(name)
    for content in ("é", "a", "iVBO"):  # no base64, damaged, cut off
        with pytest.raises(DataError, match="not a picture that can be shown"):
            Pictures(tmp_path, {"a.png": {"image/png": content}}).embedded("attachment:a.png")
    with pytest.raises(DataError):
        data_uri(picture("TIFF"))


def test_a_missing_picture_is_said_in_the_page_and_as_one_warning(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no")
    cells = [
        new_markdown_cell("![x](gone%20far.png) ![x](attachment:a%20b.png)"),
        new_markdown_cell("![x](bad.png) kept"),
    ]
    with pytest.warns(UserWarning) as warned:
        page = notebook_body(new_notebook(cells=cells), tmp_path).cells
    notes = ["missing picture: gone far.png", "missing attachment: a b.png", "not a picture that can be shown: bad.png"]
    assert [note.get_text() for note in BeautifulSoup(page, "html.parser").select(".kc-missing")] == notes
    assert [str(one.message) for one in warned] == ["The report lacks pictures: " + "; ".join(notes)]
    assert "kept" in page
