"""The tensors of a program by their names in the model: codes of quantized linears, and everything else as it is.

Passes merge linears that read the same input, under joined names: rows are given back to their linears.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from qpcompile.emit.compressed.packing import Scheme
from qpcompile.errors import ExportError
from qpcompile.ir.edit import calls, get_tensor
from qpcompile.ir.node_facts import quantized_fact
from qpcompile.ir.operators import EXPERT_LINEAR_A16, EXPERT_LINEAR_INT, LINEAR_INT, LINEAR_W4A16, LINEAR_W8A16
from qpcompile.ir.program import VISION, Graph, Program
from qpcompile.kernels.linear_int.packing import codes_of
from qpcompile.quantization.solver import expand
from qpcompile.runtime.host import host_tensors

# Operator -> the place of its weight; scales and bias follow.
WEIGHTS = {LINEAR_INT: 2, LINEAR_W4A16: 1, LINEAR_W8A16: 1}
BITS = 6
"""The place of the bits of a linear's input in linear_int."""
PLUS_ONE = "_plus_one"
"""The end of a name that canonicalize gives: the norm scales by 1 + weight, and the graph holds the sum."""


@dataclass(frozen=True)
class Codes:
    """One quantized linear: codes i8[N, K], scale f32[N, G], and how a reader treats them."""

    codes: torch.Tensor
    scale: torch.Tensor
    scheme: Scheme

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantized weight, f[N, K]."""
        return (self.codes * expand(self.scale, self.codes.shape[1])).to(dtype)


@dataclass
class Tensors:
    """Of one model. codes: by linear. plain: other tensors, by name. unread: tensors that no graph reads, zeros."""

    codes: dict[str, Codes] = field(default_factory=dict)
    plain: dict[str, torch.Tensor] = field(default_factory=dict)
    unread: dict[str, torch.Tensor] = field(default_factory=dict)


def read_tensors(program: Program, model: nn.Module) -> Tensors:
    """The tensors of a program whose transformers model is `model`, on the meta device.

    Raises ExportError for a linear that the model has in another form, for quantized experts, and for a tensor that the
    program does not hold under its name.
    """
    found = Tensors()
    for graph in program.graphs.values():
        for node in calls(graph, EXPERT_LINEAR_INT, EXPERT_LINEAR_A16):
            fact = quantized_fact(node)
            site = node.name if fact is None else fact.sites[0]
            raise _no_linear(
                site, "a weight of experts", f'"re:.*[.]{site.rpartition(".")[0].rpartition(".")[2]}[.].*"'
            )
        prefix = f"{graph.owner}." if graph.owner else ""
        read: set[str] = set()
        for node in calls(graph, *WEIGHTS):
            read |= _read_linear(graph, node, prefix, model, found)
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) not in read:
                tensor = get_tensor(graph.module, str(node.target)).detach().cpu()
                name = str(node.target)
                if name.endswith(PLUS_ONE):
                    name, tensor = name.removesuffix(PLUS_ONE), (tensor - 1).to(program.host.dtype)  # type: ignore[arg-type]
                found.plain.setdefault(prefix + name, tensor)
    host = host_tensors(program.host, set())
    found.plain |= {name: tensor.cpu() for name, tensor in host.items() if tensor.numel()}
    _match(found, program, model)
    return found


def _read_linear(graph: Graph, node: fx.Node, prefix: str, model: nn.Module, found: Tensors) -> set[str]:
    """Add the linears that a node computes; returns the names of the tensors that it reads."""
    place = WEIGHTS[node.target]  # type: ignore[index]
    operands = [each for each in node.args[place : place + 3] if isinstance(each, fx.Node)]
    fact = quantized_fact(node)
    # A linear with an epilogue has no fact; it is never a merged one.
    sites = (prefix + str(operands[0].target).rpartition(".")[0],) if fact is None else fact.sites
    modules = [_linear(model, site) for site in sites]
    weight, scale, *bias = (get_tensor(graph.module, str(each.target)).detach().cpu() for each in operands)
    if not modules or sum(module.out_features for module in modules) != len(weight):
        raise ExportError(
            f"the rows of {operands[0].target} cannot be given back to linears of the model: {', '.join(sites)}",
            where=graph.name,
            do="report this family",
        )
    bits = int(node.args[BITS]) if node.target == LINEAR_INT else 16  # type: ignore[arg-type]
    columns, groups = modules[0].in_features, scale.shape[1]
    codes = codes_of(weight, columns)
    scheme = Scheme(4 if weight.dtype == torch.uint8 else 8, columns // groups if groups > 1 else 0, bits)
    first = 0
    for site, module in zip(sites, modules, strict=True):
        rows = slice(first, first + module.out_features)
        found.codes.setdefault(site, Codes(codes[rows], scale[rows].contiguous(), scheme))
        if bias:
            found.plain.setdefault(f"{site}.bias", bias[0][rows].contiguous())
        first = rows.stop
    return {str(each.target) for each in operands}


def _linear(model: nn.Module, site: str) -> nn.Linear:
    module = dict(model.named_modules()).get(site)
    if not isinstance(module, nn.Linear):
        raise _no_linear(site, f"a {type(module).__name__}", site)
    return module


def _no_linear(site: str, kind: str, pattern: str) -> ExportError:
    """The error for a quantized weight that is no linear's; pattern: what leaves it out."""
    return ExportError(
        f"{site} is {kind}; readers of the format quantize torch.nn.Linear only",
        where=site,
        do=f"add it to quantize.ignore: --set 'quantize.ignore=[lm_head, {pattern}]'",
    )


def _match(found: Tensors, program: Program, model: nn.Module) -> None:
    """Keep the tensors that the model's checkpoint has; fill in those of layers of the tower that nothing reads."""
    own = dict(model.state_dict())
    held = {f"{site}.weight" for site in found.codes}
    tied = set(_tied(model))
    for name, tensor in own.items():
        if name in held:
            continue
        if name not in found.plain and name not in tied:
            if VISION not in program.graphs or not name.startswith(f"{program.graphs[VISION].owner}."):
                raise _other(name, "the compiled graphs do not hold it under its name")
            found.unread[name] = torch.zeros(tensor.shape, dtype=program.host.dtype)  # type: ignore[arg-type]
        elif name in found.plain and found.plain[name].shape != tensor.shape:
            raise _other(name, f"it is {list(found.plain[name].shape)} in the graphs, not {list(tensor.shape)}")
    if extra := sorted({name for name in found.plain if name.endswith(".bias")} - set(own)):
        raise _other(extra[0], "the model has no such bias")
    found.plain = {name: tensor for name, tensor in found.plain.items() if name in own}


def _tied(model: nn.Module) -> Iterator[str]:
    """Names of parameters that the model ties to others."""
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            yield name
        seen[id(parameter)] = name


def _other(name: str, what: str) -> ExportError:
    return ExportError(
        f"{name} cannot be written as the model's class stores it: {what}",
        where=name,
        do="use the compiled model or its artifact, and report this family",
    )
