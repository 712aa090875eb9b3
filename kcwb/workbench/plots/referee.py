"""Pictures of a judgement: the circuit under each ablation, its edges against random paths, its rivals.

Under each picture belongs a sentence that says in numbers what it shows: `matrix_sentence`, `minimality_sentence`,
`rivals_sentence`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from kcwb.circuits.provenance import part
from kcwb.errors import SettingError
from kcwb.evaluation.referee.hypotheses import QUANTILE
from kcwb.evaluation.referee.judgement import Judgement
from kcwb.workbench.plots.figure import INK, Plot, band, finish, levels, need, panes, plain
from kcwb.workbench.tables import decimal

_CELL, _MARGIN = 0.72, 1.2  # inches: a cell, and what is around the map
_NULL, _KEPT, _IDLE = "#c3c9d0", "#0072b2", "#d55e00"
_BINS, _ROWS = 40, 7


def plot_matrix(judgement: Judgement, *, title: str | None = None) -> Plot:
    """Draw the faithfulness of circuits found under one ablation (rows) and tested under another (columns).

    A pane for each level, edges and nodes. The cell of the judged circuit, found and tested under its own ablation, is
    framed.

    Raises
    ------
    SettingError
        If the judgement has no such matrix, as one of a quick referee may.
    """
    table = judgement.matrix
    need(table, ("found", "tested", "level", "faithfulness"))
    if table.empty:
        raise SettingError("This judgement has no matrix of ablations to draw: its table is empty.")
    (found, tested), levels = _own(judgement), list(dict.fromkeys(table["level"]))
    side = _MARGIN + _CELL * max(table["found"].nunique(), table["tested"].nunique())
    figure, drawn = panes(len(levels), side, side)
    for axes, level in zip(drawn, levels, strict=True):
        grid = _grid(table, level)
        axes.grid(visible=False)
        sns.heatmap(
            grid, ax=axes, cmap="Blues", vmin=0, vmax=1, linewidths=0.5, linecolor="white", square=True,
            annot=grid.map(decimal), fmt="", annot_kws={"fontsize": 10}, cbar=axes is drawn[-1],
            cbar_kws={"label": "faithfulness", "shrink": 0.8},
            xticklabels=list(map(plain, grid.columns)), yticklabels=list(map(plain, grid.index)),
        )  # fmt: skip
        axes.set(xlabel="tested under", ylabel="found under" if axes is drawn[0] else "")
        axes.set_title(plain(level), fontsize=10)
        axes.tick_params(length=0, labelsize=9, rotation=0)
        if found in grid.index and tested in grid.columns:
            corner = (list(grid.columns).index(tested), list(grid.index).index(found))
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_IDLE, linewidth=2.5, clip_on=False))
    framed = Patch(fill=False, edgecolor=_IDLE, linewidth=2, label="the circuit itself")
    finish(figure, [framed] if any(axes.patches for axes in drawn) else [], title)
    return figure


def matrix_sentence(judgement: Judgement) -> str:
    """What `plot_matrix` shows: the circuit's own row, and the mean on and off the diagonal."""
    table, (found, own) = judgement.matrix, _own(judgement)
    if table.empty:
        return "No other ablation was tried."
    said = []
    for level in dict.fromkeys(table["level"]):
        grid = _grid(table, level)
        if found in grid.index:
            row: dict[Any, float] = grid.loc[found].dropna().to_dict()
            here = [f"{decimal(row[own])} when tested under {own}"] if own in row else []
            others = [f"{decimal(value)} under {name}" for name, value in row.items() if name != own]
            what = "the circuit" if level == "edges" else f"with all edges among its {level} it"
            said += [f"found under {found}, {what} recovers {_listed([*here, *others])}"] if row else []
        same = [grid.loc[name, name] for name in grid.index if name in grid.columns]
        apart = [grid.loc[a, b] for a in grid.index for b in grid.columns if a != b]
        if len(grid) > 1 and np.isfinite(same).any() and np.isfinite(apart).any():
            said.append(
                f"in the mean over {level}, circuits keep {decimal(float(np.nanmean(same)))} under the ablation that "
                f"they were found under and {decimal(float(np.nanmean(apart)))} under others"
            )
    gain = "Faithfulness is the share of what the model gains over the empty circuit that a circuit gains alone"
    return " ".join(f"{one[0].upper()}{one[1:]}." for one in [*said, gain])


def plot_minimality(judgement: Judgement, *, title: str | None = None) -> Plot:
    """Draw what cutting each edge of the circuit does, above what cutting edges of random paths does.

    An edge is superfluous (an orange cross) where its effect surely exceeds that of fewer than nine in ten of those,
    whose .9 quantile is the line. Far from 0 the axis is logarithmic.

    Raises
    ------
    SettingError
        If no edge was cut alone.
    """
    need(judgement.edges, ("effect", "superfluous"))
    edges, null = kept_edges(judgement), judgement.null["effect"].to_numpy(dtype=float)
    if edges.empty or not len(null):
        raise SettingError("This judgement has no effects of edges to draw: its table is empty.")
    figure, (axes,) = panes(1, 8.6, 3.2)
    idle = edges["superfluous"].to_numpy(dtype=bool)
    effects = edges["effect"].to_numpy(dtype=float)
    near = max(float(np.median(np.abs(null))), 1e-3 * float(np.abs(np.concatenate([null, effects])).max()), 1e-9)
    ends = np.arcsinh(np.array([min(null.min(), effects.min()), max(null.max(), effects.max())]) / near)
    borders = near * np.sinh(np.linspace(ends[0] - 1e-6, ends[1] + 1e-6, _BINS + 1))
    counts, _ = np.histogram(null, borders)
    axes.stairs(0.9 * counts / counts.max(), borders, fill=True, color=_NULL, zorder=2)
    places = 1.1 + 0.8 * (np.arange(len(effects)) * 3 % _ROWS) / (_ROWS - 1)  # rows apart, so that few hide another
    looks: Any = {"marker": "o", "s": 18, "color": _KEPT, "alpha": 0.7}, {"marker": "x", "s": 26, "color": _IDLE}
    for which, look in zip((~idle, idle), looks, strict=True):
        axes.scatter(effects[which], places[which], zorder=3, linewidths=1.2, **look)
    axes.axvline(float(np.quantile(null, QUANTILE)), color=INK, linewidth=1.2, linestyle="--", zorder=4)
    axes.set_xscale("asinh", linear_width=near)
    if len(ticks := _ticks(near, *(near * np.sinh(ends)))) > 2:
        axes.set_xticks(ticks, [f"{tick:g}".replace("-", "\u2212") for tick in ticks])
        axes.minorticks_off()
    margin = 0.03 * (ends[1] - ends[0]) + 1e-6
    shown = near * np.sinh(ends + np.array([-margin, margin]))
    axes.set(xlabel="by how much cutting it changes the loss of a fact, nats", xlim=shown, ylim=(0, 2.05))
    axes.set_yticks([0.45, 1.5], ["edges of\nrandom paths", "edges of\nthe circuit"])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    point: dict[str, Any] = {"color": "none", "linestyle": "none"}
    finish(
        figure,
        [
            Line2D([], [], marker="o", markerfacecolor=_KEPT, markeredgecolor=_KEPT, label="edge", **point),
            Line2D([], [], marker="x", markeredgecolor=_IDLE, label="superfluous edge", **point),
            Patch(color=_NULL, label="random paths"),
            Line2D([], [], color=INK, linewidth=1.2, linestyle="--", label=f"their {decimal(QUANTILE, 1)} quantile"),
        ],
        title,
    )
    return figure


def minimality_sentence(judgement: Judgement) -> str:
    """What `plot_minimality` shows: how many edges matter more than random paths, and which matters most."""
    edges, null = kept_edges(judgement), judgement.null["effect"]
    if edges.empty or null.empty:
        return "No edge was cut alone."
    level = float(null.quantile(QUANTILE))
    above, idle = int((edges["effect"] > level).sum()), int(edges["superfluous"].sum())
    most = edges.iloc[int(np.nanargmax(edges["effect"]))]
    return (
        f"Cut one at a time, {above:,} of {len(edges):,} edges change the loss by more than {decimal(QUANTILE, 1)} of "
        f"{len(null):,} edges of random paths do ({level:.2g} nats); {idle:,} {'is' if idle == 1 else 'are'} "
        f"superfluous. {most['sender']}->{most['receiver']} matters most: {most['effect']:.2g} nats."
    )


def plot_rivals(judgement: Judgement, *, title: str | None = None) -> Plot:
    """Draw how faithful the best other circuits are, by how many of the circuit's strongest edges they lack.

    Raises
    ------
    SettingError
        If there are none.
    """
    table = judgement.rivals
    need(table, ("without", "faithfulness", "low", "high"))
    if table.empty:
        raise SettingError("This judgement has no rivals to draw: its table is empty.")
    figure, (axes,) = panes(1, 5, 3)
    levels(axes, 0, 1)  # the empty circuit, the full model
    band(axes, table, "without", "faithfulness", _KEPT, marker="o")
    axes.set(xlabel="of the circuit's strongest edges, how many a rival lacks", ylabel="faithfulness")
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xticks(table["without"], [f"{int(one):,}" for one in table["without"]])
    axes.minorticks_off()
    finish(figure, [], title)
    return figure


def rivals_sentence(judgement: Judgement) -> str:
    """What `plot_rivals` shows: how well the farthest rival does."""
    if judgement.rivals.empty:
        return "No other circuit was looked for."
    table = judgement.rivals.sort_values("without")
    last, none = table.iloc[-1], [f"{int(one):,}" for one in table["without"][table["edges"] == 0]]
    broken = f" Without {_listed(none)}, the edges of highest score hold no path from input to logits." if none else ""
    return (
        f"Without the {int(last['without']):,} strongest edges of the circuit, another of {int(last['edges']):,} "
        f"edges, {int(last['shared']):,} of them shared, recovers {decimal(last['faithfulness'])}.{broken}"
    )


def kept_edges(judgement: Judgement) -> pd.DataFrame:
    """Of the edges that were cut alone, those of the circuit."""
    edges = judgement.edges
    return edges[edges["kept"].astype(bool)] if "kept" in edges else edges


def _ticks(near: float, low: float, high: float) -> list[float]:
    """0 and the powers of ten of both signs that stand apart from it."""
    largest = max(-low, high, near)
    powers = [10.0**e for e in range(math.ceil(math.log10(1.5 * near)), math.floor(math.log10(largest)) + 1)]
    return [one for one in sorted([0.0, *powers, *(-one for one in powers)]) if low <= one <= high]


def _grid(table: pd.DataFrame, level: str) -> pd.DataFrame:
    """Faithfulness of one level: rows found, in the order of first mention, columns tested, in the same order."""
    rows, columns = (list(dict.fromkeys(table[name])) for name in ("found", "tested"))
    columns.sort(key=lambda name: rows.index(name) if name in rows else len(rows))
    some = table[table["level"] == level].pivot(index="found", columns="tested", values="faithfulness")
    return some.reindex(index=rows, columns=columns).astype(float)


def _own(judgement: Judgement) -> tuple[str, str]:
    """The ablations that the circuit was found and judged under, as the matrix names them."""
    said, tested = judgement.provenance, str(part(judgement.provenance, "settings").get("ablation"))
    how, rows = part(said, "circuit").get("found with"), set(judgement.matrix.get("found", ()))
    return next((one for one in (how if isinstance(how, list) else []) if one in rows), tested), tested


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 2 else words)
