"""quantize_activations on Triton: byte for byte what the CPU writes, scales in all three layouts.

Runs on a GPU, or in the interpreter through test_triton_interpreter.
"""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, INTERPRET

from moelten import quantized
from moelten.formats import FP8_TENSOR, INT8_GROUP, MXFP8, NVFP4
from moelten.layouts import ROW_TILES
from moelten.quantized import FORMATS, quantize_activations

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Rows off 8 and 128, groups off 4: every kind of padding.
SIZES = [(1, 16), (7, 64), (8, 80), (9, 208), (127, 96), (128, 1040), (131, 4096), (300, 7168)]
if INTERPRET:
    SIZES = [(1, 16), (9, 80)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN or the largest integer: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows_of(kind: str, rows: int, columns: int) -> torch.Tensor:
    """fp32 rows that are hard to round in one way."""
    g = torch.Generator().manual_seed(rows * 10007 + columns)
    x = torch.randn(rows, columns, generator=g)
    if kind == "ties":
        # On a grid of quarters with a maximum of 6 * 448: scales are exact, and halves are ties.
        x = torch.randint(-24, 25, (rows, columns), generator=g) / 4
        x[:, 0] = 2688.0
    elif kind == "zeros":
        x[::2] = 0
        x[:, :16] = 0
    elif kind == "extremes":
        x = x.sign() * torch.exp2(torch.randint(-60, 127, x.shape, generator=g).float())
        x[0, 0] = torch.finfo(torch.float32).max
    elif kind == "subnormal":
        x[::2] *= 2.0**-140
        x[1::2] *= 2.0**-130
    assert torch.isfinite(x).all()
    return x


def on_triton(x, fmt, scale, layout):
    """Triton whatever the device: in the interpreter its tensors are on the CPU."""
    x = x.to(DEVICE)
    scale = None if scale is None else scale.to(DEVICE)
    if INTERPRET:
        return quantized._by_triton(x, fmt, scale, layout)
    return quantize_activations(x, fmt, scale=scale, scale_layout=layout)


def assert_same(found, wanted):
    for part in ("data", "scale", "global_scale"):
        got, want = getattr(found, part), getattr(wanted, part)
        assert (got is None) == (want is None)
        if want is not None:
            assert (got.dtype, got.shape) == (want.dtype, want.shape), part
            got, want = (t.cpu().reshape(-1).view(torch.uint8) for t in (got, want))
            same = got == want
            assert same.all(), (part, int((~same).sum()))


KINDS = ("random", "ties", "zeros", "extremes", "subnormal")


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", [NVFP4(per_token=True), NVFP4()], ids=lambda fmt: fmt.name)
def test_nvfp4(fmt, kind, rows, columns):
    x = rows_of(kind, rows, columns)
    dtypes = (torch.float32,) if INTERPRET else (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        cast = x.to(dtype).clamp(-65504, 65504) if dtype == torch.float16 else x.to(dtype)
        if not torch.isfinite(cast).all():
            cast = cast.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        scale = None
        if not fmt.per_token:
            scale = (cast.abs().amax().float() / 2688).clamp(min=2.0**-120)
        for layout in ROW_TILES:
            wanted = quantize_activations(cast, fmt, scale=scale, scale_layout=layout)
            assert_same(on_triton(cast, fmt, scale, layout), wanted)


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_format(fmt, rows, columns):
    if fmt == INT8_GROUP and columns < 128:
        columns = 144
    for kind in ("random", "zeros"):
        x = rows_of(kind, rows, columns).bfloat16()
        scale = torch.tensor(0.03) if fmt in (FP8_TENSOR, NVFP4()) else None
        for layout in ROW_TILES if isinstance(fmt, MXFP8 | NVFP4) else ("linear",):
            wanted = quantize_activations(x, fmt, scale=scale, scale_layout=layout)
            assert_same(on_triton(x, fmt, scale, layout), wanted)


def test_more_than_one_tile_of_rows():
    x, fmt = rows_of("random", 131, 16), NVFP4(per_token=True)
    for layout in ("128x4", "8x4"):
        wanted = quantize_activations(x, fmt, scale_layout=layout)
        assert_same(on_triton(x, fmt, None, layout), wanted)


def test_a_nan_row_keeps_to_itself():
    """Its global scale and scales are NaN; padding stays zero and other rows keep their bytes."""
    x = torch.randn(9, 80)
    fmt = NVFP4(per_token=True)
    clean = on_triton(x, fmt, None, "8x4")
    x[3, 7] = torch.nan
    for layout in ROW_TILES:
        found, wanted = (
            on_triton(x, fmt, None, layout),
            quantize_activations(x, fmt, scale_layout=layout),
        )
        assert torch.equal(found.scale.cpu().view(torch.uint8), wanted.scale.view(torch.uint8))
        assert found.global_scale[3].isnan()
    dirty = on_triton(x, fmt, None, "8x4").to_qtensor()
    keep = torch.arange(9) != 3
    for name, part in dirty.tensors().items():
        both = part.cpu(), clean.to_qtensor().tensors()[name].cpu()
        assert torch.equal(*(p[keep].view(torch.uint8) for p in both))


def test_no_rows():
    q = quantize_activations(torch.empty(0, 64, device=DEVICE), NVFP4(True), scale_layout="128x4")
    assert q.shape == (0, 64) and q.scale.numel() == 0


@pytest.mark.gpu
def test_ten_thousand_tokens():
    """The size of a prefill, against torch on the same GPU."""
    x = torch.randn(10_007, 4096, device="cuda").bfloat16()
    found = quantize_activations(x, NVFP4(True), scale_layout="128x4")
    wanted = quantize_activations(x.cpu(), NVFP4(True), scale_layout="128x4")
    assert_same(found, wanted)


@pytest.mark.gpu
def test_one_launch_in_a_graph():
    x = torch.randn(33, 1024, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = quantize_activations(x, NVFP4(True), scale_layout="8x4")
    fresh = torch.randn(33, 1024).bfloat16()
    x.copy_(fresh)
    graph.replay()
    assert_same(found, quantize_activations(fresh, NVFP4(True), scale_layout="8x4"))
