"""What a discovery panel has found, and how it is written: functions from it to HTML, every text escaped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.provenance import HOW, found_with, part
from kcwb.discovery.selection import was_pruned
from kcwb.evaluation.referee.judgement import Judgement
from kcwb.tasks.prompts import Prompts
from kcwb.tasks.task import Task
from kcwb.workbench import tables
from kcwb.workbench.panels.widgets import brief
from kcwb.workbench.report.headline import HEADLINE, headline_of

_ROWS = 100  # of a table of edges or nodes
SCORE = {"score": lambda score: tables.number(float(score))}
"""How scores are written."""


@dataclass(eq=False)
class Found:
    """One run: a circuit, what it was found on, and what is known of it; None for what was not computed yet."""

    label: str  # what the list of runs calls it
    circuit: Circuit
    task: Task | None  # None for a loaded circuit whose relation is not at hand
    completeness: pd.DataFrame | None = None  # of this very circuit, as the judgement
    judgement: Judgement | None = None
    sizes: pd.DataFrame | None = None  # `size_curve` of its scores


def resizable(circuit: Circuit) -> bool:
    """Whether it was cut from scores of all edges; those of a pruned one were each measured in another circuit."""
    if circuit.scores is None or was_pruned(circuit):
        return False
    return not bool(circuit.scores[circuit.graph.exists].isnan().any())


def parameter(circuit: Circuit, name: str) -> float | None:
    """A number that the method was told, or None; of `within`, its edges. A file may hold anything."""
    value: Any = part(circuit.provenance, "parameters").get(name)
    value = value.get("edges") if isinstance(value, dict) else value
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def label(circuit: Circuit, number: int) -> str:
    """The line for a circuit in the list of runs."""
    source = circuit.provenance
    name = str(part(source, "relation").get("name", "circuit"))
    asked = [f"“{brief(str(source['template']), 60)}”"] if "template" in source else []
    how = [brief(one, 20) for one in found_with(source)]
    tau, within = parameter(circuit, "tau"), parameter(circuit, "within")
    how += [] if tau is None else [f"τ {tau:g}"]
    how += [] if within is None else [f"within {within:,}"]
    return f"{number + 1}. {', '.join([brief(name, 60), *asked, *how])}: {circuit.n_edges:,} edges"


def title(circuit: Circuit) -> str:
    """The heading of a circuit's graph."""
    return str(circuit.provenance.get("template", "")) or "Knowledge circuit"


def settings_of(circuit: Circuit) -> dict[str, object]:
    """What a circuit was found with."""
    source = circuit.provenance
    values: dict[str, object] = {key: part(source, key).get("name") for key in ("model", "relation")}
    values |= {key: source.get(key) for key in ("template", "n", "seed", *HOW)}
    values |= part(source, "parameters")
    within = values.get("within")
    if isinstance(within, dict):
        values["within"] = ", ".join(str(within.get(key)) for key in ("edges", "method", "ablation"))
    return {name: value for name, value in values.items() if value is not None}


def headline(found: Found | None) -> dict[str, Any]:
    """What a report says first of it, as an output; nothing where there is nothing, or it was not tested yet."""
    if found is None or found.completeness is None:
        return {}
    return {HEADLINE: {"line": headline_of(found.circuit, found.completeness)}}


def summary(found: Found) -> str:
    """Size, time and Hit@10 in two lines."""
    circuit = found.circuit
    source, graph = circuit.provenance, circuit.graph
    size = (
        f"{circuit.n_edges:,} of {graph.n_edges:,} edges ({circuit.n_edges / graph.n_edges:.2%}), "
        f"{circuit.n_nodes} of {graph.n_senders - 1} heads and MLPs"
    )
    asked = parameter(circuit, "edges")
    if asked and asked != circuit.n_edges:
        size += f" · {asked:,} chosen, {asked - circuit.n_edges:,} led nowhere"
    if isinstance(source.get("seconds"), (int, float)):
        size += f" · found in {source['seconds']:.1f} s"
    if found.completeness is None:
        return tables.summary(size)
    table = found.completeness[found.completeness["n"] > 0].set_index(["split", "run"])["hit"]
    told = [
        f"{split} {table[split, 'circuit']:.2f} (full model {table[split, 'full model']:.2f}, "
        f"empty circuit {table[split, 'empty circuit']:.2f})"
        for split in ("D_val", "D_test")
        if (split, "circuit") in table.index
    ]
    return tables.summary(size) + tables.summary(f"Hit@10 alone: {' · '.join(told)}")


def completeness_table(found: Found) -> str:
    """The circuit beside the full model, the empty circuit and random ones."""
    if found.completeness is None:
        words = "not computed yet" if found.task else "The facts that this circuit was found on are not at hand."
        return tables.muted(words)
    return tables.table(tables.completeness_rows(found.completeness)) + tables.muted(
        "Hit@10: the share of facts whose answer has rank 10 or better, with its 95% interval (Wilson's, of that "
        "share; of random circuits, whose mean it is, the bootstrap's). The empty circuit shows what the ablation "
        "alone gives away, the random circuits what any circuit of its size reaches."
    )


def rankings(circuit: Circuit) -> dict[str, tuple[pd.DataFrame, list[str]]]:
    """Its edges and its nodes, those with the strongest edges first, by the titles of tabs, with the name of each."""
    nodes = circuit.nodes.sort_values("score", ascending=False, kind="stable").drop(columns=["layer", "head"])
    edges = circuit.edges
    named = [f"{sender}->{receiver}" for sender, receiver in zip(edges["sender"], edges["receiver"], strict=True)]
    return {"Strongest edges": (edges, named), "Nodes": (nodes, nodes["node"].tolist())}


def writes(roles: pd.DataFrame | None) -> dict[str, str] | None:
    """What hovering over a head tells of the tokens that it writes, of a table of `kcwb.head_roles`."""
    if roles is None:
        return None
    return {str(node): f"writes {tokens}" for node, tokens in zip(roles["node"], roles["top_tokens"], strict=True)}


def plain(found: Found, graph: str) -> str:
    """All of it on a page without widgets."""
    return "".join(
        [
            tables.heading("Settings"),
            tables.pairs(settings_of(found.circuit)),
            summary(found),
            graph,
            tables.heading("Is it the model?"),
            completeness_table(found),
            tables.heading("Strongest edges"),
            tables.table(found.circuit.edges.head(10), SCORE),
        ]
    )


def ranked(table: pd.DataFrame) -> str:
    """The first rows of a table of edges or nodes."""
    more = tables.muted(f"The first {_ROWS} of {len(table):,}.") if len(table) > _ROWS else ""
    return more + tables.table(table.head(_ROWS), SCORE, scroll=True)


def facts_table(task: Task | None) -> str:
    """The facts of a task, with the model's rank of each answer."""
    if task is None:
        return tables.muted("The facts that this circuit was found on are not at hand.")
    known = tables.muted(
        f"{task.model_name} knows {task.n_known} of {task.n_facts} facts in “{task.template}”: there the answer's "
        "rank is 10 or better (that of its first token, or of as many as it takes to tell it from other answers)."
    )
    val = tables.heading("D_val: known facts, for discovery") + tables.table(_fact_rows(task.val))
    test = tables.heading("D_test: other facts, for the test") + tables.table(_fact_rows(task.test))
    return known + val + test


def _fact_rows(prompts: Prompts) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt": prompts.texts,
            "answer": [fact.object for fact in prompts.facts],
            "the model's rank of it": prompts.ranks.tolist(),
            "known": ["yes" if known else "no" for known in prompts.known.tolist()],
        }
    )
