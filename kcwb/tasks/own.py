"""A prompt of one's own: any text, with its subject and its answer as far as they are said."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kcwb.errors import DataError, SettingError, shown
from kcwb.models.forward import forward
from kcwb.models.loading import Model
from kcwb.tasks.prompts import Prompts, assemble
from kcwb.tasks.relations import Fact
from kcwb.tasks.subjects import places
from kcwb.tasks.tokens import PromptTokens, answer_tokens, located_tokens, object_tokens, text_tokens


def own_prompt(
    model: Model, prompt: str, *, subject: str = "", answer: str = "", others: Sequence[Fact] = ()
) -> Prompts:
    """A text as a prompt, without the spaces around it.

    Parameters
    ----------
    subject
        Which part of the text is the subject: where it stands there last, as whole words. Empty: it is not known.
    answer
        What follows, after a space unless the text ends with one; its rank is that of its first token, since there is
        nothing else to tell it from. Empty: the token that the full model holds likeliest.
    others
        Facts whose subjects may take the subject's place in the corrupted prompt: the first one that makes it as long,
        and whose answer starts otherwise.

    Raises
    ------
    SettingError
        If there is no text, or the subject does not stand in it.
    DataError
        If it has more tokens than the model reads, or the answer runs into its last one.
    """
    text, subject, answer = prompt.strip(" "), subject.strip(), answer.strip()
    if not text.strip():
        raise SettingError("The prompt is empty. Type what the model is to go on with.")
    start = (places(text, subject) or [-1])[-1] if subject else 0
    if start < 0:
        how = "as a whole word" if subject in text else "in these letters"
        raise SettingError(f"The subject {shown(subject)} does not stand in the prompt {how}.")
    tokens, first, stop = located_tokens(model, text, start, start + len(subject))
    space = not text[-1].isspace()
    wanted = answer_tokens(model, "{}", text, answer, space) if answer else []
    width = len(tokens) + max(0, len(wanted) - 1)
    if width > model.network.n_ctx:
        raise DataError(f"The prompt has {width:,} tokens; {model.name} reads {model.network.n_ctx:,}.")
    answers = wanted or [_likeliest(model, tokens)]
    corrupted, partner = "", None
    for other in others if subject else ():
        changed = text[:start] + other.named + text[start + len(subject) :]
        row = text_tokens(model, changed)
        if not other.named or len(row) != len(tokens) or row == tokens:
            continue
        if answers[0] not in {one[0] for one in object_tokens(model, "{}", text, other.right, space).values()}:
            corrupted, partner = changed, row
            break
    said = answer or str(model.tokenizer.decode(answers)).strip() or repr(model.tokenizer.decode(answers))
    fact = Fact(text, said, corrupted=corrupted, span=(start, start + len(subject)), space=space)
    row = PromptTokens(tokens, answers, first, stop)
    return assemble(model, [fact], [text], [row], {space: {said: answers}}, [-1], [partner])


@torch.no_grad()
def _likeliest(model: Model, tokens: list[int]) -> int:
    residual = forward(model.network, torch.tensor([tokens], device=model.device)).residual
    return int(model.network.logits(residual[0, -1]).argmax())
