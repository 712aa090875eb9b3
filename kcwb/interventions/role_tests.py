"""Do the roles hold: what happens to the answer without a head, and is a story of named heads enough.

A role read from contributions is a claim. Here it is tried on the model itself, after Knowledge Circuits (arXiv
2405.17969, appendix B) and Wang et al. (arXiv 2211.00593):

- **Ablation at END.** The head's output at END is set to zero, everything after it is computed anew. Without a mover
  the answer should fall and *other objects of the relation* gain; without a relation head the answer should fall and
  *generic tokens* gain; without a mixture head the answer should fall; without a suppressor it should gain.
- **Path patching.** Only what the head delivers directly to the logits is replaced, by what it delivers there on the
  paired prompt with another subject. A mover brings another object then; a relation head brings the same.
- **Against chance.** Each effect stands beside that of 50 heads of which nothing is claimed, out of the fewest nearest
  layers that have so many, and each role's mean effect beside that of random sets of such heads
  (`kcwb.statistics.matched_head_sets`). A late head moves any answer more than an early one, so that heads of far
  layers would prove nothing.
- **The story.** `faithful_story` keeps only the named heads and MLPs, and asks for the facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kcwb.circuits.ablation import AblationKind, make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.run import check_same_model, run_circuit
from kcwb.errors import CircuitError, DataError, SettingError
from kcwb.interventions.at_end import logits_without, patched_answers
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.dla import named_heads
from kcwb.reading.positions import check_prompts, split_of, token_text, told_at_end, without_copies
from kcwb.reading.roles import TOO_FEW, circuit_heads, sureness
from kcwb.settings import Count, Seed
from kcwb.statistics import chance_range, matched_head_sets, mean_interval, p_value, proportion_interval
from kcwb.tasks.metrics import answer_ranks, at_end, make_loss, together
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task, check_same_weights
from kcwb.tasks.tokens import objects_after
from kcwb.verbs import verb

#: Role -> what its ablation should do: (effect, sign).
PREDICTIONS = {
    "mover": (("answer", -1), ("others", 1)),
    "relation": (("answer", -1), ("generic", 1)),
    "mixture": (("answer", -1),),
    "suppressor": (("answer", 1),),
}
EFFECTS = ("answer", "others", "generic", "direct")
_LEVEL = 0.05
_SURE = 0.5
_N_GENERIC = 20


@dataclass(frozen=True, eq=False)
class RoleCheck:
    """What ablation and path patching say about the roles; made by `check_roles`.

    Attributes
    ----------
    heads
        One row per head with a role: `node`, `layer`, `head`, `role`, `pi`; `answer`, `others`, `generic`: by how much
        the log-probability of the answer (of several right ones together), of all other objects of the relation
        together, and of the generic tokens together changes when it is ablated at END; `direct`: that of the answer's
        when its direct path is patched (nats, mean over facts; NaN if no fact has a partner); `p_answer`, ... : the
        share of comparable heads (itself counted in) for which the effect is as far out in the direction of the role's
        claim, for `direct` downwards (upwards for a suppressor), NaN for what the role claims nothing about;
        `random_heads`, how many those are, and `layers_away`, how far from it in the mean; `verdict`: `holds` if every
        claimed effect has p <= .05, else `fails` ("too few to say" where the model has fewer than 19 heads to compare
        with, and no p can be so small).
    roles
        One row per role: `heads`; `holds`, the share of them, with its 95% Wilson interval `low`, `high`; and for every
        effect its mean, `random_...`, the mean over random sets of as many comparable heads, and `p_...`, the share of
        such sets (the role's own counted in) whose mean is as far out in the direction of the claim; NaN where there
        are fewer heads without a role than heads with this one. Share, interval and means are weighted by pi, those of
        random sets by the same pi, layer for layer.
    every
        The effects of every head that took part, those of the random ones included.
    generic
        The generic tokens: the likeliest ones whatever the subject (highest mean log-probability over the facts) that
        are no object of the relation, no right answer and no token of a subject.
    """

    heads: pd.DataFrame
    roles: pd.DataFrame
    every: pd.DataFrame
    generic: tuple[str, ...]


@verb
def check_roles(
    model: Model,
    roles: pd.DataFrame,
    task: Task,
    *,
    split: str = "val",
    random_heads: Count = 50,
    draws: Count = 1000,
    seed: Seed = 0,
    progress: Progress = True,
) -> RoleCheck:
    """Try the roles of heads on the model.

    Parameters
    ----------
    model, roles, task
        `roles` is a table of `kcwb.head_roles` on this task. Heads whose role is `other` are not tried.
    split
        `val` or `test`.
    random_heads
        With how many heads each is compared; all that have no role, where there are fewer.
    draws
        Random sets that each role is compared with; all that can be made, where there are fewer.
    seed
        Of the sets, and of which heads of a layer are taken where not all are.
    progress
        Reported per batch of heads.

    Raises
    ------
    DataError
        If the roles are "too few to say", no head has a role, or the relation has a single object.
    SettingError
        If a setting cannot be meant.
    """
    if random_heads < 19 or draws < 20:
        raise SettingError(f"random_heads={random_heads}, draws={draws}: fewer than 19 or 20 cannot give a p of .05.")
    named = _with_a_role(roles)
    check_same_weights(model, task)
    prompts = split_of(task, split)
    check_prompts(prompts)
    prompts = without_copies(model, told_at_end(prompts))
    if len(named) == model.graph.n_layers * model.graph.n_heads:
        raise DataError("Every head has a role: there is none to compare with. Check some of the roles at a time.")
    names, comparable = named["node"].tolist(), {"least": random_heads, "taken": named["node"]}
    alone = {node: matched_head_sets(model.graph, [node], random_heads, seed, **comparable) for node in names}
    matched = {node: [other for (other,) in sets] for node, sets in alone.items()}
    n_free = model.graph.n_layers * model.graph.n_heads - len(named)
    by_role = {
        role: matched_head_sets(model.graph, some["node"], draws, seed, **comparable) if len(some) <= n_free else []
        for role, some in ((role, named[named["role"] == role]) for role in PREDICTIONS)
    }
    drawn = (node for sets in (*alone.values(), *by_role.values()) for heads in sets for node in heads)
    wanted = sorted({*names, *drawn}, key=model.graph.sender_index)
    every, generic = _effects(model, task, prompts, wanted, progress)
    heads = _judge(model, named, every, matched)
    return RoleCheck(heads, _by_role(heads, every, by_role), every, generic)


@verb
def faithful_story(
    model: Model,
    circuit: Circuit | Ensemble,
    roles: pd.DataFrame,
    task: Task,
    *,
    ablation: str | AblationKind | None = None,
    split: str = "val",
    draws: Count = 10,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """Does keeping only the named heads and MLPs keep the answer.

    Parameters
    ----------
    model, circuit, task
        The circuit that the roles were read from. Its MLPs are the story's. A story keeps a head or does not, so that
        of an ensemble it is its consensus at 1/2, and the story of the heads that are in that.
    roles
        A table of `kcwb.head_roles`, or some of its rows, such as those whose role holds. The named heads are those
        whose role is not `other`, and whose pi is at least 1/2.
    ablation
        What cut edges deliver; None for what the circuit was found with (`zero` if that is not known).
    split
        `val` or `test`.
    draws
        Random sets of as many other heads from the same layers (`kcwb.statistics.matched_head_sets`).
    seed
        Of those sets, and of the bootstrap of their interval.
    progress
        Reported per run.

    Returns
    -------
    DataFrame
        One row per run: `heads`, `edges`, `facts`, `hit` (Hit@10), `low`, `high`, `nll` (nats). `low` and `high`
        are the 95% Wilson interval of the share of facts; for the random heads the 95% bootstrap interval of the mean
        over facts of a mean over draws (NaN where it is the same for all facts). The runs:
        `full model`; `circuit`; `story`, those of the circuit's edges that lie on a path of named heads and
        MLPs; `named heads and MLPs`, all the model's edges between them; `random heads and MLPs`, the same with as
        many other heads drawn from the same layers, mean over draws (left out if there are too few others);
        `MLPs alone`; `empty circuit`.

    Raises
    ------
    CircuitError
        If a named head is not in the circuit.
    DataError
        If the roles are "too few to say", or no head has one.
    """
    check_same_model(model, circuit)
    check_same_weights(model, task)
    table = _with_a_role(roles)
    named = table.loc[table["pi"] >= _SURE, "node"].tolist()
    missing = sorted(set(named) - set(circuit_heads(model, circuit)))
    if missing:
        raise CircuitError(f"{missing[0]!r} has a role but is not in the circuit; read the roles from this circuit.")
    if isinstance(circuit, Ensemble):
        circuit = circuit.consensus(_SURE)
        kept = set(circuit.nodes["node"])
        named = [name for name in named if name in kept]
    if not named:
        raise DataError(f"No head with a role is in half of the draws: of {len(table)}, there is no story to tell.")
    cuts = make_ablation(model, task, ablation or circuit.ablation)
    prompts = cuts.usable(split_of(task, split))
    check_prompts(prompts)
    nodes = circuit.nodes
    mlps = nodes.loc[nodes["kind"] == "mlp", "node"].tolist()
    others = matched_head_sets(model.graph, named, draws, seed)
    between = _between(model, [*named, *mlps])
    runs: list[tuple[str, list[Circuit | None], int]] = [
        ("full model", [None], model.graph.n_layers * model.graph.n_heads),
        ("circuit", [circuit], int((nodes["kind"] == "head").sum())),
        ("story", [(circuit & between).without_dangling()], len(named)),
        ("named heads and MLPs", [between], len(named)),
        ("random heads and MLPs", [_between(model, [*some, *mlps]) for some in others], len(named)),
        ("MLPs alone", [_between(model, mlps)], 0),
        ("empty circuit", [Circuit.empty(model.graph)], 0),
    ]
    runs = [run for run in runs if run[1]]
    loss, rows = make_loss(model, prompts, "nll"), []
    with track(progress, sum(len(some) for _, some, _ in runs), "story") as step:
        for name, circuits, heads in runs:
            hits, losses = [], []
            for one in circuits:
                logits = run_circuit(model, one, prompts, cuts)
                hits.append((answer_ranks(logits, prompts) <= 10).double().cpu().numpy())
                losses.append(float(loss(logits)))
                step()
            hit = np.mean(hits, axis=0)
            edges = np.mean([model.graph.n_edges if one is None else one.n_edges for one in circuits])
            low, high = mean_interval(hit, seed) if name == "random heads and MLPs" else proportion_interval(hit)
            rows.append((name, heads, round(float(edges)), len(prompts), hit.mean(), low, high, np.mean(losses)))
    return pd.DataFrame(rows, columns=["run", "heads", "edges", "facts", "hit", "low", "high", "nll"])


# --- which heads ---


def _with_a_role(roles: pd.DataFrame) -> pd.DataFrame:
    """The rows with a named role; DataError if there are none."""
    if (roles["role"] == TOO_FEW).any():
        raise DataError("The roles are 'too few to say': there is nothing to check. Use a task with 4 facts or more.")
    named = roles[roles["role"].isin(PREDICTIONS)]
    if named.empty:
        raise DataError(f"No head of {len(roles)} has a role ({', '.join(PREDICTIONS)}): there is nothing to check.")
    return named[["node", "layer", "head", "role"]].assign(pi=sureness(named)).reset_index(drop=True)


def _between(model: Model, nodes: Sequence[str]) -> Circuit:
    """All edges between `input`, some nodes, and `logits`."""
    graph = model.graph
    inside = torch.zeros(graph.n_senders + 1, dtype=torch.bool)
    inside[[0, *(graph.sender_index(name) for name in nodes), -1]] = True
    return Circuit(graph, graph.exists & inside[:-1, None] & inside[graph.receiver_node][None])


# --- effects ---


@torch.no_grad()
def _effects(
    model: Model, task: Task, prompts: Prompts, nodes: Sequence[str], progress: Progress
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """`answer`, `others`, `generic` and `direct` of each head, mean over facts; and the generic tokens' texts."""
    places = [(head.layer, head.head) for head in named_heads(model, nodes)]
    residual = at_end(forward(model.network, prompts.tokens).residual, prompts)
    full = model.network.logits(residual).float().log_softmax(-1)
    after = objects_after(model, task.template, prompts.facts, task.relation.objects)
    firsts = {space: {answer[0] for answer in some.values()} for space, some in after.items()}
    if any(len(some) < 2 for some in firsts.values()):
        raise DataError(f"All objects of {task.relation.name} begin alike: there is no other object that could gain.")
    objects = sorted(set().union(*firsts.values()))
    generic = _generic_tokens(prompts, full, set(objects).union(*prompts.firsts))
    known = torch.tensor(objects, device=model.device)
    apart = [[token not in firsts[fact.space] for token in objects] for fact in prompts.facts]
    right = prompts.right[:, 0]
    no_other = (known[:, None] == right[:, None]).any(-1) | torch.tensor(apart, device=model.device)

    def measure(logp: Float[Tensor, "*c N V"]) -> Float[Tensor, "m *c N"]:
        answer = together(logp, right)
        others = logp[..., known].masked_fill(no_other, -math.inf).logsumexp(-1)
        return torch.stack([answer, others, logp[..., generic].logsumexp(-1)])

    before = measure(full)
    parts = []
    with track(progress, 2 * len(places), "ablation at END") as step:
        for logits in logits_without(model, prompts, places):
            parts.append((measure(logits.log_softmax(-1)) - before[:, None]).mean(-1))
            step(len(logits))
        table = pd.DataFrame(torch.cat(parts, dim=1).T.cpu().numpy(), columns=list(EFFECTS[:3])).astype(float)
        table["direct"] = math.nan
        if bool(prompts.paired.any()):
            paired = prompts.select(prompts.paired.nonzero()[:, 0].tolist())
            table["direct"] = patched_answers(model, paired, places)
        step(len(places))
    table.insert(0, "node", list(nodes))
    return table, tuple(token_text(model, token) for token in generic.tolist())


def _generic_tokens(prompts: Prompts, full: Float[Tensor, "N V"], answers: set[int]) -> Int[Tensor, " g"]:
    """The tokens with the highest mean log-probability that are no answer and no token of a subject."""
    mean = full.mean(0)
    mean[sorted(answers)] = -math.inf
    for row, start, stop in zip(prompts.tokens, prompts.subject_start, prompts.subject_stop, strict=True):
        mean[row[start:stop]] = -math.inf
    return mean.topk(min(_N_GENERIC, int(mean.isfinite().sum()))).indices


# --- against chance ---


def _judge(model: Model, named: pd.DataFrame, every: pd.DataFrame, matched: dict[str, list[str]]) -> pd.DataFrame:
    """The effects of each named head, how they stand among comparable heads, and the verdict."""
    effects, rows = every.set_index("node")[list(EFFECTS)], []
    layer_of = {node: model.graph.node(node).layer for node in every["node"]}
    for node, layer, head, role, pi in named[["node", "layer", "head", "role", "pi"]].values.tolist():
        own, chance = effects.loc[node].to_dict(), effects.loc[matched[node]]
        signs = _signs(role)
        p = {name: _p(own[name], chance[name].to_numpy(), signs.get(name)) for name in EFFECTS}
        rows.append(
            {
                **{"node": node, "layer": layer, "head": head, "role": role, "pi": pi},
                **own,
                **{f"p_{name}": value for name, value in p.items()},
                "random_heads": len(chance),
                "layers_away": float(np.mean([abs(layer_of[other] - layer) for other in matched[node]])),
                "verdict": _verdict([p[name] for name, _ in PREDICTIONS[role]], len(chance)),
            }
        )
    return pd.DataFrame(rows)


def _signs(role: str) -> dict[str, int]:
    """The direction in which each effect speaks for a role; the direct path's is that of the answer."""
    claims = dict(PREDICTIONS[role])
    return {**claims, "direct": claims["answer"]}


def _verdict(p: Sequence[float], n_comparable: int) -> str:
    if 1 / (1 + n_comparable) > _LEVEL:
        return TOO_FEW
    return "holds" if max(p) <= _LEVEL else "fails"


def _p(own: float, chance: np.ndarray, sign: int | None) -> float:
    """The share of effects, the own one counted in, that are as large in the direction of `sign` (NaN for none)."""
    return math.nan if sign is None else p_value(sign * own, sign * chance)


def _by_role(heads: pd.DataFrame, every: pd.DataFrame, sets: Mapping[str, list[list[str]]]) -> pd.DataFrame:
    """Each role's mean effects beside those of its random sets."""
    effects = every.set_index("node")
    rows = {}
    for role in (role for role in PREDICTIONS if role in set(heads["role"])):
        some = heads[heads["role"] == role].sort_values(["layer", "head"])  # as random sets are, whose pi are these
        held, pi = some["verdict"] == "holds", some["pi"].to_numpy()
        low, high = proportion_interval(held, pi)
        row = {"heads": len(some), "holds": np.average(held, weights=pi), "low": low, "high": high}
        drawn = effects.index.get_indexer(pd.Index(np.ravel(sets[role]))).reshape(len(sets[role]), len(some))
        for name in EFFECTS:
            chance = effects[name].to_numpy()[drawn] @ (pi / pi.sum())
            row[name], row[f"random_{name}"] = np.average(some[name], weights=pi), chance_range(chance)[0]
            row[f"p_{name}"] = _p(row[name], chance, _signs(role).get(name))
        rows[role] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("role")
