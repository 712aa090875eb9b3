"""Why a model gets a fact wrong, and whether that can be seen from inside."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
