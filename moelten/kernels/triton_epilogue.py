"""What follows a grouped GEMM's sum, in fp32: scales that are constant along K, bias, activation.

Shared by every Triton GEMM, so that a layer's result does not depend on which of them ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from moelten.kernels.triton_casts import load_scale, round_to, widen


@dataclass(frozen=True)
class Epilogue:
    """What follows the sum, in this order; each part is optional.

    bias:        fp32 [E, halves, N]
    activation:  name of the function that joins the halves, "none" for one half as it is
    parameters:  SwiGLU's alpha, beta and limit (inf for none), or fp32 [E, 3] of them
    post_scale:  fp32 [E, N], multiplies the activation's result
    router:      [T, k] weights, multiply the result
    """

    bias: Tensor | None = None
    activation: str = "none"
    parameters: tuple[float, float, float] | Tensor = (1.0, 0.0, float("inf"))
    post_scale: Tensor | None = None
    router: Tensor | None = None


NO_EPILOGUE = Epilogue()


@triton.jit
def _gelu(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(g, u, alpha, beta, limit, NAME: tl.constexpr, LIMITED: tl.constexpr):
    """The function of `moelten.activations` called NAME, of gate g and up u (or of g alone)."""
    if NAME == "swiglu":
        if LIMITED:
            # Comparisons, not minimum: NaN must pass.
            g = tl.where(g > limit, limit, g)
            u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        return g * tl.sigmoid(alpha * g) * (u + beta)
    elif NAME == "geglu":
        return _gelu(g, False) * u
    elif NAME == "geglu_tanh":
        return _gelu(g, True) * u
    elif NAME == "reglu":
        return tl.where(g < 0.0, 0.0, g) * u
    elif NAME == "silu":
        return g * tl.sigmoid(g)
    elif NAME == "gelu":
        return _gelu(g, False)
    elif NAME == "gelu_tanh":
        return _gelu(g, True)
    elif NAME == "relu2":
        r = tl.where(g < 0.0, 0.0, g)
        return r * r
    else:
        tl.static_assert(NAME == "none")
        return g


@triton.jit
def finish(
    acc, w_scale_ptr, w_global_ptr, bias_ptr, a_scale, a_global, matrix, n, inside_n, scale_row,
    N: tl.constexpr, W_SCALE: tl.constexpr, W_MODE: tl.constexpr, A_MODE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """One half's fp32 result: what is constant along K, then the bias."""
    h = acc.to(tl.float32)
    if W_MODE == "row":
        h = h * load_scale(w_scale_ptr + scale_row, inside_n, W_SCALE, NATIVE)[:, None]
    if A_MODE == "row":
        h = h * a_scale[None, :]
    if a_global is not None:
        h = h * a_global[None, :]
    if w_global_ptr is not None:
        h = h * tl.load(w_global_ptr + matrix)
    if bias_ptr is not None:
        h = h + tl.load(bias_ptr + matrix * N + n, mask=inside_n, other=0.0)[:, None]
    return h


@triton.jit
def store_pairs(
    h0, h1, table_ptr, post_ptr, router_ptr, out_ptr, alpha, beta, limit,
    expert, pair, inside_m, n, inside_n,
    N: tl.constexpr, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Join the halves, scale and store: out[pair, n] from h0 and h1 [n, pair]."""
    if table_ptr is not None:
        alpha = tl.load(table_ptr + expert * 3)
        beta = tl.load(table_ptr + expert * 3 + 1)
        limit = tl.load(table_ptr + expert * 3 + 2)
    y = activate(h0, h1, alpha, beta, limit, ACTIVATION, LIMITED)
    if post_ptr is not None:
        y = y * tl.load(post_ptr + expert * N + n, mask=inside_n, other=0.0)[:, None]
    if router_ptr is not None:
        y = y * widen(tl.load(router_ptr + pair, mask=inside_m, other=0.0))[None, :]
    y = round_to(y, out_ptr.dtype.element_ty)
    at = pair.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptr + at, y, mask=inside_n[:, None] & inside_m[None, :])
