"""The plan of the portable backend, bit for bit: order, positions and tiles.

Runs on a GPU, or in the interpreter through test_triton_interpreter.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_device import DEVICE

from moelten.kernels import arena, triton_plan
from moelten.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
POISON = -(10**9)


def hard_ids(size: int, experts: int) -> torch.Tensor:
    """Ids [size, 1] for experts 1 .. experts, and such as no expert has."""
    g = torch.Generator().manual_seed(size)
    ids = torch.randint(-1, experts + 3, (size, 1), generator=g)
    ids[ids == experts + 2] = 2**31 - 1
    ids[::7] = -(2**31)
    return ids


def poisoned_plan(
    size: int, experts: int, block: int, unit: int | None = None, shared: int = 1
) -> triton_plan.TilePlan:
    """Room for a plan, of values that no plan has."""
    take = arena.heap(DEVICE)
    how = {"unit": unit, "shared": shared, "inverse": True}
    plan = triton_plan.empty_plan(take, size, experts, block, **how)
    for part in (plan.pairs, plan.tiles, plan.count, plan.counts, plan.inverse):
        part.fill_(POISON)
    return plan


def cut(rows: int, block: int, unit: int) -> list[tuple[int, int]]:
    """Tiles of an expert's rows: as few as can be, the units of which differ by one at most."""
    units, tiles = -(-rows // unit), -(-rows // block)
    stops = [min(units * n // tiles * unit, rows) for n in range(tiles + 1)]
    sizes = [-(-(stop - start) // unit) for start, stop in itertools.pairwise(stops)]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) * unit <= block
    return list(itertools.pairwise(stops))


def assert_plan(plan: triton_plan.TilePlan, ids: torch.Tensor, experts: int, first: int = 1):
    """The same order as the CPU's plan, whatever the ids; tiles cover it and no more."""
    wanted = make_plan(ids, experts, first)
    rows = wanted.num_rows
    assert torch.equal(plan.pairs[:rows].cpu().long(), wanted.pairs // plan.shared)
    assert (plan.pairs[rows:] == POISON).all()
    inverse = torch.full((ids.numel(),), -1)
    inverse[wanted.pairs] = torch.arange(rows)
    assert torch.equal(plan.inverse.cpu().long(), inverse)
    tiles = [
        (e, first + start, first + stop, 0)
        for e, first, last in wanted.spans()
        for start, stop in cut(last - first, plan.block, plan.unit)
    ]
    count, *counters = plan.count.tolist()
    assert counters == [0, 0]
    assert count <= plan.max_tiles
    assert [tuple(t) for t in plan.tiles[:, :count].T.tolist()] == tiles
    assert (plan.tiles[:, count:] == POISON).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "size, experts, block, unit",
    [
        (1, 1, 16, 16),
        (9, 5, 16, 8),
        (40, 3, 16, 16),
        (127, 1, 32, 8),
        (128, 300, 16, 16),
        (129, 2, 16, 16),
        (512, 1, 16, 16),
        (513, 520, 64, 16),
        (1300, 11, 64, 64),
        (1300, 4, 128, 16),
    ],
)
def test_plan(size, experts, block, unit, dtype):
    ids, plan = hard_ids(size, experts), poisoned_plan(size, experts, block, unit, block // unit)
    triton_plan.make_tile_plan(ids.to(dtype).to(DEVICE), experts, 1, plan)
    assert_plan(plan, ids, experts)


@pytest.mark.parametrize("size, experts", [(257, 5), (570, 33)])
def test_plan_of_few_programs(size, experts, monkeypatch):
    """Several chunks for each program, and several rounds over what they counted."""
    monkeypatch.setattr(triton_plan, "_CHUNK", 64)
    monkeypatch.setattr(triton_plan, "_MAX_PROGRAMS", 4)
    monkeypatch.setattr(triton_plan, "_COUNTS", 16)
    ids, plan = hard_ids(size, experts), poisoned_plan(size, experts, 64)
    assert plan.counts.shape == (4, experts)
    triton_plan.make_tile_plan(ids.to(DEVICE), experts, 1, plan)
    assert_plan(plan, ids, experts)


def test_plan_of_one_expert():
    """All pairs for the first or the last expert of many, or for none."""
    for chosen in (0, 259, 260):
        ids, plan = torch.full((600, 1), chosen), poisoned_plan(600, 260, 16)
        triton_plan.make_tile_plan(ids.to(DEVICE), 260, 0, plan)
        assert_plan(plan, ids, 260, first=0)
