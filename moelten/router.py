"""The methods of `moelten.routing`, on the device of their logits.

Each takes what its namesake in `moelten.routing` takes, raises what that raises and returns the
same ids; weights are equal but for the rounding of a sum. Logits on a GPU are routed by one launch
of Triton that waits for nothing, so a CUDA graph captures it, and `torch.compile` and
`torch.export` see one operator (moelten::route). Everywhere else, and without Triton or where a
gradient is asked for, the method itself runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moelten import routing
from moelten.routing import Routing, RoutingMethod

_HAS_TRITON = find_spec("triton") is not None


def _launches(logits: Tensor) -> bool:
    """Whether these logits are routed in one launch."""
    if not isinstance(logits, Tensor) or not logits.is_cuda or not _HAS_TRITON:
        return False
    return not (torch.is_grad_enabled() and logits.requires_grad)


def _routed(
    method: RoutingMethod, logits: Tensor, top_k: int, *bias: Any, **options: Any
) -> Routing:
    if not _launches(logits):
        return method(logits, top_k, *bias, **options)
    routing.check_logits(logits, top_k)
    ids, weights = torch.ops.moelten.route(logits, method.__name__, top_k, *bias, **options)
    return Routing(ids, weights, on_input=method is routing.llama4)


def _of_logits(method: RoutingMethod) -> Callable[[Tensor, int], Routing]:
    @wraps(method)
    def routed(logits: Tensor, top_k: int) -> Routing:
        return _routed(method, logits, top_k)

    return routed


softmax_topk = _of_logits(routing.softmax_topk)
topk_softmax = _of_logits(routing.topk_softmax)
softmax_topk_renormalize = _of_logits(routing.softmax_topk_renormalize)
topk_raw = _of_logits(routing.topk_raw)
sigmoid_topk = _of_logits(routing.sigmoid_topk)
topk_sigmoid = _of_logits(routing.topk_sigmoid)
sigmoid_topk_renormalize = _of_logits(routing.sigmoid_topk_renormalize)


@wraps(routing.minimax2)
def minimax2(
    logits: Tensor, top_k: int, bias: Tensor, *, routed_scaling_factor: float = 1.0
) -> Routing:
    scaling = routed_scaling_factor
    return _routed(routing.minimax2, logits, top_k, bias, routed_scaling_factor=scaling)


@wraps(routing.deepseek_v3)
def deepseek_v3(
    logits: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    *,
    num_expert_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
    norm_topk_prob: bool = True,
) -> Routing:
    return _routed(
        routing.deepseek_v3,
        logits,
        top_k,
        bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
    )


@wraps(routing.llama4)
def llama4(logits: Tensor, top_k: int = 1) -> Routing:
    return _routed(routing.llama4, logits, top_k)


@wraps(routing.sqrt_softplus_topk)
def sqrt_softplus_topk(
    logits: Tensor, top_k: int, bias: Tensor | None = None, *, routed_scaling_factor: float = 1.0
) -> Routing:
    scaling = routed_scaling_factor
    return _routed(routing.sqrt_softplus_topk, logits, top_k, bias, routed_scaling_factor=scaling)


METHODS: dict[str, RoutingMethod] = {name: globals()[name] for name in routing.METHODS}


def _route(
    logits: Tensor, method: str, top_k: int, *bias: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    from moelten.kernels.triton_routing import route

    found = route(method, logits, top_k, *bias, **options)
    return found.ids, found.weights


def _route_fake(
    logits: Tensor, method: str, top_k: int, *bias: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


# torch.library holds registrations for as long as this object lives.
_LIBRARY: Any = torch.library.Library("moelten", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "route(Tensor logits, str method, int top_k, Tensor? bias=None, *, int num_expert_group=1, "
    "int topk_group=1, float routed_scaling_factor=1.0, bool norm_topk_prob=True) "
    "-> (Tensor ids, Tensor weights)"
)
_LIBRARY.impl("route", _route, "CompositeExplicitAutograd")
torch.library.register_fake("moelten::route", _route_fake, lib=_LIBRARY)
