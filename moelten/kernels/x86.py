"""The x86 backend: grouped GEMMs of `x86_gemm` inside the chain that all CPU backends share.

For MXFP4 and symmetric INT4 with bf16 activations. What it does not take it says in `refusals`, and
the cpu backend takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moelten.casts import decode_e2m1
from moelten.formats import BF16, MXFP4, Format, Int4
from moelten.kernels.cpu import ChainBackend, Gemm
from moelten.kernels.x86_gemm import (
    COLUMNS,
    grouped_gemm,
    pack_codes,
    pack_scale,
    unavailable,
    unpack_codes,
    unpack_scale,
)
from moelten.packed import PackedExperts
from moelten.packing import sign_extend
from moelten.plan import Plan
from moelten.qtensor import QTensor
from moelten.weights import ExpertSpec


@dataclass(frozen=True)
class VnniLayout:
    """Codes as `pack_codes` has them, scales as `pack_scale`; padding is theirs."""

    name: str = "vnni"
    version: int = 1

    def pack(self, matrix: QTensor) -> dict[str, Tensor]:
        assert matrix.scale is not None
        return {
            "data": pack_codes(matrix.data.reshape(-1, matrix.data.shape[-1])),
            "scale": pack_scale(matrix.scale.reshape(-1, matrix.scale.shape[-1])),
        }

    def unpack(self, parts: dict[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> QTensor:
        *batch, rows, columns = shape
        total = math.prod(batch) * rows
        data = unpack_codes(parts["data"], total, columns).view(*batch, rows, -1)
        scale = unpack_scale(parts["scale"], total).view(*batch, rows, -1)
        return QTensor(data, fmt, scale)


class X86Backend(ChainBackend):
    name = "x86"
    layout = VnniLayout()

    def refusals(self, spec: ExpertSpec, device: torch.device) -> list[str]:
        if device.type != "cpu":
            return [f"runs on cpu, the experts are for {device.type}"]
        scheme = spec.scheme
        reasons = []
        if not _takes(scheme.weights):
            reasons.append(
                f"takes mxfp4 and symmetric int4 with groups of 32, 64, 128 or a channel, "
                f"not {scheme.weights.name}"
            )
        if scheme.activations != BF16:
            reasons.append(f"takes bf16 activations, not {scheme.activations.name}")
        for name, size in (("H", spec.hidden_size), ("I", spec.intermediate_size)):
            if size % COLUMNS:
                reasons.append(f"needs {name} to be a multiple of {COLUMNS}, got {size}")
        if (missing := unavailable()) is not None:
            reasons.append(missing)
        return reasons

    def gemm(self, experts: PackedExperts) -> Gemm:
        fmt, parts = experts.spec.scheme.weights, experts.tensors
        table = code_table(isinstance(fmt, Int4))

        def gemm(name: str, a: Tensor, plan: Plan) -> Tensor:
            *rows, columns = experts.spec.matrix_shape(name)
            result = torch.empty(a.shape[0], math.prod(rows))
            grouped_gemm(
                a,
                plan.offsets,
                plan.active,
                parts[f"{name}.data"],
                parts[f"{name}.scale"],
                table,
                group_size=fmt.block[1] or columns,
                rows=result.shape[1],
                out=result,
            )
            return result

        return gemm


def _takes(fmt: Format) -> bool:
    if isinstance(fmt, Int4):
        return not fmt.zero_point and (fmt.group_size or COLUMNS) % COLUMNS == 0
    return isinstance(fmt, MXFP4)


@cache
def code_table(integer: bool) -> Tensor:
    """The 16 values of a 4-bit code, exact in bf16."""
    codes = torch.arange(16, dtype=torch.uint8)
    values = sign_extend(codes).float() if integer else decode_e2m1(codes)
    return values.to(torch.bfloat16)
