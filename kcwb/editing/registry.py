"""The editors by name: what `kcwb.edit`, the edit panel, scores and studies read.

To add one: a file in `kcwb.editing.methods` that ends in its `EditMethod`, and one line below; from outside the
package, `register`.
"""

from __future__ import annotations

from kcwb.editing.methods.alphaedit import ALPHAEDIT
from kcwb.editing.methods.base import EditMethod
from kcwb.editing.methods.fine_tuning import FT_L, FT_M
from kcwb.editing.methods.memit import MEMIT
from kcwb.editing.methods.rome import ROME
from kcwb.errors import SettingError, choose

#: Name -> editor, in the order in which panels list them.
METHODS: dict[str, EditMethod] = {}


def register(method: EditMethod) -> None:
    """Add an editor; SettingError if there is another of its name."""
    if METHODS.setdefault(method.name, method) is not method:
        raise SettingError(f"There is an editor {method.name!r:.60} already; choose another name.")


for _method in (
    ROME,
    FT_M,
    FT_L,
    MEMIT,
    ALPHAEDIT,
):
    register(_method)


def edit_method(name: str) -> EditMethod:
    """The editor of a name; SettingError, with the nearest names, if there is none."""
    return METHODS[choose("The method", name, METHODS)]


def many_at_once() -> str:
    """The names of the editors that take many requests at once."""
    return " or ".join(one.name for one in METHODS.values() if one.many)
