"""What a notebook's results come from: displayed by a cell, repeated in the footer of its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from kcwb.errors import SettingError
from kcwb.verbs import verb
from kcwb.workbench.report.headline import HEADLINE, displayed, headline_of
from kcwb.workbench.report.page import facts_table

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from kcwb.circuits.circuit import Circuit
    from kcwb.models.loading import Model
    from kcwb.tasks.task import Task

PROVENANCE = "application/vnd.kcwb.provenance+json"
"""The type of output whose content goes into the footer of a report: `{"entries": [{"kind", "name", "digest", …}]}`."""


@verb
def provenance(
    model: Model | None, *tasks_or_circuits: Task | Circuit, completeness: pd.DataFrame | None = None
) -> None:
    """Display what a notebook's results come from, as a small table; reports repeat it in their footer.

    Parameters
    ----------
    model
        The model that was used.
    tasks_or_circuits
        The tasks, for their data, and the circuits, for how they were found.
    completeness
        The table of `kcwb.completeness` of the last circuit: a report says it in a line under its title.

    Raises
    ------
    SettingError
        If there is completeness, but no circuit.
    """
    from IPython.display import display

    from kcwb.circuits.circuit import Circuit

    entries = [] if model is None else [_describe_model(model.name, model.digest, str(model.dtype), str(model.device))]
    entries = _distinct([*entries, *(entry for item in tasks_or_circuits for entry in _describe(item))])
    lines = [" ".join(str(entry.get(key, "")) for key in ("kind", "name", "digest")) for entry in entries]
    bundle = {PROVENANCE: {"entries": entries}, "text/html": facts_table(entries), "text/plain": "\n".join(lines)}
    if completeness is not None:
        circuits = [item for item in tasks_or_circuits if isinstance(item, Circuit)]
        if not circuits:
            raise SettingError("completeness is that of a circuit: pass the circuit, too.")
        bundle[HEADLINE] = {"line": headline_of(circuits[-1], completeness)}
    display(bundle, raw=True)


def _describe_model(name: str, digest: str, dtype: str, device: str) -> dict[str, Any]:
    return {"kind": "model", "name": name, "digest": digest, "dtype": dtype.removeprefix("torch."), "device": device}


def _describe(item: Task | Circuit) -> list[dict[str, Any]]:
    from kcwb.tasks.task import Task

    if isinstance(item, Task):
        relation = {"kind": "relation", "name": item.relation.name, "digest": item.relation.digest}
        sizes = {"D_val": len(item.val), "D_test": len(item.test), "known": f"{item.n_known} of {item.n_facts}"}
        return [relation | {"template": item.template, "n": item.n, "seed": item.seed} | sizes]
    return [*_sources(item.provenance), _describe_circuit(item)]


def _describe_circuit(circuit: Circuit) -> dict[str, Any]:
    made = circuit.provenance
    keys = ("method", "metric", "ablation", "parameters", "template", "n", "seed", "seconds")
    name = made["relation"]["name"] if "relation" in made else made.get("method", "circuit")
    size: dict[str, Any] = {"edges": f"{circuit.n_edges:,} of {circuit.graph.n_edges:,}"}
    if "of" in made:
        size["of"] = ", ".join(_origin(part) for part in made["of"])
    details = {key: made[key] for key in keys if key in made and made[key] not in (None, {}, [])}
    return {"kind": "circuit", "name": name, "digest": circuit.digest} | size | details


def _origin(made: Mapping[str, Any]) -> str:
    """What one of the circuits that a circuit was made of was: `acdc of country_capital`."""
    words = [made.get("method", "a circuit"), *(["of", made["relation"]["name"]] if "relation" in made else [])]
    inside = ", ".join(_origin(part) for part in made.get("of", ()))
    return " ".join(map(str, words)) + (f" ({inside})" if inside else "")


def _sources(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models and relations that a circuit, or those it was made of, come from."""
    found = []
    if "model" in made:
        model = made["model"]
        found.append(_describe_model(model["name"], model["digest"], model.get("dtype", ""), model.get("device", "")))
    if "relation" in made:
        found.append({"kind": "relation", "name": made["relation"]["name"], "digest": made["relation"]["digest"]})
    for part in made.get("of", ()):
        found += _sources(part)
    return found


def _distinct(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each thing once, with all that is said of it, in the order of first mention: models, data, circuits.

    Two circuits of the same edges that were found in different ways are two things.
    """
    found: list[dict[str, Any]] = []
    for entry in entries:
        same = next((other for other in found if _same(other, entry)), None)
        if same is None:
            found.append(dict(entry))
        else:
            same.update(entry)
    order = ("model", "relation", "circuit")
    return sorted(found, key=lambda e: order.index(e["kind"]) if e.get("kind") in order else len(order))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries can be of one thing: the same kind, name and digest, and nothing that differs."""
    named = any(one.get(key) for key in ("kind", "name", "digest"))
    alike = all(one.get(key) == other.get(key) for key in ("kind", "name", "digest"))
    return alike and all(one[key] == other[key] for key in one.keys() & other.keys()) and (named or one == other)


def collect(notebook: NotebookNode) -> list[dict[str, Any]]:
    """Everything that cells displayed as provenance."""
    entries: list[dict[str, Any]] = []
    for content in displayed(notebook, PROVENANCE):
        listed = content.get("entries")
        entries += listed if isinstance(listed, list) else [{"kind": "result", **content}]
    return _distinct(entry for entry in entries if isinstance(entry, Mapping))
