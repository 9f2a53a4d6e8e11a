"""Quantized linears outside the routed experts, decoded to the model's dtype while they load.

Many checkpoints quantize attention and shared experts along with the routed experts, in formats
that transformers reads with other libraries, with a GPU, or not at all. moelten does not run those
linears: it decodes them exactly once, with the same decoders as experts, and transformers computes
with the result. Quantized activations of such linears are not imitated.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from moelten.checkpoints.config import Recipe, Settings, load_settings
from moelten.checkpoints.projection import FLOATS, Projection
from moelten.checkpoints.reader import SafetensorsFiles
from moelten.checkpoints.recipes import DECODERS, find_recipe
from moelten.qtensor import dequantize

# The tensor that holds a linear's codes, in the formats that moelten reads.
_CODES = ("weight", "weight_packed", "qweight")
# Scales of quantized activations and caches, which nothing here computes with.
_UNUSED = ("input_scale", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale")
UNUSED = rf"\.({'|'.join(_UNUSED)})$"


class Linears:
    """The quantized modules of a checkpoint that are no routed experts.

    suffixes: module name in the files -> the suffixes of its tensors
    """

    def __init__(self, path: Path, experts: Collection[str]) -> None:
        files = SafetensorsFiles(path)
        self.settings = _outside_experts(load_settings(path))
        found: dict[str, set[str]] = defaultdict(set)
        for name in files.tensors.keys() - experts:
            module, _, suffix = name.rpartition(".")
            found[module].add(suffix)
        self.suffixes = {
            module: frozenset(suffixes)
            for module, suffixes in found.items()
            if ".experts." not in module
            and any(
                suffix in suffixes and files.meta(f"{module}.{suffix}").dtype not in FLOATS
                for suffix in _CODES
            )
        }

    def converters(self, renamed: dict[str, str]) -> list[WeightConverter]:
        """One converter for each kind of module, e.g. every layer's self_attn.q_proj.

        renamed: module name in the files -> in the model
        """
        kinds: dict[str, set[str]] = defaultdict(set)
        for module, suffixes in self.suffixes.items():
            tail = re.split(r"(?:^|\.)\d+\.", renamed[module])[-1]
            kinds[tail] |= suffixes.difference(_UNUSED, ("bias",))
        return [
            WeightConverter(
                [re.escape(f"{tail}.{suffix}") for suffix in sorted(suffixes)],
                f"{tail}.weight",
                [Decode(self, {new: old for old, new in renamed.items()})],
            )
            for tail, suffixes in kinds.items()
        ]

    def decode(self, module: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] of a module, from its tensors by suffix; AWQ's pre-scale folded in."""
        recipe = self._recipe(module, frozenset(tensors))
        names = {suffix: f"{module}.{suffix}" for suffix in tensors}
        projection = Projection(
            module, names, lambda name: tensors[name[len(module) + 1 :]], lambda name: "loading"
        )
        weight = dequantize(DECODERS[recipe.decoder](projection, recipe))
        if "pre_quant_scale" in tensors:
            scale = projection.read_scale("pre_quant_scale", FLOATS, (weight.shape[1],))
            weight = weight * scale.float()
        projection.finish()
        return weight.to(dtype)

    def _recipe(self, module: str, suffixes: frozenset[str]) -> Recipe:
        # TensorRT-LLM's W4AFP8 checkpoints describe no layer; outside the experts they are
        # DeepSeek's FP8.
        mixed = self.settings.quantization.get("quant_algo") == "MIXED_PRECISION"
        undescribed = mixed and "quantized_layers" not in self.settings.quantization
        if (undescribed or self.settings.method == "w4afp8") and "weight_scale_inv" in suffixes:
            return Recipe("fp8 block", "fp8", blocks=(128, 128))
        return find_recipe(self.settings, module, suffixes)


class Decode(ConversionOps):
    """transformers' conversion of one module's tensors into its weight.

    Has `hf_quantizer`, which makes transformers hand tensors over in the dtype of the files.
    """

    def __init__(self, linears: Linears, files: dict[str, str]) -> None:
        self.hf_quantizer = linears
        self.files = files

    def __deepcopy__(self, memo: dict[int, Any]) -> Decode:
        return self  # transformers copies converters for every parameter; this one has no state

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Decode one module; a plain one of the same kind passes through."""
        name: str = kwargs["full_layer_name"]
        dtype = kwargs["model"].get_parameter(name).dtype
        tensors = {
            pattern.rpartition(".")[2]: parts[0] if isinstance(parts, list) else parts
            for pattern, parts in input_dict.items()
        }
        if tensors.keys() == {"weight"} and tensors["weight"].dtype in FLOATS:
            return {target_patterns[0]: tensors["weight"].to(dtype)}
        module = name.removesuffix(".weight")
        return {target_patterns[0]: self.hf_quantizer.decode(self.files[module], tensors, dtype)}


def _outside_experts(settings: Settings) -> Settings:
    """DeepSeek-V4 declares one element for its experts and means another for everything else."""
    drop = "expert_dtype"
    return replace(
        settings,
        quantization={k: v for k, v in settings.quantization.items() if k != drop},
        text={k: v for k, v in settings.text.items() if k != drop},
    )
