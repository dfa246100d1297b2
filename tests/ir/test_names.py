"""Names of inputs and outputs: their parts, and that they equal their text."""

from __future__ import annotations

import pytest

from qpcompile.ir.names import Name, names


@pytest.mark.parametrize(
    ("path", "root", "rest", "in_cache", "in_full_precision"),
    [
        ("attention_mask", "attention_mask", "", False, False),
        ("masks.full", "masks", "full", False, False),
        ("past_key_values.3.key", "past_key_values", "3.key", True, True),
        ("past_key_values.12.value.codes", "past_key_values", "12.value.codes", True, False),
        ("past_key_values", "past_key_values", "", False, False),
        ("past_key_values_other.3.key", "past_key_values_other", "3.key", False, False),
    ],
)
def test_parts(path: str, root: str, rest: str, in_cache: bool, in_full_precision: bool) -> None:
    name = Name(path)
    assert (name.root, name.rest, name.in_cache, name.in_full_precision) == (root, rest, in_cache, in_full_precision)


def test_layers() -> None:
    cached = Name("past_key_values.12.value.codes")
    assert (cached.layer, cached.part) == (12, "value.codes")
    assert Name("kept.-1").layer == -1
    with pytest.raises(ValueError, match="invalid literal"):
        _ = Name("attention_mask").layer


def test_names_are_found_by_their_text() -> None:
    values: dict[str, int] = dict.fromkeys(names(["kept.2"]), 1)
    assert values["kept.2"] == 1
    assert f"{Name('kept.2')}" == "kept.2"
