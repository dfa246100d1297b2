"""Nested arguments and results by dotted names, with any cache class of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from qpcompile.ir.names import CACHE
from qpcompile.ir.structure import CACHE_ARGUMENT, named_tensors, rebuild, template


def cache() -> DynamicCache:
    """One layer, two tokens."""
    made = DynamicCache()
    made.update(torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    return made


@pytest.mark.parametrize("name", ["past_key_values", "cache", "a name of tomorrow"])
def test_a_cache_has_one_name_in_graphs(name: str) -> None:
    nest: dict[str, Any] = {"inputs_embeds": torch.ones(1), name: cache()}
    assert [path for path, _ in named_tensors(nest)] == [
        "inputs_embeds",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert template(nest) == {"inputs_embeds": "inputs_embeds", "past_key_values": None}


def test_the_name_of_the_installed_transformers() -> None:
    result = BaseModelOutputWithPast(**{"last_hidden_state": torch.ones(1), CACHE_ARGUMENT: cache()})
    assert list(result) == ["last_hidden_state", CACHE_ARGUMENT]
    assert template(result) == {"last_hidden_state": "last_hidden_state", CACHE: None}


def test_a_result_is_rebuilt_from_its_template() -> None:
    shape = template({"a": torch.ones(1), "b": [torch.ones(1), None], "c": cache()})
    found = rebuild(shape, {"a": torch.zeros(2), "b.0": torch.zeros(3)})
    assert found.a.shape == (2,) and found.b[0].shape == (3,) and found.b[1] is None and found.past_key_values is None
    assert len(found.to_tuple()) == 2
