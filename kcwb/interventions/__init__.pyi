from .role_tests import PREDICTIONS as PREDICTIONS, check_roles as check_roles, faithful_story as faithful_story
from .nodes import ablation_summary as ablation_summary
from .together import heads_together as heads_together
from .scaling import scale_heads as scale_heads
