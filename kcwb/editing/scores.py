"""Did an edit work, did it generalise, and what else did it change: the scores of CounterFact (arXiv 2202.05262).

With P the probability of an object given a prompt, the geometric mean over its tokens:

- efficacy, ES: P(new) > P(true) on the prompt; EM: P(new) - P(true) there;
- paraphrase, PS and PM: the same on other wordings of it;
- neighbourhood, NS: P(true) > P(new) on the same prompt about other subjects with the same true object; NM: P(true) -
  P(new) there;
- S: the harmonic mean of the three shares over a set of edits;
- what the model says (QAEdit, arXiv 2502.11177): its likeliest continuation, token by token, up to the first full stop
  or end of line. `generated`: that this is the new object, by SQuAD's rules, which QAEdit's code takes: lower case, no
  punctuation, no articles, single spaces. `begins`: that it begins with the new object's words, since a prompt such as
  "The capital of France is" may go on after it. Both of paraphrases, too; NaN where the object has a full stop in it,
  or nothing but articles and punctuation. ES and its like compare two objects and are told both; these nothing;
- bleed-over: the share of prompts of other relations whose likeliest next token is another one after the edit, about
  the same subject and about others;
- portability: P(composed new) > P(composed true) on a prompt that needs the edited fact for one of two steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.editing.answers import STOPS, says, words
from kcwb.editing.cases import EditCase, check_targets
from kcwb.editing.edit import Edit, EditError, check_edits, edit
from kcwb.editing.partial_runs import make_rows
from kcwb.editing.registry import edit_method, many_at_once
from kcwb.editing.writing import continuations, text_tokens
from kcwb.errors import DataError, SettingError
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.progress import Progress, track
from kcwb.settings import Count, Natural, Seed
from kcwb.statistics import mean_interval, proportion_interval, statistic_interval
from kcwb.tasks.tokens import answer_tokens, padded
from kcwb.verbs import verb

#: What `edit_scores` reports of each edit.
SCORES = (
    "ES", "PS", "NS", "EM", "PM", "NM", "generated", "generated_paraphrase", "begins", "begins_paraphrase",
    "bleed_subject", "bleed_other", "portability",
)  # fmt: skip
#: Scores of which each case has one, a hit or a miss.
_SINGLE = ("ES", "generated", "begins")


@overload
def generate(model: Model, text: str, tokens: Count = 12) -> str: ...
@overload
def generate(model: Model, text: Sequence[str], tokens: Count = 12) -> list[str]: ...
@verb
def generate(model: Model, text: str | Sequence[str], tokens: Count = 12) -> str | list[str]:
    """The likeliest continuation of a text, token by token, up to the context's end; the text itself is left out.

    Of several texts, a list: they are written side by side, each as if alone.

    Raises
    ------
    DataError
        If a text fills the context, or has no token.
    """
    written = continuations(model, [text] if isinstance(text, str) else text, tokens)
    return written[0] if isinstance(text, str) else written


class Asked:
    """The prompts of one case, in the order in which they are scored."""

    def __init__(self, model: Model, case: EditCase) -> None:
        answers = case.target, case.fact.object
        asked = {"ES": (case.prompt,), "PS": case.paraphrases, "NS": case.neighbours}
        pairs = [(kind, text, *answers) for kind, texts in asked.items() for text in texts]
        pairs += [("portability", *composition) for composition in case.compositions]
        self.kinds = np.array([kind for kind, *_ in pairs])
        space = case.fact.space
        self.rows = [_row(model, text, answer, space) for _, text, *both in pairs for answer in both]
        self.plain = [_row(model, text, None) for text in (*case.same_subject, *case.other_subjects)]
        self.n_same = len(case.same_subject)
        self.target = case.target
        unsayable = any(stop in case.target for stop in STOPS) or not words(case.target)
        self.questions = () if unsayable else (case.prompt, *case.paraphrases)

    def probabilities(self, model: Model) -> Float[np.ndarray, "prompts 2"]:
        """P of the new and of the true object."""
        lengths = [len(answer) for _, answer in self.rows]
        logs = torch.cat([logits.log_softmax(-1) for logits in _answer_logits(model, self.rows)])
        tokens = torch.tensor([token for _, answer in self.rows for token in answer], device=logs.device)
        each = logs.gather(-1, tokens[:, None])[:, 0].split(lengths)
        return torch.stack([log.mean().exp() for log in each]).reshape(-1, 2).cpu().numpy()

    def likeliest(self, model: Model) -> Int[np.ndarray, " prompts"]:
        """The likeliest next token of each prompt of other relations."""
        found = [logits.argmax(-1) for logits in _answer_logits(model, self.plain)]
        return torch.cat(found).cpu().numpy() if found else np.zeros(0, dtype=int)

    def said(self, written: Sequence[str]) -> dict[str, float]:
        """Whether what was written is the new object, on the prompt and on paraphrases; NaN where nothing was asked."""
        found = np.array([says(text, self.target) for text in written], dtype=float).reshape(-1, 2).T
        means: dict[str, float] = {}
        for name, hits in zip(("generated", "begins"), found, strict=True):
            means |= {name: _mean(hits[:1]), f"{name}_paraphrase": _mean(hits[1:])}
        return means


Measured = tuple[Float[np.ndarray, "prompts 2"], Int[np.ndarray, " prompts"], dict[str, float]]
_Tokens = tuple[list[int], list[int]]


def measure(model: Model, asked: Sequence[Asked], tokens: int) -> list[Measured]:
    """All that the scores of some cases are made of, by the weights as they are now; all texts are written together."""
    texts = [text for one in asked for text in one.questions] if tokens else []
    written = iter(continuations(model, texts, tokens, STOPS) if texts else [])
    said = [one.said(list(islice(written, len(one.questions)))) for one in asked]
    return [(one.probabilities(model), one.likeliest(model), text) for one, text in zip(asked, said, strict=True)]


def _row(model: Model, text: str, answer: str | None, space: bool = True) -> _Tokens:
    """Tokens of a prompt and of its answer as they follow it; DataError where they do not fit."""
    prompt = text_tokens(model, text)
    tokens = [] if answer is None else answer_tokens(model, "{}", text, answer, space)
    width = len(prompt + tokens[:-1])
    if width > model.network.n_ctx:
        raise DataError(f"A prompt has {width} tokens with its answer; {model.name} reads {model.network.n_ctx}.")
    return prompt, tokens


@torch.no_grad()
def _answer_logits(model: Model, rows: Sequence[_Tokens]) -> Iterator[Float[Tensor, "A V"]]:
    """Per chunk of rows, the logits that predict their answers' tokens (without an answer, the next token)."""
    if not rows:
        return
    tokens = padded([prompt + answer[:-1] for prompt, answer in rows], model.device)

    def work(part: slice) -> Tensor:
        residual = forward(model.network, tokens[part]).residual
        streams = [x[len(p) - 1 : len(p) - 1 + max(1, len(a))] for x, (p, a) in zip(residual, rows[part], strict=True)]
        return model.network.logits(torch.cat(streams)).float()

    yield from by_prompts(model.network, tokens, work)


@verb
def edit_scores(
    model: Model,
    cases: Sequence[EditCase],
    method: str | Mapping[str, Mapping[str, Any]] = "rome",
    *,
    layer: int | Sequence[int] | None = None,
    batch: Count = 1,
    tokens: Natural = 20,
    seed: Seed = 0,
    progress: Progress = True,
    **settings: Any,
) -> pd.DataFrame:
    """Make each edit, score it, and take it out again; the unedited model is scored beside it.

    An edit whose loss stays high is scored like any other (`bound` is infinite): leaving it out would flatter the
    method. One that diverges, or that a `bound` given here refuses, counts as one that changed nothing. What cannot be
    asked is refused before the first edit.

    Parameters
    ----------
    model, cases
        The model, and the edits, from `edit_cases` or `load_counterfact`.
    method, layer, seed, settings
        As in `kcwb.editing.edit.edit`; the layer one for all, or one for each case. Or several methods, each with
        settings of its own, `{"rome": {"prefixes": 5}, "ft_m": {}}`, beside which the unedited model is asked once.
    batch
        How many edits go in at once; more than one for editors that take many (`memit`, `alphaedit`), in one layer.
    tokens
        How many tokens the model writes at most where it is asked what it says; 0 for not asking.

    Returns
    -------
    DataFrame
        A row per case and `run`, which is `unedited` or a method's name; `case`, `relation`, `subject`, `true`,
        `target`, the scores (see the module's text; NaN where a case has no such prompts), `nll` (`Edit.nll`: of the
        target, by the edited weights; of a batch the worst) and `seconds`. `score_summary` makes means with intervals
        of it.

    Raises
    ------
    SettingError
        If there are no cases or methods, a method cannot take so many at once, there are as many layers as neither one
        nor the cases, a layer or a setting cannot be meant, or a case's target is its true object.
    ModelError
        If the model's family cannot be edited.
    DataError
        If a prompt of any case does not fit into the context, or an answer runs into its prompt.
    """
    methods = {method: {}} if isinstance(method, str) else method
    if not cases or not methods or (batch > 1 and not all(edit_method(name).many for name in methods)):
        raise SettingError(
            f"{len(methods)} editors, {len(cases)} cases in batches of {batch}: at least one of each, and batches for "
            f"{many_at_once()} alone."
        )
    layers = [layer] * len(cases) if layer is None or isinstance(layer, int) else [*layer]
    if len(layers) != len(cases) or (batch > 1 and len({*layers}) > 1):
        raise SettingError(
            f"{len(layers)} layers for {len(cases)} cases in batches of {batch}: give one for all, or, without "
            "batches, one for each."
        )
    check_targets(cases)
    for i, case in enumerate(cases):
        if case.fact.subject in [one.fact.subject for one in cases[i - i % batch : i]]:
            raise SettingError(f"Case {i}: {case.fact.subject!r:.60} is in its batch of {batch} before; take batch=1.")
    for name, own in methods.items():
        check_edits(model, name, *layers, **{**settings, **own})
    make_rows(model, [(case.wanted, case.template) for case in cases])
    each = {case: Asked(model, case) for case in cases}  # a case may come again, for another layer
    before_each = dict(zip(each, measure(model, [*each.values()], tokens), strict=True))
    rows: list[dict[str, Any]] = []
    with track(progress, len(cases) * len(methods), f"{', '.join(methods)} edits") as step:
        for start in range(0, len(cases), batch):
            part = cases[start : start + batch]
            asked, before = [each[case] for case in part], [before_each[case] for case in part]
            runs: dict[str, tuple[list[Measured], dict[str, float]]] = {"unedited": (before, {})}
            for name, own in methods.items():
                runs[name] = before, {"nll": math.nan, "seconds": math.nan}
                made = try_edit(model, part, name, layers[start], seed, {**settings, **own})
                if made is not None:
                    with made:
                        after = measure(model, asked, tokens)
                    runs[name] = after, {"nll": made.nll, "seconds": made.seconds / len(part)}
                step(len(part), part[-1].fact.subject)
            for i, case in enumerate(part):
                head = {"case": start + i, **case.told}
                for run, (found, cost) in runs.items():
                    rows.append({**head, "run": run, **case_scores(asked[i], before[i], found[i]), **cost})
    return pd.DataFrame(rows)


def try_edit(
    model: Model, cases: Sequence[EditCase], method: str, layer: int | None, seed: int, settings: dict[str, Any]
) -> Edit | None:
    """The edit; None if it diverged."""
    facts, targets, templates = zip(*((case.fact, case.target, case.template) for case in cases), strict=True)
    more = {"layer": layer, "seed": seed, "bound": math.inf, "progress": False, **settings}
    try:
        return edit(model, facts, targets, method, template=templates, **more)
    except EditError:
        return None


def case_scores(asked: Asked, before: Measured, after: Measured) -> dict[str, float]:
    """One case's scores: means over its prompts of each kind."""
    new, true = after[0].T
    found = dict(after[2])
    for kind, magnitude, wanted, other in (("ES", "EM", new, true), ("PS", "PM", new, true), ("NS", "NM", true, new)):
        here = asked.kinds == kind
        found[kind] = _mean(wanted[here] > other[here])
        found[magnitude] = _mean(wanted[here] - other[here])
    here = asked.kinds == "portability"
    found["portability"] = _mean(new[here] > true[here])
    changed = before[1] != after[1]
    found["bleed_subject"], found["bleed_other"] = _mean(changed[: asked.n_same]), _mean(changed[asked.n_same :])
    return {name: found[name] for name in SCORES}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def layer_sweep(
    model: Model,
    cases: Sequence[EditCase],
    layers: Sequence[int],
    method: str = "rome",
    *,
    seed: int = 0,
    progress: Progress = True,
    **settings: Any,
) -> pd.DataFrame:
    """Find the layer to edit: `edit_scores` at each of some layers, on the same edits.

    Take other facts than those that the best layer is then reported on.

    Returns
    -------
    DataFrame
        One row per layer: `layer`, `n`, `S`, and the mean of each score. A layer that is given twice is tried once.
    """
    of_each = [layer for layer in dict.fromkeys(layers) for _ in cases]
    repeated = [*cases] * len(set(layers))
    table = edit_scores(model, repeated, method, layer=of_each, seed=seed, progress=progress, **settings)
    edited = table[table["run"] == method].assign(layer=of_each)
    rows = []
    for layer, part in edited.groupby("layer", sort=False):
        means = score_summary(part, seed).set_index("score")["mean"]
        rows.append({"layer": layer, "n": len(cases), **means.to_dict()})
    return pd.DataFrame(rows)


@verb
def score_summary(table: pd.DataFrame, seed: Seed = 0) -> pd.DataFrame:
    """Means over cases of the scores of `edit_scores`, with 95% intervals over cases.

    Returns
    -------
    DataFrame
        One row per `run` and `score` (S first): `n` (cases that have it), `mean`, `low`, `high`. The intervals of ES,
        `generated` and `begins`, one hit or miss per case, are Wilson's of the share of cases. Others are the
        bootstrap's: of the mean over cases, and for S of the harmonic mean of the three means, cases resampled whole
        (NaN where all cases agree).
    """
    rows = []
    for run, part in table.groupby("run", sort=False):
        shares = part[["ES", "PS", "NS"]].to_numpy(float)
        rows.append((run, "S", len(part), *_harmonic(shares, seed)))
        for score in (name for name in SCORES if name in part):
            values = part[score].dropna().to_numpy(float)
            ends = proportion_interval(values) if score in _SINGLE else mean_interval(values, seed)
            rows.append((run, score, len(values), _mean(values), *ends))
    return pd.DataFrame(rows, columns=["run", "score", "n", "mean", "low", "high"])


def _harmonic(shares: Float[np.ndarray, "cases 3"], seed: int) -> tuple[float, float, float]:
    """The harmonic mean of three means, and its bootstrap interval over cases; NaN where a score is missing."""

    def mean(*scores: np.ndarray, axis: int = -1) -> np.ndarray:
        return 3 / np.sum([1 / np.nanmean(score, axis) for score in scores], axis=0)

    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # all cases lack a score
        return float(mean(*shares.T)), *statistic_interval([*shares.T], mean, seed)
