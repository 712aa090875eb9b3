"""What the referee says of a circuit: tables, and sentences that a person can quote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from kcwb.errors import DataError
from kcwb.verbs import noun, verb

YES, NO, NOT_SHOWN = "yes", "no", "not shown"
_FORMAT = "kcwb-judgement/1"
_TABLES = ("questions", "edges", "null", "matrix", "elsewhere", "rivals")


@noun
@dataclass(frozen=True, eq=False)
class Judgement:
    """Answers to the referee's questions of one circuit; made by `kcwb.referee`.

    Attributes
    ----------
    questions
        One row per question and metric: `question`, its name; `metric`; `claim`, what is claimed of the circuit, a
        sentence; `effect` and `what`, a number and words that say what it is; `low`, `high`, its 95% interval; `n`, how
        many (facts, or random circuits, or edges: `of`); `p_for` and `p_against`, the p-values of the claim's opposite
        and of the claim (NaN where there is no such test); `holm`, the smaller of both after Holm's correction over all
        p-values of the table; `verdict`, `yes`, `no` or `not shown`; `power`, the probability that this test would have
        found a claim wrong that is so by `reference`, and `least`, by how much one must be wrong for that to be found
        in 80% of cases; `sentence`.
    edges
        One row per edge that was cut alone, as of `kcwb.minimality`.
    null
        `effect` (nats): what cutting an edge of a random path that was let in does, one row per path.
    matrix
        One row per `found` and `tested` (ablations) and `level` (`edges`, `nodes`): `edges`, `faithfulness` with `low`
        and `high`, `n`.
    elsewhere
        The circuit on other prompts, one row per `kind` (`facts`, `length`, `template`, `relation`) and `name`: `n`,
        `hit_model`, `hit` (shares of answers among the first ten), `nll_model`, `nll`, `nll_empty` (nats),
        `faithfulness`, `low`, `high`.
    rivals
        The best other circuits, one row per `without`, how many of the circuit's strongest edges they may not have:
        `edges`, `shared`, `nll`, `faithfulness`, `low`, `high`.
    provenance
        What was judged, on what and how, ready for JSON.
    """

    questions: pd.DataFrame
    edges: pd.DataFrame
    null: pd.DataFrame
    matrix: pd.DataFrame
    elsewhere: pd.DataFrame
    rivals: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> pd.Series:
        """Question -> verdict: that of all its metrics, `not shown` where they differ but none says no."""
        found = {}
        for question, some in self.questions.groupby("question", sort=False):
            verdicts = set(some["verdict"])
            found[question] = NO if NO in verdicts else YES if verdicts == {YES} else NOT_SHOWN
        return pd.Series(found, name="verdict", dtype=object)

    def to_json(self) -> str:
        """All of it as text; a table is a mapping from columns to lists, NaN is null."""
        tables = {name: getattr(self, name).astype(object) for name in _TABLES}
        written = {name: one.where(one.notna(), None).to_dict("split", index=False) for name, one in tables.items()}
        return json.dumps({"format": _FORMAT, **written, "provenance": dict(self.provenance)}, ensure_ascii=False)

    @classmethod
    @verb
    def from_json(cls, text: str) -> Judgement:
        """Read what `to_json` wrote; DataError if it is none."""
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(f"its format is {data['format']!r}")
            tables = {name: pd.DataFrame(data[name]["data"], columns=data[name]["columns"]) for name in _TABLES}
            numbers = {name: table.fillna(float("nan")).infer_objects() for name, table in tables.items()}
            return cls(**numbers, provenance=data["provenance"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"This is no judgement that kcwb wrote: {error}.") from error

    def __repr__(self) -> str:
        """One line: how many questions are answered how."""
        counts = self.answers.value_counts()
        said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (YES, NO, NOT_SHOWN) if verdict in counts)
        return f"Judgement({self.provenance.get('circuit', {}).get('edges', '?')} edges: {said})"
