"""Operands of the Hopper decode GEMM, in Gluon: from packed words in registers to m16n8k16.

A program's warps split the columns: at every step each has a chunk of 64 of its own, so tensors
here start with an axis of warps, and nothing moves between lanes. Weights arrive as `hopper_layout`
stores them, by row group: 16 rows, 16 bytes per lane and load. Activations arrive as rows, 8
columns of a token per lane. Both become operands by renaming registers, which every
`assert_trivial` proves when the kernel is compiled, and by the arithmetic of `hopper_codes`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

_MOVE = gl.constexpr("mov.b32 $0, $2; mov.b32 $1, $3;")


@gluon.constexpr_function
def powers(values):
    """Powers of two below `values`."""
    return [1 << i for i in range((values - 1).bit_length())]


@gluon.constexpr_function
def _repeat(dtype, count):
    return (dtype,) * count


@gluon.constexpr_function
def load_layout(warps, loads):
    """A row group's words of a chunk per warp, [warps, loads, 128]: 16 bytes per lane, load."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2]] + [[0, b, 0] for b in powers(loads)],
        lane_bases=[[0, 0, 4 << i] for i in range(5)],
        warp_bases=[[b, 0, 0] for b in powers(warps)],
        block_bases=[],
        shape=[warps, loads, 128],
    )


@gluon.constexpr_function
def _word_layout(warps, loads):
    """The same words as [warps, loads, g, t, x, h]; the last two are a load's four words."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]]
        + [[0, b, 0, 0, 0, 0] for b in powers(loads)],
        lane_bases=[[0, 0, 0, b, 0, 0] for b in (1, 2)] + [[0, 0, b, 0, 0, 0] for b in (1, 2, 4)],
        warp_bases=[[b, 0, 0, 0, 0, 0] for b in powers(warps)],
        block_bases=[],
        shape=[warps, loads, 8, 4, 2, 2],
    )


@gluon.constexpr_function
def pair_layout(warps):
    """Row parameters that join the operands, [warps, g, t]."""
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[b, 0, 0] for b in powers(warps)],
        block_bases=[],
        shape=[warps, 8, 4],
    )


@gluon.constexpr_function
def scale_layout(warps, words):
    """Row parameters that multiply sums, [warps, g, words]; a quad has the same ones."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, b] for b in powers(words)],
        lane_bases=[[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[b, 0, 0] for b in powers(warps)],
        block_bases=[],
        shape=[warps, 8, words],
    )


@gluon.constexpr_function
def token_layout(warps, tokens):
    """Activations of one chunk per warp, [blocks of 32 columns, tokens, 16 words]."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [1, 0, 0]] + [[0, b, 0] for b in (8, 16) if b < tokens],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[2 * b, 0, 0] for b in powers(warps)],
        block_bases=[],
        shape=[2 * warps, tokens, 16],
    )


@gluon.constexpr_function
def sum_layout(warps, tokens):
    """Sums [warps, row group, b, g, tokens]: a lane has those of all warps, and gate beside up."""
    spread, own = powers(tokens), len(powers(warps))
    return gl.DistributedLinearLayout(
        reg_bases=[[b, 0, 0, 0, 0] for b in powers(warps)]
        + [[0, 0, 1, 0, 0]]
        + [[0, 0, 0, 0, b] for b in spread[own:]],
        lane_bases=[[0, 0, 0, b, 0] for b in (1, 2, 4)] + [[0, b, 0, 0, 0] for b in (1, 2)],
        warp_bases=[[0, 0, 0, 0, b] for b in spread[:own]],
        block_bases=[],
        shape=[warps, 4, 2, 8, tokens],
    )


@gluon.jit
def _registers(d, LOADS: gl.constexpr):
    """The registers of operands [warps, 16, 64] as uint32 [rows, 32]: rows, and j t s c."""
    if LOADS == 1:  # axes warp load g t b c, j s
        a = gl.join(gl.join(d[0], d[1]), gl.join(d[2], d[3])).permute((0, 4, 2, 1, 5, 7, 3, 6))
    elif LOADS == 2:  # warp c g t b s, j
        a = gl.join(d[0], d[1]).permute((0, 4, 2, 1, 5, 3, 6))
    else:  # warp cs g t b j
        a = d[0].permute((0, 4, 2, 1, 3, 5))
    return a.reshape([16 * a.shape[0], 32])


@gluon.jit
def _decode(words, pairs, W: gl.constexpr, OPERAND: gl.constexpr):
    """A row group's words of a chunk, [warps, loads, 128], to operands [warps, 16, 64]."""
    WARPS: gl.constexpr = words.shape[0]
    LOADS: gl.constexpr = words.shape[1]
    PTX: gl.constexpr = W.code.ptx
    CONSTRAINTS: gl.constexpr = W.code.constraints
    WHOLE: gl.constexpr = OPERAND == gl.uint32
    TYPES: gl.constexpr = _repeat(OPERAND, W.code.registers // (4 if WHOLE else 2))
    LAYOUT: gl.constexpr = _word_layout(WARPS, LOADS)
    w = gl.convert_layout(words.reshape([WARPS, LOADS, 8, 4, 2, 2]), LAYOUT, assert_trivial=True)
    if W.code.pair == "":
        d = gl.inline_asm_elementwise(PTX, CONSTRAINTS, [w], TYPES, is_pure=True, pack=4)
    else:
        w, pairs = gl.broadcast(w, pairs)
        d = gl.inline_asm_elementwise(PTX, CONSTRAINTS, [w, pairs], TYPES, is_pure=True, pack=4)
    return _registers(d, LOADS) if WHOLE else _elements(d, LOADS)


@gluon.jit
def _elements(d, LOADS: gl.constexpr):
    """Operands [warps, 16, 64] from what a code returns."""
    if LOADS == 1:  # axes warp load g t c h, b j s
        low = gl.join(gl.join(d[0], d[1]), gl.join(d[2], d[3]))
        high = gl.join(gl.join(d[4], d[5]), gl.join(d[6], d[7]))
        a = gl.join(low, high).permute((0, 6, 2, 1, 4, 8, 7, 3, 5))
    elif LOADS == 2:  # warp c g t s h, b j
        a = gl.join(gl.join(d[0], d[1]), gl.join(d[2], d[3])).permute((0, 6, 2, 1, 4, 7, 3, 5))
    else:  # warp cs g t j h, b
        a = gl.join(d[0], d[1]).permute((0, 6, 2, 1, 4, 3, 5))
    return a.reshape([a.shape[0], 16, 64])


@gluon.jit
def _beside(words, CODE: gl.constexpr, LOADS: gl.constexpr, SAME: gl.constexpr):
    """Row parameters of a chunk, words [warps, g, t], as pairs beside the words of `_decode`.

    With words [warps, g, t, c] each block has its own word.
    SAME: one group has both blocks of the chunk.
    """
    PTX: gl.constexpr = CODE.ptx
    CONSTRAINTS: gl.constexpr = CODE.constraints
    TYPES: gl.constexpr = _repeat(gl.uint32, CODE.registers)
    LAYOUT: gl.constexpr = _word_layout(words.shape[0], LOADS)
    pairs = gl.inline_asm_elementwise(PTX, CONSTRAINTS, [words], TYPES, is_pure=True, pack=1)
    if len(words.shape) == 4:
        p = pairs[0]
    else:
        p = gl.join(pairs[0], pairs[0] if SAME else pairs[1])  # warp g t c
    if LOADS == 1:  # c is an axis of the words, s the other
        p = gl.convert_layout(p, gl.SliceLayout(1, gl.SliceLayout(5, LAYOUT)), assert_trivial=True)
        return p.expand_dims(1).expand_dims(5)
    else:  # c is the load
        p = p.permute((0, 3, 1, 2))
        p = gl.convert_layout(p, gl.SliceLayout(4, gl.SliceLayout(5, LAYOUT)), assert_trivial=True)
        return p.expand_dims(4).expand_dims(5)


@gluon.jit
def tokens(words, WARPS: gl.constexpr, TOKENS: gl.constexpr, OPERAND: gl.constexpr):
    """Activations of a chunk, words [2 * warps, tokens, 16], as [warps, 64 columns, tokens]."""
    w = words.reshape([WARPS, 2, TOKENS, 4, 2, 2])
    first, second = gl.inline_asm_elementwise(
        _MOVE, "=r,=r,r,r", [w], _repeat(OPERAND, 2), is_pure=True, pack=2
    )
    # Axes warp c token t s h, j; columns in the order of the operands.
    b = gl.join(first, second).permute((0, 1, 4, 6, 3, 5, 2))
    return b.reshape([WARPS, 64, TOKENS])


@gluon.jit
def _dot(a, b, acc):
    MMA: gl.constexpr = acc.type.layout
    a = gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    b = gl.convert_layout(b, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
    return mma_v2(a, b, acc)


@gluon.jit
def _row_scale(x, acc):
    """fp32 pairs [warps, g, b] beside the sums [warps, 16 rows, tokens]."""
    rows = x.permute((0, 2, 1)).reshape([x.shape[0], 16])
    rows = gl.convert_layout(rows, gl.SliceLayout(2, acc.type.layout), assert_trivial=True)
    return rows.expand_dims(2)


@gluon.jit
def floats(words, W: gl.constexpr, TYPE: gl.constexpr):
    """Scales of a chunk, words [warps, g, n], to fp32 [warps, g, b, c]."""
    if W.pairs is not None:
        PTX: gl.constexpr = W.pairs.ptx
        CONSTRAINTS: gl.constexpr = W.pairs.constraints
        pairs = gl.inline_asm_elementwise(
            PTX, CONSTRAINTS, [words], _repeat(gl.uint32, 2), is_pure=True, pack=1
        )
        words = gl.join(pairs[0], pairs[1]).reshape([words.shape[0], 8, 2])
    if TYPE == "float32":
        values = words.to(gl.float32, bitcast=True)
        values = values.reshape([words.shape[0], 8, words.shape[2] // 2, 2])
    elif TYPE == "float16":
        low = (words & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True)
        high = (words >> 16).to(gl.uint16).to(gl.float16, bitcast=True)
        values = gl.join(low, high).to(gl.float32)
    else:
        low = (words << 16).to(gl.float32, bitcast=True)
        values = gl.join(low, (words & 0xFFFF0000).to(gl.float32, bitcast=True))
    return values.permute((0, 1, 3, 2))


@gluon.constexpr_function
def _rows(layout):
    return 16 * layout.warps_per_cta[0]


@gluon.jit
def no_sums(COUNT: gl.constexpr, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """So many tensors of sums of a band, [rows, tokens], before anything is added."""
    ROWS: gl.constexpr = _rows(LAYOUT)
    return (gl.zeros([ROWS, TOKENS], gl.float32, LAYOUT),) * COUNT


@gluon.jit
def cut(x):
    """A tensor of two dimensions for each index of those beyond, of which the last counts most."""
    if len(x.shape) == 2:
        return (x,)
    else:
        low, high = gl.split(x)
        return cut(low) + cut(high)


@gluon.jit
def halves(x):
    """[warps, 16, 64] or [warps, 64, tokens] cut into its two blocks of 32 columns."""
    if x.shape[1] == 16:
        return gl.split(x.reshape([x.shape[0], 16, 2, 32]).permute((0, 1, 3, 2)))
    else:
        return gl.split(x.reshape([x.shape[0], 2, 32, x.shape[2]]).permute((0, 2, 3, 1)))


@gluon.jit
def operands(words, scale, zero, W: gl.constexpr, OPERAND: gl.constexpr):
    """A row group's weights of a chunk per warp, [warps, 16, 64].

    words: [warps, loads, 128]
    scale: words [warps, g, t] or, for each block, [warps, g, t, c], where scales join the operands
    zero:  words [warps, g, t], the chunk's zero points lowest
    """
    LOADS: gl.constexpr = words.shape[1]
    if W.scale == "fold":
        PAIRS: gl.constexpr = W.pairs
        return _decode(words, _beside(scale, PAIRS, LOADS, not W.by_chunk), W, OPERAND)
    elif W.zeros is not None:
        ZEROS: gl.constexpr = W.zeros
        return _decode(words, _beside(zero, ZEROS, LOADS, W.group != 32), W, OPERAND)
    else:
        return _decode(words, None, W, OPERAND)


@gluon.jit
def multiply(
    acc, words, scale, x_scale, zero, b, W: gl.constexpr, SCALE: gl.constexpr, OPERAND: gl.constexpr
):
    """acc + (a row group's weights of a chunk) @ b.

    scale:   words [warps, g, n] if it acts here
    x_scale: fp32 [warps, tokens], if activations have scales for the group of the chunk
    """
    a = operands(words, scale, zero, W, OPERAND)
    if W.scale == "group" or W.scale == "block":
        s = floats(scale, W, SCALE)
        if s.shape[3] == 1:
            part = _dot(a, b, gl.zeros_like(acc))
            factor = _row_scale(s.reshape([s.shape[0], 8, 2]), acc)
            if x_scale is not None:
                factor = factor * x_scale.expand_dims(1)
            return acc + part * factor
        else:
            a0, a1 = halves(a)
            b0, b1 = halves(b)
            s0, s1 = gl.split(s)
            acc += _dot(a0, b0, gl.zeros_like(acc)) * _row_scale(s0, acc)
            return acc + _dot(a1, b1, gl.zeros_like(acc)) * _row_scale(s1, acc)
    else:
        return _dot(a, b, acc)


@gluon.constexpr_function
def _words_per_group(storage, scale_type):
    return 2 if storage.pairs is None and scale_type == "float32" else 1


@gluon.constexpr_function
def _words_per_chunk(storage, scale_type):
    """Words of a chunk's scales that one lane needs."""
    if storage.pairs is not None:
        return 1
    return max(64 // storage.group, 1) * _words_per_group(storage, scale_type)


@gluon.constexpr_function
def parameter_strides(storage, scale_type, zeros):
    """Words from one super-block, row group and g of scales (or zero points) to the next.

    Of scales those of a g are of half a super-block.
    """
    if zeros:
        per_g = 2 if storage.group == 32 else 1
        return 32 * per_g, 8 * per_g, per_g
    if storage.scale == "block":
        return 4, 0, 0
    if storage.pairs is not None:
        per_g = 4 if storage.group == 16 else 2
    else:
        per_g = 128 // storage.group * _words_per_group(storage, scale_type)
    return 64 * per_g, 8 * per_g, per_g


@gluon.jit
def scale_words(W: gl.constexpr, SCALE: gl.constexpr, WARPS: gl.constexpr):
    """Each warp's index, and where a lane's scales of a chunk lie, [warps, g, t] or [warps, g, n].

    Counted from the chunk's first in a row group; see `chunk_word`.
    """
    STRIDES: gl.constexpr = parameter_strides(W, SCALE, False)
    if W.scale == "fold":
        FOLD: gl.constexpr = pair_layout(WARPS)
        warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, FOLD)))[:, None, None]
        g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, FOLD)))[None, :, None]
        t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, FOLD)))[None, None, :]
        at = g * STRIDES[2] + t // 2 * (STRIDES[2] - 2)
    else:
        WORDS: gl.constexpr = _words_per_chunk(W, SCALE)
        SUM: gl.constexpr = scale_layout(WARPS, WORDS)
        warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, SUM)))[:, None, None]
        g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, SUM)))[None, :, None]
        n = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, SUM)))[None, None, :]
        at = g * STRIDES[2] + n
    return warp, at


@gluon.jit
def chunk_word(chunk, W: gl.constexpr, SCALE: gl.constexpr):
    """First word of a chunk's scales within its super-block."""
    HALF: gl.constexpr = parameter_strides(W, SCALE, False)[0] // 2
    first = chunk % 4 // 2 * HALF
    if W.pairs is not None:
        return first + chunk % 2
    else:
        return first + chunk % 2 * 64 // W.group * _words_per_group(W, SCALE)


@gluon.jit
def zero_words(W: gl.constexpr, WARPS: gl.constexpr):
    """Each warp's index, and where a lane's zero points lie, [warps, g, t]; see `chunk_zero`."""
    STRIDES: gl.constexpr = parameter_strides(W, "", True)
    L: gl.constexpr = pair_layout(WARPS)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    return warp, g * STRIDES[2] + t * 0


@gluon.jit
def chunk_zero(chunk, W: gl.constexpr):
    """Word and bit of a chunk's zero points within its super-block."""
    if W.group == 32:
        return chunk % 4 // 2, chunk % 2 * 8
    elif W.group == 0:
        return chunk * 0, chunk * 0
    else:
        return chunk * 0, chunk % 4 * 64 // W.group * 4
