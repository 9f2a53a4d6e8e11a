"""The block-scaled GEMM: that it computes what the reference does, whatever the shape.

No machine at hand has its instructions. In the interpreter `scaled_dot` decodes and multiplies in
fp32, and all around it is what Blackwell and CDNA4 run; on another GPU Triton itself decodes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, Case, make_input, make_weights
from metrics import assert_matches
from triton_device import DEVICE, INTERPRET

# isort: split
import triton
import triton.language as tl
from triton_targets import pretend

import moelten
from moelten import casts, packing, reference
from moelten.activations import GPT_OSS
from moelten.formats import scheme
from moelten.kernels import triton_gemm
from moelten.kernels.triton_casts import scaled_dot
from moelten.routing import Routing

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
MX = ("mxfp4_mxfp8", "mxfp8_mxfp8", "mxfp4_fp8", "mxfp4_fp8tensor")
RUNS = [(target, name) for name in MX for target in ("sm_100a", "gfx950")]
RUNS += [("gfx950", "mxfp4_bf16"), ("gfx950", "mxfp8_bf16")]
if INTERPRET:
    # Triton 3.6 cannot decode scales of 16 columns on GPUs without the instruction.
    RUNS += [("sm_100a", "nvfp4_nvfp4"), ("sm_100a", "nvfp4_nvfp4t")]


@pytest.fixture(params=RUNS, ids="-".join)
def name(request, monkeypatch):
    """A scheme, on a target that multiplies its blocks; the other GEMM is out of reach."""
    target, name = request.param
    pretend(monkeypatch, target)
    monkeypatch.setattr(triton_gemm, "gemm_kernel", None)
    return name


def run(weights, x, routing):
    packed = moelten.pack(weights, device=DEVICE, backend="triton")
    moved = Routing(routing.ids.to(DEVICE), routing.weights.to(DEVICE), routing.on_input)
    return moelten.fused_moe(x.to(DEVICE), packed, moved, backend="triton").cpu()


def check(case, weights=None, x=None, routing=None):
    weights = make_weights(case) if weights is None else weights
    if x is None:
        x, routing = make_input(case)
    assert_matches(run(weights, x, routing), reference.moe(x, weights, routing))


@triton.jit
def dot_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr,
    A_CODES: tl.constexpr, B_CODES: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    A_BYTES: tl.constexpr = 64 if A_CODES == "e2m1" else 128
    B_BYTES: tl.constexpr = 64 if B_CODES == "e2m1" else 128
    m, n, g = tl.arange(0, 128), tl.arange(0, 32), tl.arange(0, GROUPS)
    a = tl.load(a_ptr + m[:, None] * A_BYTES + tl.arange(0, A_BYTES)[None, :])
    b = tl.load(b_ptr + n[:, None] * B_BYTES + tl.arange(0, B_BYTES)[None, :])
    a_scale = tl.load(a_scale_ptr + m[:, None] * GROUPS + g[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * GROUPS + g[None, :])
    acc = tl.full((128, 32), 1.0, tl.float32)
    d = scaled_dot(a, a_scale, b, b_scale, acc, A_CODES, B_CODES, SCALE)
    tl.store(out_ptr + m[:, None] * 32 + n[None, :], d)


@pytest.mark.parametrize(
    "a_codes, b_codes, kind",
    [("e2m1", "e4m3", "e8m0"), ("e4m3", "e4m3", "e8m0")] + [("e2m1", "e2m1", "e4m3")] * INTERPRET,
)
def test_scaled_dot(a_codes, b_codes, kind):
    """Sums of products of random codes and scales, and NaN where a scale or a code is NaN."""
    g = torch.Generator().manual_seed(2)
    group = 32 if kind == "e8m0" else 16

    def operand(rows: int, codes: str):
        data = torch.randint(0, 127, (rows, 128), generator=g, dtype=torch.uint8)
        data |= torch.randint(0, 2, data.shape, generator=g, dtype=torch.uint8) << 7
        low, high = (121, 134) if kind == "e8m0" else (40, 60)
        scale = torch.randint(low, high, (rows, 128 // group), generator=g, dtype=torch.uint8)
        if codes == "e4m3":
            data[3, 5] = 0x7F
            values = data.view(torch.float8_e4m3fn).double()
        else:
            data &= 0xF
            values, data = casts.decode_e2m1(data).double(), packing.pack_nibbles(data)
        scale[7, 1] = 255 if kind == "e8m0" else 0x7F
        fp8 = scale.view(torch.float8_e4m3fn).float()
        wide = (casts.decode_e8m0(scale) if kind == "e8m0" else fp8).double()
        return data.to(DEVICE), scale.to(DEVICE), values * wide.repeat_interleave(group, 1)

    a, a_scale, wide_a = operand(128, a_codes)
    b, b_scale, wide_b = operand(32, b_codes)
    out = torch.empty(128, 32, device=DEVICE)
    dot_kernel[(1,)](a, a_scale, b, b_scale, out, a_codes, b_codes, kind, 128 // group)
    wanted, found = 1 + wide_a @ wide_b.T, out.cpu().double()
    assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().any()
    size = wide_a.abs() @ wide_b.abs().T
    assert ((found - wanted).abs()[~wanted.isnan()] < 1e-6 * size[~wanted.isnan()]).all()


def test_layer(name):
    """A tail after whole tiles in both directions, bias, and tokens that share experts."""
    check(Case(scheme(name), 3, 288, 96, tokens=11, top_k=2, activation=GPT_OSS, biases=True))


def test_more_than_one_tile_of_tokens(name):
    case = Case(scheme(name), 4, 160, 160, tokens=70, top_k=1)
    x, _ = make_input(case)
    ids = (torch.arange(70) % 7 == 0).int()[:, None] * 3
    check(case, make_weights(case), x, Routing(ids, torch.ones(70, 1)))


def test_partial_group_of_scales(monkeypatch):
    pretend(monkeypatch, "sm_100a")
    check(Case(scheme("mxfp8_mxfp8"), 3, 144, 80, tokens=5, top_k=2))


@pytest.mark.parametrize("activation", ["per_expert", "relu2"])
def test_activations(name, activation):
    case = Case(scheme(name), 5, 96, 64, tokens=4, top_k=2, activation=ACTIVATIONS[activation])
    check(case)


def test_router_weight_on_the_input(name):
    case = Case(scheme(name), 3, 96, 64, tokens=4, top_k=2)
    x, routing = make_input(case)
    check(case, make_weights(case), x, replace(routing, on_input=True))


def test_adversarial_scales(name):
    """Another exponent for every block: no scale can stand in for another."""
    case = Case(scheme(name), 3, 288, 96, tokens=5, top_k=2)
    weights, g = make_weights(case), torch.Generator().manual_seed(7)

    def spread(q):
        if q.scale.dtype == torch.uint8:
            shift = torch.randint(-6, 7, q.scale.shape, generator=g)
            return q.with_parts({"scale": (q.scale.int() + shift).to(torch.uint8)})
        # Blackwell's e4m3 scales have no sign.
        factor = torch.exp2(torch.randint(-3, 4, q.scale.shape, generator=g).float())
        return q.with_parts({"scale": (q.scale.float() * factor).clamp(max=448).to(q.scale.dtype)})

    check(case, replace(weights, w13=spread(weights.w13), w2=spread(weights.w2)), *make_input(case))


def test_bad_ids_and_their_rows(name):
    """Pairs of no expert here add nothing, and NaN in one row reaches no other."""
    case = Case(scheme(name), 3, 160, 96, tokens=9, top_k=2)
    weights, (x, routing) = replace(make_weights(case), first_expert=4), make_input(case)
    ids = routing.ids + 4
    ids[1::3, 0], ids[2] = 3, 2**31 - 1
    routing = Routing(ids, routing.weights)
    clean = run(weights, x, routing)
    assert_matches(clean, reference.moe(x, weights, routing))
    assert (clean[2] == 0).all()
    dirty = x.clone()
    dirty[2], dirty[::4] = torch.nan, torch.inf
    keep = torch.arange(9) % 4 != 0
    assert torch.equal(run(weights, dirty, routing)[keep], clean[keep])
