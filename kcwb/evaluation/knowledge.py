"""What a model knows: its Hit@10 and Hit@1 on every fact of a relation, in one template."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd

from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.settings import Count, Seed
from kcwb.tasks.prompts import KNOWN_RANK, encode
from kcwb.tasks.ranks import deciding_tokens
from kcwb.tasks.relations import Fact, Relation, load_relations
from kcwb.tasks.tokens import object_tokens, told_apart
from kcwb.verbs import verb

COLUMNS = ("relation", "category", "template", "facts", "answers", "first_tells", "hit_10", "hit_1")


@verb
def knowledge_table(
    model: Model,
    relations: Sequence[Relation] | None = None,
    *,
    template: int = 0,
    n: Count | None = None,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """How well a model recalls the facts of some relations: one forward pass per fact, none per answer.

    Parameters
    ----------
    model
        The model.
    relations
        Default: all that come with the package.
    template
        The index of the zero-shot template to ask in.
    n
        Ask at most this many facts of each relation, drawn with `seed`; None asks all.
    seed
        Of that draw.
    progress
        Reported per fact.

    Returns
    -------
    DataFrame
        One row per relation, in the order given: `relation`, `category`, `template` (its text), `facts` (how many were
        asked), `answers` (different first tokens among their answers), `first_tells` (the share of the relation's
        objects that their first token tells apart from all others), `hit_10` and `hit_1` (the share of facts whose
        answer has a rank, see `kcwb.tasks.ranks`, of at most 10, or 1). With few different answers a high `hit_10` says
        little: a model that names all of them in any order reaches it.

    Raises
    ------
    SettingError
        If `n` is below 1 or a relation has no such template.
    DataError
        If a prompt does not fit into the model's context, or no fact of a relation can be told apart by tokens (facts
        of which this is so are left out with a warning).
    """
    relations = load_relations() if relations is None else relations
    texts = [relation.template(template) for relation in relations]
    samples = [sample_facts(relation, n, seed) for relation in relations]
    rows = []
    with track(progress, sum(len(facts) for facts in samples), "knowledge") as step:
        for relation, text, facts in zip(relations, texts, samples, strict=True):
            prompts = encode(model, told_apart(model, facts, text, relation), text, relation.objects)
            tokens = object_tokens(model, text, facts[0].subject, relation.objects, facts[0].space)
            decides = deciding_tokens([*tokens], [*tokens.values()], tokens)
            rows.append(
                {
                    "relation": relation.name,
                    "category": relation.relation_type,
                    "template": text,
                    "facts": len(prompts),
                    "answers": len(set(prompts.answers[:, 0].tolist())),
                    "first_tells": decides.count(0) / len(decides),
                    "hit_10": float((prompts.ranks <= KNOWN_RANK).double().mean()),
                    "hit_1": float((prompts.ranks == 1).double().mean()),
                }
            )
            step(len(facts), relation.name)
    return pd.DataFrame(rows, columns=COLUMNS)


def sample_facts(relation: Relation, n: int | None, seed: int) -> list[Fact]:
    """At most n facts of a relation, in its order; None for all."""
    facts = relation.facts
    rows = sorted(random.Random(seed).sample(range(len(facts)), min(n or len(facts), len(facts))))
    return [facts[row] for row in rows]
