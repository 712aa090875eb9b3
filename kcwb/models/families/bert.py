"""BERT and RoBERTa: encoders, with a norm after each sum. RoBERTa's positions start after that of the padding."""

from __future__ import annotations

from functools import partial

from kcwb.models.families.family import Family, register

_ENCODER = partial(
    Family,
    edges=False,
    roles=False,
    editing=False,
    note="a norm follows each sum: no residual stream to cut edges of; masked-token tasks, whole nodes",
)
register("bert", _ENCODER("BERT", ("google-bert/bert-base-uncased", "google-bert/bert-large-uncased")))
register(
    "roberta", _ENCODER("RoBERTa", ("FacebookAI/roberta-base",), position_offset=lambda config: config.pad_token_id + 1)
)
