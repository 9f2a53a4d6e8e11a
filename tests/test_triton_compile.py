"""Offline compilation of the grouped GEMM for GPUs that are not here.

A handful of variants per target, chosen so that every decoder, operand type and place of a scale
occurs: each must build, use the target's matrix instructions, and (NVIDIA) spill no register.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moelten.formats import MXFP8, NVFP4, Float, Int4, Scheme, scheme
from moelten.kernels.triton_gemm import constants, gemm_kernel
from moelten.kernels.triton_variants import Target, Variant, make_variant

# Triton 3.6 has no int8 form of Blackwell's own instruction.
BLACKWELL = r"tcgen05\.mma|mma\.sync\S*\.s8"
TARGETS = {
    "sm_80": (Target("cuda", 80), GPUTarget("cuda", 80, 32), "ptx", r"mma\.sync"),
    "sm_90a": (Target("cuda", 90), GPUTarget("cuda", 90, 32), "ptx", r"wgmma\.mma_async"),
    "sm_100a": (
        Target("cuda", 100),
        GPUTarget("cuda", 100, 32),
        "ptx",
        r"tcgen05\.mma|mma\.sync\S*\.s8",
    ),
    "gfx942": (Target("hip", "gfx942"), GPUTarget("hip", "gfx942", 64), "amdgcn", r"v_mfma"),
    "gfx950": (Target("hip", "gfx950"), GPUTarget("hip", "gfx950", 64), "amdgcn", r"v_mfma"),
}
SCHEMES = (
    "bf16_bf16",
    "mxfp4_bf16",
    "mxfp4_fp8",
    "int4g32_bf16",
    "int4g128z_fp8",
    "int4_int8",
    "fp8block_fp8",
    "nvfp4_nvfp4t",
)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*u8",
}


def gemm_source(
    which: Scheme, target: Target, tokens: int, halves: int
) -> tuple[ASTSource, Variant]:
    """GEMM1 (two halves, SwiGLU) or GEMM2 (one half, router weights) as `grouped_gemm` calls it."""
    w, a = which.weights, which.activations
    variant = make_variant(w, a, target, tokens, halves)
    plain = isinstance(a, Float)
    byte_scales = isinstance(a, MXFP8 | NVFP4)
    types: dict[str, str | None] = {
        "w_ptr": POINTERS[w.data_dtype],
        "w_scale_ptr": POINTERS[w.scale_dtype] if w.scale_dtype else None,
        "w_zero_ptr": "*i8" if isinstance(w, Int4) and w.zero_point else None,
        "w_global_ptr": "*fp32" if isinstance(w, NVFP4) else None,
        "a_ptr": POINTERS[a.data_dtype],
        "a_scale_ptr": None if plain else "*u8" if byte_scales else "*fp32",
        "a_global_ptr": "*fp32" if isinstance(a, NVFP4) else None,
        "bias_ptr": "*fp32",
        "table_ptr": None,
        "post_ptr": None,
        "router_ptr": "*fp32" if halves == 1 else None,
        "out_ptr": POINTERS[a.data_dtype] if plain and halves == 2 else "*fp32",
        **dict.fromkeys(("pairs_ptr", "tiles_ptr", "count_ptr"), "*i32"),
        **dict.fromkeys(("max_tiles", "rows_per_source"), "i32"),
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
    }
    values = dict(constants(variant), K=2880, N=2880, HALVES=halves, LIMITED=False, BLOCK_M=tokens)
    values["ACTIVATION"] = "swiglu" if halves > 1 else "none"
    values |= {name: None for name, kind in types.items() if kind is None}
    names = gemm_kernel.arg_names
    signature = {name: types.get(name) or "constexpr" for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    return ASTSource(gemm_kernel, signature, values, aligned), variant


def spilled_bytes(ptx: str, target: str, folder) -> int:
    knobs = triton.knobs.nvidia
    ptxas = knobs.ptxas_blackwell if target == "sm_100a" else knobs.ptxas
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    name = "sm_80" if target == "sm_80" else target
    done = subprocess.run(
        [ptxas.path, "-v", f"--gpu-name={name}", str(source), "-o", str(folder / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert found, done.stderr
    return sum(map(int, found))


@pytest.mark.parametrize("tokens, halves", [(16, 2), (128, 1)])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("target", TARGETS)
def test_builds_with_matrix_instructions(target, name, tokens, halves, tmp_path):
    own, gpu, assembly, instruction = TARGETS[target]
    source, variant = gemm_source(scheme(name), own, tokens, halves)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    text = triton.compile(source, target=gpu, options=options).asm[assembly]
    assert re.search(instruction, text)
    if assembly == "ptx":
        assert spilled_bytes(text, target, tmp_path) == 0
    else:
        assert re.findall(r"vgpr_spill_count:\s*(\d+)", text) == ["0"]
