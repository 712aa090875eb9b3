"""Why a model gets a fact wrong: one prompt, followed from its subject to its answer.

The right answer and its **rival**, the likeliest token but the right one, are followed (`kcwb.reading.trajectories`):

- **When.** The logit lens (`kcwb.reading.lens`) of both after each layer, at END and at the subject's tokens.
- **Which failure.** Among the ten likeliest tokens at one of the subject's tokens, after any layer, the object has been
  recalled. If it never is, the failure is one of *enrichment*; if it is, and END loses it, one of *selection*. The lens
  sees what the unembedding can read and no more, so beside it stands how many facts that the model gets right pass the
  same test: where few of them do, it tells nothing.
- **Who.** Every head's direct logit attribution by source (`kcwb.reading.dla`) to both tokens. Mover heads are those
  of the relation's *other* facts: the fact at hand has no say in who is looked at.

Knowledge Circuits (arXiv 2405.17969) follows one wrong answer and finds that a mover head brings the wrong information
to END. That is what `Diagnosis.heads` and `Diagnosis.balance` put in numbers; beside this module, `prediction` asks
whether it is so in general, and `rescue` whether it is the cause.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from kcwb.errors import DataError, SettingError, choose
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.dla import Attribution, attribute, head_outputs, named_heads, top_tokens
from kcwb.reading.lens import arrival
from kcwb.reading.positions import check_prompts, position_groups, token_text, told_at_end, without_copies
from kcwb.reading.roles import circuit_heads, strongest_movers
from kcwb.reading.trajectories import WHERE, WHO, Trajectories, read_trajectories
from kcwb.settings import Count, Seed
from kcwb.studies.hallucination.description import describe
from kcwb.tasks.prompts import Prompts, encode
from kcwb.tasks.relations import Fact, Relation, load_relation, require_subjects
from kcwb.tasks.task import Task, make_task
from kcwb.verbs import verb

FAILURES = ("none", "enrichment", "selection")
#: Other facts that mover heads are told apart on, at least.
FEWEST_FACTS = 4
_TOP_TOKENS = 5


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Why the model answers as it does; made by `diagnose`.

    Attributes
    ----------
    relation, template, prompt, fact
        What was asked.
    right
        Whether the answer is right.
    gold, rival
        The texts of the right answer's first token and of its rival: what the model says where it is wrong, the
        likeliest wrong answer where it is right.
    failure
        One of `FAILURES`; `none` where the answer is right.
    answers
        One row for each of `WHO`: `token`, `rank`, `probability`, `logit` (above the mean), and for each of `WHERE` the
        first layer after which it is among the ten likeliest tokens (NA: never) and its best rank.
    lens
        Long, as `kcwb.reading.lens.lens` has it: `layer`, `quantity` (`rank`, `probability`), `who`, `where`, `value`.
    heads
        One row per head, those that speak most for the rival against the right answer first: `node`, `layer`, `head`,
        `mover`; `gold`, `rival`: what it writes towards both (logits, direct); `gold_subject`, `rival_subject`,
        `gold_relation`, `rival_relation`: through these positions; `difference`: rival - gold; `attention_subject`;
        `source`: the token through which it writes most towards the two, `attention_source`, `writes`: what its output
        raises most.
    balance
        Who decides: `part` (`movers`, `other heads`, `MLPs and the rest`, `all`), `heads`, `gold`, `rival`,
        `difference`; the parts add up to `all`, the logits above the mean.
    recalled
        Among the relation's other facts that the model gets right: how many pass the test of recall, and how many
        there are (0 of 0 where none was at hand).
    words
        The same as a paragraph of plain text.
    """

    relation: str
    template: str
    prompt: str
    fact: Fact
    right: bool
    gold: str
    rival: str
    failure: str
    answers: pd.DataFrame
    lens: pd.DataFrame
    heads: pd.DataFrame
    balance: pd.DataFrame
    recalled: tuple[int, int]
    words: str

    @property
    def movers(self) -> pd.DataFrame:
        """The rows of `heads` that are movers, the strongest first."""
        some = self.heads[self.heads["mover"]]
        order = some[["gold", "rival"]].abs().sum(axis=1).sort_values(ascending=False, kind="stable").index
        return some.loc[order].reset_index(drop=True)

    def __repr__(self) -> str:
        """One line: what was asked, and how it went."""
        verdict = "right" if self.right else f"wrong ({self.failure} failure)"
        return f"Diagnosis({self.prompt!r:.100} -> {self.fact.object!r:.60}: {verdict})"


@verb
def diagnose(
    model: Model,
    relation: Relation | str,
    fact: Fact | str,
    *,
    template: int | str = 0,
    movers: Count | Sequence[str] = 10,
    n: Count = 8,
    seed: Seed = 0,
    progress: Progress = True,
) -> Diagnosis:
    """Follow one prompt from its subject to its answer, and say where it goes wrong.

    Parameters
    ----------
    model
        The full model is run.
    relation
        A Relation, the name of one that comes with the package, or the path of a file.
    fact
        A subject of the relation, or any Fact of that kind.
    template
        The index of one of the relation's zero-shot templates, or a template with `{}`.
    movers
        How many mover heads are told apart, those of the relation's other facts with the largest D_S; or their names.
    n
        On how many other facts, which the model knows, the movers are found and the test of recall is tried.

    Returns
    -------
    Diagnosis
        See there; it can be made for a right answer, too.

    Raises
    ------
    DataError
        If the object begins with one of the subject's own tokens, or with the token of another object of the relation;
        or there are too few other facts to find movers on.
    CircuitError
        If a named mover is not a head of the model.
    SettingError
        If the relation has no such subject, or a number or the template cannot be meant.
    """
    model.network.require("roles")
    relation = load_relation(relation) if isinstance(relation, str) else relation
    require_subjects(relation, "A diagnosis")
    text = relation.template(template)
    if isinstance(fact, str):
        facts = {one.subject: one for one in relation.facts}
        fact = facts[choose(f"The subject in {relation.name}", fact, facts)]
    if not isinstance(movers, int):
        named_heads(model, movers)
    elif n < FEWEST_FACTS:
        raise SettingError(
            f"n={n}: at least {FEWEST_FACTS} other facts tell movers apart. Raise n, or name the movers."
        )
    prompts = encode(model, [fact], text, relation.objects)
    check_prompts(prompts)
    prompts = without_copies(model, told_at_end(prompts))
    with track(progress, 4, "diagnosis") as step:
        others = _other_facts(model, relation, fact, text, n, seed, needed=isinstance(movers, int))
        names = list(movers) if not isinstance(movers, int) else _movers(model, others, movers, seed)
        step(note="mover heads")
        readings = read_trajectories(model, prompts)
        step(note="lens")
        found = attribute(model, prompts, readings.tokens)
        heads = _head_table(model, prompts, found, names)
        step(note="heads")
        recalled = _recall_of(model, others)
        step(note="other facts")
    gold, rival = (token_text(model, token) for token in readings.tokens[0].tolist())
    right = bool(readings.right[0])
    failure = "none" if right else "selection" if bool(readings.recalled[0]) else "enrichment"
    made = Diagnosis(
        relation=relation.name,
        template=text,
        prompt=prompts.texts[0],
        fact=fact,
        right=right,
        gold=gold,
        rival=rival,
        failure=failure,
        answers=_answer_table(readings, (gold, rival)),
        lens=_lens_table(readings),
        heads=heads,
        balance=_balance(heads, readings.logits[0]),
        recalled=recalled,
        words="",
    )
    return replace(made, words=describe(made))


# --- other facts ---


def _other_facts(
    model: Model, relation: Relation, fact: Fact, template: str, n: int, seed: int, needed: bool
) -> Task | None:
    """A task of the relation's other facts; None where there are none to be had and they are not needed."""
    rest = tuple(other for other in relation.facts if other.subject != fact.subject)
    try:
        if len(rest) < FEWEST_FACTS:
            raise DataError(f"{relation.name} has {len(rest)} other facts; at least {FEWEST_FACTS} tell movers apart.")
        return make_task(model, replace(relation, facts=rest), n=n, seed=seed, template=template)
    except DataError as error:
        if needed:
            raise DataError(f"{error} Mover heads can also be named: movers=['a<layer>.h<head>', ...].") from error
        return None


def _movers(model: Model, others: Task | None, most: int, seed: int) -> list[str]:
    assert others is not None  # they are needed where movers are not named
    if len(others.val) < FEWEST_FACTS:
        raise DataError(
            f"{model.name} knows {len(others.val)} other facts of {others.relation.name} in {others.template!r:.120}; "
            f"at least {FEWEST_FACTS} tell movers apart. Raise n, take another template, or name them: movers=[...]."
        )
    return strongest_movers(model, others, most, seed)


def _recall_of(model: Model, others: Task | None) -> tuple[int, int]:
    """How many of the other facts that are answered right have been recalled at the subject, and how many there are."""
    if others is None:
        return 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of facts that are left out
        table = arrival(model, others, progress=False)
    table = table[table["rank"] == 1]
    return int(table["at_subject"].notna().sum()), len(table)


# --- tables ---


def _answer_table(readings: Trajectories, texts: Sequence[str]) -> pd.DataFrame:
    never = readings.ranks.shape[1] - 1
    table = pd.DataFrame(
        {
            "who": WHO,
            "token": texts,
            "rank": readings.ranks[0, -1, 0].tolist(),
            "probability": readings.probabilities[0, -1, 0].tolist(),
            "logit": readings.logits[0].tolist(),
        }
    )
    for w, where in enumerate(WHERE):
        arrives = pd.Series(readings.arrival[w, 0].tolist(), dtype="Int64")
        table[f"arrives, {where}"] = arrives.mask(arrives == never)
        table[f"best rank, {where}"] = readings.ranks[w, :, 0].amin(0).tolist()
    return table


def _lens_table(readings: Trajectories) -> pd.DataFrame:
    parts = []
    for quantity, values in (("rank", readings.ranks), ("probability", readings.probabilities)):
        for (w, where), (i, who) in itertools.product(enumerate(WHERE), enumerate(WHO)):
            layers = {"layer": range(-1, values.shape[1] - 1)}
            about = {"quantity": quantity, "who": who, "where": where}
            parts.append(pd.DataFrame({**layers, **about, "value": values[w, :, 0, i].float().tolist()}))
    return pd.concat(parts, ignore_index=True)


def _head_table(model: Model, prompts: Prompts, found: Attribution, movers: Sequence[str]) -> pd.DataFrame:
    """What every head writes towards both tokens, and from where, on a single prompt."""
    heads = named_heads(model, circuit_heads(model, None))
    table = pd.DataFrame(heads, columns=["node", "layer", "head"])
    table["mover"] = table["node"].isin(movers)
    total = found.total[:, :, 0].flatten(0, 1)
    by_group = found.by_group(position_groups(prompts))[:2, :, :, 0].flatten(1, 2)
    for i, name in enumerate(("gold", "rival")):
        table[name] = total[:, i].tolist()
        table[f"{name}_subject"], table[f"{name}_relation"] = by_group[0, :, i].tolist(), by_group[1, :, i].tolist()
    table["difference"] = table["rival"] - table["gold"]
    attention = found.attention[:, :, 0].flatten(0, 1)
    inside = position_groups(prompts)[0, 0].to(attention.dtype)
    table["attention_subject"] = (attention @ inside).tolist()
    source = found.by_source[:, :, 0].flatten(0, 1).abs().sum(-1).argmax(-1)
    words = [token_text(model, token) for token in prompts.tokens[0].tolist()]
    table["source"] = [words[position] for position in source.tolist()]
    table["attention_source"] = attention.gather(-1, source[:, None])[:, 0].tolist()
    table["writes"] = top_tokens(model, head_outputs(model.network, found)[:, :, 0].flatten(0, 1), _TOP_TOKENS)
    order = table["difference"].sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _balance(heads: pd.DataFrame, logits: Float[Tensor, " 2"]) -> pd.DataFrame:
    """Both logits as the sum of movers, other heads, and everything else."""
    rows = []
    for part, some in (("movers", heads[heads["mover"]]), ("other heads", heads[~heads["mover"]])):
        rows.append((part, len(some), some["gold"].sum(), some["rival"].sum()))
    whole = logits.tolist()
    rest = [whole[i] - sum(row[2 + i] for row in rows) for i in range(2)]
    rows += [("MLPs and the rest", 0, *rest), ("all", len(heads), *whole)]
    table = pd.DataFrame(rows, columns=["part", "heads", "gold", "rival"])
    return table.assign(difference=table["rival"] - table["gold"])
