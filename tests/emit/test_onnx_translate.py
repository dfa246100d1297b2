"""Every translated operator gives torch's results in onnxruntime, at sizes it was not translated with."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, save
from onnx_ir import serde
from torch import fx

from qpcompile.emit.onnx.export import DATA, OWN, TORCH, _check_graph
from qpcompile.emit.onnx.translate.nodes import axis_names, to_onnx
from qpcompile.emit.onnx.wrap import Part
from qpcompile.errors import ExportError
from qpcompile.ir import operators

aten = torch.ops.aten
Function = Callable[..., Any]


def picture(x: Any) -> Any:
    """f[B, 1, 2, 6], of a size that does not vary."""
    return aten.unsqueeze.default(aten.slice.Tensor(x, 1, 0, 2), 1)


def _nothing(empty: Any, x: Any) -> Any:
    """f[B, S, 2, 0]."""
    return aten.view.default(empty, [aten.sym_size.int(x, 0), aten.sym_size.int(x, 1), 2, 0])


# name -> function of x: f32[B, S, 6], i: i64[B, S] in 0..4 and b: bool[B, S].
ONE: dict[str, Function] = {
    "arithmetic": lambda x, i, b: aten.sub.Tensor(aten.div.Tensor(aten.mul.Tensor(x, 3), 7), x, alpha=2),
    "integers with floats": lambda x, i, b: aten.add.Tensor(aten.mul.Tensor(i, 0.5), 1),
    "floor division": lambda x, i, b: aten.div.Tensor_mode(aten.sub.Tensor(i, 3), 2, rounding_mode="floor"),
    "truncation": lambda x, i, b: aten.div.Tensor_mode(x, 0.3, rounding_mode="trunc"),
    "remainder": lambda x, i, b: aten.remainder.Scalar(aten.sub.Tensor(i, 3), 3),
    "float remainder": lambda x, i, b: aten.remainder.Scalar(x, 0.7),
    "reversed": lambda x, i, b: aten.rsub.Scalar(x, 1.5),
    "powers": lambda x, i, b: aten.pow.Tensor_Scalar(aten.pow.Tensor_Scalar(x, 2), 1.5),
    "roots": lambda x, i, b: aten.rsqrt.default(aten.add.Tensor(aten.abs.default(x), 1)),
    "activations": lambda x, i, b: aten.silu.default(aten.gelu.default(aten.relu.default(aten.add.Tensor(x, 1)))),
    "tanh gelu": lambda x, i, b: aten.gelu.default(x, approximate="tanh"),
    "softmax": lambda x, i, b: aten.softmax.int(x, -1),
    "clamp": lambda x, i, b: aten.clamp.default(x, -0.5, 0.25),
    "infinities": lambda x, i, b: aten.nan_to_num.default(aten.log.default(x), 2.0, None, -9.0),
    "no numbers": lambda x, i, b: aten.nan_to_num.default(
        aten.div.Tensor(aten.relu.default(x), aten.unsqueeze.default(aten.sub.Tensor(i, 2), -1))
    ),
    "clamp below": lambda x, i, b: aten.clamp.default(i, min=2),
    "comparison of mixed types": lambda x, i, b: aten.gt.Scalar(i, 1.5),
    "inequality": lambda x, i, b: aten.ne.Scalar(i, 2),
    "equal flags": lambda x, i, b: aten.eq.Tensor(b, aten.ge.Scalar(i, 2)),
    "logic": lambda x, i, b: aten.bitwise_or.Tensor(aten.logical_not.default(b), aten.__and__.Tensor(b, b)),
    "where": lambda x, i, b: aten.where.self(aten.unsqueeze.default(b, -1), x, aten.neg.default(x)),
    "where with a number": lambda x, i, b: aten.where.ScalarOther(aten.unsqueeze.default(b, -1), x, float("-inf")),
    "masked fill": lambda x, i, b: aten.masked_fill.Scalar(x, aten.unsqueeze.default(b, 2), 4.0),
    "sums": lambda x, i, b: aten.sum.dim_IntList(b, [1], True),
    "means": lambda x, i, b: aten.mean.dim(x, [0, -1]),
    "largest": lambda x, i, b: aten.amax.default(x, [1]),
    "places of extremes": lambda x, i, b: aten.sub.Tensor(aten.argmax.default(x, 1), aten.argmin.default(x, 1)),
    "any": lambda x, i, b: aten.any.dim(b, 1),
    "cumulated": lambda x, i, b: aten.cumsum.default(b, 1),
    "order": lambda x, i, b: aten.argsort.default(aten.select.int(x, 2, 0), 1, True),
    "products": lambda x, i, b: aten.bmm.default(x, aten.transpose.int(x, 1, 2)),
    "convolution": lambda x, i, b: aten.conv2d.default(
        aten.unsqueeze.default(x, 1), aten.ones.default([2, 1, 1, 3]), None, [1, 3]
    ),
    "shapes": lambda x, i, b: aten.flatten.using_ints(
        aten.unflatten.int(aten.permute.default(x, [0, 2, 1]), 1, [2, 3]), 2
    ),
    "sizes in a view": lambda x, i, b: aten.view.default(
        x, [operator.mul(aten.sym_size.int(x, 0), aten.sym_size.int(x, 1)), 6]
    ),
    "two sizes in a view": lambda x, i, b: aten.reshape.default(
        x, [aten.sym_size.int(x, 1), aten.sym_size.int(x, 0), 6]
    ),
    "numbers from sizes": lambda x, i, b: aten.full.default(
        [operator.floordiv(operator.sub(aten.sym_size.int(x, 1), 1), 2)], 3.0
    ),
    "constant sizes": lambda x, i, b: aten.add.Tensor(x, operator.pow(aten.sym_size.int(x, 2), 2)),
    "views of nothing": lambda x, i, b: aten.cat.default(
        [x, aten.flatten.using_ints(_nothing(aten.slice.Tensor(x, 2, 0, 0), x), 2)], -1
    ),
    "expand": lambda x, i, b: aten.expand.default(aten.slice.Tensor(x, 1, 0, 1), [-1, aten.sym_size.int(x, 1), -1]),
    "repeat": lambda x, i, b: aten.repeat.default(x, [1, 2, 3]),
    "repeat each": lambda x, i, b: aten.repeat_interleave.self_int(x, 3, 1),
    "slices": lambda x, i, b: aten.slice.Tensor(aten.slice.Tensor(x, 1, -3, -1), 2, 1, 2**63 - 1, 2),
    "slice to a size": lambda x, i, b: aten.slice.Tensor(x, 1, 0, operator.sub(aten.sym_size.int(x, 1), 2)),
    "joined": lambda x, i, b: aten.stack.default([aten.cat.default([x, x], 1), aten.cat.default([x, x], 1)], -1),
    "joined with nothing": lambda x, i, b: aten.cat.default([aten.zeros.default([0]), x], -2),
    "cut": lambda x, i, b: operator.getitem(aten.split_with_sizes.default(x, [1, 2, 3], -1), 1),
    "pieces": lambda x, i, b: operator.getitem(aten.split.Tensor(x, 4, -1), 1),
    "unbound": lambda x, i, b: operator.getitem(aten.unbind.int(aten.unflatten.int(x, 2, [3, 2]), 3), 1),
    "gather": lambda x, i, b: aten.gather.default(x, 2, aten.expand.default(aten.unsqueeze.default(i, 2), [-1, -1, 6])),
    "index": lambda x, i, b: aten.index.Tensor(aten.slice.Tensor(x, 1, 0, 5), [None, aten.select.int(i, 0, 0)]),
    "two indices": lambda x, i, b: aten.index.Tensor(
        x, [aten.unsqueeze.default(aten.arange.default(aten.sym_size.int(x, 0)), 1), i]
    ),
    "types": lambda x, i, b: aten.to.dtype(aten.to.dtype(x, torch.int32), torch.bool),
    "ranges": lambda x, i, b: aten.arange.start_step(2, aten.sym_size.int(x, 1), 2),
    "new tensors": lambda x, i, b: aten.cat.default([aten.new_ones.default(x, [2]), aten.full.default([3], 2.0)]),
    "tensors alike": lambda x, i, b: aten.add.Tensor(aten.ones_like.default(i), aten.full_like.default(i, 4)),
    "padding": lambda x, i, b: aten.constant_pad_nd.default(x, [1, 2, 0, 1], 7.0),
    "masked scatter": lambda x, i, b: aten.masked_scatter.default(
        x, aten.unsqueeze.default(b, -1), aten.neg.default(x)
    ),
    "write at places": lambda x, i, b: aten.index_put.default(
        x, [aten.zeros_like.default(i), i], aten.full.default([], 2.0)
    ),
    "write under a mask": lambda x, i, b: aten.index_put.default(x, [b], aten.full.default([], 2.0)),
    "sampled": lambda x, i, b: aten.grid_sampler.default(
        aten.unsqueeze.default(x, 1), aten.tanh.default(aten.unflatten.int(x, 2, [3, 2])), 2, 1, False
    ),
    "average pool": lambda x, i, b: aten.avg_pool2d.default(picture(x), [1, 2], [1, 2]),
    "same padding": lambda x, i, b: aten.conv2d.padding(
        aten.unsqueeze.default(x, 1), aten.ones.default([2, 1, 2, 3]), None, [1, 1], "same"
    ),
    "resized": lambda x, i, b: aten.upsample_bicubic2d.vec(picture(x), [3, 7], False, None),
    "resized with aliasing removed": lambda x, i, b: aten._upsample_bilinear2d_aa.vec(picture(x), [2, 2], True, None),
    "resized line": lambda x, i, b: aten.upsample_linear1d.vec(x, [9], False, None),
    "shuffled pixels": lambda x, i, b: aten.pixel_unshuffle.default(
        aten.pixel_shuffle.default(aten.expand.default(picture(x), [-1, 4, -1, -1]), 2), 2
    ),
    "blocks": lambda x, i, b: aten.im2col.default(picture(x), [1, 2], [1, 1], [0, 0], [1, 2]),
    "windows": lambda x, i, b: aten.unfold.default(x, -1, 3, 2),
    "two indices inside": lambda x, i, b: aten.index.Tensor(
        picture(x), [None, None, aten.arange.default(2), aten.arange.default(2)]
    ),
    "two indices apart": lambda x, i, b: aten.index.Tensor(
        picture(x), [aten.arange.default(2), None, aten.arange.default(2)]
    ),
    "complex": lambda x, i, b: aten.flatten.using_ints(
        aten.view_as_real.default(
            aten.mul.Tensor(
                aten.view_as_complex.default(aten.unflatten.int(x, 2, [3, 2])),
                aten.polar.default(aten.full.default([3], 0.5), aten.slice.Tensor(x, 2, 0, 3)),
            )
        ),
        2,
    ),
    "flipped": lambda x, i, b: aten.roll.default(aten.flip.default(x, [0, 2]), [2], [1]),
    "squeezed": lambda x, i, b: aten.squeeze.default(aten.unsqueeze.default(x, 1)),
    "triangle": lambda x, i, b: aten.triu.default(aten.tril.default(x, 1), -1),
    "as another": lambda x, i, b: aten.expand_as.default(aten.view_as.default(aten.sum.dim_IntList(x, [2]), i), i),
    "largest ones": lambda x, i, b: operator.getitem(aten.topk.default(x, 2), 0),
    "some of all": lambda x, i, b: operator.getitem(
        aten.topk.default(x, operator.sub(aten.sym_size.int(x, 1), 2), 1), 0
    ),
    "sorted": lambda x, i, b: operator.getitem(aten.sort.default(x, -1, True), 1),
    "smallest": lambda x, i, b: operator.getitem(aten.min.dim(x, -1), 1),
    "one hot": lambda x, i, b: aten.one_hot.default(i, 5),
    "scattered": lambda x, i, b: aten.scatter.value(x, 2, aten.unsqueeze.default(i, 2), 3.0),
    "scattered sums": lambda x, i, b: aten.scatter_add.default(
        x, 2, aten.expand.default(aten.unsqueeze.default(i, 2), [-1, -1, 6]), x
    ),
    "buckets": lambda x, i, b: aten.bucketize.Tensor(i, aten.arange.default(4), right=True),
    "all": lambda x, i, b: aten.all.dim(b, 1),
    "softplus": lambda x, i, b: aten.softplus.default(aten.mul.Tensor(x, 12)),
    "einsum": lambda x, i, b: aten.einsum.default("bsc,btc->bst", [x, x]),
    "groups": lambda x, i, b: aten.group_norm.default(aten.transpose.int(x, 1, 2), 3, aten.ones.default([6])),
    "batch norm": lambda x, i, b: operator.getitem(
        aten._native_batch_norm_legit_no_training.default(
            aten.transpose.int(x, 1, 2),
            aten.full.default([6], 2.0),
            None,
            aten.ones.default([6]),
            aten.arange.default(6) + 1.0,
            0.1,
            1e-3,
        ),
        0,
    ),
    "identity matrix": lambda x, i, b: aten.mul.Tensor(aten.eye.m(3, 6), aten.sum.default(aten.eye.default(2))),
    "root mean square": lambda x, i, b: aten.rms_norm.default(x, [6], aten.full.default([6], 2.0), 1e-5),
    "sums of rows": lambda x, i, b: aten.index_add.default(x, 0, aten.arange.default(2), aten.slice.Tensor(x, 0, 0, 2)),
}


def example(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of one size."""
    generator = torch.Generator().manual_seed(batch * length)
    return {
        "x": torch.randn(batch, length, 6, generator=generator),
        "i": torch.randint(0, 5, (batch, length), generator=generator),
        "b": torch.rand(batch, length, generator=generator) < 0.5,
    }


def check(function: Function, atol: float = 1e-6) -> None:
    """Translate at two sizes, run at a third."""
    traced = fx.symbolic_trace(function)
    output = next(node for node in reversed(traced.graph.nodes) if node.op == "output")
    output.args = ((output.args[0],),)
    traced.recompile()
    part = Part(traced, ("x", "i", "b"), ("y",))
    model = to_onnx("test", part, (example(2, 7), example(3, 9)), (TORCH, OWN))
    session = ort.InferenceSession(serde.serialize_model(model).SerializeToString())
    feeds = example(4, 11)
    found = session.run(None, {entry.name: feeds[entry.name].numpy() for entry in session.get_inputs()})[0]
    (expected,) = traced(**feeds)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", ONE)
def test_operator(name: str) -> None:
    # Weights of cubic sampling are rounded by each library in its own order.
    check(ONE[name], atol=1e-5 if name == "sampled" else 1e-6)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "flags", "numbers"])
def test_attention(heads: int, mask: str) -> None:
    """Masks of every kind, more query than key heads, and a query that sees no key: 0 as in torch, never NaN."""

    def attend(x: Any, i: Any, b: Any) -> Any:
        def split(tensor: Any, count: int, width: int) -> Any:
            return aten.transpose.int(aten.unflatten.int(tensor, 2, [count, width]), 1, 2)

        query = split(aten.cat.default([x, x], 2), 4, 3)
        key = query if heads == 4 else split(x, 2, 3)
        options: dict[str, Any] = {"enable_gqa": True, "scale": 0.7} if heads == 2 else {}
        seen = aten.unsqueeze.default(aten.unsqueeze.default(b, 1), 3)  # fully masked rows
        given = {
            "none": None,
            "causal": None,
            "flags": aten.expand.default(seen, [-1, -1, -1, aten.sym_size.int(x, 1)]),
            "numbers": aten.unsqueeze.default(aten.bmm.default(x, aten.transpose.int(x, 1, 2)), 1),
        }[mask]
        return aten.scaled_dot_product_attention.default(query, key, key, given, 0.0, mask == "causal", **options)

    check(attend)


def test_writes_become_values() -> None:
    """A view is written twice, what it is a view of is read afterwards, and the input stays as it is."""

    def write(x: Any, i: Any, b: Any) -> Any:
        copied = aten.clone.default(x)
        first = aten.select.int(copied, 2, 0)
        for start in (0, 1):
            part = aten.slice.Tensor(first, 1, start, -1, 2)
            aten.copy_.default(part, aten.slice.Tensor(aten.select.int(copied, 2, 3), 1, start, -1, 2))
        aten.mul_.Tensor(aten.slice.Tensor(copied, 2, 4, 6), 3.0)
        return aten.add.Tensor(copied, aten.unsqueeze.default(first, -1))

    check(write)


def test_writes_that_another_view_would_see_are_refused() -> None:
    def write(x: Any, i: Any, b: Any) -> Any:
        copied = aten.clone.default(x)
        other = aten.slice.Tensor(copied, 2, 0, 2)
        aten.fill_.Scalar(aten.select.int(copied, 2, 1), 0.0)
        return aten.cos.default(other)

    with pytest.raises(ExportError, match="writes to memory"):
        check(write)


def test_operators_nobody_translated_are_refused() -> None:
    with pytest.raises(ExportError, match=r"aten.erfinv.default has no translation"):
        check(lambda x, i, b: aten.erfinv.default(x))


def test_a_graph_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    """A shape that its own input contradicts, which only ONNX's checker finds."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    wanted = helper.make_tensor("shape", TensorProto.INT64, [3], [2, 3, 0])
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    graph = helper.make_graph([node], "test", [x], [y], [wanted])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "prefill.onnx")
    (tmp_path / DATA).write_bytes(b"")
    with pytest.raises(ExportError, match="it is not valid ONNX") as error:
        _check_graph(tmp_path / "prefill.onnx")
    assert error.value.where == "prefill.onnx"


def test_indices_by_mask_are_refused() -> None:
    with pytest.raises(ExportError, match="indexed by a mask"):
        check(lambda x, i, b: aten.index.Tensor(x, [b]))


def test_every_operator_of_ours_has_a_translation() -> None:
    ours = {spec.overload for spec in operators.SPECS}
    simulations = {operators.SIMULATE_QVLM, operators.SIMULATE_KIVI}
    assert set(OWN) == ours - simulations - {operators.QUANT_STUB}


def test_axis_names() -> None:
    assert axis_names("input_ids", 2) == ["batch", "tokens"]
    assert axis_names("position_ids", 3) == ["position_ids.0", "batch", "tokens"]
    assert axis_names("past_key_values.3.key.codes", 4)[2] == "cached_3"
    assert axis_names("present.kept.3", 2) == ["batch", "kept_3"]
    assert axis_names("cu_seqlens", 1) == ["cu_seqlens.0"]
