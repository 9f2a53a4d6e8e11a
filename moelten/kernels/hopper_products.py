"""Products of a whole warpgroup for any multiple of 8 tokens, in one instruction.

Gluon has them for powers of two, which is what tensors' sizes can be, and several small ones cost
more: with its left operand in registers, an instruction takes half a cycle per token, but 13 to 15
cycles for 8 to 24 (H200). So this is wgmma as inline PTX. Sums come as tensors of 8 tokens, whose
registers, one tensor's after the other's, are the instruction's.

About half of those cycles are taken from what other warps decode meanwhile: among four warpgroups
with 40 integer and bf16 instructions for each product, one adds 6 cycles for 16 tokens, 8 for 24
and 32, 13 for 48, 17 for 64 and 26 for 96 (H200; from shared memory an operand saves at most 3).

It wants to know where its right operand lies in shared memory, which Gluon does not tell either:
see `find`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moelten.kernels.gluon_names import wait_for_all

# Tokens of a tensor of sums, and its registers of a thread; the left operand's are as many.
TOKENS = gl.constexpr(8)
# Of activations in shared memory, rows of 64.
TOKEN_BOXES = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_REGISTERS = 4
# Of a descriptor of rows of 128 bytes, K contiguous: 8 rows are a kilobyte, bytes swizzled by 128.
_LOW, _HIGH = gl.constexpr(1 << 16), 64 | 1 << 30


@gluon.constexpr_function
def sums_layout(warps):
    """Sums [16 * warps, 8]."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, 8, 16])


@gluon.constexpr_function
def _ptx(count, tokens, places, operand):
    """Two steps of 16 columns for each of some places, in flight, for `count` tensors of sums.

    Those are the first operands, and come in behind themselves; then the left operand of each
    step, and the low word of the right one's descriptor, to which places are added: to both words,
    which is one instruction, while another high word for each place would be one more.
    """
    kind = "bf16" if operand == gl.bfloat16 else "f16"
    sums = ", ".join(f"${i}" for i in range(tokens // 2))
    left = 2 * count * _REGISTERS
    lines = [
        "{.reg .b64 first, right;",
        "wgmma.fence.sync.aligned;",
        f"mov.b64 first, {{${left + 2 * len(places) * _REGISTERS}, {_HIGH}}};",
    ]
    for index, place in enumerate(places):
        for step in range(2):
            # The instruction wants rows g and g + 8 of the first 8 columns, then of the others.
            at = left + (2 * index + step) * _REGISTERS
            own = ", ".join(f"${at + i}" for i in (0, 2, 1, 3))
            lines += [
                f"add.u64 right, first, {(place >> 4) + 2 * step};",
                f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind}",
                f"{{{sums}}}, {{{own}}}, right, 1, 1, 1, 0;",
            ]
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;}"])


@gluon.constexpr_function
def _constraints(count, others):
    """Of so many tensors of sums, which come in behind themselves, and of other operands."""
    sums = count * _REGISTERS
    return ",".join(["=f"] * sums + [str(i) for i in range(sums)] + ["r"] * others * _REGISTERS)


@gluon.constexpr_function
def _types(count):
    return (gl.float32,) * count


@gluon.jit
def multiply(acc, left, x, N: gl.constexpr, PLACES: gl.constexpr, OPERAND: gl.constexpr):
    """Sums [rows, 8] of N tokens + halves of a band's chunks @ x: in flight.

    left:   of each half the registers of twice 16 columns (`hopper_fragments`), uint32 [rows, 8] in
            the layout of sums
    x:      where activations begin
    PLACES: how far behind that those of each half do
    """
    COUNT: gl.constexpr = len(acc)
    PTX: gl.constexpr = _ptx(COUNT, N, PLACES, OPERAND)
    CONSTRAINTS: gl.constexpr = _constraints(COUNT, 2 * len(PLACES) + 1)
    TYPES: gl.constexpr = _types(COUNT)
    low = (x & 0x3FFFF) >> 4 | _LOW
    low = gl.full(acc[0].shape, 0, gl.int32, acc[0].type.layout) + low
    return gl.inline_asm_elementwise(
        PTX, CONSTRAINTS, acc + left + (low,), TYPES, is_pure=False, pack=4
    )


@gluon.constexpr_function
def _wait_ptx(others):
    return f"wgmma.wait_group.sync.aligned {others};"


@gluon.jit
def wait_for_products(acc, OTHERS: gl.constexpr):
    """Sums whose products are complete, all but those of the last so many `multiply`.

    In PTX, since Gluon has all warps wait for each other there in later Tritons.
    """
    COUNT: gl.constexpr = len(acc)
    PTX: gl.constexpr = _wait_ptx(OTHERS)
    CONSTRAINTS: gl.constexpr = _constraints(COUNT, 0)
    TYPES: gl.constexpr = _types(COUNT)
    return gl.inline_asm_elementwise(PTX, CONSTRAINTS, acc, TYPES, is_pure=False, pack=4)


@gluon.jit
def number_memory():
    """Write its number into every kilobyte of shared memory, for `find`.

    Gluon does not know of these stores: buffers to be found must have been allocated, and nothing
    may be kept in any yet.
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
    wait_for_all()


@gluon.jit
def find(x):
    """Where a buffer [n, tokens, 64] of 16 bits begins in shared memory, after `number_memory`.

    A swizzled buffer begins with a kilobyte, and is asked for its number. What follows from where
    it is, all waits at barriers among it, is the same for all lanes, as the last instruction tells
    the assembler: that of CUDA 13 (later Tritons) else takes loops for divergent, and spills.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = x.index(0).slice(0, 8, 0).load(L).to(gl.int16, bitcast=True).to(gl.int32)
    row = gl.arange(0, 8, gl.SliceLayout(1, L))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, L))[None, :]
    first = gl.max(gl.max(gl.where((row == 0) & (column == 0), rows, 0), 1), 0)
    return gl.inline_asm_elementwise(
        """{.reg .b32 start; mov.u32 start, global_smem; mad.lo.u32 start, $1, 1024, start;
        redux.sync.max.s32 $0, start, 0xffffffff;}""",
        "=r,r", [first], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
