"""Head roles: which heads bring the answer to END, and from where they bring it.

By contribution (after Chughtai et al., arXiv 2402.07321). With c the direct logit attribution by source of
`kcwb.reading.dla` and o a fact's object (its first token),

    D_S = mean over facts of sum_{s in SUBJECT} c[s; o],      D_R the same over RELATION,
    share = |D_S| / (|D_S| + |D_R|).

1. A head **counts** if |D_S| + |D_R| is more than 3 standard errors, `z` > 3; otherwise its role is `other`. The
   standard error is the standard deviation of the same quantity when the objects are shuffled: each fact is given the
   object of a fact drawn at random. (Drawn, not permuted: all permutations give the same sum over objects, so that a
   head which raises some objects of the relation whatever the subject would seem to have no spread at all.)
2. One that pushes the answer down, D_S + D_R < 0, is a `suppressor`.
3. The rest are told apart by the ratio r = 10 of the two: `mover` if share > r / (r + 1), `relation` if share is
   less than 1 / (r + 1), else `mixture`.

`z_fact` is (|D_S| + |D_R| - its mean over shuffles) / standard error: large for a head that knows this fact from the
relation's others, near 0 for one that raises all of the relation's objects alike, which is what a relation head does.
Neither says that a head matters: with enough facts a contribution of a hundredth of a logit counts. D_S and D_R are its
size, and `kcwb.interventions.role_tests` asks what happens without it.

By attention, as Knowledge Circuits (arXiv 2405.17969) names heads: the same ratio, of END's attention to SUBJECT and
to RELATION, whatever rests elsewhere. The two definitions can disagree, since attention does not say what is carried:
`role_agreement` counts. Where a template has no token but the subject, the first and END, D_R is 0 and nothing can be
told from a mover: choose one in which words stand between.
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble, inclusion, node_inclusion
from kcwb.circuits.run import check_same_model
from kcwb.errors import CircuitError, DataError
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.dla import Attribution, attribute, head_outputs, named_heads, top_tokens
from kcwb.reading.patterns import PATTERNS, pattern_scores
from kcwb.reading.positions import check_prompts, position_groups, split_of, told_at_end, without_copies
from kcwb.settings import Count, Seed, at_least
from kcwb.statistics import proportion_interval
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.verbs import verb

#: Roles that say how a head helps the answer, and all roles that a head can have.
NAMED = ("mover", "relation", "mixture")
ROLES = (*NAMED, "suppressor", "other")
#: The role of every head where there are too few facts, or too few different answers, for a standard error.
TOO_FEW = "too few to say"
RATIO, RATIOS_BESIDE = 10.0, (5.0, 3.0)
LEAST_Z = 3.0
#: Logits. A head may write the same towards all objects, to the last digit: its standard error is rounding, not zero.
_LEAST_ERROR = 1e-5
_FEWEST_FACTS = 4


@verb
def head_roles(
    model: Model,
    circuit: Circuit | Ensemble | None,
    task: Task,
    *,
    split: str = "val",
    shuffles: Annotated[int, at_least(20)] = 200,
    resamples: Count = 200,
    top: Count = 5,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """What each attention head of a circuit does for the answer.

    Contributions are those of the full model's run, on the facts of one split; a fact whose object begins with a token
    of its subject is left out with a warning, since copying the subject would pass for knowing the object.

    Parameters
    ----------
    model, circuit, task
        Roles are given to the heads with a kept edge, of an ensemble in some draw; None for all heads of the model.
    split
        `val` or `test`. Facts that the model does not know take part in `test`.
    shuffles
        How often the objects are drawn again for the facts.
    resamples
        Bootstrap resamples of the facts, for `stability`.
    top
        How many top tokens to name.

    Returns
    -------
    DataFrame
        One row per head, the largest |D_S| + |D_R| first:

        - `node`, `layer`, `head`, `role`; `role_5` and `role_3`: the role at the ratios 5 and 3 instead of 10;
        - `D_S`, `D_R`, `D_rest` (through BOS, END and the value bias; the three sum to the head's whole direct logit
          attribution), logits; `share`; `z`; `z_fact`;
        - `stability`: the share of bootstrap resamples in which it has the same role;
        - `role_attention`: its role by attention; `attention_subject`, `attention_relation`, `attention_bos` (the
          first token where prompts have no BOS), `attention_end`: END's attention, mean over facts;
        - `pi`: how sure the head is, its inclusion probability in an ensemble; 1 in a circuit and in the whole model.
          What takes this table weighs heads by it, or says what it does instead;
        - `to_logits`: whether the circuit keeps its edge to the logits, of an ensemble the pi of that edge; without it,
          D_S and D_R speak of a path that the circuit does not have;
        - `previous_token`, `duplicate_token`, `induction`: the scores of transformer_lens's `head_detector`, on random
          tokens that are repeated once: the share of the head's attention that lies where such a head attends;
        - `top_tokens`: what its output at END raises most, mean over facts;
        - `facts`: how many facts this rests on.

        With fewer than 4 facts, or one answer for all, every role is "too few to say", and what needs a standard error
        is NaN.

    Raises
    ------
    CircuitError
        If the circuit belongs to another model, or has no head.
    DataError
        If no fact is left, or a subject has no token before END.
    """
    check_same_weights(model, task)
    heads = named_heads(model, circuit_heads(model, circuit))
    rows = torch.tensor([place.layer * model.graph.n_heads + place.head for place in heads])
    prompts = split_of(task, split)
    check_prompts(prompts)
    prompts = without_copies(model, told_at_end(prompts))
    with track(progress, 3, "head roles") as step:
        answers, column = prompts.answers[:, 0].unique(return_inverse=True)
        found = attribute(model, prompts, answers[None].expand(len(prompts), -1))
        step(note="attributed")
        table = pd.DataFrame(heads, columns=["node", "layer", "head"])
        table = pd.concat(
            [table, _contributions(model, prompts, found, column, rows, shuffles, resamples, seed)], axis=1
        )
        table = pd.concat([table, _attention(model, prompts, found, rows)], axis=1)
        senders = rows + rows // model.graph.n_heads + 1  # one MLP per layer and `input` stand between
        table["pi"] = 1.0 if circuit is None else node_inclusion(circuit)[senders.numpy()]
        table["to_logits"] = True if circuit is None else inclusion(circuit)[senders, -1].tolist()
        if isinstance(circuit, Circuit):
            table["to_logits"] = table["to_logits"].astype(bool)
        written = (head_outputs(model.network, found) / found.scale[:, None]).mean(2).flatten(0, 1)
        table["top_tokens"] = top_tokens(model, written[rows.to(written.device)], top)
        step(note="roles")
        for name, scores in pattern_scores(model, seed).items():
            table[name] = scores.flatten()[rows].tolist()
        step(note="patterns")
    table["facts"] = len(prompts)
    size = (table["D_S"].abs() + table["D_R"].abs()).sort_values(ascending=False, kind="stable")
    return table.loc[size.index, list(COLUMNS)].reset_index(drop=True)


COLUMNS = (
    *("node", "layer", "head", "role", "role_5", "role_3", "D_S", "D_R", "D_rest", "share", "z", "z_fact"),
    *("stability", "role_attention", "attention_subject", "attention_relation", "attention_bos", "attention_end"),
    *("pi", "to_logits", *PATTERNS, "top_tokens", "facts"),
)


def strongest_movers(model: Model, task: Task, n: int = 10, seed: int = 0) -> list[str]:
    """The mover heads of a task with the largest D_S, at most n; DataError if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of facts that are left out
        table = head_roles(model, None, task, shuffles=50, resamples=1, seed=seed, progress=False)
    names = table[table["role"] == "mover"].sort_values("D_S", ascending=False)["node"].tolist()
    if not names:
        raise DataError(
            f"No head is a mover of {task.relation.name} in {task.template!r:.120}; name some: movers=[...]."
        )
    return names[:n]


@verb
def role_agreement(roles: pd.DataFrame) -> pd.DataFrame:
    """How often contribution and attention give a head the same name.

    Parameters
    ----------
    roles
        A table of `head_roles`. Only its movers, relation and mixture heads take part: attention knows no suppressors,
        and heads that do not count have no role to agree on. Those of an ensemble count by their `pi`.

    Returns
    -------
    DataFrame
        One row for `all` and one for each role by contribution: `heads`, `agree` (share of them with the same name by
        attention), `low` and `high` (Wilson's 95% interval of that share of heads; NaN for no heads), and for `all`
        `kappa`, Cohen's agreement beyond chance (NaN where it is not defined). Share, interval and kappa are weighted
        by pi.
    """
    counted = roles[roles["role"].isin(NAMED)]
    rows = {}
    for name, some in [("all", counted), *((role, counted[counted["role"] == role]) for role in NAMED)]:
        same, pi = (some["role"] == some["role_attention"]).to_numpy(dtype=float), sureness(some)
        low, high = proportion_interval(same, pi)
        agree = np.average(same, weights=pi) if len(same) else math.nan
        rows[name] = {"heads": len(same), "agree": agree, "low": low, "high": high}
    several = len(set(counted["role"]) | set(counted["role_attention"])) > 1
    from sklearn.metrics import cohen_kappa_score  # takes a second to import

    names, pi = (counted["role"], counted["role_attention"]), sureness(counted)
    rows["all"]["kappa"] = cohen_kappa_score(*names, sample_weight=pi) if several else math.nan
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("role")


# --- what is looked at ---


def circuit_heads(model: Model, circuit: Circuit | Ensemble | None) -> list[str]:
    """The names of a circuit's heads, or of all; CircuitError if it belongs to another model or has none.

    Of an ensemble, those that some draw kept.
    """
    heads = [name for name in model.graph.sender_names if model.graph.node(name).kind == "head"]
    if circuit is None:
        return heads
    check_same_model(model, circuit)
    pi = dict(zip(model.graph.node_names, node_inclusion(circuit), strict=True))
    names = [name for name in heads if pi[name] > 0]
    if not names:
        of = f"circuit of {circuit.n_edges} edges" if isinstance(circuit, Circuit) else f"ensemble {circuit}"
        raise CircuitError(f"The {of} has no attention head, so there are no roles.")
    return names


def sureness(roles: pd.DataFrame) -> np.ndarray:
    """How sure each head of a table of roles is; 1 where the table does not say."""
    return roles["pi"].to_numpy(dtype=float) if "pi" in roles else np.ones(len(roles))


# --- contributions ---


def _contributions(
    model: Model,
    prompts: Prompts,
    found: Attribution,
    column: Int[Tensor, " N"],
    rows: Int[Tensor, " h"],
    shuffles: int,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """D_S, D_R and the roles; `found` holds each prompt's contributions to every answer, `column` its own one's."""
    n_facts = len(prompts)
    every = found.by_group(position_groups(prompts))[:2].flatten(1, 2)[:, rows.to(column.device)].cpu()
    whole = found.total.flatten(0, 1)[rows.to(column.device)].cpu()
    column, fact = column.cpu(), torch.arange(n_facts)
    own = every[:, :, fact, column]
    even = torch.full((1, n_facts), 1 / n_facts, dtype=own.dtype)
    d = (own @ even.T)[..., 0]
    table = pd.DataFrame({"D_S": d[0], "D_R": d[1], "D_rest": whole[:, fact, column].mean(-1) - d.sum(0)}).astype(float)
    size = d.abs().sum(0)
    table["share"] = (d[0].abs() / size).tolist()
    names = {f"role_{ratio:g}": ratio for ratio in RATIOS_BESIDE}
    if n_facts < _FEWEST_FACTS or len(column.unique()) < 2:
        table[["role", *names]] = TOO_FEW
        table[["z", "z_fact", "stability"]] = math.nan
        return table
    draw = np.random.default_rng(seed)
    given = torch.from_numpy(draw.integers(n_facts, size=(shuffles, n_facts)))
    shuffled = every[:, :, fact, column[given]]  # [2, h, shuffles, N]
    null = (shuffled @ even.T)[..., 0].abs().sum(0)
    error = null.std(-1).clamp_min(_LEAST_ERROR)
    table["z"] = (size / error).tolist()
    table["z_fact"] = ((size - null.mean(-1)) / error).tolist()
    for name, ratio in {"role": RATIO, **names}.items():
        table[name] = role_labels(d, size / error > LEAST_Z, ratio)
    counts = draw.multinomial(n_facts, np.full(n_facts, 1 / n_facts), resamples)
    again = torch.from_numpy(counts).to(own.dtype) / n_facts
    table["stability"] = _stability(own, shuffled, again, table["role"].to_numpy())
    return table


def role_labels(d: Float[Tensor, "2 h"], counts: Bool[Tensor, " h"], ratio: float = RATIO) -> np.ndarray:
    """The roles of heads by D_S and D_R; `other` where one does not count."""
    label = np.where(d.sum(0) < 0, "suppressor", _by_ratio(d[0].abs() / d.abs().sum(0), ratio))
    return np.where(counts, label, "other")


def _by_ratio(share: Float[Tensor, " h"], ratio: float) -> np.ndarray:
    """The name that the subject's share gives."""
    return np.where(share > ratio / (ratio + 1), "mover", np.where(share < 1 / (ratio + 1), "relation", "mixture"))


def _stability(
    own: Float[Tensor, "2 h N"], shuffled: Float[Tensor, "2 h P N"], again: Float[Tensor, "b N"], roles: np.ndarray
) -> list[float]:
    """The share of resamples of the facts, shuffles included, in which a head has its role."""
    same = []
    for i, role in enumerate(roles):
        d = own[:, i] @ again.T
        error = (shuffled[:, i] @ again.T).abs().sum(0).std(0).clamp_min(_LEAST_ERROR)
        same.append(float((role_labels(d, d.abs().sum(0) / error > LEAST_Z) == role).mean()))
    return same


def _attention(model: Model, prompts: Prompts, found: Attribution, rows: Int[Tensor, " h"]) -> pd.DataFrame:
    """END's attention to each group, and the role that it gives."""
    groups = position_groups(prompts).to(found.attention.dtype)
    mass = torch.einsum("lhns,gns->glh", found.attention, groups).flatten(1).cpu()[:, rows] / len(prompts)
    subject, relation = mass[0], mass[1]
    table = pd.DataFrame({"role_attention": _by_ratio(subject / (subject + relation), RATIO)})
    for name, values in zip(("subject", "relation", "bos", "end"), mass, strict=True):
        table[f"attention_{name}"] = values.tolist()
    return table
