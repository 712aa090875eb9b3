"""What becomes of an answer when outputs of nodes are taken out or put in."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
