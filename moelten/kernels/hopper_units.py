"""Sums [rows, tokens] that are kept in units of a scale, in Gluon.

Scales of groups do not get sums of their own: sums are kept in units of the scale at hand, and
brought to the next one's before its products are added. That is one multiplication per element, as
adding up sums of groups would be, but needs no second set of registers, so tiles stay large.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.hopper_bands import take_scale, take_token_scales
from moelten.kernels.hopper_fragments import no_sums
from moelten.kernels.hopper_products import TOKENS, sums_layout


@gluon.jit
def begin(ring, slot, chunk, N: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr):
    """No sums of N tokens yet, and units of the first chunk's scales, for each band.

    A first group of zeros has some unit, less than any that follows.
    """
    SUMS: gl.constexpr = sums_layout(P.variant.warps)
    acc = ()
    unit = ()
    for b in gl.static_range(BANDS):
        own = 0
        if P.scaled:
            own = take_scale(ring, slot, b, chunk, 0, P)
            own = gl.where(own == 0, 1.1754943508222875e-38, own)
        acc = acc + (no_sums(-(-N // TOKENS), TOKENS, SUMS),)
        unit = unit + (own,)
    return acc, unit


@gluon.jit
def in_units(acc, unit, scale, ring, slot, group: gl.constexpr, P: gl.constexpr):
    """A band's sums in units of other scales, fp32 [rows]: (sums, the rows' units).

    slot, group: where the factors of tokens are, if any
    """
    acc, unit = _rescale(acc, unit, scale)
    if P.variant.grouped:
        acc = _times_tokens(acc, ring, slot, group, P)
    return acc, unit


@gluon.jit
def finish(acc, unit, BANDS: gl.constexpr, P: gl.constexpr):
    """The sums themselves, complete, band after band."""
    out = ()
    for b in gl.static_range(BANDS):
        own = _complete(acc[b])
        if P.scaled:
            own = _complete(_times(own, unit[b]))
        out = out + own
    return out


@gluon.jit
def _times(acc, rows):
    """Every row of the sums times a number [rows]."""
    SUMS: gl.constexpr = acc[0].type.layout
    rows = gl.convert_layout(rows, gl.SliceLayout(1, SUMS), assert_trivial=True).expand_dims(1)
    out = ()
    for i in gl.static_range(len(acc)):
        out = out + (acc[i] * rows,)
    return out


@gluon.jit
def _times_tokens(acc, ring, slot, group: gl.constexpr, P: gl.constexpr):
    """Every token's sums times a number of its own."""
    SUMS: gl.constexpr = acc[0].type.layout
    out = ()
    for i in gl.static_range(len(acc)):
        out = out + (acc[i] * take_token_scales(ring, slot, group, i * TOKENS, SUMS, P),)
    return out


@gluon.jit
def _rescale(acc, unit, scale):
    """Sums in units of `unit`, fp32 [rows], brought to units of a scale: (sums, the new unit).

    Nothing but codes of zero has a scale of 0 or below 2**-60 of another's (`hopper_layout`): there
    the unit stays, and sums stay finite. By the same unit it is exactly 1, which the quotient of
    equal numbers need not be: how often a group's scale is taken does not change bits.
    """
    scale = gl.where(gl.abs(scale) <= gl.abs(unit) * 8.673617379884035e-19, unit, scale)
    return _times(acc, gl.where(unit == scale, 1.0, gl.fdiv(unit, scale))), scale


@gluon.jit
def _complete(acc):
    """The same sums. The compiler does not move what follows to where products are in flight, nor
    what comes before to where they are used, for which there are no registers."""
    out = ()
    for i in gl.static_range(len(acc)):
        own = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [acc[i]], dtype=gl.float32, is_pure=False, pack=1
        )
        out = out + (own,)
    return out
