"""The tiny model and the facts that the tests of editing use."""

from tests.editing.conftest import _own_cache, found, model, relation, task  # noqa: F401
