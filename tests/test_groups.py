"""Tests that share something made once run in one process, as `tests/conftest.py` says."""

from __future__ import annotations

import os

import pytest


def test_the_tests_of_a_file_run_in_one_process(request):
    """pytest-xdist knows groups by what stands behind an @; with some versions of pytest it cannot put it there."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs all tests")
    assert request.node.nodeid.endswith("@tests/test_groups.py")
