"""Rows of activations as the GEMMs for many tokens per expert read them.

A program reads a row, quantizes it where the scheme says so, and writes it with columns in the
order of operands (`hopper_layout`): once, if GEMM1 gathers rows, else at each of its positions in
the plan. What scales a row is where the row is, but scales of groups are always by position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from moelten.formats import Format, Int8
from moelten.kernels.launches import launch
from moelten.kernels.triton_casts import abs_bits, only_if, round_to, widen
from moelten.kernels.triton_ops import (
    Pairs,
    Rows,
    code_values,
    encode_scaled,
    rounds_to_e4m3,
    scale_of,
)

_WORDS = 4096  # words that a program holds at once


@dataclass(frozen=True)
class Places:
    """Where rows of activations belong in a plan.

    inverse: int32 [P], the position of each pair, -1 for those that are not valid (`TilePlan`)
    shared:  how many pairs share a row: row r belongs to pairs r * shared and after
    once:    whether rows stay where they are, and only scales of groups go to positions
    """

    inverse: Tensor
    shared: int
    once: bool = False


def quantize(
    x: Tensor,
    fmt: Format,
    out: Rows,
    places: Places | None = None,
    pairs: Pairs | None = None,
) -> None:
    """Rows of x in a format of 8 bits: codes as 16-bit numbers, and scales.

    x:      [R, K], without `places` by position, columns in the order of operands
    pairs:  what else makes rows differ: then row p // k of x, times that, belongs to pair p alone
    out:    data [R, W], [P, W] with `pairs` or by position; behind the last column zeros or
            nothing. Its scale is [R or P, 1], or of groups of 128 columns [G, P, 4], where [..., 0]
            are written: in rows of 16 bytes copies can begin anywhere. With a global_scale [P],
            sums are kept in units of the group at hand: that is the last group's scale, and each
            group has the scale before over its own, the first one 1. No scale counts for less than
            2**-90 of its row's largest, lest sums in that unit overflow. (Not of less: a group of
            zeros has a scale of 1, whatever the others have)
    """
    assert out.scale is not None
    columns = x.shape[1]
    group = fmt.block[1] or max(triton.next_power_of_2(columns), 32)
    groups = triton.next_power_of_2(-(-max(columns, out.data.shape[1]) // group))
    more = pairs or Pairs(x, 1, 0)
    launch(
        quantize_kernel, (len(x) if pairs is None else pairs.ids.numel(),),
        x, places and places.inverse,
        None if pairs is None else pairs.ids.contiguous(),
        None if more.router is None else more.router.contiguous(), more.pre_scale,
        out.data, out.scale, out.global_scale,
        1 if pairs is None else pairs.ids.shape[1], more.first_expert, columns, out.scale.shape[-2],
        SLOTS=places.shared if places else 1, WIDTH=out.data.shape[1], STRIDE=out.data.stride(0),
        ONCE=places is not None and places.once, GROUP=group, GROUPS=groups,
        GROUPED=fmt.block[1] is not None, KIND="int8" if isinstance(fmt, Int8) else "fp8",
        NATIVE=rounds_to_e4m3(x.device),
        num_warps=4 if group * groups <= 4096 else 8,
    )  # fmt: skip


@triton.jit
def _units(scale, GROUPS: tl.constexpr, LAST):
    """Each group's scale as the one before over it, and the last one; see `quantize`."""
    g = tl.arange(0, GROUPS)
    scale = tl.maximum(scale, tl.max(scale, axis=0) * 8.077935669463161e-28)
    earlier = g[None, :] == tl.maximum(g - 1, 0)[:, None]
    before = tl.sum(tl.where(earlier, scale[None, :], 0.0), axis=1)
    return tl.div_rn(before, scale), tl.sum(tl.where(g == LAST, scale, 0.0), axis=0)


@triton.jit
def _places(inverse_ptr, source, SLOTS: tl.constexpr):
    """The positions of a row, -1 for none; all are read before any store, lest they wait for it."""
    positions = ()
    for slot in tl.static_range(SLOTS):
        if inverse_ptr is None:
            positions = positions + (source,)
        else:
            positions = positions + (tl.load(inverse_ptr + source * SLOTS + slot).to(tl.int64),)
    return positions


@triton.jit
def _store_row(out_ptr, at, values, inside, positions, SLOTS: tl.constexpr, STRIDE: tl.constexpr):
    """Part of a row to all its positions."""
    for slot in tl.static_range(SLOTS):
        known = only_if(positions[slot] >= 0, inside)
        tl.store(out_ptr + positions[slot] * STRIDE + at, values, mask=known)


@triton.jit(do_not_specialize=["first_expert", "count"])
def quantize_kernel(
    x_ptr, inverse_ptr, ids_ptr, router_ptr, pre_ptr, out_ptr, scale_ptr, last_ptr,
    top_k, first_expert, columns, count,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, ONCE: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUPED: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """count: of positions."""
    source = tl.program_id(0).to(tl.int64)
    positions = _places(inverse_ptr, source, SLOTS)
    if ids_ptr is not None and positions[0] < 0:
        return
    g = tl.arange(0, GROUPS)
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = k < columns
    x = widen(tl.load(x_ptr + source // top_k * columns + k, mask=inside, other=0.0))
    if router_ptr is not None:
        x = x * widen(tl.load(router_ptr + source))
    if pre_ptr is not None:
        expert = tl.load(ids_ptr + source).to(tl.int64) - first_expert
        x = x * tl.load(pre_ptr + expert * columns + k, mask=inside, other=0.0)
    scale = scale_of(tl.max(abs_bits(x), axis=1).to(tl.float32, bitcast=True), KIND)
    codes = code_values(encode_scaled(x, scale, KIND, NATIVE), KIND, NATIVE)
    codes = round_to(codes, out_ptr.dtype.element_ty)
    if inverse_ptr is not None:
        # 32 columns: t s j h in memory, s j t h in the order of operands.
        codes = tl.reshape(codes, (GROUPS * GROUP // 32, 4, 4, 2))
        codes = tl.reshape(tl.permute(codes, (0, 2, 1, 3)), (GROUPS, GROUP))
    last = (columns + GROUP - 1) // GROUP - 1
    if last_ptr is not None:
        scale, last_scale = _units(scale, GROUPS, last)
    if ONCE:
        tl.store(out_ptr + source * STRIDE + k, codes, mask=k < WIDTH)
        if not GROUPED:
            tl.store(scale_ptr + source + g, scale, mask=g < 1)
    else:
        _store_row(out_ptr, k, codes, k < WIDTH, positions, SLOTS, STRIDE)
    for slot in tl.static_range(SLOTS):
        known = positions[slot] >= 0
        if GROUPED:
            at = scale_ptr + (g.to(tl.int64) * count + positions[slot]) * 4
            tl.store(at, scale, mask=only_if(known, g <= last))
        elif not ONCE:
            tl.store(scale_ptr + positions[slot] + g, scale, mask=only_if(known, g < 1))
        if last_ptr is not None:
            tl.store(last_ptr + positions[slot], last_scale, mask=known)


def order(x: Tensor, out: Rows, places: Places | None = None) -> None:
    """Rows of x with columns in the order of `hopper_layout`'s operands, and then zeros.

    x:   [R, K] of 16 bits, a multiple of 2 of them
    out: data [R, W], with `places` [P, W] by position; with a scale [R or P, 1] bf16 rows in fp16,
         times the power of two that brings the largest of each to 2**14 .. 2**15: bit for bit the
         rows of `triton_ops.quantize_rows(..., dtype=torch.float16)`
    """
    width, words = out.data.shape[1] // 2, x.shape[1] // 2
    block = min(triton.next_power_of_2(width), _WORDS)
    launch(
        order_kernel, (len(x),),
        x.view(torch.int32), places and places.inverse, out.data.view(torch.int32), out.scale,
        SLOTS=places.shared if places else 1, WORDS=words, WIDTH=width,
        STRIDE=out.data.stride(0) // 2, BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip


@triton.jit
def _load_words(x_ptr, start, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Words start .. start + BLOCK of a row in memory's order, zeros behind the last."""
    word = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + word, mask=word < WORDS, other=0)


@triton.jit
def _low_half(word):
    """The first of two bf16 numbers, in fp32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high_half(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _row_exponent(x_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """The biased exponent of the largest number of a row, within what can be brought to 2**14."""
    top = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, WORDS, BLOCK):
        word = _load_words(x_ptr, start, WORDS, BLOCK)
        top = tl.maximum(top, tl.maximum(abs_bits(_low_half(word)), abs_bits(_high_half(word))))
    return tl.minimum(tl.maximum(tl.max(top, axis=0) >> 23, 15), 254)


@triton.jit
def _to_half(x):
    """fp32 to the bits of fp16."""
    return round_to(x, tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def order_kernel(
    x_ptr, inverse_ptr, out_ptr, scale_ptr,
    SLOTS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0).to(tl.int64)
    x_ptr += source * WORDS
    gdc_launch_dependents()
    positions = _places(inverse_ptr, source, SLOTS)
    if scale_ptr is not None:
        exponent = _row_exponent(x_ptr, WORDS, BLOCK)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    for start in range(0, WIDTH, BLOCK):
        word = _load_words(x_ptr, start, WORDS, BLOCK)
        if scale_ptr is not None:
            word = _to_half(_low_half(word) * up) | (_to_half(_high_half(word) * up) << 16)
        # Words of 32 columns: t s j in memory, s j t in the order of operands.
        word = tl.trans(tl.reshape(word, (BLOCK // 16, 4, 4)), (0, 2, 1)).reshape((BLOCK,))
        word = word.to(tl.int32)
        to = start + tl.arange(0, BLOCK)
        _store_row(out_ptr, to, word, to < WIDTH, positions, SLOTS, STRIDE)
    if scale_ptr is not None:
        for slot in tl.static_range(SLOTS):
            tl.store(scale_ptr + positions[slot], scale, mask=positions[slot] >= 0)
