"""An ensemble in words and tables: functions from it to HTML, every text escaped."""

from __future__ import annotations

from typing import Any

import pandas as pd

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.ensemble import Ensemble
from kcwb.circuits.provenance import part
from kcwb.workbench import tables
from kcwb.workbench.graph.sureness import alone
from kcwb.workbench.panels.results import SCORE, ranked, settings_of
from kcwb.workbench.plots import picture, plot_confidence, plot_inclusion, plot_sources

UNTESTED = "Press Test, and the consensus at each confidence is run on facts that no draw has seen; a minute or so."


def pages(ensemble: Ensemble) -> dict[str, str]:
    """What is shown of an ensemble whatever the confidence, by the titles of tabs."""
    return {
        "How sure?": _how_sure(ensemble),
        "Confidence curve": tables.muted(UNTESTED),
        "By layer": picture(plot_inclusion(ensemble), "Inclusion probability by layers of senders and receivers")
        + tables.muted(
            "At the left, how many edges a draw has in the mean between two layers; at the right, how sure they are, "
            "the mean over edges that some draw keeps."
        ),
        "Edges": _edges(ensemble),
        "Nodes": ranked(_with_interval(ensemble.nodes.drop(columns=["layer", "head"]))),
    }


def summary(ensemble: Ensemble, circuit: Circuit, confidence: float) -> str:
    """The ensemble, and its consensus at a confidence."""
    kept = ensemble.kept.double().mean(0)
    drawn = f"{len(ensemble)} draws of {ensemble.size:,.0f} edges in the mean"
    sure = f"{int((kept >= 0.9 - 1e-9).sum()):,} edges in nine of ten draws, {len(kept):,} in some"
    nowhere = int((kept >= confidence - 1e-9).sum()) - circuit.n_edges
    at = f"{circuit.n_edges:,} edges, {circuit.n_nodes:,} of {ensemble.graph.n_senders - 1:,} heads and MLPs"
    at += f" · {nowhere:,} more edges lead nowhere" if nowhere else ""
    return tables.summary(f"{drawn}: {sure}") + tables.summary(f"At confidence {confidence:.2f}: {at}")


def curve(table: pd.DataFrame) -> str:
    """What each confidence is worth."""
    shown = table.drop(columns=["k", "low", "high"]).rename(columns={"hit": "Hit@10", "nll": "nll, nats"})
    shown["Hit@10"] = [tables.estimate(*row) for row in table[["hit", "low", "high"]].itertuples(index=False)]
    words = (
        "Facts that no draw of the circuit has seen: the consensus of one half of D_val is tested on the other half, "
        "that of all on D_test. Beside each, random connected circuits of its size."
    )
    drawn = picture(plot_confidence(table), "Hit@10, loss and size of the consensus against its confidence")
    return drawn + tables.muted(words) + tables.table(shown, scroll=True)


def card(ensemble: Ensemble, name: str) -> str:
    """An edge (`sender->receiver`) or a node: in how many draws it is, and what removes it."""
    if "->" not in name:
        return _card_of_node(ensemble, name)
    sender, _, receiver = name.partition("->")
    table = ensemble.edges
    found = table[(table["sender"] == sender) & (table["receiver"] == receiver)]
    heading = f"{sender} → {receiver}"
    if found.empty:
        return tables.heading(heading) + tables.muted(f"None of {len(ensemble)} draws keeps it.")
    row: dict[Any, Any] = found.iloc[0].to_dict()
    place = ensemble.places.tolist().index(list(ensemble.graph.edge_index(name)))
    split = pd.DataFrame(
        [
            {
                "drawn again": alone(source),
                "of draws that keep it": int(ensemble.kept[: len(twin), place].sum()),
                "without it then": _share(row[source]),
            }
            for source, twin in ensemble.twins.items()
        ]
    )
    return tables.heading(heading) + _draws_of(row, ensemble) + (tables.table(split) if len(split) else "")


def plain(ensemble: Ensemble, circuit: Circuit, *parts: str) -> str:
    """The settings and all of these pieces, on a page without widgets."""
    told = settings_of(circuit) | {"draws": len(ensemble), "varied": ", ".join(ensemble.twins) or None}
    shown = {name: value for name, value in told.items() if value is not None}
    return "".join([tables.heading("Settings"), tables.pairs(shown), *parts])


def _how_sure(ensemble: Ensemble) -> str:
    sources, parts = ensemble.sources, []
    if ensemble.twins:
        named = sources[["source", "edges", "iou"]].rename(
            columns={"edges": "edges apart", "iou": "edges shared (IoU)"}
        )
        for index in ("alone", "total"):
            columns = [index, f"{index}_low", f"{index}_high"]
            named[index] = [tables.estimate(*row) for row in sources[columns].itertuples(index=False)]
        words = (
            "Two draws that differ in one source alone, and at last in everything. alone: the share of the variance "
            "that would be left if nothing else were drawn; total: what would go if it were not."
        )
        drawn = picture(plot_sources(ensemble), "The share of the variance between draws by source")
        told = f'<div style="flex:1 1 380px;min-width:0">{tables.table(named)}{tables.muted(words)}</div>'
        parts += [tables.heading("What it depends on"), tables.beside(f"<div>{drawn}</div>", told)]
    else:
        parts.append(tables.muted("No source was drawn again by itself, so that the variance has no split."))
    left_out = [f"{name}: {why}" for name, why in part(ensemble.provenance, "left_out").items()]
    parts += [tables.muted(f"Not varied: {'; '.join(left_out)}.")] if left_out else []
    bound = ensemble.bound().drop(columns="null").rename(columns={"bound": "false, at most"})
    words = (
        "How many of the edges at a confidence are false, at most, in the mean; under the assumptions of stability "
        "selection, and only above one half."
    )
    return "".join([*parts, tables.heading("How many may be false"), tables.table(bound), tables.muted(words)])


def _edges(ensemble: Ensemble) -> str:
    table = ensemble.edges
    shares = {source: table[source].map(_share) for source in ensemble.twins}
    shown = _with_interval(table.assign(**shares)).rename(columns={name: f"gone: {name}" for name in shares})
    words = "gone: of draws that keep the edge, in how many it is gone when this source alone is drawn again. "
    return (tables.muted(words) if shares else "") + ranked(shown)


def _with_interval(table: pd.DataFrame) -> pd.DataFrame:
    """A table with `pi` and its interval in one column."""
    told = [tables.estimate(*row) for row in table[["pi", "low", "high"]].itertuples(index=False)]
    return table.assign(pi=told).drop(columns=["low", "high"]).rename(columns={"pi": "π"})


def _card_of_node(ensemble: Ensemble, name: str) -> str:
    nodes = ensemble.nodes
    found = nodes[nodes["node"] == name]
    if found.empty:
        return tables.heading(name) + tables.muted(f"None of {len(ensemble)} draws has it.")
    table = ensemble.edges
    joined = (table["sender"] == name) | (table["receiver"].str.partition("<")[0] == name)
    surest = table[joined].head(10)[["sender", "receiver", "pi", "low", "high", "draws", "score"]]
    told = tables.heading(name) + _draws_of(found.iloc[0].to_dict(), ensemble)
    return told + tables.heading("Its surest edges") + tables.table(_with_interval(surest), SCORE)


def _draws_of(row: dict[Any, Any], ensemble: Ensemble) -> str:
    interval = tables.estimate(row["pi"], row["low"], row["high"])
    return tables.summary(f"In {row['draws']} of {len(ensemble)} draws: π = {interval}")


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.0%}"
