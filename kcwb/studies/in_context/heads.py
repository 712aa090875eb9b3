"""In-context learning: which heads a model uses once it is shown examples, and whether it needs them.

Knowledge Circuits (arXiv 2405.17969, section 5) compares the circuit of a relation without and with demonstrations,
finds attention heads that are only in the latter, and ablates them: accuracy falls by far more than without as many
random heads (its Table 2). Here, step by step and with what chance gives:

1. **Circuits** of the same facts without a shot and after k of them, by EAP-IG under mean ablation, cut at the same
   number of edges after dangling ones are dropped. The mean is taken after unrelated text (`kcwb.tasks.shots`), so that
   cutting an edge takes away what the demonstrations brought.
2. **New heads**: heads of the k-shot circuit that the circuit without a shot lacks, both on all facts of D_val and in
   at least 80% of bootstrap resamples of its facts (each circuit anew on the same resample). Shared heads are in both.
3. **Ablation** in the k-shot prompts of D_test: the heads' outputs are set to zero at every position, as in the paper;
   a mean would have to be taken over prompts, and would give each head what it brings on those. Accuracy is Hit@1, the
   share of facts whose answer's first token is the model's first choice; Hit@10 and the loss stand beside it. What
   they are compared with are sets of as many heads drawn from the same layers, new ones excepted
   (`kcwb.statistics.matched_head_sets`). `p` is the share of draws (the new heads counted in) that do at least as much
   harm.
4. **What they read**: END's attention to the demonstrations' objects, subjects and line breaks, and the induction and
   previous-token scores of `kcwb.reading.roles`, beside the circuit's other heads and random ones of the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcwb.circuits.ablation import make_ablation
from kcwb.circuits.circuit import Circuit
from kcwb.discovery.attribution import attribution_scores
from kcwb.discovery.methods import METHODS, STEPS, check_size
from kcwb.discovery.selection import matched_circuit, select_edges
from kcwb.errors import DataError, SettingError
from kcwb.interventions.head_sets import answers_without, head_place
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.progress import Progress, track
from kcwb.reading.positions import split_of, told_at_end
from kcwb.reading.roles import circuit_heads, pattern_scores
from kcwb.settings import Count, Natural, Seed, Share
from kcwb.statistics import chance_range, matched_head_sets, mean_interval, p_value, proportion_interval
from kcwb.tasks.metrics import make_loss
from kcwb.tasks.prompts import check_same_weights
from kcwb.tasks.relations import Relation
from kcwb.tasks.shots import GROUPS, ShotTask, shot_tasks
from kcwb.verbs import verb

#: In how many of the resamples a head must be new, or shared.
LEAST_PRESENCE = 0.8
#: The arms of the ablation, in the order of the paper's table.
ARMS = ("intact", "new heads", "random heads", "shared heads")
_METRIC, _ABLATION = "nll", METHODS["eap-ig"].ablation


@dataclass(frozen=True, eq=False)
class ResampledCircuit:
    """A circuit, and which nodes are in the circuits of bootstrap resamples of its facts.

    Attributes
    ----------
    circuit
        That of all facts of D_val.
    presence
        `[draws, S]`: whether a sender has a kept edge in the circuit of a resample.
    """

    circuit: Circuit
    presence: Bool[np.ndarray, "draws S"]


@dataclass(frozen=True, eq=False)
class InContext:
    """What `in_context` finds for a relation.

    Attributes
    ----------
    tasks
        (k, kind) -> task.
    accuracy
        See `shot_accuracy`.
    circuits
        `0 shots` and the label of the studied context -> its circuit and resamples.
    nodes
        See `new_heads`.
    ablation
        See `ablate_new`.
    heads, reading
        See `demonstration_attention` and `reading_summary`; empty where no head is new.
    """

    tasks: dict[tuple[int, str], ShotTask]
    accuracy: pd.DataFrame
    circuits: dict[str, ResampledCircuit]
    nodes: pd.DataFrame
    ablation: pd.DataFrame
    heads: pd.DataFrame
    reading: pd.DataFrame

    def named(self, status: str) -> list[str]:
        """The heads with a status of `new_heads`: `new`, `shared`, `gone` or `unsure`."""
        return heads_with(self.nodes, status)


@verb
def in_context(
    model: Model,
    relation: Relation | str,
    k: Count = 3,
    kind: str = "shots",
    *,
    beside: Sequence[tuple[Natural, str]] = (),
    edges: Count = 300,
    n: Count = 8,
    n_test: Natural = 16,
    template: int | str = 0,
    sets: Count = 2,
    steps: Count = STEPS,
    resamples: Count = 100,
    draws: Count = 100,
    seed: Seed = 0,
    unrelated: Sequence[Relation] | None = None,
    progress: Progress = True,
) -> InContext:
    """All of it for one relation: accuracy, circuits, new heads, their ablation, and what they read.

    Parameters
    ----------
    model, relation, k, kind, n, n_test, template, sets, unrelated
        As in `kcwb.tasks.shots.make_shots`; `k` shots, or a control, are compared with none.
    beside
        Further pairs of k and kind whose accuracy is reported.
    edges, steps, resamples
        As in `context_circuits`.
    draws
        As in `ablate_new`.
    seed
        Of every draw.
    progress
        Reported per step, with its name as the note; cancelled there and within the steps.

    Raises
    ------
    DataError, SettingError
        As `make_shots` and the steps raise them.
    """
    check_size(model.graph, edges, model.name)
    wanted = list(dict.fromkeys([(0, "shots"), (k, kind), *beside]))

    def within(note: str) -> Progress:
        told = progress
        if isinstance(told, bool):
            return told
        return lambda done, total, more: told(done, total, f"{note}, {more}" if more else note)

    more = {"n": n, "seed": seed, "template": template, "sets": sets, "n_test": n_test, "unrelated": unrelated}
    tasks = shot_tasks(model, relation, wanted, progress=within("questions"), **more)
    chosen = {"0 shots": tasks[0, "shots"], tasks[k, kind].label: tasks[k, kind]}
    size = {"edges": edges, "steps": steps, "resamples": resamples, "seed": seed}
    circuits = context_circuits(model, chosen, progress=within("circuits"), **size)
    before, after = circuits.values()
    nodes = new_heads(before, after)
    task, new, shared = tasks[k, kind], heads_with(nodes, "new"), heads_with(nodes, "shared")
    ablation = ablate_new(model, task, new, shared, draws=draws, seed=seed, progress=within("ablation"))
    heads = demonstration_attention(model, task)
    heads["status"] = heads["node"].map(nodes.set_index("node")["status"]).fillna("in neither")
    reading = reading_summary(model, heads, draws=draws, seed=seed)
    return InContext(tasks, shot_accuracy(tasks.values()), circuits, nodes, ablation, heads, reading)


@verb
def shot_accuracy(tasks: Iterable[ShotTask]) -> pd.DataFrame:
    """How often the model answers the questions of D_test, after each context.

    Returns
    -------
    DataFrame
        One row per task: `k`, `kind`, `facts`, `hit_1` (the share whose answer's first token is the first choice) with
        the 95% Wilson interval of that share of facts, `low` to `high`; `hit_10` with `low_10` to `high_10`.
    """
    rows = []
    for task in tasks:
        if len(task.test):
            rows.append({"k": task.k, "kind": task.kind, **_accuracy(task.test.ranks.cpu().numpy()[None])})
    columns = ["k", "kind", "facts", "hit_1", "low", "high", "hit_10", "low_10", "high_10"]
    return pd.DataFrame(rows, columns=columns)


# --- circuits and new heads ---


@verb
def context_circuits(
    model: Model,
    tasks: Mapping[str, ShotTask],
    *,
    edges: Count = 300,
    steps: Count = STEPS,
    resamples: Count = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> dict[str, ResampledCircuit]:
    """The circuits of tasks that ask the same facts, at one size, and of resamples of those facts.

    Edges are scored by EAP-IG on each fact alone; a resample's scores are the mean of its facts'. All tasks share the
    resamples.

    Parameters
    ----------
    model, tasks
        Name -> task, of `kcwb.tasks.shots.shot_tasks`.
    edges
        How many edges a circuit has once dangling ones are dropped (or the nearest number to it).
    steps
        Points of EAP-IG's integral.
    resamples
        Bootstrap resamples of D_val. Each keeps as many of its highest scores as the circuit of all facts does.
    seed
        Of the resamples.
    progress
        Reported per fact.

    Raises
    ------
    DataError
        If the tasks ask different facts, or a single one, which every resample would repeat.
    SettingError
        If a setting cannot be meant.
    """
    check_size(model.graph, edges, model.name)
    facts = {task.val.facts for task in tasks.values()}
    n_facts = len(next(iter(facts), ()))
    if len(facts) != 1 or n_facts < 2:
        what = "ask different facts" if len(facts) > 1 else f"ask {n_facts} in D_val"
        raise DataError(f"The tasks {what}; circuits are compared on the same facts, two or more.")
    for task in tasks.values():
        check_same_weights(model, task)
    counts = np.random.default_rng(seed).multinomial(n_facts, np.full(n_facts, 1 / n_facts), resamples)
    again = torch.from_numpy(counts).float() / n_facts
    found = {}
    with track(progress, n_facts * len(tasks), "circuits") as step:
        for name, task in tasks.items():
            cuts = make_ablation(model, task, _ABLATION)
            loss = make_loss(model, task.val, _METRIC)
            by_fact = []
            for i in range(n_facts):
                by_fact.append(attribution_scores(model, loss.select([i]), cuts, steps=steps))
                step(note=name)
            scores = torch.stack(by_fact)
            circuit = matched_circuit(model.graph, scores.mean(0), edges)
            parameters = {"edges": edges, "select": "signed", "steps": steps}
            circuit = replace(circuit, provenance=_provenance(model, task, parameters))
            found[name] = ResampledCircuit(circuit, _presence(circuit, scores, again))
    return found


@verb
def new_heads(before: ResampledCircuit, after: ResampledCircuit, least: Share = LEAST_PRESENCE) -> pd.DataFrame:
    """Which heads and MLPs a context brings into a circuit, keeps in it, and drives out of it.

    Parameters
    ----------
    before, after
        The circuits without and with the context, from the same call of `context_circuits`.
    least
        In what share of resamples a node must be new, shared or gone to be called so.

    Returns
    -------
    DataFrame
        One row per head or MLP of either circuit, in order: `node`, `kind`, `layer`, `head`; `before`, `after`: whether
        it is in the circuit of all facts; `in_before`, `in_after`: the share of resamples in whose circuits it is;
        `new`, `both`, `lost`: the share of resamples in which it is in the later circuit alone, in both, in the earlier
        one alone; `status`: `new`, `shared` or `gone` where the circuits of all facts say so and at least `least` of
        the resamples do, else `unsure`.

    Raises
    ------
    CircuitError
        If the circuits are of different graphs.
    SettingError
        If `least` is not a share, or the resamples are not the same.
    """
    if before.presence.shape[0] != after.presence.shape[0]:
        raise SettingError(
            f"{before.presence.shape[0]} and {after.presence.shape[0]} resamples: give circuits of one call of "
            "context_circuits."
        )
    graph = (before.circuit | after.circuit).graph  # raises where graphs differ
    own = [_nodes_in(one.circuit) for one in (before, after)]
    shares = {
        "new": (after.presence & ~before.presence).mean(0),
        "both": (after.presence & before.presence).mean(0),
        "lost": (before.presence & ~after.presence).mean(0),
    }
    said = {"new": ("new", ~own[0] & own[1]), "both": ("shared", own[0] & own[1]), "lost": ("gone", own[0] & ~own[1])}
    status = np.full(graph.n_senders, "unsure", dtype=object)
    for name, (word, holds) in said.items():
        status[holds & (shares[name] >= least)] = word
    rows = []
    for i, name in enumerate(graph.sender_names):
        if name == "input" or not (own[0][i] or own[1][i]):
            continue
        place = graph.node(name)
        rows.append(
            {
                **{"node": name, "kind": place.kind, "layer": place.layer, "head": place.head},
                **{"before": own[0][i], "after": own[1][i]},
                **{"in_before": before.presence[:, i].mean(), "in_after": after.presence[:, i].mean()},
                **{key: share[i] for key, share in shares.items()},
                "status": status[i],
            }
        )
    columns = ["node", "kind", "layer", "head", "before", "after", "in_before", "in_after", *shares, "status"]
    return pd.DataFrame(rows, columns=columns)


def heads_with(nodes: pd.DataFrame, status: str) -> list[str]:
    """The attention heads of a table of `new_heads` that have a status."""
    return nodes.loc[(nodes["kind"] == "head") & (nodes["status"] == status), "node"].tolist()


def _presence(
    circuit: Circuit, scores: Float[Tensor, "N S R"], again: Float[Tensor, "draws N"]
) -> Bool[np.ndarray, "draws S"]:
    """Which senders are in the circuits of the resamples, each with as many of the highest scores as `circuit`."""
    graph, found = circuit.graph, []
    own = scores.mean(0)
    asked = int(((own >= own[circuit.kept].min()) & graph.exists).sum())
    for share in again:
        kept = select_edges(graph, torch.tensordot(share, scores, 1), edges=asked)
        found.append(_nodes_in(Circuit(graph, kept).without_dangling()))
    return np.stack(found)


def _nodes_in(circuit: Circuit) -> Bool[np.ndarray, " S"]:
    """Which senders have a kept edge."""
    matrix = circuit.node_matrix
    return (matrix.sum(0) + matrix.sum(1) > 0)[:-1]


def _provenance(model: Model, task: ShotTask, parameters: dict[str, int | str]) -> dict[str, object]:
    return {
        "method": "eap-ig",
        "metric": _METRIC,
        "ablation": _ABLATION,
        "parameters": parameters,
        "model": {"name": model.name, "digest": model.digest},
        "relation": {"name": task.relation.name, "digest": task.relation.digest},
        "template": task.template,
        "shots": {"k": task.k, "kind": task.kind, "question": task.question},
        "n": task.n,
        "seed": task.seed,
        "facts": [[fact.subject, fact.object] for fact in task.val.facts],
    }


# --- ablation ---


@verb
def ablate_new(
    model: Model,
    task: ShotTask,
    new: Sequence[str],
    shared: Sequence[str] = (),
    *,
    split: str = "test",
    draws: Count = 100,
    seed: Seed = 0,
    progress: Progress = True,
) -> pd.DataFrame:
    """How the model answers without its new heads, without random ones of the same layers, and without the shared ones.

    Parameters
    ----------
    model, task
        A task with demonstrations, or a control.
    new, shared
        Names of heads, such as those of `new_heads`; arms without a head are left out.
    split
        `val` or `test`.
    draws
        Random sets of as many heads of the same layers, `new` ones excepted (of the nearest layers, where a layer has
        no more), no two alike; all that are possible, where there are fewer.
    seed
        Of the sets, and of the bootstrap of their interval.
    progress
        Reported per set of heads.

    Returns
    -------
    DataFrame
        One row per arm (`intact`, `new heads`, `random heads`, `shared heads`): `heads` (how many), `facts`, `hit_1`
        with `low` to `high`, `hit_10` with `low_10` to `high_10`, `nll` of the answer's first token (nats). The
        intervals are the 95% Wilson interval of the share of facts; for `random heads`, all of whose numbers are means
        over the draws, the 95% bootstrap interval of the mean over facts (NaN where it is the same for all). In the row
        of the new heads `p_hit_1`, `p_hit_10` and `p_nll`: the share of random sets (the new heads counted in) that do
        at least as much harm. NaN elsewhere, and if there are too few other heads to draw; the row of `random heads` is
        left out then, with a warning.

    Raises
    ------
    DataError
        If the split has no facts.
    CircuitError
        If a name is not a head of the model.
    SettingError
        If there are no draws.
    """
    check_same_weights(model, task)
    prompts = split_of(task, split)
    if not len(prompts):
        raise DataError(f"D_{split} of {task.relation.name} has no facts to ask; make the task with n_test >= 1.")
    prompts = told_at_end(prompts)
    arms: list[tuple[str, list[Sequence[str]]]] = [("intact", [()])]
    random = matched_head_sets(model.graph, new, draws, seed)
    if new:
        arms.append(("new heads", [new]))
    if random:
        arms.append(("random heads", [*random]))
    if shared:
        arms.append(("shared heads", [shared]))
    every = list(dict.fromkeys(tuple(sorted(heads)) for _, sets in arms for heads in sets))
    place = {heads: i for i, heads in enumerate(every)}
    ranks, losses = answers_without(model, prompts, every, task.context_of(prompts), progress=progress)
    rows, of_arm = [], {}
    for arm, sets in arms:
        index = [place[tuple(sorted(heads))] for heads in sets]
        of_arm[arm] = ranks[index], losses[index]
        accuracy = _accuracy(ranks[index], seed if arm == "random heads" else None)
        rows.append({"arm": arm, "heads": len(sets[0]), **accuracy, "nll": losses[index].mean()})
    table = pd.DataFrame(rows)
    for name, harm in {
        "hit_1": lambda ranks, _: -(ranks == 1).mean(-1),
        "hit_10": lambda ranks, _: -(ranks <= 10).mean(-1),
        "nll": lambda _, losses: losses.mean(-1),
    }.items():
        table[f"p_{name}"] = math.nan
        if random:
            p = p_value(harm(*of_arm["new heads"])[0], harm(*of_arm["random heads"]))
            table.loc[table["arm"] == "new heads", f"p_{name}"] = p
    return table


# --- what they read ---


@verb
@torch.no_grad()
def demonstration_attention(model: Model, task: ShotTask, *, split: str = "test", seed: Seed = 0) -> pd.DataFrame:
    """Where every head's END looks among the demonstrations, and how it behaves on repeated random tokens.

    Returns
    -------
    DataFrame
        One row per head of the model: `node`, `layer`, `head`; END's attention, mean over the facts of the split, to
        the demonstrations' `object`, `subject`, `separator` (line breaks) and other `words`, to the prompt's `first`
        token and to the `question`, which sum to 1; `object_share`, how much of its attention to the demonstrations
        (the first four) goes to objects (NaN for none); `induction` and `previous_token`, the scores of
        `kcwb.reading.roles.pattern_scores`.
    """
    check_same_weights(model, task)
    prompts, network = split_of(task, split), model.network
    if not len(prompts):
        raise DataError(f"D_{split} of {task.relation.name} has no facts to ask; make the task with n_test >= 1.")
    groups = task.groups(model, prompts).float()
    inputs = forward(network, prompts.tokens, receivers=True).receivers
    assert inputs is not None  # asked for in the line above
    rows, ends = torch.arange(len(prompts), device=prompts.tokens.device), prompts.ends[:, None]
    mass = []
    for layer, (x, _) in enumerate(inputs):
        x = x[:1]
        q = network.queries(layer, x[:, rows, prompts.ends][:, :, None], positions=ends)
        pattern = network.pattern(layer, q, network.keys(layer, x), positions=ends)[:, :, 0].float()
        mass.append(torch.einsum("hnt,gnt->hg", pattern, groups) / len(prompts))
    table = pd.DataFrame(torch.cat(mass).cpu().numpy(), columns=list(GROUPS)).astype(float)
    names = circuit_heads(model, None)
    places = pd.DataFrame([(name, *head_place(model.graph, name)) for name in names], columns=["node", "layer", "head"])
    read = table[["object", "subject", "separator", "words"]].sum(axis=1)
    table["object_share"] = table["object"] / read.where(read > 0)
    scores = pattern_scores(model, seed)
    for name in ("induction", "previous_token"):
        table[name] = scores[name].flatten().tolist()
    return pd.concat([places, table], axis=1)


_READING = ("object", "subject", "separator", "words", "first", "question", "induction", "previous_token")


def reading_summary(model: Model, heads: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """What new heads read beside the circuit's other heads and random heads of the same layers.

    Parameters
    ----------
    model
        The model.
    heads
        A table of `demonstration_attention` with a column `status`: `new` for the new heads, `in neither` for heads of
        neither circuit.
    draws
        Random sets, as in `ablate_new`.
    seed
        Of those.

    Returns
    -------
    DataFrame
        One row per quantity of `demonstration_attention`: its mean over `new heads`, over the `other heads` of the
        circuits, over `random heads`, with `low` and `high`, 95% of the random sets, and `p`, the share of random sets
        (the new heads counted in) whose mean is at least as large. Empty where no head is new.
    """
    table = heads.set_index("node")
    new = table.index[table["status"] == "new"].tolist()
    columns = ["quantity", "new heads", "other heads", "random heads", "low", "high", "p"]
    if not new:
        return pd.DataFrame(columns=columns)
    sets = matched_head_sets(model.graph, new, draws, seed)
    drawn = table.index.get_indexer(pd.Index(np.ravel(sets))).reshape(len(sets), len(new))
    others = table[~table["status"].isin(["new", "in neither"])]
    rows = []
    for name in _READING:
        own, chance = table.loc[new, name].mean(), table[name].to_numpy()[drawn].mean(1)
        beside = others[name].mean() if len(others) else math.nan
        rows.append((name, own, beside, *chance_range(chance), p_value(own, chance)))
    return pd.DataFrame(rows, columns=columns)


# --- shared ---


def _accuracy(ranks: Int[np.ndarray, "sets N"], seed: int | None = None) -> dict[str, float]:
    """Hit@1 and Hit@10 with intervals over facts; with the seed of a bootstrap, as means over sets."""
    found: dict[str, float] = {"facts": ranks.shape[1]}
    for k, end in ((1, ""), (10, "_10")):
        hits = (ranks <= k).mean(0)
        low, high = proportion_interval(hits) if seed is None else mean_interval(hits, seed)
        found |= {f"hit_{k}": float(hits.mean()), f"low{end}": low, f"high{end}": high}
    return found
