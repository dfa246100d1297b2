"""Bits per site and centred keys on a text decoder, simulated: perplexity and divergence of each setting.

    python tests/bench/decoder_bits.py FOLDER [--passages 28]

FOLDER: a causal language model as transformers saves it, of the Llama kind (q, k, v, o, gate, up and down projections).
Text is the language reference that ships with Python, in passages of 96 tokens; every second one calibrates, the others
are measured. Inputs of linears are rotated by Hadamard matrices and rounded per token with searched clips, weights are
solved by GPTQ per channel, keys and values are rotated and rounded to 4 bits per token and head after the rotary
embedding. The head is left out. docs/results/site_bits.md has the numbers of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qpcompile.calibration.statistics import InputStatistics
from qpcompile.kernels.hadamard.reference import factors, hadamard_matrix
from qpcompile.kernels.kv_read.reference import kv_read
from qpcompile.kernels.kv_write.reference import kv_write
from qpcompile.quantization.bit_budget import HIGH, LOW, Site, raised
from qpcompile.quantization.fake_quant import round_trip
from qpcompile.quantization.loss_sensitivity import LossSensitivity
from qpcompile.quantization.rounding_error import RATIOS, Reader, input_cost, readers, rounding_errors, weight_cost
from qpcompile.quantization.solve import solve
from qpcompile.recipe.quantize import ActivationScheme, WeightScheme

LENGTH, BATCH, PROMPTS = 96, 7, 12
WEIGHTS, INPUTS = WeightScheme(), ActivationScheme(clip_search=True)
Bits = Callable[[str], int]


def passages(tokenizer: Any, count: int) -> Tensor:
    """i64[count, LENGTH] of the language reference, each beginning with the first special token."""
    topics = pydoc_data.topics.topics
    ids = tokenizer(" ".join(topics[key] for key in sorted(topics)), return_tensors="pt").input_ids[0]
    starts = sorted(random.Random(0).sample(range(0, len(ids) - LENGTH, LENGTH), count))
    first = torch.tensor([tokenizer.bos_token_id or 1])
    return torch.stack([torch.cat([first, ids[start : start + LENGTH - 1]]) for start in starts])


class Bench:
    """A decoder with its calibration: statistics, sensitivity and mean keys."""

    def __init__(self, model: Any, known: Tensor, unseen: Tensor) -> None:
        self.model, self.known, self.unseen = model, known, unseen
        self.cache: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.groups = dict(_groups(model))
        self.turns = {linear.in_features: _turn(linear.in_features) for _, linear in self._linears()}
        self.full = {name: linear.weight.detach().clone() for name, linear in self._linears()}
        self.turned = {name: weight @ self.turns[weight.shape[1]].T for name, weight in self.full.items()}
        self.solved: dict[tuple[str, int], Tensor] = {}
        self.statistics = self._statistics()
        self.sensitivity = self._sensitivity()
        self.expected = self.logits()

    def _linears(self) -> Iterator[tuple[str, nn.Linear]]:
        for group, linears in self.groups.items():
            yield from ((f"{group}/{place}", linear) for place, linear in enumerate(linears))

    @contextmanager
    def hooks(self, made: Callable[[str, nn.Linear], Any], every: bool = True) -> Iterator[None]:
        """Hooks on linears, or on the first of each group."""
        held = [made(name, linear) for name, linear in self._linears() if every or name.endswith("/0")]
        try:
            yield
        finally:
            for hook in held:
                hook.remove()

    def _statistics(self) -> dict[str, InputStatistics]:
        found: dict[str, InputStatistics] = {}

        def add(name: str, linear: nn.Linear) -> Any:
            group, size = name.partition("/")[0], linear.in_features
            found[group] = InputStatistics.empty(size, moments=True)

            def look(_: Any, args: tuple[Tensor]) -> None:
                x = args[0] @ self.turns[size].T
                found[group].add(x, keep=74, visual=torch.zeros(x.shape[:-1], dtype=torch.bool))

            return linear.register_forward_pre_hook(look)

        with self.hooks(add, every=False):
            for batch in self.known.split(4):
                self.model(batch)
        return found

    def _sensitivity(self) -> LossSensitivity:
        """As loss_sensitivity.py, for the next token at every place instead of an answer's first one."""
        sums = {name: 0.0 for name, _ in self._linears()}

        def note(name: str, linear: nn.Linear) -> Any:
            def hold(_: Any, __: Any, y: Tensor) -> None:
                y.register_hook(lambda gradient: add(gradient))

            def add(gradient: Tensor) -> None:
                sums[name] += float(gradient.double().square().sum() / gradient.shape[-1]) / 2

            return linear.register_forward_hook(hold)

        drawn = torch.Generator().manual_seed(0)
        batches = self.known[:PROMPTS].split(4)
        with self.hooks(note), torch.enable_grad():
            for batch in batches:
                embedded = self.model.get_input_embeddings()(batch).detach().requires_grad_()
                logits = self.model(inputs_embeds=embedded).logits
                shares = logits.detach().softmax(-1)
                root = shares.sqrt() * torch.randn(shares.shape, generator=drawn)
                logits.backward(root - shares * root.sum(-1, keepdim=True))
        tokens = self.known[:PROMPTS].numel()
        return LossSensitivity({name: (0.0, total / tokens) for name, total in sums.items()})

    def sites(self, cost: Callable[[InputStatistics, list[Reader], int], float]) -> list[Site]:
        """Every group with its costs."""
        made = []
        for group, linears in self.groups.items():
            weights = {f"{group}/{place}": self.turned[f"{group}/{place}"] for place in range(len(linears))}
            found = readers(self.statistics[group], weights, self.sensitivity)
            low, high = (cost(self.statistics[group], found, bits) for bits in (LOW, HIGH))
            made.append(Site(group, sum(weight.numel() for weight in weights.values()), low, high))
        return made

    def set_weights(self, bits: Bits) -> None:
        """Weights rounded to the bits of their group; 16: as they were."""
        for name, linear in self._linears():
            group, size = name.partition("/")[0], linear.in_features
            chosen = bits(group)
            if chosen != 16 and (name, chosen) not in self.solved:
                scheme = WEIGHTS.model_copy(update={"bits": chosen})
                codes, scale = solve(self.turned[name], self.statistics[group].moments, scheme)
                self.solved[name, chosen] = (codes.float() * scale) @ self.turns[size]
            linear.weight.data = self.full[name] if chosen == 16 else self.solved[name, chosen]

    def rounded_inputs(self, bits: Bits) -> Any:
        """Hooks that round the inputs of linears."""

        def made(name: str, linear: nn.Linear) -> Any:
            group, size = name.partition("/")[0], linear.in_features
            chosen = bits(group)
            if chosen == 16:
                return linear.register_forward_pre_hook(lambda *_: None)
            weights = torch.cat([self.turned[f"{group}/{place}"] for place in range(len(self.groups[group]))])
            scheme = INPUTS.model_copy(update={"bits": chosen})
            costs = rounding_errors(self.statistics[group], weights, scheme, RATIOS)
            clip = RATIOS[costs.index(min(costs))]
            turn = self.turns[size]
            return linear.register_forward_pre_hook(
                lambda _, args: (round_trip(args[0] @ turn.T, 0, clip, chosen) @ turn,)
            )

        return self.hooks(made)

    def logits(self) -> Tensor:
        """Log-probabilities on the unseen passages."""
        return torch.cat([self.model(batch).logits.log_softmax(-1) for batch in self.unseen.split(BATCH)])

    def tell(self, name: str, weights: Bits, inputs: Bits) -> None:
        """Measure one setting and print it."""
        self.set_weights(weights)
        with self.rounded_inputs(inputs):
            found = self.logits()
        loss = -found[:, :-1].gather(-1, self.unseen[:, 1:, None]).mean()
        same = (found.argmax(-1) == self.expected.argmax(-1)).float().mean()
        divergence = (self.expected.exp() * (self.expected - found)).sum(-1).mean()
        print(f"| {name} | {loss.exp():.2f} | {same:.3f} | {divergence:.4f} |", flush=True)


def _groups(model: Any) -> Iterator[tuple[str, list[nn.Linear]]]:
    for place, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"{place}.qkv", [attention.q_proj, attention.k_proj, attention.v_proj]
        yield f"{place}.o", [attention.o_proj]
        yield f"{place}.gate_up", [mlp.gate_proj, mlp.up_proj]
        yield f"{place}.down", [mlp.down_proj]


def _turn(size: int) -> Tensor:
    left, right = factors(size)
    return torch.kron(left, right).float()


def key_centers(bench: Bench, turn: Tensor) -> list[Tensor]:
    """The constant of each layer: the mean key, moved so that the key of the first token is on the grid."""
    held: dict[int, list[Tensor]] = {}

    def collect(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        held.setdefault(layer, []).append(keys @ turn)
        return keys, values

    bench.cache = collect
    for batch in bench.known.split(BATCH):
        bench.model(batch)
    bench.cache = None
    centers = []
    for layer in sorted(held):
        keys = torch.cat(held[layer])
        mean, sink = keys[:, :, 1:].mean((0, 2), keepdim=True), keys[:1, :, :1]
        centers.append(sink - _round_trip(sink - mean))
    return centers


def _round_trip(x: Tensor) -> Tensor:
    return kv_read(*kv_write(x, 4), x.shape[-1], 4, x.dtype)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--passages", type=int, default=28, help="passages to measure on, and as many to calibrate")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    bench: Bench | None = None

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if bench is not None and bench.cache is not None:
            key, value = bench.cache(module.layer_idx, key, value)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("rounded_cache", attention)
    model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=torch.float32, attn_implementation="rounded_cache")
    text = passages(AutoTokenizer.from_pretrained(asked.folder), 2 * asked.passages)
    bench = Bench(model.eval(), text[::2], text[1::2])
    turn = hadamard_matrix(model.config.head_dim).float().T
    centers = key_centers(bench, turn)
    caches: dict[str, Any] = {
        "": None,
        "KV4": lambda layer, k, v: (_round_trip(k @ turn) @ turn.T, _round_trip(v @ turn) @ turn.T),
        "KV4 centred": lambda layer, k, v: (
            (_round_trip(k @ turn - centers[layer]) + centers[layer]) @ turn.T,
            _round_trip(v @ turn) @ turn.T,
        ),
    }
    costs = {
        "weights": lambda found, linears, bits: weight_cost(found, linears, WEIGHTS.model_copy(update={"bits": bits})),
        "inputs": lambda found, linears, bits: input_cost(found, linears, INPUTS.model_copy(update={"bits": bits})),
    }
    sites = {part: bench.sites(cost) for part, cost in costs.items()}

    def mean(part: str, bits: float) -> Bits:
        chosen = raised(sites[part], bits)
        return lambda group: HIGH if group in chosen else LOW

    print("| setting | perplexity | equal likeliest tokens | KL |\n| --- | ---: | ---: | ---: |")
    none: Bits = lambda group: 16  # noqa: E731
    ladder: list[tuple[str, Bits, Bits, str]] = [("full precision", none, none, "")]
    ladder += [("cache alone", none, none, cache) for cache in ("KV4", "KV4 centred")]
    for inputs in (8.0, 6.0, 5.0, 4.0):
        ladder.append((f"A{inputs:g}", none, mean("inputs", inputs), ""))
    for weights in (8.0, 6.0, 5.0, 4.5, 4.0):
        ladder.append((f"W{weights:g}", mean("weights", weights), none, ""))
        ladder.append((f"W{weights:g}A8", mean("weights", weights), mean("inputs", 8), "KV4 centred"))
    for weights, inputs in ((5.0, 6.0), (4.5, 5.0), (4.0, 4.0)):
        name, settings = f"W{weights:g}A{inputs:g}", (mean("weights", weights), mean("inputs", inputs))
        ladder += [(name, *settings, cache) for cache in ("KV4", "KV4 centred")]
    for name, of_weights, of_inputs, cache in ladder:
        bench.cache = caches[cache]
        bench.tell(f"{name} {cache}".strip(), of_weights, of_inputs)


if __name__ == "__main__":
    main()
