"""Facts asked backwards: a model that knows A -> B need not know B -> A (arXiv 2309.12288).

Each fact whose object has one subject is asked both ways.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count
from kcwb.statistics import proportion_interval
from kcwb.tasks.compose import reverse
from kcwb.tasks.prompts import encode
from kcwb.tasks.relations import Fact, Relation, load_relation
from kcwb.verbs import verb


@verb
def both_ways(
    model: Model,
    relation: Relation | str,
    backwards: Relation | None = None,
    *,
    template: int | str = 0,
    back_template: int | str = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Ask facts forwards and backwards.

    Parameters
    ----------
    model, relation
        A relation, or the name of a packaged one.
    backwards
        The same relation from object to subject; None for `kcwb.tasks.compose.reverse(relation)`.
    template, back_template
        Which zero-shot templates of the two, or templates of one's own.

    Returns
    -------
    DataFrame
        One row per fact that can be asked both ways: `subject`, `object`, and the ranks `forward`, `backward` of the
        answers.
    """
    relation = load_relation(relation) if isinstance(relation, str) else relation
    back = reverse(relation) if backwards is None else backwards
    own = {(fact.subject, name): fact for fact in relation.facts for name in fact.right}
    pairs = [(fact.object, fact.subject) for fact in back.facts]
    facts = [own.get(pair, Fact(*pair, space=fact.space)) for pair, fact in zip(pairs, back.facts, strict=True)]
    asked = {
        "forward": (facts, relation.template(template), relation.objects),
        "backward": (back.facts, back.template(back_template), back.objects),
    }
    ranks = {}
    with track(progress, len(asked), "both ways") as step:
        for way, (some, text, objects) in asked.items():
            ranks[way] = encode(model, some, text, objects).ranks.tolist()
            step(note=way)
    return pd.DataFrame(facts, columns=["subject", "object"]).assign(**ranks)


@verb
def reversal(table: pd.DataFrame, k: Count = 1) -> pd.DataFrame:
    """How many facts of the table of `both_ways` are known each way.

    Returns
    -------
    DataFrame
        Rows `forward`, `backward`, `both`, `backward, of those known forward` and `forward, of those known backward`:
        `known`, `of`, `share` of facts with its 95% Wilson interval `low`, `high` (NaN of none). `p`, in the first
        row: that of McNemar's exact test, two-sided, for as many facts known one way only being known forward as
        backward.
    """
    forward, backward = (table[way].to_numpy() <= k for way in ("forward", "backward"))
    both, every = forward & backward, np.ones(len(table), bool)
    rows = []
    for name, known, among in (
        ("forward", forward, every),
        ("backward", backward, every),
        ("both", both, every),
        ("backward, of those known forward", both, forward),
        ("forward, of those known backward", both, backward),
    ):
        values = known[among]
        share = values.mean() if len(values) else math.nan
        rows.append((name, int(values.sum()), len(values), share, *proportion_interval(values)))
    found = pd.DataFrame(rows, columns=["asked", "known", "of", "share", "low", "high"])
    one_way = int((forward ^ backward).sum())
    p = float(stats.binomtest(int((forward & ~backward).sum()), one_way).pvalue) if one_way else 1.0
    return found.assign(p=[p] + [math.nan] * (len(found) - 1))
