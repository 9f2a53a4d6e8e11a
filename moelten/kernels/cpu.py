"""The embedded default: plain torch on any CPU, for every scheme.

Weights stay in canonical rows. Only active experts are touched; each is decoded in chunks of rows
through 256-entry tables (one lookup decodes two 4-bit codes) and multiplied in fp32, where every
code times scale is exact or correctly rounded. Tokens are chunked as well, so peak extra memory
stays under one expert + 256 MiB. `ChainBackend` is the part of a layer that is not a GEMM; other
CPU backends share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from moelten import casts, packing
from moelten.formats import Float, Format, Int4
from moelten.packed import PackedExperts
from moelten.plan import Plan, make_plan
from moelten.qtensor import QTensor, decode_scale, round_activations
from moelten.routing import Routing
from moelten.weights import ExpertSpec

Gemm = Callable[[str, Tensor, Plan], Tensor]
"""(w13 or w2, activations [P, K] sorted by expert, plan) -> fp32 [P, N]."""

_ACTIVATION_BYTES = 128 << 20
_DECODED_BYTES = 32 << 20


@dataclass(frozen=True)
class RowsLayout:
    """Canonical QTensor parts as they are; packing shares nothing and changes nothing."""

    name: str = "rows"
    version: int = 1

    def pack(self, matrix: QTensor) -> dict[str, Tensor]:
        return matrix.tensors()

    def unpack(self, parts: dict[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> QTensor:
        matrix = QTensor(format=fmt, **parts)
        assert matrix.shape == shape
        return matrix


class ChainBackend:
    """The layer around two grouped GEMMs on a CPU; a backend brings the GEMM.

    Tokens are chunked so that activations stay within a bound of its own: it needs no workspace,
    and leaves one that it is given alone.
    """

    devices = ("cpu",)

    def gemm(self, experts: PackedExperts) -> Gemm:
        raise NotImplementedError

    def workspace_bytes(
        self, spec: ExpertSpec, tokens: int, top_k: int, on_input: bool = False
    ) -> int:
        return 0

    def run(
        self,
        x: Tensor,
        experts: PackedExperts,
        routing: Routing,
        out: Tensor,
        workspace: Tensor | None = None,
    ) -> None:
        gemm = self.gemm(experts)
        for part, chunk, plan in _chunks(experts.spec, routing):
            hidden = _gemm1(x[part], experts, chunk, plan, gemm)
            out[part] = _combine(_gemm2(hidden, experts, chunk, plan, gemm), plan, x.dtype)

    def gemm1(self, x: Tensor, experts: PackedExperts, routing: Routing, hidden: Tensor) -> None:
        """`stages.gemm1`, into hidden [T, k, I] of zeros."""
        gemm = self.gemm(experts)
        for part, chunk, plan in _chunks(experts.spec, routing):
            rows = _gemm1(x[part], experts, chunk, plan, gemm)
            hidden[part].flatten(0, 1)[plan.pairs] = rows

    def gemm2(
        self, hidden: Tensor, experts: PackedExperts, routing: Routing, slots: Tensor
    ) -> None:
        """`stages.gemm2`, into slots [T, k, H] of zeros."""
        gemm = self.gemm(experts)
        for part, chunk, plan in _chunks(experts.spec, routing):
            rows = hidden[part].flatten(0, 1)[plan.pairs]
            slots[part].flatten(0, 1)[plan.pairs] = _gemm2(rows, experts, chunk, plan, gemm)

    def combine(self, slots: Tensor, experts: PackedExperts, routing: Routing, out: Tensor) -> None:
        """`stages.combine`, into out [T, H]."""
        for part, _, plan in _chunks(experts.spec, routing):
            out[part] = _combine(slots[part].flatten(0, 1)[plan.pairs], plan, out.dtype)


class CpuBackend(ChainBackend):
    name = "cpu"
    layout = RowsLayout()

    def refusals(self, spec: ExpertSpec, device: torch.device) -> list[str]:
        return [] if device.type == "cpu" else [f"runs on cpu, the experts are for {device.type}"]

    def gemm(self, experts: PackedExperts) -> Gemm:
        return lambda name, a, plan: _decoded_gemm(experts, name, a, plan)


def _chunks(spec: ExpertSpec, routing: Routing) -> Iterator[tuple[slice, Routing, Plan]]:
    """Runs of tokens whose activations stay within the bound, each with its plan."""
    inter = (spec.activation.halves + 1) * spec.intermediate_size
    per_token = routing.top_k * 4 * (2 * spec.hidden_size + 2 * inter)
    step = max(_ACTIVATION_BYTES // per_token, 1)
    for start in range(0, routing.num_tokens, step):
        part = slice(start, start + step)
        chunk = replace(routing, ids=routing.ids[part], weights=routing.weights[part])
        yield part, chunk, make_plan(chunk.ids, spec.num_experts, spec.first_expert)


def _gemm1(x: Tensor, experts: PackedExperts, routing: Routing, plan: Plan, gemm: Gemm) -> Tensor:
    """The activation's results [P, I], in the plan's order."""
    spec, extras, ids = experts.spec, experts.tensors, plan.experts
    a = _round_inputs(x, experts, routing, plan, ids)
    h = gemm("w13", a, plan).view(-1, spec.activation.halves, spec.intermediate_size)
    if "w13_bias" in extras:
        h += extras["w13_bias"][ids]
    return spec.activation(h, ids)


def _gemm2(
    hidden: Tensor, experts: PackedExperts, routing: Routing, plan: Plan, gemm: Gemm
) -> Tensor:
    """The experts' results [P, H], in the plan's order, by router weight."""
    extras, ids = experts.tensors, plan.experts
    y = gemm("w2", _round(hidden, experts, "w2", ids), plan)
    if "w2_bias" in extras:
        y += extras["w2_bias"][ids]
    if not routing.on_input:
        y *= routing.weights.float().flatten()[plan.pairs, None]
    return y


def _round_inputs(
    x: Tensor, experts: PackedExperts, routing: Routing, plan: Plan, ids: Tensor
) -> Tensor:
    """Quantized input rows; each token once, unless its rows differ by expert."""
    extras = experts.tensors
    differ = routing.on_input or "w13_pre_scale" in extras or "w13_input_scale" in extras
    if not differ:
        return round_activations(x, experts.spec.scheme.activations, None)[plan.tokens]
    rows = x[plan.tokens].float()
    if routing.on_input:
        rows *= routing.weights.float().flatten()[plan.pairs, None]
    return _round(rows, experts, "w13", ids)


def _round(rows: Tensor, experts: PackedExperts, name: str, ids: Tensor) -> Tensor:
    extras = experts.tensors
    if (pre_scale := extras.get(f"{name}_pre_scale")) is not None:
        rows = rows * pre_scale[ids]
    static = extras.get(f"{name}_input_scale")
    return round_activations(
        rows, experts.spec.scheme.activations, None if static is None else static[ids]
    )


def _combine(y: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Sum each token's rows in slot order, in fp32; pairs without a row add nothing."""
    out = torch.zeros(plan.rows.shape[0], y.shape[1])
    full = plan.num_rows == plan.rows.numel()
    for slot in range(plan.rows.shape[1]):
        rows = plan.rows[:, slot]
        if full:
            out += y[rows]
        else:
            tokens = (rows >= 0).nonzero().flatten()
            out.index_add_(0, tokens, y[rows[tokens]])
    return out.to(dtype)


def _decoded_gemm(experts: PackedExperts, name: str, a: Tensor, plan: Plan) -> Tensor:
    spec = experts.spec
    shape = spec.matrix_shape(name)
    columns = shape[-1]
    out = torch.empty(a.shape[0], math.prod(shape[:-1]))
    step = max(_DECODED_BYTES // (4 * columns), 1)
    for expert, first, last in plan.spans():
        matrix = QTensor(
            format=spec.scheme.weights,
            **{
                part: experts.tensors[f"{name}.{part}"][expert]
                for part in ("data", "scale", "zero", "global_scale")
                if f"{name}.{part}" in experts.tensors
            },
        )
        x = a[first:last].float()
        halves = [matrix] if matrix.data.dim() == 2 else [matrix[i] for i in range(shape[0])]
        column = 0
        for half in halves:
            for start, stop in _row_chunks(half, step):
                decoded = decode(half.rows(start, stop))
                torch.mm(x, decoded.T, out=out[first:last, column : column + stop - start])
                column += stop - start
    return out


def _row_chunks(matrix: QTensor, step: int) -> list[tuple[int, int]]:
    unit = matrix.format.block[0] or 1
    step = max(step // unit, 1) * unit
    rows = matrix.shape[-2]
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def decode(matrix: QTensor) -> Tensor:
    """fp32 values of a [rows, K] matrix; the same values as `dequantize`, faster."""
    fmt = matrix.format
    rows, columns = matrix.shape
    if isinstance(fmt, Float):
        return matrix.data.float()
    if fmt.packed:
        pairs = _pair_table(isinstance(fmt, Int4))
        values = pairs.index_select(0, matrix.data.reshape(-1).int()).view(torch.float32)
        values = values.view(rows, columns)
    else:
        values = matrix.data.float()
    assert matrix.scale is not None
    scale, (high, wide) = decode_scale(matrix.scale), fmt.block
    if high is not None and high > 1:
        scale = scale.repeat_interleave(high, 0)[:rows]
    if wide is not None and columns % wide:
        scale = scale.repeat_interleave(wide, 1)[:, :columns]
        values.mul_(scale)
    else:
        groups = values.view(rows, scale.shape[1], -1)
        if matrix.zero is not None:
            groups.sub_(matrix.zero[..., None])
        groups.mul_(scale[..., None])
    if matrix.global_scale is not None:
        values.mul_(matrix.global_scale[..., None])
    return values


@cache
def _pair_table(integer: bool) -> Tensor:
    """256 entries: the two fp32 values of a byte, low nibble first, as one int64."""
    nibbles = packing.unpack_nibbles(torch.arange(256, dtype=torch.uint8)[:, None])
    values = packing.sign_extend(nibbles).float() if integer else casts.decode_e2m1(nibbles)
    return values.view(torch.int64).flatten()
