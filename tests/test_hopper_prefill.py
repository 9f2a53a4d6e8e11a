"""The Hopper GEMM for many tokens per expert without a GPU: machine code, and which kernel runs."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

import triton
from test_hopper_compile import NVDISASM, OPERATION
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from moelten.formats import FP8, MXFP4, NVFP4, Float, Format, Int4, Int8
from moelten.kernels.hopper_codes import storage
from moelten.kernels.hopper_gemm import _PLAIN, _TOKENS, _WORDS
from moelten.kernels.hopper_prefill import prefill_kernel
from moelten.kernels.hopper_ring import Problem
from moelten.kernels.hopper_schedule import box_rows, choose_wide, wide_variant

CASES: dict[str, tuple[Format, str]] = {
    "mxfp4": (MXFP4(), "bf16"),
    "nvfp4": (NVFP4(), "bf16"),
    "int4": (Int4(), "bf16"),
    "int4g128z": (Int4(128, zero_point=True), "bf16"),
    "int4g32": (Int4(32), "bf16"),
    "fp8block": (FP8((128, 128)), "bf16"),
    "int8": (Int8(), "bf16"),
    "bf16": (Float("bfloat16"), "bf16"),
    "int4g64 in fp16": (Int4(64), "fp16"),
}

SCARCE = ("nvfp4", "int4g128z", "int4g32")


def compiled(fmt: Format, operand: str, halves: int):
    """GEMM1 (two halves, SwiGLU) or GEMM2 (one half) as `prefill_gemm` calls it."""
    stored = storage(fmt, operand)
    scaled = stored.scale in ("fold", "group", "block")
    scale = str(fmt.scale_dtype).removeprefix("torch.") if scaled else ""
    scale = "int32" if stored.pairs else scale
    variant = wide_variant(stored, scale)
    chunk, scales, zeros = box_rows(stored, scale)

    def boxes(rows: int) -> str | None:
        return f"tensordesc<i32[{rows},32],{_PLAIN!r}>" if rows else None

    types: dict[str, str | None] = {
        "w_desc": f"tensordesc<i32[{variant.stage * chunk},32],{_WORDS!r}>",
        "s_desc": boxes(scales),
        "z_desc": boxes(zeros),
        "x_desc": f"tensordesc<{operand}[{variant.block // 4},64],{_TOKENS!r}>",
        "scale_ptr": "*u32" if stored.scale == "block" else None,
        "zero_ptr": "*u32" if stored.zeros and not stored.group else None,
        "row_scale_ptr": "*fp32" if stored.scale in ("row", "fold") else None,
        "bias_ptr": "*fp32" if halves == 1 else None,
        "table_ptr": None,
        "post_ptr": None,
        "out_ptr": "*fp32" if halves == 1 else f"*{operand}",
        **dict.fromkeys(("tiles_ptr", "count_ptr"), "*i32"),
        **dict.fromkeys(("max_tiles", "steps"), "i32"),
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
    }
    kind = {"bf16": gl.bfloat16, "fp16": gl.float16}[operand]
    activation = "swiglu" if halves == 2 else "none"
    sizes = (2048, 4096, halves, stored, scale, kind, activation, False, halves == 2)
    values: dict[str, object] = {"P": Problem(*sizes, variant.block, variant.slots, variant.stage)}
    values |= {name: None for name, type_ in types.items() if type_ is None}
    names = prefill_kernel.arg_names
    signature = {name: types.get(name) or "constexpr" for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    constants = {(names.index(name),): value for name, value in values.items()}
    source = GluonASTSource(prefill_kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def listing_of(cubin: bytes, folder) -> list[str]:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [NVDISASM, "-c", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def main_loops(listing: list[str]) -> list[list[str]]:
    """Lines of the innermost loops that multiply."""
    labels = {line[: line.index(":")]: i for i, line in enumerate(listing) if line[:3] == ".L_"}
    spans = []
    for i, line in enumerate(listing):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels[jump[1]] < i:
            spans.append((labels[jump[1]], i + 1))
    loops = [span for span in spans if any("HGMMA" in line for line in listing[slice(*span)])]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [listing[slice(*span)] for span in inner]


# GEMM1 of every kind of codes; GEMM2, which differs in its epilogue, where registers are scarcest.
@pytest.mark.parametrize(
    "name, halves", [*((name, 2) for name in CASES), *((name, 1) for name in SCARCE)]
)
def test_machine_code(name, halves, tmp_path):
    kernel = compiled(*CASES[name], halves)
    assert kernel.metadata.shared <= 227 << 10
    assert "setmaxnreg" in kernel.asm["ptx"]
    listing = listing_of(kernel.asm["cubin"], tmp_path)
    bodies = main_loops(listing)
    # Two warpgroups, each with four widths of tiles.
    assert len(bodies) == 8
    for body in bodies:
        operations = [m[1] for m in map(OPERATION.match, body) if m]
        products = [line for line in body if "HGMMA" in line]
        # The left operand is in registers, and nothing is spilled.
        assert all(re.search(r"HGMMA\S+ R\d+, R\d+, gdesc", line) for line in products)
        assert not {"LDL", "STL"} & set(operations)
        if name != "bf16":  # whose registers are put together by halves
            assert operations.count("PRMT") <= 4
        # Products wait for each other at most twice a group, not one by one.
        waits = sum("DEPBAR" in line for line in body)
        assert waits <= len(products) // 2 and waits <= 6


def test_which_kernel_runs():
    """Few tokens per expert take one, many the other; once many, always many."""
    for fmt, enough in ((MXFP4(), 20), (Int4(32), 40), (Float("bfloat16"), 12)):
        stored = storage(fmt, "bf16")
        for experts in (1, 8, 256):
            assert choose_wide(stored, "bfloat16", enough * experts, experts) is None
            for pairs in (enough * experts + 1, 10**6):
                assert choose_wide(stored, "bfloat16", pairs, experts) is not None


@pytest.mark.parametrize("name", CASES)
def test_slots_fit(name):
    """Three stages at least, lest copies and products wait for each other."""
    fmt, operand = CASES[name]
    stored = storage(fmt, operand)
    scale = "" if fmt.scale_dtype is None else str(fmt.scale_dtype).removeprefix("torch.")
    assert wide_variant(stored, scale).slots >= 3
