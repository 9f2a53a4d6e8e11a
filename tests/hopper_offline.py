"""Compiles Gluon kernels for sm_90a without a GPU, and reads the loops of their machine code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from moelten.formats import Format
from moelten.kernels.hopper_codes import Storage
from moelten.kernels.hopper_schedule import type_name
from moelten.kernels.launches import OPTIONS

# None where the kernel is given nothing.
Types = dict[str, str | None]
_NVDISASM = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")
_OPERATION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)")


def scale_name(fmt: Format, stored: Storage) -> str:
    """The scales' type as a kernel for `stored` is told; "" where none are beside the codes."""
    if stored.by_chunk:
        return "int32"
    return type_name(fmt.scale_dtype) if stored.scale in ("fold", "group", "block") else ""


def shared_types(stored: Storage, operand: str, halves: int) -> Types:
    """Of the parameters that both GEMM kernels have: tiles, epilogue, output."""
    last = halves == 1
    return {
        "row_scale_ptr": "*fp32" if stored.scale in ("row", "fold") or stored.folds else None,
        "bias_ptr": "*fp32" if last else None,
        "table_ptr": None,
        "post_ptr": None,
        "out_ptr": "*fp32" if last else f"*{operand}",
        **dict.fromkeys(("tiles_ptr", "count_ptr"), "*i32"),
        "max_tiles": "i32",
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
    }


def compile_kernel(kernel: Any, types: Types, values: dict[str, object], **options: int) -> Any:
    """A kernel with pointers to multiples of 16; values: of its constants."""
    values = values | {name: None for name, type_ in types.items() if type_ is None}
    names = kernel.arg_names
    signature = {name: types.get(name) or "constexpr" for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    constants = {(names.index(name),): value for name, value in values.items()}
    source = GluonASTSource(kernel, signature, constants, aligned)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS | options)


def listing_of(cubin: bytes) -> list[str]:
    """Lines of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_NVDISASM, "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def loops(listing: list[str], product: str) -> list[slice]:
    """Where the loops are that have the operation `product`, outer ones too."""
    labels = {line[: line.index(":")]: i for i, line in enumerate(listing) if line[:3] == ".L_"}
    found = []
    for i, line in enumerate(listing):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels[jump[1]] < i:
            found.append(slice(labels[jump[1]], i + 1))
    return [loop for loop in found if product in operations(listing[loop])]


def innermost(found: list[slice]) -> list[slice]:
    """The loops that hold no other one of them."""

    def holds(a: slice, b: slice) -> bool:
        return a != b and a.start <= b.start and b.stop <= a.stop

    return [loop for loop in found if not any(holds(loop, other) for other in found)]


def operations(lines: list[str]) -> list[str]:
    """Their names without modifiers, in order."""
    return [match[1] for match in map(_OPERATION.match, lines) if match]
