"""Compiles every variant of the grouped GEMM for GPUs that are not here, in child processes.

A variant is what the compiler sees: kernel, pointer types, constants and options. They are taken
from the launches of whole layers, of every scheme with every tile that the planner chooses. LLVM
may end the process it runs in, so each child reports every variant by itself, and its death is a
result.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from cases import ALL_SCHEMES, Case, make_input, make_weights
from triton.compiler import ASTSource
from triton_targets import TARGETS, pretend

import moelten
from moelten.kernels import triton as backend
from moelten.kernels.triton_gemm import gemm_kernel
from moelten.kernels.triton_problem import Problem
from moelten.kernels.triton_scaled import scaled_gemm_kernel

KERNELS = {kernel.__name__: kernel for kernel in (gemm_kernel, scaled_gemm_kernel)}
# Rows and columns of every matrix: what no tile divides.
SIZE = 2880
# One for every size of tile; more tokens than the last make more tiles of that size.
TOKENS_PER_EXPERT = (1, 24, 48, 96)
MATRIX_INSTRUCTION = r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_s?mfmac?)[\w.:]*"
SCALED_CONVERSION = r"\bv_cvt_scalef32_\w+"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Build:
    """One compilation, and the first scheme and number of tokens per expert that need it."""

    target: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    values: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    scheme: str
    tokens: int

    @property
    def key(self) -> object:
        """What distinguishes one build from another."""
        return self.kernel, self.signature, self.values, self.divisible, self.options

    @property
    def problem(self) -> Problem:
        return dict(self.values)["P"]

    @property
    def block_scaled(self) -> bool:
        return self.kernel == scaled_gemm_kernel.__name__

    def __str__(self) -> str:
        gemm = 3 - self.problem.halves
        return f"GEMM{gemm} of {self.scheme}, {self.tokens} tokens per expert"

    def source(self) -> ASTSource:
        kernel = KERNELS[self.kernel]
        at = kernel.arg_names.index
        aligned = {(at(name),): [["tt.divisibility", 16]] for name in self.divisible}
        return ASTSource(kernel, dict(self.signature), dict(self.values), aligned)


def all_builds(target: str) -> list[Build]:
    """Every scheme, both GEMMs and every tile; those that compile the same once."""
    found: dict[object, Build] = {}
    for scheme in ALL_SCHEMES:
        for tokens in TOKENS_PER_EXPERT:
            for kernel, arguments in launches(target, scheme, tokens):
                build = as_build(target, kernel, arguments, scheme, tokens)
                found.setdefault(build.key, build)
    return list(found.values())


def launches(target: str, scheme: str, tokens: int) -> list[tuple[Any, dict[str, Any]]]:
    """The GEMMs that a layer launches, and their arguments; nothing runs."""
    calls = []

    def record(kernel, *args, grid, warmup, **options):
        if kernel in KERNELS.values():
            calls.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | options))

    case = Case(ALL_SCHEMES[scheme], 2, 128, 128, tokens, top_k=2, biases=True)
    x, routing = make_input(case)
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, target)
        patch.setattr(backend.TritonBackend, "refusals", lambda *_: [])
        patch.setattr(triton.JITFunction, "run", record)
        moelten.fused_moe(x, packed(scheme), routing, backend="triton")
    assert len(calls) == 2
    return calls


@cache
def packed(scheme: str) -> moelten.PackedExperts:
    case = Case(ALL_SCHEMES[scheme], 2, 128, 128, top_k=2, biases=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.TritonBackend, "refusals", lambda *_: [])
        return moelten.pack(make_weights(case), backend="triton")


def as_build(
    target: str, kernel: Any, arguments: dict[str, Any], scheme: str, tokens: int
) -> Build:
    """What Triton makes of a launch: it compiles None, constants and ones into the code."""
    signature, values, divisible = {}, {}, []
    arguments["P"] = replace(arguments["P"], rows=SIZE, columns=SIZE)
    for parameter in kernel.params:
        name, value = parameter.name, arguments.pop(parameter.name)
        plain = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (plain and value == 1):
            signature[name], values[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if plain and value % 16 == 0:
                divisible.append(name)
    parts = (tuple(part.items()) for part in (signature, values))
    options = tuple(sorted(arguments.items()))
    return Build(target, kernel.__name__, *parts, tuple(divisible), options, scheme, tokens)


@dataclass(frozen=True)
class Result:
    """Which instructions the code has, bytes (NVIDIA) or registers (AMD) spilled; or an error.

    seconds: of one core
    """

    products: tuple[str, ...] = ()
    conversions: tuple[str, ...] = ()
    spilled: int = 0
    seconds: float = 0.0
    error: str = ""


def compile_one(build: Build) -> Result:
    start = sum(os.times()[:4])
    gpu = TARGETS[build.target][1]
    code = triton.compile(build.source(), target=gpu, options=dict(build.options)).asm
    if gpu.backend == "cuda":
        text, spilled = code["ptx"], stack_bytes(code["cubin"])
    else:
        text = code["amdgcn"]
        spilled = sum(map(int, re.findall(r"[sv]gpr_spill_count:\s*(\d+)", text)))
    products, conversions = (
        tuple(sorted(set(re.findall(pattern, text))))
        for pattern in (MATRIX_INSTRUCTION, SCALED_CONVERSION)
    )
    return Result(products, conversions, spilled, sum(os.times()[:4]) - start)


def stack_bytes(cubin: bytes) -> int:
    """The stack that a kernel's thread needs; without function calls, that is spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", text)))


class Compilers:
    """Processes that compile until the end of the tests: this runner's share of the cores."""

    def __init__(self, folder: Path):
        self.folder, self.local = folder, threading.local()
        runners = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        self.threads = ThreadPoolExecutor(max((os.cpu_count() or 1) // runners, 2))

    def compile_all(self, builds: Iterable[Build]) -> dict[Build, Result]:
        builds = list(builds)
        return dict(zip(builds, self.threads.map(self._compile, builds), strict=True))

    def _compile(self, build: Build) -> Result:
        if not hasattr(self.local, "child") or not self.local.child.alive:
            self.local.child = Child(self.folder)
        return self.local.child.compile(build)


class Child:
    """A process that compiles what it is sent, until it dies of it."""

    def __init__(self, folder: Path):
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.log = Path(tempfile.mkstemp(dir=folder)[1])
        arguments = (other, str(folder), str(self.log))
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        other.close()
        self.alive = True

    def compile(self, build: Build) -> Result:
        try:
            self.pipe.send(build)
            result = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            self.alive = False
            result = Result(error=f"the compiler's process ended with {self.process.exitcode}")
        if result.error:
            notes = re.findall(r".*(?:error:|Assertion).*", self.log.read_text(errors="replace"))
            return Result(error="\n".join([result.error, *notes[:3]]))
        return result


def serve(pipe, cache: str, log: str) -> None:
    """Answer builds with results; the compiler's own messages go to the log, of the last build."""
    triton.knobs.cache.dir = cache
    # Nobody reads lines of these kernels, and a tenth of the time goes into them.
    triton.knobs.compilation.disable_line_info = True
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    while True:
        try:
            build = pipe.recv()
        except EOFError:
            return
        os.truncate(log, 0)
        try:
            pipe.send(compile_one(build))
        except Exception:
            pipe.send(Result(error=traceback.format_exc(limit=-1).strip()))
