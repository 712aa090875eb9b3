"""A diagnosis in words: a paragraph of plain text, every number of which is from its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from kcwb.reading.trajectories import WHERE

if TYPE_CHECKING:
    from kcwb.studies.hallucination.diagnosis import Diagnosis


def describe(found: Diagnosis) -> str:
    """A diagnosis as a paragraph of plain text; every number in it is from its tables."""
    return " ".join([_said(found), _when(found), _which(found), _who(found), _decides(found)])


def _quoted(token: str) -> str:
    return repr(token.strip())


def _said(found: Diagnosis) -> str:
    gold, rival = found.answers.to_dict("records")
    if found.right:
        return (
            f"Asked {found.prompt!r}, the model says {_quoted(found.gold)} (probability {gold['probability']:.2f}), "
            f"which is right; the likeliest wrong answer is {_quoted(found.rival)} ({rival['probability']:.2f})."
        )
    return (
        f"Asked {found.prompt!r}, the model says {_quoted(found.rival)} (probability {rival['probability']:.2f}); the "
        f"right answer {_quoted(found.gold)} has rank {gold['rank']:,} (probability {gold['probability']:.2g})."
    )


def _when(found: Diagnosis) -> str:
    words = [
        f"{_quoted(token)} {'never' if layer is pd.NA else f'after layer {layer}'}"
        for token, layer in zip((found.gold, found.rival), found.answers[f"arrives, {WHERE[0]}"], strict=True)
    ]
    last = int(found.lens["layer"].max())
    return (
        "By the logit lens at END, first among the ten likeliest tokens: "
        f"{words[0]}, {words[1]}; the last layer is {last}."
    )


def _which(found: Diagnosis) -> str:
    gold = found.answers.iloc[0]
    best, layer = gold[f"best rank, {WHERE[2]}"], gold[f"arrives, {WHERE[2]}"]
    if layer is pd.NA:
        words = f"At the subject's tokens the right answer never ranks better than {best:,}"
        words += ": a failure of enrichment." if not found.right else "."
    else:
        words = f"At the subject's tokens the right answer is among the ten likeliest after layer {layer}"
        words += ", and END loses it: a failure of selection." if not found.right else "."
    passed, total = found.recalled
    if not total:
        return words + " How right answers do in this test is not known here."
    note = f" Of {total} other facts that the model gets right, {passed} pass this test of recall"
    if passed < total / 2 and layer is pd.NA:
        note += ", so that failing it says little"
    return words + note + "."


def _who(found: Diagnosis) -> str:
    movers = found.movers
    if movers.empty:
        return "No head was named a mover."
    said, other = ("gold", "rival") if found.right else ("rival", "gold")
    name, against = _quoted(getattr(found, said)), _quoted(getattr(found, other))
    for_said = int((movers[said] > movers[other]).sum())
    top = movers.sort_values(said, ascending=False, kind="stable").iloc[0]
    part = found.balance.set_index("part").loc["movers"]
    share = movers["attention_subject"].mean()
    return (
        f"Of {len(movers)} mover heads, {for_said} write{'s' if for_said == 1 else ''} more towards {name} than "
        f"towards {against}; together they give the one {part[said]:+.2f} and the other {part[other]:+.2f} logits, and "
        f"{share:.0%} of their attention from END is on the subject. The one that moves most towards {name} is "
        f"{top['node']}, chiefly from {_quoted(top['source'])} (attention {top['attention_source']:.2f}): "
        f"{top[said]:+.2f} logits, against {top[other]:+.2f} for {against}."
    )


def _decides(found: Diagnosis) -> str:
    parts = found.balance.set_index("part")["difference"]
    above = f"{abs(parts['all']):.2f} logits {'above' if parts['all'] >= 0 else 'below'}"
    return (
        f"In all {_quoted(found.rival)} is {above} {_quoted(found.gold)}, of which movers contribute "
        f"{parts['movers']:+.2f}, other heads {parts['other heads']:+.2f}, and MLPs, embedding and constants "
        f"{parts['MLPs and the rest']:+.2f}."
    )
