"""Circuits as the leaderboard of MIB takes them (circuit localization track, arXiv 2504.13151).

Its README (github.com/hannamw/MIB-circuit-track) asks for a folder per task and model, `ioi_gpt2` or `arc-easy_llama3`,
with either one file of importance scores of all edges, or nine circuits of at most .1, .2, .5, 1, 2, 5, 10, 20 and 50%
of the edges; files are read by EAP-IG's `Graph.from_json`, the form of which is that of `kcwb.circuits.interchange`:

    <folder>/ioi_gpt2/importances.json       edges with scores: the highest are kept, by their sign
    <folder>/ioi_qwen2.5/0.1.json, ...       edges that are in the circuit

EAP-IG also reads `.pt` files, which are pickles; none is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kcwb.circuits.circuit import Circuit
from kcwb.circuits.interchange import save_mib
from kcwb.errors import CircuitError, choose
from kcwb.verbs import verb


class Size(NamedTuple):
    """A model of the benchmark."""

    n_layers: int
    n_heads: int
    d_model: int


#: GPT-2 small, Qwen2.5-0.5B, Gemma-2-2B and Llama-3.1-8B by the benchmark's names.
SIZES = {
    "gpt2": Size(12, 12, 768),
    "qwen2.5": Size(24, 14, 896),
    "gemma2": Size(26, 8, 2304),
    "llama3": Size(32, 32, 4096),
}
#: Task -> the models that are evaluated on it.
CELLS = {
    "ioi": ("gpt2", "qwen2.5", "gemma2", "llama3"),
    "mcqa": ("qwen2.5", "gemma2", "llama3"),
    "arithmetic-addition": ("llama3",),
    "arithmetic-subtraction": ("llama3",),
    "arc-easy": ("gemma2", "llama3"),
    "arc-challenge": ("llama3",),
}
#: Of which percentage of the edges each of several circuits has at most.
PERCENTAGES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


@verb
def save_submission(circuits: Mapping[str, Circuit | Sequence[Circuit]], folder: str | Path) -> list[Path]:
    """Write circuits in the folders and files that MIB's leaderboard takes.

    Parameters
    ----------
    circuits
        By task and model, `{"ioi_gpt2": circuit}`: a circuit with a score for every edge of its graph, as methods that
        score edges find it, or nine circuits, of at most `PERCENTAGES` of the edges in this order. The leaderboard
        wants two tasks and two models at least.
    folder
        Where to; a file that is there is replaced.

    Returns
    -------
    list
        The files that were written.

    Raises
    ------
    CircuitError
        If a circuit is not of the model's size, an edge has no score, or there are more edges than may be. Nothing is
        written then.
    SettingError
        If a name is not one of a task and a model that are evaluated.
    """
    known = [f"{task}_{model}" for task, models in CELLS.items() for model in models]
    files: dict[Path, tuple[Circuit, int]] = {}
    for name, given in circuits.items():
        size = SIZES[choose("The task and model", name, known).split("_")[1]]
        some = [given] if isinstance(given, Circuit) else list(given)
        for circuit in some:
            _check_size(name, circuit, size)
        if isinstance(given, Circuit):
            _check_scores(name, given)
            files[Path(folder) / name / "importances.json"] = given, size.d_model
            continue
        if len(some) != len(PERCENTAGES):
            raise CircuitError(f"{name}: {len(some)} circuits; give one with scores, or {len(PERCENTAGES)}.")
        for circuit, percentage in zip(some, PERCENTAGES, strict=True):
            most = int(circuit.graph.n_edges * percentage / 100)
            if circuit.n_edges > most:
                raise CircuitError(
                    f"{name}: the circuit of at most {percentage}% of {circuit.graph.n_edges} edges may have {most}, "
                    f"this one has {circuit.n_edges}. Use kcwb.resize."
                )
            files[Path(folder) / name / f"{percentage}.json"] = circuit, size.d_model
    for path, (circuit, d_model) in files.items():
        save_mib(circuit, path, d_model=d_model, force=True)
    return list(files)


def _check_size(name: str, circuit: Circuit, size: Size) -> None:
    graph = circuit.graph
    if (graph.n_layers, graph.n_heads, graph.parallel) != (size.n_layers, size.n_heads, False):
        raise CircuitError(
            f"{name}: the benchmark's model has {size.n_layers} layers of {size.n_heads} heads; the circuit is of "
            f"{graph}."
        )


def _check_scores(name: str, circuit: Circuit) -> None:
    exists = circuit.graph.exists
    missing = int(exists.sum()) if circuit.scores is None else int(circuit.scores[exists].isnan().sum())
    if missing:
        raise CircuitError(
            f"{name}: {missing} of {int(exists.sum())} edges have no score, so that nothing ranks them. Find it by "
            f"a method that scores edges (eap-ig), or give {len(PERCENTAGES)} circuits."
        )
