"""Shards are planned from headers, filled in any order, and readable by safetensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from moelten import CheckpointError
from moelten.checkpoints.reader import SafetensorsFiles
from moelten.checkpoints.shards import INDEX, ShardWriter, planned

TENSORS = {
    "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "b": torch.tensor([4, 5]),
    "c": torch.tensor([6.0], dtype=torch.bfloat16),
    "d": torch.tensor(7.0),
    "e": torch.empty(0, 4, dtype=torch.int8),
    "f": torch.tensor([[8.0], [9.0]]).to(torch.float8_e4m3fn),
}


def planned_writer(folder, max_shard_bytes: int = 1000) -> ShardWriter:
    plan = {name: planned(tensor) for name, tensor in TENSORS.items()}
    return ShardWriter(folder, plan, max_shard_bytes)


@pytest.mark.parametrize("limit, shards", [(1000, 1), (20, 2), (4, 5)])
def test_every_tensor_lands_aligned_in_its_place(tmp_path, limit, shards):
    writer = planned_writer(tmp_path, limit)
    for name in reversed(TENSORS):
        writer.write(name, TENSORS[name])
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    for name, info in SafetensorsFiles(tmp_path).tensors.items():
        assert info.start % TENSORS[name].itemsize == 0
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_copies_are_byte_for_byte(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    writer = planned_writer(tmp_path / "one")
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.close()
    source = SafetensorsFiles(tmp_path / "one").tensors
    copy = ShardWriter(tmp_path / "two", source, 20)
    for name, info in source.items():
        copy.copy(name, info)
    copy.close()
    files = SafetensorsFiles(tmp_path / "two")
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor)


def test_a_truncated_source_is_named(tmp_path):
    (tmp_path / "one").mkdir()
    writer = planned_writer(tmp_path / "one")
    source = SafetensorsFiles(tmp_path / "one").tensors["f"]
    with source.file.open("r+b") as file:
        file.truncate(source.start + 1)
    with pytest.raises(CheckpointError, match="ends inside f; it is truncated"):
        writer.copy("f", source)


def test_what_was_not_planned_or_not_written_is_refused(tmp_path):
    writer = planned_writer(tmp_path)
    with pytest.raises(CheckpointError, match=r"c: planned BF16 \[1\].* got torch.bfloat16 \[2\]"):
        writer.write("c", torch.zeros(2, dtype=torch.bfloat16))
    writer.write("a", TENSORS["a"])
    with pytest.raises(CheckpointError, match=r"5 planned tensors were not written: \['b', 'c'"):
        writer.close()
