"""Routing as a value: what it keeps and refuses, and its packed words."""

from __future__ import annotations

import math
import struct
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from moelten import routing
from moelten.routing import Routing

INF = math.inf


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_routing_keeps_what_it_gets(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, -1], [5, 5], [2**31 - 1, -(2**31)]], dtype=dtype)
    for weight_dtype in (torch.float32, torch.bfloat16, torch.float16):
        r = Routing(ids, torch.ones(3, 2, dtype=weight_dtype), on_input=True)
        assert r.ids is ids and (r.num_tokens, r.top_k, r.on_input) == (3, 2, True)
    with pytest.raises(FrozenInstanceError):
        r.ids = ids  # type: ignore[misc]
    assert r == r and r != Routing(ids, torch.ones(3, 2))  # identity: tensors have no truth value


@pytest.mark.parametrize(
    ("ids", "weights", "error", "message"),
    [
        ([[0]], torch.ones(1, 1), TypeError, "ids: expected a tensor.*list"),
        (torch.zeros(1, 1).int(), 1.0, TypeError, "weights: expected a tensor.*float"),
        (
            torch.zeros(1, 1),
            torch.ones(1, 1),
            ValueError,
            r"int32 or int64.*float32 \[1, 1\].*cast",
        ),
        (torch.zeros(1, 1).short(), torch.ones(1, 1), ValueError, "ids: expected.*int16"),
        (torch.zeros(1, 1).int(), torch.ones(1, 1).int(), ValueError, "weights: expected float32"),
        (torch.zeros(1, 1).int(), torch.ones(1, 1).double(), ValueError, r"float64 \[1, 1\]"),
        (torch.zeros(2).int(), torch.ones(2), ValueError, r"ids: .*int32 \[2\].*reshape"),
        (torch.zeros(2, 1).int(), torch.ones(2), ValueError, r"weights: .*float32 \[2\]"),
        (torch.zeros(2, 1).int(), torch.ones(1, 2), ValueError, r"one shape.*\[2, 1\].*\[1, 2\]"),
        (torch.zeros(2, 1).int(), torch.ones(2, 1, device="meta"), ValueError, "cpu.*meta"),
    ],
)
def test_routing_refuses(ids: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Routing(ids, weights)


def test_routing_refuses_on_input() -> None:
    with pytest.raises(TypeError, match="on_input: expected True or False"):
        Routing(torch.zeros(1, 1).int(), torch.ones(1, 1), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expert", "weight", "word"),
    [
        (3, 0.75, 0x00033F40),
        (255, 1.0, 0x00FF3F80),
        (-1, 0.5, 0xFFFF3F00),
        (5, -0.5, 0x0005BF00),  # an unmasked sign extension makes this id -1
        (-1, -0.5, 0xFFFFBF00),
        (0, -0.0, 0x00008000),
        (32767, -INF, 0x7FFFFF80),
        (-32768, 1.0, 0x80003F80),
        (7, 1.00390625, 0x00073F80),  # halfway between bfloat16 neighbours: to even, down
        (7, 1.01171875, 0x00073F82),  # and up
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_words(expert: int, weight: float, word: int, dtype: torch.dtype) -> None:
    r = Routing(torch.tensor([[expert]], dtype=dtype), torch.tensor([[weight]]))
    words = r.to_words()
    assert words.dtype == torch.int32 and int(words.item()) & 0xFFFFFFFF == word
    back = Routing.from_words(words)
    assert back.ids.dtype == torch.int32 and back.ids.item() == expert
    expected = torch.tensor(weight).bfloat16()
    assert back.weights.dtype == torch.bfloat16 and back.weights.item() == expected.item()
    low, high = struct.unpack("<Hh", struct.pack("<i", words.item()))  # the kernel's struct
    assert high == expert and low == int(expected.view(torch.int16).item()) & 0xFFFF


def test_packed_words_carry_all_bits() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    ids = bits.flip(0)[:, None]
    r = Routing(ids, bits.to(torch.int16).view(torch.bfloat16)[:, None])
    back = Routing.from_words(r.to_words())
    assert torch.equal(back.ids, ids)
    assert torch.equal(back.weights.view(torch.int16).int()[:, 0], bits)


def test_packed_words_round_trip_a_method() -> None:
    r = routing.topk_raw(torch.randn(50, 16, generator=torch.Generator().manual_seed(7)), 12)
    assert bool((r.weights < 0).any())
    back = Routing.from_words(r.to_words(), on_input=True)
    assert torch.equal(back.ids, r.ids) and torch.equal(back.weights, r.weights.bfloat16())
    assert back.on_input


@pytest.mark.parametrize("expert", [32768, -32769, 2**31 - 1, 2**40])
def test_packed_words_refuse_wide_ids(expert: int) -> None:
    with pytest.raises(ValueError, match=r"expected int16 ids, got -?\d+\.\.\d+; -1 skips"):
        Routing(torch.tensor([[0, expert]]), torch.ones(1, 2)).to_words()


def test_from_words_refuses() -> None:
    with pytest.raises(ValueError, match=r"words: expected int32 \[T, top_k\], got int64 \[1, 1\]"):
        Routing.from_words(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"words: expected int32 \[T, top_k\], got int32 \[3\]"):
        Routing.from_words(torch.zeros(3, dtype=torch.int32))


def test_from_words_compiles_whole() -> None:
    words = torch.tensor([[0x0005BF00, -1]], dtype=torch.int32)
    torch.compiler.reset()
    r = torch.compile(Routing.from_words, fullgraph=True, backend="eager")(words)
    assert r.ids.tolist() == [[5, -1]] and r.weights[0, 0].item() == -0.5
