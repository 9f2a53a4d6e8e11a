"""The public operation: `pack` once, then `fused_moe` on every call; `explain` says who would run.

All validation is here, before any work: what a backend cannot honour is refused with a reason.
`fused_moe` is a registered torch operator (moelten::fused_moe, and an out variant with the right
mutation schema), so `torch.compile(fullgraph=True)` and `torch.export` see one opaque call; where
nobody looks, the backend is called without it.
Inference only: asking for a gradient through it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from moelten import kernels
from moelten.errors import FormatError, UnsupportedError
from moelten.kernels import Backend, Verdict
from moelten.packed import PackedExperts, decode_spec
from moelten.routing import Routing
from moelten.weights import ExpertSpec, ExpertWeights

# Shape, dtype and device of a tensor.
_Kind: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


def pack(
    weights: ExpertWeights,
    *,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> PackedExperts:
    """Put canonical weights into the layout of the backend that will run them.

    device: where they will run (default: where they are); backend: a name from `explain`, or the
    first that runs. Peak extra memory is one expert. Raises UnsupportedError if no backend runs the
    scheme there (naming every reason), FormatError for a NaN scale.

    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> from moelten import ExpertWeights, MXFP4
    >>> experts = pack(
    ...     ExpertWeights.from_tensors(w13, w2, gate_up_order="gate_up", weight_format=MXFP4()))
    >>> experts.spec.scheme.name
    'mxfp4_bf16'
    """
    target = torch.device(device) if device is not None else weights.w2.device
    return pack_stream(weights.spec, weights.experts(), device=target, backend=backend)


def pack_stream(
    spec: ExpertSpec,
    experts: Iterable[ExpertWeights],
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> PackedExperts:
    """`pack` for experts that arrive one by one, each with E = 1: a checkpoint too big to hold."""
    target = torch.device(device)
    return PackedExperts.pack(spec, experts, kernels.select(spec, target, backend).layout, target)


def fused_moe(
    x: Tensor,
    experts: PackedExperts,
    routing: Routing,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run the experts of one MoE layer on their quantized weights.

        out[t] = sum_j weights[t, j] * mlp[ids[t, j]](x[t])       (`reference.moe` is the spec)

    x:        [T, H] bf16, fp16 or fp32, contiguous, on the experts' device; for 16-bit and 32-bit
              activation formats its dtype is that format's
    experts:  from `pack`
    routing:  T tokens; ids outside the local experts contribute exactly zero and read no weight,
              duplicates add up
    out:      [T, H] of x's dtype to write to, instead of a new tensor
    workspace: uint8 [bytes] on the same device, scratch whose contents do not matter. With one of
              `workspace_bytes` and with `out`, a GPU backend allocates nothing; a smaller one means
              more chunks of tokens, as long as one token fits. Calls that may overlap need one
              each. CPU backends need none (0 bytes) and leave it alone.
    backend:  a name from `explain`; it must read the layout the experts are packed in

    Returns [T, H] in x's dtype. Raises TypeError, ValueError or NotImplementedError, before work.

    >>> from moelten import ExpertWeights, MXFP4, topk_softmax
    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> experts = pack(
    ...     ExpertWeights.from_tensors(w13, w2, gate_up_order="gate_up", weight_format=MXFP4()))
    >>> x = torch.randn(3, 32, dtype=torch.bfloat16)
    >>> fused_moe(x, experts, topk_softmax(torch.randn(3, 4), top_k=2)).shape
    torch.Size([3, 32])
    """
    kind = _, _, device = check_call(x, experts, routing)
    watched = _is_watched(x, routing.weights)
    if watched or backend is not None:
        reader = find_reader(experts, backend)
    else:  # the same one, remembered: compilers do not look through that
        _, reader, _ = _decode_signature(experts.signature, device)
        experts.require(reader.layout)
    if workspace is not None:
        _check_workspace(workspace, device, routing)
    if out is not None:
        _check_out(out, x, kind)
    if watched:
        return _call_operator(x, experts, routing, out, workspace, backend)
    if out is None:
        out = torch.empty_like(x)
    if x.shape[0]:
        reader.run(x, experts, routing, out, workspace)
    return out


def workspace_bytes(
    experts: PackedExperts,
    tokens: int,
    top_k: int,
    *,
    on_input: bool = False,
    backend: str | None = None,
) -> int:
    """Bytes of the workspace with which `fused_moe` runs so many tokens at once.

    Never less for more tokens, so one workspace for the largest batch serves all. on_input and
    backend as in the call. Without a workspace a call allocates this much, up to 4 GiB. 0 on CPUs.

    >>> from moelten import ExpertWeights, MXFP4
    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> experts = pack(
    ...     ExpertWeights.from_tensors(w13, w2, gate_up_order="gate_up", weight_format=MXFP4()))
    >>> workspace_bytes(experts, tokens=1024, top_k=2)  # on a CPU
    0
    """
    if tokens < 0 or top_k < 1:
        raise FormatError(f"expected tokens >= 0 and top_k >= 1, got {tokens} and {top_k}")
    return find_reader(experts, backend).workspace_bytes(experts.spec, tokens, top_k, on_input)


def explain(
    experts: ExpertSpec | ExpertWeights | PackedExperts, device: torch.device | str = "cpu"
) -> list[Verdict]:
    """Which backends would run these experts on `device`, and why each other one would not.

    In order of preference: the first with `runs` is what `pack` chooses. Reads metadata alone.

    >>> from moelten import BF16, Int4, Scheme
    >>> spec = ExpertSpec(Scheme(Int4(32), BF16), 8, 64, 32)
    >>> [v.backend for v in explain(spec) if v.runs][-1]
    'cpu'
    """
    spec = experts if isinstance(experts, ExpertSpec) else experts.spec
    return kernels.verdicts(spec, torch.device(device))


class MoELayer(nn.Module):
    """A router and its packed experts: x [..., H] to [..., H].

    gate:    [E, H] router weight; logits are computed in fp32
    method:  maps logits [T, E] to a Routing, e.g. functools.partial(topk_softmax, top_k=4)
    """

    def __init__(
        self, experts: PackedExperts, gate: Tensor, method: Callable[[Tensor], Routing]
    ) -> None:
        super().__init__()
        self.gate: Tensor
        if gate.dim() != 2 or gate.shape[1] != experts.spec.hidden_size:
            raise FormatError(
                f"gate: expected [num_experts, {experts.spec.hidden_size}], got {list(gate.shape)}"
            )
        self.experts = experts
        self.method = method
        self.register_buffer("gate", gate)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        logits = nn.functional.linear(tokens.float(), self.gate.float())  # type: ignore[operator]
        return fused_moe(tokens, self.experts, self.method(logits)).view(x.shape)


def find_reader(experts: PackedExperts, backend: str | None = None) -> Backend:
    """The backend that runs these experts, or the one called `backend` if it can."""
    if backend is not None:
        reader = kernels.select(experts.spec, experts.device, backend)
    else:
        reader = kernels.backend_of(experts.layout.name, experts.device)
    experts.require(reader.layout)
    return reader


def check_call(x: Tensor, experts: PackedExperts, routing: Routing) -> _Kind:
    """Refuse an input [T, H] that these experts or this routing are not for.

    Returns what x is, so that no one asks it again: its device is that of all.
    """
    if not isinstance(experts, PackedExperts):
        raise TypeError(
            f"experts: expected PackedExperts, got {type(experts).__name__}; call moelten.pack"
        )
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected Routing, got {type(routing).__name__}")
    kind = shape, dtype, device = x.shape, x.dtype, x.device
    ids, hidden, packed_for = routing.ids, experts.spec.hidden_size, experts.device
    if len(shape) != 2 or shape[1] != hidden:
        raise FormatError(f"x: expected [tokens, {hidden}], got {_describe(x)}")
    if dtype not in experts.inputs:
        if len(experts.inputs) > 1:
            raise FormatError(f"x: expected bf16, fp16 or fp32, got {_describe(x)}")
        raise FormatError(
            f"x: the experts are packed for {experts.inputs[0]} activations, got {_describe(x)}; "
            "convert x, or pack with another activation_format"
        )
    if not x.is_contiguous():
        raise FormatError(
            f"x: expected contiguous rows, got strides {x.stride()}; call x.contiguous()"
        )
    if ids.shape[0] != shape[0]:
        raise FormatError(f"routing is for {ids.shape[0]} tokens, x has {shape[0]}: {_describe(x)}")
    if device != packed_for:
        raise FormatError(f"x is on {device}, the experts are packed for {packed_for}")
    if ids.device != packed_for:
        raise FormatError(f"routing is on {ids.device}, the experts are packed for {packed_for}")
    return kind


def _is_watched(x: Tensor, weights: Tensor) -> bool:
    """Whether a compiler, a tracer or autograd must see one operator; all others are spared it."""
    return (
        is_compiling()
        or type(x) is not Tensor
        or _len_torch_dispatch_stack() > 0
        or _is_tracing()
        or ((x.requires_grad or weights.requires_grad) and torch.is_grad_enabled())
    )


def _call_operator(
    x: Tensor,
    experts: PackedExperts,
    routing: Routing,
    out: Tensor | None,
    workspace: Tensor | None,
    backend: str | None,
) -> Tensor:
    signature = experts.signature if backend is None else f"{experts.signature}\n{backend}"
    tensors = list(experts.tensors.values())
    arguments = (x, routing.ids, routing.weights, routing.on_input, tensors, signature)
    if out is None and workspace is None:
        return cast(Tensor, torch.ops.moelten.fused_moe(*arguments))
    if torch.is_grad_enabled() and x.requires_grad:
        raise UnsupportedError(_NO_GRADIENT)
    if out is None:
        out = torch.empty_like(x)
    torch.ops.moelten.fused_moe_out(*arguments, out, workspace)
    return out


def _check_out(out: Tensor, x: Tensor, kind: _Kind) -> None:
    if (out.shape, out.dtype, out.device) != kind:
        raise FormatError(f"out: expected {_describe(x)}, got {_describe(out)}")
    if not out.is_contiguous():
        raise FormatError(f"out: expected contiguous rows, got strides {out.stride()}")


def _check_workspace(workspace: Tensor, device: torch.device, routing: Routing) -> None:
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        raise FormatError(
            f"workspace: expected contiguous torch.uint8 [bytes], got {_describe(workspace)}"
        )
    if workspace.device != device:
        raise FormatError(
            f"workspace is on {workspace.device}, the experts are packed for {device}"
        )
    if not (routing.ids.is_contiguous() and routing.weights.is_contiguous()):
        raise FormatError(
            "routing: with a workspace nothing is allocated, so ids and weights must be "
            "contiguous; call .contiguous() on both"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


@lru_cache(maxsize=4096)
def _decode_signature(
    signature: str, device: torch.device
) -> tuple[ExpertSpec, Any, tuple[str, ...]]:
    """The spec, the backend (the signature may end with its name) and the names of the tensors."""
    layout, names, spec, *named = signature.split("\n")
    return decode_spec(spec), kernels.backend_of(layout, device, *named), tuple(names.split(","))


def _run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    on_input: bool,
    tensors: list[Tensor],
    signature: str,
    out: Tensor,
    workspace: Tensor | None = None,
) -> None:
    if x.shape[0] == 0:
        return
    spec, backend, names = _decode_signature(signature, x.device)
    parts = dict(zip(names, tensors, strict=True))
    experts = PackedExperts(spec, backend.layout, parts, backend.layout.version)
    backend.run(x, experts, Routing(ids, weights, on_input), out, workspace)


def _fused_moe(
    x: Tensor, ids: Tensor, weights: Tensor, on_input: bool, tensors: list[Tensor], signature: str
) -> Tensor:
    out = torch.empty_like(x)
    _run(x, ids, weights, on_input, tensors, signature, out)
    return out


def _fused_moe_fake(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x)


_NO_GRADIENT = "moelten runs inference only: fused_moe has no gradient; use no_grad"


def _no_gradient(context: Any, *gradients: Any) -> Any:
    raise UnsupportedError(_NO_GRADIENT)


# torch.library holds registrations for as long as this object lives.
_LIBRARY: Any = torch.library.Library("moelten", "DEF")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor x, Tensor ids, Tensor weights, bool on_input, Tensor[] experts, str signature"
_LIBRARY.define(f"fused_moe({_INPUTS}) -> Tensor")
_LIBRARY.define(f"fused_moe_out({_INPUTS}, Tensor(a!) out, Tensor(b!)? workspace=None) -> ()")
_LIBRARY.impl("fused_moe", _fused_moe, "CompositeExplicitAutograd")
_LIBRARY.impl("fused_moe_out", _run, "CompositeExplicitAutograd")
torch.library.register_fake("moelten::fused_moe", _fused_moe_fake, lib=_LIBRARY)
torch.library.register_fake("moelten::fused_moe_out", lambda *arguments: None, lib=_LIBRARY)
torch.library.register_autograd("moelten::fused_moe", _no_gradient, lib=_LIBRARY)
