"""The methods of discovery that come with the package; importing this makes them known to the registry.

A further one is a file like these, whose `register_method(Method(...))` is all that has to be imported.
"""

from kcwb.discovery.attribution import STEPS
from kcwb.discovery.methods import acdc, attribution, exact
from kcwb.discovery.registry import METHODS, Method, Pruning, check_method, check_size, register_method, scoring

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
    "register_method",
    "scoring",
]
