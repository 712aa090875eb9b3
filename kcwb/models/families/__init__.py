"""The families of models that are covered, one file for each: what works on it, and what is particular about it.

A further one is a file that calls `register`, and its name below; or a call of `register` from anywhere.
"""

from importlib import import_module

from kcwb.models.families.family import ENCODERS, FAMILIES, Family, covered_encoder, covered_family, register

__all__ = ["ENCODERS", "FAMILIES", "Family", "covered_encoder", "covered_family", "register"]

# In the order in which tables show them.
for _name in ("gpt2", "llama", "gpt_neox", "gptj", "gpt_neo", "opt", "phi", "gemma", "bert"):
    import_module(f"{__name__}.{_name}")
