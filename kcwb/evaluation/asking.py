"""One prompt of a person's own that a circuit is asked, as it was given and as it is now, and the full model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from kcwb.circuits.ablation import Ablation
from kcwb.circuits.masked import ChangingRun, MaskedRuns
from kcwb.circuits.run import run_circuit
from kcwb.errors import DataError
from kcwb.models.loading import Model
from kcwb.reading.positions import token_text
from kcwb.tasks.metrics import answer_probabilities, answer_ranks
from kcwb.tasks.own import own_prompt
from kcwb.tasks.relations import Fact

_TOP = 5


class Answered(TypedDict):
    """What a run says: the answer's probability and rank, and the likeliest first tokens with theirs."""

    p: float
    rank: int
    top: list[list[Any]]


class Asked:
    """A prompt that is asked again after each step (`kcwb.tasks.own.own_prompt`), of the circuit as it was given too.

    Attributes
    ----------
    prompts
        The one prompt.
    before, model
        What the circuit as it was given says, and the full model.
    question
        What was asked, by the parameters of `kcwb.Play.ask`, without those that were left out.
    delivers
        What cut edges deliver on this prompt, in words.

    Raises
    ------
    SettingError, DataError
        As `own_prompt` does, or if the ablation is not defined on the prompt; says what it lacks.
    """

    def __init__(
        self, model: Model, question: Mapping[str, str], others: Sequence[Fact], cuts: Ablation,
        given: Bool[Tensor, "S R"],
    ) -> None:  # fmt: skip
        self.question = {name: text for name, text in question.items() if text}
        prompts = own_prompt(model, **question, others=others)
        if cuts.kind.paired and not bool(prompts.paired.all()):
            subject = prompts.facts[0].named
            lacks = (
                f"no other subject of the task fits in the place of {subject!r:.60}" if subject else "say the subject"
            )
            raise DataError(f"{cuts.kind} ablation needs the prompt with another subject in it: {lacks}.")
        self.prompts, self.delivers = prompts, cuts.told(prompts)
        self._model, self._run = model, ChangingRun(MaskedRuns(model.network, prompts, cuts.values(prompts)))
        self.before = self.now(given)
        self.model = self._read(run_circuit(model, None, prompts, cuts))

    def now(self, kept: Bool[Tensor, "S R"]) -> Answered:
        """What the circuit of some edges says; recomputed is what has changed since it was asked last."""
        return self._read(self._run.logits(kept))

    def table(self, kept: Bool[Tensor, "S R"]) -> pd.DataFrame:
        """All three runs, as `Play.ask` gives them."""
        said = self.as_traits(kept)
        table = pd.DataFrame(
            [{"run": run, "answer": said["answer"], **said[run]} for run in ("before", "after", "model")]
        )
        table.attrs.update({name: said[name] for name in ("prompt", "subject", "delivers")})
        return table.rename(columns={"p": "probability"})

    def as_traits(self, kept: Bool[Tensor, "S R"]) -> dict[str, Any]:
        """The same, ready for JSON."""
        (fact,) = self.prompts.facts
        said = {"before": self.before, "after": self.now(kept), "model": self.model}
        return {"prompt": fact.subject, "subject": fact.named, "answer": fact.object, "delivers": self.delivers, **said}

    def _read(self, logits: Float[Tensor, "1 A V"]) -> Answered:
        p, rank = float(answer_probabilities(logits, self.prompts)), int(answer_ranks(logits, self.prompts))
        return {"p": p, "rank": rank, "top": likeliest(self._model, logits, min(_TOP, logits.shape[-1]))[0]}


def likeliest(model: Model, logits: Float[Tensor, "N A V"], k: int) -> list[list[list[Any]]]:
    """For each prompt the likeliest first tokens, as `[text, probability]`."""
    values, tokens = logits[:, 0].float().softmax(-1).topk(k)
    return [
        [[token_text(model, token), p] for token, p in zip(*row, strict=True)]
        for row in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
