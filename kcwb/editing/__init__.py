"""Change a fact in the weights, and look at what changed: ROME, MEMIT, fine-tuning, scores, circuits."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
