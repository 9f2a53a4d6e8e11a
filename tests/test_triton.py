"""The contract on the portable Triton backend: in the interpreter, or on a GPU where there is one.

Triton decides when it is first imported whether it interprets, so this file does not run by itself
without a GPU: `test_triton_interpreter` runs it in a process that sets TRITON_INTERPRET=1.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import ACTIVATIONS, ALL_SCHEMES, Case, make_input, make_weights
from metrics import assert_matches
from triton_device import DEVICE, INTERPRET

import moelten
from moelten import kernels, reference
from moelten.formats import (
    BF16,
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    INT8_GROUP,
    INT8_ROW,
    MXFP8,
    NVFP4,
    scheme,
)
from moelten.kernels import arena, triton_ops
from moelten.kernels.triton_variants import block_m, current_target
from moelten.qtensor import QTensor, quantize
from moelten.routing import Routing

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tiny(name: str, **changes) -> Case:
    sizes = {"num_experts": 3, "hidden_size": 128, "intermediate_size": 128, "tokens": 5}
    case = Case(ALL_SCHEMES[name], top_k=2)
    return replace(case, **(sizes | changes))


def run(weights, x, routing, device=DEVICE):
    packed = moelten.pack(weights, device=device, backend="triton")
    moved = Routing(routing.ids.to(device), routing.weights.to(device), routing.on_input)
    return moelten.fused_moe(x.to(device), packed, moved, backend="triton").cpu()


def check(case: Case, weights=None, x=None, routing=None):
    weights = make_weights(case) if weights is None else weights
    if x is None:
        x, routing = make_input(case)
    assert_matches(run(weights, x, routing), reference.moe(x, weights, routing))


# Stages, bit for bit.


def hard_rows(columns: int, dtype=torch.bfloat16) -> torch.Tensor:
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(8, columns, generator=g)
    x[1] = 0
    x[2, :16] = 0
    x[3] *= 2.0**-120
    x[4] = 1e-30
    x[5, 0] = 6e4
    x[6] = torch.randint(-8, 9, (columns,), generator=g) / 2
    return x.to(dtype)


def assert_same_rows(rows: triton_ops.Rows, q: QTensor):
    for part in ("data", "scale", "global_scale"):
        got, want = getattr(rows, part), getattr(q, part)
        assert (got is None) == (want is None)
        if got is not None:
            as_bytes = [t.cpu().contiguous().view(torch.uint8) for t in (got, want)]
            assert torch.equal(*as_bytes), part


@pytest.mark.parametrize("columns", [256, 80, 208])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "fmt",
    [FP8_ROW, FP8_GROUP, INT8_ROW, INT8_GROUP, MXFP8(), NVFP4(per_token=True), BF16],
    ids=lambda fmt: fmt.name,
)
def test_quantized_rows_are_bit_exact(fmt, dtype, columns):
    x = hard_rows(columns, dtype)
    assert_same_rows(triton_ops.quantize_rows(x.to(DEVICE), fmt), quantize(x, fmt))


@pytest.mark.parametrize("columns", [256, 80])
def test_rows_stored_as_operands(columns):
    """fp16 rows are the bf16 ones times a power of two, exactly; widened codes are the codes."""
    x = hard_rows(columns).to(DEVICE)
    x[0] *= torch.exp2(-torch.arange(columns, device=DEVICE) % 16)
    x[6] = 3e38
    rows = triton_ops.quantize_rows(x, BF16, dtype=torch.float16)
    assert rows.data.dtype == torch.float16 and rows.data.abs().max() < 2**15
    assert torch.equal(rows.data.double() * rows.scale.double(), x.double())
    for fmt, code in ((FP8_ROW, torch.float8_e4m3fn), (INT8_ROW, torch.int8)):
        codes = triton_ops.quantize_rows(x, fmt)
        for dtype in (torch.float16, torch.bfloat16):
            wide = triton_ops.quantize_rows(x, fmt, dtype=dtype)
            assert wide.data.dtype == dtype and torch.equal(wide.scale, codes.scale)
            assert torch.equal(wide.data.float(), codes.data.view(code).float())


@pytest.mark.parametrize("fmt", [FP8_TENSOR, NVFP4(), INT8_ROW], ids=lambda fmt: fmt.name)
def test_quantized_pairs_are_bit_exact(fmt):
    """Each pair's row: the token's, by router weight and its expert's pre-scale, static scale."""
    x = hard_rows(96)
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 4, (8, 2), generator=g)
    router, pre = torch.rand(8, 2, generator=g), torch.rand(3, 96, generator=g) + 0.5
    static = torch.tensor([0.01, 0.02, 0.03]) if fmt in (FP8_TENSOR, NVFP4()) else None
    local = ids.flatten() - 1
    rows = x.repeat_interleave(2, 0).float() * router.flatten()[:, None] * pre[local]
    if fmt == NVFP4():
        wanted = quantize(rows, NVFP4(per_token=True), global_scale=static[local])
    elif static is not None:
        wanted = quantize(rows, FP8_ROW, scale=static[local, None])
    else:
        wanted = quantize(rows, fmt)
    parts = [None if t is None else t.to(DEVICE) for t in (router, pre, static)]
    pairs = triton_ops.Pairs(ids.to(DEVICE), 3, 1, *parts)
    assert_same_rows(triton_ops.quantize_rows(x.to(DEVICE), fmt, pairs, by_token=True), wanted)


def test_combine_adds_in_slot_order_and_skips():
    y = torch.tensor([1e8, 1.0, -1e8, torch.nan, 3.0, 4.0])[:, None].expand(6, 20).contiguous()
    ids = torch.tensor([[0, 1, 0], [7, 1, 1]])
    out = torch.empty(2, 20)
    found = out.to(DEVICE)
    triton_ops.combine(y.to(DEVICE), ids.to(DEVICE), 2, 0, found)
    assert (found[0] == 0).all() and (found[1] == 7).all()


# The layer.


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_every_scheme(name):
    check(tiny(name))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g32z_fp8", "fp8block_fp8"])
def test_more_than_one_tile(name):
    check(Case(scheme(name), 2, 256, 160, tokens=35, top_k=1))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g32_bf16", "int4g32z_bf16", "fp8block_fp8"])
def test_full_and_half_tiles(name):
    """Many tokens are the left operand; an expert with few of them takes half a tile."""
    case = tiny(name, num_experts=2, tokens=130, top_k=1, intermediate_size=64)
    ids = (torch.arange(130) % 4 == 0).int()[:, None]
    assert block_m(130, 2, current_target(), BF16) == 128
    check(case, None, make_input(case)[0], Routing(ids, torch.rand(130, 1)))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int8_int8"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(name, activation):
    # Five experts: a case with parameters per expert has as many.
    case = tiny(name, num_experts=5, activation=ACTIVATIONS[activation], biases=True)
    check(case)


@pytest.mark.parametrize("inter", [80, 200])
@pytest.mark.parametrize("name", ["fp8block_bf16", "int8_int8", "fp8block_fp8", "nvfp4_bf16"])
def test_any_intermediate_size(name, inter):
    if name != "nvfp4_bf16" or inter % 16 == 0:
        check(tiny(name, hidden_size=144, intermediate_size=inter))


@pytest.mark.parametrize("name", ["bf16_bf16", "int8_int8", "fp8_fp8", "fp8tensor_fp8tensor"])
def test_odd_sizes(name):
    check(tiny(name, hidden_size=131, intermediate_size=67))


@pytest.mark.parametrize("name", ["int4g32_bf16", "fp8block_fp8", "mxfp4_mxfp8", "nvfp4_nvfp4t"])
def test_adversarial_scales(name):
    """A distinct exponent per block and signs where they are legal: no scale can be swapped."""
    case = tiny(name, hidden_size=256)
    weights, g = make_weights(case), torch.Generator().manual_seed(7)

    def spread(q: QTensor) -> QTensor:
        if q.scale.dtype == torch.uint8:
            shift = torch.randint(-6, 7, q.scale.shape, generator=g)
            return q.with_parts({"scale": (q.scale.int() + shift).to(torch.uint8)})
        factor = torch.exp2(torch.randint(-3, 4, q.scale.shape, generator=g).float())
        sign = torch.randint(0, 2, q.scale.shape, generator=g) * 2 - 1
        scale = (q.scale.float() * factor * sign).clamp(-448, 448)
        return q.with_parts({"scale": scale.to(q.scale.dtype)})

    check(case, replace(weights, w13=spread(weights.w13), w2=spread(weights.w2)), *make_input(case))


@pytest.mark.parametrize("name", ["int4g64z_fp8", "int4g64z_bf16"])
def test_zero_points_and_pre_scales(name):
    case = tiny(name, biases=True)
    weights, g = make_weights(case), torch.Generator().manual_seed(3)
    pre = {n: torch.rand(3, 128, generator=g) + 0.5 for n in ("w13_pre_scale", "w2_pre_scale")}
    check(case, replace(weights, **pre), *make_input(case))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g128_fp8tensor", "nvfp4_nvfp4"])
def test_router_weight_on_the_input(name):
    case = tiny(name)
    x, routing = make_input(case)
    check(case, make_weights(case), x, replace(routing, on_input=True))


@pytest.mark.parametrize("name", ["int4g32_bf16", "mxfp4_fp8", "fp8block_fp8"])
def test_positive_data_on_one_expert(name):
    case = tiny(name, hidden_size=512, tokens=20, top_k=1)
    x, _ = make_input(case)
    check(case, make_weights(case), x.abs(), Routing(torch.full((20, 1), 2), torch.ones(20, 1)))


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["mxfp4_bf16", "int8_int8"])
def test_bad_ids_contribute_exactly_zero(name, dtype, first):
    case = tiny(name, tokens=12)
    weights = replace(make_weights(case), first_expert=first)
    x, routing = make_input(case)
    bad = torch.tensor([-1, first + 3, first - 1, 2**31 - 1, -(2**31)])
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(routing.ids.shape, generator=g) < 0.4
    noise = bad[torch.randint(0, 5, routing.ids.shape, generator=g)]
    ids = torch.where(mask, noise, routing.ids.long() + first).to(dtype)
    ids[3] = -1
    weighted = torch.where(mask, torch.nan, routing.weights)
    out = run(weights, x, Routing(ids, weighted))
    assert_matches(out, reference.moe(x, weights, Routing(ids, weighted)))
    assert (out[3] == 0).all()


def test_all_ids_bad():
    case = tiny("mxfp4_bf16")
    x, _ = make_input(case)
    for tokens in (5, 130):
        many = x[:1].expand(tokens, -1).contiguous()
        out = run(
            make_weights(case), many, Routing(torch.full((tokens, 1), 9), torch.ones(tokens, 1))
        )
        assert (out == 0).all()


def test_duplicate_ids_add_up():
    case = tiny("int4g32_bf16")
    x, _ = make_input(case)
    check(case, make_weights(case), x, Routing(torch.tensor([[1, 1, 1]] * 5), torch.rand(5, 3)))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int8_int8"])
def test_no_tokens(name):
    case = tiny(name, tokens=0)
    x, routing = make_input(case)
    out = run(make_weights(case), x, routing)
    assert out.shape == (0, 128) and out.dtype == x.dtype


@pytest.mark.parametrize(
    "name", ["int4g32_bf16", "mxfp4_fp8", "fp8block_fp8", "nvfp4_nvfp4t", "int8_int8"]
)
def test_rows_do_not_touch_each_other(name):
    case = tiny(name, tokens=8)
    weights, (x, routing) = make_weights(case), make_input(case)
    clean = run(weights, x, routing)
    keep = torch.arange(8) % 4 != 0
    for poison in (torch.nan, torch.inf):
        dirty = x.clone()
        dirty[::4] = poison
        out = run(weights, dirty, routing)
        assert torch.equal(out[keep], clean[keep])
        # NVFP4 saturates an infinity, other formats make it NaN.
        assert torch.equal(out.isnan(), reference.moe(dirty, weights, routing).isnan())


def test_one_nan_makes_its_row_nan():
    for name in ("int8_int8", "fp8block_fp8", "mxfp8_mxfp8", "mxfp4_bf16"):
        case = tiny(name)
        weights, (x, routing) = make_weights(case), make_input(case)
        x[2, 7] = torch.nan
        found = run(weights, x, routing).isnan()
        assert torch.equal(found, reference.moe(x, weights, routing).isnan())


def test_same_bits_every_time_and_alone():
    case = tiny("mxfp4_fp8", tokens=6)
    weights, (x, routing) = make_weights(case), make_input(case)
    first = run(weights, x, routing)
    assert torch.equal(first, run(weights, x, routing))
    alone = run(weights, x[2:3], Routing(routing.ids[2:3], routing.weights[2:3]))
    assert torch.equal(alone[0], first[2])


def test_named_backend_is_honoured(monkeypatch):
    """CPU and Triton share a layout; the name decides, and the device does where there is none."""
    case = tiny("mxfp4_bf16")
    weights, (x, routing) = make_weights(case), make_input(case)
    ran = []

    def spy(self, x, experts, routing, out, workspace):
        ran.append(self.name)
        out.zero_()

    for backend in kernels.BACKENDS:
        monkeypatch.setattr(type(backend), "run", spy)
    packed = moelten.pack(weights, backend="cpu")
    moelten.fused_moe(x, packed, routing)
    moelten.fused_moe(x, packed, routing, backend="cpu")
    if INTERPRET:
        moelten.fused_moe(x, packed, routing, backend="triton")
        assert ran[-1] == "triton"
    assert ran[:2] == ["cpu", "cpu"]


def test_launches(monkeypatch):
    """At most seven launches for a layer, six stages and a second one for a long plan."""
    counts = []
    kind = type(triton_ops.combine_kernel)
    inner = kind.run

    def counted(self, *args, warmup, **kwargs):
        if not warmup:  # which only compiles
            counts.append(SimpleNamespace(kernel=self))
        return inner(self, *args, warmup=warmup, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    arena._prepare.cache_clear()  # what was launched before would be repeated without Triton
    cases = ("mxfp4_bf16", 4, 4), ("mxfp4_fp8", 4, 6), ("fp8block_fp8", 80, 7)
    for name, tokens, most in (*cases, ("int4g32_bf16", 80, 7)):
        case = tiny(name, tokens=tokens, hidden_size=32, intermediate_size=32)
        weights, (x, routing) = make_weights(case), make_input(case)
        counts.clear()
        run(weights, x, routing)
        assert len(counts) == most
