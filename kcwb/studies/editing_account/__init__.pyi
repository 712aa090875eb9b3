from .claims import account as account, compare_edits as compare_edits, edit_claims as edit_claims
from .layer_choice import circuit_layers as circuit_layers, compare_layers as compare_layers
