"""GPT-NeoX: parallel blocks, layer norms, a rotation of some channels."""

from kcwb.models.families.family import Family, register

register(
    "gpt_neox",
    Family(
        "GPT-NeoX (Pythia)",
        ("EleutherAI/pythia-160m", "EleutherAI/pythia-410m"),
        uncovered=lambda config: None if config.attention_bias else "GPT-NeoX without attention biases",
    ),
)
