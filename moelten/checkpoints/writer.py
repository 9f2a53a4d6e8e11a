"""Write a checkpoint anew with its routed experts quantized, and nothing else changed.

Headers are read first and everything that can be refused is refused then; weights stream after
that, one expert or one tensor at a time, into a folder that takes its final name only when it is
complete. How a linear is stored is `layout`'s matter, where its bytes go is `shards`'.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelten.checkpoints.checkpoint import Checkpoint
from moelten.checkpoints.config import Recipe, Settings, load_settings
from moelten.checkpoints.expert import read_matrix
from moelten.checkpoints.layout import quantization_config, write_projection
from moelten.checkpoints.names import LayerNames, find_experts
from moelten.checkpoints.projection import Projection
from moelten.checkpoints.reader import SafetensorsFiles, TensorInfo
from moelten.checkpoints.recipes import DECODERS, find_recipe
from moelten.checkpoints.shards import ShardWriter, nbytes, planned
from moelten.errors import CheckpointError, FormatError, UnsupportedError
from moelten.formats import BF16, MXFP8, Format
from moelten.qtensor import QTensor, dequantize, quantize
from moelten.weights import ExpertSpec, ExpertWeights

__all__ = ["QuantizedCheckpoint", "quantization_config", "quantize_checkpoint", "write_projection"]

Progress = Callable[[int, int, str], None]
GROUP_SIZES = (32, 64, 128)
# Every module that is not under `.experts`, however a reader renames or fuses it.
OUTSIDE_EXPERTS = r"re:^(?!.*\.experts(\.|$)).*"
# What a quantized linear has beside its weight.
_WEIGHTS = frozenset(("weight", "weight_packed", "qweight"))
_COMPANIONS = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "scales", "scale")
)
# The source's own descriptions of its tensors.
_NOT_COPIED = (
    "config.json",
    "hf_quant_config.json",
    "quant_config.json",
    "quantize_config.json",
    "quant_cfg.json",
)
_WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What `quantize_checkpoint` wrote.

    bytes_before, bytes_after: all tensors of the source and of the target
    layer_errors:              MoE layer -> ||decoded - source|| / ||source|| over expert weights
    """

    path: Path
    weight_format: Format
    activation_format: Format
    bytes_before: int
    bytes_after: int
    layer_errors: dict[int, float]


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    fmt: Format,
    *,
    activation_format: Format = BF16,
    max_shard_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> QuantizedCheckpoint:
    """Quantize the routed experts of the checkpoint `source` to `fmt` and write it to `target`.

    One expert is in memory at a time. Gate and up of an expert share every scale that spans a whole
    matrix (NVFP4, FP8 per tensor), because vLLM reads only one. Experts that are in `fmt` already
    keep their codes, unless such a scale differs between gate and up; AWQ pre-scales are folded
    into the weights. All other tensors are copied byte for byte; those the source has quantized too
    are decoded to the model's dtype, because the configuration that described them is replaced.
    Tokenizer, generation config and code files come along.

    `target` must not exist or be an empty folder. It appears complete or not at all: files are
    written to a sibling folder, which is renamed at the end and deleted on any error.
    `progress(done, total, text)` counts experts and other tensors.

    Raises CheckpointError (target in use, damaged or non-finite source, disk too small),
    FormatError (a size that the group does not divide, with those that do) and UnsupportedError
    (no layout or no reader for it); only damage and non-finite values show after writing began.
    """
    source, target = Path(source), Path(target).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another folder")
    config = quantization_config(fmt, activation_format, [])
    job = _Job(source, fmt, progress)
    config["ignore"] = job.ignore()
    plan = job.plan()
    size = sum(map(nbytes, plan.values()))
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise CheckpointError(f"{target} needs {size} bytes, the disk has {free} free")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        shards = ShardWriter(partial, plan, max_shard_bytes)
        job.write_others(shards)
        errors = {layer: job.write_layer(layer, shards) for layer in job.checkpoint.layers}
        shards.close()
        _copy_files(source, partial, config)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    before = sum(map(nbytes, job.files.tensors.values()))
    return QuantizedCheckpoint(target, fmt, activation_format, before, size, errors)


class _Job:
    """One run: which tensors are copied, which are decoded, and the module names of the experts."""

    def __init__(self, source: Path, fmt: Format, progress: Progress | None) -> None:
        self.fmt, self.progress, self.done = fmt, progress, 0
        self.settings, self.files = load_settings(source), SafetensorsFiles(source)
        # Input scales of static activations are of no use to the target, so they may be missing.
        dynamic = self.settings.dtype if self.settings.method else None
        self.checkpoint = Checkpoint(source, activation_format=dynamic)
        self.specs = {layer: self.checkpoint.spec(layer) for layer in self.checkpoint.layers}
        for layer, spec in self.specs.items():
            _check_layer(spec, layer, fmt)
        names = find_experts(self.files.tensors)
        self.linears = {
            layer: _linear_names(names[layer], spec.num_experts, self.settings)
            for layer, spec in self.specs.items()
        }
        self._sort_others(self.files.tensors.keys() - self.checkpoint.expert_tensor_names())
        experts = sum(spec.num_experts for spec in self.specs.values())
        self.total = len(self.copied) + len(self.decoded) + experts

    def _sort_others(self, names: set[str]) -> None:
        self.modules: dict[str, dict[str, str]] = {}
        for name in sorted(names):
            module, _, suffix = name.rpartition(".")
            self.modules.setdefault(module, {})[suffix] = name
        self.copied: list[str] = []
        self.decoded: list[str] = []
        for module, parts in self.modules.items():
            if _COMPANIONS.isdisjoint(parts) or _WEIGHTS.isdisjoint(parts):
                self.copied += parts.values()
                continue
            if self._recipe(module).decoder == "plain":
                raise UnsupportedError(
                    f"{module} has {sorted(parts)}, but the configuration does not say how it is "
                    "quantized; without that it can neither be copied nor decoded"
                )
            self.decoded.append(module)
            self.copied += [parts["bias"]] if "bias" in parts else []

    def _recipe(self, module: str) -> Recipe:
        """How a linear outside the experts is quantized."""
        parts = self.modules[module]
        if self.checkpoint.format_name == "w4afp8" and "weight_scale_inv" in parts:
            # These checkpoints describe their experts; the rest is still DeepSeek's FP8 blocks.
            return Recipe("fp8 block", "fp8", blocks=(128, 128))
        return find_recipe(self.settings, module, frozenset(parts))

    def ignore(self) -> list[str]:
        """What the configuration excludes: all modules but the linears that are quantized."""
        linears = {name for experts in self.linears.values() for names in experts for name in names}
        ours = {name.rpartition(".experts.")[0] for name in linears}
        strangers = set()
        for module in {name.rpartition(".")[0] for name in self.copied} | {*self.decoded}:
            block, found, linear = f"{module}.".rpartition(".experts.")
            if found and block not in ours:
                # Experts that no layer runs, such as those of multi-token prediction.
                strangers.add(f"re:{re.escape(block)}\\.experts(\\.|$)")
            elif linear:
                strangers.add(module)
        return ["lm_head", OUTSIDE_EXPERTS, *sorted(strangers)]

    def plan(self) -> dict[str, TensorInfo]:
        """Every tensor that will be written, in order, from headers alone."""
        plan = {name: self.files.tensors[name] for name in self.copied}
        for module in self.decoded:
            plan[f"{module}.weight"] = planned(self._decode(module, self.files.meta))
        for layer, spec in self.specs.items():
            halves = [spec.matrix_shape("w13")[1:]] * spec.activation.halves
            shapes = [*halves, spec.matrix_shape("w2")]
            templates = [
                write_projection("", quantize(torch.empty(shape, device="meta"), self.fmt))
                for shape in shapes
            ]
            for names in self.linears[layer]:
                for name, parts in zip(names, templates, strict=True):
                    plan |= {f"{name}{part}": planned(tensor) for part, tensor in parts.items()}
        return plan

    def write_others(self, shards: ShardWriter) -> None:
        """Everything but the routed experts."""
        for name in self.copied:
            self._report(name)
            shards.copy(name, self.files.tensors[name])
        for module in self.decoded:
            self._report(module)
            shards.write(f"{module}.weight", self._decode(module, self.files.read))

    def _decode(self, module: str, fetch: Callable[[str], Tensor]) -> Tensor:
        """A quantized linear outside the experts, in the model's dtype."""
        parts, recipe = self.modules[module], self._recipe(module)
        projection = Projection(module, parts, fetch, lambda name: str(self.files.tensors[name]))
        decoder = DECODERS[recipe.decoder]
        matrix = read_matrix(projection, decoder, recipe, static=False, drop_input_scale=True)
        weight = dequantize(matrix.weight)
        if matrix.pre_scale is not None:
            weight = weight * matrix.pre_scale
        return weight.to(self.settings.dtype.data_dtype)

    def write_layer(self, layer: int, shards: ShardWriter) -> float:
        """Write the experts of one layer; the relative error of their weights."""
        error = norm = 0.0
        for names, weights in zip(self.linears[layer], self.checkpoint.experts(layer), strict=True):
            self._report(f"layer {layer}, expert {weights.first_expert}")
            pairs = list(_quantize_expert(weights, self.fmt))
            for name, (exact, matrix) in zip(names, pairs, strict=True):
                error += (dequantize(matrix) - exact).double().square().sum().item()
                norm += exact.double().square().sum().item()
                for part, tensor in write_projection(name, matrix).items():
                    shards.write(part, tensor)
        if not norm < torch.inf:
            raise CheckpointError(f"layer {layer}: weights of experts are infinite or NaN")
        return (error / norm) ** 0.5 if norm else 0.0

    def _report(self, text: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, text)
        self.done += 1


def _quantize_expert(weights: ExpertWeights, fmt: Format) -> Iterator[tuple[Tensor, QTensor]]:
    """(exact fp32 weight, quantized weight) of gate, up and down."""
    w2 = weights.w2.map(lambda part: part[:, None])
    for stack, pre_scale in (
        (weights.w13[0], weights.w13_pre_scale),
        (w2[0], weights.w2_pre_scale),
    ):
        exact = dequantize(stack)
        if pre_scale is not None:
            exact = exact * pre_scale[0]
        if stack.format == fmt and pre_scale is None and _shares_scales(stack):
            matrices = [stack[half] for half in range(stack.shape[0])]
        else:
            matrices = _quantize_together(exact, fmt)
        yield from zip(exact, matrices, strict=True)


def _shares_scales(stack: QTensor) -> bool:
    spans = stack.format.block == (None, None)
    scale = stack.scale if spans else stack.global_scale
    return scale is None or bool((scale == scale[0]).all())


def _quantize_together(stack: Tensor, fmt: Format) -> list[QTensor]:
    """Quantize matrices [n, rows, K]; a scale that spans a matrix spans all n of them."""
    if fmt.block[0] not in (None, 1):
        return [quantize(matrix, fmt) for matrix in stack]
    joint, rows = quantize(stack.flatten(0, 1), fmt), stack.shape[1]
    return [joint.rows(start, start + rows) for start in range(0, joint.shape[0], rows)]


def _check_layer(spec: ExpertSpec, layer: int, fmt: Format) -> None:
    """Refuse sizes and biases that the layout or its readers do not have."""
    sizes = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size}
    # Words of packed int4 hold 8 codes, along K and (zero points) along N.
    multiple = (fmt.block[1] or 8) if fmt.packed or fmt == MXFP8() else 1
    if any(size % multiple for size in sizes.values()):
        legal = [str(g) for g in GROUP_SIZES if not any(size % g for size in sizes.values())]
        raise FormatError(
            f"layer {layer}: {fmt.name} needs sizes that are multiples of {multiple}, got {sizes}; "
            f"int4 groups that divide both: {', '.join(legal) or 'none'}, or one scale per channel"
        )
    biases = [name for name in spec.extras if name.endswith("_bias")]
    if biases:
        raise UnsupportedError(
            f"layer {layer} has {' and '.join(biases)}, and no compressed-tensors reader loads "
            "biases of routed experts"
        )


def _linear_names(names: LayerNames, num_experts: int, settings: Settings) -> list[list[str]]:
    """Module names of every expert's linears, in the order gate, up, down."""
    if not names.fused:
        roles = [role for role in ("gate", "up", "down") if role in names.roles]
        return [[names.modules[expert, role] for role in roles] for expert in names.experts]
    prefix = next(iter(names.modules.values())).rpartition(".")[0]
    projections = _per_expert_projections(settings)
    return [[f"{prefix}.{expert}.{p}" for p in projections] for expert in range(num_experts)]


def _per_expert_projections(settings: Settings) -> list[str]:
    """Names of the linears that transformers can load for a model whose experts are fused."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError as error:
        raise UnsupportedError(
            "experts are stored fused, and which linears their readers accept is only known with "
            "transformers>=5.23 installed"
        ) from error
    conversions: Any = get_checkpoint_conversion_mapping
    for kind in (settings.text_type, settings.model_type):
        changes = conversions(kind) or ()
        patterns = " ".join(p for change in changes for p in change.source_patterns)
        projections = re.findall(r"experts\.\*\.(\w+)\.weight", patterns)
        if projections:
            return projections
    raise UnsupportedError(
        f"experts of {settings.model_type!r} are stored fused, and transformers loads no linears "
        "per expert for it: a compressed-tensors checkpoint of it would have no reader"
    )


def _copy_files(source: Path, target: Path, quantization: dict[str, Any]) -> None:
    """config.json with the new `quantization_config`, and every file that holds no weights."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _drop_quantization(config)
    config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in source.iterdir():
        weights = file.name.endswith(_WEIGHT_FILES)
        if file.is_file() and not weights and file.name not in _NOT_COPIED:
            shutil.copyfile(file, target / file.name)


def _drop_quantization(config: dict[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    for part in config.values():
        if isinstance(part, dict):
            _drop_quantization(part)
