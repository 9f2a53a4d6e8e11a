"""What stands around the Hopper GEMMs, bit for bit: plan in one launch, gather, combine.

Runs on a Hopper GPU, or in the interpreter through test_triton_interpreter.
"""

from __future__ import annotations

import pytest
import torch
from test_triton_plan import assert_plan, hard_ids, poisoned_plan
from triton_device import DEVICE, INTERPRET

if not INTERPRET and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("runs on a Hopper GPU or through the interpreter", allow_module_level=True)

from moelten.formats import BF16, FP8_GROUP, FP8_ROW, INT8_GROUP, INT8_ROW
from moelten.kernels import hopper_plan, hopper_rows, hopper_sums, triton_ops
from moelten.kernels.arena import heap
from moelten.kernels.hopper_schedule import padded
from moelten.kernels.triton_plan import empty_plan
from moelten.qtensor import decode_codes, quantize
from tests import ptx

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
POISON = -12345


@pytest.fixture(autouse=True)
def no_overlap(monkeypatch):
    """The interpreter has no instructions that let launches overlap."""
    if INTERPRET:
        monkeypatch.setattr(hopper_plan, "gdc_wait", lambda: None)
        for module in (hopper_plan, hopper_rows):
            monkeypatch.setattr(module, "gdc_launch_dependents", lambda: None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "size, experts, block, unit, most",
    [
        (1, 1, 8, 8, 1),
        (40, 3, 16, 16, 99),
        (200, 7, 8, 8, 200),
        (2500, 5, 128, 16, 3000),
        (1101, 5, 128, 16, 1100),
    ],
)
def test_plan(size, experts, block, unit, most, dtype, monkeypatch):
    """Of more pairs than one launch takes the plan is the portable one."""
    monkeypatch.setattr(hopper_plan, "_MAX_PAIRS", most)
    ids, plan = hard_ids(size, experts), poisoned_plan(size, experts, block, unit, block // unit)
    hopper_plan.plan_tiles(ids.to(dtype).to(DEVICE), experts, 1, plan)
    assert_plan(plan, ids, experts)


@pytest.mark.parametrize("inverse", [False, True])
def test_when_a_plan_takes_two_launches(inverse, monkeypatch):
    """Where programs would count too much, unless the next launch, without inverse, overlaps."""
    launches = []
    monkeypatch.setattr(hopper_plan, "launch", lambda *_, **__: launches.append(1))
    monkeypatch.setattr(hopper_plan, "make_tile_plan", lambda *_: launches.append(2))
    for tokens, experts, wanted in ((256, 256, 1), (1025, 256, 2), (2048, 8, 1), (4100, 8, 2)):
        ids = torch.zeros(tokens, 2, dtype=torch.int32)
        plan = empty_plan(heap(torch.device("cpu")), 2 * tokens, experts, 32, inverse=inverse)
        hopper_plan.plan_tiles(ids, experts, 0, plan)
        assert launches.pop() == (wanted if inverse or tokens == 4100 else 1)


def test_plan_of_one_expert():
    for chosen in (0, 4, 5):
        ids, plan = torch.full((1100, 1), chosen), poisoned_plan(1100, 5, 128)
        hopper_plan.plan_tiles(ids.to(DEVICE), 5, 0, plan)
        assert_plan(plan, ids, 5, first=0)


def some_places(pairs: int) -> torch.Tensor:
    """A position for most pairs, none for the others."""
    g = torch.Generator().manual_seed(pairs)
    here = torch.rand(pairs, generator=g) > 0.25
    inverse = torch.full((pairs,), -1)
    inverse[here] = torch.randperm(int(here.sum()), generator=g)
    return inverse


def ordered(x: torch.Tensor, width: int = 32) -> torch.Tensor:
    """Columns filled up with zeros, each 32 from t s j to s j t, of pairs of columns."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % width))
    return x.view(len(x), -1, 4, 4, 2).transpose(2, 3).reshape(x.shape)


def some_room(rows: int, inverse, columns: int, gathers: bool) -> torch.Tensor:
    """Poisoned rows, once or by position, of the width that their GEMM reads, some bytes apart if
    by position."""
    if gathers:
        return torch.full((rows, padded(columns)), POISON, dtype=torch.int16, device=DEVICE)
    width = -(-columns // 32) * 32
    room = torch.full((len(inverse), width + 64), POISON, dtype=torch.int16, device=DEVICE)
    return room[:, :width]


def gathered(x, shared: int, inverse, scale=None, dtype=None, gathers=False) -> torch.Tensor:
    """What `order` writes, by position, over a poison."""
    found = some_room(len(x), inverse, x.shape[1], gathers).view(dtype or x.dtype)
    places = None if gathers else hopper_rows.Places(inverse.int().to(DEVICE), shared)
    hopper_rows.order(x, triton_ops.Rows(found, scale), places)
    return placed(found.cpu(), shared, inverse) if gathers else found.cpu()


def placed(rows: torch.Tensor, rows_per_source: int, inverse: torch.Tensor) -> torch.Tensor:
    """The row of every pair at its position, over the same poison."""
    pairs = torch.arange(len(inverse))[inverse >= 0]
    out = torch.full((len(inverse), rows.shape[1]), POISON, dtype=torch.int16)
    out = out.float() if rows.dtype == torch.float32 else out.view(rows.dtype)
    out[inverse[pairs]] = rows[pairs // rows_per_source]
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# One block of words; one that is not full; more than one.
COLUMNS = (8, 72, 2880, 4096, 8192, 8232, 20000)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 6])
@pytest.mark.parametrize("columns", COLUMNS)
def test_order(columns, slots, gathers):
    """Any bits of any row, wherever its pairs are."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randint(-(2**15), 2**15, (5, columns), generator=g).to(torch.int16)
    x, inverse = x.view(torch.bfloat16), some_places(5 * slots)
    wanted = placed(ordered(x, 256 if gathers else 32), slots, inverse)
    assert same_bits(gathered(x.to(DEVICE), slots, inverse, gathers=gathers), wanted)


def hard_rows(columns: int) -> torch.Tensor:
    """Rows over all exponents, and one each of zeros, of subnormal, small and large numbers."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(11, columns, generator=g)
    x[1] = 0
    x[2] *= 2.0**-120
    x[3] *= 2.0**120
    x[4] = torch.exp2(torch.randint(-133, 128, (columns,), generator=g).float())
    x[5] *= 2.0**-131
    x[6] = 0
    x[6, columns // 2 + 1] = -(2.0**-133)
    x[7] = 0
    x[7, -1] = -3e38
    x[8, 0], x[9, -1], x[10, 1] = torch.nan, torch.inf, -torch.inf
    return x.bfloat16()


def normalized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in fp16 by a power of two, the largest at 2**14 .. 2**15; and what undoes it."""
    top = x.float().abs().amax(1).nan_to_num(3e38, 3e38)
    exponent = torch.where(top > 0, torch.frexp(top)[1], -111).clamp(min=-111)
    up = torch.ldexp(torch.ones(len(x)), 15 - exponent)
    return (x.float() * up[:, None]).half(), 1 / up


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("columns", COLUMNS)
def test_order_normalized(columns, slots, gathers):
    """The rows that the portable kernel writes, and what the definition says."""
    x = hard_rows(columns)
    inverse = some_places(len(x) * slots)
    scale = torch.full((len(inverse),), -5.0, device=DEVICE)
    found = gathered(x.to(DEVICE), slots, inverse, scale, torch.float16, gathers)
    rows = triton_ops.quantize_rows(x.to(DEVICE), BF16, dtype=torch.float16)
    data, undo = normalized(x)
    finite = x.isfinite().all(1)
    assert same_bits(rows.data.cpu()[finite], data[finite])
    assert torch.equal(rows.scale.cpu()[:, 0][finite], undo[finite])
    top = data[finite].abs().amax(1)
    assert ((top >= 2**14) & (top < 2**15) | (x[finite].abs().amax(1) < 2.0**-112)).all()
    wanted = placed(ordered(rows.data.cpu(), 256 if gathers else 32), slots, inverse)
    same = found.view(torch.int16) == wanted.view(torch.int16)
    assert (same | (found.isnan() & wanted.isnan())).all()
    if gathers:
        assert torch.equal(scale.cpu()[: len(x)], rows.scale.cpu()[:, 0])
        assert (scale[len(x) :] == -5).all()
        return
    pairs = torch.arange(len(inverse))[inverse >= 0]
    assert torch.equal(scale.cpu()[inverse[pairs]], rows.scale.cpu()[pairs // slots, 0])
    assert (scale[len(pairs) :] == -5).all()


def quantized(x, fmt, inverse=None, slots=1, units=False, pairs=None, gathers=False):
    """Data [P, K to 32 or 256], scale [G, P] or [P, 1], and last [P], by position, as
    `hopper_rows.quantize` writes."""
    where = torch.arange(len(x)) if inverse is None else inverse
    count, rows = len(where), len(x) if pairs is None else pairs.ids.numel()
    data = some_room(rows, where, x.shape[1], gathers).view(torch.bfloat16)
    groups = -(-x.shape[1] // 128)
    shape = (groups, count, 4) if fmt.block[1] else (count, 1)
    scale = torch.full(shape, -5.0, device=DEVICE)
    last = torch.full((count,), -5.0, device=DEVICE) if units else None
    places = None
    if inverse is not None:
        places = hopper_rows.Places(inverse.int().to(DEVICE), slots, gathers)
    out = triton_ops.Rows(data, scale, last)
    hopper_rows.quantize(x.to(DEVICE), fmt, out, places, pairs)
    scale = scale[..., 0] if fmt.block[1] else scale
    data, scale = data.cpu(), scale.cpu()
    if gathers:
        data = placed(data, slots, where)
        scale = scale if fmt.block[1] else placed(scale[:rows], slots, where)
    return data, scale, None if last is None else last.cpu()


def codes_of(x, fmt) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as numbers, and scales [R, groups], by the quantization of the specification."""
    q = quantize(x, fmt)
    return decode_codes(q).float(), q.scale.view(len(x), -1)


@pytest.mark.parametrize("fmt", [FP8_ROW, INT8_ROW, FP8_GROUP, INT8_GROUP], ids=str)
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("columns, slots", [(8, 1), (200, 3), (328, 2), (2880, 1)])
def test_quantize(fmt, columns, slots, gathers):
    """Codes in the order of operands, of a row for each of its pairs that has a position."""
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    x[2, :128] = 0
    inverse = some_places(7 * slots)
    data, scale, _ = quantized(x, fmt, inverse, slots, gathers=gathers)
    codes, scales = codes_of(x, fmt)
    known = inverse >= 0
    at = inverse[known]
    of = torch.arange(7).repeat_interleave(slots)[known]
    wanted = torch.zeros(7, data.shape[1])
    wanted[:, :columns] = codes
    assert torch.equal(data[at].float(), ordered(wanted)[of])
    assert torch.equal(scale.T[at] if fmt.block[1] else scale[at], scales[of])
    rest = torch.ones(len(data), dtype=torch.bool).index_fill(0, at, False)
    assert (data.view(torch.int16)[rest] == POISON).all()


@pytest.mark.parametrize("fmt", [FP8_GROUP, INT8_GROUP], ids=str)
@pytest.mark.parametrize("columns", [64, 328, 2880])
def test_quantize_in_units(fmt, columns):
    """Rows by position; each scale in units of the next, which brings the first from the last."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(9, columns, generator=g) * torch.exp2(torch.randn(9, 1, generator=g) * 4)
    data, scale, last = quantized(x, fmt, units=True)
    codes, scales = codes_of(x, fmt)
    assert torch.equal(data[:, :columns].float(), codes)
    before = torch.cat([scales[:, :1], scales[:, :-1]], 1)
    assert torch.equal(scale.T, before / scales)
    assert torch.equal(last, scales[:, -1])


def test_units_of_sums_do_not_fall_too_far():
    """Sums of fp32 in a unit of 2**-90 of the largest are finite."""
    powers = torch.tensor([2.0**60, 2.0**-60, 1.0, 2.0**-20])
    _, scale, last = quantized((powers * 448).repeat_interleave(128)[None], FP8_GROUP, units=True)
    assert scale[:, 0].tolist() == [1, 2.0**90, 2.0**-30, 2.0**20]
    assert last.item() == 2.0**-20


@pytest.mark.parametrize("gathers", [False, True])
def test_quantize_by_pair(gathers):
    """What differs by expert multiplies before; pairs that are not valid are not read."""
    g = torch.Generator().manual_seed(5)
    x, ids = torch.randn(3, 200, generator=g).bfloat16(), torch.tensor([[5, 6], [-1, 5], [7, 6]])
    pre, router = torch.rand(2, 200, generator=g), torch.rand(3, 2, generator=g)
    inverse = torch.tensor([2, 0, -1, 1, -1, 3])
    on = [t.to(DEVICE) for t in (ids, router, pre)]
    pairs = triton_ops.Pairs(on[0], 2, 5, on[1], on[2])
    data, scale, _ = quantized(x, FP8_ROW, inverse, pairs=pairs, gathers=gathers)
    for pair, at in enumerate(inverse.tolist()):
        if at >= 0:
            row = x[pair // 2].float() * router.flatten()[pair] * pre[ids.flatten()[pair] - 5]
            codes, scales = codes_of(row[None], FP8_ROW)
            wanted = torch.zeros(1, data.shape[1])
            wanted[:, :200] = codes
            assert torch.equal(data[at].float(), ordered(wanted)[0])
            assert torch.equal(scale[at], scales[0])


def in_order_of_sums(y: torch.Tensor) -> torch.Tensor:
    """fp32 [.., N] as bytes, two numbers in four; behind the last are zeros, and, where nothing
    shares a power with it, poison.

    A warp w has rows 16 w .. of each of two bands b of 128, and a lane rows g and g + 8 of those.
    """
    places = [128 * b + 16 * w + 8 * h + g for w in range(8) for g in range(8)
              for b in range(2) for h in range(2)]  # fmt: skip
    out = torch.nn.functional.pad(y, (0, -y.shape[-1] % 16))
    out = torch.nn.functional.pad(out, (0, -y.shape[-1] // 16 * 16 % 256), value=torch.nan)
    out = out.unflatten(-1, (-1, 256))
    return shortened(out[..., places].unflatten(-1, (-1, 2))).view(torch.uint8).flatten(-3)


def shortened(pairs: torch.Tensor) -> torch.Tensor:
    """fp32 [.., 2] as int16 [.., 2]: fp16 times a power of two, and four bits of it each."""
    most = pairs.abs().amax(-1, keepdim=True) * (1 + 2**-11)
    e = most.view(torch.int32) >> 23
    halves = (pairs * (240 - e << 23).view(torch.float32)).half().view(torch.int16).int()
    return (halves | torch.cat([e & 15, e >> 4], -1) << 11).to(torch.int16)


def lengthened(words: torch.Tensor) -> torch.Tensor:
    """What `shortened` made, as fp32; both are NaN where one was too large for that."""
    words = words.int()
    low, high = (words >> 11 & 15).split(1, -1)
    e = low | high << 4
    halves = (words & ~0x7800).to(torch.int16).view(torch.float16).float()
    return torch.where(e > 239, torch.nan, halves * (e + 14 << 23).view(torch.float32))


def as_brought(y: torch.Tensor) -> torch.Tensor:
    """fp32 [R, N] as the sum over slots has it: columns 8 apart share a power."""
    padded = torch.nn.functional.pad(y, (0, -y.shape[1] % 16)).unflatten(1, (-1, 2, 8))
    pairs = lengthened(shortened(padded.transpose(2, 3).contiguous()))
    return pairs.transpose(2, 3).flatten(1)[:, : y.shape[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine_by_position(dtype):
    """Slots in order, each times its weight; nothing where there is no row."""
    g = torch.Generator().manual_seed(3)
    y, inverse = torch.randn(1, 21, 1032, generator=g), some_places(21)
    y[:, int((inverse >= 0).sum()) :] = torch.nan
    router, ids = torch.rand(7, 3, generator=g), torch.full((7, 3), 99)
    wanted = torch.zeros(7, 1032)
    for slot in range(3):
        at = inverse.view(7, 3)[:, slot]
        row = torch.where(at[:, None] >= 0, as_brought(y[0, at]), 0)
        wanted += row * router[:, slot, None]
    out = torch.empty(7, 1032, dtype=dtype, device=DEVICE)
    where, weights = inverse.int().to(DEVICE), router.to(DEVICE)
    y = in_order_of_sums(y).to(DEVICE)
    hopper_plan.combine(y, ids.to(DEVICE), 4, 0, out, inverse=where, router=weights)
    torch.testing.assert_close(out.float().cpu(), wanted, rtol=2**-8, atol=1e-6)
    # In fp32 the order shows: with no weights, of numbers that cancel.
    big = in_order_of_sums(torch.tensor([1e8, 1.0, -1e8])[None, :, None].expand(1, 3, 20))
    for order, sum_ in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0), ([0, 2, -1], 0.0), ([-1, 1, -1], 1.0)):
        out = torch.empty(1, 20, dtype=dtype, device=DEVICE)
        where = torch.tensor(order, dtype=torch.int32, device=DEVICE)
        hopper_plan.combine(big.to(DEVICE), ids[:1].to(DEVICE), 4, 0, out, inverse=where)
        assert (out == sum_).all()


def by_instructions(pairs: torch.Tensor) -> torch.Tensor:
    """`shortened`, by what the kernel runs."""
    inputs = {f"${1 + i}": x.view(torch.int32).long() & ptx.MASK for i, x in enumerate(pairs.T)}
    (words,) = ptx.run(hopper_sums._SHORTEN.value, inputs, 1)
    return torch.stack([words & 0xFFFF, words >> 16], -1).to(torch.int16)


def test_sums_in_16_bits():
    """The instructions that shorten sums, and what becomes of numbers of all sizes."""
    g = torch.Generator().manual_seed(7)
    pairs = torch.randn(8192, 2, generator=g) * torch.exp2(torch.randn(8192, 2, generator=g) * 3)
    pairs *= torch.exp2(torch.randint(-120, 100, (8192, 1), generator=g).float())
    edge = [0.0, 1.0, 2 - 2**-9, 2 - 2**-10, 2 - 2**-11, -2.0, 2.0**-126, 2.0**-140, 1e33]
    pairs = torch.cat([pairs, torch.cartesian_prod(torch.tensor(edge), torch.tensor(edge))])
    found = by_instructions(pairs)
    assert torch.equal(found, shortened(pairs))
    error = (lengthened(found).double() - pairs.double()).abs()
    most = pairs.abs().amax(-1, keepdim=True).double()
    # The larger is 2**10 and more, or 2**11 less what would be rounded up to that, halved.
    assert (error <= most / (2**11 - 1) + 2.0**-138).all()
    for large in (1e36, 3e38, torch.inf, torch.nan):
        for column in (0, 1):
            pairs[:, column] = large
            assert lengthened(by_instructions(pairs)).isnan().all()


def test_sums_that_are_too_large():
    """They are NaN, as what shares their power is, and nothing else."""
    y, out = torch.ones(1, 1, 512), torch.empty(1, 512, dtype=torch.bfloat16, device=DEVICE)
    for column, large in ((3, torch.inf), (40, -1.5e34), (264, torch.nan), (400, 1e33)):
        y[..., column] = large
    ids, where = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    y = in_order_of_sums(y).to(DEVICE)
    hopper_plan.combine(y, ids.to(DEVICE), 1, 0, out, inverse=where.to(DEVICE))
    lost = out[0].isnan().nonzero().flatten().tolist()
    assert lost == [3, 11, 32, 40, 256, 264] and out[0, 400] > 9e32


def test_combine_by_pair():
    y = torch.tensor([1e8, 1.0, -1e8, torch.nan, 3.0, 4.0])[:, None].expand(1, 6, 20).contiguous()
    ids, out = torch.tensor([[0, 1, 0], [7, 1, 1]]), torch.empty(2, 20, device=DEVICE)
    hopper_plan.combine(y.to(DEVICE), ids.to(DEVICE), 2, 0, out)
    assert (out[0] == 0).all() and (out[1] == 7).all()
