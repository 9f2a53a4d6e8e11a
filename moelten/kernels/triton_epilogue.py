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
def _gelu(x, APPROXIMATE: tl.constexpr, SIGMOID: tl.constexpr):
    if APPROXIMATE:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * SIGMOID(2.0 * inner)
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(
    g, u, alpha, beta, limit,
    NAME: tl.constexpr, LIMITED: tl.constexpr, SIGMOID: tl.constexpr = tl.sigmoid,
):  # fmt: skip
    """The function of `moelten.activations` called NAME, of gate g and up u (or of g alone)."""
    if NAME == "swiglu":
        if LIMITED:
            # Comparisons, not minimum: NaN must pass.
            g = tl.where(g > limit, limit, g)
            u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        return g * SIGMOID(alpha * g) * (u + beta)
    elif NAME == "geglu":
        return _gelu(g, False, SIGMOID) * u
    elif NAME == "geglu_tanh":
        return _gelu(g, True, SIGMOID) * u
    elif NAME == "reglu":
        return tl.where(g < 0.0, 0.0, g) * u
    elif NAME == "silu":
        return g * SIGMOID(g)
    elif NAME == "gelu":
        return _gelu(g, False, SIGMOID)
    elif NAME == "gelu_tanh":
        return _gelu(g, True, SIGMOID)
    elif NAME == "relu2":
        r = tl.where(g < 0.0, 0.0, g)
        return r * r
    else:
        tl.static_assert(NAME == "none")
        return g


@triton.jit
def row_of_scales(matrix, n, P: tl.constexpr):
    """Where the scales of row n of a half begin."""
    row = n * 0 if P.weights.row_block == 0 else n // P.weights.row_block
    return (matrix * P.scale_rows + row) * P.scale_columns


@triton.jit
def token_factors(x, source, inside, P: tl.constexpr):
    """What is constant along K of rows of activations: their scales, global ones; 0 for none."""
    _, a_scale_ptr, a_global_ptr = x
    scale = 0
    if P.activations.mode == "row":
        scale = tl.load(a_scale_ptr + source, mask=inside, other=0.0)
    global_scale = 0
    if a_global_ptr is not None:
        global_scale = tl.load(a_global_ptr + source, mask=inside, other=0.0)
    return scale, global_scale


@triton.jit
def finish(acc, weights, x, tokens, epilogue, expert, half: tl.constexpr, n, P: tl.constexpr):
    """One half's fp32 result [n, pair]: what is constant along K, then the bias.

    tokens: `token_factors`
    """
    _, w_scale_ptr, _, w_global_ptr = weights
    _, _, a_global_ptr = x
    token_scale, token_global = tokens
    bias_ptr, _, _, _, _, _, _, _ = epilogue
    SCALE: tl.constexpr = P.weights.scale
    inside = n < P.rows
    matrix = expert * P.halves + half
    h = acc.to(tl.float32)
    if P.weights.mode == "row":
        at = w_scale_ptr + (row_of_scales(expert * P.halves, n, P) + half * P.half_scales)
        h = h * load_scale(at, inside, SCALE, P.variant.native_fp8)[:, None]
    if P.activations.mode == "row":
        h = h * token_scale[None, :]
    if a_global_ptr is not None:
        h = h * token_global[None, :]
    if w_global_ptr is not None:
        h = h * tl.load(w_global_ptr + matrix)
    if bias_ptr is not None:
        h = h + tl.load(bias_ptr + matrix * P.rows + n, mask=inside, other=0.0)[:, None]
    return h


@triton.jit
def store_pairs(h0, h1, epilogue, expert, pair, inside_m, n, P: tl.constexpr):
    """Join the halves, scale and store: out[pair, n] from h0 and h1 [n, pair]."""
    _, table_ptr, post_ptr, router_ptr, out_ptr, alpha, beta, limit = epilogue
    ACTIVATION: tl.constexpr = P.activation
    inside_n = n < P.rows
    if table_ptr is not None:
        alpha = tl.load(table_ptr + expert * 3)
        beta = tl.load(table_ptr + expert * 3 + 1)
        limit = tl.load(table_ptr + expert * 3 + 2)
    y = activate(h0, h1, alpha, beta, limit, ACTIVATION, P.limited)
    if post_ptr is not None:
        y = y * tl.load(post_ptr + expert * P.rows + n, mask=inside_n, other=0.0)[:, None]
    if router_ptr is not None:
        y = y * widen(tl.load(router_ptr + pair, mask=inside_m, other=0.0))[None, :]
    y = round_to(y, out_ptr.dtype.element_ty)
    at = pair.to(tl.int64)[None, :] * P.rows + n[:, None]
    tl.store(out_ptr + at, y, mask=inside_n[:, None] & inside_m[None, :])
