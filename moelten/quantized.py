"""Rows of activations, quantized for a kernel of one's own: codes, and scales in a kernel's order.

On a GPU one launch of Triton writes codes, scales and padding; on a CPU torch does. The bytes are
the same, those of `moelten.quantize` and `moelten.layouts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from moelten.errors import FormatError, UnsupportedError
from moelten.formats import (
    FP8_GROUP,
    FP8_ROW,
    FP8_TENSOR,
    INT8_GROUP,
    INT8_ROW,
    MXFP8,
    NVFP4,
    Format,
)
from moelten.layouts import ROW_TILES, swizzle, unswizzle
from moelten.qtensor import QTensor, quantize

FORMATS: tuple[Format, ...] = (
    *(FP8_ROW, FP8_TENSOR, FP8_GROUP, INT8_ROW, INT8_GROUP),
    *(MXFP8(), NVFP4(), NVFP4(per_token=True)),
)


@dataclass(frozen=True)
class QuantizedRows:
    """Activations [R, K] in `format`, with their scales in `scale_layout`.

    data:         [R, K] codes, or uint8 [R, K/2] for 4-bit formats
    scale:        of format.scale_dtype: "linear" [*format.scale_shape(R, K)], "128x4" and "8x4"
                  flat [R padded to 128 or 8, times groups padded to 4], the padding zero
    global_scale: NVFP4 only: fp32 [R] per token, else [] for all
    """

    data: Tensor
    format: Format
    scale: Tensor
    scale_layout: str = "linear"
    global_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Logical [R, K]."""
        rows, stored = self.data.shape
        return rows, stored * 2 if self.format.packed else stored

    def to_qtensor(self) -> QTensor:
        """The same codes with linear scales, which `dequantize` reads."""
        scale = unswizzle(self.scale, *self.format.scale_shape(*self.shape), self.scale_layout)
        return QTensor(self.data, self.format, scale, global_scale=self.global_scale)


def quantize_activations(
    x: Tensor, fmt: Format, *, scale: Tensor | None = None, scale_layout: str = "linear"
) -> QuantizedRows:
    """Quantize activations x [R, K] (bf16, fp16 or fp32, contiguous) to `fmt`.

    fmt:          FP8 per token, per tensor or in 1x128 groups; Int8 per token or in 1x128 groups;
                  MXFP8; NVFP4 per tensor or (`per_token=True`) with a global scale per token.
                  `quantize` gives the formulas
    scale:        fp32 [], the static decode scale of the formats per tensor, which need it: FP8's
                  scale (amax / 448) or NVFP4's global scale (amax / 2688)
    scale_layout: "linear", or for MXFP8 and NVFP4 one that tensor cores read, "128x4" or "8x4"
                  (see `moelten.layouts`)

    The bytes do not depend on the device. Raises FormatError for what it does not take, and
    UnsupportedError for a GPU tensor without Triton; `quantize` runs there without it.

    >>> from moelten import dequantize
    >>> x = torch.randn(3, 64, dtype=torch.bfloat16)
    >>> q = quantize_activations(x, NVFP4(per_token=True), scale_layout="128x4")
    >>> q.data.shape, q.scale.shape, q.global_scale.shape
    (torch.Size([3, 32]), torch.Size([512]), torch.Size([3]))
    >>> dequantize(q.to_qtensor()).shape
    torch.Size([3, 64])
    """
    _check(x, fmt, scale, scale_layout)
    scale = None if scale is None else scale.view(())
    if x.is_cuda and x.numel():
        return _by_triton(x, fmt, scale, scale_layout)
    if isinstance(fmt, NVFP4):
        q = quantize(x, fmt, global_scale=scale)
    else:
        q = quantize(x, fmt, scale=None if scale is None else scale.view(1, 1))
    assert q.scale is not None
    return QuantizedRows(q.data, fmt, swizzle(q.scale, scale_layout), scale_layout, q.global_scale)


def _by_triton(x: Tensor, fmt: Format, scale: Tensor | None, scale_layout: str) -> QuantizedRows:
    if find_spec("triton") is None:
        raise UnsupportedError(
            "quantize_activations on a GPU needs Triton: pip install 'moelten[triton]'; "
            "moelten.quantize does without"
        )
    from moelten.kernels.arena import on_device
    from moelten.kernels.triton_ops import quantize_rows

    with on_device(x.device):
        rows = quantize_rows(x, fmt, static_scale=scale, scale_layout=scale_layout)
    assert rows.scale is not None and fmt.scale_dtype is not None
    scales, global_scale = rows.scale.view(fmt.scale_dtype), rows.global_scale
    if scale is not None and global_scale is not None:
        global_scale = global_scale[0]
    elif scale is not None:
        scales = scale.view(1, 1)
    return QuantizedRows(rows.data.view(fmt.data_dtype), fmt, scales, scale_layout, global_scale)


def _check(x: Tensor, fmt: Format, scale: Tensor | None, scale_layout: str) -> None:
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise FormatError(
            f"x: expected bf16, fp16 or fp32 [rows, K], got {x.dtype} {list(x.shape)}"
        )
    if not x.is_contiguous():
        raise FormatError(
            f"x: expected contiguous rows, got strides {x.stride()}; call x.contiguous()"
        )
    if fmt not in FORMATS:
        raise FormatError(
            f"{fmt.name} is no activation format; expected {', '.join(f.name for f in FORMATS)}; "
            "moelten.quantize takes every format"
        )
    fmt.check_columns(x.shape[1], "x")
    byte_scales = isinstance(fmt, MXFP8 | NVFP4)
    if scale_layout not in ROW_TILES or (scale_layout != "linear" and not byte_scales):
        known = ", ".join(ROW_TILES) if byte_scales else "linear"
        raise FormatError(f"scale_layout: expected {known} for {fmt.name}, got {scale_layout!r}")
    per_tensor = fmt in (FP8_TENSOR, NVFP4())
    if per_tensor != (scale is not None):
        raise FormatError(
            f"{fmt.name}: "
            + ("expected its static scale, got none" if per_tensor else "is dynamic, drop scale")
        )
    if scale is not None and (scale.dtype, scale.numel()) != (torch.float32, 1):
        raise FormatError(
            f"scale: expected torch.float32 [], got {scale.dtype} {list(scale.shape)}"
        )
    if scale is not None and scale.device != x.device:
        raise FormatError(f"scale is on {scale.device}, x is on {x.device}")
