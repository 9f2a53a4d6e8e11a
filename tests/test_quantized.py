"""quantize_activations: what it returns and refuses; test_triton_quantized holds the GPU to it."""

from __future__ import annotations

import pytest
import torch

from moelten import dequantize, quantize, quantize_activations
from moelten.formats import (
    BF16,
    FP8_BLOCK,
    FP8_ROW,
    FP8_TENSOR,
    INT8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    Int4,
)
from moelten.layouts import ROW_TILES, swizzle_8x4, swizzle_128x4
from moelten.quantized import FORMATS

STATIC = (FP8_TENSOR, NVFP4())


def static_scale(x, fmt):
    return x.abs().amax().float() / (2688 if fmt == NVFP4() else 448) if fmt in STATIC else None


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_linear_is_quantize(fmt):
    x = torch.randn(9, 160).bfloat16()
    scale = static_scale(x, fmt)
    q = quantize_activations(x, fmt, scale=scale)
    given = {"global_scale": scale} if fmt == NVFP4() else {}
    given |= {"scale": scale.view(1, 1)} if fmt == FP8_TENSOR else {}
    wanted = quantize(x, fmt, **given)
    assert (q.shape, q.format, q.scale_layout) == ((9, 160), fmt, "linear")
    for name, part in q.to_qtensor().tensors().items():
        both = part, wanted.tensors()[name]
        assert torch.equal(*(p.reshape(-1).view(torch.uint8) for p in both))
    error = (dequantize(q.to_qtensor()) - x.float()).norm() / x.float().norm()
    assert error < (0.12 if fmt.bits == 4 else 0.04)


@pytest.mark.parametrize("rows, columns", [(1, 16), (7, 80), (9, 160), (128, 64), (131, 208)])
@pytest.mark.parametrize("fmt", [MXFP8(), NVFP4(), NVFP4(per_token=True)], ids=lambda f: f.name)
def test_swizzled_scales(fmt, rows, columns):
    if columns % fmt.block[1] and fmt.packed:
        columns = 16
    x = torch.randn(rows, columns)
    scale = static_scale(x, fmt)
    linear = quantize_activations(x, fmt, scale=scale)
    for layout, swizzle in (("128x4", swizzle_128x4), ("8x4", swizzle_8x4)):
        q = quantize_activations(x, fmt, scale=scale, scale_layout=layout)
        assert torch.equal(q.scale.view(torch.uint8), swizzle(linear.scale).view(torch.uint8))
        padding = q.scale.numel() - linear.scale.numel()
        assert int((q.scale.view(torch.uint8) == 0).sum()) >= padding
        assert torch.equal(dequantize(q.to_qtensor()), dequantize(linear.to_qtensor()))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_no_rows(fmt):
    scale = torch.tensor(0.5) if fmt in STATIC else None
    q = quantize_activations(torch.empty(0, 64), fmt, scale=scale)
    assert q.shape == (0, 64) and q.to_qtensor().shape == (0, 64)


def test_a_static_scale_may_have_an_axis():
    x = torch.randn(3, 64)
    for fmt in STATIC:
        scale = static_scale(x, fmt)
        plain, axis = (quantize_activations(x, fmt, scale=s) for s in (scale, scale.view(1)))
        assert torch.equal(dequantize(plain.to_qtensor()), dequantize(axis.to_qtensor()))


X = torch.randn(4, 64)
BAD = {
    "axes": (X[0], FP8_ROW, {}, r"x: expected bf16, fp16 or fp32 \[rows, K\]"),
    "dtype": (X.double(), FP8_ROW, {}, "x: expected bf16, fp16 or fp32"),
    "strides": (X.T, FP8_ROW, {}, "contiguous"),
    "weights only": (X, Int4(32), {}, "int4g32 is no activation format"),
    "blocks": (X, FP8_BLOCK, {}, "no activation format"),
    "mxfp4": (X, MXFP4(), {}, "no activation format"),
    "float": (X, BF16, {}, "no activation format"),
    "columns": (torch.randn(4, 24), NVFP4(per_token=True), {}, "multiple of its group"),
    "layout": (X, MXFP8(), {"scale_layout": "64x4"}, "expected linear, 128x4, 8x4 for mxfp8"),
    "no bytes": (X, FP8_ROW, {"scale_layout": "8x4"}, "scale_layout: expected linear for fp8"),
    "no scale": (X, NVFP4(), {}, "expected its static scale"),
    "scale": (X, INT8_ROW, {"scale": torch.tensor(1.0)}, "dynamic"),
    "scale's dtype": (X, FP8_TENSOR, {"scale": torch.tensor(1)}, r"scale: expected torch.float32"),
    "scale's axes": (
        X,
        FP8_TENSOR,
        {"scale": torch.ones(4)},
        r"scale: expected torch.float32 \[\]",
    ),
    "device": (X, FP8_TENSOR, {"scale": torch.tensor(1.0, device="meta")}, "scale is on meta"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refusals(bad):
    x, fmt, given, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        quantize_activations(x, fmt, **given)
    assert list(ROW_TILES) == ["linear", "128x4", "8x4"]
