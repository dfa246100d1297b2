"""Trace one component with transformers' exporter and turn it into a plain FX graph with named inputs and outputs."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, cast
from unittest import mock

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree
from transformers.exporters import exporter_dynamo
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.utils import _OUTPUT_FLAGS
from transformers.utils.generic import ModelOutput

from qpcompile.capture.adapters import attending_in_segments, table_of, traceable
from qpcompile.capture.boundary import component, first_line
from qpcompile.capture.functional import make_functional
from qpcompile.capture.known_values import knowing
from qpcompile.capture.packed_rows import spread_packed_rows
from qpcompile.capture.record import Call
from qpcompile.errors import CaptureError
from qpcompile.ir.edit import get_tensor, stand_in
from qpcompile.ir.names import CACHE, CROSS, STATE, Name, names
from qpcompile.ir.program import Graph
from qpcompile.ir.structure import CACHE_ARGUMENT, cached_tokens, named_tensors, template
from qpcompile.nested import is_list
from qpcompile.runtime.arguments import FLAGS, refuse_unknown, split_flags
from qpcompile.runtime.fixed_values import SAID, VALUES, digest_of, fixed, of_call, said, varying
from qpcompile.runtime.prepare import CAUSAL, MASK, MASK_AXES, TABLE, moved, prepare

# Largest distance of an output of a traced graph from eager's, of its norm, in types of 16 bits.
HALF = 0.1
# The exporter's own preparation of inputs is skipped: `prepare` does it, identically for tracing and execution.
_PRECOMPUTE = "transformers.exporters.utils.precompute_export_inputs"

_LOUD = ("torch._export", "torch._subclasses", "torch.fx.experimental", "transformers.exporters")


def trace(name: str, owner: str, module: torch.nn.Module, call: Call) -> Graph:
    """Trace `module` as called in `call`, with symbolic shapes, and check the graph against that call.

    Raises CaptureError with the line of the model's code that cannot be traced, or if the graph's results differ from
    eager's.
    """
    table = table_of(module)
    flags = {key: value for key, value in call.inputs.items() if key in FLAGS}
    data = {key: value for key, value in call.inputs.items() if key not in FLAGS and value is not None}
    with torch.no_grad():
        arguments = {key: value for key, value in prepare(module, data, table).items() if value is not None}
    hook = module.register_forward_pre_hook(_one_token_count, with_kwargs=True)
    # Flags that the exporter does not take out of the arguments have no axes.
    axes = _dynamic_axes(arguments) | {key: None for key in flags if key not in _OUTPUT_FLAGS}
    try:
        with traceable(module):
            exported = _exported(name, owner, module, {**arguments, **flags}, axes)
    finally:
        hook.remove()
    call.output = _returned(exported, call.output)
    graph = _graph(name, owner, exported, arguments, call)
    spread_packed_rows(graph)
    graph.constants = {
        key: value for key, value in (flags | data).items() if isinstance(value, (bool, int, float, str))
    }
    # A flag may list the layers whose results are returned.
    graph.constants |= {key: list(value) for key, value in flags.items() if is_list(value)}
    if table is not None:
        graph.constants[TABLE] = table
    tensors = dict(named_tensors(arguments))
    graph.constants |= _mask_facts(module, tensors)
    _check(graph, tensors, call.output)
    return graph


def trace_values(name: str, owner: str, module: torch.nn.Module, call: Call) -> Graph:
    """Trace `module` for the values and shapes of `call` only (runtime/fixed_values.py); raises as `trace` does."""
    arguments = of_call(call.inputs)
    given, known = moved(module, varying(arguments)), moved(module, fixed(arguments))
    flags = {key: value for key, value in call.inputs.items() if key in FLAGS and key not in known}
    with traceable(module, adapted=False), knowing(module, known):
        exported = _exported(name, owner, module, {**given, **flags}, None)
    graph = _graph(name, owner, exported, given, call)
    graph.constants = {VALUES: digest_of(arguments), SAID: said(arguments)}
    _check(graph, dict(named_tensors(given)), call.output)
    return graph


def _exported(
    name: str, owner: str, module: torch.nn.Module, arguments: dict[str, Any], axes: dict[str, Any] | None
) -> torch.export.ExportedProgram:
    """Run the exporter; `axes` are the dynamic ones, None for none."""
    config = DynamoConfig(dynamic=axes is not None, dynamic_shapes=axes)
    failing = component(f"{name} cannot be traced", owner or type(module).__name__)
    with failing, _quiet(), _attention_by_segment(), mock.patch(_PRECOMPUTE, lambda *_: None):
        exported, _ = DynamoExporter().export_program(cast(Any, module), copy.deepcopy(arguments), config)
    return exported


def _graph(
    name: str, owner: str, exported: torch.export.ExportedProgram, arguments: dict[str, Any], call: Call
) -> Graph:
    """What was exported as a graph with named inputs and outputs."""
    graph = Graph(
        name=name,
        module=_plain(exported),
        inputs=_input_names(exported, dict(named_tensors(arguments))),
        outputs=names(path or "output" for path, _ in named_tensors(call.output)),
        owner=owner,
        returns=template(call.output) if not isinstance(call.output, torch.Tensor) else "output",
    )
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = stand_in(graph, get_tensor(graph.module, str(node.target)))
    return graph


def _returned(exported: torch.export.ExportedProgram, output: Any) -> Any:
    """A recorded output without what only a call with ids returns, like a mask made of them: graphs take embeddings."""
    spec = exported.call_spec.out_spec
    keys = spec.context if spec is not None else None
    if not isinstance(output, ModelOutput) or not isinstance(keys, list):
        return output
    return type(output)(**{key: value for key, value in output.items() if key in keys})


def _one_token_count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Assert that masks have as many tokens as cache plus embeddings, so that the trace has one symbol for them."""
    embeds, cache = kwargs.get("inputs_embeds"), kwargs.get(CACHE_ARGUMENT)
    if embeds is not None and cache is not None:
        for _, mask in named_tensors(kwargs.get(MASK)):
            torch._check(mask.shape[-1] == cached_tokens(cache) + embeds.shape[1])
            torch._check(mask.shape[0] == embeds.shape[0])


def _mask_facts(module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The facts needed to create a mask that a call omits (qpcompile/runtime/prepare.py)."""
    axes = [tensor.ndim for path, tensor in tensors.items() if Name(path).root == MASK]
    causal = all(getattr(part, "is_causal", True) for part in module.modules())
    return {MASK_AXES: axes[0], CAUSAL: causal} if axes else {}


def _dynamic_axes(arguments: dict[str, Any]) -> dict[str, Any]:
    """The dynamic axes: all, except the channels of embeddings and the heads and channels of the cache.

    Fewer symbols trace faster, and an axis that is constant across calls should not be symbolic.
    """
    axes = {key: exporter_dynamo.get_auto_dynamic_shapes(value) for key, value in arguments.items()}
    embeds = arguments.get("inputs_embeds")
    if embeds is not None:
        for key, value in arguments.items():
            # Features of pictures have the channels of embeddings, too.
            is_rows = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3
            if is_rows and value.shape[-1] == embeds.shape[-1]:
                axes[key].pop(2)
    if CACHE_ARGUMENT in axes:
        cached = [name for name, _ in named_tensors(arguments[CACHE_ARGUMENT])]
        for name, tensor in zip(cached, axes[CACHE_ARGUMENT], strict=True):
            for axis in fixed_axes(name, len(tensor)):
                tensor.pop(axis)
    return axes


def fixed_axes(name: str, ndim: int) -> tuple[int, ...]:
    """The axes of a cached tensor that are the same in every call: of keys, heads and channels; of a state, all but the
    batch; of other tensors of a layer, which have an entry per token, the last.
    """
    path = Name(name)
    kind = path.part.partition(".")[0]
    if path.root == CACHE or kind == CROSS:
        return (1, 3)
    grows = kind not in ("conv", "recurrent")
    return (ndim - 1,) if grows else tuple(range(1, ndim))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's notes about dimensions it may specialise, and the whole graph that torch prints where tracing
    fails: the graph is checked against eager anyway, and an error names the line.
    """
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _attention_by_segment() -> Iterator[None]:
    """Trace attention over packed segments (windows, pictures of several sizes) as one operator.

    The exporter reshapes segments into a batch, which is correct only if all have the same length; windows at a
    picture's border do not.
    """
    original = exporter_dynamo._reshaped_vision_attention_forward

    def forward(self: torch.nn.Module, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, **kwargs: Any) -> Any:
        with attending_in_segments(cu_seqlens):
            return original(self, hidden_states, torch.stack([cu_seqlens[0], cu_seqlens[-1]]), **kwargs)

    with mock.patch.object(exporter_dynamo, "_reshaped_vision_attention_forward", forward):
        yield


def _plain(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The exported graph as an ordinary GraphModule: tensors in, a tuple of tensors out, no guards."""
    module = exported.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    output = next(node for node in module.graph.nodes if node.op == "output")
    values, _ = pytree.tree_flatten(output.args[0])
    output.args = (tuple(value for value in values if isinstance(value, fx.Node)),)
    constants = [not isinstance(name, str) for name in exported.graph_signature.user_inputs]
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, constant in zip(placeholders, constants, strict=True):
        if constant:  # a number or None: a constant in the trace, never read
            module.graph.erase_node(node)
    plain = fx.GraphModule(module, module.graph)
    make_functional(plain)
    plain.graph.eliminate_dead_code()
    plain.recompile()
    return plain


def _input_names(exported: torch.export.ExportedProgram, tensors: Iterable[str]) -> tuple[Name, ...]:
    """The graph's inputs, in the order of the traced keyword arguments."""
    wanted = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    signature = exported.call_spec.in_spec
    arguments = list(signature.child(1).context) if signature is not None else []
    roots = [(CACHE, STATE) if key == CACHE_ARGUMENT else (key,) for key in arguments]
    ordered = [name for root in roots for name in names(tensors) if name.root in root]
    if len(ordered) != len(wanted):
        raise CaptureError(
            f"the traced graph has {len(wanted)} inputs, the call {len(ordered)} tensors",
            where=f"graph inputs {list(wanted)}, call {ordered}",
            do="report this family",
        )
    return tuple(ordered)


def check_sizes(graph: Graph) -> None:
    """Raise CaptureError for a graph with sizes that are counted from values: no artifact can hold their types."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and free_unbacked_symbols(value):
            trace_of = [line for line in str(node.meta.get("stack_trace", "")).strip().splitlines() if line.strip()]
            raise CaptureError(
                f"the size of {node.name} in the traced {graph.name} depends on values, not on sizes",
                where=f"{graph.owner}, {trace_of[-1].strip() if trace_of else node.name}",
                do="report this family: it selects rows by a mask",
            )


def check_call(graph: Graph, module: torch.nn.Module, call: Call) -> None:
    """Compare a graph with another recorded call of its component, with other sizes.

    Raises CaptureError if the graph is bound to the sizes that it was traced with.
    """
    flags, data = split_flags(call.inputs)
    with torch.no_grad():
        arguments = prepare(module, data, graph.constants.get(TABLE))
    refuse_unknown(graph, flags, arguments)
    try:
        _check(graph, dict(named_tensors(arguments)), call.output)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise CaptureError(
            f"the traced {graph.name} does not run on another number of pictures: {first_line(error)}",
            where=graph.owner,
            do="report this family: its code is traced as a loop over pictures, or with their sizes as numbers",
        ) from error


def _check(graph: Graph, tensors: dict[str, torch.Tensor], eager: Any) -> None:
    expected = [tensor for _, tensor in named_tensors(eager)]
    with torch.no_grad():
        actual = list(graph({name: tensors[name] for name in graph.inputs}).values())
    if len(actual) != len(expected):
        raise CaptureError(
            f"the traced {graph.name} gives {len(actual)} tensors, eager {len(expected)}",
            where=graph.owner,
            do="report this family: what its component returns depends on its inputs",
        )
    for path, left, right in zip(graph.outputs, actual, expected, strict=True):
        if left.shape != right.shape or not _alike(left, right):
            raise CaptureError(
                f"the traced {graph.name} differs from eager in its output {path}{_distance(left, right)}",
                where=graph.owner,
                do="report this family: its code takes a branch that tracing cannot see",
            )


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape are equal up to rounding.

    With 16 bits every operator rounds, and an operator that tracing replaces (attention with a mask, for one without)
    flips last bits; over tens of layers they add up to percents. A wrong branch changes a tensor as a whole.
    """
    if right.dtype in (torch.bfloat16, torch.float16):
        return _relative(left, right) <= HALF
    return torch.allclose(left.float(), right.float(), rtol=1e-3, atol=1e-4)


def _relative(left: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference of two tensors of one shape, relative to the second; NaN where either has one."""
    expected: Any = right.detach().double()
    difference: Any = left.detach().double() - expected
    return float(difference.norm() / expected.norm().clamp(min=1e-30))


def _distance(left: torch.Tensor, right: torch.Tensor) -> str:
    if left.shape != right.shape:
        return f": {list(left.shape)}, not {list(right.shape)}"
    return f": {_relative(left, right):.2g} of its norm off"
