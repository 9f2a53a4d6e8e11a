"""The quantizer "moelten" of transformers: models whose experts stay packed, from file to forward.

Each experts module is replaced on the meta device by MoeltenExperts, transformers loads everything
else, and the experts then stream from the files into the layout of their backend, one at a time: no
dequantized copy ever exists. With a `weight_format` they are quantized on that way. Saving writes a
checkpoint that other engines read (`transformers_saving`), marked so that this quantizer takes it
back packed. Expert parallelism through transformers is refused: its plans shard parameters.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moelten.checkpoints import Checkpoint
from moelten.errors import CheckpointError, FormatError, UnsupportedError
from moelten.formats import Float, Format, Scheme, decode_format, encode_format
from moelten.integrations.transformers_experts import FLOATS, activation_of, is_experts
from moelten.integrations.transformers_linears import UNUSED, Decode, Linears
from moelten.integrations.transformers_saving import stored_config, stored_tensors
from moelten.moe import fused_moe, pack_stream
from moelten.packed import PackedExperts
from moelten.qtensor import QTensor, dequantize, quantize
from moelten.routing import Routing
from moelten.weights import ExpertSpec, ExpertWeights, split_halves

METHOD = "moelten"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class MoeltenConfig(QuantizationConfigMixin):
    """How a model's experts are loaded; the `quantization_config` of `from_pretrained`.

    weight_format:     quantize the experts to this while loading; None keeps the checkpoint's own
    activation_format: how activations are quantized; None takes what the checkpoint says, and the
                       model's dtype where it says nothing

    In config.json it is the configuration of the files' format with an entry "moelten" added, so
    that engines which do not know moelten read the directory as what it is.
    """

    def __init__(
        self, weight_format: Format | None = None, activation_format: Format | None = None
    ) -> None:
        formats = {"weight_format": weight_format, "activation_format": activation_format}
        for name, fmt in formats.items():
            if fmt is not None and not isinstance(fmt, Format):
                raise TypeError(f"{name}: expected a moelten format, got {fmt!r}")
        self.quant_method: Any = METHOD
        self.weight_format = weight_format
        self.activation_format = activation_format
        self.stored: dict[str, Any] = {}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what `to_dict` wrote."""
        formats = config_dict.get(METHOD) or {}
        config = cls(**{name: decode_format(text) for name, text in formats.items()})
        if config_dict.get("quant_method", METHOD) != METHOD:
            config.stored = {k: v for k, v in config_dict.items() if k != METHOD}
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON: the configuration of the files' format, and this one under "moelten"."""
        # Weights that were saved are in their format already.
        names = ("activation_format",) if self.stored else ("weight_format", "activation_format")
        formats = {
            name: encode_format(fmt) for name in names if (fmt := getattr(self, name)) is not None
        }
        return {"quant_method": METHOD, **self.stored, METHOD: formats}


class MoeltenExperts(nn.Module):
    """The packed experts of one layer, called like the module of transformers that it replaces.

    Its tensors are buffers in the layout of one backend: they follow the model to another device by
    being packed again, and only the dtype of unquantized activations follows the model's dtype.
    """

    def __init__(self, spec: ExpertSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_experts = spec.num_experts
        self.packed: PackedExperts | None = None

    def fill(self, packed: PackedExperts) -> None:
        """Take these experts, instead of any held before."""
        self.packed, self.spec = packed, packed.spec
        self._buffers.clear()
        for name, part in packed.tensors.items():
            self.register_buffer(_buffer_name(name), part)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
        packed = self.loaded()
        activations = packed.spec.scheme.activations
        x = hidden_states.contiguous()
        if isinstance(activations, Float):
            x = x.to(activations.data_dtype)
        y = fused_moe(x, packed, Routing(top_k_index, top_k_weights))
        return y.to(hidden_states.dtype)

    def loaded(self) -> PackedExperts:
        """The experts; CheckpointError if no `from_pretrained` ever loaded them."""
        if self.packed is None:
            raise CheckpointError("these experts were never loaded; use from_pretrained")
        return self.packed

    def _apply(self, fn: Any, recurse: bool = True) -> MoeltenExperts:
        """nn.Module's hook for `to`, `cuda`, `half`: packed bytes are not cast.

        Another device or dtype may have another backend, so the experts are packed again for it.
        """
        packed = self.packed
        if packed is None:
            return self
        spec = packed.spec
        activations = spec.scheme.activations
        floats = isinstance(activations, Float)
        dtype = activations.data_dtype if floats else torch.bfloat16
        probe = fn(torch.empty(0, dtype=dtype, device=packed.device))
        if floats and probe.dtype != dtype:
            if probe.dtype not in FLOATS:
                raise UnsupportedError(f"expected bf16, fp16 or fp32, got {probe.dtype}")
            spec = replace(spec, scheme=Scheme(spec.scheme.weights, FLOATS[probe.dtype]))
            spec.scheme.check()
        if spec != packed.spec or probe.device != packed.device:
            singles = (packed.unpack_expert(e) for e in range(spec.num_experts))
            converted = (_convert(single, spec) for single in singles)
            self.fill(pack_stream(spec, converted, device=probe.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.packed is not None:  # load_state_dict may have put other tensors in place
            parts = {name: self.get_buffer(_buffer_name(name)) for name in self.packed.tensors}
            self.fill(replace(self.packed, tensors=parts))

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{spec.scheme.name}, num_experts={spec.num_experts}, hidden_size={spec.hidden_size}, "
            f"intermediate_size={spec.intermediate_size}, activation={spec.activation}"
        )


class MoeltenHfQuantizer(HfQuantizer):
    """transformers' hooks around loading and saving; made by `from_pretrained`, not by hand."""

    quantization_config: MoeltenConfig

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse placements that packed experts do not have."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise UnsupportedError(
                "packed experts cannot be offloaded to disk; name a device for every module"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Learn the model's dtype, which is that of unquantized activations."""
        if dtype not in FLOATS:
            raise UnsupportedError(f"model dtype {dtype}: expected bf16, fp16 or fp32")
        self.dtype = FLOATS[dtype]
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError(
                "packed experts are not sharded by transformers' distributed_config; load without "
                "it, or run bf16 weights with moelten.integrations.transformers.use_moelten"
            )
        if not checkpoint_files:
            raise UnsupportedError("packed experts load from safetensors files, and none are given")
        config, path = self.quantization_config, Path(checkpoint_files[0]).parent
        override = config.activation_format if config.weight_format is None else None
        self.checkpoint = Checkpoint(path, activation_format=override)
        self.linears = Linears(path, self.checkpoint.expert_tensor_names())
        for name, module in list(model.named_modules()):
            if is_experts(module):
                spec = self._check_layer(name, module)
                model.set_submodule(name, MoeltenExperts(spec))
        specs = [experts.spec for experts in packed_modules(model).values()]
        if not specs:
            raise no_experts(model)
        if all(isinstance(spec.scheme.weights, Float) for spec in specs):
            raise UnsupportedError(
                f"{path} is not quantized; name a weight_format to quantize its experts to, or "
                "load it without a quantization_config and call use_moelten"
            )
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"(^|\.)experts\.", UNUSED}

    def _check_layer(self, name: str, module: Any) -> ExpertSpec:
        """The spec that a layer's experts will have; the model and the files must agree."""
        layer = _layer_index(name)
        if layer not in self.checkpoint.layers:
            raise CheckpointError(
                f"{name}: {self.checkpoint.path} has experts of layers {self.checkpoint.layers}"
            )
        found, activation = self.checkpoint.spec(layer), activation_of(module)
        if found.activation != activation:
            raise UnsupportedError(
                f"{name}: {type(module).__name__} computes {activation}, config.json describes "
                f"{found.activation}"
            )
        experts, hidden, inter = module.down_proj.shape
        if module.is_transposed:
            hidden, inter = inter, hidden
        if (found.num_experts, found.hidden_size, found.intermediate_size) != (
            experts,
            hidden,
            inter,
        ):
            raise FormatError(
                f"{name}: the model has {experts} experts with H={hidden}, I={inter}, the files "
                f"{found.num_experts} with H={found.hidden_size}, I={found.intermediate_size}"
            )
        return self._target(found)

    def _target(self, found: ExpertSpec) -> ExpertSpec:
        """The spec after loading: the formats asked for, floats in the model's dtype."""
        config = self.quantization_config
        weights, activations = found.scheme.weights, found.scheme.activations
        weights = config.weight_format or (self.dtype if isinstance(weights, Float) else weights)
        if isinstance(weights, Float):
            activations = weights
        elif config.weight_format is not None:
            activations = config.activation_format or self.dtype
        elif isinstance(activations, Float) and config.activation_format is None:
            activations = self.dtype
        scheme = Scheme(weights, activations)
        scheme.check()
        extras = tuple(e for e in found.extras if scheme.static or not e.endswith("_input_scale"))
        return replace(found, scheme=scheme, extras=extras)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel
    ) -> list[Any]:
        """transformers' own conversions but those of experts, and those of quantized linears."""
        experts = [c for c in weight_conversions if _targets_experts(c)]
        self.projections = _projection_names(experts)
        kept = [c for c in weight_conversions if not _targets_experts(c)]
        renamings = [c for c in kept if isinstance(c, WeightRenaming)]
        modules = {
            module: apply_renamings(f"{module}.weight", renamings).removesuffix(".weight")
            for module in self.linears.suffixes
        }
        for conversion in kept:
            self._refuse_merged(conversion, modules)
        return [*self.linears.converters(modules), *kept]

    @staticmethod
    def _refuse_merged(conversion: Any, modules: dict[str, str]) -> None:
        for module in modules.values() if isinstance(conversion, WeightConverter) else ():
            if conversion.rename_source_key(f"{module}.weight")[1] is not None:
                raise UnsupportedError(
                    f"{module} is quantized, and this model merges it with others while loading; "
                    "start from a checkpoint where only the experts are quantized"
                )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, module in packed_modules(model).items():
            layer = _layer_index(name)
            module.fill(
                pack_stream(
                    module.spec,
                    (_convert(weights, module.spec) for weights in self.checkpoint.experts(layer)),
                    device=_device_of(model, name),
                )
            )
        del self.checkpoint, self.linears
        # Decoded linears are saved as they are, not turned back.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(op, Decode) for op in getattr(conversion, "operations", ()))
        ]

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `save_pretrained` writes, experts in the format of `stored_config`."""
        packed = {name: module.loaded() for name, module in packed_modules(model).items()}
        config = stored_config(packed, model.config.model_type)
        self.quantization_config.stored = config
        prefixes = tuple(f"{name}." for name in packed)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}
        for name, experts in packed.items():
            state |= stored_tensors(name, experts, config, self.projections)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def packed_modules(model: nn.Module) -> dict[str, MoeltenExperts]:
    """The packed experts of a model, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MoeltenExperts)}


def no_experts(model: PreTrainedModel) -> UnsupportedError:
    """The refusal of a model that moelten can do nothing for."""
    return UnsupportedError(
        f"{type(model).__name__} has no experts on transformers' experts interface, so nothing "
        "would run on moelten; build a moelten.MoELayer from the weights of each MoE block "
        "(moelten.checkpoints reads them) and put it in the block's place"
    )


def recognise(method: str) -> None:
    """Have a directory that `save_pretrained` wrote in `method` loaded packed, and no other."""
    original: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[method]

    def from_dict(cls: type, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        kind: Any = MoeltenConfig if METHOD in config_dict else original
        return kind.from_dict(config_dict, *args, **kwargs)

    # transformers compares configurations by the name of their class.
    members: dict[str, Any] = {"from_dict": classmethod(from_dict), "__doc__": original.__doc__}
    AUTO_QUANTIZATION_CONFIG_MAPPING[method] = type(original.__name__, (original,), members)


def _convert(weights: ExpertWeights, spec: ExpertSpec) -> ExpertWeights:
    """One expert of the files in the scheme of `spec`; what has its format keeps its codes."""
    fmt = spec.scheme.weights
    dropped: dict[str, Any] = {
        name: None for name in weights.spec.extras if name not in spec.extras
    }
    return replace(
        weights,
        w13=_requantize(weights.w13, fmt),
        w2=_requantize(weights.w2, fmt),
        activation_format=spec.scheme.activations,
        **dropped,
    )


def _requantize(matrix: QTensor, fmt: Format) -> QTensor:
    if matrix.format == fmt:
        return matrix
    values = dequantize(matrix)
    if values.dim() == 4 and fmt.block[0] in (None, 1) and not isinstance(fmt, Float):
        # Gate and up share what spans a matrix: other engines read one scale for both.
        order = "gate_up" if values.shape[1] == 2 else "no_gate"
        halves = split_halves(quantize(values.flatten(1, 2), fmt), order)
        assert isinstance(halves, QTensor)
        return halves
    return quantize(values, fmt)


def _buffer_name(part: str) -> str:
    return part.replace(".", "_")


def _layer_index(name: str) -> int:
    found = re.findall(r"(?:^|\.)layers\.(\d+)\.", name)
    if not found:
        raise UnsupportedError(f"{name}: expected experts in a numbered layer")
    return int(found[-1])


def _device_of(model: PreTrainedModel, name: str) -> torch.device:
    """Where the block around the experts is."""
    block = model.get_submodule(name.rpartition(".")[0])
    device = next(block.parameters()).device
    if device.type == "meta":
        raise UnsupportedError(f"{name} is offloaded; packed experts need a device of their own")
    return device


def _targets_experts(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and all(
        re.search(r"experts\.(gate_up_proj|up_proj|down_proj)$", target.replace("\\", ""))
        for target in conversion._original_target_patterns
    )


def _projection_names(conversions: list[WeightConverter]) -> tuple[str, ...]:
    """Names of one expert's linears in the family's own checkpoints: gate, up, down or up, down."""
    names: dict[str, list[str]] = {}
    for conversion in conversions:
        target = conversion._original_target_patterns[0].rpartition(".")[2]
        sources = [s.replace("\\", "") for s in conversion._original_source_patterns]
        linears = [m[1] for s in sources if (m := re.search(r"\*\.(\w+)\.weight$", s))]
        if linears:
            names[target] = linears
    first = names.get("gate_up_proj") or names.get("up_proj") or []
    return tuple(first + names.get("down_proj", [])) or _PROJECTIONS
