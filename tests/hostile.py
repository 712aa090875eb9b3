"""Text that would run, break or hide something if a view took it for more than text."""

from __future__ import annotations

HOSTILE = [
    # HTML
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "</script></style></title></textarea></iframe><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "'><svg onload='window.hacked = 1'><animate onbegin='window.hacked = 1'>",
    "<a href='javascript:window.hacked=1'>href</a>",
    "<iframe srcdoc=\"<script>parent.hacked = 1</script>\"></iframe>",
    '<link rel="stylesheet" href="https://example.org/x.css">',
    '<img src="https://example.org/x.png"><img srcset="//example.org/y.png">',
    "<style>@import url(https://example.org/z.css); * { display: none }</style>",
    '<meta http-equiv="refresh" content="0; url=https://example.org/">',
    '<base href="https://example.org/"><form><input autofocus onfocus="window.hacked = 1"></form>',
    "</head></body><body onload='window.hacked = 1'><center><h1>x</h1></center>",
    "<!-- <link --> <!-- graph --> ]]> <![CDATA[ __VIEW__ __COLOURS__",
    "&lt;script&gt;window.hacked = 1&lt;/script&gt; &amp; &#x3c;b&#x3e; &nbsp",
    "<s>", "</s>", "<|endoftext|>", "<0x0A>",
    # scripts, templates, formulas, markup
    "\\\"); window.hacked = 1; (\"", "' \" ` ${window.hacked = 1} \\u003cscript\\u003e",
    "{{7*7}} {{ config }} {% raw %} {# x #} {0} %s %(x)s",
    "$\\href{javascript:window.hacked=1}{x}$", "$\\frac{1}{$ $$ \\(x\\) \\[y\\] \\begin{align}", "$x$ costs $5, \\$6",
    "[x](javascript:window.hacked=1) ![y](https://example.org/x.png) **b** `c` # d | e |", "_x_ ~~y~~ \n\n---\n\n> z",
    '=HYPERLINK("https://example.org/";"x")', "@SUM(1+9)*cmd|' /C calc'!A0",
    # what is seen otherwise than it is, or not at all
    "\u202egnirts tfel ot thgir\u2066 \u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0633\u0644\u0627\u0645",
    "zero\u200bwidth\u200d\ufeff\u00ad\u2060", "👩\u200d🔬🇫🇷🦜 \U0001d518\U0001d52b e\u0301", "Ä\u0308\u0323" * 40,
    "line\nbreak\ttab\x00null\x1b[31mred\x07\u2028separator\r\nend", "\x01\x02\x7f\x85\x9f", "東京 北京市 ประเทศไทย",
    # names that mean something elsewhere
    "__proto__", "constructor", "../../etc/passwd", "C:\\con\\nul", "x\\", "%00%2e%2e/", " ", "   spaces   ",
    "x" * 10_000,
]  # fmt: skip

SURROGATE = "\ud800 half a character"
"""Apart, for pandas refuses it as a name and files cannot hold it."""
