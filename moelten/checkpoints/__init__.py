"""Checkpoints: routed experts read from safetensors checkpoints in the formats of their exporters.

`Checkpoint` opens a directory; `recipes` has the tables of quantization methods and of decoders,
and each format family has a module with the meaning of its tensors. Reading never rounds a value.
"""

from moelten.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
