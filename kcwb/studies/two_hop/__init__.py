"""Questions of two hops: where the bridge is, whose circuits they use, whether the first hop is taken."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
