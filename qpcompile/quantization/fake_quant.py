"""Fake quantization of stubbed values: the numerics of the quantized operators, in floating point."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from qpcompile.calibration.statistics import CALIBRATION, InputStatistics
from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.measurements import Measurement
from qpcompile.ir.node_facts import StubFact, stub_fact
from qpcompile.ir.operators import QUANT_STUB
from qpcompile.ir.program import PREFILL, Program
from qpcompile.kernels.kv_read.reference import kv_read
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.kernels.linear_int.packing import codes_of, stored_codes
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.quantization.products import PRODUCTS, rows_of, solve_weight, solving_cost
from qpcompile.quantization.site_bits import cache_at, inputs_at, weights_at
from qpcompile.recipe.quantize import QuantizeScheme
from qpcompile.runtime.placement import Placement

# Bytes of rounded weights that are kept as values.
HELD = 2**29


class StubRounding:
    """`fake_quantize` for one recipe over many samples. Weights are the deployed ones: solved once, and cached.

    The cache is of codes, at home: all rounded weights in 16 bits would be a second copy of the model. The first `HELD`
    bytes of them are kept as values too, since a small model spends most of its time on the codes.
    """

    def __init__(
        self,
        scheme: QuantizeScheme,
        on: Placement,
        inputs: Mapping[str, InputStatistics] | None = None,
        read_by: Mapping[str, str] | None = None,
    ) -> None:
        """inputs: calibration by the site of a linear's input; read_by: that site, by the site of the weight."""
        self.scheme, self.on = scheme, on
        self.inputs, self.read_by = inputs or {}, read_by or {}
        # Stored codes, and a scale for each row or group.
        self._weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._room = 0 if on.apart else HELD

    @classmethod
    def of(cls, program: Program) -> StubRounding | None:
        """By the recipe of a program and its calibration; None without a quantizer."""
        if (scheme := program.recipe.quantize) is None:
            return None
        read_by: dict[str, str] = {}
        for linear in calls(program.graphs[PREFILL], *PRODUCTS):
            read, own = (stub_fact(node) if isinstance(node, fx.Node) else None for node in linear.args[:2])
            if own is not None and read is not None:
                read_by[own.site] = read.site
        calibration = program.measured.get(CALIBRATION)
        return cls(scheme, Placement.of(program), None if calibration is None else calibration.inputs, read_by)

    def __call__(self, x: torch.Tensor, fact: StubFact) -> torch.Tensor:
        """x: f[...], the value of the stub with this fact."""
        if fact.role != "weight":
            return fake_quantize(x, fact, self.scheme)
        weights = weights_at(fact, self.scheme)
        if weights.bits == 16:
            return x
        if fact.site in self._values:
            return self._values[fact.site]
        if fact.site not in self._weights:
            stored, scale = self._solved(x, fact)
            self._weights[fact.site] = self.on.keep(stored), self.on.keep(scale)
        stored, scale = self.on.there(self._weights[fact.site])
        value = _widened(codes_of(stored, x.shape[-1]), scale, x.dtype).view(x.shape)
        if value.nbytes <= self._room:
            self._room -= value.nbytes
            self._values[fact.site] = value
        return value

    def share(self, program: Program) -> None:
        """Solve the weights of prefill, if there are several ranks to share them; otherwise each when it is read."""
        if program.ranks.size == 1:
            return
        graph = program.graphs[PREFILL]
        stubs = [(stub, fact) for stub in calls(graph, QUANT_STUB) if (fact := stub_fact(stub)) is not None]
        asked = {
            fact.site: (str(stub.args[0].target), fact)  # type: ignore[union-attr]
            for stub, fact in stubs
            if fact.role == "weight" and weights_at(fact, self.scheme).bits != 16
        }

        def cost(site: str) -> float:
            return solving_cost(get_tensor(graph.module, asked[site][0]))

        def work(site: str) -> tuple[torch.Tensor, torch.Tensor]:
            name, fact = asked[site]
            return self._solved(self.on.weight(graph.module, name).detach(), fact)

        for site, (stored, scale) in program.ranks.spread(asked, cost, work):
            self._weights[site] = self.on.keep(stored), self.on.keep(scale)

    def _solved(self, weight: torch.Tensor, fact: StubFact) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as they are stored and scales, those of experts as of one matrix of all their rows, at home."""
        scheme = weights_at(fact, self.scheme)
        solved = solve_weight(weight, self.read_by.get(fact.site, ""), self.inputs, scheme, self.on.device)
        return self.on.back(stored_codes(rows_of(solved.codes), scheme.bits)), self.on.back(rows_of(solved.scale))


ROUNDING: Measurement[StubRounding] = Measurement("rounding")
"""Solved weights for the next pass that simulates the quantized model."""


def fake_quantize(x: torch.Tensor, fact: StubFact, scheme: QuantizeScheme) -> torch.Tensor:
    """x: f[...] quantized and dequantized; unchanged if the recipe keeps 16 bits."""
    if fact.role == "activation":
        inputs = inputs_at(fact, scheme)
        if inputs.bits == 16:
            return x
        clip = inputs.clip_ratio if fact.clip is None else fact.clip
        return round_trip(x, inputs.kernel_group, clip, inputs.bits)
    if fact.role == "weight":
        weights = weights_at(fact, scheme)
        return x if weights.bits == 16 else round_trip(x, weights.kernel_group, 1.0, weights.bits)
    bits = cache_at(fact, scheme).bits_of(fact.role)
    return x if bits == 16 else kv_read(*kv_write(x, bits), x.shape[-1], bits, x.dtype)


def round_trip(x: torch.Tensor, group_size: int, clip_ratio: float, bits: int) -> torch.Tensor:
    """x: f[..., C] quantized to codes of `bits` bits and dequantized."""
    return _widened(*quantize_dynamic(x, group_size, clip_ratio, bits), x.dtype)


def _widened(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
    return wide.flatten(-2).to(dtype)
