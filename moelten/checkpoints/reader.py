"""SafetensorsFiles: the tensors of a directory of safetensors files, by name, read only on demand.

Headers are parsed once, when opened; after that a read is one seek into one file, of a whole tensor
or of one index of its first axis, so that memory holds what was asked for and nothing else. The
header is checked against the file's size first: a truncated download is named here, not three
layers later as wrong values. What tensors mean is not known here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelten.errors import CheckpointError, UnsupportedError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F4": torch.uint8,  # two codes in a byte; headers count codes, we count bytes
}
_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()} | {"F4": 4}
_MAX_HEADER = 100_000_000
_INDEX = "model.safetensors.index.json"
# Input scales of W4AFP8 checkpoints, which some of their indexes leave out.
_SIDE_FILE = "act_scales.safetensors"


class TensorInfo(NamedTuple):
    """What a header says of one tensor; bytes start..stop of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def empty(self, device: str) -> Tensor:
        """A tensor of this dtype and shape, with no values."""
        if self.dtype not in _DTYPES:
            raise UnsupportedError(f"{self.file.name}: dtype {self.dtype} is not supported")
        shape = self.shape
        if self.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        return torch.empty(shape, dtype=_DTYPES[self.dtype], device=device)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in {self.file.name}"


class SafetensorsFiles:
    """All tensors of a checkpoint directory, with its index or without.

    Raises CheckpointError for a truncated or damaged file, for a file that the index names and the
    directory lacks, and for a tensor that the index places in a file that does not hold it.
    """

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        index = _read_index(directory)
        for file in _list_files(directory, index):
            for name, info in _read_header(file):
                if name in self.tensors and name not in index:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"tensor {name} is in both {other} and {file.name}")
                if index.get(name, file.name) == file.name:
                    self.tensors[name] = info
        for name, file_name in index.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"missing tensor {name}: {_INDEX} places it in {file_name}, which lacks it"
                )

    def meta(self, name: str, index: int | None = None) -> Tensor:
        """The tensor without its values, on the meta device, from its header alone."""
        whole = self.tensors[name].empty("meta")
        return whole if index is None else whole[index]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or its part at `index` of the first axis, freshly read into memory."""
        info = self.tensors[name]
        part = self.meta(name, index)
        offset = 0 if index is None else index * part.numel() * part.itemsize
        buffer = torch.empty(part.numel() * part.itemsize, dtype=torch.uint8)
        with info.file.open("rb") as file:
            file.seek(info.start + offset)
            if file.readinto(buffer.numpy()) != buffer.numel():  # type: ignore[arg-type]
                raise CheckpointError(f"{info.file} ended inside tensor {name}; download it again")
        return buffer.view(part.dtype).view(part.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is not one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(record).__name__}")
    return record


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / _INDEX
    if not path.exists():
        return {}
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict):
        raise CheckpointError(f"{path}: expected a weight_map from tensor names to files")
    return index


def _list_files(directory: Path, index: dict[str, str]) -> list[Path]:
    if not index:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            _refuse_other_files(directory)
        return files
    files = [directory / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{_INDEX} names {len(missing)} files that {directory} lacks: {', '.join(missing[:4])}"
        )
    side = directory / _SIDE_FILE
    return [*files, side] if side.exists() and side not in files else files


def _refuse_other_files(directory: Path) -> None:
    kinds = {".gguf": "GGUF", ".bin": "pickled PyTorch", ".pt": "pickled PyTorch"}
    for file in sorted(directory.iterdir()):
        if file.suffix in kinds:
            raise UnsupportedError(
                f"{file.name}: {kinds[file.suffix]} checkpoints are not supported; convert to "
                "safetensors"
            )
    raise CheckpointError(f"{directory} holds no *.safetensors file")


def _read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file} is truncated: its header has {length} bytes, the file {size}; "
                "download it again"
            )
        if length > _MAX_HEADER:
            raise CheckpointError(f"{file} is no safetensors file: header of {length} bytes")
        text = stream.read(length)
    try:
        header = json.loads(text)
        entries = [(name, e) for name, e in header.items() if name != "__metadata__"]
        infos = [(name, _tensor_info(file, e, 8 + length)) for name, e in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a damaged header: {error}; download it again") from None
    for name, info in infos:
        if info.stop > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {name} ends at byte {info.stop}, the file at {size}; "
                "download it again"
            )
    return iter(infos)


def _tensor_info(file: Path, entry: dict[str, Any], base: int) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    bits = _BITS.get(dtype)
    if bits is not None and (stop - start) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{dtype} {list(shape)} does not fit {stop - start} bytes")
    return TensorInfo(file, dtype, shape, base + start, base + stop)
