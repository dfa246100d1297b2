"""A compiled VLM: what `qpcompile.compile` returns and `qpcompile.load` gives back."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from qpcompile.capture.blank import blank_sample
from qpcompile.capture.data_folder import read_questions
from qpcompile.emit.artifact import artifact
from qpcompile.emit.artifact.auto_config import CompiledConfig, changed_settings, register_config
from qpcompile.emit.artifact.folder import reading
from qpcompile.emit.artifact.folder_kind import refuse_onnx_folder
from qpcompile.emit.artifact.pickled import from_files, to_files
from qpcompile.emit.artifact.weights import stored_tensors, total_bytes
from qpcompile.emit.compressed.export import export_compressed_tensors
from qpcompile.errors import ExportError, InputError
from qpcompile.hub import downloaded, is_hub_name, uploaded
from qpcompile.inspect.summary import as_html, as_text, summary
from qpcompile.ir.pass_manager import DEFECTS
from qpcompile.ir.program import Program
from qpcompile.ir.text import graph_text
from qpcompile.recipe.plan import Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.runtime.cpu.bind import BoundGraphs
from qpcompile.runtime.cuda.static_decode import StaticDecode, cuda_graph
from qpcompile.runtime.devices import move
from qpcompile.runtime.generation_options import plain_settings
from qpcompile.runtime.machine import Machine
from qpcompile.versions import tell_newer

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# What transformers' auto classes and pipelines pass along of their own accord.
PASSED = frozenset({"trust_remote_code", "_from_auto", "_from_pipeline", "adapter_kwargs"})


class CompiledVLM:
    """An executable compiled model: transformers' generation loop around the compiled graphs.

    `processor` turns pictures and text into inputs, if the model came with one; `program` holds the graphs.
    """

    def __init__(self, program: Program, processor: Any = None) -> None:
        self.program = program
        self.processor = processor
        self._bind(cuda_graphs=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the files of the artifact: unpickling gives the same answers, on the same kind of device."""
        return _unpickled, (to_files(self.program, self.processor), str(self.device), self._cuda_graphs)

    def __copy__(self) -> CompiledVLM:
        """A shallow copy that shares the graphs; the default by pickling would load them again."""
        return self._with(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledVLM:
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, state: dict[str, Any]) -> CompiledVLM:
        made = object.__new__(type(self))
        made.__dict__.update(state)
        return made

    def _bind(self, cuda_graphs: bool) -> None:
        self._cuda_graphs = cuda_graphs
        self._graphs = BoundGraphs(self.program)
        captured = cuda_graphs and self.program.host.device.type == "cuda"  # type: ignore[union-attr]
        self.machine = Machine(self.program, self._graphs, StaticDecode(self.program, cuda_graph) if captured else None)

    @property
    def plan(self) -> Plan:
        """The decisions of the compile."""
        return self.program.plan

    @property
    def recipe(self) -> Recipe:
        """The recipe of the compile."""
        return self.program.recipe

    @property
    def config(self) -> Any:
        """The configuration of the transformers model."""
        return self.machine.host.config

    @property
    def generation_config(self) -> Any:
        """The default settings of `generate`."""
        return self.machine.host.generation_config

    @property
    def device(self) -> torch.device:
        """The device on which the inputs of `generate` must be."""
        return self.machine.host.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the model."""
        return self.machine.host.dtype

    @property
    def decode_problem(self) -> str:
        """Why decode steps are not replayed by one C call; empty if they are. Independent of CUDA graphs."""
        return self._graphs.decode_problem

    def to(self, device: torch.device | str | int, cuda_graphs: bool = False) -> CompiledVLM:
        """Move all weights to a device, each once; returns this model. The inputs of `generate` must be there too.

        Args:
            device: a torch device.
            cuda_graphs: on a CUDA device, decode in steps with static shapes that are captured once and replayed
                (runtime/cuda/static_decode.py), instead of operator by operator with growing caches. Off by default,
                because capture has not been tested on a GPU yet.
        """
        move(self.program, torch.device(device))
        self._bind(cuda_graphs)
        return self

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Same arguments and result as transformers' `model.generate`. Calls from several threads are serialized.

        Args:
            inputs: i64[B, S] prompt tokens, as an alternative to `input_ids`.
            kwargs: the processor's outputs and any generation settings (`max_new_tokens`, `streamer`, ...).
        """
        return self.machine.generate(**({} if inputs is None else {"inputs": inputs}), **kwargs)

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        """The distribution of the next token: `logits`, f[B, 1, vocabulary]. Use `generate` for an answer.

        Logits of other positions do not exist where tokens were cut, and no cache is returned.

        Args:
            inputs: the processor's outputs, without generation settings.
        """
        if given := sorted(set(inputs) & set(vars(GenerationConfig()))):
            raise InputError(
                f"{', '.join(given)}: a call returns the next token's logits, and nothing else",
                where="CompiledVLM.__call__",
                do="give the processor's outputs only, or call generate, which takes settings",
            )
        asked = {**plain_settings(self.machine.host), "output_logits": True, "return_dict_in_generate": True}
        answer = self.generate(**inputs, **asked)
        return CausalLMOutputWithPast(logits=answer.logits[0][:, None])

    def can_generate(self) -> bool:
        """True, as transformers' pipelines ask."""
        return True

    def eval(self) -> CompiledVLM:
        """This model, which is always in this mode."""
        return self

    @property
    def input_modalities(self) -> Any:
        """What the transformers model takes: text, pictures, ..."""
        return self.machine.host.input_modalities

    @property
    def output_modalities(self) -> Any:
        """What it gives: text."""
        return self.machine.host.output_modalities

    def __repr__(self) -> str:
        """What was compiled, how, and what it cost, by line."""
        return as_text(summary(self.program, self.weight_bytes()))

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        return as_html(summary(self.program, self.weight_bytes()))

    def kept_tokens(self, **inputs: Any) -> dict[int, torch.Tensor]:
        """The tokens of the prompt that are kept after each cut.

        Args:
            inputs: model inputs of `generate`, without generation settings.
        Returns:
            layer -> i64[B, N], positions in the prompt, ascending; -1 in slots without a token. Where what
            cross-attention reads is cut, -1 -> the numbers of its rows that are kept.
        """
        return self.machine.kept_tokens(inputs)

    def graph_text(self, stage: str) -> str:
        """The printed graph of one component: "vision", "projector", "prefill", "decode" or "head"."""
        graphs = self.program.graphs
        if stage not in graphs:
            raise ExportError(f"this model has no graph called {stage!r}", do=f"name one of {', '.join(graphs)}")
        return graph_text(graphs[stage])

    def weight_bytes(self, stage: str | None = None) -> int:
        """Bytes of all weights, each counted once; or of the weights that one graph reads."""
        return total_bytes(stored_tensors(self.program), stage)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the artifact folder, which `qpcompile.load` reads. An existing folder is refused."""
        artifact.save(self.program, self.processor, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a model compiled by qpcompile",
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the artifact to the Hugging Face hub as one commit; `qpcompile.load(repo_id)` gives it back.

        The repository is created if there is none. Files of an artifact that it holds are replaced, and one that holds
        anything else is refused.

        Args:
            repo_id: `organization/name`.
            private: of a new repository; None: the organization's default.
            revision: a branch, by default the main one.
            token: by default the one that `hf auth login` has stored.
        Returns:
            The address of the commit.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "artifact"
            self.save_pretrained(folder)
            return uploaded(folder, repo_id, message=commit_message, private=private, revision=revision, token=token)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Any) -> CompiledVLM:
        """`qpcompile.load` as transformers' auto classes call it, after `qpcompile.register_with_transformers()`.

        Args:
            source: a folder, or a name on the hub.
            options: revision, token, cache_dir, local_files_only, force_download; device_map, the name of one device;
                dtype, that of the model. Any other that asks for something is refused.
        """
        hub = {name: options.pop(name) for name in HUB_OPTIONS if options.get(name) not in (None, False)}
        device, dtype, config = (options.pop(name, None) for name in ("device_map", "dtype", "config"))
        folder = _located(source, hub)
        asked = {name for name, value in options.items() if name not in PASSED and value not in (None, False)}
        asked |= changed_settings(config, folder)
        if not (device is None or isinstance(device, str | int | torch.device)) or device == "auto":
            asked.add(f"device_map={device!r}")
        if asked:
            raise InputError(
                f"a compiled model is loaded as it was saved: {', '.join(sorted(asked))} cannot be honoured",
                where="from_pretrained",
                do="give the folder or name, options of the hub, and device_map as the name of one device",
            )
        compiled = load(folder)
        if dtype not in (None, "auto", compiled.dtype, str(compiled.dtype).removeprefix("torch.")):
            raise InputError(
                f"the model was compiled in {compiled.dtype}, not {dtype}", where="dtype", do="leave dtype out"
            )
        return compiled if device is None else compiled.to(device)

    def export_onnx(
        self,
        folder: str | PathLike[str],
        check: Iterable[dict[str, Any]] = (),
        fast: bool = False,
        target: str | None = None,
    ) -> None:
        """Write graphs for onnxruntime together with a runner. Needs the extra `onnx`.

        The folder answers questions about pictures by itself, with onnxruntime, numpy, pillow and tokenizers; where the
        processor is none that its runner can stand in for, a warning says why and it takes token ids.

        Args:
            folder: a folder that does not exist yet.
            check: inputs of `generate` that both sides answer; `check.json` then records how many answers are alike,
                and where the others differ. A family whose tower cannot be written for all sizes of pictures gets a
                vision graph for each size among the prompts with one picture.
            fast: use onnxruntime's own operators, several times as fast but with different numerics: activations and
                cache have 8 bits; see `manifest.json` and docs/numerics.md.
            target: onnxruntime, web, genai, openvino or tensorrt: chooses `fast`; warnings and `check.json` say what
                the folder has that this runtime lacks.
        """
        try:
            # Imported here because onnx is an optional dependency.
            from qpcompile.emit.onnx.export import export_onnx
        except ModuleNotFoundError as error:
            raise ExportError(
                f"the package {error.name} is not installed",
                where="export_onnx",
                do='install the extra: pip install "qpcompile[onnx]"',
            ) from error
        try:
            export_onnx(self.program, folder, check, fast, self.generate, self.processor, target)
        except DEFECTS as error:
            raise ExportError(
                f"the graphs cannot be written as ONNX: {type(error).__name__}: {error}",
                where=type(self.program.host).__name__,
                do="use the compiled module, and report this family",
            ) from error

    def export_compressed_tensors(self, folder: str | PathLike[str], check: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of the format compressed-tensors: transformers, vLLM and SGLang read it.

        For recipes with 4- or 8-bit weights and inputs of 8 or 16 bits, without cuts, changes of basis and a quantized
        cache; any other is refused with the nearest that the format holds (docs/ecosystem.md).

        Args:
            folder: a folder that does not exist yet.
            check: model inputs on which the written weights are compared with this model; by default a white picture
                and a short question, which needs the processor.
        """
        inputs = blank_sample(self.machine.host, self.processor) if check is None else check
        export_compressed_tensors(self.program, self.processor, folder, inputs, self._next_logits)

    def _next_logits(self, **inputs: Any) -> torch.Tensor:
        logits = self(**inputs).logits
        assert logits is not None
        return logits.cpu()

    def report(
        self,
        path: str | PathLike[str],
        samples: Any = None,
        *,
        data: str | PathLike[str] | None = None,
        limit: int | None = None,
        original: Any = None,
    ) -> None:
        """Write the report, one self-contained HTML file: a verdict first, then what it rests on.

        Args:
            path: a file that does not exist yet.
            samples: (picture, question) pairs whose kept tokens are drawn; a picture is a path or a PIL image.
            data: a folder of questions with right answers, which calibration did not see. They are asked one by one;
                accuracy, time and memory are then on the page.
            limit: ask only the first ones; None: all.
            original: the transformers model that this one was compiled from. It answers the questions of `data` in
                turns with this one.
        """
        # Imported here because generation needs neither templates nor figures.
        from qpcompile.inspect.report import write_report
        from qpcompile.inspect.side_by_side import side_by_side

        if original is not None and data is None:
            raise InputError("there are no questions to ask the original", where="report", do="pass data=..., a folder")
        questions = None if data is None else read_questions(Path(data))[:limit]
        measure = None if questions is None else lambda: side_by_side(self.machine, original, self.processor, questions)
        write_report(self.machine, self.processor, path, samples, self.decode_problem, measure)


def load(source: str | PathLike[str], **options: Any) -> CompiledVLM:
    """Load a compiled model; no code in its folder is executed.

    Args:
        source: the folder, or a name on the Hugging Face hub (`organization/name`) where no folder has that name.
        options: for the hub: revision, token, cache_dir, local_files_only, force_download.

    Raises ArtifactError for a folder that is incomplete, modified, of another version, inconsistent, or contains
    anything that no compile writes, and for a name that the hub does not give.
    """
    tell_newer()
    if unknown := sorted(set(options) - set(HUB_OPTIONS)):
        raise InputError(
            f"load has no argument {unknown[0]}", where="qpcompile.load", do=f"it takes {', '.join(HUB_OPTIONS)}"
        )
    folder = _located(source, options)
    refuse_onnx_folder(folder)
    program, processor = artifact.load(folder)
    with reading("the artifact", folder):
        return CompiledVLM(program, processor)


def _located(source: str | PathLike[str], options: dict[str, Any]) -> Path:
    return downloaded(str(source), **options) if is_hub_name(source) else Path(source)


def register_with_transformers() -> None:
    """Let `AutoModelForImageTextToText.from_pretrained` load compiled models; it returns a CompiledVLM.

    Nothing is registered by an import. A second call changes nothing.
    """
    register_config()
    # Its annotation asks for transformers' own base class; what it calls is `from_pretrained`.
    AutoModelForImageTextToText.register(CompiledConfig, CompiledVLM, exist_ok=True)  # type: ignore[arg-type]


def _unpickled(files: dict[str, bytes], device: str, cuda_graphs: bool) -> CompiledVLM:
    compiled = CompiledVLM(*from_files(files))
    return compiled if str(compiled.device) == device else compiled.to(device, cuda_graphs)
