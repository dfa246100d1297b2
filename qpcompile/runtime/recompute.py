"""Self-check at the end of every compile: decoding with the cache must match recomputation without it.

One sample is answered greedily, token by token, like a user's request. Then the prompt and those tokens run through the
prefill graph at once, without a cache: the cuts are forced to the tokens kept for the answer (`kept.l` of its cache),
every token at its original position. Step t of the answer and row t of the recomputation must agree.

    answer       prefill(prompt) -> y0    decode(t0, cache) -> y1    decode(t1, cache) -> y2   ...
    recomputed   prefill(prompt + t0 + t1 + ..., kept tokens forced) -> y0, y1, y2, ...

What is exact and what is not. The same values are computed, but a matrix product over many rows uses a different
summation order than one over a single row. In float32 that affects the last bits. With intermediate rounding (bfloat16,
4-bit activations or caches) a last bit can flip a code, and its quantization step shows in the logits. So logits are
compared by their distance relative to their spread, `|y - z| / |z - mean(z)|`:

- no intermediate rounding: each step within `EXACT`;
- half precision: the mean over the steps within `LAST_BIT` times the change of the recomputation when every embedding
is perturbed by one last bit, which measures the effect of rounding in this model. Tiny random models of
  several families: 0.001 to 0.005 apart, 0.006 to 0.01 moved;
- quantized activations or caches: the mean within `ROUNDED`, or as in half precision where last bits move a model
  further, but within `UNRELATED`. There one last bit flips a code, which then propagates: the same tiny models move by
  0.15 to 0.2, though most of them are 0 apart; a real decoder of 30 layers is 0.1 apart, and moves by as much. So the
  first layer's cache entries of the new tokens are compared too, before differences have grown: within `STORED`, codes
  by the share that differs;
- the greedy tokens are equal, unless the recomputed logits of the two are closer than the allowed distance: then either
of them is valid.

The tests inject an ignored cache, a missing token and a shifted position, and each is detected.

Which inputs of the longer prompt are taken from the answer is in runtime/recorded_answer.py; values that the host
counts are derived again, so that wrong counts are detected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from qpcompile.errors import InputError, InvariantError
from qpcompile.ir.attention import read_attention
from qpcompile.ir.edit import aten, calls, layer_of
from qpcompile.ir.names import Name
from qpcompile.ir.operators import ATTENTION_KV, SELECT_TOKENS
from qpcompile.ir.program import HEAD, PREFILL, Graph, Program
from qpcompile.ir.structure import CACHE_ARGUMENT
from qpcompile.ir.types import value_types
from qpcompile.runtime.generation_options import plain_settings
from qpcompile.runtime.kv_cache import CompiledCache
from qpcompile.runtime.machine import Machine
from qpcompile.runtime.model_inputs import DECODER_IDS, with_prompt
from qpcompile.runtime.prepare import EMBEDDINGS, MASK
from qpcompile.runtime.recorded_answer import RecordedAnswer, Tensors, hidden_path, of_tokens

# Number of tokens decoded with the cache.
STEPS = 4
EXACT, LAST_BIT, ROUNDED = 1e-2, 4.0, 0.25
# Logits that have nothing to do with each other are the root of 2 apart.
UNRELATED = 1.0
# An off-by-one position changes keys of 128 channels by 0.2; last bits flip only a few 4-bit codes in 1,000.
STORED = 0.1
SDPA = aten.scaled_dot_product_attention.default
TOPK = aten.topk.default


def check_answers(program: Program, machine: Machine, samples: Iterable[dict[str, Any]]) -> None:
    """`check_decode` on the first sample. Among codes a last bit may flip one, which moves an answer far by chance: if
    the two samples after it agree, the first is taken for that. A defect of the graphs shows in every answer.

    Raises InvariantError of the first sample.
    """
    rest = iter(samples)
    try:
        check_decode(program, machine, next(rest))
    except InvariantError as defect:
        others = list(islice(rest, 2))
        if not _codes(program) or len(others) < 2:
            raise
        for sample in others:
            try:
                check_decode(program, machine, sample)
            except InvariantError:
                raise defect from None


def check_decode(program: Program, machine: Machine, sample: dict[str, Any]) -> None:
    """Answer `sample` with and without the cache, on the machine that users will get.

    sample: inputs of `generate`; only the first row with the least padding is compared: some families count the
    positions of an answer from the padded prompt.
    Raises InvariantError if the two disagree: the compiled model must not be used.
    """
    answer, sample = _Answer(program, machine), with_prompt(program.host, sample)
    try:
        answer.ask(sample)
        prompt = answer.recorded.feeds[0][EMBEDDINGS].shape[1]  # families may leave tokens out of what was given
        if answer.cache.seen != prompt + STEPS:
            raise _defect(program, f"the cache holds {answer.cache.seen} tokens of {prompt + STEPS}", STEPS)
        stepwise = answer.stepwise()
        answer.recompute(sample)
        whole, moved = (answer.head(hidden).float() for hidden in (answer.again, answer.moved))
        stored = list(answer.stored())
    except (InputError, ValueError, IndexError, RuntimeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _defect(program, f"{type(error).__name__}: {reason}", len(answer.logits)) from error
    rounded = _half(program) or _codes(program) or _chooses(program)
    _compare(program, stepwise.float(), whole, rounded, _allowed(program, whole, moved))
    allowed = STORED if _half(program) or _codes(program) else EXACT
    for path, found, expected in stored:
        far = _apart(found, expected)
        if not far <= allowed:
            what = f"what the first layer stored of new tokens, {path}, is {far:.2g} off, {allowed:g} allowed"
            raise _defect(program, what, STEPS)


def _half(program: Program) -> bool:
    return program.host.dtype != torch.float32


def _codes(program: Program) -> bool:
    """Whether values are quantized between a token's input and its logits."""
    scheme = program.recipe.quantize
    return scheme is not None and (scheme.activations.bits < 16 or scheme.kv_cache.bits < 16)


def _chooses(program: Program) -> bool:
    """Whether layers attend to the best tokens only. Of equal scores, and rectified ones often are, the choice depends
    on their number: transformers' own answers with a cache and without are as far apart.
    """
    prefill = program.graphs[PREFILL]
    kinds = value_types(prefill)
    ranked = [kinds[node.all_input_nodes[0]].sizes for node in calls(prefill, TOPK)]
    return any(sizes and sizes[-1].fixed is None for sizes in ranked)


def _allowed(program: Program, whole: Tensor, moved: Tensor) -> float:
    """The tolerated distance of logits; whole, moved: f32[T, V], recomputed from original and from perturbed inputs."""
    least, most = (ROUNDED, UNRELATED) if _codes(program) else (EXACT, ROUNDED)
    least = ROUNDED if _chooses(program) else least
    return min(max(least, LAST_BIT * float(_distances(moved, whole).mean())), most)


def _distances(found: Tensor, expected: Tensor) -> Tensor:
    """f32[T]: the distance of two f32[T, V] relative to the spread of the second; infinite where not finite."""
    distance = _norm(found - expected, 1) / _spread(expected)
    return torch.where(distance.isfinite(), distance, torch.inf)


def _spread(logits: Tensor) -> Tensor:
    return _norm(logits - logits.mean(dim=1, keepdim=True), 1).clamp(min=1e-30)


def _norm(values: Any, axis: int | None = None) -> Tensor:
    """The norm of a tensor along an axis or in all; torch's method has no type."""
    return values.norm(dim=axis)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two cache tensors: the share of codes that differ, or a relative norm."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.is_floating_point():
        return float((found != expected).float().mean())
    return float(_norm((found - expected).double()) / _norm(expected.double()).clamp(min=1e-30))


def _compare(program: Program, found: Tensor, expected: Tensor, rounded: bool, allowed: float) -> None:
    """found, expected: f32[T, V], logits with the cache and without. rounded: compare the mean over the steps."""
    spread, distance = _spread(expected), _distances(found, expected)
    step = int(distance.argmax())
    far = distance.mean() if rounded else distance.max()
    if far > allowed:
        raise _defect(program, f"logits are {float(distance[step]):.2g} of their spread off, {allowed:g} allowed", step)
    own, other = found.argmax(dim=1, keepdim=True), expected.argmax(dim=1, keepdim=True)
    gap = (expected.gather(1, other) - expected.gather(1, own))[:, 0]
    # Two logits, each off by the error of a single one at the largest tolerated distance, times three.
    margin = 6 * allowed * spread / expected.shape[1] ** 0.5
    for step in (gap > margin).nonzero()[:, 0].tolist():
        raise _defect(program, f"the greedy token is {int(own[step])}, recomputed {int(other[step])}", step)


def _defect(program: Program, what: str, step: int) -> InvariantError:
    return InvariantError(
        f"decoding with the cache is not recomputing on the kept tokens: {what}",
        where=f"token {step} of an answer to the first sample",
        ran=program.history[-1] if program.history else "capture",
        before=program.history[:-1],
        do="do not use this model: report it with the output of `qpcompile doctor`, which says whether the versions of "
        "torch and transformers are tested ones",
    )


class _Answer:
    """One answer, step by step, and its recomputation.

    again: head inputs of prompt and answer recomputed at once; moved: from perturbed embeddings. whole: the cache of
    the recomputation.
    """

    def __init__(self, program: Program, machine: Machine) -> None:
        self.program, self.machine = program, machine
        self.recorded = RecordedAnswer(machine)
        self.cache = CompiledCache(0)
        self.again = self.moved = torch.empty(0)
        self.row = 0
        self.whole: dict[Name, Tensor] = {}

    @property
    def logits(self) -> list[Tensor]:
        """Of each step; none where the head does not read the decoder's output, which is compared then."""
        return self.recorded.logits if self.recorded.reads_hidden else []

    def ask(self, sample: dict[str, Any]) -> None:
        """Decode STEPS tokens after the first one."""
        settings = plain_settings(self.program.host)
        settings |= {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1}
        self.cache, self.row = CompiledCache(len(self.program.layers)), _fullest(sample)
        with self.recorded.recording():
            self.machine.generate(**{**sample, **settings, CACHE_ARGUMENT: self.cache})

    def stepwise(self) -> Tensor:
        """Logits of each step, f[T, V]; hidden states if the program has no head."""
        return torch.cat([step[self.row, -1:] for step in self.logits or self.recorded.hidden])

    def recompute(self, sample: dict[str, Any]) -> None:
        """Compute the longer prompt at once."""
        self.recorded.run_whole(sample, self._forced)

    def stored(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, decoded, recomputed) of the first layer's cache for the compared row's new tokens: [1, H, T, ...]."""
        first, row = min(path.layer for path in self.whole), slice(self.row, self.row + 1)
        for path, tensor in self.whole.items():
            if path.layer == first:
                yield path, self.cache.tensors[path][row, :, -STEPS:], tensor[row, :, -STEPS:]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the answer's steps, f[T, V], from the head's input."""
        rows = hidden[:, -len(self.recorded.feeds) :]
        head = self.program.graphs.get(HEAD)
        if head is None or not self.logits:
            return rows[self.row]
        with torch.no_grad():
            return head({head.inputs[0]: rows})[head.outputs[0]][self.row]

    def _forced(self, graph: Graph, whole: Tensors) -> None:
        results = self._run(graph, whole)
        self.again = self.moved = results[hidden_path(graph)]
        self.whole = {path: results[path] for path in graph.outputs if path.in_cache}
        if _half(self.program) or _codes(self.program):
            moved = {path: _last_bits(each) if of_tokens(each) else each for path, each in whole.items()}
            self.moved = self._run(graph, moved)[hidden_path(graph)]

    def _run(self, graph: Graph, feeds: Tensors) -> Tensors:
        with torch.no_grad():
            results = _Whole(self.program, graph, self.cache, len(self.recorded.feeds) - 1).run(*feeds.values())
        return dict(zip(graph.outputs, results, strict=True))


def _fullest(sample: dict[str, Any]) -> int:
    """The first row of a prompt, i64[B, S], with the least padding."""
    mask = sample.get(MASK)
    return int(mask.sum(dim=1).argmax()) if isinstance(mask, Tensor) and DECODER_IDS not in sample else 0


def _last_bits(values: Tensor) -> Tensor:
    """Every value with its last bit changed, up or down by a fixed random draw."""
    signs = torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(0)).to(values.device) * 2 - 1
    return (values.double() * (1 + signs * (torch.finfo(values.dtype).eps / 2))).to(values.dtype)


class _Whole(fx.Interpreter):
    """The prefill graph on the prompt and `new` decoded tokens, with cuts forced to the tokens in the cache."""

    def __init__(self, program: Program, graph: Graph, cache: CompiledCache, new: int) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self.new, self.cache = new, cache
        self.forced: dict[fx.Node, Any] = {}
        host: Any = program.host
        before = torch.arange(cache.seen, device=host.device)[None]
        pairs = [cache.states] if cache.states else [(cache.kept[cut], cache.alive[cut]) for cut in sorted(cache.kept)]
        for node, (kept, alive) in zip(calls(graph, SELECT_TOKENS), pairs, strict=True):
            # States are numbered as they are; of tokens, the places among those that earlier cuts kept are wanted.
            index = kept if cache.states else torch.searchsorted(before.expand(len(kept), -1).contiguous(), kept)
            self.forced[node] = index, alive
            if isinstance(count := node.args[1], fx.Node):
                self.forced[count] = kept.shape[1]
            before = kept
        compacts = program.recipe.tokens.compact_scored_layer
        self.compacted = {layer: kept for layer, kept in cache.kept.items() if compacts and layer >= 0}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or return a forced value; new tokens of a scored layer see, and rank, what its cache holds."""
        if n in self.forced:
            return self.forced[n]
        layer = layer_of(n) if n.target in (SDPA, ATTENTION_KV, TOPK) else None
        if layer not in self.compacted:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target == TOPK:
            return TOPK(self._ranked(args[0], layer), *args[1:], **kwargs)
        if n.target == ATTENTION_KV:
            args = (*args[:5], self._narrowed(args[5], args[0], args[1], layer, False), *args[6:])
            return n.target(*args, **kwargs)  # type: ignore[operator]
        read = read_attention(n)
        query, key, held = (self.env[node] for node in (read.query, read.key, read.value))
        mask = self._narrowed(None if read.mask is None else self.env[read.mask], query, key, layer, read.causal)
        options = {name: value for name, value in kwargs.items() if name in ("scale", "enable_gqa")}
        return SDPA(query, key, held, mask, 0.0, False, **options)

    def _narrowed(self, mask: Tensor | None, query: Tensor, key: Tensor, layer: int, causal: bool) -> Tensor:
        """The mask of a scored layer in which new tokens see kept tokens only: [B, 1 | H, S, S]."""
        total, kept = key.shape[2], self.compacted[layer]
        here = self._here(layer, total)
        if mask is None:
            mask = torch.ones(total, total, dtype=torch.bool, device=query.device)
            mask = (mask.tril() if causal else mask)[None, None]
        mask = mask.expand(max(len(mask), len(kept)), -1, -1, -1).clone()
        closed = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask[:, :, -self.new :] = mask[:, :, -self.new :].masked_fill(~here[:, None, None], closed)
        return mask

    def _ranked(self, scores: Tensor, layer: int) -> Tensor:
        """The scores by which a scored layer chooses tokens, f[B, ..., S, S]: new tokens choose among kept ones."""
        if scores.ndim < 3 or scores.shape[-2] != scores.shape[-1]:
            return scores
        here = self._here(layer, scores.shape[-1])
        dropped = ~here.view(len(here), *[1] * (scores.ndim - 2), -1)
        new = scores[..., -self.new :, :].masked_fill(dropped, float("-inf"))
        return torch.cat([scores[..., : -self.new, :], new], dim=-2)

    def _here(self, layer: int, total: int) -> Tensor:
        """Which of a scored layer's tokens its cache holds, bool[B, S]."""
        kept = self.compacted[layer]
        here = torch.zeros(len(kept), total, dtype=torch.bool, device=kept.device)
        return here.scatter_(1, self._places(kept, layer, total), self.cache.alive[layer])

    def _places(self, kept: Tensor, layer: int, total: int) -> Tensor:
        """The indices of the kept tokens among the layer's current ones."""
        earlier = [each for each in self.cache.kept if each < layer]
        if not earlier:
            return kept
        before = self.cache.kept[max(earlier)]
        assert before.shape[1] == total
        return torch.searchsorted(before, kept)
