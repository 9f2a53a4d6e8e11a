"""The Hopper GEMM for many tokens per expert without a GPU: machine code, and which kernel runs."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import replace

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from hopper_offline import (
    compile_kernel,
    innermost,
    listing_of,
    loops,
    operations,
    scale_name,
    shared_types,
)
from hopper_variants import slim_variant, tall_variant
from triton_offline import stack_bytes

from moelten.formats import FP8, MXFP4, NVFP4, Float, Format, Int4, Int8
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_gemm import _FACTORS, _PLAIN, _WORDS
from moelten.kernels.hopper_prefill import prefill_kernel
from moelten.kernels.hopper_products import TOKEN_BOXES
from moelten.kernels.hopper_ring import Problem
from moelten.kernels.hopper_schedule import (
    WideVariant,
    box_rows,
    choose_wide,
    narrow_variant,
    operands_of,
    type_name,
    warp_variant,
    wide_variant,
    with_groups,
)
from moelten.kernels.launches import _DESCRIPTOR, _NUMBERS, _SCRATCH, _is_plain, _kinds

CASES: dict[str, tuple[Format, str]] = {
    "mxfp4": (MXFP4(), "bf16"),
    "nvfp4": (NVFP4(), "bf16"),
    "int4": (Int4(), "bf16"),
    "int4g128": (Int4(128), "bf16"),
    "int4g128z": (Int4(128, zero_point=True), "bf16"),
    "int4g32": (Int4(32), "bf16"),
    "int4g32z": (Int4(32, zero_point=True), "bf16"),
    "fp8block": (FP8((128, 128)), "bf16"),
    "int8": (Int8(), "bf16"),
    "bf16": (Float("bfloat16"), "bf16"),
    "int4g64 in fp16": (Int4(64), "fp16"),
}


def short_variant(stored, scale):
    """Of single warps, where a last stage of four chunks would have one."""
    return warp_variant(stored, scale, (2880, 2880))


def single_variant(stored, scale):
    """Of one tile per expert, whose rows are gathered before."""
    return replace(wide_variant(stored, scale), gathers=False)


def chosen(fmt: Format, operand: str, choose=wide_variant, x_scale="none"):
    """A variant, and the type of its scales."""
    few = choose not in (wide_variant, single_variant)
    stored = operands_of(storage(fmt, operand), few=few, x_scale=x_scale)
    scale = scale_name(fmt, stored)
    variant = choose(stored, scale)
    return (with_groups(variant, scale) if x_scale == "group" else variant), scale


def compiled(
    fmt: Format,
    operand: str,
    halves: int,
    choose=wide_variant,
    x_scale="none",
    rows=2048,
    more=True,
    columns=4096,
):
    """GEMM1 (two halves, SwiGLU) or GEMM2 (one half) as `prefill_gemm` calls it.

    more: whether GEMM2 has biases, and scales of tokens
    """
    variant, scale = chosen(fmt, operand, choose, x_scale)
    stored = variant.weights
    kind = stored.code.operand
    codes, scales, zeros = box_rows(stored, scale, variant.stage)

    def boxes(rows: int, width: int = 32, layout: object = _PLAIN) -> str | None:
        return f"tensordesc<i32[1,{variant.tiles},{rows},{width}],{layout!r}>" if rows else None

    x_scaled = (halves == 1 and more) or kind != operand or x_scale != "none"
    types = shared_types(stored, operand, halves) | {
        "w_desc": boxes(codes, layout=_WORDS),
        "s_desc": boxes(scales) if stored.scale != "block" else boxes(8, 4),
        "z_desc": boxes(zeros),
        "x_desc": f"tensordesc<{kind}[{variant.unit},64],{TOKEN_BOXES.value!r}>",
        "u_desc": f"tensordesc<fp32[{variant.block},4],{_FACTORS!r}>" if variant.grouped else None,
        "x_scale_ptr": "*fp32" if x_scaled else None,
        "zero_ptr": "*u32" if stored.zeros and not stored.group else None,
        "out_ptr": f"*{operand}" if halves == 2 else "*u8",
        "positions": "i32",
        "steps": "i32",
        "awaited": "i32",
    }
    rows_of = {"x_desc": None, "x_ptr": f"*{kind}", "sources_ptr": "*i32"}
    by_position = halves == 1 or not variant.gathers
    types |= dict.fromkeys(("x_ptr", "sources_ptr")) if by_position else rows_of
    if not more:
        types["bias_ptr"] = None
    activation = "swiglu" if halves == 2 else "none"
    problem = Problem(rows, columns, halves, scale, activation, False, halves == 2, True, variant)
    options = {"num_warps": variant.warps, "maxnreg": variant.registers}
    return compile_kernel(prefill_kernel, types, {"P": problem}, **options)


# GEMM1 of every kind of codes; GEMM2, which differs in its epilogue, where registers are scarcest,
# with a last piece of which three row tiles are nothing: all of some warpgroups, or one band.
@pytest.mark.parametrize(
    "name, halves, choose, x_scale, more",
    [
        *((name, 2, wide_variant, "none", True) for name in CASES if name != "int4g128"),
        *((name, 1, wide_variant, "none", True) for name in ("nvfp4", "fp8block")),
        *((name, 1, wide_variant, "none", False) for name in ("bf16", "int4g128z")),
        *((name, 2, narrow_variant, "none", True) for name in ("mxfp4", "nvfp4", "int4g32")),
        *((name, 1, slim_variant, "none", True) for name in ("int4g128z", "fp8block", "int8")),
        *((name, 1, tall_variant, "none", True) for name in ("mxfp4", "int4g32z")),
        *((name, 1, narrow_variant, "none", name == "nvfp4") for name in ("mxfp4", "nvfp4")),
        ("int4g128", 2, tall_variant, "none", True),
        ("mxfp4", 2, single_variant, "none", True),
        ("fp8block", 2, wide_variant, "group", True),
        ("int4g128z", 1, wide_variant, "group", True),
        ("int4g128z", 2, slim_variant, "group", True),
    ],
)
def test_machine_code(name, halves, choose, x_scale, more):
    rows = 2048 if halves == 2 else 2880
    kernel = compiled(*CASES[name], halves, choose, x_scale, rows, more)
    assert kernel.metadata.shared <= 227 << 10
    assert "setmaxnreg" in kernel.asm["ptx"]
    assert stack_bytes(kernel.asm["cubin"]) == 0
    listing = listing_of(kernel.asm["cubin"])
    variant = chosen(*CASES[name], choose, x_scale)[0]
    if halves == 1:
        check_stores(listing, variant)
    copies = operations(listing).count("LDGSTS")
    assert copies == (variant.stage * variant.block // 8 if halves == 2 and variant.gathers else 0)
    bodies = main_loops(listing, "HGMMA")
    found: list[tuple[int, int]] = []
    for body in bodies:
        names = operations(body)
        products = [line for line in body if "HGMMA" in line]
        widths = {int(re.search(r"HGMMA\.64x(\d+)x16", line)[1]) for line in products}
        found += [(width, len(products)) for width in widths]
        # The left operand is in registers.
        assert all(re.search(r"HGMMA\S+ R\d+, R\d+, gdesc", line) for line in products)
        assert names.count("PRMT") <= (8 if variant.few else 4)
        waits = [line for line in body if "WARPGROUP.DEPBAR" in line]
        if variant.few:
            # Each warp waits for a chunk's products, or for those of a group of it; of few tokens
            # for those of two chunks, if nothing is scaled between them.
            stored = variant.weights
            between = stored.scales_sums and 0 < stored.group <= 64
            twice = max(widths) <= 48 and (variant.bands == 2 or not between)
            at_once = 2 if stored.scales_twice else 8 if twice else 4
            assert len(waits) == len(products) // at_once
        else:
            # One band is waited for while the next one multiplies; for all once a stage.
            assert sum("gsb0, 0x0" in line for line in waits) <= 2
            assert len(waits) <= 5 and len(waits) < len(products)
        # Warpgroups do not wait for each other.
        assert "BAR" not in [name for line in body if "SYNC" in line for name in operations([line])]
    # All run the same loops: one for every 8 tokens from 24 or 48 on, of large tiles for every 16
    # from 64 on, and some for warpgroups with one band of the last piece, if there are any.
    most, block = max(count for _, count in found), variant.block
    last = [32, 48, 64] if variant.few else [block]
    rests = [(n, most // 2) for n in last] if halves == 1 and variant.bands == 2 else []
    first = 24 if block == 64 else 48
    widths = range(first, block + 1, 8) if variant.few else range(64, block + 1, 16)
    assert sorted(found) == sorted(rests + [(n, most) for n in widths])


def test_a_last_stage_of_one_chunk():
    """It is multiplied by itself, once for each number of tokens, and nothing beside it."""
    listing = listing_of(compiled(*CASES["mxfp4"], 1, tall_variant, columns=2880).asm["cubin"])
    loop = main_loops(listing, "HGMMA")
    assert {operations(body).count("HGMMA") for body in loop} == {8}
    assert operations(listing).count("HGMMA") == len(loop) * (8 + 4)


def main_loops(listing: list[str], product: str) -> list[list[str]]:
    """Loops over stages. The one over pieces of work, which stores, need not be around them all."""
    bodies = [listing[loop] for loop in innermost(loops(listing, product))]
    return [body for body in bodies if "STG" not in operations(body)]


def check_stores(listing: list[str], variant: WideVariant) -> None:
    """GEMM2's sums leave as they lie in registers, while no warp waits for another."""
    behind = listing[max(i for i, line in enumerate(listing) if "HGMMA" in line) :]
    stores = [line for line in behind if "STG" in line]
    # Of four numbers each, or two, with half their bytes, in whole parts of 32 tokens.
    assert len(stores) == -(-variant.block // 32) * 8 * variant.tiles // 4
    assert all(("STG.E.64" in line) == (variant.warps == 8) for line in stores)
    assert not any("BAR.SYNC" in line and f"0x{32 * variant.warps:x}" in line for line in behind)


@pytest.mark.parametrize(
    "name, choose, x_scale",
    [
        *((name, warp_variant, "none") for name in ("nvfp4", "int4g128", "int4g32z", "fp8block")),
        ("mxfp4", short_variant, "none"),
        ("fp8block", warp_variant, "row"),
        ("fp8block", warp_variant, "group"),
    ],
)
def test_machine_code_of_warps(name, choose, x_scale):
    """Little but decoding and products, of which every 8 tokens have their own."""
    kernel = compiled(*CASES[name], 2, choose, x_scale)
    variant = chosen(*CASES[name], choose, x_scale)[0]
    # Each program has a kilobyte of the driver's.
    assert variant.programs * (kernel.metadata.shared + 1024) <= 228 << 10
    assert variant.programs == (2 if choose is short_variant else 1)
    listing = listing_of(kernel.asm["cubin"])
    bodies = [operations(body) for body in main_loops(listing, "HMMA")]
    # Every 8 tokens make a width of tiles; two bands, chunks of four products.
    stage, widths = variant.stage, range(1, variant.block // 8 + 1)
    assert sorted(b.count("HMMA") for b in bodies) == [8 * stage * n for n in widths]
    for body in bodies:
        assert not {"LDL", "STL", "PRMT"} & set(body)
        assert body.count("LDSM") == body.count("HMMA") // 4
        # Per row tile and chunk; groups of 32 add up two products of each.
        rest = len(body) - body.count("HMMA") - body.count("LDSM")
        # Beside tokens' scales of groups, and codes of 8 bits that are brought to bf16.
        most = 100 if name == "int4g32z" else 90 if x_scale == "group" else 80
        to_bf16 = 2 if name == "fp8block" and x_scale == "none" else 0
        # And one of a whole loop, a constant that is read again.
        assert rest <= (most + to_bf16) * 2 * stage + (to_bf16 > 0)


def test_memory_is_numbered_before_it_is_read():
    """Addresses are found by writing all over shared memory: once, before anything is there."""
    ptx = compiled(*CASES["mxfp4"], 2).asm["ptx"]
    last = ptx.rfind("%dynamic_smem_size")
    before = ptx[ptx.index(".entry") : last]
    assert "ld.shared" not in before and "mbarrier" not in before
    assert "bar.sync" in ptx[last : ptx.index("ld.shared", last)]
    # And what was found is the warp's, not each lane's.
    assert "redux.sync" in ptx[ptx.index("ld.shared", last) : ptx.index("mbarrier.init")]


def test_finished_tiles_are_told_and_asked_for():
    """One lane counts what GEMM1 finished, after it; GEMM2 waits for that and for nothing else."""
    first, second = (
        compiled(*CASES["mxfp4"], halves, warp_variant).asm["ptx"] for halves in (2, 1)
    )
    # Of the piece before, and at the end.
    assert first.count("red.release.gpu.global.add.u32") == 2
    assert "griddepcontrol.launch_dependents" in first and "griddepcontrol.wait" in first
    assert "ld.acquire" not in first
    asked = second.index("ld.acquire.gpu.global.b32")
    assert "fence.proxy.async.global" in second[asked : second.index("bulk.tensor", asked)]
    assert second.count("ld.acquire.gpu.global.b32") == 1
    assert "griddepcontrol" not in second and "red.release" not in second


def test_parameters_are_those_of_a_recorded_launch():
    """Maps, which are 128 bytes, then their shapes and strides: as `launches` passes them."""
    kernel = compiled(*CASES["int4g128z"], 2, wide_variant)
    assert _is_plain(kernel)
    entry = kernel.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)[^,\[\n]*(?:\[(\d+)\])?", entry)
    one, two = ("b32", ""), ("b64", "")
    map_ = [("b8", "128")]
    wanted = []
    for kind in _kinds(kernel).values():
        if kind.startswith(_DESCRIPTOR):
            rank = kind.split("[")[1].split("]")[0].count(",") + 1
            wanted += [*map_, *[one] * rank, *[two] * rank]
        else:
            wanted.append(two if kind[0] == "*" or ctypes.sizeof(_NUMBERS[kind]) == 8 else one)
    same = {"u32": "b32", "f32": "b32", "u64": "b64"}
    assert [(same.get(kind, kind), size) for kind, size in found] == wanted + [two] * _SCRATCH
    assert len(kernel.metadata.tensordesc_meta) == 3


def test_which_kernel_runs():
    """Few tokens per expert take one, many the other; once many, always many."""
    small = {15: "32w", 16: "64", 53: "64"}
    for fmt, few, few_pieces, tiles in (
        (MXFP4(), 0, 5, small | {54: "96", 80: "96", 81: "160"}),
        (Int4(32), 1, 1, small | {54: "96", 80: "96", 81: "160"}),
        (Int4(32, zero_point=True), 0, 1, {34: "32w", 35: "64", 54: "96", 81: "160"}),
        (Int4(128), 0, 1, {22: "32w", 23: "64", 53: "64", 54: "96", 80: "96", 81: "160"}),
        (Int8(), 11, 11, small | {54: "160"}),
        (FP8((128, 128)), 8, 9, small | {54: "144"}),
        (Float("bfloat16"), 11, 11, {12: "160"}),
    ):
        stored = storage(fmt, "bf16")
        for experts in (1, 8, 256):
            blocks, found = [], {}
            for mean in (*range(1, 90), 10**5):
                chosen = choose_wide(stored, "bfloat16", mean * experts, experts, (4096, 2048))
                blocks.append(chosen.block if chosen else 0)
                found[mean] = f"{blocks[-1]}{'w' if chosen and chosen.by_warp else ''}"
            assert sorted(blocks) == blocks
            assert tiles.items() <= found.items()
            assert blocks.index(next(filter(None, blocks))) == (
                few if experts == 256 else few_pieces
            )


def test_short_stages_are_for_more_tokens():
    """2880 columns end with a quarter of a stage of 256."""
    whole, short = (4096, 2048), (2880, 2880)
    for fmt, columns, stages in (
        (Int4(32), whole, [0, 4, 4, 4, 4, 4, 4]),
        (Int4(32), short, [0, 0, 0, 0, 0, 2, 2]),
        (MXFP4(), whole, [4, 4, 4, 4, 4, 4, 4]),
        (MXFP4(), short, [0, 0, 0, 2, 2, 2, 2]),
    ):
        stored = storage(fmt, "bf16")
        found = (choose_wide(stored, "bfloat16", 256 * mean, 256, columns) for mean in range(1, 8))
        assert [variant.stage if variant else 0 for variant in found] == stages


def test_what_makes_up_for_a_plan():
    """Many pieces, many weights, and GEMMs that follow each other at once."""
    stored, pairs, experts = storage(MXFP4(), "bf16"), 32 * 8, 128
    assert choose_wide(stored, "uint8", pairs, experts, (4096, 1536))
    assert choose_wide(stored, "uint8", pairs, experts, (4096, 1536), x_scale="row") is None
    assert choose_wide(stored, "uint8", pairs, experts, (2048, 768)) is None
    assert choose_wide(stored, "uint8", 16 * 2, 8, (4096, 14336)) is None


def test_as_what_weights_are_multiplied():
    """Groups of 128 fold where many sums would have to be scaled, and smaller ones everywhere."""
    few, many = (320, 16, (4096, 4096)), (2048, 16, (4096, 4096))
    for fmt, folds in ((Int4(128), (False, True)), (Int4(64), (True, True))):
        stored = storage(fmt, "bf16")
        for sizes, wanted in zip((few, many), folds, strict=True):
            weights = choose_wide(stored, "bfloat16", *sizes).weights
            assert weights == (stored.many if wanted else stored)
        assert choose_wide(stored, "bfloat16", *many, x_scale="group").weights == stored
    fp8 = storage(FP8((128, 128)), "bf16")
    assert choose_wide(fp8, "float32", *few, x_scale="group").weights == fp8.many


@pytest.mark.parametrize("name", CASES)
def test_slots_fit(name):
    """Three stages at least, lest copies and products wait for each other."""
    fmt, operand = CASES[name]
    stored = storage(fmt, operand)
    sizes = stored.many or stored, type_name(fmt.scale_dtype)
    assert wide_variant(*sizes).slots >= 3
    if fmt.bits < 16:
        assert warp_variant(*sizes).slots >= 3
        assert short_variant(*sizes).slots >= 3
        assert slim_variant(*sizes).slots >= 3
    if stored.code.bits == 4:
        assert narrow_variant(*sizes).slots >= 3
        assert tall_variant(*sizes).slots >= 3
