"""Routing on Triton: ids equal to the CPU's in every row, weights equal to rounding."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("runs on a GPU or through test_triton_interpreter.py", allow_module_level=True)
pytest.importorskip("triton")

from moelten.kernels.triton_routing import route  # noqa: E402
from moelten.routing import METHODS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
ROWS = 60 if INTERPRET else 10_000
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
