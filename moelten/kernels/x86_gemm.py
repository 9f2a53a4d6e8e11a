"""W4A16 grouped GEMM on x86 CPUs with AVX512-BF16, and on AMX where it is: layout and driver.

Any 16-entry code table with one scale per (row, group along K). Layout of a matrix [N, K]: blocks
of 16 rows x 32 k, [ceil(N/16), ceil(K/32), 256] bytes. Each of a block's 64-byte lines is 32 words
of 16 bits; word 2n + i holds in bits 4s..4s+3 the code of row n at k = 8 * line + 2s + i, so that a
shift and a table lookup give 32 bf16 weights in the order that the dot products read. Scales are
[ceil(N/16), groups, 16]. Padding is code 0 and must be worth zero. No zero points, no group that is
not a multiple of 32: other backends do those. `x86_jit` makes the native code.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, COLUMNS = 16, 32
_SCALE_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "e8m0",
}
_ITEMS_PER_THREAD = 8  # enough to even out experts of different load


@cache
def unavailable() -> str | None:
    """None when this machine can run the kernels, else what is missing and what to do."""
    try:
        from llvmlite import binding
    except ImportError as error:
        return f"needs llvmlite >= 0.45, which is not here ({error}); pip install 'moelten[cpu]'"
    if binding.llvm_version_info < (20,):
        found = ".".join(map(str, binding.llvm_version_info))
        return (
            f"needs llvmlite >= 0.45 (LLVM 20), found LLVM {found}; pip install -U 'moelten[cpu]'"
        )
    if _jit().detect() is None:
        return (
            "needs an x86-64 CPU with AVX512-BF16 (Cooper Lake, Sapphire Rapids, Zen 4 or later), "
            "which this machine does not report; use the cpu backend"
        )
    return None


def _jit() -> Any:
    """The code generator; imported late, because llvmlite is optional."""
    from moelten.kernels import x86_jit

    return x86_jit


def pack_codes(data: Tensor) -> Tensor:
    """Pack uint8 [N, K/2] (low nibble = even k) into uint8 [ceil(N/16), ceil(K/32), 256]."""
    rows, pairs = data.shape
    padded = pad(data, (0, -pairs % (COLUMNS // 2), 0, -rows % ROWS))
    blocks = padded.view(-1, ROWS, padded.shape[1] * 2 // COLUMNS, 4, 2, 2)
    low, high = _exchange(*blocks.unbind(-1))
    # (N block, n, K block, line, byte of the word, i) to the order of the layout
    packed = torch.stack((low, high), -1).permute(0, 2, 3, 1, 5, 4)
    return packed.reshape(blocks.shape[0], blocks.shape[2], ROWS * COLUMNS // 2)


def unpack_codes(packed: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `pack_codes` for a matrix [rows, cols]."""
    row_blocks, column_blocks, _ = packed.shape
    words = packed.view(row_blocks, column_blocks, 4, ROWS, 2, 2).permute(0, 3, 1, 2, 5, 4)
    data = torch.stack(_exchange(*words.unbind(-1)), -1)
    return data.reshape(row_blocks * ROWS, -1)[:rows, : cols // 2].contiguous()


def _exchange(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(nibbles x0 x1, y0 y1) to (x0 y0, x1 y1), low nibble first; its own inverse."""
    return (x & 0x0F) | (y << 4), (x >> 4) | (y & 0xF0)


def pack_scale(scale: Tensor) -> Tensor:
    """Pack scales [N, groups] into [ceil(N/16), groups, 16] of the same dtype."""
    rows, groups = scale.shape
    padded = pad(scale, (0, 0, 0, -rows % ROWS))
    return padded.view(-1, ROWS, groups).mT.contiguous()


def unpack_scale(packed: Tensor, rows: int) -> Tensor:
    """Inverse of `pack_scale` for a matrix of `rows` rows."""
    # By way of one dimension: a single group would leave strides that later views refuse.
    return packed.mT.flatten()[: rows * packed.shape[1]].clone().view(rows, packed.shape[1])


def grouped_gemm(
    x: Tensor,
    offsets: Tensor,
    experts: Tensor,
    data: Tensor,
    scale: Tensor,
    table: Tensor,
    *,
    group_size: int,
    rows: int,
    out: Tensor,
    isa: str | None = None,
) -> None:
    """out[p] = W[e] x[p] for each row p of the active experts, with fp32 accumulation and output.

    x:        bf16 [P, K], sorted by expert
    offsets:  int64 [A + 1], row range of each active expert; may be empty
    experts:  int64 [A], their indices into data and scale
    data:     uint8 [E, ceil(N/16), ceil(K/32), 256] of `pack_codes`
    scale:    bf16, fp16, fp32 or uint8 (e8m0) [E, ceil(N/16), groups, 16] of `pack_scale`
    table:    bf16 [16], the value of each code; value 0 must be 0.0
    group_size: a multiple of 32, or at least K (per channel)
    rows:     N
    out:      fp32 [P, N]
    isa:      'amx' or 'avx512' (AVX512-BF16 alone); by default the better one of this machine

    For one isa the bits of out[p] depend on x[p], the weights and the group size alone: not on the
    other rows, their number, the threads or the run. The two isas differ in the order of additions.
    Both treat subnormal bf16 inputs and subnormal dot products as zero, as the hardware does; the
    product with the scale keeps subnormals. May be called from several threads at once.
    """
    if reason := unavailable():
        raise RuntimeError(f"the x86 kernels cannot run: {reason}")
    jit = _jit()
    if isa not in (None, "avx512", jit.detect()):
        raise ValueError(f"isa: this machine has {jit.detect()!r}, asked for {isa!r}")
    _check(x, offsets, experts, data, scale, table, rows, out)
    blocks, groups = data.shape[2], scale.shape[2]
    if (-(-x.shape[1] // COLUMNS), -(-x.shape[1] // group_size)) != (blocks, groups) or (
        groups > 1 and group_size % COLUMNS
    ):
        raise ValueError(
            f"K={x.shape[1]} in groups of {group_size} needs ceil(K/{COLUMNS}) blocks, a scale per "
            f"group and groups of a multiple of {COLUMNS}; got {blocks} blocks and {groups} scales"
        )
    x = x.contiguous() if x.shape[1] % COLUMNS == 0 else pad(x, (0, -x.shape[1] % COLUMNS))
    threads = torch.get_num_threads()
    steps = -(-group_size // COLUMNS)
    span = max(d for d in range(1, jit.CHUNK + 1) if steps % d == 0)
    run = data.shape[1] * experts.numel() // (threads * _ITEMS_PER_THREAD)
    run = min(max(run, 1), jit.MAX_RUN)
    runs = -(-data.shape[1] // run)
    counter = ctypes.c_int64(0)
    values = {
        "x": x.data_ptr(),
        "offsets": offsets.data_ptr(),
        "experts": experts.data_ptr(),
        "data": data.data_ptr(),
        "scale": scale.data_ptr(),
        "table": table.data_ptr(),
        "out": out.data_ptr(),
        "counter": ctypes.addressof(counter),
        "data_stride": data.stride(0),
        "scale_stride": scale.stride(0) * scale.element_size(),
        "rows": rows,
        "blocks": blocks,
        "groups": groups,
        "steps": steps,
        "span": span,
        "chunk": jit.CHUNK // span * span,
        "run": run,
        "runs": runs,
        "items": runs * experts.numel(),
    }
    arguments = (ctypes.c_int64 * len(jit.ARGUMENTS))(*(values[name] for name in jit.ARGUMENTS))
    kernel = jit.compile_kernel(_SCALE_TYPES[scale.dtype], isa or jit.detect())
    _on_threads(kernel, ctypes.addressof(arguments), min(threads, values["items"]))


def _check(
    x: Tensor,
    offsets: Tensor,
    experts: Tensor,
    data: Tensor,
    scale: Tensor,
    table: Tensor,
    rows: int,
    out: Tensor,
) -> None:
    """Refuse what the native code would misread; it checks nothing itself."""
    expected = (
        ("x", x, torch.bfloat16, (x.shape[0], x.shape[-1])),
        ("offsets", offsets, torch.int64, (experts.numel() + 1,)),
        ("experts", experts, torch.int64, (experts.numel(),)),
        ("data", data, torch.uint8, (len(data), -(-rows // ROWS), data.shape[2], 256)),
        ("scale", scale, scale.dtype, (len(data), data.shape[1], scale.shape[2], ROWS)),
        ("table", table, torch.bfloat16, (16,)),
        ("out", out, torch.float32, (x.shape[0], rows)),
    )
    for name, tensor, dtype, shape in expected:
        # The kernel walks x row by row, so grouped_gemm makes a strided x contiguous.
        fits = name == "x" or tensor.is_contiguous()
        if tensor.dtype != dtype or tensor.shape != shape or not fits or tensor.is_cuda:
            raise ValueError(
                f"{name}: expected contiguous {dtype} {list(shape)} on the cpu, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
    if scale.dtype not in _SCALE_TYPES:
        raise ValueError(f"scale: expected one of {list(_SCALE_TYPES)}, got {scale.dtype}")


def _on_threads(kernel: int, arguments: int, threads: int) -> None:
    """Call kernel(arguments) on several threads, and wait for all of them.

    torch's own OpenMP threads where there are some: they are awake after a torch operator and would
    compete for the cores with any others.
    """
    if parallel := _openmp():
        parallel(kernel, arguments, threads, 0)
        return
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)
    others = [_pool(threads).submit(body, arguments) for _ in range(threads - 1)]
    body(arguments)
    for other in others:
        other.result()


@cache
def _openmp() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that torch loaded."""
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="moelten")
