"""Plan: which rows each expert computes, and where each (token, slot) finds its result.

Rows are the valid (token, slot) pairs sorted by expert, ties by token then slot. A pair whose id
lies outside the local experts has no row: it reads no weight and contributes exactly zero. The plan
is built once per call from ids alone and serves both GEMMs and the combine.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Sort the pairs of ids [T, k] (int32 or int64) by local expert id - first_expert.

    >>> plan = make_plan(torch.tensor([[2, 0], [-1, 2]]), num_experts=3)
    >>> plan.active.tolist(), plan.offsets.tolist(), plan.rows.tolist()
    ([0, 2], [0, 1, 3], [[1, 0], [-1, 2]])
    """
    local = ids.long() - first_expert
    valid = (local >= 0) & (local < num_experts)
    keys = torch.where(valid, local, num_experts).flatten()
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    active = counts.nonzero().flatten()
    offsets = torch.nn.functional.pad(counts[active].cumsum(0), (1, 0))
    pairs = keys.sort(stable=True).indices[: int(offsets[-1])]
    rows = torch.full_like(keys, -1)
    rows[pairs] = torch.arange(pairs.numel(), device=ids.device)
    return Plan(pairs, keys[pairs], active, offsets, rows.view(ids.shape))
