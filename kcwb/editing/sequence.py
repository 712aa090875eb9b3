"""Edits one after another in the same weights: how many a method bears, and what earlier edits lose by later ones.

After n = 1, 10, 100, ... edits, as AlphaEdit's (arXiv 2410.02355) and r-ROME's authors (2403.07175) look at them:

- the scores of the first edits, and of the last (`kcwb.editing.scores`), beside those of the unedited model;
- the perplexity of sentences that no edit is about;
- the norm of the whole change, beside that of the weights that it changes.

Each edit is found in the weights as the edits before have left them. As in the authors' codes, prefixes and covariances
are those of the unedited model throughout. All changes so far are one `Edit`, their sum in float32, which is put in and
taken out as a whole: whatever interrupts a sequence, the model is what it was.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from kcwb.editing.cases import EditCase, check_targets
from kcwb.editing.change import Edit, lost_by_rounding
from kcwb.editing.covariance import own_texts
from kcwb.editing.edit import check_edits
from kcwb.editing.partial_runs import make_rows
from kcwb.editing.scores import Asked, Measured, case_scores, measure, score_summary, try_edit
from kcwb.editing.writing import texts_as_now
from kcwb.errors import SettingError
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed
from kcwb.verbs import noun, verb
from kcwb.versions import versions

_LENGTH = 64  # tokens of a text that the perplexity is of


@noun
@dataclass(frozen=True, eq=False)
class EditSequence:
    """What edits one after another have done to a model; made by `sequential_edits`.

    Attributes
    ----------
    method
        The editor.
    scores
        One row per judged edit, `which` (`first`, `last`) and number of `edits` that are in: its scores, as in
        `edit_scores`; before them, as `run` `unedited`, those of the model without edits.
    states
        One row per number of `edits`, 0 among them: `perplexity` of sentences that no edit is about; `norm`, of the
        change by that of the weights it changes (Frobenius); `failed`, how many edits diverged and were left out;
        `seconds`, that finding the edits took so far.
    edit
        All edits as one, their sum: to be put in (`with`, `apply`), and saved with the model; None if all failed.
    provenance
        Everything that determined it, ready for JSON.
    """

    method: str
    scores: pd.DataFrame
    states: pd.DataFrame
    edit: Edit | None
    provenance: Mapping[str, Any]

    @verb
    def summary(self, seed: Seed = 0) -> pd.DataFrame:
        """Means of the scores with 95% intervals over edits (`score_summary`), by `edits`, `which` and `run`."""
        parts = []
        for _, part in self.scores.groupby(["edits", "which"], sort=False):
            head = {name: part[name].iloc[0] for name in ("edits", "which")}
            parts.append(score_summary(part, seed).assign(**head))
        return pd.concat(parts, ignore_index=True)[["edits", "which", "run", "score", "n", "mean", "low", "high"]]

    @property
    def table(self) -> pd.DataFrame:
        """One row per `edits`, `which` and `run`: the means of the scores, and the state."""
        means = self.scores.drop(columns=["case", "relation", "subject", "true", "target"])
        means = means.groupby(["edits", "which", "run"], sort=False).mean().reset_index()
        states = self.states.set_index("edits")
        at = means["edits"].where(means["run"] != "unedited", 0)
        return means.join(states.loc[at].reset_index(drop=True))


@verb
def sequential_edits(
    model: Model,
    cases: Sequence[EditCase],
    method: str = "alphaedit",
    *,
    at: Sequence[Count] = (1, 10, 100, 300),
    judged: Count = 10,
    layer: int | None = None,
    tokens: Natural = 20,
    texts: Count = 32,
    seed: Seed = 0,
    progress: Progress = True,
    **settings: Any,
) -> EditSequence:
    """Edit one fact after another, each on top of those before, and look at what is left after some numbers of edits.

    Parameters
    ----------
    model
        The model, which is afterwards what it was, also after an interruption.
    cases
        The edits in their order, from `edit_cases` or `load_counterfact`. A prompt about another subject that is edited
        as well is not asked.
    method, layer, seed, settings
        As in `kcwb.editing.edit.edit`, and as in `edit_scores` without a bound. Editors of many facts take one at a
        time here.
    at
        After how many edits to look; for more than there are cases, after all of them. Edits after the last look are
        left out.
    judged
        How many of the first edits, and of the last, are scored each time.
    tokens
        As in `edit_scores`.
    texts
        Of how many texts, 64 tokens each, the perplexity is, or of as many as our own sentences make.

    Returns
    -------
    EditSequence
        Its `table` has the means.

    Raises
    ------
    SettingError
        If there are no cases or looks, a prompt is edited twice, a layer or a setting cannot be meant, or a target is
        the true object.
    ModelError
        If the model's family cannot be edited.
    DataError
        If a prompt of any case does not fit into the context, or an answer runs into its prompt.
    """
    looks = sorted({min(n, len(cases)) for n in at})
    _check(cases, looks)
    cases = _apart(cases[: looks[-1]])
    check_edits(model, method, layer, **settings)
    make_rows(model, [(case.wanted, case.template) for case in cases])
    judged_at = {n: {"first": range(min(judged, n)), "last": range(max(0, n - judged), n)} for n in looks}
    numbers = {n: sorted({*which["first"], *which["last"]}) for n, which in judged_at.items()}
    asked = {i: Asked(model, cases[i]) for i in sorted({i for some in numbers.values() for i in some})}
    length, subjects = min(_LENGTH, model.network.n_ctx), {case.fact.subject for case in cases}
    text = torch.tensor(own_texts(model, texts, length, seed, subjects), device=model.device)
    before = dict(zip(asked, measure(model, list(asked.values()), tokens), strict=True))
    states, rows, failed, spent = [_state(model, None, 0, text, 0, 0.0)], list[dict[str, Any]](), 0, 0.0
    all_of_them: Edit | None = None
    losses: list[pd.DataFrame] = []

    def edited() -> AbstractContextManager[object]:
        return nullcontext() if all_of_them is None else all_of_them

    with texts_as_now(model), track(progress, len(cases), f"{method} edits, one after another") as step:
        for n, case in enumerate(cases, start=1):
            started = time.perf_counter()
            with edited():
                made = try_edit(model, [case], method, layer, seed, settings)
            if made is None:
                failed += 1
            else:
                losses.append(made.losses.assign(edit=n - 1))
                all_of_them = _sum(all_of_them, made)
            spent += time.perf_counter() - started
            if n in looks:
                with edited():
                    found = measure(model, [asked[i] for i in numbers[n]], tokens)
                    states.append(_state(model, all_of_them, n, text, failed, spent))
                after = dict(zip(numbers[n], found, strict=True))
                rows += _rows(cases, asked, before, after, n, judged_at[n], method)
            step(note=case.fact.subject)
    if all_of_them is not None:
        all_of_them = replace(all_of_them, losses=pd.concat(losses, ignore_index=True))
    origin = {
        "model": {"name": model.name, "digest": model.digest, "dtype": str(model.dtype).removeprefix("torch.")},
        "method": method,
        "parameters": {} if all_of_them is None else dict(all_of_them.parameters),
        "settings": {"layer": layer, **settings},
        "cases": [[case.fact.subject, case.fact.object, case.target, case.template] for case in cases],
        "at": looks, "judged": judged, "tokens": tokens, "texts": texts, "seed": seed,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }  # fmt: skip
    return EditSequence(method, pd.DataFrame(rows), pd.DataFrame(states), all_of_them, origin)


def _check(cases: Sequence[EditCase], looks: Sequence[int]) -> None:
    if not cases or not looks:
        raise SettingError(f"{len(cases)} cases, {len(looks)} looks: give at least one of each.")
    check_targets(cases[: looks[-1]])
    prompts: dict[str, int] = {}
    for i, case in enumerate(cases[: looks[-1]]):
        if prompts.setdefault(case.prompt, i) != i:
            raise SettingError(f"Case {i}: {case.prompt!r:.120} is edited by case {prompts[case.prompt]} already.")


def _apart(cases: Sequence[EditCase]) -> list[EditCase]:
    """The cases without neighbours and other prompts that another case edits."""
    edited = {case.prompt for case in cases}
    beside = ("neighbours", "same_subject", "other_subjects")
    apart = []
    for case in cases:
        left = {name: tuple(text for text in getattr(case, name) if text not in edited) for name in beside}
        apart.append(replace(case, **left))
    return apart


def _sum(before: Edit | None, made: Edit) -> Edit:
    """Two edits as one, the second having been made on top of the first; neither is in the weights now."""
    if before is None:
        return made
    deltas = _merged(before.deltas, made.deltas, torch.add)
    facts = (*before.facts, *made.facts)
    return replace(
        made,
        facts=facts,
        targets=(*before.targets, *made.targets),
        templates=(*before.templates, *made.templates),
        layers=tuple(sorted(deltas)),
        parameters={**made.parameters, "model": before.parameters["model"], "one_after_another": len(facts)},
        deltas=deltas,
        kept=_merged(before.kept, made.kept, lambda *keys: torch.cat(keys)),
        keys=None,
        values=None,
        nll=max(before.nll, made.nll),
        nll_prefixed=None,
        objective=max(before.objective, made.objective),
        seconds=before.seconds + made.seconds,
        rounding=lost_by_rounding(made.model.network, deltas),
        details={},
    )


def _merged(
    one: Mapping[int, Tensor], other: Mapping[int, Tensor], both: Callable[[Tensor, Tensor], Tensor]
) -> dict[int, Tensor]:
    """What two edits have of each layer; `both` of those that are in both."""
    return {**one, **{layer: both(one[layer], new) if layer in one else new for layer, new in other.items()}}


def _rows(
    cases: Sequence[EditCase], asked: Mapping[int, Asked], before: Mapping[int, Measured],
    after: Mapping[int, Measured], n: int, which: Mapping[str, range], method: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """The scores of the first and of the last edits, and of the unedited model beside them."""
    rows: list[dict[str, Any]] = []
    for name, numbers in which.items():
        for run, found in (("unedited", before), (method, after)):
            for i in numbers:
                head = {"edits": n, "which": name, "run": run, "case": i, **cases[i].told}
                rows.append({**head, **case_scores(asked[i], before[i], found[i])})
    return rows


def _state(
    model: Model, edit: Edit | None, n: int, text: Int[Tensor, "N T"], failed: int, seconds: float
) -> dict[str, Any]:
    """A row of `states`; the edit is in the weights now."""
    change, weights = 0.0, 1.0
    if edit is not None:
        change = math.sqrt(sum(float(delta.double().square().sum()) for delta in edit.deltas.values()))
        own = [model.network.layers[layer].W_out.double() - delta.double() for layer, delta in edit.deltas.items()]
        weights = math.sqrt(sum(float(one.square().sum()) for one in own))
    found = {"edits": n, "perplexity": perplexity(model, text), "norm": change / weights}
    return {**found, "failed": failed, "seconds": seconds}


@torch.no_grad()
def perplexity(model: Model, texts: Int[Tensor, "N T"]) -> float:
    """The exponential of the mean loss of every token but each text's first; nothing comes before the texts."""

    def work(part: slice) -> Tensor:
        logs = model.logits(texts[part])[:, :-1].float().log_softmax(-1)
        return -logs.gather(-1, texts[part, 1:, None])[..., 0]

    return float(torch.cat([*by_prompts(model.network, texts, work)]).double().mean().exp())
