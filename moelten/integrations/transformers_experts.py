"""moelten as an experts implementation of transformers: bf16, fp16 and fp32 experts as they are.

Every experts module on transformers' experts interface says how its weights lie and which function
stands between the two GEMMs; this file reads both and refuses by name what moelten does not have.
Backends that read canonical rows get views of the module's own parameters, whatever their order:
no second copy of the weights, and every in-place update is seen. A backend with a layout of its own
gets a packed copy, as large as the weights, kept until a parameter changes. Inference only. Packed
checkpoints are not here: `transformers_quantizer` loads those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations as hf
from transformers.integrations.moe import _default_apply_gate

from moelten import kernels
from moelten.activations import (
    GELU,
    Activation,
    GeGLU,
    Identity,
    ReGLU,
    ReLU2,
    SiLU,
    SwiGLU,
)
from moelten.errors import UnsupportedError
from moelten.formats import BF16, FP16, FP32, Scheme
from moelten.kernels.cpu import RowsLayout
from moelten.moe import fused_moe, pack
from moelten.packed import PackedExperts
from moelten.qtensor import QTensor
from moelten.routing import Routing
from moelten.weights import ExpertSpec, ExpertWeights

FLOATS = {fmt.data_dtype: fmt for fmt in (BF16, FP16, FP32)}

_Pair = tuple[Activation | None, Activation | None]
_SILU: _Pair = (SwiGLU(), SiLU())
_GELU: _Pair = (GeGLU(), GELU())
_GELU_TANH: _Pair = (GeGLU("tanh"), GELU("tanh"))
# act_fn (a class of modules, or a function) -> the activation with a gate, and without one.
_ACT_FNS: dict[Any, _Pair] = {
    hf.SiLUActivation: _SILU,
    nn.SiLU: _SILU,
    F.silu: _SILU,
    hf.GELUActivation: _GELU,
    F.gelu: _GELU,
    hf.GELUTanh: _GELU_TANH,
    hf.NewGELUActivation: _GELU_TANH,
    hf.FastGELUActivation: _GELU_TANH,
    hf.AccurateGELUActivation: _GELU_TANH,
    hf.QuickGELUActivation: (SwiGLU(alpha=1.702), None),
    nn.ReLU: (ReGLU(), None),
    hf.ReLUSquaredActivation: (None, ReLU2()),
    hf.LinearActivation: (None, Identity()),
}


def activation_of(experts: Any) -> Activation:
    """The moelten activation between the two GEMMs of an experts module of transformers.

    Raises UnsupportedError, naming the class, for a gate, an act_fn or a norm that moelten does not
    have; it never substitutes a similar one.
    """
    if experts.has_post_expert_norm:
        raise _refusal(experts, "normalizes each expert's output, which moelten does not")
    if not experts.has_gate:
        return _from_act_fn(experts)
    gate = getattr(experts._apply_gate, "__func__", experts._apply_gate)
    if gate is _default_apply_gate and experts.is_concatenated:
        return _from_act_fn(experts)
    name = f"{getattr(gate, '__module__', '')}.{getattr(gate, '__qualname__', gate)}"
    if name not in _GATES:
        known = ", ".join(sorted(key.split(".")[-2] for key in _GATES))
        raise _refusal(
            experts,
            f"gates with {name}, which moelten does not know; it knows the gates of {known}",
        )
    return _GATES[name](experts)


def is_experts(module: nn.Module) -> bool:
    """Whether a module runs through transformers' experts interface."""
    return all(
        hasattr(module, name)
        for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
    )


def spec_of(experts: Any) -> ExpertSpec:
    """What an experts module is, from its attributes and the shapes of its parameters.

    Raises UnsupportedError for an activation or a weight dtype that moelten cannot run in place.
    """
    activation = activation_of(experts)
    parts = views(experts)
    w2 = parts["w2.data"]
    if w2.dtype not in FLOATS:
        raise _refusal(
            experts,
            f"holds {w2.dtype} weights of another quantizer; load its checkpoint packed, with "
            "moelten.integrations.transformers.load",
        )
    fmt = FLOATS[w2.dtype]
    extras = tuple(name for name in parts if not name.endswith(".data"))
    num_experts, hidden, inter = w2.shape
    return ExpertSpec(Scheme(fmt, fmt), num_experts, hidden, inter, activation, extras)


def views(experts: Any) -> dict[str, Tensor]:
    """The module's parameters by their canonical names and axes, sharing their memory.

    w13.data [E, 2 or 1, I, H] gate half first, w2.data [E, H, I], and the biases in fp32 (those
    alone are converted).
    """
    kind = "gate_up_proj" if experts.has_gate else "up_proj"
    w13, w2 = getattr(experts, kind), experts.down_proj
    if experts.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    parts = {"w13.data": _halves(w13, experts), "w2.data": w2}
    if experts.has_bias:
        parts["w13_bias"] = _halves(getattr(experts, f"{kind}_bias"), experts).float()
        parts["w2_bias"] = experts.down_proj_bias.float()
    return parts


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls in place of an experts module's own forward.

    hidden_states [T, H], top_k_index [T, k] (ids >= num_experts contribute nothing), top_k_weights
    [T, k]; returns [T, H] in hidden_states' dtype.
    """
    x = hidden_states.to(self.down_proj.dtype).contiguous()
    y: Tensor
    signature = _signature(self)
    if signature is None:
        y = fused_moe(x, _packed_copy(self), Routing(top_k_index, top_k_weights))
    else:
        # The registered operator itself: views change with every call, their description does not.
        tensors = list(views(self).values())
        y = torch.ops.moelten.fused_moe(x, top_k_index, top_k_weights, False, tensors, signature)
    return y.to(hidden_states.dtype)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _signature(experts: Any) -> str | None:
    """The operator's description of the module's own rows; None if the backend needs a copy."""
    return _row_signature(spec_of(experts), experts.down_proj.device.type)


@lru_cache(maxsize=1024)
def _row_signature(spec: ExpertSpec, device: str) -> str | None:
    layout = kernels.select(spec, torch.device(device)).layout
    if not isinstance(layout, RowsLayout):
        return None
    rows = torch.empty(spec.num_experts, 0)
    names = ("w13.data", "w2.data", *spec.extras)
    return PackedExperts(spec, layout, dict.fromkeys(names, rows), layout.version).signature


# Of each parameter: itself, weakly (an address may be used again), its address, its version.
_States = list[tuple[ref[Tensor], int, int]]
_COPIES: WeakKeyDictionary[nn.Module, tuple[_States, PackedExperts]] = WeakKeyDictionary()


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _packed_copy(experts: Any) -> PackedExperts:
    """The module's weights in its backend's layout, packed again whenever a parameter changed.

    A compiled graph keeps the copy that it was traced with, and inference mode hides in-place
    writes; a new parameter or a new storage is always seen.
    """
    parameters = list(experts.parameters())
    states, packed = _COPIES.get(experts, ([], None))
    if packed is None or not _unchanged(states, parameters):
        packed = _pack(experts)
        _COPIES[experts] = [_state(parameter) for parameter in parameters], packed
    return packed


@torch.no_grad()
def _pack(experts: Any) -> PackedExperts:
    spec, parts = spec_of(experts), views(experts)
    fmt = spec.scheme.weights
    w13, w2 = (QTensor(parts[name].detach(), fmt) for name in ("w13.data", "w2.data"))
    extras: dict[str, Any] = {name: parts[name] for name in spec.extras}
    return pack(ExpertWeights(w13, w2, spec.activation, spec.scheme.activations, **extras))


def _state(parameter: Tensor) -> tuple[ref[Tensor], int, int]:
    version = 0 if parameter.is_inference() else parameter._version
    return ref(parameter), parameter.data_ptr(), version


def _unchanged(states: _States, parameters: list[nn.Parameter]) -> bool:
    return len(states) == len(parameters) and all(
        state[0]() is parameter and state[1:] == _state(parameter)[1:]
        for state, parameter in zip(states, parameters, strict=True)
    )


def _halves(rows: Tensor, experts: Any) -> Tensor:
    """View [E, 2I, ...] as [E, 2, I, ...], gate half first; [E, 1, I, ...] without a gate."""
    if not experts.has_gate:
        return rows.unsqueeze(1)
    if experts.is_concatenated:
        return rows.view(rows.shape[0], 2, -1, *rows.shape[2:])
    return rows.view(rows.shape[0], -1, 2, *rows.shape[2:]).transpose(1, 2)


def _from_act_fn(experts: Any) -> Activation:
    act_fn = experts.act_fn
    kind = type(act_fn) if isinstance(act_fn, nn.Module) else act_fn
    gated, plain = _ACT_FNS.get(kind, (None, None))
    found = gated if experts.has_gate else plain
    if found is None:
        name = getattr(kind, "__name__", str(kind))
        where = "with" if experts.has_gate else "without"
        raise _refusal(experts, f"has act_fn {name} {where} a gate, which moelten does not run")
    return found


def _refusal(experts: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(experts).__name__} {reason}. Run this model with another experts implementation, "
        'e.g. model.set_experts_implementation("grouped_mm")'
    )


def _gpt_oss(experts: Any) -> Activation:
    return SwiGLU(experts.alpha, 1.0, experts.limit)


def _minimax_m3(experts: Any) -> Activation:
    return SwiGLU(experts.swiglu_alpha, 1.0, experts.swiglu_limit)


def _clamped_swiglu(experts: Any) -> Activation:
    return SwiGLU(limit=experts.swiglu_limit)


def _deepseek_v4(experts: Any) -> Activation:
    if _from_act_fn(experts) != SwiGLU():
        raise _refusal(experts, f"clamps the gate of {experts.act_fn}, moelten only that of silu")
    return SwiGLU(limit=experts.limit)


def _gates() -> dict[str, Callable[[Any], Activation]]:
    table: tuple[tuple[str, str, Callable[[Any], Activation]], ...] = (
        ("gpt_oss", "GptOssExperts", _gpt_oss),
        ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", _gpt_oss),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", _minimax_m3),
        ("deepseek_v4", "DeepseekV4Experts", _deepseek_v4),
        ("hy_v4", "HYV4Experts", _clamped_swiglu),
        ("glm5_next", "Glm5NextTextExperts", _clamped_swiglu),
        ("beam", "BeamExperts", _from_act_fn),  # the default gate, computed in fp32
    )
    return {
        f"transformers.models.{family}.modeling_{family}.{name}._apply_gate": read
        for family, name, read in table
    }


_GATES = _gates()
