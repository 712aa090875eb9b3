"""Plots of what the package's tables hold, one function for each kind of table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from kcwb.errors import SettingError
from kcwb.workbench.plots.figure import INK, MUTED, Plot, band, finish, levels, need, one_each, palette_of, panes, plain
from kcwb.workbench.tables import hit_at

_RUNS = {"full model": MUTED, "circuit": "#0072b2", "empty circuit": "#e69f00", "random circuits": "#cc79a7"}
_QUANTITIES = {"rank": "rank (geometric mean)", "probability": "probability", "hit_10": "Hit@10"}
_MOST_CELLS_WITH_NUMBERS = 150


def plot_knowledge(table: pd.DataFrame) -> Plot:
    """Draw the table of `kcwb.evaluation.knowledge.knowledge_table`: Hit@10 as pale bars, Hit@1 as full ones inside.

    Bars are coloured and grouped by category; beside each relation stands how many different answers it has.

    Raises
    ------
    SettingError
        If the table is empty, or has a relation twice.
    """
    one_each(table, ["relation"])
    ordered = table.sort_values(["category", "hit_10"], ascending=[True, False], kind="stable")
    names = [f"{plain(row.relation)}  ({row.answers})" for row in ordered.itertuples()]
    ordered = ordered.assign(name=names)
    colours = palette_of(ordered["category"])
    figure, (axes,) = panes(1, 8.5, 1.1 + 0.235 * len(ordered))
    common = {"data": ordered, "y": "name", "hue": "category", "palette": colours, "legend": False, "ax": axes}
    sns.barplot(x="hit_10", alpha=0.35, width=0.74, **common)
    sns.barplot(x="hit_1", width=0.74, **common)
    axes.set(xlim=(0, 1), xlabel="share of facts: Hit@10 (pale) and Hit@1 (full)", ylabel="")
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize=9, length=0)
    handles = [Patch(color=colour, label=plain(name)) for name, colour in colours.items()]
    finish(figure, handles, None, "upper")
    return figure


def plot_completeness(tables: Mapping[str, pd.DataFrame]) -> Plot:
    """Draw tables of `kcwb.completeness` side by side: Hit@k of each run with its 95% interval.

    Parameters
    ----------
    tables
        Title -> table, for example one per ablation; SettingError if there is none.
    """
    if not tables:
        raise SettingError("There is no table of completeness to draw.")
    rows = pd.concat([table.assign(title=title) for title, table in tables.items()], ignore_index=True)
    rows = rows[rows["split"].isin(["D_val", "D_test"]) & (rows["n"] > 0)]
    colours = {run: colour for run, colour in _RUNS.items() if run in set(rows["run"])}
    figure = _bars(rows, "split", "hit", "run", "title", colours, hit_at(rows), None)
    for axes in figure.axes:
        axes.set_ylim(0, 1.02)
    return figure


def plot_lens(
    table: pd.DataFrame, quantities: Sequence[str] = ("rank", "probability"), *, title: str | None = None
) -> Plot:
    """Draw logit-lens curves: what the model would say after each layer, for object and subject.

    Parameters
    ----------
    table
        As of `kcwb.reading.lens.lens`: columns `layer`, `quantity`, `who`, `value`, and `low` and `high`, the interval
        drawn as a band (NaN for none).
    quantities
        Which of them, a pane each. Ranks are on a logarithmic axis, the best at the top.
    title
        A heading, for example the fact.

    Raises
    ------
    SettingError
        If the table lacks a column or a quantity.
    """
    need(table, ("layer", "quantity", "who", "value", "low", "high"))
    found = list(dict.fromkeys(table["quantity"]))
    if not quantities or not set(quantities) <= set(found):
        raise SettingError(f"quantities={list(quantities)}: the table has {', '.join(map(str, found)) or 'none'}.")
    palette = palette_of(table["who"])
    figure, drawn = panes(len(quantities), 4.6, 3.2, sharey=False)
    for axes, quantity in zip(drawn, quantities, strict=True):
        draw_curves(axes, table[table["quantity"] == quantity], quantity, palette)
    finish(figure, [Line2D([], [], color=palette[who], linewidth=2, label=plain(who)) for who in palette], title)
    return figure


def plot_heads(table: pd.DataFrame, value: str, *, title: str | None = None, label: str | None = None) -> Plot:
    """Draw one number per head as a map: layers from bottom to top, heads side by side, as in the graph.

    Parameters
    ----------
    table
        Columns `layer` and `head` (or `node`, `a<layer>.h<head>`) and `value`. Heads that it lacks stay grey.
    value
        The column that is drawn. Numbers of both signs have colours that part at 0, others grow from 0.
    title, label
        A heading; the name of the number, by default the column's.

    Raises
    ------
    SettingError
        If a column is missing, a head is named twice, or nothing is left to draw.
    """
    need(table, (value,))
    table = _with_places(table).dropna(subset=[value])
    twice = table[table.duplicated(["layer", "head"])]
    if table.empty or len(twice):
        places = [f"a{layer}.h{head} is in it twice" for layer, head in zip(twice["layer"], twice["head"], strict=True)]
        what = places[0] if places else "it has no number"
        raise SettingError(f"A map of heads cannot be drawn from this table: {what}.")
    grid = table.pivot(index="layer", columns="head", values=value).astype(float)
    grid = grid.reindex(index=range(int(max(grid.index)), -1, -1), columns=range(int(max(grid.columns)) + 1))
    largest = float(grid.abs().max().max()) or 1.0
    signed = bool((grid < 0).any().any())
    colours = {"cmap": "vlag", "vmin": -largest, "vmax": largest} if signed else {"cmap": "Blues", "vmin": 0}
    size = (1.8 + 0.42 * grid.shape[1], 1.2 + 0.22 * grid.shape[0])
    figure, axes = _heat_map(grid, size, plain(label or value), ("head", "layer"), **colours)
    axes.set_facecolor("#d5d9de")
    axes.tick_params(rotation=0)
    finish(figure, [], title)
    return figure


def plot_attention(pattern: pd.DataFrame, *, title: str | None = None) -> Plot:
    """Draw where each token of a prompt attends.

    Parameters
    ----------
    pattern
        As of `kcwb.reading.nodes.attention_pattern`: rows are queries, columns keys, both labelled by their tokens;
        shares of attention between 0 and 1. What a causal model cannot see, keys after the query, stays blank.
    title
        A heading, for example the head.

    Raises
    ------
    SettingError
        If the pattern is empty or holds numbers that are not shares.
    """
    values = pattern.to_numpy(dtype=float)
    if not values.size or not np.isfinite(values).all() or values.min() < -1e-6 or values.max() > 1 + 1e-4:
        raise SettingError("An attention pattern holds shares between 0 and 1, one row per query and column per key.")
    n_queries, n_keys = values.shape
    later = np.arange(n_keys)[None, :] > np.arange(n_queries)[:, None] + n_keys - n_queries
    hidden = later & bool((values[later] == 0).all())
    rows, columns = ([plain(label, 24) for label in labels] for labels in (pattern.index, pattern.columns))
    figure, axes = _heat_map(
        pd.DataFrame(values), (2.4 + 0.34 * n_keys, 1.6 + 0.3 * n_queries), "attention", ("to", "from"),
        mask=hidden, vmin=0, vmax=1, cmap="Blues", xticklabels=False, yticklabels=False,
        annot=values.size <= _MOST_CELLS_WITH_NUMBERS, fmt=".2f", annot_kws={"fontsize": 6.5},
    )  # fmt: skip
    axes.set_xticks(np.arange(n_keys) + 0.5, columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(n_queries) + 0.5, rows)
    axes.tick_params(length=0, labelsize=8)
    finish(figure, [], title)
    return figure


def plot_faithfulness(curves: pd.DataFrame | Mapping[str, pd.DataFrame], *, title: str | None = None) -> Plot:
    """Draw faithfulness over the size of circuits, with its intervals.

    Parameters
    ----------
    curves
        A table of `kcwb.evaluation.faithfulness.faithfulness_curve`, or several by name.
    title
        A heading.

    Raises
    ------
    SettingError
        If there is no curve, or a table lacks a column.
    """
    named = {"circuit": curves} if isinstance(curves, pd.DataFrame) else dict(curves)
    if not named:
        raise SettingError("There is no faithfulness curve to draw.")
    for table in named.values():
        need(table, ("fraction", "faithfulness", "low", "high"))
    palette = palette_of(pd.Series(list(named)))
    figure, (axes,) = panes(1, 7, 3.4)
    levels(axes, 0, 1)  # the empty circuit, the full model
    for name, table in named.items():
        band(axes, table, "fraction", "faithfulness", palette[name], marker="o")
    fractions = pd.concat([table["fraction"] for table in named.values()])
    if (fractions == 0).any():
        axes.set_xscale("symlog", linthresh=float(fractions[fractions > 0].min()))
    else:
        axes.set_xscale("log")
    axes.set(xlabel="share of all edges asked for", ylabel="faithfulness")
    handles = [Line2D([], [], color=palette[name], marker="o", label=plain(name)) for name in named]
    finish(figure, handles if len(handles) > 1 else [], title)
    return figure


def plot_bars(
    table: pd.DataFrame,
    x: str,
    y: str = "value",
    *,
    hue: str | None = None,
    column: str | None = None,
    low: str = "low",
    high: str = "high",
    label: str | None = None,
    title: str | None = None,
) -> Plot:
    """Draw bars with their intervals, for example before and after an edit or an ablation.

    Parameters
    ----------
    table
        One row per bar.
    x, y
        The columns of the groups and of the bars' heights.
    hue
        The column that tells the bars of a group apart, for example `state` with `before` and `after`.
    column
        The column whose values have a pane each.
    low, high
        The columns of the interval; NaN draws none.
    label, title
        The name of the number, by default the column's; a heading.

    Raises
    ------
    SettingError
        If a column is missing, or two rows are one bar.
    """
    keys = [name for name in (x, hue, column) if name is not None]
    need(table, (*keys, y, low, high))
    one_each(table, keys)
    kinds = list(dict.fromkeys(table[hue])) if hue else [None]
    shades = ["#9ecae1", "#0072b2"] if len(kinds) == 2 else sns.color_palette("colorblind", len(kinds))
    rows = table.assign(low=table[low], high=table[high])
    return _bars(rows, x, y, hue, column, dict(zip(kinds, shades, strict=True)), label or y, title)


def plot_frontier(curves: pd.DataFrame, *, title: str | None = None) -> Plot:
    """Draw faithfulness over edges, a line for each method; curves of several tasks (column `task`) side by side.

    Parameters
    ----------
    curves
        The first table of `kcwb.evaluation.frontier`, or several of them with a column `task`.
    title
        A heading.

    Raises
    ------
    SettingError
        If the table lacks a column, or is empty.
    """
    need(curves, ("method", "edges", "faithfulness", "low", "high"))
    if curves.empty:
        raise SettingError("There is no curve to draw: the table is empty.")
    parts = dict(iter(curves.groupby("task", sort=False))) if "task" in curves else {"": curves}
    palette = palette_of(curves["method"])
    figure, drawn = panes(len(parts), 4.2, 3.4)
    for axes, (task, part) in zip(drawn, parts.items(), strict=True):
        levels(axes, 0, 0.9, 1)
        for method, curve in part.groupby("method", sort=False):
            band(axes, curve[curve["edges"] > 0], "edges", "faithfulness", palette[method], marker="o", markersize=4)
        axes.set_xscale("log")
        axes.set(xlabel="edges", ylim=(-0.25, 1.25))
        axes.set_title(plain(task), fontsize=10)
    drawn[0].set_ylabel("faithfulness, held-out facts")
    finish(figure, [Line2D([], [], color=palette[name], marker="o", label=plain(name)) for name in palette], title)
    return figure


# --- shared ---


def draw_curves(axes: Axes, table: pd.DataFrame, quantity: str, palette: Mapping[Any, Any]) -> None:
    """Draw `value` over `layer`, a line for each `who`; ranks on a logarithmic axis, the best at the top."""
    for who, curve in table.groupby("who", sort=False):
        band(axes, curve, "layer", "value", palette[who])
    axes.set(xlabel="after layer", ylabel=_QUANTITIES.get(quantity, plain(quantity)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if quantity == "rank":
        axes.set_yscale("log")
        axes.invert_yaxis()
    else:
        axes.set_ylim(bottom=0)


def _heat_map(
    grid: pd.DataFrame, size: tuple[float, float], label: str, names: tuple[str, str], **more: Any
) -> tuple[Plot, Axes]:
    """Cells in colour, with a bar that says what the colours are; `names` are of the axes x and y."""
    with sns.axes_style("white"):
        figure = Plot(figsize=size, layout="constrained")
        axes = figure.subplots()
    sns.heatmap(grid, ax=axes, cbar_kws={"label": label}, linewidths=0.5, linecolor="white", **more)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.tick_params(length=0, labelsize=8)
    return figure, axes


def _bars(
    table: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None,
    column: str | None,
    colours: Mapping[Any, Any],
    label: str,
    title: str | None,
) -> Plot:
    """Bars with their intervals `low` to `high`; `colours` has the bars of a group in their order."""
    groups = list(dict.fromkeys(table[x]))
    names = [plain(group, 24) for group in groups]
    parts = {None: table} if column is None else {key: part for key, part in table.groupby(column, sort=False)}
    figure, drawn = panes(len(parts), max(3.2, 1.2 + 0.42 * len(groups) * len(colours)), 3.2)
    width = 0.8 / len(colours)
    for axes, (name, part) in zip(drawn, parts.items(), strict=True):
        for i, (kind, colour) in enumerate(colours.items()):
            rows = (part if hue is None else part[part[hue] == kind]).set_index(x).reindex(groups)
            places = np.arange(len(groups)) - 0.4 + (i + 0.5) * width
            axes.bar(places, rows[y], width * 0.94, color=colour)
            axes.vlines(places, rows["low"], rows["high"], color=INK, linewidth=1.1)
        axes.set_xticks(range(len(groups)), names)
        axes.set_title("" if column is None else plain(name), fontsize=10)
        axes.grid(axis="x", visible=False)
        axes.set_axisbelow(True)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        if len(groups) * max(map(len, names)) > 60:
            axes.tick_params(axis="x", rotation=60)
            figure.set_figheight(4.4)
    drawn[0].set_ylabel(plain(label))
    finish(figure, [Patch(color=colour, label=plain(kind)) for kind, colour in colours.items()] if hue else [], title)
    return figure


def _with_places(table: pd.DataFrame) -> pd.DataFrame:
    """The heads of a table with whole numbers for `layer` and `head`, read from `node` if it lacks them."""
    if not {"layer", "head"} <= set(table):
        need(table, ("node",))
        places = table["node"].astype(str).str.extract(r"^a(?P<layer>\d+)\.h(?P<head>\d+)$")
        table = table.drop(columns=["layer", "head"], errors="ignore").join(places).dropna(subset=["layer", "head"])
    heads = table[table["head"].astype(int) >= 0]  # an MLP has none
    return heads.astype({"layer": int, "head": int})
