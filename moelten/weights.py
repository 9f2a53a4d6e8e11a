"""ExpertWeights: the canonical weights of one MoE layer, and everything its experts need to run.

Canonical order: w13 is [E, 2, I, H], the gate half then the up half ([E, 1, I, H] without a gate);
in memory that is the field's [E, 2I, H]. The halves stay an axis because their scale blocks and
global scales need not join. w2 is [E, H, I]. Importers name the order they have; there is no
default. Kernel layouts are not here: `packed` holds those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moelten.activations import Activation, SwiGLU
from moelten.errors import FormatError
from moelten.formats import BF16, FP16, FP32, Format, Scheme
from moelten.qtensor import QTensor, quantize

GATE_UP_ORDERS = {
    "gate_up": "all gate rows, then all up rows (Hugging Face, vLLM w13)",
    "up_gate": "all up rows, then all gate rows (FlashInfer, TensorRT-LLM w31)",
    "interleaved": "gate0, up0, gate1, up1, ... (gpt-oss)",
    "no_gate": "one half only (ReLU2, SiLU, identity)",
}
EXTRAS = (
    "w13_bias",
    "w2_bias",
    "w13_pre_scale",
    "w2_pre_scale",
    "w13_input_scale",
    "w2_input_scale",
)


@dataclass(frozen=True)
class ExpertSpec:
    """What a layer is, without its data: enough to choose a backend. Hashable."""

    scheme: Scheme
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = SwiGLU()
    extras: tuple[str, ...] = ()
    first_expert: int = 0

    def extra_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an optional per-expert tensor (fp32)."""
        hidden, inter = self.hidden_size, self.intermediate_size
        return (
            self.num_experts,
            *{
                "w13_bias": (self.activation.halves, inter),
                "w2_bias": (hidden,),
                "w13_pre_scale": (hidden,),
                "w2_pre_scale": (inter,),
            }.get(name, ()),
        )

    def matrix_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one expert's w13 or w2."""
        if name == "w13":
            return (self.activation.halves, self.intermediate_size, self.hidden_size)
        return (self.hidden_size, self.intermediate_size)

    @property
    def logical_bytes(self) -> int:
        """Bytes of the same weights in bf16."""
        per_expert = (self.activation.halves + 1) * self.hidden_size * self.intermediate_size
        return 2 * self.num_experts * per_expert


@dataclass(frozen=True)
class ExpertWeights:
    """Canonical weights of E experts, checked when made.

    w13:               QTensor [E, 2, I, H] (or [E, 1, I, H]), gate half first
    w2:                QTensor [E, H, I], the same format
    activation:        the function between the two, with its parameters
    activation_format: how activations are quantized before each GEMM
    w13_bias, w2_bias: fp32 [E, 2, I], [E, H]; added to the GEMM results
    *_pre_scale:       fp32 [E, H], [E, I]; multiply activations before they are quantized (AWQ)
    *_input_scale:     fp32 [E]; decode scales of the static activation formats
    first_expert:      global id of expert 0, for an expert-parallel range
    """

    w13: QTensor
    w2: QTensor
    activation: Activation = SwiGLU()
    activation_format: Format = BF16
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    w13_pre_scale: Tensor | None = None
    w2_pre_scale: Tensor | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None
    first_expert: int = 0

    def __post_init__(self) -> None:
        if len(self.w13.shape) != 4 or len(self.w2.shape) != 3:
            raise FormatError(
                f"expected w13 [E, 2, I, H] and w2 [E, H, I], got {list(self.w13.shape)} and "
                f"{list(self.w2.shape)}; import raw tensors with ExpertWeights.from_tensors"
            )
        experts, hidden, inter = self.w2.shape
        wanted = (experts, self.activation.halves, inter, hidden)
        if self.w13.shape != wanted:
            raise FormatError(
                f"w2 {list(self.w2.shape)} and {type(self.activation).__name__} need w13 "
                f"{list(wanted)}, got {list(self.w13.shape)}"
            )
        if self.w13.format != self.w2.format:
            raise FormatError(f"w13 is {self.w13.format}, w2 is {self.w2.format}; use one format")
        self.spec.scheme.check()
        self.activation.check_experts(experts)
        for name in EXTRAS:
            self._check_extra(name)

    def _check_extra(self, name: str) -> None:
        part: Tensor | None = getattr(self, name)
        if name.endswith("_input_scale") and (part is not None) != self.spec.scheme.static:
            raise FormatError(
                f"{name}: {self.activation_format.name} activations are "
                + ("static and need one scale per expert" if part is None else "dynamic: drop it")
            )
        if part is None:
            return
        shape = self.spec.extra_shape(name)
        if part.dtype != torch.float32 or tuple(part.shape) != shape:
            raise FormatError(
                f"{name}: expected torch.float32 {list(shape)}, got {part.dtype} {list(part.shape)}"
            )

    @property
    def spec(self) -> ExpertSpec:
        experts, hidden, inter = self.w2.shape
        extras = tuple(name for name in EXTRAS if getattr(self, name) is not None)
        scheme = Scheme(self.w2.format, self.activation_format)
        return ExpertSpec(
            scheme, experts, hidden, inter, self.activation, extras, self.first_expert
        )

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes + sum(t.nbytes for t in self.extras().values())

    def extras(self) -> dict[str, Tensor]:
        """The optional tensors that are present, by name."""
        return {name: getattr(self, name) for name in self.spec.extras}

    @classmethod
    def from_tensors(
        cls,
        w13: Tensor | QTensor,
        w2: Tensor | QTensor,
        *,
        gate_up_order: str | None = None,
        weight_format: Format | None = None,
        activation_format: Format = BF16,
        activation: Activation | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
    ) -> ExpertWeights:
        """Import w13 [E, 2I, H] ([E, I, H] without a gate) and w2 [E, H, I].

        Plain tensors become `weight_format` (their own dtype if None); QTensors are taken as they
        are. `gate_up_order` names the order of the 2I rows and has no default, because swapping
        gate and up fails silently. Biases are [E, 2I] in the same order and [E, H].

        >>> from moelten.formats import MXFP4
        >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
        >>> weights = ExpertWeights.from_tensors(
        ...     w13, w2, gate_up_order="gate_up", weight_format=MXFP4())
        >>> weights.w13.shape, weights.spec.scheme.name
        ((4, 2, 32, 32), 'mxfp4_bf16')
        """
        if gate_up_order not in GATE_UP_ORDERS:
            raise FormatError(
                f"gate_up_order is required and has no default, got {gate_up_order!r}; choose "
                + "; ".join(f"{name!r}: {text}" for name, text in GATE_UP_ORDERS.items())
            )
        for name, matrix in (("w13", w13), ("w2", w2)):
            if len(matrix.shape) != 3:
                raise FormatError(f"{name}: expected 3 axes, got shape {list(matrix.shape)}")
        halves = split_halves(w13, gate_up_order)
        fmt = weight_format or _own_format(w2)
        if activation is None:
            activation = SwiGLU()
        return cls(
            halves if isinstance(halves, QTensor) else quantize(halves, fmt),
            w2 if isinstance(w2, QTensor) else quantize(w2, fmt),
            activation,
            activation_format,
            None if w13_bias is None else _split(w13_bias.float(), gate_up_order, -1),
            None if w2_bias is None else w2_bias.float(),
        )

    def expert_range(self, start: int, stop: int) -> ExpertWeights:
        """Experts start..stop-1, which keep answering to their global ids."""
        if not 0 <= start < stop <= self.spec.num_experts:
            raise FormatError(f"experts {start}:{stop} are not in 0:{self.spec.num_experts}")
        extras: dict[str, Any] = {n: part[start:stop] for n, part in self.extras().items()}
        return replace(
            self,
            w13=self.w13[start:stop],
            w2=self.w2[start:stop],
            activation=self.activation.slice_experts(start, stop),
            first_expert=self.first_expert + start,
            **extras,
        )

    def experts(self) -> Iterator[ExpertWeights]:
        """Each expert by itself, with E = 1, as views."""
        return (self.expert_range(e, e + 1) for e in range(self.spec.num_experts))

    def shard(self, rank: int, world: int) -> ExpertWeights:
        """Tensor-parallel slice of I for one rank; the ranks' outputs sum to the whole.

        Cuts fall on group boundaries, so slices may be uneven. w2's bias goes to rank 0 alone.
        """
        start, stop = shard_bounds(self.spec, rank, world)
        halves = self.w13_bias, self.w2_pre_scale
        bias, pre = (None if t is None else t[..., start:stop].contiguous() for t in halves)
        return replace(
            self,
            w13=self.w13.rows(start, stop).map(Tensor.contiguous),
            w2=self.w2.columns(start, stop).map(Tensor.contiguous),
            w13_bias=bias,
            w2_pre_scale=pre,
            w2_bias=None if rank else self.w2_bias,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """Apply `function` to every tensor, e.g. to move devices."""
        parts: dict[str, Any] = {name: function(part) for name, part in self.extras().items()}
        return replace(self, w13=self.w13.map(function), w2=self.w2.map(function), **parts)


def shard_bounds(spec: ExpertSpec, rank: int, world: int) -> tuple[int, int]:
    """The slice of I that `rank` of `world` holds, on boundaries that no scale group straddles."""
    fmt, inter = spec.scheme.weights, spec.intermediate_size
    row_block, group = fmt.block
    unit = math.lcm(row_block or 1, group or 1, 2 if fmt.packed else 1)
    units = -(-inter // unit)
    if not 0 <= rank < world:
        raise FormatError(f"rank {rank} is not in 0..{world - 1}")
    if units < world:
        raise FormatError(
            f"cannot shard I={inter} over {world} ranks: {fmt.name} cuts only at multiples of "
            f"{unit}, which gives {units} slices; use at most {units} ranks or expert ranges"
        )
    return rank * units // world * unit, min((rank + 1) * units // world * unit, inter)


def split_halves(w13: Tensor | QTensor, order: str) -> Tensor | QTensor:
    """[E, 2I, H] in `order` to [E, 2, I, H], gate half first (or [E, 1, I, H])."""
    if isinstance(w13, Tensor):
        return _split(w13, order, -2)
    row_block = w13.format.block[0]
    inter = w13.shape[-2] // 2
    if order != "no_gate" and row_block not in (None, 1):
        if order == "interleaved" or inter % row_block:
            raise FormatError(
                f"w13 {list(w13.shape)} with {w13.format.name} scales cannot be split as "
                f"{order!r}: blocks of {row_block} rows mix gate and up; give the halves as "
                "separate matrices"
            )
    parts = {name: part for name, part in w13.tensors().items() if name != "global_scale"}
    split = {
        name: _split(part, order, -2)
        if name == "data" or row_block is not None
        else part[:, None].expand(-1, 1 if order == "no_gate" else 2, *part.shape[1:]).contiguous()
        for name, part in parts.items()
    }
    if w13.global_scale is not None:
        split["global_scale"] = (
            _split(w13.global_scale, order, -1)
            if w13.global_scale.dim() == 2
            else w13.global_scale[:, None].repeat(1, 1 if order == "no_gate" else 2)
        )
    return w13.with_parts(split)


def _split(part: Tensor, order: str, axis: int) -> Tensor:
    if order == "no_gate":
        return part.unsqueeze(axis - 1)
    if part.shape[axis] % 2:
        raise FormatError(f"w13 has an odd number of rows, {part.shape[axis]}: no gate and up")
    if order == "interleaved":
        pairs = torch.unflatten(part, axis, (-1, 2))
        return pairs.movedim(axis, axis - 1).contiguous()
    halves = torch.unflatten(part, axis, (2, -1))
    # float8 has no flip; stack works for every dtype.
    return torch.stack(halves.unbind(axis - 1)[::-1], axis - 1) if order == "up_gate" else halves


def _own_format(matrix: Tensor | QTensor) -> Format:
    if isinstance(matrix, QTensor):
        return matrix.format
    for fmt in (BF16, FP16, FP32):
        if fmt.data_dtype == matrix.dtype:
            return fmt
    raise FormatError(f"weights: expected bf16, fp16 or fp32, got {matrix.dtype}; name a format")
