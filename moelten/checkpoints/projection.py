"""Projection: the tensors of one expert's matrix, by suffix, with dtype and shape checked.

Decoders see nothing else of a checkpoint. The same decoder runs on real tensors and on tensors of
the meta device, which have a dtype and a shape and no values: that is how a layer's spec comes from
headers alone. A tensor that no decoder asked for is refused, because a part of an expert that is
silently dropped is a wrong model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moelten.errors import CheckpointError, FormatError, UnsupportedError

Shape = tuple[int | None, ...]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E8M0 = (torch.uint8, torch.float8_e8m0fnu)
BYTES = (torch.uint8, torch.int8)
SCALE_NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.uint8: "e8m0",
}


class Projection:
    """One matrix [N, K] of one expert.

    module: its name, for messages
    names:  suffix -> tensor name
    fetch:  tensor name -> tensor; on the meta device when only the headers are wanted
    where:  tensor name -> "dtype shape in file", for messages
    """

    def __init__(
        self,
        module: str,
        names: Mapping[str, str],
        fetch: Callable[[str], Tensor],
        where: Callable[[str], str],
    ) -> None:
        self.module = module
        self._names = names
        self._fetch = fetch
        self._where = where
        self._seen: set[str] = set()

    def __contains__(self, suffix: str) -> bool:
        return suffix in self._names

    def first(self, *suffixes: str) -> str:
        """The first of `suffixes` that is there; CheckpointError naming all of them if none is."""
        for suffix in suffixes:
            if suffix in self:
                return suffix
        raise CheckpointError(
            f"missing tensor {self.module}.{suffixes[0]}"
            + "".join(f" (or .{other})" for other in suffixes[1:])
            + f"; the files hold {', '.join(sorted(self._names)) or 'nothing'} of this projection"
        )

    def read(self, suffix: str, dtypes: tuple[torch.dtype, ...], *shape: int | None) -> Tensor:
        """A tensor of one of `dtypes` and of `shape` (None: any size there).

        Raises CheckpointError if it is missing and FormatError if it is something else.
        """
        name = self._names[self.first(suffix)]
        tensor = self._fetch(name)
        self._seen.add(suffix)
        fits = len(shape) == tensor.dim() and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype not in dtypes or not fits:
            raise self.mismatch(suffix, tensor, dtypes, shape)
        return tensor

    def read_scale(self, suffix: str, dtypes: tuple[torch.dtype, ...], shape: Shape) -> Tensor:
        """A scale tensor as `shape`, whatever axes of size 1 it is stored with; e8m0 as uint8."""
        name = self._names[self.first(suffix)]
        tensor = self._fetch(name)
        self._seen.add(suffix)
        squeezed = [size for size in tensor.shape if size != 1]
        if tensor.dtype not in dtypes or squeezed != [size for size in shape if size != 1]:
            raise self.mismatch(suffix, tensor, dtypes, shape)
        if tensor.dtype == torch.float8_e8m0fnu:
            tensor = tensor.view(torch.uint8)
        return tensor.reshape(shape)  # type: ignore[arg-type]

    def read_scalar(self, suffix: str) -> Tensor:
        """A positive, finite fp32 scalar."""
        scalar = self.read_scale(suffix, FLOATS, ()).float()
        if not scalar.is_meta and not (torch.isfinite(scalar) and scalar > 0):
            raise CheckpointError(
                f"{self.describe(suffix)}: expected a positive finite scale, got {scalar.item()}"
            )
        return scalar

    def skip(self, *suffixes: str) -> None:
        """Accept tensors that decoding does not need."""
        self._seen.update(suffixes)

    def finish(self) -> None:
        """Refuse tensors that nobody asked for."""
        left = sorted(set(self._names) - self._seen)
        if left:
            raise UnsupportedError(
                f"{self.describe(left[0])}: this format has no such tensor; dropping it could "
                "change the model"
            )

    def describe(self, suffix: str) -> str:
        """Name, dtype, shape and file of a tensor."""
        name = self._names[suffix]
        return f"{name} ({self._where(name)})"

    def mismatch(
        self, suffix: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: Shape
    ) -> FormatError:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        return FormatError(f"{self.describe(suffix)}: expected {wanted} [{sizes}], got {got}")
