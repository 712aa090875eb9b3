from .heads import (
    ablate_new as ablate_new,
    context_circuits as context_circuits,
    demonstration_attention as demonstration_attention,
    in_context as in_context,
    new_heads as new_heads,
    shot_accuracy as shot_accuracy,
)
