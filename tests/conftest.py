"""What every test shares: the libraries are loaded once, and the garbage collector does not look at them again."""

from __future__ import annotations

import gc

import sympy  # noqa: F401
import torch.export  # noqa: F401
from transformers import LlavaForConditionalGeneration  # noqa: F401


def pytest_sessionstart() -> None:
    """A full collection walks every object of torch and transformers, most of a second; a test causes several."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At exit the libraries look for what they have leaked, and everything frozen would be."""
    gc.unfreeze()
