"""Phi: parallel blocks that read through one norm, a rotation of some channels."""

from kcwb.models.families.family import Family, register

register(
    "phi",
    Family(
        "Phi",
        ("microsoft/phi-1_5", "microsoft/phi-2"),
        uncovered=lambda config: "Phi with query and key norms" if config.qk_layernorm else None,
    ),
)
