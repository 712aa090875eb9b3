"""Can it be seen, from inside, that an answer is wrong: features of prompts, tried on relations not trained on.

One prompt per fact, over several relations. An answer is wrong if the likeliest token is the first of no right one.
Features of a prompt:

- **deployable**, known without knowing the answer: `max_probability` and `entropy` of the answer (together:
  *confidence*, what any gain is measured from); `attention_subject`, the mean attention of mover heads from END to the
  subject; `movers_predicted`, what movers write towards the predicted token (logits, summed over them);
- **diagnostic**, known only with the right answer, and nearly circular, since they are what a wrong answer is made of:
  `movers_margin`, what movers write towards the right answer minus the likeliest wrong one; `arrival`, the layer after
  which the right answer is first among the ten likeliest tokens at END; `subject_rank`, the logarithm of its best rank
  at the subject's tokens. They say where wrongness sits. They predict nothing, and stand apart in every table.

How they are tried:

1. **One relation is left out at a time.** Movers are chosen on the others (heads that `kcwb.head_roles` calls movers
   there, by their mean D_S over those relations), a logistic regression is fitted on the others (standardised by
   them; scikit-learn's penalty of 1; no class weights: they move the intercept, which ranks nothing), and the prompts
   of the one left out get their probability of being wrong.
2. **AUROC within relations**: the share of pairs of a wrong and a right prompt *of one relation* in which the wrong one
   has the higher probability. Pairs across relations would reward knowing which relations are hard, and since each
   relation's own share of wrong answers is missing from what it was fitted on, they would not even do that fairly.
   `pooled` is the usual AUROC over all pairs, for comparison.
3. **Intervals**: 95% by a bootstrap of two stages, relations and then prompts within them (wrong and right apart). The
   claim is about relations not seen before, so relations are what varies; with few of them intervals are wide. The gain
   over confidence is paired: both from the same resamples. The fits are not repeated in them.
4. **Random heads**: the same with as many other heads of the movers' layers (`kcwb.statistics.matched_head_sets`); `p`
   is the share of draws, the movers counted in, that do as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed, at_least
from kcwb.statistics import chance_range, matched_head_sets, p_value, statistic_interval
from kcwb.studies.hallucination.auroc import pairs_auroc, resampled_aurocs, within_pairs
from kcwb.studies.hallucination.measurement import FEWEST_FACTS, KINDS, Measured, check_labels, measure_answers
from kcwb.tasks.relations import Relation
from kcwb.verbs import verb

CONFIDENCE = ("max_probability", "entropy")
MOVERS = ("attention_subject", "movers_predicted")
DIAGNOSTIC = ("movers_margin", "arrival", "subject_rank")
#: Name -> features, and whether they are deployable.
FEATURE_SETS: dict[str, tuple[tuple[str, ...], bool]] = {
    "confidence": (CONFIDENCE, True),
    "movers: attention": (MOVERS[:1], True),
    "movers: prediction": (MOVERS[1:], True),
    "movers": (MOVERS, True),
    "confidence + movers": (CONFIDENCE + MOVERS, True),
    "diagnostic: margin": (DIAGNOSTIC[:1], False),
    "diagnostic: arrival": (DIAGNOSTIC[1:2], False),
    "diagnostic: subject": (DIAGNOSTIC[2:], False),
    "diagnostic": (DIAGNOSTIC, False),
}
_BASELINE, _FULL = "confidence", "confidence + movers"
#: Sets of which there is a version with random heads.
_CONTROLLED = ("movers", _FULL)
#: A feature that is the same for all training prompts is divided by this, not by zero.
_LEAST_SPREAD = 1e-9


@dataclass(frozen=True, eq=False)
class HallucinationStudy:
    """Whether wrong answers can be told from right ones; made by `predict_wrong`.

    Attributes
    ----------
    scores
        One row per set of features: `features`, `deployable` (False: diagnostic, near-circular); `auroc` within
        relations, `low`, `high`; `gain` over confidence, `gain_low`, `gain_high` (NaN for confidence itself, and for
        diagnostic sets, which confidence is no measure of); `pooled`; `p` against random heads. Rows named `random
        heads` have the means over draws, with 95% of the draws as `low` and `high`.
    relations
        One row per relation: `facts`, `wrong`, the AUROC of every set when it was left out (NaN where all answers are
        right or all wrong), and `mover_heads`, those chosen without it.
    weights
        The standardised coefficients, positive where more of the feature speaks for a wrong answer: `features`,
        `feature`, `mean`, `least`, `most` over the relations left out.
    recall
        By `kind` of answer, and for `wrong` as a whole: `prompts`; `recalled`, the share whose right answer is among
        the ten likeliest tokens at one of the subject's tokens, with `low`, `high`, the 95% bootstrap interval of that
        share over relations (prompts of one relation go together; NaN for one relation, or where all shares agree). Of
        wrong answers, these are failures of selection, the rest of enrichment.
    predictions
        One row per prompt: `relation`, `subject`, `wrong`, and the probability of being wrong by every set.
    measured
        What all of this rests on.
    """

    scores: pd.DataFrame
    relations: pd.DataFrame
    weights: pd.DataFrame
    recall: pd.DataFrame
    predictions: pd.DataFrame
    measured: Measured


@verb
def hallucination_study(
    model: Model,
    relations: Sequence[Relation | str],
    *,
    n: Annotated[int, at_least(FEWEST_FACTS)] = 40,
    template: int = 0,
    movers: Count = 10,
    draws: Annotated[int, at_least(20)] = 100,
    resamples: Annotated[int, at_least(100)] = 2000,
    seed: Seed = 0,
    progress: Progress = True,
) -> HallucinationStudy:
    """Ask a model for facts of several relations, and try whether its wrong answers can be told from its right ones.

    Parameters
    ----------
    model
        The full model is run.
    relations
        Three or more, of which two or more must be answered now right, now wrong.
    n
        Facts of each relation, drawn with `seed`; fewer where it has fewer.
    template
        The index of the zero-shot template to ask in.
    movers
        How many mover heads the features are made of.
    draws
        Random sets of heads.
    resamples
        Of the bootstrap.

    Raises
    ------
    DataError
        If there are no wrong (or no right) answers in two relations, too few facts, or no mover in the relations that
        are left; says how many there are.
    """
    measured = measure_answers(model, relations, n=n, template=template, seed=seed, progress=progress)
    return predict_wrong(measured, movers=movers, draws=draws, resamples=resamples, seed=seed, progress=progress)


# --- whether it can be predicted ---


@verb
def predict_wrong(
    measured: Measured,
    *,
    movers: Count = 10,
    draws: Annotated[int, at_least(20)] = 100,
    resamples: Annotated[int, at_least(100)] = 2000,
    seed: Seed = 0,
    progress: Progress = True,
) -> HallucinationStudy:
    """Try on each relation what the others teach; parameters and errors as in `hallucination_study`."""
    names = measured.relations["relation"].tolist()
    wrong = measured.prompts["wrong"].to_numpy(dtype=bool)
    place = pd.Categorical(measured.prompts["relation"], categories=names).codes.astype(int)
    check_labels({name: wrong[place == i] for i, name in enumerate(names)})
    # 1. each relation left out, with the others' movers and (4.) random heads
    chosen = [_strongest(measured, i, movers) for i in range(len(names))]
    random = _random_sets(measured, chosen, draws, seed)
    with track(progress, 1 + len(random), "leaving relations out") as step:
        found, weights = _out_of_relation(measured, place, wrong, chosen, FEATURE_SETS)
        step()
        chance = []
        for sets in random:
            chance += _out_of_relation(measured, place, wrong, sets, _CONTROLLED)[0].values()
            step()
    # 2. and 3. AUROC within relations, with intervals
    pairs = within_pairs(np.stack(list(found.values())), place, wrong)
    by_chance = pairs_auroc(within_pairs(np.stack(chance), place, wrong)) if chance else np.empty(0)
    return HallucinationStudy(
        scores=_scores(found, wrong, pairs, by_chance.reshape(len(random), len(_CONTROLLED)), resamples, seed),
        relations=_by_relation(measured, list(found), pairs, chosen),
        weights=weights,
        recall=_recall(measured.prompts, seed),
        predictions=pd.concat([measured.prompts[["relation", "subject", "wrong"]], pd.DataFrame(found)], axis=1),
        measured=measured,
    )


def head_features(measured: Measured, heads: Int[np.ndarray, " k"]) -> dict[str, Float[np.ndarray, " N"]]:
    """All features of every prompt, those of movers made of some heads (rows of `L*H`)."""
    gold, rival = measured.gold[:, heads].sum(1), measured.rival[:, heads].sum(1)
    known = {name: measured.prompts[name].to_numpy(dtype=float) for name in (*CONFIDENCE, *DIAGNOSTIC[1:])}
    return known | {
        "attention_subject": measured.attention[:, heads].mean(1),
        "movers_predicted": np.where(measured.prompts["wrong"], rival, gold),
        "movers_margin": gold - rival,
    }


def _strongest(measured: Measured, left_out: int, most: int) -> Int[np.ndarray, " k"]:
    """The movers of all relations but one, by their mean D_S."""
    strengths = np.delete(measured.movers, left_out, axis=0).mean(0)
    order = np.argsort(-strengths, kind="stable")[:most]
    order = order[strengths[order] > 0]
    if not len(order):
        name = measured.relations["relation"].iloc[left_out]
        counts = ", ".join(f"{row.relation}: {row.movers}" for row in measured.relations.itertuples())
        raise DataError(
            f"Without {name} there is no mover head to make features of (movers by relation: {counts}). Add relations "
            f"of which the model knows {FEWEST_FACTS} facts or more, with different answers."
        )
    return order


def _random_sets(
    measured: Measured, chosen: Sequence[Int[np.ndarray, " k"]], draws: int, seed: int
) -> list[list[Int[np.ndarray, " k"]]]:
    """Draws of random heads in the place of each relation's movers; where one has fewer sets, they come round again."""
    graph = measured.graph
    every = pd.Index([name for name in graph.sender_names if graph.node(name).kind == "head"])
    sets = [
        [every.get_indexer(pd.Index(one)) for one in matched_head_sets(graph, every[heads], draws, seed + i)]
        for i, heads in enumerate(chosen)
    ]
    return [[some[draw % len(some)] for some in sets] for draw in range(max(map(len, sets)))] if all(sets) else []


def _out_of_relation(
    measured: Measured, place: Int[np.ndarray, " N"], wrong: Bool[np.ndarray, " N"],
    heads: Sequence[Int[np.ndarray, " k"]], sets: Iterable[str],
) -> tuple[dict[str, Float[np.ndarray, " N"]], pd.DataFrame]:  # fmt: skip
    """The probability of being wrong that each prompt gets from the other relations, by set; and the coefficients."""
    found = {name: np.full(len(wrong), np.nan) for name in sets}
    rows = []
    for i, chosen in enumerate(heads):
        held, features = place == i, head_features(measured, chosen)
        if not held.any():
            continue
        for name in found:
            columns, _ = FEATURE_SETS[name]
            x = np.stack([features[column] for column in columns], 1)
            x = (x - x[~held].mean(0)) / np.maximum(x[~held].std(0), _LEAST_SPREAD)
            fitted = LogisticRegression(max_iter=1000).fit(x[~held], wrong[~held])
            found[name][held] = fitted.predict_proba(x[held])[:, 1]
            rows += [(name, column, value) for column, value in zip(columns, fitted.coef_[0], strict=True)]
    table = pd.DataFrame(rows, columns=["features", "feature", "value"])
    weights = table.groupby(["features", "feature"], sort=False)["value"].agg(mean="mean", least="min", most="max")
    return found, weights.reset_index()


# --- tables ---


def _scores(
    found: Mapping[str, np.ndarray], wrong: Bool[np.ndarray, " N"], pairs: Mapping[int, np.ndarray],
    chance: Float[np.ndarray, "draws c"], resamples: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    names = list(found)
    values, again = pairs_auroc(pairs), resampled_aurocs(pairs, resamples, seed)
    base = names.index(_BASELINE)
    rows = []
    for i, name in enumerate(names):
        low, high = np.quantile(again[:, i], [0.025, 0.975])
        row = {"features": name, "deployable": FEATURE_SETS[name][1], "auroc": values[i], "low": low, "high": high}
        if row["deployable"] and i != base:
            row["gain"] = values[i] - values[base]
            row["gain_low"], row["gain_high"] = np.quantile(again[:, i] - again[:, base], [0.025, 0.975])
        row["pooled"] = roc_auc_score(wrong, found[name])
        if name in _CONTROLLED:
            drawn = chance[:, _CONTROLLED.index(name)]
            row["p"] = p_value(values[i], drawn)
        rows.append(row)
        if name in _CONTROLLED:
            mean, low, high = chance_range(drawn)
            row = {"features": name.replace("movers", "random heads"), "deployable": True, "auroc": mean}
            rows.append({**row, "low": low, "high": high, "gain": mean - values[base]})
    columns = ["features", "deployable", "auroc", "low", "high", "gain", "gain_low", "gain_high", "pooled", "p"]
    return pd.DataFrame(rows, columns=columns)


def _by_relation(
    measured: Measured, names: Sequence[str], pairs: Mapping[int, np.ndarray], chosen: Sequence[np.ndarray]
) -> pd.DataFrame:
    rows, n_heads = [], measured.graph.n_heads
    for i, row in enumerate(measured.relations.to_dict("records")):
        values = pairs[i].mean((1, 2)) if i in pairs else np.full(len(names), np.nan)
        rows.append(
            {"relation": row["relation"], "facts": row["facts"], "wrong": row["wrong"]}
            | dict(zip(names, values, strict=True))
            | {"mover_heads": ", ".join(f"a{head // n_heads}.h{head % n_heads}" for head in chosen[i])}
        )
    return pd.DataFrame(rows)


def _recall(prompts: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How often the right answer can be read at the subject, by what was answered."""
    groups = {kind: prompts["kind"] == kind for kind in KINDS} | {"wrong": prompts["wrong"]}
    rows = []
    for name in (KINDS[0], "wrong", *KINDS[1:]):
        some = prompts[groups[name]]
        row = {"answer": name, "prompts": len(some)}
        if len(some):
            by_relation = some.groupby("relation")["recalled"]
            low, high = statistic_interval([by_relation.sum(), by_relation.size()], _share, seed)
            row |= {"recalled": some["recalled"].mean(), "low": low, "high": high}
        rows.append(row)
    return pd.DataFrame(rows, columns=["answer", "prompts", "recalled", "low", "high"])


def _share(recalled: np.ndarray, prompts: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of the prompts of all relations."""
    return recalled.sum(axis) / prompts.sum(axis)
