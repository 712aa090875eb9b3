"""Tables and lines of text as HTML, for panels and reports: one look, every text escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

_LONGEST = 160  # characters of a text in a cell

CSS = resources.files("kcwb.workbench").joinpath("tables.css").read_text(encoding="utf-8").strip()
STYLE = f"<style>{CSS}</style>"

Format = Callable[[Any], str]

#: Columns of the package's tables -> how they are headed where a person reads them; all others as they are.
HEADS = {
    "above_mean": "above the mean", "always_right": "always right", "always_wrong": "always wrong",
    "attention_bos": "attention to the first token", "attention_end": "attention to END",
    "attention_relation": "attention to the relation", "attention_source": "attention to the source",
    "attention_subject": "attention to the subject",
    "chance_high": "chance, high", "chance_low": "chance, low", "circuit_draws": "draws of the circuit",
    "duplicate_token": "duplicate token", "edge_iou": "edges in common", "edges_after": "edges after",
    "edges_before": "edges before", "first_tells": "first token tells", "gold": "to the right answer",
    "gold_relation": "to the right answer, by the relation", "gold_subject": "to the right answer, by the subject",
    "high_10": "high, Hit@10", "high_90": "high (90%)",
    "hit_1": "Hit@1", "hit_10": "Hit@10", "hit_after": "hit after", "hit_before": "hit before",
    "hit_model": "hit of the model", "in_after": "in the one after", "in_before": "in the one before",
    "in_edges": "edges in", "iou_random": "in common by chance", "jaccard": "Jaccard", "layers_away": "layers away",
    "low_10": "low, Hit@10", "low_90": "low (90%)",
    "max_probability": "largest probability", "mover_heads": "mover heads",
    "movers_margin": "movers' margin", "movers_predicted": "movers predict", "n_right": "right", "n_test": "test facts",
    "n_wrong": "wrong", "node_jaccard": "Jaccard of nodes", "of_edges": "of edges", "of_nodes": "of nodes",
    "only_left": "only left", "only_right": "only right", "out_edges": "edges out", "p_against": "p, against",
    "p_for": "p, for", "previous_token": "previous token", "random_cost": "cost, random",
    "random_heads": "random heads", "random_hit": "hit, random", "random_jaccard": "Jaccard, random",
    "rank_after": "rank after", "rank_before": "rank before", "right_in": "of the right", "rival": "to the rival",
    "rival_relation": "to the rival, by the relation", "rival_subject": "to the rival, by the subject",
    "size_two_hop": "edges, two hops", "subject_rank": "rank of the subject", "to_logits": "to the logits",
    "token_id": "number of the token", "top_tokens": "writes", "wrong_in": "of the wrong",
}  # fmt: skip
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def styled(*parts: str) -> str:
    """Put pieces of HTML under the style of all tables."""
    return f'<div class="kcwb">{STYLE}{"".join(parts)}</div>'


def shorten(words: str, most: int) -> str:
    """A text, cut where it is longer than so many characters."""
    return words if len(words) <= most else words[: most - 1] + "…"


def text(value: object, longest: int = _LONGEST) -> str:
    """Any value as escaped text, shortened where it would fill a page."""
    return html.escape(shorten(_whole(str(value)), longest), quote=True)


def _whole(text: str) -> str:
    """Without halves of characters, which neither pandas nor files can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def table(frame: pd.DataFrame, formats: Mapping[str, Format] | None = None, *, scroll: bool = False) -> str:
    """A DataFrame without its index as an HTML table, if it is long in a box of its own to `scroll` in.

    `formats` says how a column's values are written; numbers otherwise have three digits.
    """
    formats = formats or {}
    numeric = [pd.api.types.is_numeric_dtype(dtype) or name in formats for name, dtype in frame.dtypes.items()]

    def row(tag: str, cells: Iterable[str]) -> str:
        marks = (' class="kc-number"' if number else "" for number in numeric)
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for cell, mark in zip(cells, marks, strict=True))

    writers = [formats.get(str(name), number) for name in frame.columns]
    body = "".join(
        f"<tr>{row('td', (text(write(value)) for write, value in zip(writers, values, strict=True)))}</tr>"
        for values in frame.itertuples(index=False)
    )
    head = row("th", (text(headed(name)) for name in frame.columns))
    written = f'<table class="kc-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="kc-scroll">{written}</div>' if scroll else written


def headed(name: object) -> str:
    """A column's name as a person reads it."""
    return HEADS.get(str(name), str(name))


def pairs(values: Mapping[str, object]) -> str:
    """Names and values as a table of one row."""
    row = [_whole(number(value)) for value in values.values()]
    return table(pd.DataFrame([row], columns=[_whole(name) for name in values]))


def beside(*parts: str) -> str:
    """Pieces side by side, where there is room."""
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px 32px;align-items:flex-start">{"".join(parts)}</div>'


def heading(words: str) -> str:
    """A line above a table."""
    return f'<div class="kc-heading">{text(words)}</div>'


def summary(words: str) -> str:
    """A line that says the result."""
    return f'<div class="kc-summary">{text(words, 2000)}</div>'


def muted(words: str) -> str:
    """A line of explanation."""
    return f'<div class="kc-muted">{text(words, 1000)}</div>'


def number(value: Any) -> str:
    """Integers with separators, others with three digits (1.49×10⁻⁵), yes or no, "–" for nothing, text as it is."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)) and not hasattr(value, "dtype"):
        return "–" if value is None or value is pd.NA else str(value)
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and 1 <= abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "\u2212")
    if 999.5 <= abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "\u2212")
    digits, _, power = f"{value or 0:.3g}".partition("e")
    raised = f"\u00d710{str(int(power)).translate(_RAISED)}" if power else ""
    return digits.replace("-", "\u2212") + raised


def decimal(value: float, digits: int = 2) -> str:
    """A number of some decimals without the zero before the point, as statistics are written: .93, −.04, 1.20."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "\u2212").replace("\u22120.", "\u2212.").removeprefix("0")


def interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """A number with its interval, if it has one: .93 [.88, .97]."""
    ends = "" if pd.isna(low) or pd.isna(high) else f" [{decimal(low, digits)}, {decimal(high, digits)}]"
    return decimal(value, digits) + ends


def estimate(value: float, low: float, high: float) -> str:
    """The same with the zero before the point: 0.93 [0.88, 0.97]; "–" for nothing."""
    if pd.isna(value):
        return "–"
    ends = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{value:.2f}{ends}".replace("-", "\u2212")


def hit_at(frame: pd.DataFrame) -> str:
    """`Hit@k`, with the one k of a table that has `k`; of one that has not, the usual 10."""
    found = set(frame["k"]) if "k" in frame else {10}
    return f"Hit@{found.pop() if len(found) == 1 else 'k'}"


def completeness_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The long table of `kcwb.completeness` with one row per run, as it reads best."""
    known = frame[frame["split"] == "D_test, known"]["n"].max()
    if known == frame[frame["split"] == "D_test"]["n"].max():  # then it says the same twice
        frame = frame[frame["split"] != "D_test, known"]
    rows = []
    for run, part in frame.groupby("run", sort=False):
        first: Any = part.iloc[0]
        row: dict[str, object] = {"run": run, "edges": int(first["edges"]), "nodes": float(first["nodes"])}
        for one in part.to_dict("records"):
            row[f"{hit_at(frame)}, {one['split']} (n={one['n']})"] = estimate(one["hit"], one["low"], one["high"])
            row[f"nll, {one['split']}"] = "–" if not one["n"] else f"{one['nll']:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)
