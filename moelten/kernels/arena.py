"""One byte buffer, cut into the tensors of a call: the same cuts measure it and serve it.

A backend writes down once which tensors a call needs, as calls of a `Take`. An arena without a
buffer counts their bytes, an arena with one hands them out, `heap` allocates each by itself: so
what `workspace_bytes` says cannot drift from what a call uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from moelten.errors import FormatError
from moelten.routing import Routing

# No access of any GPU wants more, tensor maps included.
ALIGNMENT = 256
# What a call without a workspace takes at most, unless one token needs more.
_OWN_BYTES = 2 << 30


class Take(Protocol):
    def __call__(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous, uninitialised tensor."""
        ...


class Arena:
    """Tensors from one uint8 buffer, each at a multiple of ALIGNMENT; `size` counts the bytes.

    Without a buffer the tensors have no storage (device "meta") and only `size` matters.
    """

    def __init__(self, buffer: Tensor | None = None) -> None:
        if buffer is not None and buffer.is_cuda and buffer.data_ptr() % ALIGNMENT:
            raise FormatError(
                f"workspace: expected an address that is a multiple of {ALIGNMENT}, got "
                f"{buffer.data_ptr():#x}; cut it from its allocation at such a multiple"
            )
        self._buffer = buffer
        self.size = 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The next tensor; raises an error of torch where the buffer is too small."""
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + math.prod(shape) * dtype.itemsize
        if self._buffer is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._buffer[start : self.size].view(dtype).view(shape)


def heap(device: torch.device) -> Take:
    """A `Take` that allocates each tensor by itself."""

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return take


def chunk_tokens(tokens: int, limit: int, needed: Callable[[int], int]) -> int:
    """How many tokens to run at once: as few chunks as fit in `limit` bytes, nearly equal ones.

    needed: the bytes that some tokens take, never fewer for more of them. Raises FormatError if
    `limit` does not hold one token.

    >>> chunk_tokens(10, 100, lambda tokens: 20 * tokens)
    5
    """
    if needed(tokens) <= limit:
        return tokens
    if needed(1) > limit:
        raise FormatError(
            f"workspace: expected at least {needed(1)} bytes, which one token takes (all {tokens} "
            f"at once take {needed(tokens)}), got {limit}; ask moelten.workspace_bytes"
        )
    fits, too_many = 1, tokens
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if needed(middle) <= limit:
            fits = middle
        else:
            too_many = middle
    return -(-tokens // -(-tokens // fits))


def serve_chunks(
    routing: Routing, workspace: Tensor | None, needed: Callable[[int], int]
) -> Iterator[tuple[slice, Routing, Take]]:
    """The token ranges that run at once, with their routing and their memory, reused by each.

    workspace: uint8 on the routing's device; None allocates one of at most 2 GiB
    needed:    as for `chunk_tokens`
    """
    if workspace is None:
        step = own_chunk(routing.num_tokens, needed)
        workspace = torch.empty(needed(step), dtype=torch.uint8, device=routing.ids.device)
    else:
        step = chunk_tokens(routing.num_tokens, workspace.numel(), needed)
    for part, chunk in split_tokens(routing, step):
        yield part, chunk, Arena(workspace).take


def own_chunk(tokens: int, needed: Callable[[int], int]) -> int:
    """How many tokens run at once where the caller gives no workspace."""
    return chunk_tokens(tokens, max(_OWN_BYTES, needed(1)), needed)


def split_tokens(routing: Routing, step: int) -> Iterator[tuple[slice, Routing]]:
    """Ranges of up to `step` tokens, with the routing of each."""
    for start in range(0, routing.num_tokens, step):
        part = slice(start, start + step)
        yield part, Routing(routing.ids[part], routing.weights[part], routing.on_input)
