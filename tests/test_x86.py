"""The x86 kernels: their layout against a slow emulation, their sums against float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from moelten.kernels import x86_gemm

pytestmark = pytest.mark.skipif(
    x86_gemm.unavailable() is not None, reason=f"x86 kernels: {x86_gemm.unavailable()}"
)

INT4 = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]).bfloat16()
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).bfloat16()
COUNTS = (1, 2, 3, 0, 4, 5, 8, 15, 16, 17, 33, 100)
# fp32 accumulation of a few thousand terms; a rounded weight or sum would show at 1e-3.
TOLERANCE = 1e-6


def isas() -> list[str]:
    if x86_gemm.unavailable() is not None:
        return []
    from moelten.kernels import x86_jit

    return ["amx", "avx512"] if x86_jit.detect() == "amx" else ["avx512"]


each_isa = pytest.mark.parametrize("isa", isas())


@dataclass
class Weights:
    """Some experts, as codes [E, N, K] and scales [E, N, groups], and packed."""

    codes: Tensor
    scale: Tensor
    table: Tensor
    group_size: int

    def __post_init__(self) -> None:
        raw = self.codes[..., 0::2] | self.codes[..., 1::2] << 4
        self.packed = torch.stack([x86_gemm.pack_codes(matrix) for matrix in raw])
        self.packed_scale = torch.stack([x86_gemm.pack_scale(matrix) for matrix in self.scale])

    def dequantized(self) -> Tensor:
        scale = self.scale.double()
        if self.scale.dtype == torch.uint8:
            scale = torch.exp2(scale - 127)
        wide = scale.repeat_interleave(self.group_size, -1)[..., : self.codes.shape[-1]]
        return self.table.double()[self.codes.long()] * wide

    def run(self, x: Tensor, counts: tuple[int, ...], experts: Tensor, isa: str | None) -> Tensor:
        rows = self.codes.shape[1]
        out = torch.full((x.shape[0], rows), torch.nan)
        offsets = torch.tensor([0, *np.cumsum(counts)])
        x86_gemm.grouped_gemm(
            x,
            offsets,
            experts,
            self.packed,
            self.packed_scale,
            self.table,
            group_size=self.group_size,
            rows=rows,
            out=out,
            isa=isa,
        )
        return out


def weights(
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
    table: Tensor = INT4,
    experts: int = len(COUNTS),
) -> Weights:
    generator = torch.Generator().manual_seed(rows * columns + group_size)
    codes = torch.randint(0, 16, (experts, rows, columns), generator=generator, dtype=torch.uint8)
    shape = (experts, rows, -(-columns // group_size))
    if dtype == torch.uint8:
        scale = torch.randint(118, 136, shape, generator=generator, dtype=dtype)
    else:
        scale = torch.randn(shape, generator=generator).to(dtype)  # of both signs
    return Weights(codes, scale, table, group_size)


def activations(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


def check(w: Weights, x: Tensor, counts: tuple[int, ...], isa: str) -> None:
    """Compare with float64, each expert on its own, experts out of order."""
    experts = torch.randperm(len(counts), generator=torch.Generator().manual_seed(1))
    y = w.run(x, counts, experts, isa)
    matrices, start = w.dequantized(), 0
    for count, expert in zip(counts, experts.tolist(), strict=True):
        expected = x[start : start + count].double() @ matrices[expert].T
        error = (y[start : start + count] - expected).norm()
        assert error <= TOLERANCE * expected.norm(), (count, float(error / expected.norm()))
        start += count


def emulated_words(codes: np.ndarray) -> np.ndarray:
    """Where each code lands, one at a time: uint16 [N blocks, K blocks, line, word]."""
    rows, columns = codes.shape
    words = np.zeros((-(-rows // 16), -(-columns // 32), 4, 32), dtype=np.uint16)
    for n in range(rows):
        for k in range(columns):
            line, slot, pair = (k % 32) // 8, (k % 8) // 2, k % 2
            words[n // 16, k // 32, line, 2 * (n % 16) + pair] |= int(codes[n, k]) << (4 * slot)
    return words


@pytest.mark.parametrize("rows", [80, 192, 232])
@pytest.mark.parametrize("columns", [32, 80, 96, 704])
def test_codes_land_where_the_layout_says(rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    packed = x86_gemm.pack_codes(codes[:, 0::2] | codes[:, 1::2] << 4)
    expected = emulated_words(codes.numpy())
    assert packed.shape == (*expected.shape[:2], 256) and packed.is_contiguous()
    assert np.array_equal(packed.numpy(), expected.reshape(*packed.shape[:2], 128).view(np.uint8))


@pytest.mark.parametrize("rows", [80, 192, 232])
@pytest.mark.parametrize("columns", [32, 80, 96, 704, 2880])
def test_packing_inverts_bit_for_bit(rows: int, columns: int) -> None:
    data = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    assert torch.equal(x86_gemm.unpack_codes(x86_gemm.pack_codes(data), rows, columns), data)
    bits = torch.randint(-(2**15), 2**15, (rows, -(-columns // 32)), dtype=torch.int16)
    for groups in (bits.shape[1], 1):
        for dtype in (torch.bfloat16, torch.float16, torch.int16):
            scale = bits[:, :groups].contiguous().view(dtype)
            packed = x86_gemm.pack_scale(scale)
            assert packed.shape == (-(-rows // 16), groups, 16)
            back = x86_gemm.unpack_scale(packed, rows)
            assert torch.equal(back.view(torch.int16), scale.view(torch.int16))


def test_scales_land_where_the_layout_says() -> None:
    scale = torch.randn(40, 3)
    packed = x86_gemm.pack_scale(scale)
    row = torch.arange(40)
    assert torch.equal(packed[row // 16, :, row % 16], scale)
    assert not packed[2, :, 8:].any()


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128, 768])
def test_int4(isa: str, dtype: torch.dtype, group_size: int) -> None:
    w = weights(192, 768, group_size, dtype)
    check(w, activations(sum(COUNTS), 768), COUNTS, isa)


@each_isa
@pytest.mark.parametrize("rows", [80, 232])
@pytest.mark.parametrize(("columns", "group_size"), [(80, 80), (96, 32), (704, 352), (2880, 320)])
def test_odd_sizes(isa: str, rows: int, columns: int, group_size: int) -> None:
    """N that 16 does not divide, K that 32 or the chunk of 8 blocks does not divide."""
    w = weights(rows, columns, group_size, torch.bfloat16)
    check(w, activations(sum(COUNTS), columns), COUNTS, isa)


@each_isa
def test_mxfp4(isa: str) -> None:
    w = weights(192, 704, 32, torch.uint8, E2M1)
    check(w, activations(sum(COUNTS), 704), COUNTS, isa)


@each_isa
@pytest.mark.parametrize(("byte", "magnitude"), [(0, 2.0**100), (1, 2.0**60), (254, 2.0**-100)])
def test_extreme_e8m0_scales(isa: str, byte: int, magnitude: float) -> None:
    """2**-127 is subnormal in fp32, 2**127 the largest; both are exact factors."""
    w = weights(80, 96, 32, torch.uint8, E2M1)
    w = Weights(w.codes, torch.full_like(w.scale, byte), E2M1, 32)
    x = (activations(sum(COUNTS), 96).double() * magnitude).bfloat16()
    check(w, x, COUNTS, isa)


@each_isa
def test_nan_scale_poisons_its_row_only(isa: str) -> None:
    w = weights(32, 96, 32, torch.uint8, E2M1, experts=1)
    scale = w.scale.clone()
    scale[0, 5, 1] = 255
    y = Weights(w.codes, scale, E2M1, 32).run(activations(3, 96), (3,), torch.tensor([0]), isa)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [5]


@each_isa
def test_infinite_activation_stays_in_its_row(isa: str) -> None:
    w = weights(32, 256, 32, torch.bfloat16, experts=1)
    x = activations(20, 256)
    clean = w.run(x, (20,), torch.tensor([0]), isa)
    x[2, 40] = torch.inf
    y = w.run(x, (20,), torch.tensor([0]), isa)
    others = [i for i in range(20) if i != 2]
    assert not y[2].isfinite().any()
    assert torch.equal(y[others], clean[others])


@each_isa
def test_each_code_meets_its_own_scale_and_activation(isa: str) -> None:
    """One-hot activations read single weights; every group has a power of two of its own."""
    columns, rows = 352, 48
    w = weights(rows, columns, 32, torch.float32, experts=1)
    groups = columns // 32
    exponent = torch.arange(rows * groups).view(1, rows, groups) % 61 - 30
    w = Weights(w.codes, torch.exp2(exponent.float()), INT4, 32)
    y = w.run(torch.eye(columns).bfloat16(), (columns,), torch.tensor([0]), isa)
    assert torch.equal(y.double(), w.dequantized()[0].T)


@each_isa
def test_positive_sums(isa: str) -> None:
    """No cancellation hides a lost term."""
    w = weights(192, 768, 64, torch.bfloat16)
    w = Weights(w.codes % 7 + 1, w.scale.abs() + 0.5, INT4, 64)
    check(w, activations(sum(COUNTS), 768).abs() + 0.5, COUNTS, isa)


@each_isa
@pytest.mark.parametrize("group_size", [32, 352])
def test_rows_do_not_depend_on_their_company(isa: str, group_size: int) -> None:
    w = weights(232, 704, group_size, torch.bfloat16, experts=2)
    x = activations(37, 704)
    together = w.run(x, (0, 37), torch.tensor([0, 1]), isa)
    assert torch.equal(together, w.run(x, (0, 37), torch.tensor([0, 1]), isa))
    for size in (1, 2, 3, 4, 5, 8, 13, 16):
        for start in (0, 37 - size):
            some = w.run(x[start : start + size], (size,), torch.tensor([1]), isa)
            assert torch.equal(some, together[start : start + size]), (size, start)


@each_isa
def test_threads(isa: str) -> None:
    """The number of threads changes no bit, and calls from several threads do not mix."""
    w = weights(512, 384, 32, torch.bfloat16)
    inputs = [activations(sum(COUNTS), 384) * scale for scale in (1, 2, 3, 4)]
    experts = torch.arange(len(COUNTS))
    previous = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [w.run(x, COUNTS, experts, isa) for x in inputs]
        torch.set_num_threads(3)
        assert torch.equal(w.run(inputs[0], COUNTS, experts, isa), expected[0])
    finally:
        torch.set_num_threads(previous)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: w.run(x, COUNTS, experts, isa), inputs * 4))
    for y, x in zip(results, expected * 4, strict=True):
        assert torch.equal(y, x)


@each_isa
def test_threads_without_openmp(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(512, 384, 32, torch.bfloat16)
    x, experts = activations(sum(COUNTS), 384), torch.arange(len(COUNTS))
    expected = w.run(x, COUNTS, experts, isa)
    monkeypatch.setattr(x86_gemm, "_openmp", lambda: None)
    assert torch.equal(w.run(x, COUNTS, experts, isa), expected)


def test_nothing_to_do() -> None:
    w = weights(32, 64, 32, torch.bfloat16, experts=1)
    none = torch.empty(0, dtype=torch.int64)
    assert w.run(activations(0, 64), (), none, None).shape == (0, 32)


def test_refusals() -> None:
    w = weights(32, 96, 32, torch.bfloat16, experts=1)
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="K=64 in groups of 32"):
        w.run(activations(1, 64), (1,), one, None)
    with pytest.raises(ValueError, match="x: expected contiguous"):
        w.run(activations(1, 96).float(), (1,), one, None)
    with pytest.raises(ValueError, match="offsets: expected"):
        w.run(activations(1, 96), (1, 0), one, None)
    w.packed_scale = w.packed_scale.double()
    with pytest.raises(ValueError, match="scale: expected one of"):
        w.run(activations(1, 96), (1,), one, None)
