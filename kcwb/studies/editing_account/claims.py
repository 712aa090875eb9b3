"""Does Knowledge Circuits' account of editing hold: `compare_edit` over many edits, and its claims one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pandas as pd

from kcwb.discovery.methods import check_size
from kcwb.editing.cases import EditCase, check_targets
from kcwb.editing.edit import EditError, check_edits, edit, is_answer
from kcwb.errors import CircuitError, DataError, SettingError, warn
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.roles import strongest_movers
from kcwb.settings import Count, Seed, at_least
from kcwb.statistics import mean_interval
from kcwb.studies.editing_account.comparison import compare_edit
from kcwb.tasks.task import Task, make_task
from kcwb.verbs import verb


@verb
def compare_edits(
    model: Model,
    cases: Sequence[EditCase],
    method: str | Mapping[str, Mapping[str, Any]] = "rome",
    *,
    layer: int | None = None,
    edges: Count = 300,
    movers: Count = 10,
    draws: Count = 100,
    circuit_draws: Annotated[int, at_least(2)] | None = None,
    n: Count = 8,
    seed: Seed = 0,
    progress: Progress = True,
    **settings: Any,
) -> pd.DataFrame:
    """`compare_edit` over many edits.

    Parameters
    ----------
    model, cases
        The model, and edits from `edit_cases` (their relation is needed: its facts tell the mover heads).
    method
        An editor; or several, each with its own settings, for which the unedited model is looked at once.
    layer, settings
        As in `kcwb.editing.edit.edit`. An edit that does not get under its bound (default 1 nat) is left out with a
        warning: a model that does not say the new object has no circuit for it.
    edges, movers, draws, circuit_draws
        As in `compare_edit`.
    n
        Facts of each relation on which mover heads are found.

    Returns
    -------
    DataFrame
        One row per edit and method: `relation`, `subject`, `true`, `target`, `method`, `nll` (`Edit.nll`), and
        `EditComparison.summary`.

    Raises
    ------
    SettingError
        If there are no cases or editors, there is no such editor or setting, a case's target is its true object, or the
        graph has fewer edges.
    ModelError
        If the model's family cannot be edited.
    DataError
        If no edit could be compared.
    """
    methods = {method: {}} if isinstance(method, str) else method
    if not cases or not methods:
        raise SettingError(f"{len(cases)} cases, {len(methods)} editors: give at least one of each.")
    for name, own in methods.items():
        check_edits(model, name, **{"layer": layer, **settings, **own})
    check_targets(cases)
    check_size(model.graph, edges, model.name)
    tasks: dict[tuple[str, str], tuple[Task, list[str]]] = {}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    of = {"edges": edges, "draws": draws, "circuit_draws": circuit_draws, "seed": seed, "progress": False}
    with track(progress, len(cases) * len(methods), "circuits before and after") as step:
        for case in cases:
            key, like = (case.relation, case.template), None
            for name, own in methods.items():
                try:
                    if key not in tasks:
                        task = make_task(model, case.relation, n=n, seed=seed, template=case.template)
                        tasks[key] = task, strongest_movers(model, task, movers, seed)
                    task, heads = tasks[key]
                    if is_answer(model, case.wanted, case.template):
                        raise DataError(f"the target {case.target!r:.60} is the answer already")
                    more = {"layer": layer, "seed": seed, "progress": False, **settings, **own}
                    made = edit(model, case.fact, case.target, name, template=case.template, **more)
                    like = compare_edit(model, made, task, movers=heads, like=like, **of)
                except (EditError, DataError, CircuitError) as error:
                    left_out.append(f"{case.fact.subject}, {name}: {error}")
                else:
                    rows.append({**case.told, "method": name, "nll": made.nll, **like.summary})
                step(note=case.fact.subject)
    if left_out:
        warn(f"{len(left_out)} of {len(cases) * len(methods)} edits left out: {'; '.join(left_out)}")
    if not rows:
        raise DataError(
            f"None of the {len(cases)} edits by {', '.join(methods)} could be compared; the last: {left_out[-1]}"
        )
    return pd.DataFrame(rows)


#: What Knowledge Circuits claims: the column that is measured, the one that it is compared with, and what the
#: difference must exceed.
_CLAIMS = (
    ("the edit is written at the subject", "te_subject", None, 0.5),
    ("the edit is written at END", "te_end", None, 0.5),
    ("mover heads carry it, more than other heads", "te_movers", "te_random", 0.0),
    ("mover heads carry most of it", "te_movers", None, 0.5),
    ("the circuit changes more than by a paraphrase", "edge_iou_paraphrase", "edge_iou", 0.0),
    ("the circuit changes more than the new answer alone does", "edge_iou_answer", "edge_iou", 0.0),
    ("the change sits in the edited layer", "edited_share", "node_share", 0.0),
)


@verb
def edit_claims(table: pd.DataFrame, seed: Seed = 0) -> pd.DataFrame:
    """Test what Knowledge Circuits claims of editing, claim by claim, over many edits of one method.

    Parameters
    ----------
    table
        Of `compare_edits`.

    Returns
    -------
    DataFrame
        One row per claim: `claim`, what is measured (`quantity`, a mean over edits), `mean`, `low`, `high` (the
        95% bootstrap interval of the mean over edits, taken as independent, though those of one relation share its
        mover heads; NaN for fewer than two), `n`, and `holds`: `yes` if the interval lies above `least`, `no` if below,
        else `undecided`.
    """
    rows = []
    for claim, column, beside, least in _CLAIMS:
        values = table[column] if beside is None else table[column] - table[beside]
        found = values.dropna().to_numpy(float)
        low, high = mean_interval(found, seed)
        holds = "yes" if low > least else "no" if high < least else "undecided"
        mean = float(found.mean()) if len(found) else math.nan
        quantity = column if beside is None else f"{column} - {beside}"
        rows.append((claim, quantity, least, mean, low, high, len(found), holds))
    return pd.DataFrame(rows, columns=["claim", "quantity", "least", "mean", "low", "high", "n", "holds"])


@verb
def account(table: pd.DataFrame, seed: Seed = 0) -> pd.DataFrame:
    """What `edit_claims` was called in version 0.1."""
    warn("account is edit_claims now.", DeprecationWarning)
    return edit_claims(table, seed)
