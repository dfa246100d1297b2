"""What every test shares: the garbage collector does not look at the libraries again."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """A full collection visits every object of torch and transformers, most of a second; a test causes several."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At exit the libraries look for what they have leaked, and everything frozen would be."""
    gc.unfreeze()
