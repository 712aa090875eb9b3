"""What an edit does to the circuit of its fact, and whether the account of Knowledge Circuits holds."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
