"""Reports: a notebook re-run with parameters becomes one page that needs nothing else, or an error that says why."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup
from matplotlib.image import imread
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kcwb.circuits.circuit import Circuit
from kcwb.cli import main
from kcwb.errors import DataError, KcwbError, SettingError
from kcwb.models.graph import Graph
from kcwb.tasks.task import make_task
from kcwb.workbench.lasting import VIEW
from kcwb.workbench.report import pdf
from kcwb.workbench.report import provenance as provenances
from kcwb.workbench.report.page import _STATE, notebook_body, tex_to_html
from kcwb.workbench.report.provenance import PROVENANCE
from kcwb.workbench.report.run import take_parameters
from kcwb.workbench.report.write import (
    index,
    parameters_of,
    provenance,
    read_parameters,
    report,
    write_pdf,
)
from tests.tasks import known_relation
from tests.workbench.pages import asked, colours, ready

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script></style><script>window.hacked = 1</script>",
    "\"><img src=x onerror='window.hacked = 1'>",
    "' \" ` \\ ${window.hacked = 1} {{ 7 * 7 }} {% raw %} <!-- -->",
    '"""\nwindow = None; raise SystemExit  # \\',
    "\u202egnirts tfel ot thgir \u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0633\u0644\u0627\u0645",
    "👩‍🔬🇫🇷🦜 line\nbreak\ttab\u2028separator\x1b[31mred",
    "x" * 10_000,
]
PARAMETERS = '# what is looked for\nrelation = "country_capital"\ntau: float = 0.05\nlayers = [0, 1]\nstart = 2 ** 3'

PROSE = r"""## Math

Inline $\mathrm{KL}(p\,\|\,q) < \tau$, a block
$$\Delta_e = \sum_{x \in V} p(x) \log \frac{p(x)}{q(x)}$$
and \begin{align} a &= b \\ c &= d \end{align} and what is wrong: $\frac{a$, $\nosuch{x}$.

![beside](dot.svg) ![elsewhere](https://example.org/x.png) <script src="https://example.org/x.js"></script>
<link rel="stylesheet" href="//example.org/x.css">"""
TABLE = """import pandas as pd
print(relation, tau, open("data.txt").read())
pd.DataFrame({"fact": [relation, "<b>"]})"""
WIDGETS = r"""import ipywidgets as w
from IPython.display import HTML, Math, display
from tqdm.auto import tqdm

slider = w.FloatSlider(value=0.5, description="τ <b>", max=1)
method = w.Dropdown(options=["acdc", "eap"], value="eap", description="method")
out = w.Output()
display(w.VBox([slider, method, out]))
slider.value = tau
with out:
    print("inside <i>")
for _ in tqdm(range(3)):
    pass

class Panel:
    def _repr_mimebundle_(self, **_):
        view = {"model_id": "gone", "version_major": 2, "version_minor": 0}
        bundle = {"text/plain": "Panel()", "text/html": "<b>as html</b>"}
        return bundle | {"application/vnd.jupyter.widget-view+json": view}

display(Panel(), Math(r"\frac{a}{b}"), HTML('<img src="http://example.org/y.png">'))"""
GRAPH = """from kcwb.circuits.circuit import Circuit
from kcwb.models.graph import Graph
from kcwb.workbench.graph.page import graph_view
from kcwb.workbench.report.write import provenance

edges = {"input->a0.h1<v>": 0.5, "a0.h1->a1.h0<q>": -0.2, "a1.h0->logits": 1.0}
made = {"method": "acdc", "model": {"name": "tiny <m>", "digest": "ab" * 32}}
made["relation"] = {"name": "capital", "digest": "cd" * 32}
circuit = Circuit.from_edges(Graph(n_layers=2, n_heads=2), edges, provenance=made)
provenance(None, circuit)
graph_view(circuit, height=400)"""


def code(source: str, *tags: str) -> Any:
    return new_code_cell(source, metadata={"tags": list(tags)})


def save(path: Path, *cells: Any, **metadata: Any) -> Path:
    """Write a notebook; text is prose."""
    made = [new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    nbformat.write(new_notebook(cells=made, metadata=metadata), path)
    return path


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def about(page: Path) -> dict[str, Any]:
    match = re.search(r'id="kcwb-report">(.*?)</script>', read(page), re.DOTALL)
    assert match
    return json.loads(match[1])


def fetched(page: str) -> list[str]:
    """What a page would load from elsewhere, links to click aside."""
    return re.findall(r"""<(?!a\b)\w+\b[^>]*?\b(?:src|href)\s*=\s*["']?\s*(?!data:|#|["' >])[^>]{0,60}""", page)


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a notebook of everything, and what it reads."""
    folder = tmp_path_factory.mktemp("my notebooks")
    (folder / "data.txt").write_text("found beside the notebook")
    (folder / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>')
    texts = "\n".join(HOSTILE[:3])
    save(
        folder / "all.ipynb",
        r"# Which edges recall $\tau$?" "\n\nA circuit recalls a *fact*; see [next](02_next.ipynb#more).\n\nMore.",
        code(PARAMETERS, "parameters"),
        PROSE,
        code(TABLE),
        code("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.figure(figsize=(3, 2)); plt.plot([1, 2]);"),
        code(WIDGETS),
        code(GRAPH),
        f"```\n{texts}\n```\n\n`{HOSTILE[0]}`",
        kernelspec={"name": "an-environment-that-is-not-here", "display_name": "x", "language": "python"},
    )
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    target = folder / "out" / "all.html"
    return report(folder / "all.ipynb", target, {"relation": HOSTILE[1], "tau": 0.02}, progress=False)


# --- the page ---


def test_notebook_is_run_with_the_parameters_in_its_own_folder_and_stays_as_it_was(folder: Path, page: Path) -> None:
    soup = BeautifulSoup(read(page), "html.parser")
    printed = soup.select_one(".jp-RenderedText")
    assert printed and printed.get_text().strip() == f"{HOSTILE[1]} 0.02 found beside the notebook"
    source = nbformat.read(folder / "all.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in source.cells)
    assert sorted(p.name for p in folder.iterdir()) == ["all.ipynb", "data.txt", "dot.svg", "out"]
    assert [p.name for p in page.parent.iterdir()] == ["all.html"]


def test_page_loads_nothing_from_elsewhere(page: Path) -> None:
    text = read(page)
    assert fetched(text) == []
    for name in ("require.min", "requirejs", "mermaid", "MathJax", "cdnjs", "unpkg", 'type="application/vnd.jupyter'):
        assert name not in text, name
    assert "a picture from elsewhere is not part of this report: https://example.org/x.png" in text
    assert "data:image/svg+xml;base64," in text and "data:image/png;base64," in text
    assert len(text) < 400_000


def test_title_block_and_footer_say_what_it_is_and_how_it_was_made(folder: Path, page: Path) -> None:
    soup = BeautifulSoup(read(page), "html.parser")
    headings = [h.get_text() for h in soup.select("h1")]
    assert headings == ["Which edges recall τ?"] and soup.title and soup.title.get_text() == headings[0]
    footer = soup.select_one("footer.kc-provenance")
    assert footer
    text = footer.get_text(" ", strip=True)
    digest = hashlib.sha256((folder / "all.ipynb").read_bytes()).hexdigest()
    for part in (
        "all.ipynb",
        digest,
        HOSTILE[1],
        "tau = 0.02",
        "layers = 0, 1",
        "start = 2 ** 3",
        "transformer_lens",
        "UTC",
    ):
        assert part in text, part
    assert "No cell says" not in text
    for part in ("tiny <m>", "ab" * 32, "capital", "cd" * 32, "edges 3 of", "method acdc"):
        assert part in text, part
    facts = about(page)
    assert facts["title"] == "Which edges recall τ?" and facts["summary"] == "A circuit recalls a fact; see next."
    assert facts["given"] == ["relation", "tau"] and facts["parameters"]["layers"] == [0, 1]


def test_links_to_notebooks_lead_to_their_reports(page: Path) -> None:
    assert 'href="02_next.html#more"' in read(page)


def test_math_is_mathml_or_its_source(page: Path) -> None:
    soup = BeautifulSoup(read(page), "html.parser")
    assert len(soup.select("math")) == 5 and len(soup.select('math[display="block"]')) == 2
    assert [code.get_text() for code in soup.select(".kc-tex")] == [r"\frac{a", r"\nosuch{x}"]
    assert not re.search(r"\$\$|\\begin", soup.get_text())


def test_widgets_show_their_html_or_their_last_state(page: Path) -> None:
    soup = BeautifulSoup(read(page), "html.parser")
    assert [s.get_text("|") for s in soup.select(".kc-setting")] == ["τ <b>|0.02", "method|eap"]
    assert "inside <i>" in [pre.get_text().strip() for pre in soup.select(".kc-widgets pre")]
    assert "as html" in [b.get_text() for b in soup.select("b")]
    assert "Panel()" not in [o.get_text().strip() for o in soup.select(".jp-OutputArea-output")]
    assert "it/s" not in read(page)


def test_code_can_be_left_out(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", "# T", code("print(6 * 7)"))
    shown, hidden = (read(report(notebook, tmp_path / f"{h}.html", hide_code=h, progress=False)) for h in (False, True))
    assert "No cell says which models and data this rests on" in shown
    assert "jp-CodeMirrorEditor" in shown and "jp-CodeMirrorEditor" not in hidden
    assert "42" in hidden


def test_a_panel_with_a_progress_bar_is_shown_without_it(tmp_path: Path) -> None:
    def model(kind: str, **state: Any) -> dict[str, Any]:
        return {"model_name": f"{kind}Model", "state": state}

    states = {
        "panel": model("VBox", children=["IPY_MODEL_row", "IPY_MODEL_bar", "IPY_MODEL_text", "IPY_MODEL_off"]),
        "row": model("HBox", children=["IPY_MODEL_bar", "IPY_MODEL_text"]),
        "bar": model("FloatProgress", value=0.5, description="running"),
        "text": model("Textarea", value="<b>typed</b>", description="note"),
        "off": model("Label", value="hidden", layout="IPY_MODEL_none"),
        "none": model("Layout", display="none"),
    }
    outputs = [
        new_output("display_data", {"text/plain": f"plain {name}", VIEW: {"model_id": name}})
        for name in ("panel", "row", "not there")
    ]
    metadata = {"widgets": {_STATE: {"state": states}}}
    notebook = new_notebook(cells=[new_code_cell("", outputs=outputs)], metadata=metadata)
    text = BeautifulSoup(notebook_body(notebook, tmp_path).cells, "html.parser").get_text(" ", strip=True)
    assert text == "note <b>typed</b> plain not there"


def test_a_date_is_that_of_the_widget(tmp_path: Path) -> None:
    value = {"year": 2026, "month": 0, "date": 31}  # as JavaScript counts
    states = {"day": {"model_name": "DatePickerModel", "state": {"value": value, "description": "day"}}}
    output = new_output("display_data", {VIEW: {"model_id": "day"}})
    notebook = new_notebook(cells=[new_code_cell("", outputs=[output])])
    notebook.metadata["widgets"] = {_STATE: {"state": states}}
    text = BeautifulSoup(notebook_body(notebook, tmp_path).cells, "html.parser").get_text(" ", strip=True)
    assert text == "day year 2026, month 1, date 31"


def test_a_widget_beside_its_drawing_is_shown_once(tmp_path: Path) -> None:
    bundles = (
        {VIEW: {"model_id": "x"}, "text/html": "", "text/plain": ""},
        {"text/html": "<b>drawn</b>", "text/plain": "Panel"},
        {},  # a progress bar that is done
    )
    outputs = [new_output("display_data", bundle) for bundle in bundles]
    cells = notebook_body(new_notebook(cells=[new_code_cell("", outputs=outputs)]), tmp_path).cells
    page = BeautifulSoup(cells, "html.parser")
    assert page.get_text(" ", strip=True) == "drawn" and len(page.select(".jp-OutputArea-child")) == 1


@pytest.mark.parametrize(
    ("tex", "said"),
    [
        (r"\hat W \setminus \Delta", "W^∖Δ"),
        (r"\text{<script>alert(1)</script>}", "<script>alert(1)</script>"),
        (r"\href{javascript:alert(1)}{a}", "a"),
        (r"\begin{cases} 1 & x > 0 \\ 0 \end{cases}", "{1x>00"),
        (r"\max_x \log_2 f", "maxxlog2f"),
        (r"a_{", "a_{"),
        ("", ""),
    ],
)
def test_math_holds_only_text(tex: str, said: str) -> None:
    made = BeautifulSoup(tex_to_html(tex), "html.parser")
    assert made.get_text().replace("\xa0", "") == said
    assert not made.select("script, a") and "javascript" not in tex_to_html(tex).replace(tex, "")


def test_what_an_output_would_load_is_replaced_by_a_note(tmp_path: Path) -> None:
    inner = "&lt;script src='https://example.org/vis.js'&gt;&lt;/script&gt;&lt;p&gt;kept&lt;/p&gt;"
    content = f"""<style>@import url(https://example.org/a.css); b {{ background: url("//example.org/b.png") }}</style>
        <p style="background: url(https://example.org/c.png)">text</p><iframe srcdoc="{inner}"></iframe>
        <video src="clip.mp4"></video><script type="module">import {{ x }} from "https://example.org/x.js"</script>
        <script>window.kept = 1</script><a href="javascript:alert(1)">x</a><a href="https://example.org/">y</a>
        <img srcset="https://example.org/d.png 2x"><object data="https://example.org/e"></object>"""
    cell = new_code_cell("", outputs=[new_output("display_data", {"text/html": content})])
    notebook = new_notebook(cells=[cell, new_markdown_cell("![gone](attachment:a.png)")])
    with pytest.warns(UserWarning, match="lacks pictures: .*d.png; missing attachment: a.png"):
        cells = notebook_body(notebook, tmp_path).cells
    assert fetched(cells) == [] and "@import" not in cells and "url(" not in cells and "vis.js'" not in cells
    assert "window.kept" not in cells and "kept&lt;/p&gt;" in cells and "javascript:" not in cells
    assert '<a title="https://example.org/">y</a>' in cells and "missing attachment: a.png" in cells
    assert cells.count("is not part of this report") == 5


# --- parameters ---


def test_hostile_parameters_arrive_as_they_are_and_do_not_run(tmp_path: Path) -> None:
    source = f"import json\njson.dump([text, more], open({str(tmp_path / 'got.json')!r}, 'w')); print(text)"
    notebook = save(tmp_path / "n{0}.ipynb", code("text = ''\nmore = None", "parameters"), code(source))
    more = {"texts": HOSTILE, "numbers": [1, -2.5, 1e-9, True, None], "nested": ({"a": []},)}
    page = report(notebook, tmp_path / "n.html", {"text": "\n".join(HOSTILE), "more": more}, progress=False)
    text, got = json.loads((tmp_path / "got.json").read_text())
    assert text == "\n".join(HOSTILE) and got == more | {"nested": [{"a": []}]}
    soup = BeautifulSoup(read(page), "html.parser")
    assert [s.attrs for s in soup.select("script")] == [{"type": "application/json", "id": "kcwb-report"}]
    assert not soup.select("img") and about(page)["parameters"]["text"] == text


def test_parameters_given_as_text_become_values() -> None:
    pairs = {
        "a": "0.02",
        "b": "7",
        "c": "country_language",
        "d": "true",
        "e": "None",
        "f": "[1, 2]",
        "g": '"7"',
        "h": "1e-3",
    }
    values = {"a": 0.02, "b": 7, "c": "country_language", "d": True, "e": None, "f": [1, 2], "g": "7", "h": 1e-3}
    assert read_parameters(pairs.items()) == values
    assert read_parameters([("no", "no"), ("day", "2024-01-01"), ("p", "{} is")]) == {
        "no": "no",
        "day": "2024-01-01",
        "p": "{} is",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a','b']", ["a", "b"]),
        ("[1, 2,]", [1, 2]),
        ("(1, 'b')", [1, "b"]),
        ("[]", []),
        ("[-1, -2.5e-3]", [-1, -0.0025]),
        ("[true, False, null, None, 'null']", [True, False, None, None, "null"]),
        ("{'a': [1, {'b': true}]}", {"a": [1, {"b": True}]}),
        ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
        ('"\\ud83e\\udd9c"', "🦜"),
        (r"'it\'s'", "it's"),
        ("-5.5e-3", -0.0055),
        ("-7", -7),
        ("+7", 7),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("'7'", "7"),
        ('"true"', "true"),
        ("null", None),
        ("False", False),
    ],
)
def test_parameters_are_read_as_json_or_python(text: str, value: object) -> None:
    (found,) = read_parameters([("x", text)]).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-x",
            "--",
            "--5",
            "...",
            "{1}",
            "b'x'",
            "1j",
            "007",
            "NaN",
            "inf",
            "1e999",
            "'tis",
            "l'été",
            "[a]",
            "[1",
        ),
        *("f'{x}'", "__import__('os')", "1 + 1", "{} is", "#1", "w5", "$x", "C:\\d", "9" * 5000, "-" * 9000, "a\nb"),
    ],
)
def test_all_else_is_text(text: str) -> None:
    assert read_parameters([("x", text)]) == {"x": text}


@pytest.mark.parametrize(
    "text",
    [f"{'[' * n}{']' * n}" for n in (101, 150, 300, 900, 5000, 200_000)]
    + ["{'a':" * n + "1" + "}" * n for n in (101, 300, 5000)]
    + ["('a'," * n + ")" * n for n in (150, 5000)],
)
def test_lists_too_deep_for_a_cell_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(SettingError, match="The parameter 'x' is a list or dict nested more than 100 deep") as error:
        read_parameters([("x", text)])
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_lists_that_a_cell_can_hold_are_taken() -> None:
    (value,) = read_parameters([("x", "[" * 100 + "]" * 100)]).values()
    assert json.dumps(value) == "[" * 100 + "]" * 100


def test_a_list_in_itself_is_refused(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", code("x = 1", "parameters"))
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(SettingError, match="nested more than 100 deep"):
        report(notebook, parameters={"x": endless})


@pytest.mark.parametrize("text", ["{1: 2}", "\ud800", "['\ud800']"])
def test_text_that_means_what_no_cell_can_hold_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="The parameter 'x' cannot be"):
        read_parameters([("x", text)])


def test_parameters_are_taken_from_a_command_line_as_they_are() -> None:
    words = ["-p", "a", "-5.5e-3", "n.ipynb", "-p", "-p", "--quiet", "--quiet", "-p", "c", "--", "--", "-p", "d", "e"]
    rest, pairs = take_parameters(words)
    assert pairs == [("a", "-5.5e-3"), ("-p", "--quiet"), ("c", "--")]
    assert rest == ["n.ipynb", "--quiet", "--", "-p", "d", "e"]
    assert take_parameters(["n", "-p", "a"]) == (["n", "-p", "a"], [])


def test_unknown_parameter_names_the_nearest_and_all(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", code(PARAMETERS, "parameters"), code("open('ran', 'w')"))
    with pytest.raises(SettingError, match="has no parameter 'realtion'") as error:
        report(notebook, tmp_path / "n.html", {"realtion": "x"})
    message = str(error.value)
    assert "Did you mean 'relation'?" in message
    assert "Its parameters: relation='country_capital', tau=0.05, layers=[0, 1], start='2 ** 3'." in message
    assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]
    assert parameters_of(notebook) == {"relation": "country_capital", "tau": 0.05, "layers": [0, 1], "start": "2 ** 3"}


def test_parameters_for_a_notebook_that_takes_none_are_refused(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", code("x = 1"))
    with pytest.raises(SettingError, match="takes no parameters: none of its cells is tagged 'parameters'"):
        report(notebook, parameters={"x": 2})


@pytest.mark.parametrize("value", [object(), {1: 2}, b"x", "\ud800", [{"a": {1}}]])
def test_a_value_that_cannot_be_written_into_a_notebook_is_refused(tmp_path: Path, value: object) -> None:
    notebook = save(tmp_path / "n.ipynb", code("x = 1", "parameters"))
    with pytest.raises(SettingError, match="The parameter 'x' cannot be"):
        report(notebook, parameters={"x": value})


# --- what goes wrong ---


def test_missing_and_broken_notebooks_are_named(tmp_path: Path) -> None:
    save(tmp_path / "01_discovery.ipynb")
    (tmp_path / "broken.ipynb").write_text('{"cells": [')
    (tmp_path / "other.ipynb").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"no notebook .*01_discovry\.ipynb\. Did you mean '01_discovery\.ipynb'"):
        report(tmp_path / "01_discovry.ipynb")
    for name in ("broken", "other"):
        with pytest.raises(DataError, match=f"{name}.ipynb is not a notebook"):
            report(tmp_path / f"{name}.ipynb")


def test_a_failing_cell_ends_the_report_there(tmp_path: Path) -> None:
    notebook = save(
        tmp_path / "n.ipynb",
        "# T",
        code("x = 1", "parameters"),
        code("1 / 0", "raises-exception"),
        code("print('before')\nraise ValueError('first\\n<b>last</b>')"),
        "never",
        code("print('after')"),
    )
    with pytest.raises(KcwbError) as error:
        report(notebook, tmp_path / "n.html", {"x": 2}, progress=False)
    assert str(error.value) == (
        f"{notebook} stopped at cell 4 (print('before')): ValueError: <b>last</b>. "
        f"The report up to there is {tmp_path / 'n.html'}."
    )
    soup = BeautifulSoup(read(tmp_path / "n.html"), "html.parser")
    text = soup.get_text()
    assert "This report is incomplete" in text and "1 more cell was not run" in text
    assert "before" in text and "after" not in text and "never" not in text
    link = soup.select_one(".kc-banner a")
    assert link and soup.find(id=str(link["href"])[1:])
    assert not soup.select(".kc-error b")


def test_errors_that_a_tag_allows_are_part_of_a_whole_report(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", code("1 / 0", "raises-exception"), code("print('after')"))
    page = report(notebook, tmp_path / "n.html", progress=False)
    assert "ZeroDivisionError" in read(page) and "after" in read(page) and about(page)["error"] is None


@pytest.mark.parametrize(
    ("source", "said"),
    [("import time; time.sleep(60)", "TimeoutError: .* more than 1 s"), ("import os; os._exit(1)", "the kernel died")],
)
def test_a_cell_that_hangs_or_kills_the_kernel_ends_the_report(tmp_path: Path, source: str, said: str) -> None:
    notebook = save(tmp_path / "n.ipynb", code("print('before')"), code(source), code("2"))
    with pytest.raises(KcwbError, match=f"stopped at cell 2 .*{said}"):
        report(notebook, tmp_path / "n.html", timeout=1, progress=False)
    assert "before" in read(tmp_path / "n.html")


def test_a_progress_callback_counts_code_cells_and_can_cancel(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", "# T", code("1"), code(""), code("2"), code("open('ran', 'w')"))
    calls: list[tuple[int, int]] = []

    def cancel(done: int, total: int, note: str) -> None:
        calls.append((done, total))
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        report(notebook, tmp_path / "n.html", progress=cancel)
    assert calls == [(1, 3), (2, 3)] and [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]


def test_the_running_interpreter_is_used_unless_a_kernel_is_named(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", code("import sys; print(sys.executable)"))
    assert sys.executable in read(report(notebook, progress=False))
    assert (tmp_path / "n.html").is_file()
    with pytest.raises(SettingError, match="The kernel 'pyhton3' is not known"):
        report(notebook, kernel="pyhton3")
    other = save(tmp_path / "r.ipynb", code("1"), kernelspec={"name": "ir", "display_name": "R", "language": "R"})
    with pytest.raises(SettingError, match=r"is written in r\. Name a kernel"):
        report(other)


def test_pdf_without_chromium_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "_BROWSERS", ("no-such-browser",))
    monkeypatch.setattr(pdf, "_BROWSER_ON_MAC", "/no/such/browser")
    notebook = save(tmp_path / "n.ipynb", code("1"))
    with pytest.raises(SettingError, match="A PDF needs Chromium or Chrome"):
        report(notebook, tmp_path / "n.html", pdf=True)
    assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]


# --- where it goes ---


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A notebook that leaves a file when it is run."""
    return save(tmp_path / "n.ipynb", "# T", code("open('ran', 'w').close()"))


def test_a_report_never_replaces_its_notebook(counting: Path, tmp_path: Path) -> None:
    before = counting.read_bytes()
    (tmp_path / "soft.html").symlink_to(counting)
    (tmp_path / "hard.html").hardlink_to(counting)
    for force in (False, True):
        for name in ("soft.html", "hard.html"):
            with pytest.raises(SettingError, match=r"is n\.ipynb, which is read"):
                report(counting, tmp_path / name, force=force)
        with pytest.raises(SettingError, match=r"A report is an HTML file: name it n.html"):
            report(counting, counting, force=force)
        with pytest.raises(SettingError, match=r"The PDF .* is n\.ipynb, which is read"):
            report(counting, tmp_path / "n.html", pdf=counting, force=force)
        with pytest.raises(SettingError, match=r"The PDF .* is n\.html, which is read"):
            report(counting, tmp_path / "n.html", pdf=tmp_path / "n.html", force=force)
    assert counting.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hard.html", "n.ipynb", "soft.html"]


def test_a_file_of_anothers_is_kept_and_nothing_is_run(counting: Path, tmp_path: Path) -> None:
    target = tmp_path / "n.html"
    target.write_text("<html>mine</html>")
    with pytest.raises(
        SettingError, match=r"The report .*n.html' is kept: only a page is overwritten, if kcwb wrote it"
    ):
        report(counting)  # the default, in this folder
    for bad in (tmp_path, tmp_path / "n.html" / "x.html"):
        with pytest.raises(SettingError, match=r"The report .* (is a folder|is not a folder)"):
            report(counting, bad)
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.4 mine")
    with pytest.raises(SettingError, match=r"The PDF .*x.pdf' is kept"):
        report(counting, tmp_path / "x.html", pdf=True)
    with pytest.raises(SettingError, match="is kept: only a PDF"):
        write_pdf(tmp_path / "x.html")
    assert not (tmp_path / "ran").exists() and read(target) == "<html>mine</html>"
    assert "ran in" in read(report(counting, force=True, progress=False))
    assert "ran in" in read(report(counting, progress=False))  # ours now


def test_a_file_that_the_notebook_writes_is_kept_and_the_report_stands_beside_it(tmp_path: Path) -> None:
    notebook = save(tmp_path / "n.ipynb", "# T", code("open('n.html', 'w').write('mine')"))
    with pytest.warns(UserWarning, match="something else wrote"):
        page = report(notebook, tmp_path / "n.html", progress=False)
    assert read(tmp_path / "n.html") == "mine" and about(page)["title"] == "T"


def kcwb_report(words: list[str]) -> int:
    """The exit code of `kcwb report`."""
    return main(["report", *words, "--quiet"])


def test_a_series_is_not_begun_if_one_of_its_pages_cannot_be_written(
    counting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "o.ipynb", "# O")
    (tmp_path / "out").mkdir()
    for name in ("o.html", "index.html"):
        (tmp_path / "out" / name).write_text("mine")
        assert kcwb_report([str(counting), str(other), "--out", str(tmp_path / "out")]) == 2
        assert f"{name}' is kept" in capsys.readouterr().err and not (tmp_path / "ran").exists()
        (tmp_path / "out" / name).unlink()
    listed = save(tmp_path / "index.ipynb", "# I")
    assert kcwb_report([str(listed), "--out", str(tmp_path / "out")]) == 2
    assert "Two pages of the series would be index.html" in capsys.readouterr().err


def test_an_index_replaces_no_report_and_nothing_of_anothers(page: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.html"
    shutil.copy(page, copy)
    with pytest.raises(SettingError, match=r"is copy.html, which is read"):
        index([copy], copy, force=True)
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(SettingError, match=r"The index .* is kept"):
        index([copy], tmp_path / "index.html")
    index([copy], tmp_path / "index.html", force=True)
    index(iter([copy]), tmp_path / "index.html")


# --- provenance ---


def test_provenance_displays_what_results_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    made = {
        "method": "acdc",
        "model": {"name": "m", "digest": "1" * 64},
        "relation": {"name": "<r>", "digest": "2" * 64},
    }
    circuit = Circuit.from_edges(Graph(n_layers=1, n_heads=1), ["input->logits"], provenance=made)
    provenance(None, circuit | Circuit.full(circuit.graph), circuit)
    entries = shown[0][PROVENANCE]["entries"]
    assert [(e["kind"], e["name"]) for e in entries] == [
        ("model", "m"),
        ("relation", "<r>"),
        ("circuit", "union"),
        ("circuit", "<r>"),
    ]
    assert "&lt;r&gt;" in shown[0]["text/html"] and "<r>" not in shown[0]["text/html"]
    with pytest.raises(SettingError, match="not a Task or a Circuit"):
        provenance(None, 3)  # type: ignore[arg-type]


def test_provenance_of_a_model_and_a_task_holds_their_digests(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    model = tiny("llama")
    task = make_task(model, known_relation(model), n=4)
    provenance(model, task, task)
    entries = shown[0][PROVENANCE]["entries"]
    assert [(e["kind"], e["digest"]) for e in entries] == [("model", model.digest), ("relation", task.relation.digest)]
    assert entries[0]["dtype"] == "float32" and entries[1]["D_val"] == len(task.val)
    assert json.loads(json.dumps(entries)) == entries and model.digest in shown[0]["text/html"]


def test_circuits_found_in_different_ways_are_listed_apart_also_with_the_same_edges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    graph = Graph(n_layers=1, n_heads=2)
    made = {"model": {"name": "m", "digest": "1" * 64}, "relation": {"name": "r", "digest": "2" * 64}}
    one, other = (
        Circuit.from_edges(graph, ["input->logits"], provenance=made | {"method": method, "seed": seed, "seconds": 2.5})
        for method, seed in (("acdc", 0), ("eap", 1))
    )
    third = Circuit.from_edges(graph, ["input->m0", "m0->logits"], provenance=made | {"method": "acdc"})
    provenance(None, one, other, third, one, (one | third) - other)
    entries = shown[0][PROVENANCE]["entries"]
    assert [entry["kind"] for entry in entries] == ["model", "relation", *["circuit"] * 4]
    circuits = entries[2:]
    assert [circuit["method"] for circuit in circuits] == ["acdc", "eap", "acdc", "difference"]
    assert [circuit.get("seed") for circuit in circuits] == [0, 1, None, None]
    assert circuits[0]["digest"] == circuits[1]["digest"] == one.digest != circuits[2]["digest"] == third.digest
    assert circuits[3]["of"] == "union (acdc of r, acdc of r), eap of r"
    for part in (one.digest, third.digest, "method eap", "seconds 2.5", "of union (acdc of r, acdc of r), eap of r"):
        assert part in shown[0]["text/html"]
    told_again = provenances.collect(
        new_notebook(cells=[new_code_cell("", outputs=[new_output("display_data", bundle) for bundle in shown * 2])])
    )
    assert told_again == entries


def test_foreign_and_odd_provenance_is_listed_too() -> None:
    data = [{"entries": [{"kind": "model", "name": "m"}, 3]}, {"seed": 1, "of": {"a": [1, 2]}}, ["no"]]
    outputs = [new_output("display_data", {PROVENANCE: content}) for content in data]
    entries = provenances.collect(new_notebook(cells=[new_code_cell("", outputs=outputs)]))
    assert entries == [{"kind": "model", "name": "m"}, {"kind": "result", "seed": 1, "of": {"a": [1, 2]}}]


# --- a series ---


def test_index_lists_reports(folder: Path, page: Path, tmp_path: Path) -> None:
    target = index([page], tmp_path / "out" / "index.html")
    soup = BeautifulSoup(read(target), "html.parser")
    link = soup.select_one(".kc-series a")
    assert link and link.get_text() == "Which edges recall τ?"
    assert "my%20notebooks" in str(link["href"])
    text = soup.get_text(" ", strip=True)
    assert "A circuit recalls a fact" in text and "all.ipynb" in text and "kB" in text and HOSTILE[1][:50] in text
    assert fetched(read(target)) == [] and not soup.select("script")
    (tmp_path / "x.html").write_text("<html>")
    with pytest.raises(DataError, match=r"x\.html is not a report"):
        index([tmp_path / "x.html"], target)
    with pytest.raises(DataError, match=r"y\.html cannot be read"):
        index([tmp_path / "y.html"], target)


def test_a_series_goes_on_after_a_failure_and_says_so_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = save(tmp_path / "1.ipynb", "# Bad", code("raise RuntimeError('no')"))
    broken = tmp_path / "2.ipynb"
    broken.write_text("{")
    good = save(tmp_path / "3.ipynb", "# Good", code("x = 1", "parameters"), code("print('x is', x)"))
    arguments = [str(path) for path in (bad, broken, good)] + ["--out", str(tmp_path / "out"), "-p", "x", "5"]
    assert kcwb_report(arguments) == 2
    said = capsys.readouterr().err
    assert (
        "2 of 3 notebooks failed:" in said
        and "cell 2 (raise RuntimeError('no')): RuntimeError: no." in said
        and "2.ipynb is not" in said
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1.html", "3.html", "index.html"]
    assert "x is 5" in read(tmp_path / "out" / "3.html")
    listed = BeautifulSoup(read(tmp_path / "out" / "index.html"), "html.parser")
    assert [a.get_text() for a in listed.select("h2 a")] == ["Bad", "Good"] and "Incomplete." in listed.get_text()
    assert kcwb_report([str(good), "--out", str(tmp_path / "out2"), "-p", "y", "5"]) == 2
    assert "None of the notebooks has a parameter 'y'. Known: x." in capsys.readouterr().err
    assert kcwb_report([str(good), str(good), "--out", str(tmp_path / "out2")]) == 2
    assert not (tmp_path / "out2").exists()


# --- in Chromium ---


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 28)")])
def test_report_opens_from_disk_without_a_network(page: Path, chromium: Any, scheme: str, ground: str) -> None:
    requests: list[str] = []
    complaints: list[str] = []
    context = chromium.new_context(offline=True, viewport={"width": 1100, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.on("request", lambda r: requests.append(r.url))
    tab.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: complaints.append(str(e)))
    tab.goto(page.as_uri())
    frame = tab.wait_for_selector("iframe").content_frame()
    ready(frame)
    assert colours(frame) > 20
    assert asked(frame, "graph.boxes()") == ["input", "a0.h1", "a1.h0", "logits"]
    for where in (tab, frame):
        assert where.evaluate("window.hacked") is None
        assert where.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1100
    assert tab.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert tab.evaluate("document.querySelector('math[display=block]').getBoundingClientRect().height") > 25
    context.close()
    assert [url for url in requests if not url.startswith(("data:", "blob:", "about:"))] == [page.as_uri()]
    assert complaints == []


@pytest.mark.browser
def test_on_paper_no_table_is_clipped_and_none_scrolls(chromium: Any, tmp_path: Path) -> None:
    columns = "{f'the_column_{i} (n=31)': ['1.00 [0.89, 1.00]'] * 60 for i in range(12)}"
    wide = f"import pandas as pd\nwide = pd.DataFrame({columns})"
    ours = (
        "from IPython.display import HTML, display\nfrom kcwb.workbench import tables\n"
        "display(HTML(tables.styled(tables.heading('Edges'), tables.table(wide, scroll=True))))"
    )
    prose = "| a | b |\n|-|-|\n| " + "x" * 300 + " | y |"
    notebook = save(tmp_path / "wide.ipynb", "# Wide", code(f"{wide}\nwide"), code(ours), prose)
    made = report(notebook, tmp_path / "wide.html", progress=False)
    context = chromium.new_context(offline=True, viewport={"width": 673, "height": 980})  # A4 without its margins
    tab = context.new_page()
    tab.goto(made.as_uri())
    over = """() => [...document.querySelectorAll('main table, .kc-scroll')].map((one) => {
        const box = one.getBoundingClientRect(), main = document.querySelector('main').getBoundingClientRect();
        const scrolls = one.matches('.kc-scroll') && one.scrollHeight > one.clientHeight + 1;
        return [Math.round(box.right - main.right) > 0, scrolls];
    })"""
    assert any(map(any, tab.evaluate(over)))  # on a screen they scroll
    tab.emulate_media(media="print")
    found = tab.evaluate(over)
    context.close()
    assert len(found) >= 4 and not any(map(any, found))


@pytest.mark.browser
def test_pdf_is_printed_by_chromium(page: Path, tmp_path: Path) -> None:
    if not any(map(shutil.which, pdf._BROWSERS)):
        pytest.skip("Chromium is not installed")
    made = pdf.write_pdf(page, tmp_path / "all.pdf")
    pdf.write_pdf(page, made)  # what kcwb wrote it may replace
    content = made.read_bytes()
    assert content.startswith(b"%PDF") and len(content) > 50_000
    assert [p.name for p in tmp_path.iterdir()] == ["all.pdf"]


@pytest.mark.browser
def test_screenshot_of_a_report_is_not_blank_and_holds_the_labels_of_nodes(page: Path, chromium: Any) -> None:
    context = chromium.new_context(offline=True, viewport={"width": 1100, "height": 900}, color_scheme="light")
    # what is written on a canvas, and where; the frame of the graph is watched too
    context.add_init_script("""
        window.written = {};
        const write = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
            const { a, d, e, f } = this.getTransform();
            window.written[text] = [a * x + e, d * y + f];
            return write.call(this, text, x, y, ...rest);
        };
    """)
    tab = context.new_page()
    tab.goto(page.as_uri())
    element = tab.wait_for_selector("iframe")
    frame = element.content_frame()
    ready(frame)
    element.scroll_into_view_if_needed()  # Chromium draws a frame out of sight later
    before, written = None, {}
    for _ in range(50):  # until the graph has come to rest
        frame.wait_for_timeout(200)
        before, written = written, frame.evaluate("window.written")
        if written and written == before:
            break
    assert {"input", "a0.h1", "a1.h0", "logits", "L0", "L1"} <= set(written)
    picture = imread(BytesIO(element.screenshot()))[..., :3]
    corner = asked(frame, "['x', 'y'].map((key) => shadow.querySelector('canvas').getBoundingClientRect()[key])")
    inset = element.evaluate("(frame) => [frame.clientLeft, frame.clientTop]")
    for name in ("input", "a0.h1", "a1.h0", "logits"):
        x, y = (round(written[name][i] + corner[i] + inset[i]) for i in (0, 1))
        box = picture[y - 6 : y + 7, x - 14 : x + 15].reshape(-1, 3)
        light = box.mean(axis=1)
        assert light.max() - light.min() > 0.4, name  # letters on their ground
    context.close()
