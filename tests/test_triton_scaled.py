"""The block-scaled GEMM: which schemes it runs where, and that it computes what the reference does.

No machine at hand has the instructions. In the interpreter, `scaled_dot` decodes and multiplies in
fp32, and everything around it is what Blackwell and CDNA4 run; elsewhere Triton itself decodes.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from cases import Case, make_input, make_weights
from metrics import assert_matches

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("runs on a GPU or through test_triton_interpreter.py", allow_module_level=True)
pytest.importorskip("triton")

import moelten  # noqa: E402
from moelten import reference  # noqa: E402
from moelten.formats import scheme  # noqa: E402
from moelten.kernels import triton_variants  # noqa: E402
from moelten.kernels.triton_variants import Target  # noqa: E402
from moelten.routing import Routing  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
BOTH = ("mxfp4_mxfp8", "mxfp8_mxfp8", "mxfp4_fp8", "mxfp4_fp8tensor")
TARGETS = {"sm_100": Target("cuda", 100), "gfx950": Target("hip", "gfx950")}
RUNS = [("sm_100", name) for name in (*BOTH, "nvfp4_nvfp4", "nvfp4_nvfp4t")]
RUNS += [("gfx950", name) for name in BOTH]


@pytest.fixture(params=RUNS, ids="-".join)
def name(request, monkeypatch):
    target, name = request.param
    monkeypatch.setattr(triton_variants, "current_target", lambda: TARGETS[target])
    return name


def check(case, weights=None, x=None, routing=None):
    weights = make_weights(case) if weights is None else weights
    if x is None:
        x, routing = make_input(case)
    assert_matches(run(weights, x, routing), reference.moe(x, weights, routing))


def run(weights, x, routing):
    packed = moelten.pack(weights, device=DEVICE, backend="triton")
    moved = Routing(routing.ids.to(DEVICE), routing.weights.to(DEVICE), routing.on_input)
    return moelten.fused_moe(x.to(DEVICE), packed, moved, backend="triton").cpu()


def test_layer(name):
    check(Case(scheme(name), num_experts=3, tokens=5, top_k=2))
