"""Fixtures of the operators' tests: export a module to ONNX and run it in an onnxruntime session."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class ExportedModule:
    """An ONNX model, checked, and a session on it."""

    proto: Any
    session: Any

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [each.name for each in self.session.get_inputs()]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(each) for each in self.session.run(None, feeds)]

    @property
    def operators(self) -> set[str]:
        """The operators of the model, with their domain where it is not ONNX's own."""
        return {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in self.proto.graph.node}

    def initializers_of(self, elem_type: int) -> list[tuple[int, ...]]:
        """The shapes of the initializers of one ONNX element type."""
        return [tuple(each.dims) for each in self.proto.graph.initializer if each.data_type == elem_type]


Export = Callable[..., ExportedModule]


@pytest.fixture(scope="session")
def export_onnx() -> Export:
    """export_onnx(module, inputs, translations, lowerings, options); the first two dimensions of inputs are dynamic."""
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    import onnx_ir as ir
    import onnxruntime

    def export(
        module: torch.nn.Module,
        inputs: Sequence[Tensor],
        translations: Mapping[Callable[..., Any], Callable[..., Any]],
        lowerings: Sequence[Callable[[Any], None]] = (),
        options: Mapping[str, str] | None = None,
    ) -> ExportedModule:
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=21,
            dynamic_shapes=tuple(sizes for _ in inputs),
            custom_translation_table=dict(translations),
            verbose=False,
        )
        assert program is not None
        for lower in lowerings:
            lower(program.model)
        proto = ir.to_proto(program.model)
        onnx.checker.check_model(proto, full_check=True)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        for key, value in (options or {}).items():
            settings.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        return ExportedModule(proto, session)

    return export


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten results are visible: outputs are filled with NaN and -128."""
    plain = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        made = plain(*arguments, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 200 if made.dtype == torch.uint8 else -128)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
