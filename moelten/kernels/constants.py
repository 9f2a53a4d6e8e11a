"""What is compiled into a kernel, as one value that Triton's cache on disk tells from others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Constants:
    """Base of such values.

    Triton compiles a kernel anew when its source changes or a constant's `str`. But a kernel also
    depends on what a value's properties make of its fields, in Python that Triton does not look at:
    so `str` names the sources, lest a new version of this library finds kernels of an old one.
    """

    def __str__(self) -> str:
        return f"{self!r} {sources()}"


def identify(kernel: Any) -> None:
    """Tell Triton what a kernel is made of, which else reads all functions that it calls, and what
    those call: for a GEMM that takes longer than to load it.

    They are all in files beside this one, or Triton's own, which has its version told apart.
    """
    if getattr(kernel, "hash", "") is None:
        named = f"{kernel.__module__}.{kernel.__name__} {sources()}"
        kernel.hash = hashlib.sha256(named.encode()).hexdigest()


@cache
def sources() -> str:
    """A hash of the Python files beside this one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
