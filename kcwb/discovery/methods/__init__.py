"""The methods of discovery that come with the package; importing this makes them known to the registry.

A further one is a file like these and a line, `register_method(...)`: here, or in a module of your own. The command
line imports the modules that installed packages name as entry points of the group `kcwb.extensions`.
"""

from kcwb.discovery.attribution import STEPS
from kcwb.discovery.methods.acdc import ACDC
from kcwb.discovery.methods.attribution import CEAP, EAP, EAP_IG, EAP_IG_ACTIVATIONS, GIM, RELP
from kcwb.discovery.methods.edgepruning import EDGE_PRUNING
from kcwb.discovery.methods.exact import EXACT
from kcwb.discovery.methods.gates import IG_PRUNE
from kcwb.discovery.registry import (
    DEFAULT,
    METHODS,
    Pruning,
    check_method,
    check_size,
    load_extensions,
    register_method,
    scoring,
)

__all__ = [
    "DEFAULT",
    "METHODS",
    "STEPS",
    "Pruning",
    "check_method",
    "check_size",
    "load_extensions",
    "register_method",
    "scoring",
]

for _method in (EAP, EAP_IG, EAP_IG_ACTIVATIONS, CEAP, GIM, RELP, IG_PRUNE, EDGE_PRUNING, EXACT, ACDC):
    register_method(_method)
