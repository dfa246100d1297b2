"""The allow-list of operators in saved graphs: each exists and is harmless, and compiles emit no other."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from list_operators import missing

from qpcompile.emit.artifact import allowed_operators
from qpcompile.emit.artifact.allowed_operators import OPERATORS
from qpcompile.emit.artifact.graph_json import EXPERTS_MODULE
from qpcompile.passes.canonicalize import ASSERTIONS, COPIES

ROOT = Path(__file__).resolve().parents[2]

# One is random with dropout, which no compile requests; one changes the value of another node in place.
EXCEPTIONS = {"aten::scaled_dot_product_attention.default", "aten::copy_.default"}


def overload(name: str) -> torch._ops.OpOverload:
    """The operator of this name."""
    namespace, _, rest = name.partition("::")
    packet, _, kind = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), kind)


def test_every_operator_exists_and_is_harmless() -> None:
    importlib.import_module(EXPERTS_MODULE)
    for name in OPERATORS - EXCEPTIONS:
        found = overload(name)
        assert not found._schema.is_mutable, name
        assert torch.Tag.nondeterministic_seeded not in found.tags, name
        assert not any(word in name for word in ("empty", "as_strided", "set_", "resize", "from_file", "rand")), name


def test_the_list_is_sorted_and_one_to_a_line() -> None:
    with open(allowed_operators.__file__, encoding="utf-8") as file:
        lines = [line.strip().strip('",') for line in file if line.startswith('        "')]
    assert lines == sorted(set(lines))
    assert set(lines) == {name for name in OPERATORS if not name.startswith("qpcompile::")}


def test_what_passes_name_is_listed() -> None:
    removed = {str(operator) for operator in (*ASSERTIONS, *COPIES)}
    rooms = ("passes", "qpcompile/ir", "qpcompile/runtime", "qpcompile/quantization", "qpcompile/pruning")
    texts = [path.read_text("utf-8") for folder in rooms for path in (ROOT / folder).rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"\baten\.[a-zA-Z_0-9]+\.[A-Za-z_]+", text)}
    assert len(named) > 60
    assert not {name for name in named - removed if name.replace("aten.", "aten::") not in OPERATORS}


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_emit_no_other_operator(family: str) -> None:
    for recipe, lacking in missing(family):
        assert not lacking, recipe.tokens.method
