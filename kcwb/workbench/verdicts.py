"""A judgement in words, tables and pictures: functions from it to HTML, every text escaped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd

from kcwb.circuits.provenance import found_with, part
from kcwb.evaluation.referee.judgement import NO, NOT_SHOWN, YES, Judgement
from kcwb.workbench import plots, tables
from kcwb.workbench.plots import Plot, picture
from kcwb.workbench.tables import decimal, interval, shorten, text

ENOUGH = 50  # facts; below, a page says what could not have been seen
_MARKS = {YES: "kc-yes", NO: "kc-no"}
_LONG = 2000  # letters of a sentence
_PER_CENT = "in 80% of cases"
_METHODS = {
    "equivalence": (
        "on how many facts the circuit does better than the model, by a binomial test against shares farther than "
        "ε = .1 from one half",
        "2410.13032",
    ),
    "independence": (
        "whether what is left of the model without the circuit knows how the model does on a fact, by HSIC with a "
        "Gaussian kernel and permutations",
        "2410.13032",
    ),
    "minimality": (
        "whether cutting an edge does more than cutting an edge of a random path that was let in does nine times in "
        "ten, by a binomial test for each edge",
        "2410.13032",
    ),
    "sufficiency": ("how many random circuits of its size the circuit beats", "2410.13032"),
    "partial necessity": (
        "whether the model without the circuit does worse than without a random circuit of its size",
        "2410.13032",
    ),
    "ablations": (
        "circuits found under zero, mean and resample ablation, each tested under all three, by edges and by nodes",
        "2407.08734",
    ),
    "faithfulness": (
        "(loss of the empty circuit - loss of this one) / (loss of the empty circuit - loss of the model)",
        "2504.13151",
    ),
}


class Section(NamedTuple):
    """A part of a page: its heading, a sentence, and HTML."""

    heading: str
    words: str
    body: str


def title(judgement: Judgement) -> str:
    """Which circuit of which model on what, in a line."""
    said = judgement.provenance
    edges = part(said, "circuit").get("edges")
    size = f"{edges:,} edges" if isinstance(edges, int) else "A circuit"
    model, relation = (shorten(str(part(said, key).get("name") or f"a {key}"), 80) for key in ("model", "relation"))
    return f"{size} of {model} for {relation}"


def byline(judgement: Judgement) -> list[str]:
    """On what and how, in a few words each."""
    said, circuit = judgement.provenance, part(judgement.provenance, "circuit")
    facts = said.get("n")
    told = [f"“{shorten(str(said['template']), 160)}”"] if "template" in said else []
    told += [f"{facts:,} facts"] if isinstance(facts, int) else []
    if found := found_with(circuit, "method", "metric"):
        told.append(f"found by {', '.join(found)}")
    told += [f"{said['ablation']} ablation"] if "ablation" in said else []
    metrics = list(dict.fromkeys(map(str, judgement.questions["metric"])))
    told += [f"judged by {', '.join(metrics)}"] if metrics else []
    return [*told, "a quick look"] if said.get("quick") is True else told


def headline(judgement: Judgement) -> str:
    """The verdicts in one line."""
    parts = []
    for verdict, words in ((YES, "shown"), (NO, "wrong"), (NOT_SHOWN, "not shown either way")):
        names = [str(name) for name, one in judgement.answers.items() if one == verdict]
        parts += [f"{words}: {', '.join(names)}"] if names else []
    line = "; ".join(parts) or "no question was asked"
    return f"{line[0].upper()}{line[1:]}."


def few_facts(judgement: Judgement) -> str:
    """If there are fewer facts than are asked for: what could not have been seen; else empty."""
    table = judgement.questions
    some = table[table["of"] == "facts"]
    facts = some["n"].max()
    if not facts < ENOUGH:
        return ""
    least = some.groupby("question", sort=False)["least"].max().dropna()
    could = "; ".join(f"{question} by {decimal(value)}" for question, value in least.items())
    return f"Only {facts:,.0f} facts, where {ENOUGH} are asked for" + (
        f". So few find a claim wrong {_PER_CENT} only if it is wrong by this much: {could}. What is less may be there."
        if could
        else ": small effects cannot be seen."
    )


def verdict(value: str) -> str:
    """A verdict as a word with a mark, told by colour and shape."""
    return f'<span class="kc-verdict {_MARKS.get(value, "kc-open")}">{text(value)}</span>'


def verdict_table(judgement: Judgement) -> str:
    """A row per question: what is claimed, the verdict, the numbers of each metric, and the sentence that decides."""
    answers, rows = judgement.answers, []
    for question, some in judgement.questions.groupby("question", sort=False):
        answer = str(answers[question])
        deciding = some[some["verdict"] == answer].iloc[0]
        several = len(some) > 1
        shown = [f"{row.metric} {row.verdict}: " if several else "" for row in some.itertuples()]
        numbers: list[list[str]] = [
            [f"{name}{fitting(*ends)}" for name, ends in zip(shown, _ends(some), strict=True)],
            [_p(value) for value in some["holm"]],
            [decimal(value) for value in some["power"]],
        ]
        cells = [f"<strong>{text(question)}</strong>{tables.muted(str(deciding['claim']))}", verdict(answer)]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        row += "".join(
            f'<td class="kc-number">{"".join(f"<div>{text(line)}</div>" for line in lines)}</td>' for lines in numbers
        )
        rows.append(f'<tr>{row}<td dir="auto">{text(deciding["sentence"], _LONG)}</td></tr>')
    names = ("question", "verdict", "effect [95%]", "p (Holm)", "power", "what was found")
    classes = ("", "", *[' class="kc-number"'] * 3, "")
    head = "".join(f"<th{mark}>{name}</th>" for name, mark in zip(names, classes, strict=True))
    return (
        f'<table class="kc-table kc-verdicts"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        if rows
        else tables.muted("No question was asked.")
    )


def pictures(judgement: Judgement) -> list[Section]:
    """What can be drawn of it, each with the sentence that says what is to be seen."""
    drawn: list[tuple[str, pd.DataFrame, Callable[[Judgement], Plot], str]] = [
        ("Found under one ablation, tested under another", judgement.matrix, plots.plot_matrix,
         plots.matrix_sentence(judgement)),
        ("Its edges against edges of random paths", judgement.edges, plots.plot_minimality,
         plots.minimality_sentence(judgement)),
        ("Other circuits", judgement.rivals, plots.plot_rivals, plots.rivals_sentence(judgement)),
    ]  # fmt: skip
    return [
        Section(heading, words, picture(plot(judgement), words) if len(table) else "")
        for heading, table, plot, words in drawn
    ]


def details(judgement: Judgement) -> list[Section]:
    """All tables of it."""
    tests = judgement.questions.drop(columns=["claim", "sentence"])
    costly = judgement.edges.sort_values("effect", ascending=False, kind="stable")
    return [
        Section(
            "Every test",
            "p_for is that of the claim's opposite, p_against that of the claim; power is the chance to find a claim "
            f"wrong that is so by reference, least what would be found {_PER_CENT}.",
            tables.table(tests, {name: _p for name in ("p_for", "p_against", "holm")}, scroll=True)
            + "".join(tables.muted(f"{row.question}, {row.metric}: {row.sentence}") for row in _rows(judgement)),
        ),
        Section(
            "On other facts, templates and relations",
            "hit is the share of answers among the first ten; nll the loss in nats, of the circuit, the model and the "
            "empty circuit; faithfulness the share of the model's gain over the empty circuit that the circuit has.",
            tables.table(joined(judgement.elsewhere), scroll=True),
        ),
        Section(
            "Its edges, the costliest first",
            "What cutting each alone adds to the circuit's loss, in nats, beside edges of random paths.",
            tables.table(costly, scroll=True),
        ),
        Section(
            "Other circuits",
            "The best circuits of its size that may not have its strongest edges.",
            tables.table(joined(judgement.rivals)),
        ),
        Section(
            "Every pair of ablations",
            "Circuits of one size, found under one ablation and tested under another.",
            tables.table(joined(judgement.matrix), scroll=True),
        ),
    ]


def methods(judgement: Judgement) -> list[tuple[str, str, str]]:
    """How each test works that was made: its name, a sentence, and the arXiv number of its source."""
    asked = set(judgement.questions["question"])
    asked |= {"ablations"} if len(judgement.matrix) else set()
    return [(name, *one) for name, one in _METHODS.items() if name in asked or name == "faithfulness"]


def joined(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose faithfulness has its interval beside it, in one column."""
    if not {"faithfulness", "low", "high"} <= set(table):
        return table
    told = [interval(*ends) for ends in table[["faithfulness", "low", "high"]].itertuples(index=False)]
    return table.assign(faithfulness=told).drop(columns=["low", "high"])


def fitting(value: float, low: float, high: float) -> str:
    """A number and its interval, with as many decimals as its size asks for."""
    largest = max([abs(one) for one in (value, low, high) if math.isfinite(one)], default=0.0)
    digits = 2 if largest == 0 else min(6, max(2, 1 - math.floor(math.log10(largest))))
    return interval(value, low, high, digits)


def _ends(table: pd.DataFrame) -> list[tuple[float, float, float]]:
    return list(table[["effect", "low", "high"]].itertuples(index=False, name=None))


def _rows(judgement: Judgement) -> Any:
    return judgement.questions.itertuples()


def _p(value: float) -> str:
    """A p-value, never as 0."""
    if not math.isfinite(value):
        return "–"
    return decimal(value, 3) if value >= 0.001 else f"{value:.0e}"
