"""One small world of invented facts, and tiny models of several architectures that learnt it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
