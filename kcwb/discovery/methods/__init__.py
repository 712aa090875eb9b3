"""The methods of discovery that come with the package; importing this makes them known to the registry.

A further one is a file like these: once it is imported, its `register_method(Method(...))` makes it known. The command
line imports the modules that installed packages name as entry points of the group `kcwb.extensions`.
"""

from kcwb.discovery.attribution import STEPS
from kcwb.discovery.methods import acdc, attribution, exact
from kcwb.discovery.registry import (
    METHODS,
    Method,
    Pruning,
    check_method,
    check_size,
    load_extensions,
    register_method,
    scoring,
)

__all__ = [
    "METHODS",
    "STEPS",
    "Method",
    "Pruning",
    "acdc",
    "attribution",
    "check_method",
    "check_size",
    "exact",
    "load_extensions",
    "register_method",
    "scoring",
]
