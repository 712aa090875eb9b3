"""Judgements made by hand, to be drawn and written."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from kcwb.evaluation.referee.judgement import NO, NOT_SHOWN, YES, Judgement

KINDS = ("zero", "mean", "resample")
BETTER, BEATEN = "share of facts on which the circuit does better", "share of random circuits that it beats"
NAN = math.nan
ASKED = (
    # question, metric, effect, what, low, high, n, of, p_for, p_against, verdict
    ("equivalence", "nll", 0.46, BETTER, 0.33, 0.6, 48, "facts", 0.031, 0.9, NOT_SHOWN),
    ("equivalence", "logit_diff", 0.48, BETTER, 0.34, 0.62, 48, "facts", 0.02, 0.9, YES),
    ("independence", "nll", 0.004, "HSIC of complement and model", NAN, NAN, 48, "facts", NAN, 0.41, YES),
    ("minimality", "nll", 0.06, "share of edges that are superfluous", 0.02, 0.13, 100, "edges", NAN, 0.0001, NO),
    ("sufficiency", "nll", 1.0, BEATEN, 0.96, 1.0, 100, "random circuits", 0.0099, NAN, YES),
    ("partial necessity", "nll", 0.71, BEATEN, 0.61, 0.79, 100, "random circuits", 0.2, NAN, NOT_SHOWN),
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
    circuit = {"edges": 300, "nodes": 80, "method": "eap-ig", "digest": "cd" * 32}
    head |= {"template": "The capital of {} is", "n": facts, "ablation": "mean", "circuit": circuit, "seed": 0}
    return Judgement(
        questions=questions(facts),
        edges=pd.DataFrame(
            {
                "sender": [one for one, _ in edges],
                "receiver": [other for _, other in edges],
                "effect": list(effects.values()),
                "exceeds": below,
                "p": [max(1e-4, 1 - one) for one in below],
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
    rows = []
    for question, metric, effect, what, low, high, n, of, p_for, p_against, verdict in ASKED:
        rows.append(
            {
                "question": question, "metric": metric, "claim": f"The claim of {question}, said of the circuit.",
                "effect": effect, "what": what, "low": low, "high": high, "n": facts if of == "facts" else n, "of": of,
                "p_for": p_for, "p_against": p_against, "holm": min(1.0, 4 * np.nanmin([p_for, p_against])),
                "verdict": verdict, "power": 0.64, "reference": 0.2, "least": 0.24,
                "sentence": f"By {metric}, {question} is {verdict}: {effect:g} is the {what}, of {facts} facts.",
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
        return next(told) if isinstance(value, str) else value

    def table(frame: pd.DataFrame) -> pd.DataFrame:
        others = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
        names = [name for name in others if name not in ("verdict", "of")]
        return frame.assign(**{name: [next(told) for _ in range(len(frame))] for name in names})

    tables = {name: table(getattr(judgement, name)) for name in ("questions", "edges", "elsewhere")}
    return replace(judgement, **tables, provenance=words(dict(judgement.provenance)) | {"ablation": next(told)})
