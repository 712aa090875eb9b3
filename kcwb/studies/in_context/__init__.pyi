from .ablation import ablate_new as ablate_new
from .accuracy import shot_accuracy as shot_accuracy
from .attention import demonstration_attention as demonstration_attention
from .circuits import context_circuits as context_circuits, new_heads as new_heads
from .study import in_context as in_context
