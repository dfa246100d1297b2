"""docs/recipe.md as docs/generate.py would write it; docs is not a package."""

from __future__ import annotations

import runpy
from pathlib import Path


def recipe_page() -> str:
    """The recipe reference, for the recipe that is imported."""
    root = Path(__file__).parents[2]
    return runpy.run_path(str(root / "docs" / "generate.py"))["recipe_page"]()
