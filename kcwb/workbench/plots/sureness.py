"""Plots of an ensemble of circuits: how sure its edges are, what that depends on, and what each confidence is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kcwb.circuits.ensemble import Ensemble
from kcwb.errors import SettingError
from kcwb.workbench.plots.charts import plot_bars
from kcwb.workbench.plots.figure import Plot, band, finish, need, panes, plain
from kcwb.workbench.tables import hit_at

_COLOURS = {"consensus": "#0072b2", "random circuits": "#cc79a7"}
_LINES: Any = ("-", "--", ":")
_CELL, _MARGIN = 0.14, 1.2  # inches: a layer, and what is around the map


def plot_confidence(curve: pd.DataFrame, *, title: str | None = None) -> Plot:
    """Draw a table of `kcwb.Ensemble.curve`: Hit@k, loss and size of the consensus circuit against its confidence.

    Colours tell the consensus from random circuits of its sizes, lines one split of the facts from another.

    Raises
    ------
    SettingError
        If the table lacks a column, or is empty.
    """
    need(curve, ("confidence", "split", "run", "edges", "hit", "low", "high", "nll"))
    if curve.empty:
        raise SettingError("There is no confidence curve to draw: the table is empty.")
    figure, (hits, losses, sizes) = panes(3, 3.6, 3.2, sharey=False)
    lines = {split: _LINES[i % len(_LINES)] for i, split in enumerate(dict.fromkeys(curve["split"]))}
    for (run, split), part in curve.groupby(["run", "split"], sort=False):
        bare = part.assign(low=np.nan, high=np.nan)
        style = {"marker": "o", "markersize": 4, "linestyle": lines[split]}
        colour = _COLOURS.get(str(run), _COLOURS["random circuits"])
        band(hits, part, "confidence", "hit", colour, **style)
        band(losses, bare, "confidence", "nll", colour, **style)
        if run == "consensus":
            band(sizes, bare, "confidence", "edges", colour, **style)
    hits.set(ylabel=f"{hit_at(curve)}, with its 95% interval", ylim=(-0.02, 1.02))
    losses.set(ylabel="loss, nats")
    sizes.set(ylabel="edges of the consensus")
    if curve["edges"].max() > 0:
        sizes.set_yscale("symlog", linthresh=1)
        sizes.set_ylim(bottom=0)
    for axes in (hits, losses, sizes):
        axes.set(xlabel="confidence", xlim=(-0.02, 1.02))
    runs = [run for run in _COLOURS if run in set(curve["run"])]
    handles = [Line2D([], [], color=_COLOURS[run], marker="o", markersize=4, label=run) for run in runs]
    handles += [Line2D([], [], color="#656d76", linestyle=lines[split], label=plain(split)) for split in lines]
    finish(figure, handles, title)
    return figure


def plot_inclusion(ensemble: Ensemble, *, title: str | None = None) -> Plot:
    """Draw where an ensemble's edges are, and how sure: from a layer of senders (rows) to one of receivers (columns).

    At the left the sum of inclusion probabilities, which is how many edges a draw has there in the mean; at the right
    their mean, over edges that some draw keeps.
    """
    sums, means = inclusion_by_layer(ensemble)
    side = _MARGIN + _CELL * max(len(sums), 12)
    figure, drawn = panes(2, side + 0.6, side, sharey=False)
    for axes, grid, words in zip(drawn, (sums, means), ("edges in a draw (sum of π)", "mean π"), strict=True):
        most = 1.0 if grid is means else max(float(np.nanmax(grid.to_numpy(), initial=0)), 1e-9)
        shades = Normalize(0, most) if grid is means else PowerNorm(0.5, 0, most)  # most of a circuit is in few cells
        axes.grid(visible=False)
        sns.heatmap(
            grid.iloc[::-1], ax=axes, cmap="Blues", vmin=0, vmax=most, norm=shades, linewidths=0.4, linecolor="#eceff2",
            cbar_kws={"label": words, "shrink": 0.8}, xticklabels=True, yticklabels=True, square=True,
        )  # fmt: skip
        axes.set(xlabel="layer that receives", ylabel="layer that sends")
        axes.tick_params(length=0, labelsize=6.5 if len(sums) > 16 else 8)
        axes.tick_params(axis="x", rotation=90)
        axes.tick_params(axis="y", rotation=0)
    finish(figure, [], title)
    return figure


def inclusion_by_layer(ensemble: Ensemble) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sum and mean of inclusion probabilities by layer: rows send, columns receive.

    The mean is over edges that some draw keeps; NaN where there are none.
    """
    graph, (rows, columns) = ensemble.graph, ensemble.places.T
    layers = torch.tensor([graph.node(name).layer for name in graph.node_names])
    senders, receivers = layers[rows] + 1, layers[graph.receiver_node[columns]]
    n = graph.n_layers + 1
    kept = ensemble.kept.double().mean(0)
    sums, counts = torch.zeros(n, n).double(), torch.zeros(n, n).double()
    sums.index_put_((senders, receivers), kept, accumulate=True)
    counts.index_put_((senders, receivers), (kept > 0).double(), accumulate=True)
    names = [str(layer) for layer in range(graph.n_layers)]
    shares = sums / counts
    frames = [pd.DataFrame(one.numpy(), ["input", *names], [*names, "logits"]) for one in (sums, shares)]
    return frames[0].where(counts.numpy() > 0), frames[1]


def plot_sources(ensemble: Ensemble, *, title: str | None = None) -> Plot:
    """Draw what the draws depend on: of each source of chance the share of the variance, alone and in all.

    Raises
    ------
    SettingError
        If no source was drawn again by itself.
    """
    table = ensemble.sources.iloc[:-1]
    if table.empty:
        raise SettingError("This ensemble has no twins, on which the split by source rests (discover_many(twins=)).")
    parts = [
        table[["source"]].assign(index=index, value=table[name], low=table[f"{name}_low"], high=table[f"{name}_high"])
        for name, index in (("alone", "alone"), ("total", "total: alone or with others"))
    ]
    label = "share of the variance"
    figure = plot_bars(pd.concat(parts), "source", hue="index", label=label, title=title)
    figure.axes[0].yaxis.set_major_locator(MaxNLocator(6))
    return figure
