"""Is what moelten reads from a checkpoint what the checkpoint says, and what it computes the layer?

Three questions, each with a number. `compare_decoding`: our decoded experts against `definition`,
value by value. `compare_checkpoints`: one checkpoint's experts against another's, relative. And
`layer_error`: the packed layer's outputs against a plain fp64 layer on independently decoded
weights. Only weight decoding is independent: how activations round is the specification's matter,
so it comes from `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelten.checkpoints import Checkpoint
from moelten.commands.definition import (
    Activation,
    ExpertMatrices,
    StoredExperts,
    activation_of,
    plain_moe,
)
from moelten.errors import CheckpointError
from moelten.moe import fused_moe
from moelten.packed import PackedExperts
from moelten.qtensor import dequantize, round_activations
from moelten.routing import Routing
from moelten.weights import ExpertSpec, ExpertWeights

OUTPUT_TOLERANCE = 2.5e-3
"""Relative Frobenius bound on a layer's bf16 outputs: their own rounding is about 1.6e-3."""
DECODING_TOLERANCE = 1e-6
"""Decoding is exact up to one fp32 rounding per product."""
QUANTIZATION_TOLERANCE = 0.2
"""Between two checkpoints: 4-bit rounding stays below it, wrong scales or orders do not."""


@dataclass(frozen=True)
class LayerComparison:
    """The worst relative error among some experts of one layer, and where it is."""

    layer: int
    experts: tuple[int, ...]
    rel_error: float
    worst: str
    finite: bool


def sample(num_experts: int, count: int | None) -> tuple[int, ...]:
    """`count` experts spread over all of them, first and last included; None means all.

    >>> sample(8, 3), sample(2, 4)
    ((0, 4, 7), (0, 1))
    """
    if count is None or count >= num_experts:
        return tuple(range(num_experts))
    last = num_experts - 1
    return tuple(sorted({round(i * last / max(count - 1, 1)) for i in range(count)}))


def compare_decoding(
    checkpoint: Checkpoint,
    count: int | None = 4,
    progress: Callable[[str], None] = lambda label: None,
) -> Iterator[LayerComparison]:
    """Our decoding of each layer against the definition's, on `count` experts (None: all)."""
    stored = StoredExperts(checkpoint.path)
    for layer in checkpoint.layers:
        progress(f"layer {layer}")
        experts = sample(checkpoint.spec(layer).num_experts, count)
        pairs = (
            (e, decoded(checkpoint.expert(layer, e)), stored.expert(layer, e)) for e in experts
        )
        yield _compare(layer, experts, pairs)


def compare_checkpoints(
    checkpoint: Checkpoint,
    other: Checkpoint,
    count: int | None = 4,
    progress: Callable[[str], None] = lambda label: None,
) -> Iterator[LayerComparison]:
    """Each layer's experts in two checkpoints of one model; the error is relative to `other`."""
    if checkpoint.layers != other.layers:
        raise CheckpointError(
            f"{checkpoint.path} has MoE layers {_span(checkpoint.layers)}, {other.path} has "
            f"{_span(other.layers)}: not the same model"
        )
    for layer in checkpoint.layers:
        progress(f"layer {layer}")
        sizes = [_sizes(c.spec(layer)) for c in (checkpoint, other)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"layer {layer}: {checkpoint.path} has (E, H, I) {sizes[0]}, {other.path} has "
                f"{sizes[1]}: not the same model"
            )
        experts = sample(sizes[0][0], count)
        pairs = (
            (e, decoded(checkpoint.expert(layer, e)), decoded(other.expert(layer, e)))
            for e in experts
        )
        yield _compare(layer, experts, pairs)


def decoded(weights: ExpertWeights) -> ExpertMatrices:
    """Our own decoding of one expert (E = 1), in the definition's form."""
    w13 = dequantize(weights.w13, torch.float64)[0]
    bias = weights.w13_bias
    gated = weights.activation.gated
    return ExpertMatrices(
        w13[0] if gated else None,
        w13[-1],
        dequantize(weights.w2, torch.float64)[0],
        None if bias is None or not gated else bias[0, 0].double(),
        None if bias is None else bias[0, -1].double(),
        None if weights.w2_bias is None else weights.w2_bias[0].double(),
    )


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| (Frobenius); the plain difference where wanted is zero."""
    scale = torch.linalg.norm(wanted)
    return float(torch.linalg.norm(got - wanted) / (scale if scale > 0 else 1.0))


def _compare(
    layer: int,
    experts: tuple[int, ...],
    pairs: Iterator[tuple[int, ExpertMatrices, ExpertMatrices]],
) -> LayerComparison:
    worst, where, finite = -1.0, "", True
    for expert, ours, theirs in pairs:
        mine, wanted = dict(ours.items()), dict(theirs.items())
        if mine.keys() != wanted.keys() or any(mine[n].shape != wanted[n].shape for n in mine):
            raise CheckpointError(
                f"layer {layer}, expert {expert}: {_shapes(mine)} against {_shapes(wanted)}"
            )
        for name, matrix in mine.items():
            finite = finite and bool(torch.isfinite(matrix).all())
            error = relative_error(matrix, wanted[name])
            # NaN compares false: it must not pass for a small error.
            if not error <= worst:
                worst, where = error, f"expert {expert}, {name}"
    return LayerComparison(layer, experts, worst, where, finite)


def layer_error(
    packed: PackedExperts,
    extras: Callable[[int], ExpertWeights],
    stored: StoredExperts,
    layer: int,
    x: Tensor,
    routing: Routing,
) -> float:
    """Relative error of fused_moe(x, packed, routing) against the plain fp64 layer.

    extras(expert) gives our weights of one expert (E = 1), for its static and pre-scales alone.
    """
    spec = packed.spec
    visited = {e for e in routing.ids.flatten().tolist() if 0 <= e < spec.num_experts}
    experts = {e: stored.expert(layer, e) for e in visited}
    wanted_shape = (spec.intermediate_size, spec.hidden_size)
    for expert, matrices in experts.items():
        if matrices.up.shape != wanted_shape or matrices.down.T.shape != wanted_shape:
            raise CheckpointError(
                f"layer {layer}, expert {expert}: read as I, H = {wanted_shape}, by definition "
                f"{_shapes(dict(matrices.items()))}"
            )
    activation = activation_of(stored.config) or _our_activation(spec)

    def rounding(name: str, expert: int, rows: Tensor) -> Tensor:
        weights = extras(expert) if spec.extras else None
        pre_scale = getattr(weights, f"{name}_pre_scale", None)
        static = getattr(weights, f"{name}_input_scale", None)
        scaled = rows if pre_scale is None else rows * pre_scale
        return round_activations(scaled, spec.scheme.activations, static)

    wanted = plain_moe(x, experts, routing.ids, routing.weights, activation, rounding)
    return relative_error(fused_moe(x, packed, routing).double(), wanted)


def _our_activation(spec: ExpertSpec) -> Activation:
    def activation(gate: Tensor | None, up: Tensor) -> Tensor:
        halves = [up] if gate is None else [gate, up]
        return spec.activation(torch.stack(halves, 1), torch.zeros(up.shape[0], dtype=torch.long))

    return activation


def _sizes(spec: ExpertSpec) -> tuple[int, int, int]:
    return spec.num_experts, spec.hidden_size, spec.intermediate_size


def _shapes(parts: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())


def _span(layers: tuple[int, ...]) -> Any:
    return f"{layers[0]}..{layers[-1]} ({len(layers)})" if layers else "none"
