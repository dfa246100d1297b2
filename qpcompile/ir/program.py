"""The intermediate representation that passes transform: the graphs of one model, their weights, plan and stage.

Program
  graphs["vision"]     pictures            -> patch features
  graphs["projector"]  patch features      -> visual tokens          (absent if the tower includes it)
  graphs["prefill"]    embeddings          -> hidden states, K and V
  graphs["decode"]     one token + K and V -> hidden states, K and V
  graphs["head"]       hidden states       -> logits
  graphs["embed"]      tokens              -> embeddings             (only if tied to a quantized head)
  graphs["vision.1"]   like "vision", of another set of values       (runtime/fixed_values.py)
  host                 transformers' code between the graphs: it holds no weight that a graph holds
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qpcompile.ir.checkpoint import Checkpoint
from qpcompile.ir.mapped_tensors import Offload
from qpcompile.ir.measurements import Measurements
from qpcompile.ir.names import Name
from qpcompile.ir.structure import Template
from qpcompile.ranks import Ranks
from qpcompile.recipe.plan import Layer, Plan
from qpcompile.recipe.recipe import Recipe
from qpcompile.stages import Stage

VISION, PROJECTOR, PREFILL, DECODE, HEAD, EMBED = "vision", "projector", "prefill", "decode", "head", "embed"


def component_of(name: str) -> str:
    """The component of a graph: "vision" of `vision`, and of `vision.1`, its graph of other values."""
    return name.partition(".")[0]


@dataclass
class Graph:
    """One traced component: a plain FX module from tensors, in the order of `inputs`, to tensors.

    `inputs` and `outputs` are dotted paths into the keyword arguments and the result of the transformers
    module (`attention_mask`, `past_key_values.3.key`, `hidden_states.2`). `owner` is the dotted name of that module in
    the model. `returns` is the template from which the module's result is rebuilt.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]
    owner: str
    returns: Template = "object"
    constants: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    def placeholder(self, path: str) -> fx.Node:
        """The placeholder node of the input called `path`."""
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        return placeholders[self.inputs.index(path)]

    def result(self, path: str) -> fx.Node:
        """The node returned as the output called `path`."""
        (values,) = self.output_node.args
        assert isinstance(values, tuple)
        node = values[self.outputs.index(path)]
        assert isinstance(node, fx.Node)
        return node

    @property
    def output_node(self) -> fx.Node:
        return next(node for node in reversed(self.module.graph.nodes) if node.op == "output")

    def __call__(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run on tensors named by input path; returns tensors named by output path."""
        return dict(zip(self.outputs, self.module(*[feeds[name] for name in self.inputs]), strict=True))


@dataclass
class Program:
    """All graphs of one model at one compilation stage."""

    graphs: dict[str, Graph]
    host: torch.nn.Module
    layers: tuple[Layer, ...]
    recipe: Recipe
    plan: Plan
    stage: Stage = "captured"
    measured: Measurements = field(default_factory=Measurements)
    history: list[str] = field(default_factory=list[str])
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    # Where passes put the large tensors that they make; by default in memory.
    offload: Offload = field(default_factory=Offload)
    # Where passes compute (runtime/placement.py); None: where the tensors are.
    device: torch.device | None = None
    # The processes that share this compile; each has its own copy of the program.
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def language(self) -> list[Graph]:
        """The graphs of the decoder, in execution order."""
        return [self.graphs[PREFILL], self.graphs[DECODE]]
