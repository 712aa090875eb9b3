"""What the library does, behind widgets.

A panel holds no mathematics: each of its callbacks calls functions that a script can call. Long work runs on one worker
thread (`runner`), so the notebook stays usable; what went wrong is said in the panel; the last good result stays on
screen. `base` shows how to write a panel of one's own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
