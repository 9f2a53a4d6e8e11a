"""The stages around the GEMMs, in Triton: quantization of activations, combine.

Rows live in pair space, as the plan's do (`triton_plan`): a pair whose id is out of range is never
read and adds nothing. Quantized rows are bit for bit those of `moelten.qtensor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelten.formats import FP8, MXFP8, NVFP4, Float, Format, Int8
from moelten.kernels.arena import Take, heap
from moelten.kernels.launches import launch
from moelten.kernels.triton_casts import (
    abs_bits,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    encode_int8,
    only_if,
    round_to,
    widen,
)
from moelten.kernels.triton_variants import current_target
from moelten.layouts import ROW_TILES, swizzled_size


@dataclass(frozen=True)
class Rows:
    """Quantized rows: codes [R, K] (or K/2 bytes), scale [R, groups], global_scale [R].

    Swizzled scales (see `moelten.layouts`) are flat, with their padding.
    """

    data: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """What makes rows differ by pair: ids [T, k], and whatever multiplies before quantization."""

    ids: Tensor
    num_experts: int
    first_expert: int
    router: Tensor | None = None
    pre_scale: Tensor | None = None
    static_scale: Tensor | None = None


def empty_rows(
    take: Take,
    count: int,
    columns: int,
    fmt: Format,
    scale_layout: str = "linear",
    dtype: torch.dtype | None = None,
) -> Rows:
    """Room for `count` rows in an activation format; dtype: see `triton_variants.row_dtype`."""
    if isinstance(fmt, Float) and dtype is not None:
        return Rows(take(dtype, count, columns), take(torch.float32, count, 1))
    if isinstance(fmt, Float):
        return Rows(take(fmt.data_dtype, count, columns))
    assert isinstance(fmt, FP8 | MXFP8 | NVFP4 | Int8)
    groups = -(-columns // (fmt.block[1] or columns))
    scales: tuple[int, ...] = (count, groups)
    if scale_layout != "linear":
        scales = (swizzled_size(count, groups, scale_layout),)
    if isinstance(fmt, NVFP4):
        data = take(torch.uint8, count, columns // 2)
        return Rows(data, take(torch.uint8, *scales), take(torch.float32, count))
    code = dtype or (torch.int8 if isinstance(fmt, Int8) else torch.uint8)
    scale_dtype = torch.uint8 if isinstance(fmt, MXFP8) else torch.float32
    return Rows(take(code, count, columns), take(scale_dtype, *scales))


def quantize_rows(
    x: Tensor,
    fmt: Format,
    pairs: Pairs | None = None,
    *,
    by_token: bool = False,
    static_scale: Tensor | None = None,
    scale_layout: str = "linear",
    dtype: torch.dtype | None = None,
    rows: Rows | None = None,
) -> Rows:
    """Quantize x [R, K] to an activation format; with `by_token`, row r of T*k reads x[r // k].

        row = x * router * pre_scale[expert], in fp32;  codes, scales = quantize(row, fmt)

    static_scale: fp32, one decode scale for all rows (`pairs` has its own, by expert)
    dtype:        what codes are stored as, see `triton_variants.row_dtype`
    rows:         where to write, from `empty_rows` for the same sizes; new ones by default

    Rows of pairs whose id is out of range are left unwritten. Padding of swizzled scales is zero.
    """
    count = pairs.ids.numel() if pairs is not None else x.shape[0]
    columns = x.shape[1]
    if rows is None:
        rows = empty_rows(heap(x.device), count, columns, fmt, scale_layout, dtype)
    group = fmt.block[1] or triton.next_power_of_2(columns)
    groups = triton.next_power_of_2(-(-columns // group))
    tile = ROW_TILES[scale_layout]
    kind = type(fmt).__name__.lower()
    if isinstance(fmt, Float) and rows.scale is not None:
        kind = "normalized"
    extra = pairs or Pairs(x, 1, 0, static_scale=static_scale)
    launch(
        quantize_kernel, (-(-count // tile) * tile,),
        x, rows.data, rows.scale, rows.global_scale,
        None if pairs is None else extra.ids.contiguous(),
        None if extra.router is None else extra.router.contiguous(),
        extra.pre_scale, extra.static_scale,
        1 if pairs is None else extra.ids.shape[1], extra.num_experts, extra.first_expert,
        count, columns,
        KIND=kind, GROUP=group, GROUPS=groups if tile == 1 else max(groups, 4),
        BY_TOKEN=by_token, ROW_TILE=tile, NATIVE=rounds_to_e4m3(x.device),
        num_warps=4 if group * groups <= 4096 else 8,
    )  # fmt: skip
    return rows


def rounds_to_e4m3(device: torch.device) -> bool:
    """Whether a conversion to e4m3 is an instruction, which rounds and clamps as ours."""
    if device.type != "cuda":
        return False
    target = current_target()
    return target.backend == "cuda" and target.native_fp8


@triton.jit
def _scale_offset(row, g, groups, ROW_TILE: tl.constexpr):
    """Where `moelten.layouts` puts the scale of group g of a row; a tile of one row is linear."""
    if ROW_TILE == 1:
        return row * groups + g
    else:
        tiles = (groups + 3) // 4
        start = row // ROW_TILE * tiles * (ROW_TILE * 4) + g // 4 * (ROW_TILE * 4) + g % 4
        if ROW_TILE == 8:
            return start + row % 8 * 4
        else:
            return start + row % 32 * 16 + row % 128 // 32 * 4


@triton.jit
def scale_of(amax, KIND: tl.constexpr):
    """The scale of numbers of 8 bits whose largest is given; 1 for nothing but zeros."""
    scale = tl.div_rn(amax, 127.0 if KIND == "int8" else 448.0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def encode_scaled(x, scale, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of 8 bits of x [groups, columns] over the scales of its groups."""
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return encode_int8(scaled) if KIND == "int8" else encode_e4m3(scaled, NATIVE)


@triton.jit
def code_values(codes, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of 8 bits as fp32 numbers."""
    return codes.to(tl.float32) if KIND == "int8" else decode_e4m3(codes, NATIVE)


@triton.jit(do_not_specialize=["first_expert", "count"])
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, global_ptr, ids_ptr, router_ptr, pre_ptr, static_ptr,
    top_k, num_experts, first_expert, count, columns,
    KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    BY_TOKEN: tl.constexpr, ROW_TILE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = row * 0
    if ids_ptr is not None:
        expert = tl.load(ids_ptr + row).to(tl.int64) - first_expert
        if (expert < 0) | (expert >= num_experts):
            return
    source = row
    if BY_TOKEN:
        source = row // top_k
    g = tl.arange(0, GROUPS)
    group_count = (columns + GROUP - 1) // GROUP
    stored = group_count
    if ROW_TILE > 1:
        stored = (group_count + 3) // 4 * 4
        if row >= count:
            at = scale_ptr + _scale_offset(row, g, group_count, ROW_TILE)
            tl.store(at, tl.zeros((GROUPS,), tl.uint8), mask=g < stored)
            return
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = k < columns
    x = widen(tl.load(x_ptr + source * columns + k, mask=inside, other=0.0))
    if router_ptr is not None:
        x = x * widen(tl.load(router_ptr + row))
    if pre_ptr is not None:
        x = x * tl.load(pre_ptr + expert * columns + k, mask=inside, other=0.0)
    if KIND == "float":
        tl.store(
            codes_ptr + row * columns + k, round_to(x, codes_ptr.dtype.element_ty), mask=inside
        )
    elif KIND == "normalized":
        # bf16, times the power of two that brings the row's largest to 2**14 .. 2**15 in fp16.
        x = widen(round_to(x, tl.bfloat16))
        exponent = tl.minimum(tl.maximum(tl.max(abs_bits(x), axis=1) >> 23, 15), 254)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(codes_ptr + row * columns + k, round_to(x * up[:, None], tl.float16), mask=inside)
        scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        tl.store(scale_ptr + row + g, scale, mask=g < 1)
    else:
        amax = tl.max(abs_bits(x), axis=1).to(tl.float32, bitcast=True)
        scale_at = scale_ptr + _scale_offset(row, g, group_count, ROW_TILE)
        if KIND == "nvfp4":
            _quantize_nvfp4(
                x, amax, scale_at, codes_ptr + row * (columns // 2), global_ptr + row, static_ptr,
                expert, columns, stored, GROUP, GROUPS,
            )  # fmt: skip
        else:
            if KIND == "mxfp8":
                byte = encode_e8m0(tl.div_rn(amax, 448.0))
                scale = decode_e8m0(byte)
                byte = tl.where(g < group_count, byte, 0)
                tl.store(scale_at, byte.to(tl.uint8), mask=g < stored)
            else:
                if static_ptr is not None:
                    scale = tl.zeros_like(amax) + tl.load(static_ptr + expert)
                else:
                    scale = scale_of(amax, KIND)
                tl.store(scale_at, scale, mask=g < group_count)
            codes = encode_scaled(x, scale, KIND, NATIVE)
            if codes_ptr.dtype.element_ty.is_floating():
                # Exact in 16 bits.
                codes = round_to(code_values(codes, KIND, NATIVE), codes_ptr.dtype.element_ty)
            tl.store(codes_ptr + row * columns + k, codes, mask=inside)


@triton.jit
def _quantize_nvfp4(
    x, amax, scale_at, codes_ptr, global_ptr, static_ptr, expert, columns, stored,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    one = tl.full((1,), 1.0, tl.float32)
    largest = tl.full((1,), 3.4028234663852886e38, tl.float32)
    if static_ptr is not None:
        encode = tl.div_rn(one, tl.zeros_like(one) + tl.load(static_ptr + expert))
    else:
        # Reduce as integers, so that NaN in any block reaches the row's scale.
        top = tl.max(abs_bits(amax), axis=0) + tl.zeros_like(one).to(tl.int32)
        row_amax = top.to(tl.float32, bitcast=True)
        encode = tl.div_rn(one * 2688.0, row_amax)
        encode = tl.where(encode > largest, largest, encode)
        encode = tl.where((row_amax == 0.0) | (encode == 0.0), 1.0, encode)
    decode = tl.div_rn(one, encode)
    tl.store(global_ptr + tl.arange(0, 1), decode)
    # fp32 nearest to 1/6, as the formula has it.
    code = encode_e4m3(amax * (encode * 0.1666666716337204))
    g = tl.arange(0, GROUPS)
    tl.store(scale_at, tl.where(g < columns // GROUP, code, 0).to(tl.uint8), mask=g < stored)
    scale = decode_e4m3(code, False)
    inverse = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale * tl.div_rn(one, encode))
    inverse = tl.where(inverse > largest, largest, inverse)
    inverse = tl.where(amax == 0.0, 0.0, inverse)
    codes = encode_e2m1(x * inverse[:, None])
    low, high = tl.split(tl.reshape(codes, (GROUPS, GROUP // 2, 2)))
    k = g[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    tl.store(codes_ptr + k, (low | (high << 4)).to(tl.uint8), mask=k < columns // 2)


def combine(y: Tensor, ids: Tensor, num_experts: int, first_expert: int, out: Tensor) -> None:
    """out[t] = sum of the valid rows of y [T*k, H], in slot order, in fp32, rounded once."""
    tokens, top_k = ids.shape
    width = out.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    grid = (tokens, triton.cdiv(width, block))
    launch(
        combine_kernel, grid,
        y, ids.contiguous(), out, num_experts, first_expert, width, TOP_K=top_k, BLOCK=block,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_expert"])
def combine_kernel(
    y_ptr, ids_ptr, out_ptr, num_experts, first_expert, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        row = token * TOP_K + slot
        local = tl.load(ids_ptr + row).to(tl.int64) - first_expert
        valid = (local >= 0) & (local < num_experts)
        total += tl.load(y_ptr + row * width + column, mask=only_if(valid, inside), other=0.0)
    tl.store(
        out_ptr + token * width + column, round_to(total, out_ptr.dtype.element_ty), mask=inside
    )
