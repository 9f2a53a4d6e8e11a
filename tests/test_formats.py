"""Casts, byte orders, scale layouts and quantizers, bit by bit, against slow definitions."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

import moelten
from moelten import casts, layouts, packing
from moelten.formats import (
    FP8,
    FP8_BLOCK,
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    INT8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    SCHEMES,
    Float,
    Format,
    Int4,
    Int8,
    decode_format,
    encode_format,
)
from moelten.qtensor import QTensor, dequantize, quantize

WEIGHT_FORMATS = {s.weights.name: s.weights for s in SCHEMES.values()}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Casts


def test_e2m1_ties_and_edges():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, -100.0, -0.0, torch.nan])
    assert casts.decode_e2m1(casts.encode_e2m1(x)).tolist()[:10] == [
        *(0, 1, 1, 2, 2, 4, 4, 6, -6, 0),
    ]
    assert casts.encode_e2m1(x).tolist()[-3:] == [15, 8, 7]


def test_e2m1_equals_nearest_even_of_the_definition():
    x = torch.cat([randn(20000) * 3, torch.arange(-64, 65) / 8])
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    assert casts.encode_e2m1(x).tolist() == expected.tolist()


def test_e4m3_equals_the_definition_and_saturates():
    x = torch.cat([randn(20000) * 50, torch.tensor([17.0, 18.0, 19.0, 2**-10, 1.5 * 2**-9])])
    expected = x.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert casts.encode_e4m3(x).view(torch.uint8).tolist() == expected.tolist()
    wild = torch.tensor([500.0, torch.inf, -torch.inf])
    assert casts.encode_e4m3(wild).float().tolist() == [448, 448, -448]
    assert casts.encode_e4m3(torch.tensor([torch.nan])).float().isnan().all()


def test_e8m0_rounds_up_by_bits():
    x = torch.cat([randn(5000).abs() * 10, torch.exp2(torch.arange(-149.0, 128.0))])
    for value, byte in zip(x.tolist(), casts.encode_e8m0(x).tolist(), strict=True):
        exponent = math.frexp(value)[1] - (1 if math.frexp(value)[0] == 0.5 else 0)
        assert byte == max(exponent + 127, 1 if value > 0 else 0), value
    assert casts.encode_e8m0(torch.tensor([torch.inf, torch.nan])).tolist() == [255, 255]


def test_e8m0_decodes_every_byte():
    values = casts.decode_e8m0(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert values[255].isnan()


def test_int_rounds_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0])
    assert casts.encode_int(x, -127, 127).tolist() == [0, 2, 2, 0, -2, 127, -127]


# Byte orders: the worked row of codes -8..7

ROW = torch.arange(-8, 8)


def hexes(data: torch.Tensor) -> list[str]:
    return [f"{value & 0xFFFFFFFF:0{2 * data.itemsize}x}" for value in data.flatten().tolist()]


def test_worked_byte_orders():
    canonical = packing.pack_nibbles(ROW)
    assert hexes(canonical) == "98 ba dc fe 10 32 54 76".split()
    assert hexes(packing.flip_offset(canonical)) == "10 32 54 76 98 ba dc fe".split()
    assert hexes(packing.to_offset_words(canonical)) == ["76543210", "fedcba98"]
    assert hexes(packing.to_gptq(canonical[None])) == ["76543210", "fedcba98"]
    column = packing.pack_nibbles(ROW[:, None].expand(16, 2))
    assert hexes(packing.to_awq(column)[0]) == ["75316420", "fdb9eca8"]


@pytest.mark.parametrize("order", ["offset_words", "gptq", "awq", "row_pairs"])
def test_byte_orders_invert(order):
    data = torch.randint(0, 256, (24, 40), dtype=torch.uint8)
    there, back = getattr(packing, f"to_{order}"), getattr(packing, f"from_{order}")
    assert torch.equal(back(there(data)), data)


def test_gptq_and_awq_by_their_definition():
    codes = torch.randint(0, 16, (16, 8))  # [K, N], unsigned
    gptq, awq = np.zeros((2, 8), np.uint32), np.zeros((16, 1), np.uint32)
    for k in range(16):
        for n in range(8):
            gptq[k // 8, n] |= np.uint32(codes[k, n].item() << 4 * (k % 8))
            slot = [0, 2, 4, 6, 1, 3, 5, 7].index(n % 8)
            awq[k, n // 8] |= np.uint32(codes[k, n].item() << 4 * slot)
    expected = (codes - 8).T
    for words, read in ((gptq, packing.from_gptq), (awq, packing.from_awq)):
        packed = read(torch.from_numpy(words.view(np.int32)))
        assert torch.equal(packing.sign_extend(packing.unpack_nibbles(packed)).long(), expected)


def test_row_pairs_by_definition():
    codes = torch.randint(-8, 8, (6, 10))
    stored = torch.zeros(3, 10, dtype=torch.uint8)
    for n in range(6):
        stored[n // 2] |= ((codes[n] & 0xF) << 4 * (n % 2)).to(torch.uint8)
    packed = packing.from_row_pairs(stored)
    assert torch.equal(packing.sign_extend(packing.unpack_nibbles(packed)).long(), codes)


# Scale layouts


@pytest.mark.parametrize("rows,groups", [(1, 1), (8, 4), (130, 10), (256, 12), (300, 3)])
def test_swizzled_scales_by_their_offsets(rows, groups):
    scale = torch.randint(1, 256, (2, rows, groups), dtype=torch.uint8)
    big, small = layouts.swizzle_128x4(scale), layouts.swizzle_8x4(scale)
    wide = -(-groups // 4)
    for m in range(0, rows, 7):
        for s in range(groups):
            tile = (m // 128) * wide * 512 + (s // 4) * 512
            offset = tile + (m % 32) * 16 + (m % 128) // 32 * 4 + s % 4
            assert torch.equal(big[:, offset], scale[:, m, s])
            offset = (m // 8) * wide * 32 + (s // 4) * 32 + (m % 8) * 4 + s % 4
            assert torch.equal(small[:, offset], scale[:, m, s])
    assert (big != 0).sum() == (small != 0).sum() == scale.numel()
    assert torch.equal(layouts.unswizzle_128x4(big, rows, groups), scale)
    assert torch.equal(layouts.unswizzle_8x4(small, rows, groups), scale)


def test_swizzled_scales_keep_their_dtype_and_check_their_size():
    scale = randn(130, 6).to(torch.float8_e4m3fn)
    assert layouts.swizzle_128x4(scale).dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="have 2048 elements"):
        layouts.unswizzle_128x4(torch.zeros(2047), 130, 6)


# Quantizers


def slow_groups(x: torch.Tensor, group: int) -> list[list[float]]:
    return [row[i : i + group] for row in x.tolist() for i in range(0, x.shape[1], group)]


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_round_trip_is_idempotent_and_close(name):
    fmt = WEIGHT_FORMATS[name]
    x = randn(2, 256, 384) * torch.exp2(randn(2, 256, 1, seed=1))
    once = quantize(x, fmt)
    values = dequantize(once)
    assert torch.isfinite(values).all()
    assert (values - x).norm() / x.norm() < (0.3 if fmt.bits == 4 else 0.06)
    assert once.shape == (2, 256, 384)
    assert all(torch.equal(dequantize(once[i]), values[i]) for i in range(2))
    assert dequantize(once, torch.float64).float().allclose(values, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_zeros_stay_zeros(name):
    q = quantize(torch.zeros(128, 128), WEIGHT_FORMATS[name])
    assert (dequantize(q) == 0).all()


def test_int4_by_definition():
    x = randn(4, 64).bfloat16().float()
    q = quantize(x, Int4(32, scale="float32"))
    values, scales = dequantize(q).tolist(), q.scale.flatten().tolist()
    for index, group in enumerate(slow_groups(x, 32)):
        scale = float(np.float32(max(map(abs, group))) / np.float32(7))
        assert scales[index] == scale
        row, first = divmod(index, 2)
        for i, v in enumerate(group):
            code = max(-8, min(7, round(float(np.float32(v) / np.float32(scale)))))
            assert values[row][first * 32 + i] == float(np.float32(code) * np.float32(scale))


def test_int4_zero_points_reach_both_ends():
    x = torch.rand(8, 64) * 3 + 1
    q = quantize(x, Int4(32, True, "float32"))
    assert (dequantize(q) - x).abs().max() <= q.scale.max() * 0.51
    assert q.zero.min() == -8


def test_fp8_blocks_by_definition():
    x = randn(192, 320)
    q = quantize(x, FP8_BLOCK)
    assert q.scale.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale = x[block].abs().max() / 448
            assert q.scale[i, j] == scale
            assert torch.equal(q.data[block].float(), (x[block] / scale).to(q.data.dtype).float())
    powers = quantize(x, FP8((128, 128), "e8m0"))
    assert torch.equal(casts.decode_e8m0(powers.scale), torch.exp2(q.scale.log2().ceil()))


def test_mx_scales_never_clip():
    x = torch.tensor([6.0, 6.1, 7.0, 8.0])[:, None].expand(4, 32)
    assert quantize(x, MXFP4()).scale.flatten().tolist() == [127, 128, 128, 128]
    y = torch.tensor([448.0, 449.0, 512.0])[:, None].expand(3, 32)
    assert quantize(y, MXFP8()).scale.flatten().tolist() == [127, 128, 128]


def test_nvfp4_worked_block():
    x = [.1, -.2, .3, .4, -.5, .6, .7, -.8, .9, 1, -1.1, 1.2, 1.3, -1.4, 1.5, 2]  # fmt: skip
    q = quantize(torch.tensor([x]), NVFP4(), global_scale=torch.tensor(1 / 672))
    assert q.scale.float().item() == 224
    assert hexes(q.data) == "91 22 4b c4 55 6d e6 76".split()


def slow_nvfp4(row: np.ndarray, encode: np.float32) -> tuple[list[int], list[int]]:
    """Transformer Engine's formula, one fp32 operation at a time."""
    one, top = np.float32(1), np.finfo(np.float32).max
    bytes_, codes = [], []
    for start in range(0, len(row), 16):
        block = row[start : start + 16]
        vmax = np.abs(block).max()
        sf = (vmax * (encode * (one / np.float32(6)))).clip(-448, 448)
        sf = np.float32(sf.astype(ml_dtypes.float8_e4m3fn))
        bytes_.append(int(sf.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)))
        with np.errstate(divide="ignore", over="ignore"):
            inverse = min(one / (sf * (one / encode)), top) if vmax else np.float32(0)
        scaled = np.clip(block * inverse, -6, 6)
        codes += [int(c) & 15 for c in scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)]
    return bytes_, codes


@pytest.mark.parametrize("per_token", [False, True])
def test_nvfp4_is_bit_exact(per_token):
    x = randn(24, 64) * torch.exp2(torch.randint(-12, 12, (24, 1)).float())
    x[3], x[4, 16:48], x[5] = 0, 0, x[5] * 1e-20
    x[6] = torch.randint(-8, 9, (64,)) / 8
    q = quantize(x, NVFP4(per_token))
    for t in range(24):
        amax = x[t].abs().max().numpy() if per_token else x.abs().max().numpy()
        encode = np.float32(2688) / amax if amax else np.float32(1)
        encode = min(encode, np.finfo(np.float32).max)
        bytes_, codes = slow_nvfp4(x[t].numpy(), np.float32(encode))
        assert q.scale[t].view(torch.uint8).tolist() == bytes_
        assert packing.unpack_nibbles(q.data[t]).tolist() == codes
        stored = q.global_scale[t] if per_token else q.global_scale
        assert stored.item() == np.float32(1) / np.float32(encode)


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
def test_nvfp4_zero_row_is_scale_one_codes_zero(layout):
    x = randn(5, 64)
    x[2] = 0
    q = quantize(x, NVFP4(per_token=True))
    assert q.global_scale[2] == 1 and (q.data[2] == 0).all() and (q.scale[2].float() == 0).all()
    swizzled = getattr(layouts, f"swizzle_{layout}")(q.scale)
    back = getattr(layouts, f"unswizzle_{layout}")(swizzled, 5, 4)
    assert torch.equal(back.view(torch.uint8), q.scale.view(torch.uint8))


def test_per_token_formats_are_row_independent():
    x = randn(9, 256)
    for fmt in (FP8_ROW, FP8_GROUP, INT8_ROW, MXFP8(), NVFP4(per_token=True)):
        alone = quantize(x[4:5], fmt)
        together = quantize(x, fmt)
        assert torch.equal(dequantize(alone), dequantize(together)[4:5])


# QTensor refuses what does not fit its format


def test_qtensor_checks_its_parts():
    q = quantize(randn(64, 128), Int4(32))
    with pytest.raises(ValueError, match=r"scale of int4g32: expected torch.bfloat16 \[64, 4\]"):
        q.with_parts({"scale": q.scale.float()})
    with pytest.raises(ValueError, match="looks transposed"):
        q.with_parts({"scale": q.scale.T.contiguous()})
    with pytest.raises(ValueError, match=r"int4g32 has no zero, got"):
        QTensor(q.data, q.format, q.scale, q.scale.to(torch.int8))
    with pytest.raises(ValueError, match=r"expected torch.int8 \[64, 4\], got none"):
        QTensor(q.data, Int4(32, zero_point=True), q.scale)
    with pytest.raises(ValueError, match=r"data of int4g32: expected torch\.uint8"):
        q.with_parts({"data": q.data.int()})


def test_wrong_sizes_are_refused_with_the_rule():
    with pytest.raises(ValueError, match="multiple of its group of 32, got K=80"):
        quantize(randn(4, 80), Int4(32))
    with pytest.raises(ValueError, match="groups are multiples of 16"):
        Int4(24)
    with pytest.raises(ValueError, match=r"scales span \(None, None\)"):
        FP8((64, 64))
    with pytest.raises(ValueError, match="Int8 scales are"):
        Int8(scale="e8m0")
    with pytest.raises(ValueError, match="quantize expects bf16"):
        quantize(torch.ones(4, 4, dtype=torch.int32), FP8_TENSOR)


def test_cuts_fall_on_groups():
    q = quantize(randn(256, 128), FP8_BLOCK)
    assert torch.equal(dequantize(q.rows(128, 256)), dequantize(q)[128:])
    with pytest.raises(ValueError, match="multiples of 128"):
        q.rows(64, 128)
    four = quantize(randn(8, 128), Int4(32))
    assert torch.equal(dequantize(four.columns(32, 96)), dequantize(four)[:, 32:96])
    with pytest.raises(ValueError, match="multiples of 32"):
        four.columns(16, 48)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_formats_survive_json(name):
    fmt: Format = WEIGHT_FORMATS[name]
    assert decode_format(encode_format(fmt)) == fmt


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="not a moelten format"):
        decode_format('{"format": "Int3"}')
    with pytest.raises(ValueError, match="Float is bfloat16"):
        Float("float64")
    assert moelten.NVFP4() == NVFP4()
