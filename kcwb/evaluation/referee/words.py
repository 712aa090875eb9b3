"""The questions in words: what is claimed, what was seen, and what could have been."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from kcwb.evaluation.referee.hypotheses import MARGIN, Tested
from kcwb.evaluation.referee.judgement import NO, NOT_SHOWN, YES
from kcwb.statistics import holm

#: The chance of any wrong answer in a table.
ALPHA = 0.05


class Question(NamedTuple):
    """A question: the claim; what its effect is; what it is counted over; the reference of its power, and of `least`.

    `yes`, `no` and `open` are what is said, of the numbers `effect`, `low`, `high`, `n`, `p` (Holm's).
    """

    claim: str
    what: str
    of: str
    reference: str
    unit: str
    yes: str
    no: str
    open: str


def _no_worse(where: str, less: str, there: str, unsettled: str = "") -> Question:
    """A question of what the circuit recovers elsewhere, which is to be no less."""
    return Question(
        f"The circuit does as well {where}.",
        f"recovered share {less}", "facts",
        "it recovers .25 less", "of recovered share",
        f"{there} it does no worse (by {{effect:+.2f}}; {{margin}} would be no matter).",
        f"{there} it recovers {{effect:.2f}} less.",
        f"Whether it does as well {unsettled or where} is not settled (less by {{effect:+.2f}}).",
    )  # fmt: skip


QUESTIONS = {
    "equivalence": Question(
        "The circuit answers as well as the whole model.",
        "share of facts on which the circuit does better", "facts",
        "it does better (or worse) on one fact of five", "away from one half",
        "The circuit is better than the model about as often as worse: on {effect:.0%} of {n} facts.",
        "The circuit does not answer as the model does: it is better on {effect:.0%} of {n} facts.",
        "Whether the circuit answers as the model does is not settled: it is better on {effect:.0%} of {n} facts.",
    ),
    "independence": Question(
        "What is left without the circuit knows nothing of the task.",
        "correlation of the complement's scores with the model's", "facts",
        "a correlation of .5", "of correlation",
        "",
        "What is left without the circuit still knows which facts the model knows well: correlation {effect:.2f}.",
        "What is left without the circuit has not been seen to know anything: correlation {effect:.2f} on {n} facts.",
    ),
    "minimality": Question(
        "Every edge of the circuit matters more than a random one.",
        "share of edges that are not superfluous", "edges",
        "an edge that matters as much as a random one", "below nine of ten random edges",
        "All {n} edges matter more than nine of ten edges of random paths.",
        "{idle:.0f} of {n} edges matter less than an edge has to: they do not exceed nine of ten random ones.",
        "No edge of {n} is shown to be superfluous, but not all are shown to be needed.",
    ),
    "sufficiency": Question(
        "The circuit is closer to the model than nine of ten random circuits of its size.",
        "share of random circuits that it beats", "random circuits",
        "it beats every other random circuit", "below nine of ten",
        "Alone it is closer to the model than {effect:.0%} of {n} random connected circuits of its size.",
        "Alone it is closer to the model than only {effect:.0%} of {n} random connected circuits of its size.",
        "Alone it is closer to the model than {effect:.0%} of {n} random circuits: which does not settle it.",
    ),
    "partial necessity": Question(
        "Cutting the circuit harms the model more than cutting nine of ten random ones.",
        "share of random circuits whose loss harms less", "random circuits",
        "it beats every other random circuit", "below nine of ten",
        "Cutting it harms the model more than cutting {effect:.0%} of {n} random circuits of its size.",
        "Cutting it harms the model more than cutting only {effect:.0%} of {n} random circuits of its size.",
        "Cutting it harms the model more than cutting {effect:.0%} of {n} random ones: which does not settle it.",
    ),
    "other facts": _no_worse(
        "on facts that it was not found on", "on its own facts less that on others", "On facts that it was not found on"
    ),
    "prompt length": _no_worse(
        "on longer prompts", "on the shorter half less that on the longer", "On the longer half of the prompts"
    ),
    "other templates": _no_worse(
        "in other wordings", "in its template less that in others", "In other templates", "in other templates"
    ),
    "other ablations": _no_worse(
        "whatever cut edges deliver", "under its ablation less that under others", "Under other ablations",
        "under other ablations",
    ),
    "specificity": Question(
        "The circuit does more for its relation than for others.",
        "recovered share of its relation less that of others", "facts",
        "a difference of .25 the other way", "of recovered share",
        "It recovers {effect:.2f} more of its own relation than of others.",
        "It recovers as much of other relations (difference {effect:+.2f}): it is not this relation's circuit.",
        "Whether it does more for its own relation is not settled (difference {effect:+.2f}).",
    ),
    "uniqueness": Question(
        "No circuit of its size without its strongest tenth does as well.",
        "recovered share less that of the best rival", "facts",
        "a difference of .25 the other way", "of recovered share",
        "The best circuit of its size without its strongest tenth of edges recovers {effect:.2f} less.",
        "A circuit of its size without its strongest tenth of edges does as well (difference {effect:+.2f}): it is one "
        "of many.",
        "Whether a circuit without its strongest tenth of edges does as well is not settled ({effect:+.2f}).",
    ),
}  # fmt: skip
_METRICS = {"nll": "loss", "logit_diff": "logit difference"}


def questions_table(answered: Mapping[tuple[str, str], Tested]) -> pd.DataFrame:
    """The table of `Judgement.questions`, with one Holm correction over all p-values of both directions."""
    found = list(answered.values())
    adjusted = holm([p for one in found for p in (one.p_for, one.p_against)]).reshape(-1, 2)
    rows = []
    for (question, metric), one, (p_for, p_against) in zip(answered, found, adjusted, strict=True):
        asked = QUESTIONS[question]
        verdict = YES if p_for <= ALPHA else NO if p_against <= ALPHA else NOT_SHOWN
        p = float(np.nanmin([p_for, p_against]))
        rows.append(
            {
                "question": question,
                "metric": metric,
                "claim": asked.claim,
                "verdict": verdict,
                "effect": one.effect,
                "what": asked.what,
                "low": one.low,
                "high": one.high,
                "n": one.n,
                "of": asked.of,
                "p_for": one.p_for,
                "p_against": one.p_against,
                "holm": p,
                "power": one.power,
                "reference": asked.reference,
                "least": one.least,
                "sentence": sentence(question, metric, one, verdict, p),
            }
        )
    return pd.DataFrame(rows)


def sentence(question: str, metric: str, one: Tested, verdict: str, p: float) -> str:
    """What is said of one test, with its p-value (Holm's); and, if nothing was shown, what could have been."""
    asked = QUESTIONS[question]
    said = {YES: asked.yes, NO: asked.no, NOT_SHOWN: asked.open}[verdict]
    words = said.format(**one._asdict(), idle=round((1 - one.effect) * one.n), margin=MARGIN)
    told = "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")
    words = f"{words[:-1]} ({_METRICS[metric]}; {told})."
    if verdict != NOT_SHOWN:
        return words
    if math.isnan(one.least):
        return f"{words} So few {asked.of} could hardly have shown it."
    return f"{words} With {one.n} {asked.of}, {one.least:.2f} {asked.unit} would have been found in 80% of cases."
