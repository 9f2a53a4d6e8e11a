"""Products of 96 tokens in one instruction. Gluon has none: its tensors are powers of two.

Two, of 64 and 32 tokens, would cost as much as one of 128: with its left operand in registers, an
instruction takes as long for 32 as for 64. So this is wgmma m64n96k16 as inline PTX. Sums come as
three tensors of 32 tokens, whose registers, one tensor's after the other's, are those of 96.

The instruction wants to know where its right operand lies in shared memory, which Gluon does not
tell either: see `find`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Of a thread: of a third of the sums, and of a row tile's chunk.
_REGISTERS = 16
# Of a descriptor of rows of 128 bytes, K contiguous: 8 rows are a kilobyte, bytes swizzled by 128.
_LOW, _HIGH = gl.constexpr(1 << 16), 64 | 1 << 30


def _ptx(kind: str) -> str:
    """Four steps of 16 columns, in flight.

    Sums are $0 .. $47, and come in there too; then $96 .. $111 the left operand, and, as often,
    the low word of the right one's descriptor.
    """
    sums = ", ".join(f"${i}" for i in range(3 * _REGISTERS))
    left = 6 * _REGISTERS
    lines = [
        "{.reg .b64 right; .reg .b32 low, high;",
        "wgmma.fence.sync.aligned;",
        f"mov.b32 high, {_HIGH};",
    ]
    for step in range(4):
        # The instruction wants rows g and g + 8 of the first 8 columns, then of the others.
        own = ", ".join(f"${left + 4 * step + i}" for i in (0, 2, 1, 3))
        lines += [
            f"add.u32 low, ${left + _REGISTERS}, {2 * step};",
            "mov.b64 right, {low, high};",
            f"wgmma.mma_async.sync.aligned.m64n96k16.f32.{kind}.{kind}",
            f"{{{sums}}}, {{{own}}}, right, 1, 1, 1, 0;",
        ]
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;}"])


_BF16, _FP16 = gl.constexpr(_ptx("bf16")), gl.constexpr(_ptx("f16"))
_CONSTRAINTS = gl.constexpr(
    ",".join(
        ["=f"] * (3 * _REGISTERS)
        + [str(i) for i in range(3 * _REGISTERS)]
        + ["r"] * (2 * _REGISTERS)
    )
)


@gluon.jit
def multiply(acc, left, place, OPERAND: gl.constexpr):
    """Sums of three times 32 tokens, [64, 32], + a row tile's chunk @ x: in flight.

    left:  the chunk's registers (`hopper_fragments`), uint32 [64, 32] in the layout of the sums
    place: where the chunk of x begins
    """
    TEXT: gl.constexpr = _BF16 if OPERAND == gl.bfloat16 else _FP16
    low = (place & 0x3FFFF) >> 4 | _LOW
    low = gl.full([64, 32], 0, gl.int32, acc[0].type.layout) + low
    return gl.inline_asm_elementwise(
        TEXT, _CONSTRAINTS, [acc[0], acc[1], acc[2], left, low],
        (gl.float32, gl.float32, gl.float32), is_pure=False, pack=16,
    )  # fmt: skip


@gluon.jit
def find(x):
    """Where a buffer [n, tokens, 64] of 16 bits begins in shared memory, which must be unused.

    Every kilobyte gets its number; a swizzled buffer begins with one, and is asked for it.
    """
    number = gl.arange(0, 256, gl.BlockedLayout([2], [32], [gl.num_warps()], [0]))
    gl.inline_asm_elementwise(
        """{.reg .b32 at, size; .reg .pred inside;
        shl.b32 at, $1, 10;
        mov.u32 size, %dynamic_smem_size;
        setp.lt.u32 inside, at, size;
        mov.u32 $0, global_smem;
        add.u32 at, at, $0;
        @inside st.shared.b32 [at], $1;}""",
        "=&r,r", [number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    gl.thread_barrier()
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = x.index(0).slice(0, 8, 0).load(L).to(gl.int16, bitcast=True).to(gl.int32)
    row = gl.arange(0, 8, gl.SliceLayout(1, L))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, L))[None, :]
    first = gl.max(gl.max(gl.where((row == 0) & (column == 0), rows, 0), 1), 0)
    return gl.inline_asm_elementwise(
        "{.reg .b32 start; mov.u32 start, global_smem; mad.lo.u32 $0, $1, 1024, start;}",
        "=r,r", [first], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
