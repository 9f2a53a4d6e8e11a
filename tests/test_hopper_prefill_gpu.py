"""The Hopper GEMM for many tokens per expert, on its GPU, for any number of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, Case, make_input, make_weights
from gpu_layers import check_graph, check_streams, make_call, make_layer
from hopper_layers import (
    SCHEMES,
    SHAPES,
    check,
    check_production_shape,
    check_router_weights,
    check_scheme,
    on_gpu,
    spoil,
)
from hopper_variants import slim_variant, tall_variant
from metrics import assert_matches

import moelten
from moelten import SwiGLU, reference
from moelten.formats import BF16, FP8, Int4, Scheme, scheme
from moelten.kernels import arena, hopper
from moelten.kernels.hopper_schedule import (
    narrow_variant,
    operands_of,
    warp_variant,
    wide_variant,
    with_groups,
)
from moelten.routing import Routing

pytestmark = pytest.mark.gpu
# Of 7 experts with 2 slots per token: every width of a tile, whole blocks, and two of them.
TOKENS = (1, 3, 40, 100, 190, 260, 300, 340, 420, 900)


def only(monkeypatch, variant):
    """All numbers of tokens take one variant of the kernel for many."""
    prepared = (arena._prepare, arena._measure)

    def choose(stored, scale_type, *sizes, x_scale):
        operands = operands_of(stored, few=variant is not wide_variant, x_scale=x_scale)
        # Stages of single warps follow from columns.
        chosen = variant(operands, scale_type, *(sizes[2:] if variant is warp_variant else ()))
        return with_groups(chosen, scale_type) if x_scale == "group" else chosen

    monkeypatch.setattr(hopper, "choose_wide", choose)
    for function in prepared:
        function.cache_clear()
    yield
    for function in prepared:
        function.cache_clear()


@pytest.fixture
def always_wide(monkeypatch):
    yield from only(monkeypatch, wide_variant)


@pytest.fixture
def always_narrow(monkeypatch):
    yield from only(monkeypatch, narrow_variant)


@pytest.fixture
def always_warps(monkeypatch):
    yield from only(monkeypatch, warp_variant)


@pytest.fixture
def always_slim(monkeypatch):
    yield from only(monkeypatch, slim_variant)


@pytest.fixture
def always_tall(monkeypatch):
    yield from only(monkeypatch, tall_variant)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(always_wide, name):
    check_scheme(SCHEMES[name], TOKENS)


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g32z_bf16", "fp8block_bf16"])
def test_every_width_of_tiles(always_wide, name):
    """One expert's tokens: around every unit of a block, and of two blocks, which share them."""
    check_one_expert(name, range(64, 272, 16))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "nvfp4_bf16"])
def test_every_width_of_narrow_tiles(always_narrow, name):
    """The same, of which units are half as many tokens."""
    check_one_expert(name, range(8, 112, 8))


def test_every_width_of_tall_tiles(always_tall):
    check_one_expert("int4g32z_bf16", range(40, 144, 8))


def check_one_expert(name, counts):
    """As many tokens, and one more, than each of some numbers."""
    case = Case(scheme(name), num_experts=1, hidden_size=512, intermediate_size=256, top_k=1)
    weights = make_weights(case)
    packed = moelten.pack(on_gpu(weights), backend="hopper")
    for count in counts:
        for tokens in (count, count + 1):
            check(weights, *make_input(replace(case, tokens=tokens, seed=tokens)), packed)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_by_warps(always_warps, name):
    check_scheme(SCHEMES[name], (1, 12, 33, 60, 90, 110, 300))
    case = Case(SCHEMES[name], num_experts=3, hidden_size=512, intermediate_size=256)
    for tokens in (9, 30):
        check(make_weights(case), *make_input(replace(case, tokens=tokens)))


@pytest.mark.parametrize(
    "name", ["mxfp4_bf16", "nvfp4_bf16", "int4g32_bf16", "fp8_bf16", "int8_int8"]
)
def test_short_stages_by_warps(always_warps, name):
    """Columns whose last stage is mostly nothing."""
    case = Case(scheme(name), num_experts=3, hidden_size=576, intermediate_size=288)
    for tokens in (9, 70):
        check(make_weights(case), *make_input(replace(case, tokens=tokens)))


FEW = (1, 20, 50, 90, 130, 190, 300, 420, 560)
NARROW = ["mxfp4_bf16", "nvfp4_bf16", "int4_bf16", "int4g32_bf16", "int4g32_fp16", "int4z_bf16"]
NARROW += ["mxfp4_fp8"]
SLIM = ["mxfp4_bf16", "int4g128z_bf16", "int4g32z_bf16", "fp8block_bf16", "fp8_fp8", "int8_int8"]
SLIM += ["fp8block_fp8", "int4g128_fp8g128"]
TALL = ["mxfp4_bf16", "int4g128_fp16", "mxfp4_fp8"]


def check_narrow(name, counts, *more):
    """Columns that end within a stage, if they need not be whole groups of 128; that end with it;
    and what else is asked for."""
    check_scheme(scheme(name), FEW)
    small = (384, 128) if "g128" in name else (320, 192)
    for hidden, inter in (small, (512, 256), *more):
        case = Case(scheme(name), num_experts=3, hidden_size=hidden, intermediate_size=inter)
        for tokens in counts:
            check(make_weights(case), *make_input(replace(case, tokens=tokens)))


@pytest.mark.parametrize("name", SLIM)
def test_narrow_tiles_of_few_rows(always_slim, name):
    """Every quarter of 64 tokens, several tiles; columns that end within a stage, or with it."""
    check_narrow(name, (9, 60))


@pytest.mark.parametrize("name", TALL)
def test_tall_tiles(always_tall, name):
    """The same, of half as many tokens more."""
    check_narrow(name, (60, 140))


@pytest.mark.parametrize("name", NARROW)
def test_narrow_tiles(always_narrow, name):
    """The same, of twice as many rows; the last 5 of 45 row tiles."""
    check_narrow(name, (9, 60), (2880, 288))


@pytest.mark.parametrize("hidden, inter", [(9, 11), (14, 15), (10, 13)])
@pytest.mark.parametrize("kind", ["warps", "narrow", "tall", "wide"])
def test_last_pieces(request, kind, hidden, inter):
    """Row tiles of w2 and of w13 of which a last piece has 1 to 7 of 8, or 1 to 3 of 4."""
    request.getfixturevalue(f"always_{kind}")
    sizes = {"hidden_size": 64 * hidden, "intermediate_size": 32 * inter}
    case = Case(scheme("mxfp4_bf16"), num_experts=3, biases=True, **sizes)
    for tokens in (9, 60, 140):
        check(make_weights(case), *make_input(replace(case, tokens=tokens)))


@pytest.mark.parametrize("hidden, inter", [(2880, 80), (1856, 192), (72, 232), (704, 1856)])
@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4_bf16", "fp8_bf16", "bf16_bf16"])
def test_ragged_sizes(always_wide, name, hidden, inter):
    if name == "mxfp4_bf16":
        hidden, inter = -(-hidden // 32) * 32, -(-inter // 32) * 32
    case = Case(SCHEMES[name], num_experts=3, hidden_size=hidden, intermediate_size=inter, top_k=2)
    for tokens in (5, 150):
        check(make_weights(case), *make_input(replace(case, tokens=tokens)))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g32_bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(always_wide, name, activation):
    case = Case(scheme(name), activation=ACTIVATIONS[activation], biases=True)
    for tokens in (1, 200):
        check(make_weights(case), *make_input(replace(case, tokens=tokens)))


def test_bad_ids_duplicates_and_one_expert(always_wide):
    case = Case(scheme("mxfp4_bf16"), tokens=340)
    weights = make_weights(case)
    packed = moelten.pack(on_gpu(weights), backend="hopper")
    x, routing = make_input(case)
    bad = spoil(routing.ids)
    for ids in (bad, torch.full_like(bad, 2), torch.full_like(bad, -1)):
        out = check(weights, x, replace(routing, ids=ids), packed)
        assert not out[(ids < 0).all(1)].any()


@pytest.mark.parametrize("name", ["int4g64_bf16", "int4g64_fp8", "int4g32_fp8", "fp8block_fp8"])
def test_router_weight_on_the_input_and_pre_scales(always_wide, name):
    check_router_weights(Case(scheme(name), tokens=150))


@pytest.mark.parametrize("kind", ["wide", "slim"])
@pytest.mark.parametrize("fmt", [Int4(32), Int4(128), Int4(64, zero_point=True), FP8((128, 128))])
def test_scales_that_differ_or_vanish(request, fmt, kind):
    """Sums change units from group to group: by 2**40 both ways, by signs, past zero scales."""
    request.getfixturevalue(f"always_{kind}")
    case = Case(Scheme(fmt, BF16), num_experts=3, hidden_size=512, intermediate_size=256)
    weights = make_weights(case)
    g = torch.Generator().manual_seed(5)

    def scaled(q, low, high):
        shape = q.scale.shape
        exponent = torch.randint(low, high, shape, generator=g)
        sign = torch.randint(0, 2, shape, generator=g) * 2 - 1
        alive = torch.rand(shape, generator=g) > 0.2
        alive[..., 0, :] = False  # a whole row (of blocks)
        scale = torch.ldexp(sign.float(), exponent) * alive
        return q.with_parts({**q.tensors(), "scale": scale.to(q.scale.dtype)})

    for low, high in ((-20, 21), (-6, -3)):
        changed = replace(
            weights, w13=scaled(weights.w13, -9, -5), w2=scaled(weights.w2, low, high)
        )
        for tokens in (7, 200):
            check(changed, *make_input(replace(case, tokens=tokens)))


@pytest.mark.parametrize("kind", ["decode", "warps", "slim", "wide"])
@pytest.mark.parametrize("name", ["fp8block_fp8", "int8block_int8", "int4g128_fp8g128"])
def test_scales_of_activations_that_differ(request, name, kind):
    """A token's scales from group to group: by 2**60 both ways, over zeros; half a last group."""
    if kind != "decode":
        request.getfixturevalue(f"always_{kind}")
    ragged = 0 if name.startswith("int4") else 64
    sizes = {"hidden_size": 640 + ragged, "intermediate_size": 384 + ragged}
    case = Case(scheme(name), num_experts=3, **sizes)
    weights = make_weights(case)
    g = torch.Generator().manual_seed(6)
    for tokens in (7, 60, 200) if kind in ("slim", "wide") else (7, 20):
        x, routing = make_input(replace(case, tokens=tokens))
        groups = -(-x.shape[1] // 128)
        exponent = torch.randint(-30, 31, (tokens, groups), generator=g).float()
        alive = torch.rand(tokens, groups, generator=g) > 0.2
        factor = (torch.exp2(exponent) * alive).repeat_interleave(128, 1)[:, : x.shape[1]]
        check(weights, (x.float() * factor).to(x.dtype), routing)


@pytest.mark.parametrize("name", SHAPES)
def test_production_shapes(name):
    check_production_shape(name, (190, 1024))


def test_graph_streams_and_chunks():
    """Captured at the first call; two streams at once; a workspace for half of the tokens."""
    weights = make_layer(scheme("mxfp4_bf16"), 6, 512, 352, SwiGLU(), False)
    packed = moelten.pack(weights, backend="hopper")
    x, routing, wanted = check_graph(weights, packed, 500)
    half = moelten.workspace_bytes(packed, 250, 2)
    workspace = torch.full((half,), 0x7F, dtype=torch.uint8, device="cuda")
    assert torch.equal(moelten.fused_moe(x, packed, routing, workspace=workspace), wanted)
    check_streams(packed, [(x, routing)] * 2, [wanted] * 2, 200)


def test_very_many_tokens():
    """131072 tokens in one call, in as many chunks as memory asks for."""
    weights = make_layer(scheme("mxfp4_bf16"), 8, 512, 256, SwiGLU(), False)
    packed = moelten.pack(weights, backend="hopper")
    x, routing = make_call(131072, 8, 512, 2)
    out = moelten.fused_moe(x, packed, routing)
    rows = torch.linspace(0, 131071, 500, device="cuda").long()
    part = Routing(routing.ids[rows], routing.weights[rows])
    assert_matches(out[rows], reference.moe(x[rows], weights, part))


def test_offsets_past_2_to_31():
    """Weights over 2**31 elements, and the rows of hidden and slots past 2**31 bytes."""
    weights = make_layer(scheme("int8_bf16"), 41, 8192, 3584, SwiGLU(), False)
    packed = moelten.pack(weights, backend="hopper")
    assert packed.tensors["w13.data"].nbytes > 2**31
    x, _ = make_call(1500, 41, 8192, 1)
    ids = torch.where(torch.arange(1500, device="cuda") < 700, 0, 40)[:, None]
    routing = Routing(ids, torch.ones(1500, 1, device="cuda"))
    out = moelten.fused_moe(x, packed, routing)
    rows = torch.tensor([0, 1, 699, 700, 1498, 1499], device="cuda")
    part = Routing(ids[rows], routing.weights[rows])
    assert_matches(out[rows], reference.moe(x[rows], weights, part))
