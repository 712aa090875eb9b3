from . import (
    editing_account as editing_account,
    hallucination as hallucination,
    in_context as in_context,
    two_hop as two_hop,
)
from .formation import over_training as over_training
