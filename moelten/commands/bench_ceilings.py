"""What a GPU can do at best: bytes per second of plain reads, FLOP/s of large matrix products.

Random data throughout: zeros run faster than a model's numbers would. The best of several ways to
do the same counts, because a ceiling is what nothing exceeds; where torch is not the best way,
there is a plain Triton kernel here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelten.commands.bench_bursts import time_burst

_READ_BYTES = 8 << 30
_SIZE = 8192
# Elements of a block, warps, and blocks per program, all loaded before the first is needed.
READS = ((4096, 16, 4), (4096, 8, 4), (16384, 16, 2))
_CHUNK = 1 << 20


def read_bandwidth() -> float:
    """Bytes per second of reading 8 GiB once (a quarter of the free memory, if that is less)."""
    torch.cuda.empty_cache()
    count = min(_READ_BYTES, torch.cuda.mem_get_info()[0] // 4) // 4 // _CHUNK * _CHUNK
    values = torch.empty(count, dtype=torch.int32, device="cuda").random_()
    return values.nbytes / min(_fastest(partial(read_sums, values, *sizes)) for sizes in READS)


def read_sums(values: Tensor, block: int, warps: int, steps: int) -> Tensor:
    """Sums of consecutive block * steps int32 values, which divide their number."""
    count = values.numel() // (block * steps)
    sums = torch.empty(count, dtype=torch.int32, device=values.device)
    sum_kernel[(count,)](values, sums, BLOCK=block, STEPS=steps, num_warps=warps)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(values_ptr, sums_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of BLOCK * STEPS values per program: reads and nothing else."""
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        total += tl.load(values_ptr + offsets + step * BLOCK)
    tl.store(sums_ptr + program, tl.sum(total))


def matrix_rates() -> dict[str, float]:
    """FLOP/s of 8192**3 products: bf16, and fp8 and int8 where this GPU and torch have them."""
    a = torch.randn(_SIZE, _SIZE, device="cuda")
    products: dict[str, list[Callable[[], object]]] = {"bf16": [_bf16(a)]}
    if torch.version.hip is None:
        products["int8"] = _int8(a)
        if torch.cuda.get_device_capability() >= (8, 9):
            products["fp8"] = [_fp8(a)]

    def ten(product: Callable[[], object]) -> None:
        # One product alone would end before the clocks follow its power.
        for _ in range(10):
            product()

    seconds = {
        name: min(_fastest(partial(ten, product)) for product in ways)
        for name, ways in products.items()
    }
    return {name: 10 * 2 * _SIZE**3 / time for name, time in seconds.items()}


def _bf16(a: Tensor) -> Callable[[], object]:
    half = a.bfloat16()
    return lambda: torch.mm(half, half)


def _fp8(a: Tensor) -> Callable[[], object]:
    """Full fp32 accumulation, as moelten's fp8 kernels accumulate."""
    rows, columns = a.to(torch.float8_e4m3fn), a.t().contiguous().to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(
        rows, columns, one, one, out_dtype=torch.bfloat16, use_fast_accum=False
    )


def _int8(a: Tensor) -> list[Callable[[], object]]:
    """torch's product; on Hopper, where torch 2.11 runs Ampere's instructions, Triton's as well.

    Measured on an H200: 970 and 1175 TOP/s.
    """
    rows = (a * 40).clamp(-127, 127).to(torch.int8)
    columns = rows.t().contiguous()
    ways: list[Callable[[], object]] = [lambda: torch._int_mm(rows, columns.t())]
    if torch.cuda.get_device_capability()[0] == 9:
        ways.append(lambda: int8_product(rows, columns))
    return ways


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in int32 for square int8 matrices of a multiple of 1024; tiles for Hopper."""
    size = a.shape[0]
    out = torch.empty(size, size, dtype=torch.int32, device=a.device)
    int8_product_kernel[(size // 128 * (size // 256),)](
        a, b, out, SIZE=size, M=128, N=256, K=128, num_warps=8, num_stages=4
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def int8_product_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """An M x N tile per program, in groups of 8 tiles of rows, which share b in the cache."""
    group = tl.program_id(0) // (8 * (SIZE // N))
    within = tl.program_id(0) % (8 * (SIZE // N))
    rows = (group * 8 + within % 8) * M + tl.arange(0, M)
    columns = within // 8 * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    total = tl.zeros([M, N], tl.int32)
    for start in range(0, SIZE, K):
        a = tl.load(a_ptr + rows[:, None] * SIZE + start + depth[None, :])
        b = tl.load(b_ptr + columns[None, :] * SIZE + start + depth[:, None])
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    tl.store(out_ptr + rows[:, None] * SIZE + columns[None, :], total)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, timed as layers are: in bursts, the first left out."""
    call()
    return min(second for _ in range(5) for second in time_burst(call, 2)[1:])
