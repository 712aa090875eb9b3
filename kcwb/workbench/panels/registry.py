"""The panels by name, each loaded when it is first asked for.

Those of this package are the classes in the stub beside ``__init__.py``: `DiscoveryPanel` is `discovery`. One of your
own is a subclass of `kcwb.workbench.panels.base.Panel` in a file of yours, and one line:
`PANELS["mine"] = "my_module:MyPanel"`.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from kcwb.errors import choose
from kcwb.models.loading import Model
from kcwb.workbench import panels
from kcwb.workbench.panels.base import Panel

PANELS = {
    name.removesuffix("Panel").lower(): f"{panels.__name__}:{name}" for name in dir(panels) if name.endswith("Panel")
}
"""Name -> where the class is."""


def open_panel(name: str, model: Model, *what: Any, **settings: Any) -> Panel:
    """Open a panel by its name: `open_panel("edit", model, "country_capital", method="ft_m")`.

    Raises
    ------
    SettingError
        If there is no such panel.
    """
    return pkgutil.resolve_name(PANELS[choose("The panel", name, PANELS)])(model, *what, **settings)
