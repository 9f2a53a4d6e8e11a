"""One expert from its projections: gate and up joined, scales of inputs reconciled, E = 1.

Gate and up read the same input, so what their checkpoint says of that input must become one value.
AWQ's pre_quant_scale must agree, because each half's weights were divided by it. Static input
scales may differ; the larger one serves both, since it covers the range of both and clips neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moelten.activations import Activation
from moelten.checkpoints.config import Recipe
from moelten.checkpoints.projection import FLOATS, Projection
from moelten.errors import CheckpointError, FormatError
from moelten.formats import Format
from moelten.qtensor import QTensor
from moelten.weights import ExpertWeights, split_halves


@dataclass(frozen=True)
class Matrix:
    """A decoded projection [N, K] (or joined halves [2, I, H]) and what belongs to it, in fp32."""

    weight: QTensor
    bias: Tensor | None
    pre_scale: Tensor | None
    input_scale: Tensor | None


def read_matrix(
    p: Projection,
    decode: Callable[[Projection, Recipe], QTensor],
    recipe: Recipe,
    *,
    static: bool,
    drop_input_scale: bool,
) -> Matrix:
    """Decode a projection, with its bias and pre-scale and, for `static`, its input scale."""
    try:
        weight = decode(p, recipe)
    except FormatError as error:
        if p.module in str(error):
            raise
        raise FormatError(f"{p.module}: {error}") from None
    rows, columns = weight.shape
    bias = p.read("bias", FLOATS, rows).float() if "bias" in p else None
    pre_scale = None
    if "pre_quant_scale" in p:
        pre_scale = p.read_scale("pre_quant_scale", FLOATS, (columns,)).float()
    if drop_input_scale:
        p.skip("input_scale", "input_global_scale")
    input_scale = _read_input_scale(p) if static else None
    p.finish()
    return Matrix(weight, bias, pre_scale, input_scale)


def _read_input_scale(p: Projection) -> Tensor:
    if "input_global_scale" in p:
        return 1.0 / p.read_scalar("input_global_scale")
    try:
        return p.read_scalar("input_scale")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; static activations need it, a dynamic activation_format does not"
        ) from None


def join_halves(gate: Matrix, up: Matrix, module: str) -> Matrix:
    """Gate and up [I, H] as one [2, I, H]."""
    if (gate.weight.format, gate.weight.shape) != (up.weight.format, up.weight.shape):
        raise CheckpointError(
            f"{module}: gate is {gate.weight.format} {list(gate.weight.shape)}, up is "
            f"{up.weight.format} {list(up.weight.shape)}; expected the same"
        )
    for name in ("bias", "pre_scale", "input_scale"):
        if (getattr(gate, name) is None) != (getattr(up, name) is None):
            raise CheckpointError(f"{module}: only one of gate and up has a {name}")
    parts = up.weight.tensors()
    stacked: dict[str, Any] = {
        name: torch.stack((part, parts[name])) for name, part in gate.weight.tensors().items()
    }
    bias, input_scale = None, None
    if gate.bias is not None and up.bias is not None:
        bias = torch.stack((gate.bias, up.bias))
    if gate.input_scale is not None and up.input_scale is not None:
        input_scale = torch.maximum(gate.input_scale, up.input_scale)
    if gate.pre_scale is not None and up.pre_scale is not None:
        if not gate.pre_scale.is_meta and not torch.equal(gate.pre_scale, up.pre_scale):
            raise CheckpointError(
                f"{module}: gate and up have different pre_quant_scale, but one input; export with "
                "their scales unified"
            )
    return Matrix(replace(gate.weight, **stacked), bias, gate.pre_scale, input_scale)


def split_fused(fused: Matrix, order: str) -> Matrix:
    """Rows [2I, H] (or [I, H] without a gate) in `order` as [2, I, H]."""
    weight = split_halves(fused.weight.map(lambda part: part[None]), order)
    assert isinstance(weight, QTensor)
    bias = None
    if fused.bias is not None:
        split = split_halves(fused.bias[None, :, None], order)
        assert isinstance(split, Tensor)
        bias = split[0, ..., 0]
    return replace(fused, weight=weight[0], bias=bias)


def make_weights(
    w13: Matrix, w2: Matrix, activation: Activation, activation_format: Format, expert: int
) -> ExpertWeights:
    """One expert as ExpertWeights with E = 1 that answers to its own id."""

    def one(part: Tensor | None) -> Tensor | None:
        return None if part is None else part[None].contiguous()

    return ExpertWeights(
        w13.weight.map(lambda part: part[None].contiguous()),
        w2.weight.map(lambda part: part[None].contiguous()),
        activation,
        activation_format,
        one(w13.bias),
        one(w2.bias),
        one(w13.pre_scale),
        one(w2.pre_scale),
        one(w13.input_scale),
        one(w2.input_scale),
        expert,
    )


def stack_experts(experts: Sequence[ExpertWeights]) -> ExpertWeights:
    """Single experts as one ExpertWeights with E = len(experts)."""
    first = experts[0]

    def cat(matrices: list[QTensor]) -> QTensor:
        names = matrices[0].tensors()
        parts: dict[str, Any] = {
            name: torch.cat([matrix.tensors()[name] for matrix in matrices]) for name in names
        }
        return replace(matrices[0], **parts)

    extras: dict[str, Any] = {
        name: torch.cat([expert.extras()[name] for expert in experts]) for name in first.extras()
    }
    w13, w2 = cat([e.w13 for e in experts]), cat([e.w2 for e in experts])
    return replace(first, w13=w13, w2=w2, **extras)
