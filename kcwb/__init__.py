"""kcwb, the Knowledge Circuits Workbench.

Where does a model keep a fact, and what happens when it is wrong or edited?

Five nouns and verbs on them:

    name --load_model--> Model, relation --make_task--> Task --discover--> Circuit --completeness--> DataFrame

What most people use is here; the rest is in the rooms, `kcwb.reading`, `kcwb.evaluation` and so on. Public names are
written once, in the `.pyi` beside each `__init__.py`. Imports are lazy: a name is loaded when it is first used.
"""

import importlib
import warnings
from typing import Any

import lazy_loader

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
#: Rooms whose names were the package's own in version 0.1, and are found there for one version more.
_ROOMS = (
    *("circuits", "discovery", "editing", "evaluation", "interventions", "reading", "tasks", "world"),
    "workbench.graph",
    *(f"studies.{study}" for study in ("editing_account", "hallucination", "in_context", "two_hop")),
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("kcwb")
    if name not in __all__ and not name.startswith("_"):
        for room in _ROOMS:
            module = importlib.import_module(f"{__name__}.{room}")
            if name in module.__all__:
                warnings.warn(f"kcwb.{name} is kcwb.{room}.{name} now.", DeprecationWarning, stacklevel=2)
                return getattr(module, name)
    return _lazy(name)
