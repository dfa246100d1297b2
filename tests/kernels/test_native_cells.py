"""No function of the library trusts a count: mismatches are refused by name before anything is accessed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernels.native_calls import CALLS, HERE, make
from torch import Tensor

from kernels import native_calls
from qpcompile.errors import KernelError
from qpcompile.kernels.linear_int import cpu as linear
from qpcompile.kernels.native import library as native
from qpcompile.kernels.native.rows import RowPlan
from qpcompile.kernels.native.tape import Tape

pytestmark = pytest.mark.skipif(not native.available(), reason=native.library().problem or "compiled")
LEVELS = range(native.library().level + 1)
OPTIONAL = {"center", "bias", "mask", "residual", "second", "transform_scale", "shift"}
FREE = {"rounded", "element"}
"""Numbers of which none is wrong, or that say how others are read."""
ROOMY = {"at", "kind", "room", "keys", "group_size"}
"""Sizes that may be another: a place, a kind, what another argument bounds, groups of rows that are stored."""


def operands(case: str) -> Iterator[str]:
    """The arguments of a case that are tensors."""
    yield from (name for name, value in CALLS[case][1]().items() if isinstance(value, Tensor))


def sizes(case: str) -> Iterator[str]:
    """The arguments of a case that are sizes, also those of a tape's step."""
    yield from (name for name, value in CALLS[case][1]().items() if type(value) is int)


# A table of gates is built for one kind of rows: the rest of its plan is not read.
READ = [case for case in HERE if case != "gates_f32"]
TENSORS = [("gates_f32", "made"), *((case, name) for case in READ for name in operands(case))]
SIZES = [("gates_f32", "kind"), *((case, name) for case in READ for name in sizes(case) if name not in FREE)]


def refused(case: str, changed: dict[str, Any], level: int | None = None) -> str:
    """The message for a call whose arguments are changed; its outputs are unchanged."""
    symbol, arguments = CALLS[case]
    given = arguments() | changed
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    with pytest.raises(KernelError) as error:
        make(symbol, given, level)
    assert all(torch.equal(given[name], value) for name, value in before.items())
    return error.value.what


@pytest.mark.parametrize("level", LEVELS, ids=[native.LEVELS[level] for level in LEVELS])
@pytest.mark.parametrize("case", HERE)
def test_what_is_in_order_runs(case: str, level: int) -> None:
    symbol, arguments = CALLS[case]
    make(symbol, arguments(), None if symbol in native.AMX else level)


@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_a_tensor_of_another_count_is_refused_by_name(case: str, name: str) -> None:
    tensor = CALLS[case][1]()[name]
    symbol = native.name_of(CALLS[case][0])
    first = "x" if name == "sum" else name  # the reference for all other operands of a sum
    for level in LEVELS:
        shorter = tensor[:-1].clone() if tensor.dim() == 4 else tensor.flatten()[:-1].clone()
        assert refused(case, {name: shorter}, level).startswith(f"qp_{symbol}: {first}")
        nothing = tensor.new_empty([0] * tensor.dim() if tensor.dim() == 4 else [0])
        assert refused(case, {name: nothing}, level).startswith(f"qp_{symbol}: {first}")


@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_a_tensor_of_another_type_is_refused_by_name(case: str, name: str) -> None:
    tensor = CALLS[case][1]()[name]
    symbol = native.name_of(CALLS[case][0])
    for dtype in (torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool):
        if ((symbol, name) == ("attention_kv", "mask") and dtype == torch.bool) or dtype == tensor.dtype:
            continue
        message = refused(case, {name: tensor.to(dtype)})
        # Where two operands must have the same dtype, either may be named.
        assert message.startswith(f"qp_{symbol}: ") and " is " in message
    if name not in OPTIONAL:
        assert "missing" in refused(case, {name: None})


@pytest.mark.parametrize(("case", "name"), SIZES)
def test_a_size_that_its_tensors_do_not_have_is_refused(case: str, name: str) -> None:
    value = CALLS[case][1]()[name]
    symbol = native.name_of(CALLS[case][0])
    for size in (-1, -(2**62), 2**40, 2**62, 2**63 - 1, *([] if name in ROOMY else [value + 1])):
        assert refused(case, {name: size}).startswith(f"qp_{symbol}: ")
    with pytest.raises(KernelError, match=f"qp_{symbol}: a size does not fit"):
        make(CALLS[case][0], CALLS[case][1]() | {name: 10**30})
    if name in ("columns", "groups", "key_heads", "channels", "scale_groups", "weight_groups"):
        refused(case, {name: 0})


EMPTY = [(case, name) for case in READ for name in ("columns", "size") if name in CALLS[case][1]()]


@pytest.mark.parametrize(("case", "name"), [each for each in EMPTY if each[0] not in ("append", "unpack_int4")])
def test_nothing_to_sum_over_is_refused_where_tensors_agree(case: str, name: str) -> None:
    """An operand with such a size is empty too: there is no row to read."""
    symbol, arguments = CALLS[case]
    wide = arguments()[name]
    empty = {
        key: value.new_empty((*value.shape[:-1], 0))
        for key, value in arguments().items()
        if isinstance(value, Tensor) and value.shape[-1] in (wide, (wide + 1) // 2)
    }
    if symbol == "rope":
        make(symbol, arguments() | empty | {name: 0})
    else:
        assert (
            refused(case, empty | {name: 0})
            == f"qp_{native.name_of(symbol)}: {name} is 0, which does not match the other arguments"
        )


def test_a_message_says_what_is_there_and_what_is_needed() -> None:
    many = {"tokens": 150, "q": native_calls._i8(150, 64), "y": torch.zeros(150, 5)}
    message = refused("linear_int", many | {"scale": torch.rand(40)})
    assert message == "qp_linear_int: scale has 40 elements, 300 are needed"
    message = refused("linear_int", {"scale": torch.rand(3, 2).bfloat16()})
    assert message == "qp_linear_int: scale is bfloat16, not float32"
    assert refused("append", {"at": 5}) == "qp_append: at is 5, which does not match the other arguments"


@pytest.mark.parametrize("case", READ)
def test_gaps_and_odd_places_are_refused(case: str) -> None:
    for name in operands(case):
        tensor = CALLS[case][1]()[name]
        if tensor.itemsize > 1:
            raw = bytearray(tensor.nbytes + 1)
            odd = torch.frombuffer(raw, dtype=tensor.dtype, count=tensor.numel(), offset=1).view(tensor.shape)
            odd.copy_(tensor)
            assert "has a memory layout" in refused(case, {name: odd})
        wide = torch.stack([tensor, tensor], -1)[..., 0]
        if tensor.numel() > 1 and not (
            native.name_of(CALLS[case][0]) == "attention_kv" and name.endswith(("s", "e", "k"))
        ):
            assert "layout" in refused(case, {name: wide})


def test_a_tape_stops_where_its_room_ends() -> None:
    token, room = torch.ones(2, 2, 1, 3), torch.zeros(2, 2, 5, 3)
    with native.noted() as calls:
        native.call("append", token, room, 4, 3, 5, 2)
    tape = Tape(calls)
    tape.replay()
    tape.replay()
    kept = room.clone()
    with pytest.raises(KernelError, match="qp_append: at "):
        tape.replay()
    assert torch.equal(room, kept) and room[:, :, 2:].all()


@pytest.mark.parametrize("real", ["f64", "f32"])
def test_attention_on_a_tape_reads_no_key_that_is_not_there(real: str) -> None:
    symbol, arguments = CALLS[f"attention_kv_{real}"]
    given = arguments() | {"keys": 5}
    with native.noted() as calls:
        make(symbol, given)
    tape = Tape(calls)
    tape.replay()
    tape.replay()
    with pytest.raises(KernelError, match="qp_attention_kv: keys "):
        tape.replay()
    with native.noted() as calls:
        make(symbol, given | {"mask": torch.ones(2, 4, 1, 5, dtype=torch.bool)})
    tape = Tape(calls)
    with pytest.raises(KernelError, match="qp_attention_kv: mask "):
        tape.replay()


def test_a_replay_names_the_call_that_refused() -> None:
    x, y = torch.ones(3), torch.ones(3)
    with native.noted() as calls:
        native.call("add", x, y, torch.empty(3))
        native.call("append", x, torch.empty(1, 2, 3), 1, 3, 2, 1)
    with pytest.raises(KernelError, match="qp_append"):
        Tape(calls).replay()


def test_operands_of_a_bound_linear_are_refused() -> None:
    """Calls that once read and wrote past their tensors."""
    weight, ones = native_calls._u8(40, 32), torch.ones(40, 1)
    for rows, scales in ((1, 40), (3, 150), (2000, 40), (0, 40)):
        q, scale = native_calls._i8(rows, 64), torch.ones(scales, 1)
        with pytest.raises(KernelError, match="scale has"):
            linear._in_c(q, scale, weight, ones, None, torch.float32)
    with pytest.raises(KernelError, match="weight_scale is bf16"):
        linear.linear_int(native_calls._i8(1, 64), torch.ones(1, 1), weight, ones.bfloat16(), None, torch.float32, 4)


@pytest.mark.parametrize("level", LEVELS, ids=[native.LEVELS[level] for level in LEVELS])
def test_weights_of_rows_are_refused(level: int) -> None:
    x, short = torch.randn(2, 64), torch.ones(63)
    plans = {
        "weight": RowPlan("rmsnorm", torch.float32, 64, weight=short, level=level),
        "bias": RowPlan("layernorm", torch.float32, 64, weight=x[0], bias=short, level=level),
        "transform_scale": RowPlan("plain", torch.float32, 64, scale=short, factors=True, level=level),
        "shift": RowPlan("plain", torch.float32, 64, shift=short, level=level),
        "left_size": RowPlan("plain", torch.float32, 64, factors=(torch.ones(4, 4), torch.ones(8, 8)), level=level),
    }
    for name, plan in plans.items():
        with pytest.raises(KernelError, match=f"qp_rows: {name} "):
            plan.stored(x)
    with pytest.raises(KernelError, match="qp_rows: second "):
        RowPlan("silu", torch.float32, 64, level=level).stored(x, x[:1])
    with pytest.raises(KernelError, match="qp_rows: channels is 0"):
        RowPlan("plain", torch.float32, 0, level=level).quantized(torch.empty(2, 0))
