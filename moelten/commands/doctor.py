"""What this machine and this installation can run, and why anything else would not.

Every section is made by itself and may fail by itself: a broken driver costs its own section, never
the report. Looking is passive: no kernel is compiled, nothing is timed, and CUDA is initialised
only where the driver reports a device.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "numpy", "safetensors", "triton", "llvmlite"),
    *("transformers", "compressed-tensors", "accelerate", "matplotlib"),
)
EXTRAS = {
    "cpu": ("llvmlite",),
    "transformers": ("transformers", "compressed_tensors", "accelerate"),
    "plot": ("matplotlib",),
}
_CPU_FLAGS = (
    *("avx2", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve"),
)
# One scheme and shape that every backend has an opinion on; `moelten explain` asks about others.
_PROBE = "int4g32_bf16"
_PROBE_SIZES: dict[str, Any] = {"num_experts": 8, "hidden_size": 256, "intermediate_size": 128}


def report() -> dict[str, dict[str, Any]]:
    """All sections by name; one that failed is {"error": what went wrong}.

    >>> sorted(report())
    ['backends', 'cpu', 'extras', 'gpus', 'versions']
    """
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": versions,
        "cpu": cpu,
        "gpus": gpus,
        "backends": backends,
        "extras": extras,
    }
    return {name: _guarded(section) for name, section in sections.items()}


def _guarded(section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    # A report on a broken installation meets anything: ImportError, OSError, RuntimeError, ...
    try:
        return section()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def versions() -> dict[str, Any]:
    """Installed versions, None for what is absent."""
    import moelten

    found: dict[str, Any] = {"moelten": moelten.__version__, "python": platform.python_version()}
    return found | {name: package_version(name) for name in PACKAGES}


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Model, threads, memory and the vector extensions that matter here."""
    import torch

    flags = _cpu_flags()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "model": cpu_model(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "extensions": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def cpu_model() -> str:
    """The processor's name as its vendor writes it, or its architecture."""
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return set(match[1].split()) if match else set()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def gpus() -> dict[str, Any]:
    """GPUs by name, or why there is none."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return {"available": False, "reason": f"torch {torch.__version__} is built without CUDA"}
    if torch.cuda.device_count() == 0:
        return {"available": False, "reason": "the driver reports no device"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "available": True,
        "cuda": torch.version.cuda,
        "devices": [
            {
                "name": device.name,
                "capability": f"sm{device.major}{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
            for device in devices
        ],
    }


def backends() -> dict[str, Any]:
    """What each backend answers to one common scheme, per kind of device."""
    import torch

    from moelten.formats import scheme
    from moelten.kernels import verdicts
    from moelten.weights import ExpertSpec

    spec = ExpertSpec(scheme(_PROBE), **_PROBE_SIZES)
    answers = {
        f"on {kind}": {
            verdict.backend: "; ".join(verdict.reasons) or "would run"
            for verdict in verdicts(spec, torch.device(kind))
        }
        for kind in ("cpu", "cuda")
    }
    sizes = ", ".join(f"{name}={size}" for name, size in _PROBE_SIZES.items())
    return {"asked": f"{_PROBE}, {sizes}", **answers}


def extras() -> dict[str, Any]:
    """Whether each optional extra is complete, and the command that completes it."""
    missing = {
        name: [module for module in modules if find_spec(module) is None]
        for name, modules in EXTRAS.items()
    }
    return {
        name: f"missing {', '.join(modules)}: pip install 'moelten[{name}]'"
        if modules
        else "complete"
        for name, modules in missing.items()
    }


def require_extra(name: str, purpose: str) -> None:
    """Raise ImportError, naming the extra to install, unless all its modules are there."""
    missing = [module for module in EXTRAS[name] if find_spec(module) is None]
    if missing:
        raise ImportError(f"{purpose} needs {', '.join(missing)}: pip install 'moelten[{name}]'")
