"""Offline compilation of every variant of the grouped GEMM, for GPUs that are not here.

Each must build, spill no register, and use the matrix instructions of its target: those that take
blocks' scales too, where the target has them for the scheme.
"""

from __future__ import annotations

import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

import triton
from cases import ALL_SCHEMES
from triton.compiler import ASTSource
from triton_offline import Build, Compilers, Result, all_builds, stack_bytes
from triton_targets import TARGETS

from moelten.kernels import triton_plan
from moelten.kernels.launches import OPTIONS
from moelten.kernels.triton_variants import make_variant

PRODUCTS = {
    "sm_80": r"mma\.sync",
    "sm_90a": r"wgmma\.mma_async",
    "sm_100a": r"tcgen05\.mma",
    "gfx942": r"v_mfma",
    "gfx950": r"v_mfma",
}
BLOCK_SCALED = {
    "sm_100a": r"tcgen05\.mma\S*\.block_scale\.",
    "gfx950": r"v_mfma_scale_f32",
}
# Beside bf16 activations it is the conversion to bf16 that multiplies.
CONVERSIONS = {"e2m1": "v_cvt_scalef32_pk_bf16_fp4", "e4m3": "v_cvt_scalef32_pk_bf16_fp8"}


def product(build: Build) -> str:
    """What every matrix instruction of a build must look like."""
    if build.block_scaled and build.problem.activations.codes != "bf16":
        return BLOCK_SCALED[build.target]
    if build.target == "sm_100a" and build.problem.variant.operand == "int8":
        # Triton 3.6 has no int8 form of Blackwell's own instruction.
        return r"mma\.sync\S*\.s8"
    return PRODUCTS[build.target]


def failures(build: Build, result: Result) -> list[str]:
    if result.error:
        return [result.error]
    wrong = [f"spills {result.spilled}"] * (result.spilled > 0)
    wanted, found = product(build), result.products
    if not found or not all(re.match(wanted, name) for name in found):
        wrong.append(f"wants {wanted}, has {', '.join(found) or 'no matrix instruction'}")
    if build.block_scaled and build.problem.activations.codes == "bf16":
        wanted, found = CONVERSIONS[build.problem.weights.codes], result.conversions
        if wanted not in found:
            wrong.append(f"wants {wanted}, has {', '.join(found) or 'no such conversion'}")
    return wrong


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    compilers = Compilers(tmp_path_factory.mktemp("compiled"))
    yield compilers
    compilers.threads.shutdown()


@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_builds(target, compilers):
    results = compilers.compile_all(all_builds(target))
    wrong = [
        f"{build}: {text}" for build, result in results.items() for text in failures(build, result)
    ]
    assert not wrong, f"{len(wrong)} of {len(results)} for {target}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("experts", [8, 200, 512])
@pytest.mark.parametrize("target", TARGETS)
def test_the_plan_builds(target, experts):
    """For many pairs: sorted in registers, of which none is spilled."""
    gpu, padded = TARGETS[target][1], triton.next_power_of_2(experts)
    rows = min(triton_plan._COUNTS // padded, triton_plan._MAX_PROGRAMS)
    sizes = {"BLOCK": 128, "EXPERTS": padded, "CHUNK": triton_plan._CHUNK, "ROWS": rows}
    for kernel, warps in ((triton_plan.count_kernel, 4), (triton_plan.place_kernel, 8)):
        names = kernel.arg_names
        kinds = {n: "*i32" if n.endswith("_ptr") else "i32" for n in names if n not in sizes}
        constants = {n: value for n, value in sizes.items() if n in names}
        signature = {n: kinds.get(n, "constexpr") for n in names}
        code = triton.compile(
            ASTSource(kernel, signature, constants),
            target=gpu,
            options=OPTIONS | {"num_warps": warps},
        ).asm
        if gpu.backend == "cuda":
            assert stack_bytes(code["cubin"]) == 0
        else:
            assert not re.search(r"gpr_spill_count:\s*[1-9]", code["amdgcn"])


def test_which_schemes_multiply_blocks():
    """The pairs that the hardware has, and no others."""
    both = {"mxfp4_mxfp8", "mxfp8_mxfp8", "mxfp4_fp8", "mxfp4_fp8tensor"}
    wanted = {target: set() for target in TARGETS} | {"gfx950": both | {"mxfp4_bf16", "mxfp8_bf16"}}
    wanted["sm_100a"] = both | {"nvfp4_nvfp4", "nvfp4_nvfp4t"}
    for target, (own, _) in TARGETS.items():
        found = {
            name
            for name, which in ALL_SCHEMES.items()
            if make_variant(which.weights, which.activations, own, 16, 2).block_scaled
        }
        assert found == wanted[target], target
