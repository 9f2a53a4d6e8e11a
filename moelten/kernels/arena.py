"""One byte buffer, cut into the tensors of a call: the same cuts measure it and serve it.

A backend writes down once which tensors a call needs, as calls of a `Take`. An arena without a
buffer counts their bytes, an arena with one hands them out, `heap` allocates each by itself: so
what `workspace_bytes` says cannot drift from what a call uses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moelten.errors import FormatError
from moelten.kernels.launches import Launches
from moelten.packed import PackedExperts, decode_spec
from moelten.routing import Routing
from moelten.weights import ExpertSpec

# No access of any GPU wants more, tensor maps included.
ALIGNMENT = 256
# What a call without a workspace takes at most, unless one token needs more.
_OWN_BYTES = 4 << 30


class Take(Protocol):
    def __call__(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous, uninitialised tensor."""
        ...


class Arena:
    """Tensors from one uint8 buffer, each at a multiple of ALIGNMENT; `size` counts the bytes.

    Without a buffer the tensors have no storage (device "meta") and only `size` matters.
    """

    def __init__(self, buffer: Tensor | None = None) -> None:
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


def split_tokens(routing: Routing, step: int) -> Iterator[tuple[slice, Routing]]:
    """Ranges of up to `step` tokens, with the routing of each."""
    for start in range(0, routing.num_tokens, step):
        part = slice(start, start + step)
        yield part, Routing(routing.ids[part], routing.weights[part], routing.on_input)


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Launch there: Triton launches on torch's current GPU, whichever holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class ArenaBackend(ABC):
    """The part of a GPU backend that gives its launches their memory: as many tokens as fit."""

    @abstractmethod
    def lay_out(self, take: Take, spec: ExpertSpec, tokens: int, top_k: int, on_input: bool) -> Any:
        """Everything that a chunk of so many tokens needs beside its arguments."""

    @abstractmethod
    def run_chunk(
        self, x: Tensor, experts: PackedExperts, routing: Routing, stages: Any, out: Tensor
    ) -> None:
        """Write out [T, H]; stages: from `lay_out` for the same sizes."""

    def workspace_bytes(
        self, spec: ExpertSpec, tokens: int, top_k: int, on_input: bool = False
    ) -> int:
        return _measure(self, spec, tokens, top_k, on_input)

    def run(
        self,
        x: Tensor,
        experts: PackedExperts,
        routing: Routing,
        out: Tensor,
        workspace: Tensor | None = None,
    ) -> None:
        ids, weights, on_input = routing.ids, routing.weights, routing.on_input
        if not (ids.is_contiguous() and weights.is_contiguous()):
            routing = Routing(ids := ids.contiguous(), weights := weights.contiguous(), on_input)
        types = x.dtype, ids.dtype, weights.dtype, x.device
        limit = None if workspace is None else workspace.numel()
        call = _prepare(self, experts.signature, ids.shape, on_input, types, limit)
        if workspace is None:
            workspace = x.new_empty(call.size, dtype=torch.uint8)
        elif workspace.is_cuda and workspace.data_ptr() % ALIGNMENT:
            raise FormatError(
                f"workspace: expected an address that is a multiple of {ALIGNMENT}, got "
                f"{workspace.data_ptr():#x}; cut it from its allocation at such a multiple"
            )
        memory = (x, ids, weights, out, workspace, *experts.tensors.values())
        if not call.launches.repeat(memory):
            chunks = partial(self._run_chunks, call.step, x, experts, routing, out, workspace)
            call.launches.record(memory, chunks)

    def _run_chunks(
        self,
        step: int,
        x: Tensor,
        experts: PackedExperts,
        routing: Routing,
        out: Tensor,
        workspace: Tensor,
    ) -> None:
        for part, chunk in split_tokens(routing, step):
            take, size = Arena(workspace).take, chunk.num_tokens
            stages = self.lay_out(take, experts.spec, size, chunk.top_k, chunk.on_input)
            with on_device(x.device):
                self.run_chunk(x[part], experts, chunk, stages, out[part])

    def own_chunk(self, spec: ExpertSpec, routing: Routing) -> int:
        """How many tokens run at once where the caller gives no workspace."""
        return _chunk(self, spec, routing.num_tokens, routing.top_k, routing.on_input)


@lru_cache(maxsize=4096)
def _measure(
    backend: ArenaBackend, spec: ExpertSpec, tokens: int, top_k: int, on_input: bool
) -> int:
    if tokens == 0:
        return 0
    arena = Arena()
    backend.lay_out(arena.take, spec, tokens, top_k, on_input)
    return arena.size


def _chunk(
    backend: ArenaBackend,
    spec: ExpertSpec,
    tokens: int,
    top_k: int,
    on_input: bool,
    limit: int | None = None,
) -> int:
    """How many tokens run at once in `limit` bytes; by default in those that a call may take."""

    def needed(count: int) -> int:
        return _measure(backend, spec, count, top_k, on_input)

    return chunk_tokens(tokens, max(_OWN_BYTES, needed(1)) if limit is None else limit, needed)


@dataclass(frozen=True)
class _Call:
    """How calls of one kind run: tokens at once, bytes that they take, and what they launch."""

    step: int
    size: int
    launches: Launches


@lru_cache(maxsize=1024)
def _prepare(
    backend: ArenaBackend,
    signature: str,
    pairs: tuple[int, ...],
    on_input: bool,
    types: tuple[Any, ...],
    limit: int | None,
) -> _Call:
    """What follows from sizes. types: dtypes and the device; limit: bytes of a workspace.

    signature: of the experts, in place of their spec: text, whose hash Python remembers
    pairs:     tokens and top_k
    """
    (tokens, top_k), device = pairs, types[-1]
    spec = decode_spec(signature.split("\n")[2])
    step = _chunk(backend, spec, tokens, top_k, on_input, limit)
    nvidia = device.type == "cuda" and torch.version.hip is None
    size = _measure(backend, spec, step, top_k, on_input)
    return _Call(step, size, Launches(device if nvidia else None))
