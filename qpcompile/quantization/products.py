"""Linear layers in graphs: products with one matrix, and products with one matrix per expert of a mixture.

    aten::linear(%x, @w)                          w: f[N, K]
    qpcompile::expert_linear(%x, @w, %index)      w: f[E, N, K], one input for all experts

Where all rows of a weight are treated alike (a change of basis, a clip ratio) those of experts are one matrix of E N
rows; codes are solved for each expert with the moments of the tokens that chose it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from qpcompile.calibration.statistics import InputStatistics, expert_site
from qpcompile.errors import CalibrationError
from qpcompile.ir.edit import aten, is_call, operands
from qpcompile.ir.operators import EXPERT_LINEAR
from qpcompile.quantization.solve import output_energies, solve
from qpcompile.recipe.quantize import WeightScheme

PRODUCTS = (aten.linear.default, EXPERT_LINEAR)


def rows_of(weight: torch.Tensor) -> torch.Tensor:
    """f[N, K], or f[E, N, K] of experts -> f[rows, K]."""
    return weight.flatten(0, -2)


def matrices_of(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """f[N, K], or f[E, N, K] of experts -> the matrix f[N, K] of each."""
    return weight.unbind(0) if weight.dim() == 3 else (weight,)


def bias_of(product: fx.Node) -> fx.Node | None:
    """The bias that a product adds; those of experts are added apart."""
    bias = operands(product)["bias"] if is_call(product, aten.linear.default) else None
    return bias if isinstance(bias, fx.Node) else None


def solving_cost(weight: torch.Tensor) -> float:
    """About the multiplications of solving a weight, f[..., N, K], to balance the work of ranks."""
    rows, columns = matrices_of(weight)[0].shape
    return len(matrices_of(weight)) * columns**2 * float(rows + columns)


@dataclass(frozen=True)
class Solved:
    """codes: i8[..., N, K]; scale: f32[..., N, G]; error: of the output; unseen: how many experts no token chose, None
    without experts or statistics.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    error: float
    unseen: int | None = None


def solve_weight(
    weight: torch.Tensor, site: str, inputs: Mapping[str, InputStatistics], scheme: WeightScheme, device: torch.device
) -> Solved:
    """weight: f[..., N, K], on `device`; site: of its input, whose statistics are in `inputs` if there are any.

    An expert gets the moments of the tokens that chose it, and of K mean tokens of all experts: those of fewer tokens
    than channels have no full rank, and for one that no token chose they are all that is known.

    Raises CalibrationError for moments that the recipe's solver cannot use.
    """
    shared = inputs.get(site)
    moments = None if shared is None or shared.moments is None else shared.moments.to(device)
    codes, scales, error, full, unseen = list[torch.Tensor](), list[torch.Tensor](), 0.0, 0.0, 0
    experts = matrices_of(weight)
    for expert, matrix in enumerate(experts):
        own = moments
        if weight.dim() == 3 and moments is not None and shared is not None:
            found = inputs.get(expert_site(site, expert))
            unseen += found is None
            own = moments.times(matrix.shape[1] / max(shared.tokens, 1))
            if found is not None and found.moments is not None:
                own = own.joined(found.moments.to(device))
        try:
            solved, scale = solve(matrix, own, scheme)
        except torch.linalg.LinAlgError as cause:  # pyright: ignore[reportPrivateImportUsage]
            raise CalibrationError(
                "the second moments of the inputs have no inverse: numbers are not finite, or too small to square",
                where=site,
                do="check the samples and the model's weights, or choose quantize.weights.solver rtn",
            ) from cause
        lost, whole = output_energies(matrix, solved, scale, own)
        error, full = error + lost, full + whole
        codes.append(solved)
        scales.append(scale)
    relative = math.sqrt(max(error, 0.0) / max(full, 1e-30))
    if weight.dim() == 2:
        return Solved(codes[0], scales[0], relative)
    return Solved(torch.stack(codes), torch.stack(scales), relative, None if moments is None else unseen)
