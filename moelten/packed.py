"""PackedExperts: weights in the layout of one kernel family, tagged with all that it needs to know.

A kernel takes nothing else, and refuses what carries another layout, version or device kind. Every
tensor is expert-major, so one expert moves with one copy per tensor: `update_expert` refits in
place with stable pointers, `unpack` inverts packing bit for bit. Sizes are logical; padding is the
layout's own affair.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from moelten.activations import Activation
from moelten.errors import FormatError, LayoutError
from moelten.formats import Float, Format, Scheme, decode_format, encode_format
from moelten.qtensor import QTensor, decode_scale
from moelten.weights import ExpertSpec, ExpertWeights, shard_bounds

MATRICES = ("w13", "w2")
# The activation's parameters, only where they differ by expert: `Activation.table`.
ACTIVATION_TABLE = "activation_table"
# What activations may come in where a kernel quantizes them.
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)


class Layout(Protocol):
    """How one family of kernels stores a matrix. `version` changes whenever the bytes do."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def pack(self, matrix: QTensor) -> dict[str, Tensor]:
        """Store one expert's w13 [2, I, H] or w2 [H, I]."""
        ...

    def unpack(self, parts: dict[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> QTensor:
        """Invert `pack`, bit for bit."""
        ...


@dataclass(frozen=True)
class PackedExperts:
    """Experts of one MoE layer in `layout`, on one device. Made by `moelten.pack`, not by hand.

    tensors:   names such as "w13.data" to expert-major [E, ...] tensors
    signature: all but the tensors, as text: what the registered operator carries beside them
    inputs:    the dtypes that x may have
    """

    spec: ExpertSpec
    layout: Layout
    tensors: dict[str, Tensor]
    version: int
    signature: str = field(init=False, repr=False)
    inputs: tuple[torch.dtype, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Made now and not on demand: a compiled graph must find them as constants.
        signature = "\n".join((self.layout.name, ",".join(self.tensors), encode_spec(self.spec)))
        object.__setattr__(self, "signature", signature)
        fmt = self.spec.scheme.activations
        inputs = (fmt.data_dtype,) if isinstance(fmt, Float) else _INPUTS
        object.__setattr__(self, "inputs", inputs)
        for name, part in self.tensors.items():
            if part.shape[:1] != (self.spec.num_experts,):
                raise LayoutError(
                    f"{name}: expected {self.spec.num_experts} experts first, got "
                    f"{list(part.shape)}"
                )

    @classmethod
    def pack(
        cls,
        spec: ExpertSpec,
        experts: Iterable[ExpertWeights],
        layout: Layout,
        device: torch.device | str,
    ) -> PackedExperts:
        """Pack a stream of single experts (each E = 1), in order; peak extra memory is one."""
        tensors: dict[str, Tensor] = {}
        count = 0
        for index, weights in enumerate(experts):
            _require_single(spec, index, weights)
            for name, part in _pack_one(weights, layout):
                if name not in tensors:
                    shape = (spec.num_experts, *part.shape)
                    tensors[name] = torch.empty(shape, dtype=part.dtype, device=device)
                tensors[name][index].copy_(part)
            count += 1
        if count != spec.num_experts:
            raise FormatError(f"expected {spec.num_experts} experts, the stream had {count}")
        return cls(spec, layout, tensors, layout.version)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def require(self, layout: Layout) -> None:
        """Refuse a kernel whose layout is not the one these weights are in."""
        known = self.layout is layout or self.layout.name == layout.name
        if not known or self.version != layout.version:
            raise LayoutError(
                f"these experts are packed as {self.layout.name} v{self.version}, the kernel reads "
                f"{layout.name} v{layout.version}; pack them again with moelten.pack"
            )

    def unpack(self) -> ExpertWeights:
        """The canonical weights, bit-exact."""
        experts = [self.unpack_expert(e) for e in range(self.spec.num_experts)]
        matrices = {
            name: _stack([getattr(expert, name) for expert in experts]) for name in MATRICES
        }
        extras = {name: self.tensors[name].clone() for name in self.spec.extras}
        return _weights(self.spec, matrices, extras)

    def unpack_expert(self, expert: int) -> ExpertWeights:
        """Canonical weights of one expert, as ExpertWeights with E = 1."""
        self._check_expert(expert)
        spec = self.spec
        matrices = {}
        for name in MATRICES:
            parts = {key: part[expert] for key, part in self.parts(name).items()}
            matrix = self.layout.unpack(parts, spec.scheme.weights, spec.matrix_shape(name))
            matrices[name] = matrix.map(lambda part: part[None])
        extras = {name: self.tensors[name][expert : expert + 1] for name in spec.extras}
        single = _single(spec, expert)
        return _weights(single, matrices, extras)

    def parts(self, matrix: str) -> dict[str, Tensor]:
        """The packed tensors of "w13" or "w2" by the layout's names for them, expert-major."""
        start = f"{matrix}."
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}

    def update_expert(self, expert: int, weights: ExpertWeights) -> None:
        """Replace one local expert in place with `weights` (E = 1); no pointer moves.

        Everything is checked and packed before the first byte is written.
        """
        self._check_expert(expert)
        if weights.spec.num_experts != 1:
            raise FormatError(
                f"update_expert takes weights of 1 expert, got {weights.spec.num_experts}"
            )
        _require_single(self.spec, expert, weights)
        fresh = dict(_pack_one(weights, self.layout))
        for name, part in fresh.items():
            self.tensors[name][expert].copy_(part)

    def expert_range(self, start: int, stop: int) -> PackedExperts:
        """Experts start..stop-1 as views, for expert parallelism; they keep their global ids."""
        if not 0 <= start < stop <= self.spec.num_experts:
            raise FormatError(f"experts {start}:{stop} are not in 0:{self.spec.num_experts}")
        spec = replace(
            self.spec,
            num_experts=stop - start,
            activation=self.spec.activation.slice_experts(start, stop),
            first_expert=self.spec.first_expert + start,
        )
        tensors = {name: part[start:stop] for name, part in self.tensors.items()}
        return replace(self, spec=spec, tensors=tensors)

    def shard(self, rank: int, world: int) -> PackedExperts:
        """Tensor-parallel slice of I for one rank, repacked expert by expert.

        Cuts fall on group boundaries (see `weights.shard_bounds`); ranks' outputs sum to the whole.
        """
        start, stop = shard_bounds(self.spec, rank, world)
        extras = tuple(n for n in self.spec.extras if not (rank and n == "w2_bias"))
        spec = replace(self.spec, intermediate_size=stop - start, extras=extras)
        pieces = (self.unpack_expert(e).shard(rank, world) for e in range(spec.num_experts))
        return PackedExperts.pack(spec, pieces, self.layout, self.device)

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.spec.num_experts:
            raise FormatError(f"expert {expert} is not in 0..{self.spec.num_experts - 1} (local)")


def _single(spec: ExpertSpec, expert: int) -> ExpertSpec:
    return replace(
        spec,
        num_experts=1,
        activation=spec.activation.slice_experts(expert, expert + 1),
        first_expert=spec.first_expert + expert,
    )


def _require_single(spec: ExpertSpec, expert: int, weights: ExpertWeights) -> None:
    wanted = _single(spec, expert)
    if replace(weights.spec, first_expert=wanted.first_expert) != wanted:
        raise FormatError(f"expert {expert}: expected {wanted}, got {weights.spec}")


def _pack_one(weights: ExpertWeights, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Packed tensors of a single expert; NaN scales are refused here, where all weights pass."""
    for name in MATRICES:
        matrix: QTensor = getattr(weights, name)[0]
        _refuse_nan_scales(name, matrix.scale)
        for part, tensor in layout.pack(matrix).items():
            yield f"{name}.{part}", tensor
    for name, extra in weights.extras().items():
        yield name, extra[0]
    if (table := weights.activation.table()) is not None:
        yield ACTIVATION_TABLE, table[0]


def _refuse_nan_scales(name: str, scale: Tensor | None) -> None:
    if scale is None:
        return
    bad = (~torch.isfinite(decode_scale(scale))).nonzero()
    if len(bad):
        byte = " (e8m0 byte 255)" if scale.dtype == torch.uint8 else ""
        raise FormatError(
            f"{name}: {len(bad)} scales are NaN or infinite{byte}, the first at {bad[0].tolist()}; "
            "the checkpoint is damaged or was read with the wrong scale format"
        )


def _stack(matrices: list[QTensor]) -> QTensor:
    names = matrices[0].tensors()
    parts = {name: torch.cat([m.tensors()[name] for m in matrices]) for name in names}
    return matrices[0].with_parts(parts)


def _weights(
    spec: ExpertSpec, matrices: dict[str, QTensor], extras: dict[str, Tensor]
) -> ExpertWeights:
    return ExpertWeights(
        matrices["w13"],
        matrices["w2"],
        activation=spec.activation,
        activation_format=spec.scheme.activations,
        first_expert=spec.first_expert,
        **cast(dict[str, Any], extras),
    )


@lru_cache(maxsize=4096)
def encode_spec(spec: ExpertSpec) -> str:
    """JSON of a spec: what the registered operator carries beside its tensors."""
    return json.dumps(
        {
            "weights": encode_format(spec.scheme.weights),
            "activations": encode_format(spec.scheme.activations),
            "sizes": [spec.num_experts, spec.hidden_size, spec.intermediate_size],
            "activation": spec.activation.encode(),
            "extras": spec.extras,
            "first_expert": spec.first_expert,
        }
    )


def decode_spec(text: str) -> ExpertSpec:
    """Invert `encode_spec`."""
    record = json.loads(text)
    num_experts, hidden_size, intermediate_size = record["sizes"]
    return ExpertSpec(
        Scheme(decode_format(record["weights"]), decode_format(record["activations"])),
        num_experts,
        hidden_size,
        intermediate_size,
        Activation.decode(record["activation"]),
        tuple(record["extras"]),
        record["first_expert"],
    )
