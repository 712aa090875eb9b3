from .acdc import Search as Search, predict_seconds as predict_seconds
from .attribution import attribution_scores as attribution_scores
from .discover import tau_from_kc as tau_from_kc
from .registry import Method as Method, Pruning as Pruning, register_method as register_method
