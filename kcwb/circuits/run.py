"""A circuit's logits: one masked forward pass per chunk of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation, check_made_for
from kcwb.circuits.circuit import Circuit
from kcwb.circuits.masked import MaskedRuns
from kcwb.circuits.provenance import part
from kcwb.errors import CircuitError
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.models.memory import by_prompts
from kcwb.tasks.metrics import at_answers
from kcwb.tasks.prompts import Prompts
from kcwb.verbs import verb

if TYPE_CHECKING:
    from kcwb.circuits.ensemble import Ensemble


@verb
@torch.no_grad()
def run_circuit(
    model: Model, circuit: Circuit | Bool[Tensor, "S R"] | None, prompts: Prompts, ablation: Ablation
) -> Float[Tensor, "N A V"]:
    """Logits of a circuit at the positions that predict the answers.

    Parameters
    ----------
    model
        The model that the circuit is a part of.
    circuit
        A Circuit, a mask of kept edges, or None for the full model.
    prompts
        What to run it on, all usable by the ablation.
    ablation
        What the cut edges deliver.

    Returns
    -------
    Tensor
        `[N, A, V]`, on the model's device. What stands beyond the last token of a shorter answer (`answer_mask`) is
        padding and means nothing.

    Raises
    ------
    CircuitError
        If the circuit belongs to another model.
    SettingError
        If the ablation was made for other weights.
    """
    if isinstance(circuit, Circuit):
        check_same_model(model, circuit)
        kept = circuit.kept
    else:
        kept = circuit
    if kept is not None and kept.shape != model.graph.exists.shape:
        raise CircuitError(
            f"The mask has shape {tuple(kept.shape)}; {model.name} has {tuple(model.graph.exists.shape)} "
            "(senders, receivers)."
        )

    if kept is not None:
        check_made_for(model, ablation)

    def work(rows: slice) -> Tensor:
        part = prompts.select(rows)
        if kept is None:
            of_part = model.network.logits(at_answers(forward(model.network, part.tokens).residual, part))
        else:
            of_part = MaskedRuns(model.network, part, ablation.values(part)).logits(kept)
        missing = prompts.answers.shape[1] - of_part.shape[1]
        return torch.nn.functional.pad(of_part, (0, 0, 0, missing))

    return torch.cat([*by_prompts(model.network, prompts.tokens, work)])


def check_same_model(model: Model, circuit: Circuit | Ensemble) -> None:
    """Raise CircuitError if a circuit, or an ensemble, was found on a model with another graph or other weights."""
    if circuit.graph != model.graph:
        raise CircuitError(f"The circuit is part of {circuit.graph}; {model.name} has {model.graph}.")
    found = part(circuit.provenance, "model")
    digest = found.get("digest")
    if digest is not None and not model.has_weights(digest):
        raise CircuitError(
            f"The circuit was found on {found.get('name')!r} with weights {digest!s:.12}; {model.name!r} has "
            f"{model.digest[:12]}. Load that model, or pass circuit.kept to run its edges on this one."
        )
