"""What a checkpoint or a scheme is, and which backend would run it: from headers and names alone.

Nothing here reads a weight. A description is a plain record, so that `inspect` and `explain` print
and serialise the same facts.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moelten.checkpoints import Checkpoint
from moelten.errors import UnsupportedError
from moelten.formats import SCHEMES, Format, Scheme
from moelten.moe import explain
from moelten.weights import ExpertSpec


def describe_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """What `path` holds: format, sizes, bytes, and per distinct kind of layer the verdicts."""
    checkpoint = Checkpoint(path)
    kinds: dict[ExpertSpec, list[int]] = {}
    for layer in checkpoint.layers:
        kinds.setdefault(checkpoint.spec(layer), []).append(layer)
    names = checkpoint.expert_tensor_names()
    return {
        "path": str(path),
        "model_type": checkpoint.model_type,
        "format": checkpoint.format_name,
        "layers": len(checkpoint.layers),
        "experts_bytes": stored_bytes(path, names),
        "logical_bytes": sum(spec.logical_bytes * len(ls) for spec, ls in kinds.items()),
        "kinds": [
            {"layers": layers, **describe_spec(spec, device)} for spec, layers in kinds.items()
        ],
    }


def describe_spec(spec: ExpertSpec, device: str = "cpu") -> dict[str, Any]:
    """A layer's scheme and sizes, and what each backend answers to it on `device`."""
    verdicts = explain(spec, device)
    return {
        "scheme": spec.scheme.name,
        "num_experts": spec.num_experts,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "activation": repr(spec.activation),
        "extras": list(spec.extras),
        "device": device,
        "runs": any(verdict.runs for verdict in verdicts),
        "verdicts": [
            {"backend": v.backend, "runs": v.runs, "reasons": list(v.reasons)} for v in verdicts
        ],
    }


def find_scheme(name: str) -> Scheme:
    """A scheme by name; UnsupportedError lists the closest names, then all of them."""
    if name in SCHEMES:
        return SCHEMES[name]
    close = difflib.get_close_matches(name, SCHEMES, 3, 0.6)
    raise UnsupportedError(
        f"{name!r} is neither a checkpoint folder nor a scheme"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
        + f"; schemes: {', '.join(SCHEMES)}"
    )


def find_format(name: str, role: str) -> Format:
    """A format by name among those that schemes use as `role`: "weights" or "activations"."""
    known: dict[str, Format] = {
        getattr(scheme, role).name: getattr(scheme, role) for scheme in SCHEMES.values()
    }
    if name not in known:
        raise UnsupportedError(f"unknown format of {role} {name!r}; known: {', '.join(known)}")
    return known[name]


def stored_bytes(path: Path, names: set[str]) -> int:
    """Bytes that the named tensors take in the files under `path`, by their headers."""
    total, left = 0, set(names)  # some folders hold the same tensors twice
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found = left & set(tensors.keys())
            left -= found
            for name in found:
                part = tensors.get_slice(name)
                bits = _BITS[part.get_dtype()]
                total += torch.Size(part.get_shape()).numel() * bits // 8
    return total


_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
}
