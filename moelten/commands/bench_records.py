"""Records: what was timed, what it achieved, and how far that is from what the device can do.

The floor of a call is the larger of two times: reading the packed bytes of its active experts, and
its useful FLOPs at the matrix rate of the scheme's activations. Both rates are ceilings measured in
the same run.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelten import reference
from moelten.commands.bench_workload import Draw, Layer
from moelten.commands.doctor import package_version
from moelten.errors import FormatError
from moelten.formats import FP8, MXFP8, Format, Int8
from moelten.packed import PackedExperts
from moelten.routing import Routing

Record = dict[str, Any]
# Largest relative Frobenius error against the reference: the one that the README promises.
TOLERANCE = 2.5e-3
_CHECKED_TOKENS = 4
# What tells one point from another.
_POINT = ("device", "backend", "shape", "scheme", "routing", "tokens")


@dataclass(frozen=True)
class Ceilings:
    """What the device did in this run: bytes/s of a plain read, FLOP/s of a large matmul by type.

    mma has "bf16", and "fp8" and "int8" where the device multiplies those.
    """

    read: float
    mma: dict[str, float]

    def mma_type(self, activations: Format) -> str:
        """The matrix rate that a format is held to: its own type's, or bf16's.

        bf16, fp16 and fp32 activations are held to bf16; so are those of a type that the device
        does not multiply: nvfp4 on Hopper, where decoding them to bf16 is the fastest exact way.
        """
        own = {FP8: "fp8", MXFP8: "fp8", Int8: "int8"}.get(type(activations), "bf16")
        return own if own in self.mma else "bf16"


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one number per round, and what else one point's run found.

    extra: fields of the record that only this kind of device has
    """

    seconds: list[float]
    active_experts: float
    rel_error: float
    extra: Record = field(default_factory=dict)


def make_record(
    layer: Layer, tokens: int, routing: str, timing: Timing, ceilings: Ceilings
) -> Record:
    """One point's record; units are in the names, gbps is 1e9 bytes/s."""
    scheme, shape, packed = layer.scheme, layer.shape, layer.packed
    seconds = _quantile(timing.seconds, 0.5)
    weight_bytes = timing.active_experts * packed.nbytes / shape.num_experts
    flops = shape.flops(tokens)
    mma_type = ceilings.mma_type(scheme.activations)
    floor = max(weight_bytes / ceilings.read, flops / ceilings.mma[mma_type])
    return {
        "scheme": scheme.name,
        "shape": shape.name,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "tokens": tokens,
        "routing": routing,
        "active_experts": round(timing.active_experts, 1),
        "backend": layer.backend_name,
        "rounds": len(timing.seconds),
        "us": _us(seconds),
        "us_p10": _us(_quantile(timing.seconds, 0.1)),
        "us_p90": _us(_quantile(timing.seconds, 0.9)),
        "weight_gbps": round(weight_bytes / seconds / 1e9, 2),
        "tflops": round(flops / seconds / 1e12, 4),
        "floor_us": _us(floor),
        "percent_of_floor": round(100 * floor / seconds, 2),
        "read_gbps": round(ceilings.read / 1e9, 2),
        "mma_tflops": round(ceilings.mma[mma_type] / 1e12, 3),
        "mma_type": mma_type,
        "rel_error": timing.rel_error,
        "packed_bytes": packed.nbytes,
        **timing.extra,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read_records(path: Path) -> list[Record]:
    """What an earlier run wrote; raises FormatError for a file of something else."""
    found = json.loads(path.read_text())
    if not isinstance(found, list) or not all(set(_POINT) <= set(r) for r in found):
        raise FormatError(f"{path}: expected an array of bench's records; choose another --output")
    return found


def merge(kept: list[Record], new: list[Record]) -> list[Record]:
    """Records of both, in the order they came; a new one replaces that of the same point.

    >>> here, there = ({name: at for name in _POINT} for at in (1, 2))
    >>> [r.get("us") for r in merge([here | {"us": 5}, there], [here | {"us": 4}])]
    [4, None]
    """
    points = {tuple(r[name] for name in _POINT): r for r in (*kept, *new)}
    return list(points.values())


def is_right(record: Record) -> bool:
    """Whether a record's error is within the tolerance; NaN is not."""
    return bool(record["rel_error"] <= TOLERANCE)


def relative_error(packed: PackedExperts, draw: Draw, out: Tensor, elements: int) -> float:
    """|out - reference| / |reference| (Frobenius, fp64) on a few tokens of a draw, at least one.

    out:      [T, H], what the timed call returned for the draw
    elements: how many weights the reference may decode; it decodes every visited expert in fp64
    """
    spec, tokens = packed.spec, draw.x.shape[0]
    per_token = draw.routing.top_k * spec.logical_bytes // 2 // spec.num_experts
    count = max(min(_CHECKED_TOKENS, tokens, elements // per_token), 1)
    rows = torch.linspace(0, tokens - 1, count, device=out.device).long()
    routing = Routing(draw.routing.ids[rows], draw.routing.weights[rows])
    wanted = torch.zeros(count, spec.hidden_size, dtype=torch.float64, device=out.device)
    for expert in sorted(set(routing.ids.flatten().tolist())):
        wanted += reference.moe(draw.x[rows], packed.unpack_expert(expert), routing)
    return float(torch.linalg.norm(out[rows].double() - wanted) / torch.linalg.norm(wanted))


def commit() -> str | None:
    """$COMMIT, for a copy of the tree; else the checkout's, "-dirty" if the package was edited."""
    if named := os.environ.get("COMMIT"):
        return named
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package may lie in someone else's checkout
        return None
    try:
        dirty = _git(root, "status", "--porcelain", "--", "moelten")
        return _git(root, "rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _quantile(values: list[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()
