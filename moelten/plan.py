"""Plan: which rows each expert computes, and where each (token, slot) finds its result.

Rows are the valid (token, slot) pairs sorted by expert, ties by token then slot. A pair whose id
lies outside the local experts has no row: it reads no weight and contributes exactly zero. The plan
is built once per call from ids alone and serves both GEMMs and the combine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """P rows, A active experts, T tokens, k slots.

    pairs:   int64 [P] flat index token * k + slot of each row
    experts: int64 [P] local expert of each row, ascending
    active:  int64 [A] local ids of the experts with at least one row, ascending
    offsets: int64 [A + 1] row range of each active expert
    rows:    int64 [T, k] row of each pair, -1 where the pair has none
    """

    pairs: Tensor
    experts: Tensor
    active: Tensor
    offsets: Tensor
    rows: Tensor

    @property
    def num_rows(self) -> int:
        return self.pairs.numel()

    @property
    def tokens(self) -> Tensor:
        """int64 [P] token of each row."""
        return self.pairs // max(self.rows.shape[1], 1)

    def spans(self) -> list[tuple[int, int, int]]:
        """(local expert, first row, last row + 1) of each active expert."""
        bounds = self.offsets.tolist()
        return list(zip(self.active.tolist(), bounds[:-1], bounds[1:], strict=True))


def make_plan(ids: Tensor, num_experts: int, first_expert: int = 0) -> Plan:
    """Sort the pairs of ids [T, k] (int32 or int64, on the CPU) by local expert id - first_expert.

    >>> plan = make_plan(torch.tensor([[2, 0], [-1, 2]]), num_experts=3)
    >>> plan.active.tolist(), plan.offsets.tolist(), plan.rows.tolist()
    ([0, 2], [0, 1, 3], [[1, 0], [-1, 2]])
    """
    # NumPy, because a dozen tiny torch operators would cost a decode step more than its weights.
    local = ids.numpy().ravel().astype(np.int64) - first_expert
    keys = np.where((local >= 0) & (local < num_experts), local, num_experts)
    counts = np.bincount(keys, minlength=num_experts + 1)[:num_experts]
    active = np.flatnonzero(counts)
    offsets = np.concatenate(([0], counts[active].cumsum()))
    pairs = keys.argsort(kind="stable")[: offsets[-1]]
    rows = np.full(keys.shape, -1)
    rows[pairs] = np.arange(pairs.size)
    parts = (pairs, keys[pairs], active, offsets, rows.reshape(ids.shape))
    return Plan(*map(torch.from_numpy, parts))
