"""The line that says that the kernel does not hear: when it comes, and when it goes."""

from __future__ import annotations

from typing import Any

import pytest

from kcwb.workbench.panels.echo import Echo


def test_what_the_page_asks_is_answered_and_nonsense_is_not(monkeypatch: Any) -> None:
    echo, sent = Echo(), []
    monkeypatch.setattr(echo, "send", sent.append)
    for content in ({"asked": "7"}, {"asked": 7}, {}, None, "asked", {"asked": "x" * 10**6}):
        echo._handle_custom_msg(content, [])
    assert sent == [{"heard": "7"}, {"heard": "x" * 100}]


@pytest.mark.browser
def test_it_is_said_while_nothing_comes_back_and_no_longer(show: Any) -> None:
    script = str(Echo._esm).replace("export default { render };", "")
    page = show(
        "<!doctype html><meta charset=utf-8><body><button id=out>x</button>"
        "<div class=kcwb-panel><button id=in>x</button><div id=a></div>"
        "<div class=kcwb-panel><div id=b></div></div></div>"
        f"<script>{script}"
        "window.sent = []; window.heard = []; window.deaf = true;"
        "const model = { send(one) { sent.push(one.asked); if (!deaf) answer(); },"
        " on: (_, work) => heard.push(work), off() {} };"
        "window.answer = () => { for (const one of sent) for (const work of heard) work({ heard: one }); };"
        "window.ends = ['a', 'b'].map((id) => render({ model, el: document.getElementById(id) }));</script>"
    )
    outer, inner = page.locator("#a [role=status]"), page.locator("#b [role=status]")
    assert not outer.is_visible() and page.evaluate("sent.length") == 2  # it asks when it appears
    outer.wait_for(timeout=3000)
    assert "busy with cells" in outer.inner_text() and not inner.is_visible()
    page.click("#in")
    assert page.evaluate("sent.length") == 2  # nothing new while that is not heard
    page.evaluate("answer()")
    assert not outer.is_visible()
    page.click("#out")
    assert page.evaluate("sent.length") == 2  # not its panel
    page.evaluate("deaf = false")
    page.click("#in")
    page.wait_for_timeout(1500)
    assert page.evaluate("sent.length") == 3 and not outer.is_visible()
    page.evaluate("for (const end of ends) end(); deaf = true;")
    page.click("#in")
    assert page.evaluate("sent.length") == 3
