"""The GPUs that the Triton kernels are compiled for, and how a test takes one for granted."""

from __future__ import annotations

import pytest
from triton.backends.compiler import GPUTarget

from moelten.kernels import arena
from moelten.kernels import triton as backend
from moelten.kernels.triton_variants import Target

TARGETS = {
    "sm_80": (Target("cuda", 80), GPUTarget("cuda", 80, 32)),
    "sm_90a": (Target("cuda", 90), GPUTarget("cuda", 90, 32)),
    "sm_100a": (Target("cuda", 100), GPUTarget("cuda", 100, 32)),
    "gfx942": (Target("hip", "gfx942"), GPUTarget("hip", "gfx942", 64)),
    "gfx950": (Target("hip", "gfx950"), GPUTarget("hip", "gfx950", 64)),
}


def pretend(patch: pytest.MonkeyPatch, target: str) -> None:
    """Until the patch is undone, layers launch what they launch on that GPU."""
    patch.setattr(backend, "current_target", lambda: TARGETS[target][0])
    # Their caches know one target only.
    patch.setattr(arena, "_measure", arena._measure.__wrapped__)
    patch.setattr(arena, "_prepare", arena._prepare.__wrapped__)
