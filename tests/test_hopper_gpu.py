"""The Hopper backend on the GPU it is for, against the reference in fp64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, Case, make_input, make_weights
from gpu_layers import check_graph, check_streams, make_call, make_layer
from hopper_layers import (
    SCHEMES,
    SHAPES,
    backend,
    check,
    check_production_shape,
    check_router_weights,
    check_scheme,
    on_gpu,
    spoil,
)
from metrics import assert_matches
from ties import assert_matches_but_for_ties

import moelten
from moelten import SwiGLU, reference
from moelten.formats import BF16, FP16, MXFP4, Float, Scheme, scheme
from moelten.kernels.hopper_codes import Storage, storage
from moelten.kernels.hopper_schedule import block_of, choose_wide, make_variant
from moelten.routing import Routing
from moelten.weights import ExpertWeights

pytestmark = pytest.mark.gpu
TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 100, 257, 512)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(name):
    check_scheme(SCHEMES[name], TOKENS)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g32z_bf16", "fp8_bf16", "bf16_bf16"])
def test_fp16_activations(name, fp16):
    """Every kind of code also has operands in fp16."""
    weights = SCHEMES[name].weights if name in SCHEMES else scheme(name).weights
    act = FP16 if fp16 else BF16
    which = Scheme(act if isinstance(weights, Float) else weights, act)
    case = Case(which, hidden_size=448, intermediate_size=320)
    for tokens in (5, 130):
        made = make_weights(replace(case, tokens=tokens))
        check(made, *make_input(replace(case, tokens=tokens)))


@pytest.mark.parametrize("hidden", [2880, 1856, 72])
@pytest.mark.parametrize("inter", [80, 192, 232, 320, 704, 1856])
@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4_bf16", "fp8_bf16", "bf16_bf16"])
def test_ragged_sizes(name, inter, hidden):
    which = SCHEMES[name]
    if isinstance(which.weights, MXFP4) and (inter % 32 or hidden % 32):
        pytest.skip("groups of 32 must divide both")
    case = Case(which, num_experts=3, hidden_size=hidden, intermediate_size=inter, top_k=2)
    check(make_weights(case), *make_input(case))


@pytest.mark.parametrize("experts, top_k", [(1, 1), (3, 2), (60, 4), (129, 32), (289, 8)])
def test_numbers_of_experts(experts, top_k):
    case = Case(
        scheme("mxfp4_bf16"),
        num_experts=experts,
        hidden_size=64,
        intermediate_size=64,
        top_k=top_k,
        tokens=21,
    )
    check(make_weights(case), *make_input(case))


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g32_bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(name, activation):
    case = Case(scheme(name), activation=ACTIVATIONS[activation], biases=True)
    for tokens in (1, 33):
        check(make_weights(case), *make_input(replace(case, tokens=tokens)))


def test_bad_ids_duplicates_and_one_expert():
    case = Case(scheme("mxfp4_bf16"), tokens=40)
    weights = make_weights(case)
    packed = moelten.pack(on_gpu(weights), backend=backend(weights.spec.scheme))
    x, routing = make_input(case)
    bad = spoil(routing.ids)
    same = torch.full_like(bad, 2)
    for ids in (bad, same, bad.long(), torch.full_like(bad, -1)):
        out = check(weights, x, replace(routing, ids=ids), packed)
        assert not out[(ids < 0).all(1)].any()
    ranged = packed.expert_range(1, 4)
    part = ExpertWeights(weights.w13[1:4], weights.w2[1:4], weights.activation, first_expert=1)
    check(part, x, replace(routing, ids=bad), ranged)
    # One token needs no plan, which else leaves such ids out.
    for row in range(len(bad)):
        x_row, weight = x[row : row + 1], routing.weights[row : row + 1]
        for ids in (bad[row : row + 1], same[row : row + 1].long(), bad[row : row + 1].long()):
            one = Routing(ids, weight, routing.on_input)
            check(weights, x_row, one, packed)
            check(part, x_row, one, ranged)
    huge = Routing(torch.full_like(bad[:1], 1, dtype=torch.int64) + 2**32, routing.weights[:1])
    assert not check(weights, x[:1], huge, packed).any()


def test_every_exponent():
    """Scales differ in every block of every row, over the whole range that bf16 products allow."""
    case = Case(scheme("mxfp4_bf16"), num_experts=3, hidden_size=512, intermediate_size=256)
    weights = make_weights(case)
    g = torch.Generator().manual_seed(7)

    def scaled(q, low, high):
        scale = torch.randint(low, high, q.scale.shape, generator=g, dtype=torch.uint8)
        return q.with_parts({**q.tensors(), "scale": scale})

    for low, high in ((100, 128), (60, 70), (118, 124)):
        w = replace(weights, w13=scaled(weights.w13, 118, 124), w2=scaled(weights.w2, low, high))
        check(w, *make_input(case))


@pytest.mark.parametrize("name", ["int4g64_bf16", "int4g64_fp8", "fp8block_fp8"])
def test_router_weight_on_the_input_and_pre_scales(name):
    check_router_weights(Case(scheme(name)))


@pytest.mark.parametrize("name", SHAPES)
def test_production_shapes(name):
    check_production_shape(name, (1, 3, 17, 64, 257))


def test_graph_from_the_first_call():
    weights = make_layer(scheme("mxfp4_bf16"), 6, 512, 352, SwiGLU(), False)
    check_graph(weights, moelten.pack(weights, backend="hopper"), 9)


@pytest.mark.parametrize("name", ["mxfp4_bf16", "int4g128_fp16", "int4g128_fp8"])
def test_a_workspace_serves_all(name):
    """Bit for bit what a call of its own memory gives, whatever it held; nothing is allocated."""
    which = SCHEMES[name]
    weights = make_layer(which, 8, 512, 384, SwiGLU(), False)
    packed = moelten.pack(weights, backend=backend(which))
    x, routing = make_call(33, 8, 512, 2)
    x = x.to(input_dtype(which))
    wanted, out = moelten.fused_moe(x, packed, routing), torch.empty_like(x)
    size = moelten.workspace_bytes(packed, 33, 2)
    for value in (0xFF, 0x7F):
        workspace = torch.full((size,), value, dtype=torch.uint8, device="cuda")
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        moelten.fused_moe(x, packed, routing, out=out, workspace=workspace)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        assert torch.equal(out, wanted)


def test_same_bits_on_two_streams():
    weights = make_layer(scheme("int4g32_bf16"), 8, 512, 512, SwiGLU(), False)
    packed = moelten.pack(weights, backend="hopper")
    calls = [make_call(tokens, 8, 512, 2, tokens) for tokens in (5, 90)]
    wanted = [moelten.fused_moe(x, packed, routing) for x, routing in calls]
    check_streams(packed, calls, wanted, 1000)


def input_dtype(which: Scheme) -> torch.dtype:
    return torch.float16 if which.activations == FP16 else torch.bfloat16


EVERY = {
    "few experts": (4, 1024, 2048, 2),
    "many experts": (32, 2048, 768, 8),
}


# Codes of 8 bits take the same kernels, with a scale of each row beside.
QUANTIZED = ("int4g128_fp8", "mxfp4_int8", "fp8_fp8", "int8_int8", "fp8block_fp8")
NUMBERED = [n for n, s in SCHEMES.items() if isinstance(s.activations, Float) or n in QUANTIZED]


@pytest.mark.parametrize("shape", EVERY)
@pytest.mark.parametrize("name", NUMBERED)
def test_every_number_of_tokens(name, shape):
    """1 to 512 tokens, one more each time: the old ones' bits where K splits alike, and in bounds.

    The rows are always the same ones, so that one reference serves all. Where hidden rows are
    quantized again, the most of them stand for all fewer, which have the same bits: ties are looked
    for once for each way to split K.
    """
    (experts, hidden, inter, top_k), which = EVERY[shape], SCHEMES[name]
    weights = make_layer(which, experts, hidden, inter, SwiGLU(), False)
    packed = moelten.pack(weights, backend=backend(which))
    x, routing = make_call(512, experts, hidden, top_k)
    x = x.to(input_dtype(which))
    wanted, known = reference.moe(x, weights, routing), {}
    for tokens in range(1, 513):
        out = moelten.fused_moe(x[:tokens], packed, first_rows(routing, tokens))
        before = known.get(way := way_of(packed, tokens * top_k), out[:0])
        assert torch.equal(out[: len(before)], before), tokens
        known[way] = out
        if isinstance(which.activations, Float):
            assert_matches(out, wanted[:tokens])
    for out in known.values():
        tokens = len(out)
        part = first_rows(routing, tokens)
        assert_matches_but_for_ties(out, x[:tokens], weights, part, wanted[:tokens])
    assert len(known) > 1 or shape == "many experts"


def way_of(packed, pairs: int) -> int | tuple[bool, Storage]:
    """What the bits of a token depend on: into how many parts GEMM2 cuts its K; for many tokens
    whether single warps multiply, and as what weights are multiplied."""
    spec, fmt = packed.spec, packed.spec.scheme.activations
    stored = storage(spec.scheme.weights, "fp16" if fmt == FP16 else "bf16")
    rows, columns = spec.hidden_size, spec.intermediate_size
    sizes = pairs, spec.num_experts, (rows, columns)
    x_scale = "none" if isinstance(fmt, Float) else "group" if fmt.blocks[1] else "row"
    if wide := choose_wide(stored, "bfloat16", *sizes, x_scale=x_scale):
        return wide.by_warp, wide.weights
    sizes = block_of(pairs, spec.num_experts), pairs, spec.num_experts
    return make_variant(stored, *sizes, -(-rows // 64), columns, may_split=True).splits


def test_a_token_does_not_depend_on_the_others():
    """Bits depend on the kernel, the operands and the splits of K, and those only on the number of
    pairs.

    Neither the width of a tile nor a token's place in it matters.
    """
    weights = make_layer(scheme("mxfp4_bf16"), 8, 1024, 512, SwiGLU(), False)
    packed = moelten.pack(weights, backend="hopper")
    x, routing = make_call(400, 8, 1024, 2)
    order = torch.randperm(400, device="cuda")
    stored = storage(packed.spec.scheme.weights, "bf16")
    assert way_of(packed, 122) == way_of(packed, 800) == (False, stored)
    assert way_of(packed, 42) == way_of(packed, 120) == (True, stored)
    assert way_of(packed, 40) in range(1, 9)
    for most, parts in (
        (400, (order, order[:300], order[:210], order[:61])),
        (45, (order[:21] % 45, order[:45] % 45, order[:52] % 45, order[:60] % 45)),
        (20, (order[:20] % 20,)),
    ):
        whole = moelten.fused_moe(x[:most], packed, first_rows(routing, most))
        for rows in parts:
            part = Routing(routing.ids[rows], routing.weights[rows])
            assert torch.equal(moelten.fused_moe(x[rows], packed, part), whole[rows])


def first_rows(routing: Routing, count: int) -> Routing:
    return Routing(routing.ids[:count], routing.weights[:count], routing.on_input)


def test_offsets_past_2_to_31():
    """The last expert's packed bytes lie beyond 2**31."""
    which = scheme("int8_bf16")
    weights = make_layer(which, 41, 8192, 3584, SwiGLU(), False)
    packed = moelten.pack(weights, backend="hopper")
    assert packed.tensors["w13.data"].nbytes > 2**31
    x, _ = make_call(3, 41, 8192, 1)
    ids = torch.tensor([[40], [40], [0]], device="cuda")
    routing = Routing(ids, torch.ones(3, 1, device="cuda"))
    out = moelten.fused_moe(x, packed, routing)
    assert_matches(out.cpu(), reference.moe(x, weights, routing).cpu())


def test_hopper_is_what_runs_by_default():
    for name in ("mxfp4_bf16", "fp16_fp16", "int4g128_fp8", "int8_int8", "fp8block_fp8"):
        which = scheme(name)
        weights = make_layer(which, 2, 128, 128, SwiGLU(), False)
        assert moelten.pack(weights).layout.name == backend(which)


@pytest.mark.parametrize("tokens", [1, 7, 60, 400])
def test_repeated_launches(monkeypatch, tokens):
    """Calls of one size: on other memory, on another thread or stream, the same bits."""
    triton = pytest.importorskip("triton")
    weights = make_layer(scheme("int4g32_bf16"), 8, 512, 384, SwiGLU(), False)
    first = moelten.pack(weights, backend="hopper")
    copy = replace(first, tensors={n: t.clone() for n, t in first.tensors.items()})
    other = moelten.pack(
        make_layer(scheme("int4g32_bf16"), 8, 512, 384, SwiGLU(), False, seed=5), backend="hopper"
    )
    x, routing = make_call(tokens, 8, 512, 2)
    padded = torch.zeros(tokens * 512 + 4, dtype=x.dtype, device="cuda")
    odd = padded[4:].view(tokens, 512).copy_(x)  # an address that is no multiple of 16
    wanted = reference.moe(x, weights, routing)
    out = moelten.fused_moe(x, first, routing)
    assert_matches(out, wanted)
    with monkeypatch.context() as without:
        without.setattr(triton.JITFunction, "run", pytest.fail)
        assert torch.equal(moelten.fused_moe(x, first, routing), out)
        assert torch.equal(moelten.fused_moe(x.clone(), copy, moved(routing)), out)
        assert not torch.equal(moelten.fused_moe(x, other, routing), out)
    assert torch.equal(moelten.fused_moe(odd, first, routing), out)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), ThreadPoolExecutor(1) as pool:
        assert torch.equal(moelten.fused_moe(x, first, routing), out)
        assert torch.equal(pool.submit(moelten.fused_moe, x, first, routing).result(), out)
    same = x.clone()
    moelten.fused_moe(same, first, routing, out=same)
    assert torch.equal(same, out)


def test_rows_of_words():
    """Kernels read x in words of 4 bytes."""
    weights = make_layer(scheme("mxfp4_bf16"), 2, 64, 64, SwiGLU(), False)
    packed = moelten.pack(weights, backend="hopper")
    x, routing = make_call(3, 2, 64, 1)
    odd = torch.zeros(3 * 64 + 1, dtype=x.dtype, device="cuda")[1:].view(3, 64)
    for _ in range(2):
        with pytest.raises(ValueError, match="x: expected an address that is a multiple of 4"):
            moelten.fused_moe(odd, packed, routing)
        moelten.fused_moe(x, packed, routing)


def moved(routing: Routing) -> Routing:
    """The same routing elsewhere, its columns not contiguous."""
    ids, weights = routing.ids.t().contiguous().t(), routing.weights.t().contiguous().t()
    return Routing(ids, weights, routing.on_input)
