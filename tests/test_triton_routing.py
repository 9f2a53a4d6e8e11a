"""Routing on Triton: ids equal to the CPU's in every row, weights equal to rounding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_device import DEVICE, INTERPRET

from moelten import router
from moelten.kernels.triton_routing import route
from moelten.routing import METHODS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROWS = 24 if INTERPRET else 10_000
BIASED = ("minimax2", "deepseek_v3", "sqrt_softplus_topk")


def hard_logits(rows: int, experts: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Ties, both zeros, masks, saturation, NaN of both signs, infinities, and plain rows."""
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(rows, experts, generator=g) * 4
    s[1::6] = s[1::6].round()
    s[2::6] *= 10
    s[3::6] = torch.where(torch.rand(s[3::6].shape, generator=g) < 0.7, -torch.inf, s[3::6])
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    pick = special[torch.randint(0, 6, s[4::6].shape, generator=g)]
    s[4::6] = torch.where(torch.rand(s[4::6].shape, generator=g) < 0.3, pick, s[4::6])
    s[5::12] = 0
    s[11::24] = -torch.inf
    return s.to(dtype)


def compare(method, logits, top_k, **kwargs):
    wanted = METHODS[method](logits, top_k, **kwargs)
    moved = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
    found = route(method, logits.to(DEVICE), top_k, **moved)
    assert torch.equal(found.ids.cpu(), wanted.ids)
    assert found.on_input == wanted.on_input
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=0, equal_nan=True)
    close(found.weights.cpu(), wanted.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts, top_k", [(32, 4), (61, 6), (256, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_ids_are_those_of_the_cpu(method, experts, top_k, dtype):
    kwargs = {}
    if method in BIASED:
        kwargs = {"bias": torch.randn(experts) * 0.3, "routed_scaling_factor": 2.5}
    logits = hard_logits(ROWS, experts, dtype)
    compare(method, logits, 1 if method == "llama4" else top_k, **kwargs)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "experts, groups, kept, top_k", [(256, 8, 4, 8), (60, 5, 2, 6), (16, 16, 4, 4), (6, 2, 1, 3)]
)
def test_groups(experts, groups, kept, top_k, biased):
    bias = torch.randn(experts) * 0.3 if biased else None
    for norm in (True, False):
        compare(
            "deepseek_v3",
            hard_logits(ROWS, experts),
            top_k,
            num_expert_group=groups,
            topk_group=kept,
            norm_topk_prob=norm,
            **({"bias": bias} if biased else {}),
        )


def test_errors_are_those_of_the_method():
    with pytest.raises(ValueError, match="top_k: expected"):
        route("topk_softmax", torch.zeros(2, 4, device=DEVICE), 5)
    with pytest.raises(ValueError, match="expected top_k=1"):
        route("llama4", torch.zeros(2, 4, device=DEVICE), 2)
    assert route("topk_raw", torch.zeros(0, 4, device=DEVICE), 2).ids.shape == (0, 2)


@pytest.fixture
def launches(monkeypatch):
    """In the interpreter, the public functions launch as they do on a GPU."""
    if INTERPRET:
        monkeypatch.setattr(router, "_launches", lambda logits: True)


def arguments(method: str, experts: int) -> tuple[int, dict]:
    """top_k, and a bias where the method takes one."""
    bias = {"bias": torch.randn(experts, device=DEVICE) * 0.3} if method in BIASED else {}
    return 1 if method == "llama4" else 4, bias


@pytest.mark.parametrize("method", METHODS)
def test_the_public_functions_launch(method, launches):
    logits = hard_logits(24, 32).to(DEVICE)
    top_k, bias = arguments(method, 32)
    found = router.METHODS[method](logits, top_k, **bias)
    kernel = route(method, logits, top_k, **bias)
    assert torch.equal(found.ids, kernel.ids)
    assert torch.equal(found.weights.nan_to_num(), kernel.weights.nan_to_num())
    assert found.on_input == (method == "llama4")


def test_every_option_reaches_the_kernel(launches):
    logits, bias = hard_logits(24, 16).to(DEVICE), torch.randn(16, device=DEVICE)
    options = {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    for norm in (True, False):
        found = router.deepseek_v3(logits, 3, bias, norm_topk_prob=norm, **options)
        wanted = METHODS["deepseek_v3"](logits.cpu(), 3, bias.cpu(), norm_topk_prob=norm, **options)
        assert torch.equal(found.ids.cpu(), wanted.ids)
        torch.testing.assert_close(found.weights.cpu(), wanted.weights, equal_nan=True)


def test_a_strided_bias(launches):
    logits, wide = hard_logits(24, 16).to(DEVICE), torch.randn(32, device=DEVICE)
    found = router.minimax2(logits, 3, wide[::2])
    assert torch.equal(found.ids, router.minimax2(logits, 3, wide[::2].contiguous()).ids)


def test_public_errors(launches):
    logits = torch.zeros(2, 4, device=DEVICE)
    for call, message in (
        (lambda: router.topk_softmax(logits, 5), "top_k: expected an int in 1..4"),
        (lambda: router.topk_softmax(logits, 2.0), "top_k: expected an int"),
        (lambda: router.topk_softmax(logits.int(), 2), "logits: expected float32"),
        (lambda: router.llama4(logits, 2), "expected top_k=1"),
        (lambda: router.minimax2(logits, 2, torch.zeros(3, device=DEVICE)), "bias: expected"),
        (lambda: router.deepseek_v3(logits, 2, num_expert_group=3), "num_expert_group to divide"),
    ):
        # Once is not enough: an error must not be remembered as a success.
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                call()


def test_compile_and_opcheck(launches):
    logits = hard_logits(24, 16).to(DEVICE)

    def layer(logits):
        routing = router.topk_softmax(logits * 2, 3)
        return routing.ids, routing.weights + 1

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (24, 7):
        found, wanted = compiled(logits[:rows]), layer(logits[:rows])
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], equal_nan=True)
    torch.library.opcheck(torch.ops.moelten.route.default, (logits[::6], "topk_raw", 3))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_captured_without_a_sync(method):
    """From the first call, one kernel, and nothing that waits for the device."""
    logits = hard_logits(50, 128).to(DEVICE)
    top_k, bias = arguments(method, 128)
    function = router.METHODS[method]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(logits, top_k, **bias)
    fresh = hard_logits(50, 128, seed=9).to(DEVICE)
    logits.copy_(fresh)
    graph.replay()
    assert torch.equal(found.ids, function(fresh, top_k, **bias).ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(fresh, top_k, **bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(fresh, top_k, **bias)
        torch.cuda.synchronize()
    kernels = [e.key for e in profile.key_averages() if e.self_device_time_total > 0]
    assert kernels == ["route_kernel"], kernels


@pytest.mark.gpu
def test_a_gradient_takes_the_method_itself():
    logits = torch.randn(5, 8, device="cuda", requires_grad=True)
    router.topk_softmax(logits, 2).weights.sum().backward()
    assert logits.grad is not None
