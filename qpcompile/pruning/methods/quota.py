"""QUOTA: a sensitivity-based schedule, and scores from attention, magnitude and quantization residual.

Source: "QUOTA" (arXiv 2604.17320), section 3.2 (equations 2 to 5) and 3.3 (equations 6 to 8); the thresholds of the
candidate rule are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

from torch import fx

from qpcompile.errors import PlanError
from qpcompile.ir.edit import aten, calls, layer_of
from qpcompile.ir.node_facts import stub_fact
from qpcompile.ir.operators import TOKEN_SCORES
from qpcompile.ir.program import PREFILL, Program
from qpcompile.ir.shapes import value
from qpcompile.pruning.budget import (
    DEVIATIONS,
    Candidates,
    candidate_layers,
    drop_shares,
    keep_ratios,
    normalize_sensitivity,
    sensitivity,
)
from qpcompile.pruning.pruner import Encoded, Operators, Point, Pruner, Schedule, attention_layers, cut_layers
from qpcompile.pruning.queries import QUERIES, received
from qpcompile.pruning.risk import with_risk
from qpcompile.recipe.plan import Sensitivity
from qpcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class Quota:
    """See the module's docstring."""

    operators: ClassVar[Operators] = (TOKEN_SCORES,)
    fuses_risk: ClassVar[Literal[True]] = True

    def profiles(self, recipe: Recipe) -> bool:
        """Only if the layers to cut after are selected by measurement."""
        return recipe.tokens.candidate_layers == "auto"

    def schedule(self, program: Program) -> Schedule:
        """Candidate layers, with drops distributed by their robustness to quantization."""
        return sensitivity_schedule(program)

    def scores(self, point: Point) -> fx.Node:
        """The weighted sum of the four metrics, and the risk of quantization where the recipe asks for it."""
        tokens = point.recipe.tokens
        weights = tokens.weights
        # A stage-wise order scores without knowledge of the quantizer (table 3 of the paper).
        residual = weights.residual if point.recipe.order == "joint" else 0.0
        terms = (weights.inter, weights.magnitude, weights.intra, residual)
        scored = weighted_scores(point, terms, tokens.queries, tokens.normalize)
        return with_risk(point, scored)

    def left_out(self, recipe: Recipe, text: bool, attention: bool) -> tuple[str, ...]:
        """Attention among states; that of the first layer's queries, where it cannot be read."""
        tokens = recipe.tokens
        weights = vars(tokens.weights) | ({} if recipe.order == "joint" else {"residual": 0.0})
        reasons = {"intra": "states do not attend to each other in the decoder"}
        if not attention:
            reasons["inter"] = "the attention of the first layer that reads states has another form"
        if not any(weight for name, weight in weights.items() if name not in reasons):
            raise PlanError(
                "; ".join(f"{name} cannot score states: {reason}" for name, reason in reasons.items()),
                where="tokens.weights",
                do="give another term a weight: magnitude, residual",
            )
        if attention and weights["inter"] and tokens.queries != "after_image":
            reasons["queries"] = f"{tokens.queries} is for prompts with visual tokens; all tokens count"
        return tuple(f"{name}: {reason}" for name, reason in reasons.items() if weights.get(name, True))


def weighted_scores(point: Point, weights: Sequence[float], queries: str, normalize: str) -> fx.Node:
    """f32[B, N]: the weighted sum of inter, magnitude, intra and residual, each normalised."""
    if point.encoded is not None:
        return _encoded_scores(point, point.encoded, weights, normalize)
    tokens = point.recipe.tokens
    attention = point.attention()
    rounding = rounding_of(point) if weights[3] else _Rounding(point.hidden(), False, 0, 1.0, 4)
    tensors = [point.hidden(), rounding.value, attention.query, attention.key]
    if tokens.scores_of == "full_precision":
        tensors = [point.unquantized(tensor) for tensor in tensors]
    return point.call(
        TOKEN_SCORES,
        *tensors,
        attention.mask,
        attention.scale,
        point.visual,
        point.alive,
        QUERIES[queries](point),
        list(weights),
        normalize,
        *tokens.percentiles,
        tokens.intra_mean,
        rounding.rotate,
        rounding.group_size,
        rounding.clip_ratio,
        rounding.bits,
        tokens.residual_relative,
        tokens.sink_ratio or 0.0,
    )


def _encoded_scores(point: Point, encoded: Encoded, weights: Sequence[float], normalize: str) -> fx.Node:
    """f32[B, V]: of states: the sum without intra, inter by the attention of the first layer that reads them."""
    inter, magnitude, _, residual = weights
    nothing = _Rounding(point.hidden(), False, 0, 1.0, 4)
    scores = _one_term(
        point, point.hidden(), rounding_of(point) if residual else nothing, magnitude, residual, normalize
    )
    if not inter or encoded.attention is None:
        return scores
    mass = point.call(aten.unsqueeze.default, received(point, encoded.attention, encoded.queries), 2)
    # The norm of one number that is not negative is the number: this normalizes it like the other terms.
    attended = _one_term(point, mass, _Rounding(mass, False, 0, 1.0, 4), inter, 0.0, normalize, sinks=False)
    return point.call(aten.add.Tensor, scores, attended)


def _one_term(
    point: Point,
    hidden: fx.Node,
    rounding: _Rounding,
    magnitude: float,
    residual: float,
    normalize: str,
    sinks: bool = True,
) -> fx.Node:
    """f32[B, V]: magnitude and residual alone, which need no attention."""
    tokens = point.recipe.tokens
    heads = point.call(aten.unsqueeze.default, hidden, 1)
    return point.call(
        TOKEN_SCORES,
        *(hidden, rounding.value, heads, heads, None, 1.0, point.visual, point.alive, point.alive),
        *([0.0, magnitude, 0.0, residual], normalize, *tokens.percentiles, False, rounding.rotate, rounding.group_size),
        *(rounding.clip_ratio, rounding.bits, tokens.residual_relative, (tokens.sink_ratio or 0.0) if sinks else 0.0),
    )


@dataclass(frozen=True)
class _Rounding:
    """The tensor whose residual is measured, f[B, N, C], and its quantizer."""

    value: fx.Node
    rotate: bool
    group_size: int
    clip_ratio: float
    bits: int


def rounding_of(point: Point) -> _Rounding:
    """What the next layer's first quantizer rounds, or the residual stream; with the recipe's quantizer."""
    scheme, tokens = point.recipe.quantize, point.recipe.tokens
    # A recipe without a quantizer is scored by the error of 4 bits.
    group_size, clip_ratio, bits = (0, 1.0, 4)
    if scheme is not None and scheme.activations.bits != 16:
        inputs = scheme.activations
        group_size, clip_ratio, bits = inputs.kernel_group, inputs.clip_ratio, inputs.bits
    if tokens.residual_of == "stream":
        if tokens.residual_space == "transformed" and not point.rotate:
            raise PlanError(
                "the residual stream can only be rotated as by quantize.transform hadamard",
                where="tokens.residual_space",
                do="write residual_of: input, which has every transform, or residual_space: plain",
            )
        rotate = tokens.residual_space == "transformed"
        return _Rounding(point.hidden(), rotate, group_size, clip_ratio, bits)
    linears = [node for node in calls(point.graph, aten.linear.default) if layer_of(node) == point.layer + 1]
    source = (linears[0] if point.encoded is None else point.encoded.linear).args[0]
    assert isinstance(source, fx.Node)
    if fact := stub_fact(source):
        clip_ratio = clip_ratio if fact.clip is None else fact.clip
        bits = bits if fact.bits is None else fact.bits
        source = source.args[0]
        assert isinstance(source, fx.Node)
    # This tensor includes folded and online basis changes already.
    source = point.early(source)
    if point.encoded is not None:
        rows = point.call(aten.sym_size.int, point.hidden(), 0)
        source = point.call(aten.reshape.default, source, [rows, -1, int(value(source).shape[-1])])
    return _Rounding(source, False, group_size, clip_ratio, bits)


def sensitivity_schedule(program: Program) -> Schedule:
    """QUOTA's candidate layers and ratios."""
    tokens = program.recipe.tokens
    named = tokens.candidate_layers != "auto"
    candidates = Candidates(cut_layers(program, (0,))) if named else _profiled(program)
    layers = candidates.layers
    # Without samples, in a stage-wise order and in a uniform schedule, all layers count as equally sensitive.
    deviations = program.measured.get(DEVIATIONS)
    if not deviations or program.recipe.order != "joint" or tokens.schedule == "uniform":
        deviations = {layer: [0.0] for layer in layers}
    table = [list(sample) for sample in zip(*[deviations[layer] for layer in layers], strict=True)]
    raw = sensitivity(table)
    normalized = normalize_sensitivity(raw, *tokens.sensitivity_percentiles, tokens.sensitivity_clip)
    shares = drop_shares(normalized, tokens.temperature)
    found = [
        Sensitivity(layer=layer, raw=one, normalized=other)
        for layer, one, other in zip(layers, raw, normalized, strict=True)
    ]
    return Schedule(layers, lambda keep: keep_ratios(shares, keep), tuple(found), waived=candidates.waived)


def _profiled(program: Program) -> Candidates:
    """The candidate layers by the profile from calibration."""
    tokens = program.recipe.tokens
    scoring, tail = attention_layers(program.graphs[PREFILL]), tokens.tail_fraction
    facts = program.plan.facts[:-1]
    if any(fact.layer not in scoring for fact in facts):
        early = facts[: len(facts) - ceil(tail * len(facts))]
        facts, tail = tuple(fact for fact in early if fact.layer in scoring), 0.0
    if not facts:
        raise PlanError(
            "no layer before the last has an attention that could score tokens",
            where="tokens.candidate_layers",
            do="choose a tokens.method that drops tokens before the decoder: divprune, qapruner",
        )
    found = candidate_layers(
        [fact.mass_median for fact in facts],
        [fact.mass_iqr for fact in facts],
        [fact.cosine for fact in facts],
        concentration_floor=tokens.concentration_floor,
        iqr_ceiling=tokens.iqr_ceiling,
        cosine_ceiling=tokens.cosine_ceiling,
        tail_fraction=tail,
        max_candidates=tokens.max_candidates,
    )
    return Candidates(tuple(facts[place].layer for place in found.layers), found.waived)


METHOD: Pruner = Quota()
