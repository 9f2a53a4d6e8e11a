"""Safetensors folders written in place: offsets are planned before the first byte is.

Headers of the source give the name, dtype and size of every tensor, so each shard's own header can
be written first and its tensors then go to their offsets in any order, one at a time: memory holds
the tensor at hand and nothing else. Copies are byte for byte, whatever their dtype. What the
tensors mean is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelten.checkpoints.reader import TensorInfo
from moelten.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# Element sizes by the end of a dtype's name; all others are one byte or less.
_WIDE = {"64": 8, "32": 4, "16": 2}
_CHUNK = 1 << 24


def planned(tensor: Tensor) -> TensorInfo:
    """The entry of a tensor like this one (which may be on the meta device), not written yet."""
    return TensorInfo(Path(), _DTYPES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)


def nbytes(entry: TensorInfo) -> int:
    return entry.stop - entry.start


class ShardWriter:
    """Writes the planned tensors to `folder`, cut into shards of at most max_shard_bytes.

    A tensor larger than a shard gets one of its own. `close` refuses if a planned tensor is missing
    and writes the index.
    """

    def __init__(self, folder: Path, plan: Mapping[str, TensorInfo], max_shard_bytes: int) -> None:
        self._folder = folder
        self._plan = plan
        self._offsets: dict[str, tuple[Path, int]] = {}
        self._written: set[str] = set()
        shards = _cut(plan, max_shard_bytes)
        for number, names in enumerate(shards, 1):
            self._open(folder / f"model-{number:05}-of-{len(shards):05}.safetensors", names)

    def _open(self, file: Path, names: list[str]) -> None:
        # Wide elements first, so that every tensor is aligned to its own element size.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: -_WIDE.get(self._plan[name].dtype[-2:], 1)):
            entry = self._plan[name]
            offsets = [end, end := end + nbytes(entry)]
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        for name in names:
            self._offsets[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor at its place; dtype and shape must be the planned ones."""
        entry = self._plan[name]
        if (_DTYPES[tensor.dtype], tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"{name}: planned {entry.dtype} {list(entry.shape)} from the header of the source, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        file, start = self._offsets[name]
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(flat.numpy().data)
        self._written.add(name)

    def copy(self, name: str, source: TensorInfo) -> None:
        """Copy a tensor's bytes from another safetensors file."""
        file, start = self._offsets[name]
        left = nbytes(source)
        with source.file.open("rb") as reader, file.open("r+b") as stream:
            reader.seek(source.start)
            stream.seek(start)
            while left:
                chunk = reader.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(f"{source.file} ends inside {name}; it is truncated")
                stream.write(chunk)
                left -= len(chunk)
        self._written.add(name)

    def close(self) -> None:
        """Check that every planned tensor was written, and write the index of the shards."""
        missing = sorted(self._plan.keys() - self._written)
        if missing:
            raise CheckpointError(f"{len(missing)} planned tensors were not written: {missing[:3]}")
        index = {
            "metadata": {"total_size": sum(nbytes(entry) for entry in self._plan.values())},
            "weight_map": {name: self._offsets[name][0].name for name in sorted(self._plan)},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _cut(plan: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, in runs of at most max_shard_bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, entry in plan.items():
        if shards[-1] and used + nbytes(entry) > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes(entry)
    return shards
