"""What operators refuse: the rule, the operator and its fake kernel agree on every call, and none crashes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.valid_calls import CALLS, ROWS, B, C, D, H, N, S, cache, packed, packed_experts, real
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qpcompile.errors import KernelError
from qpcompile.ir.operators import SPECS, ours
from qpcompile.kernels.attention_kv.reference import attention_kv
from qpcompile.kernels.quantize_dynamic.reference import quantize_dynamic
from qpcompile.kernels.rules import Rule, differ

RULES: dict[str, Rule] = {spec.name: spec.rule for spec in SPECS}
TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool)
SCALARS: dict[type, tuple[Any, ...]] = {
    float: (-1.0, 0.0, 0.5, 1e9, float("nan"), float("inf")),
    int: (-1, 0, 1, 5, 7, 100),
    str: ("", "nothing"),
    list: ([], [1.0], [1.0, 2.0, float("nan"), 1.0]),
}
# Operators whose checks read values: the ends of segments, the number of keys and of experts.
BY_CONTENT = {
    *("segment_attention", "attention_received", "attention_kv"),
    *("expert_linear", "expert_linear_a16", "expert_linear_int"),
}
ON_CPU = {
    name: getattr(importlib.import_module(f"qpcompile.kernels.{name}.cpu"), name)
    for name in RULES
    if importlib.util.find_spec(f"qpcompile.kernels.{name}.cpu")
}


def bent_tensor(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor with another type, rank, or size of one axis."""
    yield from (tensor.to(dtype) for dtype in TYPES if dtype != tensor.dtype)
    yield tensor[None]
    yield tensor.reshape(-1)
    if tensor.dim():
        yield tensor[0]
    for axis, size in enumerate(tensor.shape):
        yield tensor.narrow(axis, 0, 0)
        yield tensor.narrow(axis, 0, 1)
        yield tensor.narrow(axis, 0, size - 1)
        yield torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
        yield torch.cat([tensor, tensor], dim=axis)


def bent(value: Any) -> list[Any]:
    """Other values for one operand."""
    if isinstance(value, Tensor):
        return list(bent_tensor(value))
    return [] if isinstance(value, (bool, torch.dtype)) else list(SCALARS.get(type(value), ()))


def outcome(function: Any, *arguments: Any) -> list[tuple[torch.dtype, tuple[int, ...]]] | None:
    """Dtypes and sizes of the results; None for a KernelError. Any other error is a defect."""
    try:
        results = function(*arguments)
    except KernelError as error:
        assert error.where and error.do
        return None
    results = [results] if isinstance(results, Tensor) else results
    return [(each.dtype, tuple(each.shape)) if isinstance(each, Tensor) else each for each in results]


def check_agreement(name: str, arguments: tuple[Any, ...]) -> bool:
    """Rule, fake kernel, operator and CPU function all refuse or all agree; returns whether they accept."""
    operator = getattr(ours, name).default
    promised = outcome(RULES[name].results, *arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
        assert outcome(operator, *fakes) == promised
    found = outcome(operator, *arguments)
    assert found == promised or (name in BY_CONTENT and found is None)
    if name in ON_CPU:
        assert outcome(ON_CPU[name], *arguments) == found
    return found is not None


def test_every_operator_has_a_rule_in_the_order_of_its_arguments() -> None:
    assert set(RULES) == set(CALLS)
    for name, rule in RULES.items():
        assert list(rule.names) == [each.name for each in getattr(ours, name).default._schema.arguments]


@pytest.mark.parametrize("name", CALLS)
def test_a_valid_call_gives_what_the_rule_says(name: str) -> None:
    assert check_agreement(name, CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_one_bent_operand(name: str) -> None:
    valid = CALLS[name]()
    calls = [(*valid[:place], other, *valid[place + 1 :]) for place, each in enumerate(valid) for other in bent(each)]
    answered = [check_agreement(name, call) for call in calls]
    assert not all(answered)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_several_bent_operands(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CALLS)))
    arguments = list(CALLS[name]())
    for place in data.draw(st.sets(st.integers(0, len(arguments) - 1), max_size=4)):
        if others := bent(arguments[place]):
            arguments[place] = others[data.draw(st.integers(0, len(others) - 1))]
    check_agreement(name, tuple(arguments))


def steps(tensor: Tensor) -> list[int]:
    """Strides of the axes longer than 1: later views in a graph rely on them."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("name", CALLS)
def test_layout_does_not_matter(name: str) -> None:
    """Strided inputs give equal results, and results have the strides of the fake kernel."""
    valid = CALLS[name]()
    spread = [torch.stack([each, each], dim=-1)[..., 0] if isinstance(each, Tensor) else each for each in valid]
    turned = [each.mT.contiguous().mT if isinstance(each, Tensor) and each.dim() > 1 else each for each in valid]
    results = [getattr(ours, name).default(*arguments) for arguments in (valid, spread, turned)]
    with FakeTensorMode() as mode:
        results.append(
            getattr(ours, name).default(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in turned))
        )
    for one, *others, fake in zip(*[[each] if isinstance(each, Tensor) else each for each in results], strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert steps(others[-1]) == steps(fake)


def edit(name: str, **changes: Any) -> tuple[Any, ...]:
    """The valid call with other operands."""
    return tuple(changes.get(key, value) for key, value in zip(RULES[name].names, CALLS[name](), strict=True))


CODES, SCALE = quantize_dynamic(real(B, ROWS, C))
WEIGHT, WEIGHT_SCALE = packed()
K_CODES, K_AFFINE = cache(4)
# Calls that once crashed, accessed memory out of bounds, or gave wrong results; and the operand to blame.
REFUSED = {
    "scales for more tokens": ("linear_int", {"scale": real(40, 1)}, "scale"),
    "scales for fewer tokens": ("linear_int", {"scale": SCALE[:1]}, "scale"),
    "no scales": ("linear_int", {"scale": SCALE[:0]}, "scale"),
    "no tokens": ("linear_int", {"q": CODES[:0]}, "scale"),
    "a scale without groups": ("linear_int", {"scale": SCALE[..., :0]}, "scale"),
    "groups that do not divide": ("linear_int", {"scale": real(B, ROWS, 5)}, "scale"),
    "other groups": ("linear_int", {"scale": real(B, ROWS, 2), "weight_scale": real(N, 3)}, "weight_scale"),
    "a half-precision weight scale": ("linear_int", {"weight_scale": WEIGHT_SCALE.bfloat16()}, "weight_scale"),
    "one weight scale for all": ("linear_int", {"weight_scale": WEIGHT_SCALE[:1]}, "weight_scale"),
    "codes half as wide": ("linear_int", {"weight": WEIGHT[:, :3]}, "weight"),
    "a bias of one": ("linear_int", {"bias": real(1)}, "bias"),
    "a whole-number bias": ("linear_int", {"bias": torch.ones(N, dtype=torch.int64)}, "bias"),
    "a residual of one": ("linear_int", {"residual": real(1)}, "residual"),
    "codes as numbers": ("linear_int", {"q": CODES.float()}, "q"),
    "experts without scales": ("expert_linear_int", {"weight_scale": real(3, N, 1)}, "weight_scale"),
    "experts of other widths": ("expert_linear_int", {"weight": packed_experts()[0][..., :3]}, "weight"),
    "one index for all tokens": ("expert_linear_int", {"index": torch.zeros(1, 2, dtype=torch.int64)}, "index"),
    "experts without rows": ("expert_linear_a16", {"weight": packed_experts()[0][:, :0]}, "weight"),
    "8-bit scales of i8": ("linear_w8a16", {"weight_scale": torch.ones(N, 1, dtype=torch.int8)}, "weight_scale"),
    "8-bit scales of f64": ("linear_w8a16", {"weight_scale": real(N, 1).double()}, "weight_scale"),
    "a bias of one for 8 bits": ("linear_w8a16", {"bias": real(1)}, "bias"),
    "a weight scale too few": ("linear_w4a16", {"weight_scale": WEIGHT_SCALE[1:]}, "weight_scale"),
    "values without rows": ("attention_kv", {"v_codes": K_CODES[:, :, :0]}, "v_codes"),
    "more batch rows than the cache": ("attention_kv", {"q": real(50, H, ROWS, D)}, "k_codes"),
    "a mask of one key": ("attention_kv", {"mask": real(1, 1, 1, 1)}, "mask"),
    "heads that do not divide": ("attention_kv", {"q": real(B, 3, ROWS, D)}, "q"),
    "keys of other bits": ("attention_kv", {"k_bits": 8}, "k_codes"),
    "values of other bits": ("attention_kv", {"v_bits": 4}, "v_codes"),
    "codes of 6 bits": ("kv_write", {"bits": 6}, "bits"),
    "codes of other bits": ("kv_read", {"bits": 8}, "codes"),
    "a past of other bits": ("rope_kv_append", {"k_bits": 4}, "k_codes"),
    "a short scale": ("hadamard", {"scale": real(C - 1)}, "scale"),
    "a factor too few": ("kronecker", {"left": real(2, 2)}, "x"),
    "a norm weight of one": ("rmsnorm", {"weight": real(1)}, "weight"),
    "a fused norm weight of one": ("rmsnorm_quantize", {"weight": real(1)}, "weight"),
    "a transform scale of one": ("rmsnorm_quantize", {"transform_scale": real(1)}, "transform_scale"),
    "a layer norm bias too short": ("layernorm_quantize", {"bias": real(C - 1)}, "bias"),
    "a gate without its partner's rows": ("activation_quantize", {"up": real(1, ROWS, C)}, "up"),
    "a function that is not known": ("activation_quantize", {"function": "relu"}, "function"),
    "a factor without the other": ("transform_quantize", {"right": None}, "left"),
    "the other without it": ("rmsnorm_quantize", {"left": None}, "left"),
    "factors of other channels": ("transform_quantize", {"left": real(2, 2)}, "right"),
    "a factor that is not square": ("transform_quantize", {"left": real(3, 2)}, "left"),
    "factors and a rotation": ("layernorm_quantize", {"rotate": True}, "left"),
    "a shift of one": ("transform_quantize", {"shift": real(1)}, "shift"),
    "a static scale of two": ("quantize_static", {"scale": real(2)}, "scale"),
    "a clip ratio of 0": ("quantize_dynamic", {"clip_ratio": 0.0}, "clip_ratio"),
    "groups of minus 1": ("quantize_dynamic", {"group_size": -1}, "group_size"),
    "more tokens than there are": ("select_tokens", {"keep": S + 1}, "keep"),
    "pivots without end": ("pivot_tokens", {"visual_pivots": 2**40}, "visual_pivots"),
}


@pytest.mark.parametrize(("name", "changes", "blamed"), REFUSED.values(), ids=list(REFUSED))
def test_the_operand_is_named(name: str, changes: dict[str, Any], blamed: str) -> None:
    for call in (getattr(ours, name).default, RULES[name].check, RULES[name].fake):
        with pytest.raises(KernelError) as error:
            call(*edit(name, **changes))
        assert error.value.where == f"qpcompile::{name}, operand {blamed}"


@pytest.mark.parametrize("name", ["pivot_tokens", "token_scores", "attention_kv", "kv_read", "linear_int"])
def test_any_python_value_is_refused_by_name(name: str) -> None:
    """Also values that compare equal to a valid one, or that are unhashable."""
    valid = CALLS[name]()
    for function in (RULES[name].check, *([ON_CPU[name]] if name in ON_CPU else [])):
        function(*valid)
        for place, value in enumerate(valid):
            likes = [float(value), value == 1] if type(value) is int else [int(value)] if type(value) is bool else []
            for other in (*likes, {}, [[1.0]], object()):
                with pytest.raises(KernelError, match=RULES[name].names[place]):
                    function(*valid[:place], other, *valid[place + 1 :])


@pytest.mark.parametrize("filled", [-1, -(2**63), S + 1, 2**40])
def test_keys_that_are_not_there_are_refused(filled: int) -> None:
    for rows in (1, 12):
        call = edit("attention_kv", q=real(B, H, rows, D), filled=torch.tensor([filled]))
        for function in (ours.attention_kv.default, ON_CPU["attention_kv"], attention_kv):
            with pytest.raises(KernelError, match=f"filled is {filled}"):
                function(*call)


@pytest.mark.parametrize("segments", [[0, 2], [1, S], [0, 4, 2, S], [0, S + 1], [0, 2**40, S], [-(2**63), S]])
def test_segments_that_do_not_cover_the_tokens_are_refused(segments: list[int]) -> None:
    ends = torch.tensor(segments)
    q, k = real(1, H, S, D), real(1, H // 2, S, D)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ours.attention_received.default, (q, k, ends, 0.3, False)),
        (ours.segment_attention.default, (q, k, k, ends, 0.3)),
        (ON_CPU["segment_attention"], (q, k, k, ends, 0.3)),
    ]
    for function, call in calls:
        with pytest.raises(KernelError, match="do not cover"):
            function(*call)


def test_budgets_and_pivots_beyond_the_tokens_are_all_or_none() -> None:
    for name in ("dpp_select", "farthest_tokens", "pivot_tokens", "spread_tokens"):
        operator = getattr(ours, name).default
        below = ((-(2**62), 0), (-1, 0)) if name in ("dpp_select", "farthest_tokens") else ()
        for much, same in ((S + 1, S), (2**40, S), *below):
            found, expected = (operator(*edit(name, budget=torch.full((B,), each))) for each in (much, same))
            assert torch.equal(found, expected), (name, much)
    many, all_there = (
        ours.pivot_tokens.default(*edit("pivot_tokens", visual_pivots=each, text_pivots=each)) for each in (256, S)
    )
    assert torch.equal(many, all_there)


def test_symbolic_sizes_are_compared_by_their_examples_without_a_guard() -> None:
    environment, rows_of_numbers = ShapeEnv(), real(7, C)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with FakeTensorMode(shape_env=environment) as mode:
        symbolic = mode.from_tensor(rows_of_numbers, source=ConstantSource("rows"), symbolic_context=context)
        rows = symbolic.shape[0]
        assert isinstance(rows, torch.SymInt)
        RULES["rmsnorm"].check(symbolic, torch.empty(C), 1e-6)
        with pytest.raises(KernelError, match="C is 12 and not 11"):
            RULES["rmsnorm"].check(symbolic, torch.empty(C - 1), 1e-6)
        assert not differ(rows, 7) and differ(rows, 8)
        assert not differ(environment.create_unbacked_symint(), 8)
    assert not environment.guards
