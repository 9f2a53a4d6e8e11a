"""Production shapes on a real GPU, where block sizes, tails and offsets are those of a model.

The reference runs on the GPU too, in fp64. Experts are fewer than the models have where all of them
would not fit beside it.
"""

from __future__ import annotations

import pytest
import torch
from metrics import assert_matches

import moelten
from moelten import GPT_OSS, SwiGLU, reference
from moelten.formats import Scheme, scheme
from moelten.qtensor import QTensor, quantize
from moelten.routing import Routing
from moelten.weights import ExpertWeights

pytestmark = pytest.mark.gpu
SHAPES = {
    "gpt-oss-120b": (scheme("mxfp4_bf16"), 128, 2880, 2880, 4, GPT_OSS, True),
    "deepseek-v3": (scheme("fp8block_fp8"), 32, 7168, 2048, 8, SwiGLU(), False),
    "kimi-k2": (scheme("int4g32_bf16"), 32, 7168, 2048, 8, SwiGLU(), False),
}
TOKENS = (1, 3, 17, 64, 257, 1024)


def make_layer(which: Scheme, experts, hidden, inter, activation, biases, seed=0) -> ExpertWeights:
    """Random weights made and quantized on the GPU, one expert at a time."""
    g = torch.Generator("cuda").manual_seed(seed)

    def matrix(halves: int, rows: int, columns: int) -> QTensor:
        parts = []
        for expert in range(experts):
            scale = (0.7 + 0.6 * expert / experts) / columns**0.5
            w = torch.randn(halves, rows, columns, generator=g, device="cuda") * scale
            parts.append(quantize(w if halves == 2 else w[0], which.weights))
        stacked = {n: torch.stack([p.tensors()[n] for p in parts]) for n in parts[0].tensors()}
        return QTensor(format=which.weights, **stacked)

    bias = {}
    if biases:
        bias["w13_bias"] = torch.randn(experts, 2, inter, generator=g, device="cuda") * 0.3
        bias["w2_bias"] = torch.randn(experts, hidden, generator=g, device="cuda") * 0.3
    w13, w2 = matrix(2, inter, hidden), matrix(1, hidden, inter)
    return ExpertWeights(w13, w2, activation, which.activations, **bias)


def make_call(tokens, experts, hidden, top_k, seed=1) -> tuple[torch.Tensor, Routing]:
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g, device="cuda").bfloat16()
    scores = torch.rand(tokens, experts, generator=g, device="cuda")
    weights, ids = scores.topk(top_k)
    return x, Routing(ids, weights.softmax(-1))


@pytest.fixture(scope="module", params=SHAPES)
def layer(request):
    which, experts, hidden, inter, top_k, activation, biases = SHAPES[request.param]
    weights = make_layer(which, experts, hidden, inter, activation, biases)
    yield weights, moelten.pack(weights, backend="triton"), top_k
    torch.cuda.empty_cache()


@pytest.mark.parametrize("tokens", TOKENS)
def test_production_shapes(layer, tokens):
    weights, packed, top_k = layer
    x, routing = make_call(tokens, weights.spec.num_experts, weights.spec.hidden_size, top_k)
    out = moelten.fused_moe(x, packed, routing, backend="triton")
    assert_matches(out.cpu(), reference.moe(x, weights, routing).cpu())


def test_graph_from_the_first_call():
    """Captured without a warm-up call; replays follow new inputs."""
    which = scheme("int4g64_fp8")
    weights = make_layer(which, 6, 512, 320, SwiGLU(), False)
    packed = moelten.pack(weights, backend="triton")
    (x, routing), (other, fresh) = (make_call(9, 6, 512, 2, seed) for seed in (3, 4))
    out, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moelten.fused_moe(x, packed, routing, out=out)
    for new_x, new in ((x.clone(), routing), (other, fresh)):
        x.copy_(new_x), routing.ids.copy_(new.ids), routing.weights.copy_(new.weights)
        graph.replay()
        assert_matches(out.cpu(), reference.moe(new_x, weights, new).cpu())


def test_two_streams():
    """Calls share no state: two streams at once give the bits that one gives."""
    weights = make_layer(scheme("mxfp4_bf16"), 8, 512, 512, SwiGLU(), False)
    packed = moelten.pack(weights, backend="triton")
    calls = [make_call(tokens, 8, 512, 2, tokens) for tokens in (5, 90)]
    wanted = [moelten.fused_moe(x, packed, routing) for x, routing in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(200):
        found = []
        for stream, (x, routing) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(moelten.fused_moe(x, packed, routing))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_offsets_past_2_to_31():
    """The last expert's weights lie beyond 2**31 elements, in codes and in scales' rows."""
    which = scheme("int8_bf16")
    weights = make_layer(which, 41, 8192, 3584, SwiGLU(), False)
    assert weights.w13.data.numel() > 2**31
    packed = moelten.pack(weights, backend="triton")
    x, _ = make_call(3, 41, 8192, 1)
    ids = torch.tensor([[40], [40], [0]], device="cuda")
    routing = Routing(ids, torch.ones(3, 1, device="cuda"))
    out = moelten.fused_moe(x, packed, routing)
    assert_matches(out.cpu(), reference.moe(x, weights, routing).cpu())
