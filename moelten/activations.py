"""Activations of the experts, as values: which function, and with which parameters.

Input is the fp32 result of GEMM1 as [rows, 2, I] (gate, then up) or [rows, 1, I] without a gate;
output is [rows, I]. A parameter is a number, or a tuple with one number per expert. There is no
other place in moelten where gate meets up, so a limit or a beta cannot be dropped on the way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelten.errors import FormatError

Parameter = float | tuple[float, ...]


@dataclass(frozen=True)
class Activation:
    """Base: `gated` says whether GEMM1 has a gate half and an up half, or one half only."""

    gated: ClassVar[bool] = True

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        """Map h [rows, 2 or 1, I] to [rows, I]; experts [rows] indexes per-expert parameters."""
        raise NotImplementedError

    @property
    def halves(self) -> int:
        return 2 if self.gated else 1

    def slice_experts(self, start: int, stop: int) -> Activation:
        """The same activation for the experts start..stop-1."""
        cut = {
            f.name: value[start:stop]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), tuple)
        }
        return replace(self, **cut) if cut else self

    def check_experts(self, num_experts: int) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple) and len(value) != num_experts:
                raise FormatError(
                    f"{type(self).__name__}.{f.name}: expected a number or one per expert "
                    f"({num_experts}), got {len(value)}"
                )

    def table(self) -> Tensor | None:
        """fp32 [E, parameters] in the order of the fields, None as inf; only if one is a tuple."""
        values = [getattr(self, f.name) for f in fields(self)]
        tuples = [value for value in values if isinstance(value, tuple)]
        if not tuples:
            return None
        wide = [v if isinstance(v, tuple) else (v,) * len(tuples[0]) for v in values]
        numbers = [[float("inf") if v is None else v for v in column] for column in wide]
        return torch.tensor(numbers, dtype=torch.float32).T.contiguous()

    def encode(self) -> str:
        """JSON form; `decode` inverts it."""
        return json.dumps({"kind": type(self).__name__, **asdict(self)})

    @staticmethod
    def decode(text: str) -> Activation:
        record = json.loads(text)
        kind = _KINDS[record.pop("kind")]
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})


@dataclass(frozen=True)
class SwiGLU(Activation):
    """g' = min(g, limit); u' = clamp(u, -limit, limit); g' * sigmoid(alpha * g') * (u' + beta).

    The defaults give plain SwiGLU, silu(g) * u. gpt-oss is SwiGLU(1.702, 1.0, 7.0).

    >>> h = torch.tensor([[[8.0], [-9.0]]])
    >>> round(SwiGLU(1.702, 1.0, 7.0)(h, torch.zeros(1, dtype=torch.long)).item(), 4)
    -41.9997
    """

    alpha: Parameter = 1.0
    beta: Parameter = 0.0
    limit: Parameter | None = None

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        gate, up = h[:, 0], h[:, 1]
        if self.limit is not None:
            limit = _per_row(self.limit, experts, h)
            gate = torch.minimum(gate, limit)
            up = torch.maximum(torch.minimum(up, limit), -limit)
        if self.alpha == 1.0:
            gate = F.silu(gate)
        else:
            gate = gate * torch.sigmoid(_per_row(self.alpha, experts, h) * gate)
        return gate * (up if self.beta == 0.0 else up + _per_row(self.beta, experts, h))


@dataclass(frozen=True)
class GeGLU(Activation):
    """gelu(g) * u, with the erf or ("tanh") the tanh form of gelu."""

    approximate: str = "none"

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        return F.gelu(h[:, 0], approximate=self.approximate) * h[:, 1]


@dataclass(frozen=True)
class ReGLU(Activation):
    """relu(g) * u."""

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        return F.relu(h[:, 0]) * h[:, 1]


@dataclass(frozen=True)
class SiLU(Activation):
    """silu(h), without a gate."""

    gated: ClassVar[bool] = False

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        return F.silu(h[:, 0])


@dataclass(frozen=True)
class GELU(Activation):
    """gelu(h), without a gate."""

    approximate: str = "none"
    gated: ClassVar[bool] = False

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        return F.gelu(h[:, 0], approximate=self.approximate)


@dataclass(frozen=True)
class ReLU2(Activation):
    """relu(h)**2, without a gate."""

    gated: ClassVar[bool] = False

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        return F.relu(h[:, 0]).square()


@dataclass(frozen=True)
class Identity(Activation):
    """h, without a gate."""

    gated: ClassVar[bool] = False

    def __call__(self, h: Tensor, experts: Tensor) -> Tensor:
        return h[:, 0]


_KINDS: dict[str, type[Activation]] = {
    kind.__name__: kind for kind in (SwiGLU, GeGLU, ReGLU, SiLU, GELU, ReLU2, Identity)
}

GPT_OSS = SwiGLU(alpha=1.702, beta=1.0, limit=7.0)


def _per_row(value: Any, experts: Tensor, like: Tensor) -> Tensor:
    """A parameter as a tensor that broadcasts over [rows, I]."""
    table = torch.tensor(value, dtype=like.dtype, device=like.device)
    return table[experts.long(), None] if isinstance(value, tuple) else table
