"""Did an edit work, did it generalise, and what else did it change: the scores of CounterFact (arXiv 2202.05262).

With P the probability of an object given a prompt, the geometric mean over its tokens:

- efficacy, ES: P(new) > P(true) on the prompt; EM: P(new) - P(true) there;
- paraphrase, PS and PM: the same on other wordings of it;
- neighbourhood, NS: P(true) > P(new) on the same prompt about other subjects with the same true object; NM: P(true) -
  P(new) there;
- S: the harmonic mean of the three shares over a set of edits;
- bleed-over: the share of prompts of other relations whose likeliest next token is another one after the edit, about
  the same subject and about others;
- portability: P(composed new) > P(composed true) on a prompt that needs the edited fact for one of two steps.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.analysis.completeness import proportion_interval
from kcwb.editing.edit import Edit, EditError, edit
from kcwb.errors import DataError, SettingError
from kcwb.models.forward import forward, prompt_chunks
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact, Relation, check_template, load_relation, load_relations

#: Relations with shared objects, from which edits are made where none are named.
RELATIONS = (
    "city_country",
    "landmark_country",
    "country_language",
    "country_currency",
    "musician_instrument",
    "noun_superclass",
    "food_country",
    "person_native_language",
)
#: How a subject's object is described, so that another relation can be asked of it.
_DESCRIPTIONS = {
    "city_country": "the country that has the city of {}",
    "landmark_country": "the country that has the landmark {}",
    "food_country": "the country that has the dish {}",
}
#: What such a description is asked.
_SECOND_STEPS = ("country_capital", "country_language", "country_currency", "country_continent")
#: What `edit_scores` reports of each edit.
SCORES = ("ES", "PS", "NS", "EM", "PM", "NM", "bleed_subject", "bleed_other", "portability")
_RESAMPLES = 9_999
_AT_ONCE = 16  # facts that are asked together


@dataclass(frozen=True)
class EditCase:
    """One edit to be made, and the prompts that judge it.

    Attributes
    ----------
    fact, target, template
        The edit: the true fact, the new object, and the template.
    paraphrases
        The same question in other words.
    neighbours
        Prompts whose answer is the same true object, about other subjects.
    same_subject, other_subjects
        Prompts of other relations, for bleed-over.
    compositions
        (prompt, new object, true object) of a fact that follows from the edited one.
    relation
        The relation's name.
    """

    fact: Fact
    target: str
    template: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    same_subject: tuple[str, ...] = ()
    other_subjects: tuple[str, ...] = ()
    compositions: tuple[tuple[str, str, str], ...] = ()
    relation: str = ""

    @property
    def prompt(self) -> str:
        """The template about the fact's subject."""
        return self.template.replace("{}", self.fact.subject)


def edit_cases(
    model: Model,
    relations: Sequence[Relation | str] = RELATIONS,
    *,
    n: int = 50,
    seed: int = 0,
    template: int = 0,
    rank: int = 1,
    neighbours: int = 5,
    others: int = 5,
    progress: Progress = False,
) -> list[EditCase]:
    """Edits made from relations: facts that the model knows, each with another object of the relation as its target.

    Parameters
    ----------
    model
        Who is to know the facts.
    relations
        Relations or their names; of each, in turn, a fact that has a neighbour.
    n
        How many edits; fewer if there are not as many.
    seed
        Of the draws of facts, targets, neighbours and others.
    template
        The zero-shot template that is edited; the others are paraphrases.
    rank
        A fact is known when the first token of its object has at most this rank.
    neighbours
        How many of the other subjects with the same object are asked, at most.
    others
        How many prompts of other relations and about other subjects.
    progress
        Reported per relation.

    Returns
    -------
    list
        EditCases, of the relations in turn.

    Raises
    ------
    DataError
        If no relation has a fact that is known and has a neighbour.
    """
    if n < 1 or rank < 1 or neighbours < 1:
        raise SettingError(f"n={n}, rank={rank}, neighbours={neighbours}: all must be at least 1.")
    loaded = [load_relation(one) if isinstance(one, str) else one for one in relations]
    everything = load_relations()
    counts = {"neighbours": neighbours, "others": others}
    waiting = [_cases_of(model, one, everything, template, rank, seed, **counts) for one in loaded]
    cases: list[EditCase] = []
    with track(progress, n, "facts") as step:
        while waiting and len(cases) < n:
            for source in list(waiting):
                case = next(source, None)
                if case is None:
                    waiting.remove(source)
                elif len(cases) < n:
                    cases.append(case)
                    step(note=case.relation)
    if not cases:
        names = ", ".join(relation.name for relation in loaded)
        raise DataError(f"{model.name} knows no fact of {names} (rank {rank}) that shares its object with another.")
    return cases


def _cases_of(
    model: Model, relation: Relation, everything: Sequence[Relation], template: int, rank: int, seed: int, *,
    neighbours: int, others: int,
) -> Iterator[EditCase]:  # fmt: skip
    """The edits of one relation, in random order; facts are asked a few at a time, as they are needed."""
    templates = relation.prompt_templates_zs
    if not 0 <= template < len(templates):
        raise SettingError(f"template={template}: {relation.name} has 0 to {len(templates) - 1}.")
    draw = random.Random(f"{seed} {relation.name}")
    apart = [one for one in everything if one.name != relation.name]
    facts = draw.sample(relation.facts, len(relation.facts))
    facts = [fact for fact in facts if any(one.object == fact.object and one != fact for one in relation.facts)]
    for start in range(0, len(facts), _AT_ONCE):
        part = facts[start : start + _AT_ONCE]
        prompts = encode(model, part, templates[template], relation.objects)
        for fact, known in zip(part, (prompts.ranks <= rank).tolist(), strict=True):
            targets = [one for one in relation.objects if one != fact.object]
            if known and targets:
                case = _case(relation, fact, draw.choice(targets), template, apart, draw, neighbours, others)
                yield case


def _case(
    relation: Relation, fact: Fact, target: str, template: int, apart: Sequence[Relation], draw: random.Random,
    neighbours: int, others: int,
) -> EditCase:  # fmt: skip
    """One edit with the prompts that judge it; `apart` are the other relations."""
    templates, subject = relation.prompt_templates_zs, fact.subject
    near = [one for one in relation.facts if one.object == fact.object and one != fact]
    near = draw.sample(near, min(neighbours, len(near)))
    same = [one.prompt_templates_zs[0] for one in apart if any(other.subject == subject for other in one.facts)]
    far = [draw.choice(apart) for _ in range(others)]
    strangers = [draw.choice([other.subject for other in one.facts if other.subject != subject]) for one in far]
    return EditCase(
        fact=fact,
        target=target,
        template=templates[template],
        paraphrases=tuple(text.replace("{}", subject) for i, text in enumerate(templates) if i != template),
        neighbours=tuple(templates[template].replace("{}", one.subject) for one in near),
        same_subject=tuple(text.replace("{}", subject) for text in same),
        other_subjects=tuple(
            one.prompt_templates_zs[0].replace("{}", name) for one, name in zip(far, strangers, strict=True)
        ),
        compositions=tuple(_compositions(relation.name, fact, target, apart)),
        relation=relation.name,
    )


def _compositions(name: str, fact: Fact, target: str, everything: Iterable[Relation]) -> Iterator[tuple[str, str, str]]:
    """Second steps from the old and the new object, where both are known to differ."""
    if name not in _DESCRIPTIONS:
        return
    whose = _DESCRIPTIONS[name].replace("{}", fact.subject)
    for relation in everything:
        objects = {one.subject: one.object for one in relation.facts}
        old, new = objects.get(fact.object), objects.get(target)
        if relation.name in _SECOND_STEPS and old and new and old != new:
            yield relation.prompt_templates_zs[0].replace("{}", whose), new, old


def load_counterfact(path: str | Path) -> list[EditCase]:
    """Read edits from a file in the format of CounterFact: a JSON list of records.

    Of a record, `requested_rewrite` (`prompt`, `subject`, `target_new.str`, `target_true.str`), `paraphrase_prompts`
    and `neighborhood_prompts` are read.

    Raises
    ------
    DataError
        If the file cannot be read or a record lacks something; names the file and the record.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: expected a list of records, as in CounterFact.")
    return [_counterfact_case(record, f"{path}, record {i}") for i, record in enumerate(records)]


def _counterfact_case(record: Any, where: str) -> EditCase:
    try:
        asked = record["requested_rewrite"]
        texts = [asked["prompt"], asked["subject"], asked["target_true"]["str"], asked["target_new"]["str"]]
        near, other = record["neighborhood_prompts"], record["paraphrase_prompts"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: {error} is missing or is not what CounterFact has there.") from error
    if not all(isinstance(text, str) and text.strip() for text in [*texts, *near, *other]):
        raise DataError(f"{where}: prompts, subject and targets must be texts that are not empty.")
    template, subject, true, new = texts
    return EditCase(
        fact=Fact(subject.strip(), true.strip()),
        target=new.strip(),
        template=check_template(template.strip(), f"{where}, prompt"),
        paraphrases=tuple(text.strip() for text in other),
        neighbours=tuple(text.strip() for text in near),
    )


def generate(model: Model, text: str, tokens: int = 12) -> str:
    """The likeliest continuation of a text, token by token; the text itself is left out."""
    bos: list[Any] = [model.tokenizer.bos_token_id] if model.prepend_bos else []
    ids = torch.tensor([bos + list(model.tokenizer(text, add_special_tokens=False)["input_ids"])], device=model.device)
    module: Any = model.bridge.original_model
    more = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": model.tokenizer.pad_token_id}
    with torch.no_grad():
        found = module.generate(ids, attention_mask=torch.ones_like(ids), **more)
    return str(model.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


class _Asked:
    """The prompts of one case, in the order in which they are scored."""

    def __init__(self, model: Model, case: EditCase) -> None:
        new, true = case.target, case.fact.object
        pairs = [(case.prompt, new, true)]
        pairs += [(text, new, true) for text in (*case.paraphrases, *case.neighbours)]
        pairs += case.compositions
        self.kinds = np.array(
            ["ES"]
            + ["PS"] * len(case.paraphrases)
            + ["NS"] * len(case.neighbours)
            + ["portability"] * len(case.compositions)
        )
        self.rows = [row for text, *answers in pairs for row in (_row(model, text, answer) for answer in answers)]
        self.plain = [_row(model, text, None) for text in (*case.same_subject, *case.other_subjects)]
        self.n_same = len(case.same_subject)

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


_Tokens = tuple[list[int], list[int]]


def _row(model: Model, text: str, answer: str | None) -> _Tokens:
    """Tokens of a prompt and of " answer" as they follow it."""
    bos: list[Any] = [model.tokenizer.bos_token_id] if model.prepend_bos else []
    prompt = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if answer is None:
        return bos + prompt, []
    whole = list(model.tokenizer(f"{text} {answer}", add_special_tokens=False)["input_ids"])
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise DataError(f"The answer {answer!r:.60} runs into the last token of {text!r:.120}. Use another template.")
    return bos + prompt, whole[len(prompt) :]


@torch.no_grad()
def _answer_logits(model: Model, rows: Sequence[_Tokens]) -> Iterator[Float[Tensor, "A V"]]:
    """Per chunk of rows, the logits that predict their answers' tokens (without an answer, the next token)."""
    if not rows:
        return
    lists = [prompt + answer[:-1] for prompt, answer in rows]
    width = max(map(len, lists))
    if width > model.network.n_ctx:
        raise DataError(f"A prompt has {width} tokens with its answer; {model.name} reads {model.network.n_ctx}.")
    tokens = torch.tensor([[*one, *[0] * (width - len(one))] for one in lists], device=model.device)
    for part in prompt_chunks(model.network, tokens):
        residual = forward(model.network, tokens[part]).residual
        streams = [x[len(p) - 1 : len(p) - 1 + max(1, len(a))] for x, (p, a) in zip(residual, rows[part], strict=True)]
        yield model.network.logits(torch.cat(streams)).float()


def edit_scores(
    model: Model,
    cases: Sequence[EditCase],
    method: str = "rome",
    *,
    layer: int | None = None,
    batch: int = 1,
    seed: int = 0,
    progress: Progress = True,
    **settings: Any,
) -> pd.DataFrame:
    """Make each edit, score it, and take it out again; the unedited model is scored beside it.

    An edit whose loss stays high is scored like any other: leaving it out would flatter the method. One that diverges
    counts as one that changed nothing.

    Parameters
    ----------
    model, cases
        The model, and the edits, from `edit_cases` or `load_counterfact`.
    method, layer, seed, settings
        As in `kcwb.editing.edit.edit`.
    batch
        memit: how many edits go in at once.
    progress
        Reported per case.

    Returns
    -------
    DataFrame
        Two rows per case, `run` being `unedited` and the method's name; `case`, `relation`, `subject`, `true`,
        `target`, the scores (see the module's text; NaN where a case has no such prompts), `nll` (of the target, at the
        end of optimisation) and `seconds`. `score_summary` makes means with intervals of it.

    Raises
    ------
    SettingError
        If there are no cases, or the method cannot take so many at once.
    """
    if not cases or batch < 1 or (batch > 1 and method != "memit"):
        raise SettingError(f"{len(cases)} cases in batches of {batch}: at least one, and batches for memit alone.")
    rows: list[dict[str, Any]] = []
    with track(progress, len(cases), f"{method} edits") as step:
        for start in range(0, len(cases), batch):
            part = cases[start : start + batch]
            asked = [_Asked(model, case) for case in part]
            before = [(one.probabilities(model), one.likeliest(model)) for one in asked]
            made = _try_edit(model, part, method, layer, seed, settings)
            after = before
            if made is not None:
                with made:
                    after = [(one.probabilities(model), one.likeliest(model)) for one in asked]
            for i, (case, one) in enumerate(zip(part, asked, strict=True)):
                head = {"case": start + i, "relation": case.relation, "subject": case.fact.subject}
                head |= {"true": case.fact.object, "target": case.target}
                rows.append({**head, "run": "unedited", **_scores(one, before[i], before[i])})
                rows.append({**head, "run": method, **_scores(one, before[i], after[i]), **_cost(made, len(part))})
            step(len(part), part[-1].fact.subject)
    return pd.DataFrame(rows)


def _try_edit(
    model: Model, cases: Sequence[EditCase], method: str, layer: int | None, seed: int, settings: dict[str, Any]
) -> Edit | None:
    """The edit; None if it diverged."""
    facts, targets = [case.fact for case in cases], [case.target for case in cases]
    templates = [case.template for case in cases]
    more = {"layer": layer, "seed": seed, "bound": math.inf, "progress": False, **settings}
    try:
        return edit(model, facts, targets, method, template=templates, **more)
    except EditError:
        return None


def _cost(made: Edit | None, n: int) -> dict[str, float]:
    return {"nll": math.nan, "seconds": math.nan} if made is None else {"nll": made.nll, "seconds": made.seconds / n}


def _scores(
    asked: _Asked, before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """One case's scores: means over its prompts of each kind."""
    new, true = after[0].T
    found: dict[str, float] = {}
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
        One row per layer: `layer`, `n`, `S`, and the mean of each score.
    """
    rows = []
    with track(progress, len(layers), f"{method} layers") as step:
        for layer in layers:
            table = edit_scores(model, cases, method, layer=layer, seed=seed, progress=False, **settings)
            means = score_summary(table[table["run"] == method], seed).set_index("score")["mean"]
            rows.append({"layer": layer, "n": len(cases), **means.to_dict()})
            step(note=f"layer {layer}")
    return pd.DataFrame(rows)


def score_summary(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over cases of the scores of `edit_scores`, with 95% bootstrap intervals over cases.

    Returns
    -------
    DataFrame
        One row per `run` and `score` (S first): `n` (cases that have it), `mean`, `low`, `high`.
    """
    rows = []
    for run, part in table.groupby("run", sort=False):
        shares = part[["ES", "PS", "NS"]].to_numpy(float)
        rows.append({"run": run, "score": "S", "n": len(part), **_harmonic(shares, seed)})
        for score in SCORES:
            values = part[score].dropna().to_numpy(float)
            row: dict[str, Any] = {"run": run, "score": score, "n": len(values)}
            if len(values):
                low, high = mean_interval(values, seed)
                row |= {"mean": float(values.mean()), "low": low, "high": high}
            rows.append(row)
    return pd.DataFrame(rows, columns=["run", "score", "n", "mean", "low", "high"])


def mean_interval(values: Float[np.ndarray, " n"], seed: int = 0) -> tuple[float, float]:
    """A 95% interval of a mean: of shares as in `proportion_interval`, else the percentile bootstrap."""
    if len(values) < 2 or bool(((values >= 0) & (values <= 1)).all()):
        return proportion_interval(values, seed)
    means = values[np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _harmonic(shares: Float[np.ndarray, "cases 3"], seed: int) -> dict[str, float]:
    """The harmonic mean of three means, and its bootstrap interval over cases; NaN where a score is missing."""
    draws = np.random.default_rng(seed).integers(len(shares), size=(_RESAMPLES, len(shares)))

    def of(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return 3 / (1 / means).sum(-1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample of cases that all lack a score
        low, high = np.nanquantile(of(np.nanmean(shares[draws], 1)), [0.025, 0.975])
        return {"mean": float(of(np.nanmean(shares, 0))), "low": float(low), "high": float(high)}
