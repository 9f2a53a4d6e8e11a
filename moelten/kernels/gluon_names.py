"""What Gluon calls by other names in Triton 3.6 than later."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# A box of a tensor in memory to shared memory.
bring = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# All warps that run the same code.
wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_VIEWS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpret(buffer, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The bytes of a buffer as numbers of another type, in another shape and layout."""
    if _VIEWS:
        return buffer.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        return buffer._reinterpret(DTYPE, SHAPE, LAYOUT)
