"""What circuits explain: wrong answers, learning in context, two hops, edits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
