"""The contract on the portable Triton backend: in the interpreter, or on a GPU where there is one.

Triton decides when it is first imported whether it interprets, so this file does not run by itself
without a GPU: `test_triton_interpreter` runs it in a process that sets TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import ACTIVATIONS, ALL_SCHEMES, Case, make_input, make_weights
from metrics import assert_matches

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("runs on a GPU or through test_triton_interpreter.py", allow_module_level=True)
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import moelten  # noqa: E402
from moelten import casts, kernels, packing, reference  # noqa: E402
from moelten.formats import (  # noqa: E402
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
from moelten.kernels import arena, triton_ops  # noqa: E402
from moelten.kernels.triton_casts import (  # noqa: E402
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
from moelten.kernels.triton_decode import columns_of, decode_words  # noqa: E402
from moelten.kernels.triton_variants import block_m, current_target  # noqa: E402
from moelten.qtensor import QTensor, quantize  # noqa: E402
from moelten.routing import Routing  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cpu" if INTERPRET else "cuda")


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


# Casts and the dot, bit for bit.


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
    """fp16 rows are the bf16 ones times a power of two, exactly; widened e4m3 is e4m3."""
    x = hard_rows(columns).to(DEVICE)
    x[0] *= torch.exp2(-torch.arange(columns, device=DEVICE) % 16)
    x[6] = 3e38
    rows = triton_ops.quantize_rows(x, BF16, dtype=torch.float16)
    assert rows.data.dtype == torch.float16 and rows.data.abs().max() < 2**15
    assert torch.equal(rows.data.double() * rows.scale.double(), x.double())
    codes = triton_ops.quantize_rows(x, FP8_ROW)
    wide = triton_ops.quantize_rows(x, FP8_ROW, dtype=torch.float16)
    assert torch.equal(wide.scale, codes.scale)
    assert torch.equal(wide.data.float(), codes.data.view(torch.float8_e4m3fn).float())


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
    assert block_m(130, 2, current_target()) == 128
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

    def counted(self, *args, **kwargs):
        counts.append(SimpleNamespace(kernel=self))
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    arena._prepare.cache_clear()  # what was launched before would be repeated without Triton
    cases = ("mxfp4_bf16", 4, 4), ("mxfp4_fp8", 4, 6), ("fp8block_fp8", 80, 7)
    for name, tokens, most in (*cases, ("int4g32_bf16", 80, 7)):
        case = tiny(name, tokens=tokens, hidden_size=32, intermediate_size=32)
        weights, (x, routing) = make_weights(case), make_input(case)
        counts.clear()
        run(weights, x, routing)
        assert len(counts) == most
