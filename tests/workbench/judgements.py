"""Judgements made by hand, to be drawn and written."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from kcwb.evaluation.referee.hypotheses import Tested
from kcwb.evaluation.referee.judgement import NO, NOT_SHOWN, YES, Judgement
from kcwb.evaluation.referee.words import QUESTIONS, sentence

KINDS = ("zero", "mean", "resample")
NAN = math.nan
ASKED = (
    # question, metric, effect, low, high, n, of, p_for, p_against, holm, verdict, least
    ("equivalence", "nll", 0.46, 0.33, 0.6, 48, "facts", 0.031, 0.9, 0.124, NOT_SHOWN, 0.24),
    ("equivalence", "logit_diff", 0.48, 0.34, 0.62, 48, "facts", 0.02, 0.9, 0.08, YES, 0.24),
    ("independence", "nll", 0.004, NAN, NAN, 48, "facts", NAN, 0.41, 1.0, NOT_SHOWN, 0.35),
    ("minimality", "nll", 0.94, 0.87, 0.98, 100, "edges", NAN, 0.0001, 0.0004, NO, 0.3),
    ("sufficiency", "nll", 1.0, 0.96, 1.0, 100, "random circuits", 0.0099, NAN, 0.04, YES, 0.2),
    ("partial necessity", "nll", 0.71, 0.61, 0.79, 100, "random circuits", 0.2, NAN, 0.8, NOT_SHOWN, 0.2),
    ("other facts", "nll", 0.02, -0.1, 0.14, 8, "facts", 0.11, 0.4, 0.8, NOT_SHOWN, 0.28),
    ("other templates", "nll", 0.31, 0.2, 0.4, 24, "facts", 0.9, 0.0001, 0.002, NO, 0.2),
    ("other ablations", "nll", 0.43, 0.4, 0.5, 48, "facts", 1.0, 0.0001, 0.002, NO, 0.1),
    ("specificity", "nll", 0.8, 0.7, 0.9, 24, "facts", 0.0001, 1.0, 0.002, YES, 0.2),
    ("uniqueness", "nll", 0.13, 0.1, 0.2, 48, "facts", 0.0001, 1.0, 0.002, YES, 0.1),
)
SCORES = ["hit_model", "hit", "nll_model", "nll", "nll_empty", "faithfulness", "low", "high"]


def judgement_of(
    effects: dict[str, float] | None = None,
    null: list[float] | None = None,
    faithful: dict[tuple[str, str, str], float] | None = None,
    *,
    facts: int = 48,
    **provenance: Any,
) -> Judgement:
    """What a referee might say.

    Parameters
    ----------
    effects
        Edge (`sender->receiver`) -> what cutting it does, in nats; superfluous is what is below most of the null.
    null
        What cutting edges of random paths does.
    faithful
        (level, found, tested) -> faithfulness.
    """
    effects = {"input->m0": 0.5, "m0->a1.h0<v>": 0.02, "a1.h0->logits": -0.001} if effects is None else effects
    null = [0.001 * i for i in range(20)] if null is None else null
    faithful = matrix() if faithful is None else faithful
    edges = [name.split("->") for name in effects]
    below = [float(np.mean([one < effect for one in null])) for effect in effects.values()]
    elsewhere = [
        ("facts", "held out", facts, 0.9, 0.8, 1.2, 1.5, 6.0, 0.93, 0.85, 0.98),
        ("template", "{} has the capital", facts, 0.8, 0.5, 1.6, 2.9, 6.0, 0.7, 0.5, 0.8),
        ("relation", "country_language", facts, 0.9, 0.1, 1.0, 5.0, 5.5, 0.11, 0.02, 0.2),
    ]
    head = {"model": {"name": "smollm2-135m", "digest": "ab" * 32}, "relation": {"name": "country_capital"}}
    circuit = {"edges": 300, "nodes": 80, "found with": ["eap-ig", "mean", "nll"], "digest": "cd" * 32}
    settings = {"ablation": "mean", "metric": "nll", "circuits": 100, "paths": 20}
    head |= {"template": "The capital of {} is", "judged on": facts, "circuit": circuit, "settings": settings}
    return Judgement(
        questions=questions(facts),
        edges=pd.DataFrame(
            {
                "sender": [one for one, _ in edges],
                "receiver": [other for _, other in edges],
                "kept": True,
                "effect": list(effects.values()),
                "cost": list(effects.values()),
                "exceeds": below,
                "p": [max(1e-4, 1 - one) for one in below],
                "holm": [min(1.0, 3 * max(1e-4, 1 - one)) for one in below],
                "superfluous": [one < 0.5 for one in below],
            }
        ),
        null=pd.DataFrame({"effect": null}),
        matrix=pd.DataFrame(
            [(*key[1:], key[0], 300, value, value - 0.1, value + 0.1, facts) for key, value in faithful.items()],
            columns=["found", "tested", "level", "edges", "faithfulness", "low", "high", "n"],
        ),
        elsewhere=pd.DataFrame(elsewhere, columns=["kind", "name", "n", *SCORES]),
        rivals=pd.DataFrame(
            [(0, 300, 300, 1.4, 0.93, 0.9, 0.96), (10, 300, 190, 1.9, 0.8, 0.7, 0.9), (100, 300, 60, 3, 0.6, 0.5, 0.7)],
            columns=["without", "edges", "shared", "nll", "faithfulness", "low", "high"],
        ),
        provenance=head | provenance,
    )


def questions(facts: int) -> pd.DataFrame:
    """The table in the words of the referee, with these numbers."""
    rows = []
    for question, metric, effect, low, high, n, of, p_for, p_against, p, verdict, least in ASKED:
        asked, n = QUESTIONS[question], facts if n == 48 else n
        tested = Tested(effect, low, high, n, p_for, p_against, 0.64, least)
        rows.append(
            {
                "question": question, "metric": metric, "claim": asked.claim, "verdict": verdict, "effect": effect,
                "what": asked.what, "low": low, "high": high, "n": n, "of": of, "p_for": p_for,
                "p_against": p_against, "holm": p, "power": 0.64, "reference": asked.reference, "least": least,
                "sentence": sentence(question, metric, tested, verdict, p),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def matrix(levels: tuple[str, ...] = ("edges", "nodes")) -> dict[tuple[str, str, str], float]:
    """Faithful where found and tested agree, by level."""
    return {
        (level, found, tested): round((0.93 if found == tested else 0.3 + 0.1 * KINDS.index(tested)) - 0.1 * i, 2)
        for i, level in enumerate(levels)
        for found in KINDS
        for tested in KINDS
    }


def hostile(judgement: Judgement, texts: list[str]) -> Judgement:
    """The same with every name and word in it replaced by one of these, in turn; verdicts stay."""
    told = itertools.cycle(texts)

    def words(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: words(one) for name, one in value.items()}
        if isinstance(value, list):
            return [words(one) for one in value]
        return next(told) if isinstance(value, str) else value

    def table(frame: pd.DataFrame) -> pd.DataFrame:
        others = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
        names = [name for name in others if name not in ("verdict", "of")]
        return frame.assign(**{name: [next(told) for _ in range(len(frame))] for name in names})

    tables = {name: table(getattr(judgement, name)) for name in ("questions", "edges", "elsewhere")}
    return replace(judgement, **tables, provenance=words(dict(judgement.provenance)))
