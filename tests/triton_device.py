"""Where the tests of Triton kernels run: on a GPU, or on a CPU in Triton's interpreter.

A test file that imports this is skipped where there is neither. It comes before whatever imports
Triton.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("runs on a GPU or through test_triton_interpreter.py", allow_module_level=True)
pytest.importorskip("triton")
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
