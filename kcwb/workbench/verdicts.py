"""A judgement in words, tables and pictures: functions from it to HTML, every text escaped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from kcwb.circuits.provenance import part
from kcwb.evaluation.referee.judgement import NO, NOT_SHOWN, YES, Judgement
from kcwb.workbench import plots, tables
from kcwb.workbench.plots import Plot, picture
from kcwb.workbench.plots.referee import kept_edges
from kcwb.workbench.tables import decimal, interval, shorten, text

ENOUGH = 50  # facts; below, a page says what could not have been seen
_MARKS = {YES: "kc-yes", NO: "kc-no"}
_LONG = 2000  # letters of a sentence
_PER_CENT = "in 80% of cases"
_DIFFERENCE = "by 9,999 permutations, where less than .1 is no matter"
#: Question -> how it is asked, and the arXiv number of whose test or idea that is.
_METHODS = {
    "equivalence": (
        "is the share of facts on which the circuit does better within .1 of one half, by binomial tests",
        "2410.13032",
    ),
    "independence": (
        "do the scores of what is left without the circuit depend on the model's, by HSIC with Gaussian kernels and "
        "9,999 permutations; the effect is Spearman's correlation",
        "2410.13032",
    ),
    "sufficiency": (
        "of how many random connected circuits of its size are losses farther from the model's, against nine of ten",
        "2410.13032",
    ),
    "partial necessity": (
        "the same of the model without the circuit, and without random ones: whose losses are nearer the model's",
        "2410.13032",
    ),
    "minimality": (
        "does cutting an edge change losses more than cutting an edge of a random path that was let in, nine times of "
        "ten; by a binomial test for each edge, with Holm's correction over edges",
        "2410.13032",
    ),
    "other facts": (f"the recovered share on facts that it was found on, less that on others, {_DIFFERENCE}", ""),
    "prompt length": (f"the recovered share on the shorter half, less that on the longer, {_DIFFERENCE}", ""),
    "other templates": (f"the recovered share in its template, less that in others, {_DIFFERENCE}", ""),
    "other ablations": (
        f"the recovered share under its ablation, less that under the others of zero, mean and resample, {_DIFFERENCE}",
        "2407.08734",
    ),
    "specificity": ("the recovered share of its own relation, less that of others, by permutations", ""),
    "uniqueness": (
        "its recovered share less that of the best circuit of its size without its strongest tenth of edges, by "
        "permutations",
        "",
    ),
    "faithfulness": (
        "the recovered share: (loss with every edge cut - loss of the circuit) over (loss with every edge cut - loss "
        "of the model), means over facts",
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
    said = judgement.provenance
    circuit, settings = (part(said, key) for key in ("circuit", "settings"))
    told = [f"“{shorten(str(said['template']), 160)}”"] if "template" in said else []
    told += [f"{said['judged on']:,} facts"] if isinstance(said.get("judged on"), int) else []
    found = circuit.get("found with")
    told += [f"found with {', '.join(map(str, found))}"] if found and isinstance(found, list) else []
    told += [f"judged under {settings['ablation']} ablation"] if "ablation" in settings else []
    random = [f"{settings[key]:,} random {key}" for key in ("circuits", "paths") if isinstance(settings.get(key), int)]
    return [*told, *random]


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
    facts = judgement.provenance.get("judged on", some["n"].max())
    if not facts < ENOUGH:
        return ""
    least = some.groupby("question", sort=False)["least"].max()
    could = [f"{question} by {decimal(value)}" for question, value in least.dropna().items()]
    never = [str(question) for question in least.index[least.isna()]]
    words = [f"Only {facts:,.0f} facts, where {ENOUGH} are asked for: small effects are not seen."]
    if could:
        words.append(f"So many find a claim wrong {_PER_CENT} only where it is wrong by this much: {'; '.join(could)}.")
    words += [f"Nothing is wrong enough to be found so: {', '.join(never)}."] if never else []
    return " ".join(words)


def verdict(value: str) -> str:
    """A verdict as a word with a mark, told by colour and shape."""
    return f'<span class="kc-verdict {_MARKS.get(value, "kc-open")}">{text(value)}</span>'


def verdict_table(judgement: Judgement) -> str:
    """A row per question: what is claimed, the verdict, the numbers of each metric, and the sentence that decides."""
    answers, rows = judgement.answers, []
    for question, some in judgement.questions.groupby("question", sort=False):
        answer = str(answers[question])
        deciding = some[some["verdict"] == answer].iloc[0]
        several, differ = len(some) > 1, some["verdict"].nunique() > 1
        shown = [f"{one}: " if several else "" for one in some["metric"]]
        shown = [f"{row.metric}, {row.verdict}: " for row in some.itertuples()] if differ else shown
        effects = some[["effect", "low", "high"]].itertuples(index=False)
        numbers: list[list[str]] = [
            [f"{name}{fitting(*ends)}" for name, ends in zip(shown, effects, strict=True)],
            [_p(value) for value in some["holm"]],
            [decimal(value) for value in some["power"]],
        ]
        claim = f'<strong>{text(question)}</strong> <span class="kc-muted">{text(deciding["claim"], _LONG)}</span>'
        columns = ("".join(f"<div>{text(line)}</div>" for line in lines) for lines in numbers)
        cells = "".join(f'<td class="kc-number">{column}</td>' for column in columns)
        found = f'<td dir="auto">{text(deciding["sentence"], _LONG)}</td>'
        rows.append(f"<tr><td>{claim}</td><td>{verdict(answer)}</td>{cells}{found}</tr>")
    names = ("question", "verdict", "effect [95%]", "p (Holm)", "power", "what was found")
    classes = ("", "", *[' class="kc-number"'] * 3, "")
    head = "".join(f"<th{mark}>{name}</th>" for name, mark in zip(names, classes, strict=True))
    if not rows:
        return tables.muted("No question was asked.")
    return f'<table class="kc-table kc-verdicts"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


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
    tests, every = judgement.questions.drop(columns=["claim", "sentence"]), judgement.questions.itertuples()
    edges = kept_edges(judgement).drop(columns="kept", errors="ignore")
    edges = edges.assign(superfluous=["superfluous" if one else "" for one in edges["superfluous"]])
    return [
        Section(
            "Every test",
            "p_for is the p-value under the claim's opposite, p_against that under the claim. power is the probability "
            "of finding a claim wrong that is so as reference says; least, by how much one must be to be found so "
            f"{_PER_CENT}.",
            tables.table(tests, {name: _p for name in ("p_for", "p_against", "holm")})
            + "".join(tables.muted(f"{row.question}, {row.metric}: {row.sentence}") for row in every),
        ),
        Section(
            "On other facts, templates and relations",
            "hit is the share of answers among the first ten; nll the loss in nats, of the circuit, the model and the "
            "empty circuit; faithfulness the share of the model's gain over the empty circuit that the circuit has.",
            tables.table(joined(judgement.elsewhere), scroll=True),
        ),
        Section(
            "Its edges, those that matter most first",
            "effect is by how much cutting one alone changes the loss of a fact in the mean, cost by how much it "
            "raises it, in nats; exceeds the share of edges of random paths with a smaller effect.",
            tables.table(
                edges.sort_values("effect", ascending=False, kind="stable"), {"p": _p, "holm": _p}, scroll=True
            ),
        ),
        Section(
            "Other circuits",
            "The best circuits of its size that may not have its strongest edges.",
            tables.table(joined(judgement.rivals)),
        ),
        Section(
            "Every pair of ablations",
            "Circuits of one size, found under one ablation and tested under another: their edges, and all edges among "
            "their nodes.",
            tables.table(joined(judgement.matrix), scroll=True),
        ),
    ]


def methods(judgement: Judgement) -> list[tuple[str, str, str]]:
    """How each test works that was made: its name, a sentence, and the arXiv number of its source."""
    asked = set(judgement.questions["question"])
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


def _p(value: float) -> str:
    """A p-value, never as 0."""
    if not math.isfinite(value):
        return "–"
    return decimal(value, 3) if value >= 0.001 else f"{value:.0e}" if value else "<1e-300"
