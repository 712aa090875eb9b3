"""Where a circuit comes from: what a discovery records, and what is read of it. A file may hold anything there."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kcwb.errors import CircuitError
from kcwb.models.memory import noted_pieces
from kcwb.versions import versions

if TYPE_CHECKING:
    from kcwb.circuits.circuit import Circuit
    from kcwb.models.loading import Model
    from kcwb.tasks.relations import Fact
    from kcwb.tasks.task import Task

#: What a circuit was found with, in the order in which it is told.
HOW = ("method", "ablation", "metric")


def record(model: Model, task: Task, facts: Sequence[Fact], **more: Any) -> dict[str, Any]:
    """What a circuit of some facts records of the model and the task that it was found on, ready for JSON.

    `at_once` says how many prompts (or candidates) were computed together, by what was computed: their number decides
    how sums are rounded, and it follows the free memory.
    """
    return {
        "model": {
            "name": model.name,
            "digest": model.digest,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "prepend_bos": model.prepend_bos,
            "d_model": model.network.d_model,
        },
        "relation": {"name": task.relation.name, "digest": task.relation.digest},
        "template": task.template,
        "n": task.n,
        "seed": task.seed,
        "facts": [[fact.subject, fact.object] for fact in facts],
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **({"at_once": noted} if (noted := noted_pieces()) else {}),
        **more,
    }


def part(provenance: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in a provenance, such as `model` or `relation`; empty where it is missing or something else."""
    value = provenance.get(key)
    return value if isinstance(value, Mapping) else {}


def origin(circuit: Circuit) -> dict[str, Any]:
    """Which circuit a search was kept within, and how that was found, in brief."""
    found = {key: circuit.provenance[key] for key in HOW if key in circuit.provenance}
    return {"digest": circuit.digest, "edges": circuit.n_edges, **found}


def found_with(provenance: Mapping[str, Any]) -> list[str]:
    """How a circuit was found, in words: method, ablation and metric, as far as they are recorded."""
    return [str(provenance[key]) for key in HOW if key in provenance]


def in_brief(provenance: Mapping[str, Any]) -> str:
    """Relation, method and ablation, as far as they are recorded, to end what is said of a circuit."""
    said = [part(provenance, "relation").get("name"), *map(provenance.get, HOW[:2])]
    words = ", ".join(str(one) for one in said if one)
    return f": {words}" if words else ""


#: What a task is made again from, by our arguments' names: where it is recorded, and what it must be.
_REMADE = {
    "model": ("model", "name", str),
    "dtype": ("model", "dtype", str),
    "prepend_bos": ("model", "prepend_bos", bool),
    "relation": ("relation", "name", str),
    "digest": ("relation", "digest", str),
    "facts": ("", "n", int),
    "seed": ("", "seed", int),
    "template": ("", "template", str),
}


def remade_from(provenance: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """The model and task that a circuit was found on, as far as it records them; CircuitError if `where` is damaged."""
    for key in ("model", "relation"):
        if not isinstance(provenance.get(key, {}), Mapping):
            raise CircuitError(f"{where} is damaged: its provenance has {provenance[key]!r:.60} for {key}.")
    found: dict[str, Any] = {}
    for name, (inside, key, kind) in _REMADE.items():
        value = (part(provenance, inside) if inside else provenance).get(key)
        if value is not None and not isinstance(value, kind):
            raise CircuitError(f"{where} is damaged: its provenance has {value!r:.60} for {name}.")
        if value is not None:
            found[name] = value
    return found
