"""The scheme of one site: the recipe's, with the bits that were assigned to the site (passes/assign_bits.py)."""

from __future__ import annotations

from qpcompile.ir.node_facts import StubFact
from qpcompile.recipe.quantize import ActivationScheme, CacheScheme, QuantizeScheme, WeightScheme


def weights_at(fact: StubFact, scheme: QuantizeScheme) -> WeightScheme:
    """How the weight of this stub is stored."""
    return scheme.weights if fact.bits is None else scheme.weights.model_copy(update={"bits": fact.bits})


def inputs_at(fact: StubFact, scheme: QuantizeScheme) -> ActivationScheme:
    """How the activation of this stub is quantized."""
    return scheme.activations if fact.bits is None else scheme.activations.model_copy(update={"bits": fact.bits})


def cache_at(fact: StubFact, scheme: QuantizeScheme) -> CacheScheme:
    """How the keys or values of this stub are stored."""
    return scheme.kv_cache if fact.bits is None else scheme.kv_cache.model_copy(update={"bits": fact.bits})
