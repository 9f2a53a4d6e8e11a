"""Production shapes on a real GPU, where block sizes, tails and offsets are those of a model.

The reference runs on the GPU too, in fp64. Experts are fewer than the models have where all of them
would not fit beside it.
"""

from __future__ import annotations

import pytest
import torch
from gpu_layers import check_graph, check_streams, make_call, make_layer
from metrics import assert_matches

import moelten
from moelten import GPT_OSS, SwiGLU, reference
from moelten.formats import scheme
from moelten.routing import Routing

pytestmark = pytest.mark.gpu
SHAPES = {
    "gpt-oss-120b": (scheme("mxfp4_bf16"), 128, 2880, 2880, 4, GPT_OSS, True),
    "deepseek-v3": (scheme("fp8block_fp8"), 32, 7168, 2048, 8, SwiGLU(), False),
    "kimi-k2": (scheme("int4g32_bf16"), 32, 7168, 2048, 8, SwiGLU(), False),
}
TOKENS = (1, 3, 17, 64, 257, 1024)


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
    weights = make_layer(scheme("int4g64_fp8"), 6, 512, 320, SwiGLU(), False)
    check_graph(weights, moelten.pack(weights, backend="triton"), 9)


def test_two_streams():
    weights = make_layer(scheme("mxfp4_bf16"), 8, 512, 512, SwiGLU(), False)
    packed = moelten.pack(weights, backend="triton")
    calls = [make_call(tokens, 8, 512, 2, tokens) for tokens in (5, 90)]
    wanted = [moelten.fused_moe(x, packed, routing) for x, routing in calls]
    check_streams(packed, calls, wanted, 200)


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
