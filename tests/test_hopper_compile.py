"""Machine code of the Hopper decode GEMM, compiled for sm_90a without a GPU.

The design holds only if the compiler keeps it: weights decoded in registers are operands of the
matrix instruction, nothing spills, no bytes are permuted, and a weight costs few instructions.
"""

from __future__ import annotations

import ctypes
import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

import triton
from hopper_offline import (
    compile_kernel,
    listing_of,
    loops,
    operations,
    scale_name,
    shared_types,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_offline import stack_bytes

from moelten.formats import FP8, MXFP4, MXFP8, NVFP4, Float, Format, Int4, Int8
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_decode import Task, decode_kernel
from moelten.kernels.hopper_ring import OPERANDS
from moelten.kernels.hopper_rows import order_kernel
from moelten.kernels.hopper_schedule import make_variant, slot_bytes
from moelten.kernels.launches import _NUMBERS, _SCRATCH, OPTIONS, _is_plain, _kinds

# Format, operand type, and the most instructions of the loop per weight at 8 tokens.
CASES: dict[str, tuple[Format, str, float]] = {
    "mxfp4": (MXFP4(), "bf16", 2.1),
    "nvfp4": (NVFP4(), "bf16", 2.4),
    "int4g128": (Int4(128), "bf16", 2.2),
    "int4g32": (Int4(32), "bf16", 2.4),
    "int4g64z": (Int4(64, zero_point=True), "bf16", 2.3),
    "int4": (Int4(), "bf16", 2.0),
    "fp8block": (FP8((128, 128)), "bf16", 2.7),
    "int8": (Int8(), "bf16", 2.4),
    "mxfp8": (MXFP8(), "bf16", 2.5),
    "bf16": (Float("bfloat16"), "bf16", 0.6),
    "mxfp4 in fp16": (MXFP4(), "fp16", 3.0),
    "int4g32z in fp16": (Int4(32, zero_point=True, scale="float16"), "fp16", 2.7),
}


def compiled(
    fmt: Format, operand: str, block: int, halves: int, columns: int, grouped=False, planned=True
):
    """GEMM1 (two halves, SwiGLU) or GEMM2 (one half, router weights) as `grouped_gemm` calls it."""
    stored = storage(fmt, operand)
    variant = make_variant(stored, block, 256, 64, 64, columns, may_split=False, grouped=grouped)
    scale = scale_name(fmt, stored)
    types = shared_types(stored, operand, halves) | {
        "x_ptr": "*u32",
        "x_scale_ptr": "*fp32" if grouped else None,
        "w_ptr": "*u32",
        "scale_ptr": "*u32" if scale else None,
        "zero_ptr": "*u32" if stored.zeros else None,
        "router_ptr": "*fp32" if halves == 1 else None,
        "pairs_ptr": "*i32",
        **dict.fromkeys(
            ("first_expert", "num_experts", "rows_per_source", "splits", "per_split"), "i32"
        ),
        "split_stride": "i64",
    }
    if not planned:
        types |= {"pairs_ptr": None, "tiles_ptr": "*i64", "count_ptr": None}
    activation = "swiglu" if halves == 2 else "none"
    task = Task(
        2048, columns, halves, scale, activation, False, stored, OPERANDS[operand],
        -(-columns // 128) if grouped else 1, block, variant.warps, halves == 2,
    )  # fmt: skip
    options = {"num_warps": variant.warps, "maxnreg": variant.registers}
    return compile_kernel(decode_kernel, types, {"P": task}, **options)


@pytest.mark.parametrize("block", [8, 16])
def test_nothing_spills_with_scales_of_groups_of_activations(block):
    fmt, operand, _ = CASES["fp8block"]
    kernel = compiled(fmt, operand, block, 2, 4096, grouped=True)
    assert stack_bytes(kernel.asm["cubin"]) == 0


@pytest.mark.parametrize("name", CASES)
def test_nothing_spills_without_a_plan(name):
    fmt, operand, _ = CASES[name]
    for halves, columns in ((2, 4096), (1, 2944)):
        kernel = compiled(fmt, operand, 8, halves, columns, planned=False)
        assert stack_bytes(kernel.asm["cubin"]) == 0


# Codes of 4 bits never have more than 8 tokens of a tile (`hopper_schedule.choose_wide`).
@pytest.mark.parametrize(
    "name, block",
    [*((name, 8) for name in CASES), *((n, 16) for n, (fmt, *_) in CASES.items() if fmt.bits >= 8)],
)
def test_machine_code(name, block):
    fmt, operand, budget = CASES[name]
    for halves, columns in ((2, 4096), (1, 2944)):
        kernel = compiled(fmt, operand, block, halves, columns)
        assert stack_bytes(kernel.asm["cubin"]) == 0
        listing = listing_of(kernel.asm["cubin"])
        bodies = [operations(listing[loop]) for loop in loops(listing, "HMMA")]
        assert len(bodies) == block // 8
        for body in bodies:
            groups = 16 if body.count("HMMA") < 32 else 32
            assert body.count("HMMA") == groups
            assert not {"LDL", "STL", "LDS", "STS", "BAR", "SHFL"} & set(body)
            assert body.count("PRMT") <= 2
            # A step decodes 4 row groups of 16 rows by 64 columns: 128 weights per lane.
            if groups == 16:
                assert len(body) / 128 <= budget, len(body)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("columns", [2880, 8192])
def test_order_reads_a_row_once(columns, normalized, gathers):
    """16 bytes at a time, and so it writes it, once or for each slot; in few registers, for many
    rows at once."""
    names, slots, words = order_kernel.arg_names, 1 if gathers else 6, columns // 2
    block = triton.next_power_of_2(words)
    values = {"SLOTS": slots, "WORDS": words, "WIDTH": words, "BLOCK": block}
    values |= {"STRIDE": slot_bytes(columns) // 4}  # of rows in the slots' place
    types = {"x_ptr": "*i32", "out_ptr": "*i32"}
    if gathers:
        values["inverse_ptr"] = None
    else:
        types["inverse_ptr"] = "*i32"
    if normalized:
        types["scale_ptr"] = "*fp32"
    else:
        values["scale_ptr"] = None
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = ASTSource(order_kernel, signature, values, aligned)
    warps = block // 512
    options = OPTIONS | {"num_warps": warps}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert stack_bytes(kernel.asm["cubin"]) == 0
    listing = "\n".join(listing_of(kernel.asm["cubin"]))
    loads = -(-words // (128 * warps))
    assert len(re.findall(r"LDG\.E\.128", listing)) == loads
    assert len(re.findall(r"STG\.E\.128", listing)) == (1 if gathers else slots) * loads
    assert max(int(n) for n in re.findall(r"\bR(\d+)\b", listing)) < 64


def test_parameters_are_those_of_a_recorded_launch():
    """Names, order and sizes of a kernel's parameters, as `launches` takes them from Triton."""
    kernel = compiled(*CASES["int4g64z"][:2], 8, 1, 2944)
    assert _is_plain(kernel)
    entry = kernel.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    found = re.findall(r"\.param \.(\w+)", entry)
    sizes = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4}
    wanted = [8 if k[0] == "*" else ctypes.sizeof(_NUMBERS[k]) for k in _kinds(kernel).values()]
    assert [sizes[kind] for kind in found] == wanted + [8] * _SCRATCH


def test_the_schedule_fills_the_gpu():
    """Splits of K only where few programs would leave multiprocessors idle, and never of GEMM1."""
    stored = storage(MXFP4(), "bf16")
    one = make_variant(stored, 8, 2, 8, 64, 14336, may_split=True)
    many = make_variant(stored, 8, 384, 256, 64, 2048, may_split=True)
    first = make_variant(stored, 8, 2, 8, 64, 14336, may_split=False)
    assert (many.splits, first.splits) == (1, 1)
    assert 4 <= one.splits <= 8
