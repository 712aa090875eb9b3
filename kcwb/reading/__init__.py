"""What is written in a run: logit lens, attribution to the logits, head roles, one node looked at."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
