"""The instrument in Chromium, run by a page without Python: what hand and keys do, and what is then drawn and said."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd
import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.models.graph import Graph
from kcwb.workbench.graph.drawing import COLOURS, Look, draw
from kcwb.workbench.graph.page import graph_view, view_of
from tests.hostile import HOSTILE
from tests.workbench.pages import TOLD, asked, faint, make_circuit, ready, spot, until

pytestmark = pytest.mark.browser

GRAPH = Graph(n_layers=3, n_heads=3)
EDGES = [
    "input->a0.h0<v>", "input->a0.h1<k>", "a0.h0->m0", "a0.h1->a1.h2<q>", "m0->a1.h2<v>", "m0->m1", "a1.h2->m1",
    "m1->logits", "a1.h2->logits",
]  # fmt: skip
SCORES = {name: 1 / (i + 1) for i, name in enumerate(EDGES)}


def page_of(show: Any, circuit: Any = None, look: Look | None = None, **state: Any) -> Any:
    drawing = draw(circuit or Circuit.from_edges(GRAPH, SCORES), look or Look(None, 20_000, "T", None))
    return ready(show(view_of(drawing, 640, state).page))


def click(page: Any, name: str, *, shift: bool = False) -> None:
    page.click("#kc-canvas", position=spot(page, name), modifiers=["Shift"] if shift else [])


def click_edge(page: Any, name: str) -> None:
    ways = "[.5, .4, .6, .3, .7, .25, .75].map((t) => graph.along(arg, t)).find(({x, y}) => graph.edgeAt(x, y) === arg)"
    page.click("#kc-canvas", position=asked(page, ways, name))


def trait(page: Any, name: str) -> Any:
    return asked(page, "graph.model.get(arg)", name)


def gone(page: Any) -> set[str]:
    page.wait_for_timeout(80)
    return {link["name"] for link in asked(page, "graph.links()") if link["gone"]}


def press(page: Any, *keys: str) -> None:
    page.focus("#kc-canvas")
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_timeout(60)


def test_selecting_by_hand(show: Any) -> None:
    page = page_of(show)
    click(page, "m0")
    assert trait(page, "selected") == ["m0"]
    click(page, "m1", shift=True)
    assert trait(page, "selected") == ["m0", "m1"]
    click(page, "m0", shift=True)
    assert trait(page, "selected") == ["m1"]
    click_edge(page, "a0.h1->a1.h2<q>")
    assert trait(page, "selected") == [] and trait(page, "selected_edges") == ["a0.h1->a1.h2<q>"]
    page.mouse.move(1, 1)
    until(page, "graph.lit()?.links.join() === 'a0.h1->a1.h2<q>'")
    assert "a0.h1->a1.h2<q>" in page.text_content("#kc-live")
    press(page, "Escape")
    assert trait(page, "selected_edges") == [] and asked(page, "graph.lit()") is None
    box = page.locator("#kc-canvas").bounding_box()
    page.keyboard.down("Shift")
    page.mouse.move(box["x"] + 42, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2, steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    assert set(trait(page, "selected")) == {"input", "a0.h0", "a0.h1", "m0", "a1.h2", "m1", "logits"}


def test_cutting_restoring_and_undoing_by_keys(show: Any) -> None:
    page = page_of(show)
    click(page, "m0")
    press(page, "x")
    at_m0 = {"a0.h0->m0", "m0->a1.h2<v>", "m0->m1"}
    assert set(trait(page, "cut")) == gone(page) == at_m0
    assert "cut 3 edges" in page.text_content("#kc-live")
    click_edge(page, "m1->logits")
    press(page, "Delete")
    assert gone(page) == at_m0 | {"m1->logits"}
    press(page, "Control+z")
    assert gone(page) == at_m0
    press(page, "Control+z", "Control+z")
    assert gone(page) == set()
    press(page, "Control+Shift+Z", "Control+y")
    assert gone(page) == at_m0 | {"m1->logits"}
    click(page, "a1.h2")
    press(page, "r")
    assert gone(page) == {"a0.h0->m0", "m0->m1", "m1->logits"}
    for _ in range(60):
        press(page, "x", "r")
    for _ in range(3):
        press(page, *["Control+z"] * 41)
    assert gone(page) == set() and trait(page, "cut") == []


def test_an_edge_is_forced_in_and_taken_out(show: Any) -> None:
    page = page_of(show)
    press(page, "f")
    assert asked(page, "shadow.activeElement.id") == "kc-search"
    for name in ("a2.h1->logits", "m0->a2.h1<q>"):  # a2.h1 is not in the circuit
        page.fill("#kc-search", name)
        page.keyboard.press("Enter")
    assert trait(page, "forced") == ["a2.h1->logits", "m0->a2.h1<q>"]
    until(page, "graph.links().some((link) => link.name === 'm0->a2.h1<q>')")
    links = {link["name"]: link for link in asked(page, "graph.links()")}
    assert links["m0->a2.h1<q>"]["forced"] and links["m0->a2.h1<q>"]["tone"] == "forced"
    assert asked(page, "graph.place('a2.h1').y < graph.place('a1.h2').y")
    for wrong in ("m0->a2.h1", "logits->m0", "m2->m1", "nobody->m1", "m0->m9<q>", "a->b"):
        page.fill("#kc-search", wrong)
        page.keyboard.press("Enter")
        assert page.get_attribute("#kc-search", "aria-invalid") == "true", wrong
    assert len(trait(page, "forced")) == 2
    page.fill("#kc-search", "m0->m1")  # it is there: it is shown
    page.keyboard.press("Enter")
    assert trait(page, "selected_edges") == ["m0->m1"] and len(trait(page, "forced")) == 2
    click(page, "a2.h1")
    press(page, "x")
    assert trait(page, "forced") == [] and trait(page, "cut") == []
    press(page, "Control+z")
    assert len(trait(page, "forced")) == 2


def test_hovering_shows_the_way_up_and_down_and_not_along_what_is_cut(show: Any) -> None:
    page = page_of(show)
    page.hover("#kc-canvas", position=spot(page, "a1.h2"))
    until(page, "graph.lit()?.boxes.length === 7")
    assert set(asked(page, "graph.lit().links")) == set(EDGES) - {"m0->m1"}
    assert page.inner_text("#kc-tip").splitlines()[0] == "a1.h2"
    page = page_of(show, cut=["a0.h1->a1.h2<q>"])
    page.hover("#kc-canvas", position=spot(page, "a1.h2"))
    until(page, "graph.lit()?.boxes.length === 6")
    assert "a0.h1" not in asked(page, "graph.lit().boxes")


def test_the_legend_filters_by_kind_port_and_role(show: Any) -> None:
    page = page_of(show, look=Look({"a0.h0": "mover"}, 20_000, None, None))
    keys = page.locator("footer [data-key]")
    assert keys.all_inner_texts() == ["other head", "MLP", "mover", "query", "key", "value", "MLP or logits"]
    for name, left in (("q", 8), ("mlp", 3), ("mover", 2)):
        page.click(f"[data-key={name}]")
        until(page, "graph.links().length === arg", left)
        assert page.get_attribute(f"[data-key={name}]", "aria-pressed") == "false"
    assert "m0" not in asked(page, "graph.boxes()") and "a0.h0" not in asked(page, "graph.boxes()")
    for name in ("q", "mlp", "mover"):
        page.click(f"[data-key={name}]")
    until(page, "graph.links().length === 9")


def test_groups_are_one_box_that_opens_and_closes(show: Any) -> None:
    page = page_of(show)
    for i, name in enumerate(("a0.h0", "a0.h1", "m0")):
        click(page, name, shift=i > 0)
    press(page, "g")
    page.fill("#kc-ask input", "early ones")
    page.keyboard.press("Enter")
    assert trait(page, "groups") == {"early ones": ["a0.h0", "a0.h1", "m0"]}
    until(page, "graph.boxes().includes('early ones · 3')")
    links = {link["name"]: link["edges"] for link in asked(page, "graph.links()")}
    assert sorted(links.values()) == [1, 1, 1, 1, 2, 2]  # a0.h0->m0 is within
    click(page, "m0")  # the group's box
    assert set(trait(page, "selected")) == {"a0.h0", "a0.h1", "m0"}
    page.dblclick("#kc-canvas", position=spot(page, "m0"))
    until(page, "graph.boxes().includes('m0')")
    page.dblclick("#kc-canvas", position=spot(page, "m0"))
    until(page, "!graph.boxes().includes('m0')")
    press(page, "g")
    assert trait(page, "groups") == {}
    page.select_option("#kc-by", "kind")
    assert trait(page, "groups") == {"heads": ["a0.h0", "a0.h1", "a1.h2"], "MLPs": ["m0", "m1"]}
    page.select_option("#kc-by", "layer")
    assert trait(page, "groups") == {"L0": ["a0.h0", "a0.h1", "m0"], "L1": ["a1.h2", "m1"]}
    page.select_option("#kc-by", "none")
    assert trait(page, "groups") == {}


def test_heads_are_grouped_by_where_they_attend_once_that_is_known(show: Any) -> None:
    page = page_of(show, selected=["m0"])
    for name in ("role", "position"):
        option = page.locator(f"#kc-by option[value={name}]")
        assert option.is_disabled() and option.inner_text() == f"{name} (find roles first)"
    columns = ["node", "role", "attention_subject", "attention_relation", "attention_bos", "attention_end"]
    rows = [
        ("a0.h0", "other", 0.2, 0.1, 0.7, 0.0),
        ("a0.h1", "other", 0.4, 0.1, 0.3, 0.2),
        ("a1.h2", "other", 0, 0, 1, 0),
    ]
    roles = pd.DataFrame(rows, columns=columns)
    page = page_of(show, look=Look(roles, 20_000, None, None), selected=["m0"])
    page.select_option("#kc-by", "position")
    assert trait(page, "groups") == {"at subject": ["a0.h0", "a0.h1"]}


def test_pins_names_and_notes(show: Any) -> None:
    page = page_of(show)
    click(page, "m0")
    press(page, "p")
    click(page, "m1")
    press(page, "p")
    assert trait(page, "pinned") == ["m0", "m1"]
    page.click("#kc-only")
    until(page, "graph.boxes().join() === 'm0,m1'")
    page.click("#kc-only")
    until(page, "graph.boxes().length === 7")
    for key, text in (("F2", "enrichment <b>"), ("n", "adds the country")):
        press(page, key)
        page.fill("#kc-ask input", text)
        page.keyboard.press("Enter")
    assert trait(page, "names") == {"m1": "enrichment <b>"} and trait(page, "notes") == {"m1": "adds the country"}
    until(page, "graph.place('m1').label === 'enrichment <b>'")
    page.mouse.move(1, 1)
    page.hover("#kc-canvas", position=spot(page, "m1"))
    page.wait_for_selector("#kc-tip:not([hidden])")
    assert page.inner_text("#kc-tip").splitlines()[:2] == ["enrichment <b>", "m1"]
    assert "adds the country" in page.inner_text("#kc-tip")
    page.fill("#kc-search", "enrich")
    page.keyboard.press("Enter")
    assert trait(page, "selected") == ["m1"]
    press(page, "F2")
    page.fill("#kc-ask input", "")
    page.keyboard.press("Enter")
    assert trait(page, "names") == {}


def test_tab_walks_through_all_nodes_and_leaves(show: Any) -> None:
    page = page_of(show)
    page.focus("#kc-canvas")
    walked = []
    for _ in range(7):
        page.keyboard.press("Tab")
        active = page.get_attribute("#kc-canvas", "aria-activedescendant")
        walked.append(page.text_content(f"#{active}").split(";")[0])
    assert walked[0] == "input" and walked[-1] == "logits" and len(set(walked)) == 7
    page.keyboard.press("Enter")
    assert trait(page, "selected") == ["logits"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Enter")
    assert len(trait(page, "selected")) == 2
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # past the last one: the focus goes on
    assert asked(page, "shadow.activeElement?.id") != "kc-canvas"
    assert page.get_attribute("#kc-canvas", "role") == "application"
    words = {item.split(";")[0]: item for item in page.locator("#kc-mirror li").all_text_contents()}
    assert words["a1.h2"] == "a1.h2; head, layer 1; reads m0, a0.h1; read by logits, m1"


def test_escape_and_then_tab_leaves_a_circuit_of_many_nodes(show: Any) -> None:
    page = page_of(show)
    press(page, "Tab", "Tab", "Escape", "Tab")
    assert asked(page, "shadow.activeElement?.id") != "kc-canvas"
    press(page, "Escape", "x", "Tab")  # any other key, and Tab walks again
    assert page.get_attribute("#kc-canvas", "aria-activedescendant")


def test_a_button_that_is_pressed_by_key_keeps_the_focus_or_gives_it_to_the_picture(show: Any) -> None:
    page = page_of(show, answers={"facts": [FACT, FACT]}, paths=[["input", "a0.h0", "logits"], ["input", "logits"]])
    click(page, "m0")
    for name, then in (
        ("kc-pin", "kc-pin"), ("kc-only", "kc-only"), ("kc-only", "kc-only"), ("kc-fact-1", "kc-fact-1"),
        ("kc-path-1", "kc-path-1"), ("kc-fold", "kc-fold"), ("kc-cut", "kc-canvas"),
    ):  # fmt: skip
        page.focus(f"#{name}")
        page.keyboard.press("Enter")
        page.wait_for_timeout(60)
        assert asked(page, "shadow.activeElement?.id") == then, name


def test_two_fingers_zoom_where_they_are_and_one_moves(show: Any) -> None:
    page = ready(show(graph_view(Circuit.from_edges(GRAPH, SCORES)).page, has_touch=True))
    fingers, box = page.context.new_cdp_session(page), page.locator("#kc-canvas").bounding_box()
    x, y = box["x"] + 400, box["y"] + 200

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": px, "y": py, "id": i} for i, (px, py) in enumerate(places)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before, m0 = asked(page, "graph.view()"), spot(page, "m0")
    touch("touchStart", (x - 40, y))
    touch("touchStart", (x - 40, y), (x + 40, y))
    for away in (48, 56, 64):
        touch("touchMove", (x - away, y), (x + away, y))
    touch("touchEnd")
    page.wait_for_timeout(200)
    after, now = asked(page, "graph.view()"), spot(page, "m0")
    assert after["scale"] == pytest.approx(1.6 * before["scale"]) and trait(page, "selected") == []
    for side, fixed in (("x", x - box["x"]), ("y", y - box["y"])):
        assert now[side] - fixed == pytest.approx(1.6 * (m0[side] - fixed), abs=2)
    touch("touchStart", (x, y))
    for by in (10, 20, 30):
        touch("touchMove", (x + by, y))
    touch("touchEnd")
    page.wait_for_timeout(100)
    assert asked(page, "graph.view().left") == pytest.approx(after["left"] + 30, abs=2)
    press(page, "0")
    page.touchscreen.tap(box["x"] + spot(page, "m0")["x"], box["y"] + spot(page, "m0")["y"])
    assert trait(page, "selected") == ["m0"]


def test_zoom_and_keys_are_told(show: Any) -> None:
    page = page_of(show)
    before = asked(page, "graph.view()")
    press(page, "+")
    assert asked(page, "graph.view().scale") == pytest.approx(1.35 * before["scale"])
    press(page, "ArrowLeft")
    press(page, "0")
    assert asked(page, "[graph.view().scale, graph.view().left]") == pytest.approx([before["scale"], before["left"]])
    box = page.locator("#kc-canvas").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 350, box["y"] + 50, steps=4)
    page.mouse.up()
    assert asked(page, "graph.view().left") == pytest.approx(before["left"] + 50, abs=1)
    press(page, "?")
    assert page.is_visible("#kc-help") and "Ctrl+Z" in page.inner_text("#kc-help")
    press(page, "Escape")
    assert not page.is_visible("#kc-help")


FACT = {
    "prompt": "The capital of <b>France</b> is", "answer": "Paris",
    "before": {"p": 0.8, "rank": 1, "top": [["Paris", 0.8], ["\n", 0.1]]},
    "after": {"p": 0.2, "rank": 7, "top": [["Lyon", 0.3]]},
}  # fmt: skip


def test_answers_are_bars_beside_the_graph(show: Any) -> None:
    page = page_of(show, answers={"facts": [FACT, FACT], "loss_before": 0.25, "loss_after": 1.5})
    assert page.inner_text("#kc-aside .loss") == "Loss, nats: before 0.25 · after 1.5"
    assert "The capital of <b>France</b> is Paris" in page.inner_text("#kc-answers")
    widths = asked(page, "[...shadow.querySelectorAll('.bar i')].slice(0, 2).map((one) => one.offsetWidth)")
    assert widths[0] == pytest.approx(4 * widths[1], abs=4)
    page.click("#kc-answers .fact button >> nth=0")
    assert page.locator("#kc-answers .tops").all_inner_texts() == [
        'before: "Paris" 0.8, "\\n" 0.1',
        'after: "Lyon" 0.3',
    ]
    asked(page, "(graph.model.set('busy', true), 0)")
    assert page.get_attribute("#kc-aside", "aria-busy") == "true"
    page.click("#kc-fold")
    assert not page.is_visible("#kc-answers")
    page.click("#kc-fold")
    assert page.is_visible("#kc-answers")


OWN = {
    "prompt": "The capital of <b>Peru</b> is", "subject": "<b>Peru</b>", "answer": "Lima", "delivers": "A cut edge <i>",
    "before": FACT["before"], "after": FACT["after"], "model": {"p": 0.9, "rank": 1, "top": [[" Lima", 0.9]]},
}  # fmt: skip


def test_a_prompt_of_ones_own_is_typed_and_answered_beside_the_graph(show: Any) -> None:
    page = page_of(show)
    assert not page.is_visible("#kc-asks")  # nobody answers
    asked(page, "(graph.model.set('asks', true), graph.model.set('live', true), graph.model.set('busy', false), 0)")
    asked(page, "(graph.model.set('cut', ['m0->m1']), 0)")
    until(page, "!shadow.querySelector('#kc-asks').hidden")
    press(page, "a")
    assert asked(page, "shadow.activeElement.id") == "kc-own-prompt"
    page.keyboard.type(" The capital of Peru is ")
    page.keyboard.press("Tab")
    page.keyboard.type("Peru")
    asked(page, "(graph.model.set('answers', {facts: []}), 0)")  # what comes meanwhile takes nothing away
    page.keyboard.type("!")
    assert asked(page, "[shadow.activeElement.id, shadow.activeElement.value]") == ["kc-own-subject", "Peru!"]
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    assert trait(page, "question") == {"prompt": "The capital of Peru is", "subject": "Peru"}
    assert trait(page, "cut") == ["m0->m1"] and trait(page, "selected") == []  # letters were no keys
    asked(page, "(graph.model.set('answers', {own: arg}), 0)", {"prompt": "x", "problem": "a <b>problem</b>"})
    assert page.locator("#kc-own [role=alert]").inner_text() == "a <b>problem</b>"
    asked(page, "(graph.model.set('answers', {own: arg}), 0)", OWN)
    assert page.locator("#kc-own .said").all_inner_texts() == [
        'before\n0.8 · #1\n\n"Paris" 0.8, "\\n" 0.1', 'after\n0.2 · #7\n\n"Lyon" 0.3',
        'full model\n0.9 · #1\n\n" Lima" 0.9'
    ]  # fmt: skip
    assert page.locator("#kc-own-delivers").inner_text() == "A cut edge <i>"
    page.keyboard.press("Escape")
    assert asked(page, "shadow.activeElement.id") == "kc-canvas"
    page.click("#kc-own button:has-text('Clear')")
    assert trait(page, "question") == {}


def test_without_a_kernel_what_was_asked_is_told_and_nothing_can_be(show: Any) -> None:
    page = page_of(show, answers={"own": OWN})
    assert page.locator("#kc-own .prompt").inner_text() == "The capital of <b>Peru</b> is"
    assert (
        page.locator("#kc-own .said").count() == 3 and page.locator("#kc-own :is(input, textarea, button)").count() == 0
    )


READ = {
    "prompt": "The capital of France is", "answer": "Paris", "tokens": ["The", " capital", " <b>France</b>", "\n"],
    "attention": [0.1, 0.0, 0.8, 0.1], "at": 2, "query": [["m0", 0.5], ["a0.h0", -0.25], ["cut edges", 0.1]],
    "key": [["input", 1.0]], "writes": [[" Paris", 2.0], ["<i>", 0.5]],
}  # fmt: skip
READING = {
    "node": "a1.h2",
    "runs": [
        {"run": "the full model", "prompts": [READ | {"prompt": "mean over 2 prompts", "answer": ""}, READ]},
        {"run": "the circuit alone", "prompts": [READ | {"query": []}]},
    ],
}


def test_what_is_read_of_a_head_stands_beside_the_graph_and_leads_on(show: Any) -> None:
    page = page_of(show, reading=READING, selected=["a1.h2"], answers={"facts": [FACT]})
    assert page.locator("#kc-aside h3").all_inner_texts() == ["a1.h2", "Answers"]
    tokens = page.locator("#kc-reading .token")
    assert tokens.all_inner_texts() == ["The\n.10", "capital\n\xa0", "<b>France</b>\n.80", "\u2423\n.10"]
    assert page.locator("#kc-reading .token.at").inner_text().startswith("<b>France</b>")
    assert page.locator("#kc-reading h4").all_inner_texts() == [
        "Attention from END", "What makes the query, at END", "What makes the key, at the <b>France</b>",
        "What it writes, in logits",
    ]  # fmt: skip
    page.focus("#kc-prompt")
    page.keyboard.press("ArrowDown")
    assert page.locator("#kc-reading h4").nth(2).inner_text() == "What makes the key, at \u201c<b>France</b>\u201d"
    assert asked(page, "shadow.activeElement.id") == "kc-prompt"
    bars = page.locator("#kc-reading ul.bars >> nth=0")
    assert bars.locator("li").all_inner_texts() == ["m0\n0.5", "a0.h0\n\u22120.25", "cut edges\n0.1"]
    widths = bars.locator("i").evaluate_all("(all) => all.map((one) => one.offsetWidth)")
    assert widths[0] == pytest.approx(2 * widths[1], abs=2) and bars.locator("i.against").count() == 1
    page.select_option("#kc-run", index=1)
    assert page.locator("#kc-reading h4").count() == 3
    page.select_option("#kc-run", index=0)
    assert bars.locator("button").all_inner_texts() == ["m0", "a0.h0"]
    bars.locator("button").first.click()
    assert trait(page, "selected") == ["m0"]
    assert page.locator("#kc-aside h3").all_inner_texts() == ["Answers"]  # nothing is read of m0 here
    press(page, "Escape")
    assert page.locator("#kc-reading").count() == 1  # without a kernel, the last one stays


def test_numbers_have_their_whole_part(show: Any) -> None:
    writes = [[str(i), value] for i, value in enumerate((146.4, -99.6, 12.34, 0.0456))]
    page = page_of(show, reading={"node": "m0", "runs": [{"run": "the full model", "prompts": [
        {"prompt": "x", "answer": "y", "writes": writes}]}]}, selected=["m0"])  # fmt: skip
    told = ["146", "\u2212100", "12", "0.046"]
    assert page.locator("#kc-reading ul.bars b").all_inner_texts() == told


def test_all_heads_of_a_layer_are_small_pictures_of_which_one_is_large(show: Any) -> None:
    tokens = ["The", " <b>capital</b>", "\n"]
    heads = [[1000, 250, 750, 100, 200, 700], [1000, 1000, 0, 1000, 0, 0], [1000, 0, 1000, 0, 0, 1000]]
    one = READ | {"layer": {"number": 1, "tokens": tokens, "heads": heads}}
    reading = {"node": "a1.h2", "runs": [{"run": "the full model", "prompts": [READ, one]}]}
    for scheme in ("light", "dark"):
        page = ready(show(view_of(draw(Circuit.from_edges(GRAPH, SCORES), Look(None, 20_000, "T", None)), 640, {
            "reading": reading, "selected": ["a1.h2"]}).page, color_scheme=scheme))  # fmt: skip
        thumbs = page.locator("#kc-heads button")
        assert thumbs.all_inner_texts() == ["h0", "h1", "h2"]
        assert [thumbs.nth(i).get_attribute("aria-label") for i in range(3)] == [
            "a1.h0, not in the circuit", "a1.h1, not in the circuit", "a1.h2, in the circuit",
        ]  # fmt: skip
        assert page.locator("#kc-heads [aria-pressed=true]").inner_text() == "h2"
        assert page.get_attribute("#kc-large", "aria-label") == "Attention of a1.h2"
        page.focus("#kc-head-0")
        page.keyboard.press("Enter")
        assert trait(page, "selected") == ["a1.h0"]
        assert page.get_attribute("#kc-large", "aria-label") == "Attention of a1.h0"
        assert page.locator("#kc-reading h4").all_inner_texts() == [
            "All heads of layer 1"
        ]  # of a1.h0 nothing else is read
        chips = page.locator("#kc-large .token")
        assert chips.all_inner_texts() == ["The\n.10", "<b>capital</b>\n.20", "\u2423\n.70"]  # from the last token
        assert asked(page, "shadow.activeElement.id") == "kc-head-0"
        for _ in range(10):
            page.keyboard.press("Tab")
            if asked(page, "shadow.activeElement.id") == "kc-pattern":
                break
        for key, told in (
            ("ArrowUp", "\u201c<b>capital</b>\u201d looks at \u201c\u2423\u201d: 0.00"),
            ("ArrowLeft", "\u201c<b>capital</b>\u201d looks at \u201c<b>capital</b>\u201d: 0.75"),
            ("ArrowLeft", "\u201c<b>capital</b>\u201d looks at \u201cThe\u201d: 0.25"),
        ):
            before = asked(page, "graph.view().left")
            page.keyboard.press(key)
            assert page.inner_text("#kc-pattern-told") == told
            assert asked(page, "graph.view().left") == before  # the graph does not move
        assert chips.all_inner_texts()[:2] == ["The\n.25", "<b>capital</b>\n.75"]
        box = page.locator("#kc-pattern").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 6, box["y"] + 5 * box["height"] / 6)
        assert page.inner_text("#kc-pattern-told") == "\u201c\u2423\u201d looks at \u201cThe\u201d: 0.10"
        page.mouse.move(1, 1)
        assert page.inner_text("#kc-pattern-told") == "\u201c\u2423\u201d looks at the tokens below"
        drawn = "shadow.querySelectorAll('#kc-heads canvas')[1].getContext('2d').getImageData(0, 22, 63, 1).data"
        pixels = asked(page, f"[...{drawn}]")  # of a1.h1's second row: that token looks at the first alone
        assert pixels[4 * 5 + 3] == 255 and pixels[4 * 31 + 3] == pixels[4 * 55 + 3] == 0
        click(page, "m1")
        assert page.locator("#kc-large").count() == 0 and thumbs.count() == 3  # its layer's heads
        click(page, "m0")
        assert page.locator("#kc-heads").count() == 0


def test_answers_stand_below_the_graph_where_it_is_narrow(show: Any) -> None:
    page = page_of(show, answers={"facts": [FACT, FACT]})
    for width, below in ((980, False), (500, True), (980, False)):
        page.set_viewport_size({"width": width, "height": 640})
        page.wait_for_timeout(200)
        canvas, aside = (page.locator(one).bounding_box() for one in ("#kc-canvas", "#kc-aside"))
        assert (aside["y"] >= canvas["y"] + canvas["height"] - 1) == below
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        header = page.locator("#kc-keys").bounding_box()
        assert header["x"] + header["width"] <= width and canvas["height"] > 150


ACTS = """(() => {
    const place = (one) => one.getBoundingClientRect(), canvas = place(shadow.querySelector('#kc-canvas'));
    return [...shadow.querySelectorAll('#kc-acts > *')].map(place).map(({ left, top, right, bottom }) => (
        [left - canvas.left, top - canvas.top, right - canvas.left, bottom - canvas.top, canvas.width]));
})()"""


@pytest.mark.parametrize(
    ("width", "rows"), [(1400, 1), (900, 1), (640, 2), (600, 1), (300, 3)]
)  # below 640 answers stand below
def test_buttons_over_the_picture_hide_no_node_and_each_other_not(show: Any, width: int, rows: int) -> None:
    circuit = make_circuit(200)
    heads = circuit.nodes[circuit.nodes["kind"] == "head"].set_index("node")
    most = (heads["in_edges"] + heads["out_edges"]).idxmax()
    edge = next(edge for edge in circuit.edges.itertuples() if edge.sender == most)
    state = {"selected": [most], "pinned": [most], "cut": [f"{edge.sender}->{edge.receiver}"]}
    page = page_of(show, circuit, answers={"facts": [FACT]}, **state)
    page.set_viewport_size({"width": width, "height": 640})
    asked(page, "(graph.model.set('live', true), graph.model.set('notes', {}), 0)")
    page.wait_for_timeout(200)
    boxes = asked(page, ACTS)
    assert len(boxes) == 9 and len({round(top + bottom) // 8 for _, top, _, bottom, _ in boxes}) == rows
    assert all(left >= 0 and right <= across for left, _, right, _, across in boxes)
    ends = "[...shadow.querySelectorAll('header *')].map((one) => one.getBoundingClientRect().right)"
    assert max(asked(page, ends)) <= width
    nodes = asked(page, "graph.boxes().map((name) => graph.place(name)).map(({ y, height }) => y - height / 2)")
    assert min(nodes) >= max(bottom for *_, bottom, _ in boxes)
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(show: Any, scheme: str) -> None:
    tokens = READ["tokens"]
    layer = {"number": 1, "tokens": tokens, "heads": [[1000, 0, 1000, 0, 0, 1000, 0, 0, 0, 1000]] * 3}
    one = READ | {"layer": layer, "attention": [0.0, 0.1, 0.4, 0.9]}
    state = {"reading": {"node": "a1.h2", "runs": [{"run": "the full model", "prompts": [one]}]}, "selected": ["a1.h2"]}
    state |= {"answers": {"facts": [FACT], "own": OWN}, "paths": [["input", "logits"]], "problem": "x"}
    drawing = draw(Circuit.from_edges(GRAPH, SCORES), Look({"a0.h0": "mover"}, 20_000, "T", None))
    page = ready(show(view_of(drawing, 640, state).page, color_scheme=scheme))
    page.click("[data-key=q]")
    page.hover("#kc-large .token >> nth=1")  # what comes later than it is shown to be out of sight
    page.mouse.move(1, 1)
    assert faint(page) == []
    page.click("#kc-keys")
    assert faint(page) == []


def test_paths_are_lit_in_order_and_stepped_through(show: Any) -> None:
    first, second = ["input", "a0.h0", "m0", "m1", "logits"], ["input", "a0.h1", "a1.h2", "logits"]
    page = page_of(show, paths=[first, second])
    assert asked(page, "graph.lit().boxes") == first
    assert set(asked(page, "graph.lit().links")) == {"input->a0.h0<v>", "a0.h0->m0", "m0->m1", "m1->logits"}
    press(page, "]")
    assert asked(page, "graph.lit().boxes") == second
    assert "path 2 of 2: input to a0.h1" in page.text_content("#kc-live")
    page.click(".paths button >> nth=0")
    assert asked(page, "graph.lit().boxes") == first
    press(page, "Escape")
    page.mouse.move(1, 1)
    assert trait(page, "paths") == [] and asked(page, "graph.lit()") is None


@pytest.mark.parametrize(
    "back", ["Promise.resolve()", "new Promise(requestAnimationFrame)", "new Promise((r) => setTimeout(r, 200))"]
)
def test_the_picture_stays_where_the_theme_changes_while_it_is_out_of_sight(show: Any, back: str) -> None:
    page = page_of(show)
    copy = "new OffscreenCanvas(9, 9).getContext('2d', { willReadFrequently: true })"
    painted = f"""(() => {{
        const copy = {copy}, {{ canvas }} = graph.painter;
        copy.drawImage(canvas, 0, 0);
        return [canvas.width, [...copy.getImageData(5, 5, 1, 1).data].slice(0, 3)];
    }})()"""
    width, _ = asked(page, painted)
    asked(
        page,
        f"""(async () => {{
        shadow.host.style.display = 'none';
        document.body.dataset.jpThemeLight = 'false';
        await {back};
        shadow.host.style.display = '';
    }})()""",
    )
    page.wait_for_timeout(400)
    background = [int(COLOURS["dark"]["bg"][i : i + 2], 16) for i in (1, 3, 5)]
    assert asked(page, painted) == [width, background]
    assert asked(page, "graph.place('m0').width") > 20


def test_more_than_two_thousand_edges_are_drawn_between_layers(show: Any) -> None:
    circuit = make_circuit(2500, n_layers=12, n_heads=12)
    page = page_of(show, circuit)
    boxes = asked(page, "graph.boxes()")
    assert len(boxes) == 14 and any(label.startswith("L3 · ") for label in boxes)
    assert asked(page, "graph.links().reduce((sum, link) => sum + link.edges, 0)") > 2000
    page.dblclick("#kc-canvas", position=spot(page, "a3.h1"))
    until(page, "graph.boxes().includes('a3.h1')")
    page.click("#kc-layers")
    until(page, "graph.links().length === 2500")


def test_what_the_model_holds_wrongly_is_told_and_never_a_blank_picture(show: Any) -> None:
    page = page_of(show, groups={"none": ["nobody"]}, names={"m0": "x"}, pinned=["nobody"], forced=["x", "a->b->c"])
    assert asked(page, "graph.boxes().length") == 7
    wrong = {"cut": "x", "groups": [], "threshold": "x", "paths": [["nobody"]], "answers": {"facts": [None, 3]}}
    wrong["reading"] = {"node": "m0", "runs": [None, {"prompts": [{}]}]}
    for name, value in wrong.items():
        asked(page, "(graph.model.set(...arg), 0)", [name, value])
        page.wait_for_timeout(60)
        assert asked(page, "graph.boxes().length") == 7, name
    asked(page, "(graph.model.set('problem', 'a <b>problem</b>'), 0)")
    assert "a <b>problem</b>" in page.inner_text("#kc-problem")
    page.click("#kc-problem button")
    assert not page.is_visible("#kc-problem") and trait(page, "problem") == ""


def test_hostile_names_notes_groups_and_answers_are_text(show: Any) -> None:
    texts = dict(zip(GRAPH.node_names, TOLD[:5], strict=False))
    for start in range(0, len(TOLD), 9):
        some = TOLD[start : start + 9]
        texts = dict(zip(["input", "a0.h0", "a0.h1", "m0", "a1.h2", "m1", "logits"], some, strict=False))
        fact = FACT | {"prompt": some[0], "answer": some[1], "after": {"p": 0.2, "rank": 7, "top": [[some[2], 0.3]]}}
        pairs = [[text, 1.0] for text in some]
        read = {"prompt": some[0], "answer": some[1], "tokens": some, "attention": [0.1] * len(some), "at": 0}
        read |= {"query": pairs, "key": pairs, "writes": pairs}
        state = {"groups": {some[0]: ["a0.h0", "a0.h1"]}, "problem": some[1], "answers": {"facts": [fact]}}
        state["reading"] = {"node": "a1.h2", "runs": [{"run": some[0], "prompts": [read, read]}] * 2}
        page = page_of(show, names=texts, notes=texts, **state)
        assert page.locator("#kc-reading .token").count() == len(some)
        page.click("#kc-answers .fact button")
        page.hover("#kc-canvas", position=spot(page, "m0"))
        assert page.evaluate("window.hacked") is None
        assert (
            asked(page, "shadow.querySelectorAll('img, a, h1, link, iframe, script, style').length") == 1
        )  # our style
    assert len(HOSTILE) > len(TOLD)


def test_two_thousand_edges_stay_on_screen_while_they_are_moved(show: Any) -> None:
    page = ready(show(graph_view(make_circuit(2000)).page))
    box = page.locator("#kc-canvas").bounding_box()
    before = asked(page, "graph.view()")
    page.mouse.move(box["x"] + 400, box["y"] + 200)
    page.mouse.down()
    for i in range(20):
        page.mouse.move(box["x"] + 400 + 5 * i, box["y"] + 200 + math.sin(i))
    page.mouse.up()
    after = asked(page, "graph.view()")
    assert after["frames"] > before["frames"] + 5 and after["left"] == pytest.approx(before["left"] + 95, abs=1)
