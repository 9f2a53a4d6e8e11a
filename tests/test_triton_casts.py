"""The casts of the portable Triton kernels and their dot, bit for bit.

Runs on a GPU, or in the interpreter through test_triton_interpreter.
"""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE

# isort: split
import triton
import triton.language as tl

from moelten import casts, packing
from moelten.kernels.triton_casts import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    dot,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    encode_int8,
    round_to,
    widen,
)
from moelten.kernels.triton_decode import columns_of, decode_words

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def casts_kernel(x_ptr, outs, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    e4m3, e2m1, e8m0 = encode_e4m3(x), encode_e2m1(x), encode_e8m0(tl.abs(x))
    tl.store(outs[0] + i, e4m3)
    tl.store(outs[1] + i, e2m1.to(tl.uint8))
    tl.store(outs[2] + i, e8m0.to(tl.uint8))
    tl.store(outs[3] + i, encode_int8(x))
    tl.store(outs[4] + i, round_to(x, tl.bfloat16))
    tl.store(outs[5] + i, round_to(x, tl.float16))
    tl.store(outs[6] + i, decode_e4m3(e4m3, False))
    tl.store(outs[7] + i, decode_e2m1(e2m1))
    tl.store(outs[8] + i, decode_e8m0(e8m0))
    tl.store(outs[9] + i, widen(round_to(x, tl.bfloat16)))


def cast_inputs() -> torch.Tensor:
    """Every e4m3 value, every midpoint, ties of the other types, extremes, and random numbers."""
    g = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[~codes.isnan()].sort().values
    spread = torch.exp2(torch.randint(-140, 30, (4096,), generator=g).float())
    special = [torch.inf, -torch.inf, 0.0, -0.0, 1e30, 449.0, 464.0, 465.0, 2.0**-140, 2.0**-149]
    parts = [codes, (codes[1:] + codes[:-1]) / 2, torch.arange(-80, 80) / 16]
    parts += [torch.arange(-300, 300) / 2, torch.randn(4096, generator=g) * spread]
    # Half-way between two bf16 values, with an even and with an odd neighbour below.
    parts += [torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8]), torch.tensor(special)]
    x = torch.cat(parts)
    return torch.nn.functional.pad(x, (0, triton.next_power_of_2(x.numel()) - x.numel()), value=1.0)


def test_casts_are_bit_exact():
    x = cast_inputs()
    e4m3, e2m1, e8m0 = casts.encode_e4m3(x), casts.encode_e2m1(x), casts.encode_e8m0(x.abs())
    wanted = {
        "e4m3": e4m3.view(torch.uint8),
        "e2m1": e2m1,
        "e8m0": e8m0,
        "int8": casts.encode_int(x, -127, 127),
        "bf16": x.bfloat16(),
        "fp16": x.half(),
        "from e4m3": e4m3.float(),
        "from e2m1": casts.decode_e2m1(e2m1),
        "from e8m0": casts.decode_e8m0(e8m0),
        "from bf16": x.bfloat16().float(),
    }
    found = tuple(torch.empty_like(t, device=DEVICE) for t in wanted.values())
    casts_kernel[(1,)](x.to(DEVICE), found, x.numel())
    for (name, want), got in zip(wanted.items(), found, strict=True):
        same = (got.cpu() == want) | (want.isnan() & got.cpu().isnan())
        assert same.all(), (name, x[~same][:5], want[~same][:5], got.cpu()[~same][:5])


def test_nan_survives_the_casts():
    x = torch.full((16,), torch.nan)
    outs = tuple(torch.zeros(16, dtype=t, device=DEVICE) for t in [torch.uint8] * 3 + [torch.int8])
    outs += tuple(torch.zeros(16, dtype=t, device=DEVICE) for t in (torch.bfloat16, torch.float16))
    outs += tuple(torch.zeros(16, device=DEVICE) for _ in range(4))
    casts_kernel[(1,)](x.to(DEVICE), outs, 16)
    assert outs[0].view(torch.float8_e4m3fn).float().isnan().all()
    assert (outs[1] == 7).all() and (outs[2] == 255).all() and (outs[3] == 0).all()
    assert all(t.isnan().all() for t in (*outs[4:7], outs[8], outs[9]))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    acc = tl.load(out_ptr + at)
    d = dot(tl.load(a_ptr + at), tl.trans(tl.load(b_ptr + at)), acc, "ieee")
    tl.store(out_ptr + at, d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_dot(dtype):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-99, 99, (32, 32), generator=g).to(dtype) for _ in range(2))
    out = torch.full((32, 32), 5, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    wanted = 5 + a.double() @ b.double().T
    out = out.to(DEVICE)
    dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), out, 32)
    assert torch.equal(out.cpu().double(), wanted)


@triton.jit
def words_kernel(
    words_ptr, zero_ptr, scale_ptr, int4_ptr, e2m1_ptr, TYPE: tl.constexpr, FRAGMENT: tl.constexpr
):
    row, word, group = tl.arange(0, 16), tl.arange(0, 4), tl.arange(0, 2)
    words = tl.load(words_ptr + row[:, None] * 4 + word[None, :])
    zero = tl.load(zero_ptr + row)
    scale = tl.load(scale_ptr + row[:, None] * 2 + group[None, :])
    column = tl.arange(0, 32)
    if FRAGMENT:
        column = columns_of(column, 32)
    at = row[:, None] * 32 + column[None, :]
    tl.store(int4_ptr + at, widen(decode_words(words, zero, None, "int4", TYPE, FRAGMENT)))
    tl.store(e2m1_ptr + at, widen(decode_words(words, None, scale, "e2m1", TYPE, FRAGMENT)))


@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16], ids=str)
@pytest.mark.parametrize("fragment", [False, True])
def test_words_of_eight_codes(dtype, fragment):
    """Every byte in every place, for both orders of columns."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    zero = torch.arange(-8, 8, dtype=torch.int8)
    scale = torch.exp2(torch.arange(-16.0, 16).view(16, 2) / 3).round(decimals=1).clamp(0.125, 32)
    scale = (scale * 8).floor() / 8
    nibbles = packing.unpack_nibbles(codes)
    wanted = (
        packing.sign_extend(nibbles).float() - zero[:, None],
        casts.decode_e2m1(nibbles) * scale.repeat_interleave(16, 1),
    )
    found = tuple(torch.empty(16, 32, device=DEVICE) for _ in wanted)
    arguments = (part.to(DEVICE) for part in (codes.view(torch.int32), zero, scale))
    words_kernel[(1,)](*arguments, *found, dtype, fragment)
    assert torch.equal(found[0].cpu(), wanted[0])
    kind = torch.float16 if dtype == tl.float16 else torch.bfloat16
    assert torch.equal(found[1].cpu(), (wanted[1].to(kind)).float())
