from .attending import attending_pairs as attending_pairs, why_attends as why_attends
from .dla import dla_by_source as dla_by_source
from .nodes import (
    attention_pattern as attention_pattern,
    component_logits as component_logits,
    node_edges as node_edges,
)
from .roles import NAMED as NAMED, role_agreement as role_agreement
