"""Tests of another device than the CPU; without one they are skipped, and say so."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """The device, `cuda`; KCWB_DEVICE names another one, `cpu` among them, to try these tests themselves."""
    named = os.environ.get("KCWB_DEVICE", "cuda")
    if named.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device (torch {torch.__version__}); KCWB_DEVICE names another")
    return named
