"""Stored experts read a second time, by the definition of their format and nothing else.

`verify` and `run` hold the library to this, so it shares no code with it: not the bit moves of
`packing`, not `quantize`, not `checkpoints`. It is written for reading and decodes one expert at a
time to fp64. A value is (code - zero) * scale, times or divided by a global scale where the format
has one. Formats are told apart by tensor names and dtypes; damaged files are not diagnosed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import silu

from moelten.errors import CheckpointError, UnsupportedError

Parts = dict[str, Tensor]
Decoder = Callable[[Parts, dict[str, Any]], Tensor]
"""(stored tensors of one projection by suffix, quantization config) -> values [N, K]."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SINGLE = re.compile(
    r"(?P<prefix>.*\blayers\.(?P<layer>\d+)\..*\bexperts\.(?P<expert>\d+)\.)"
    r"(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<part>.+)"
)
_FUSED = re.compile(
    r".*\blayers\.(?P<layer>\d+)\..*\bexperts\.(?P<projection>gate_up_proj|down_proj)_?(?P<part>\w*)"
)
_PLAIN_SWIGLU = (
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "kimi_k2", "minimax_m2", "mixtral", "olmoe"),
    *("qwen2_moe", "qwen3_moe"),
)
# Multi-token-prediction and draft models number their layers from 0 again.
_DRAFT_MODEL = re.compile(r"(^|\.)(mtp|draft|eagle)\w*\.")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class ExpertMatrices:
    """One expert in fp64: gate and up [I, H] (gate None if there is none), down [H, I], biases."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def items(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, part) for name, part in vars(self).items() if part is not None)


class StoredExperts:
    """The routed experts in the safetensors files of a folder, decoded by `decoder`."""

    def __init__(self, path: Path, decoder: Decoder | None = None) -> None:
        self.path = path
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.quantization = _quantization(path, self.config)
        self._decode = decoder or decode_matrix
        # (layer, expert or None, projection) -> part -> (file, tensor name)
        self._names: dict[tuple[int, int | None, str], dict[str, tuple[Path, str]]] = {}
        for file in _files(path):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    self._add(file, name)

    def _add(self, file: Path, name: str) -> None:
        if _DRAFT_MODEL.search(name):
            return
        if match := _SINGLE.fullmatch(name):
            expert: int | None = int(match["expert"])
        elif match := _FUSED.fullmatch(name):
            expert = None
        else:
            return
        projection = _PROJECTIONS.get(match["projection"], match["projection"])
        key = (int(match["layer"]), expert, projection)
        self._names.setdefault(key, {})[match["part"]] = (file, name)

    def expert(self, layer: int, expert: int) -> ExpertMatrices:
        """One expert; raises CheckpointError if the files lack it."""
        if (layer, None, "down_proj") in self._names:
            return self._fused(layer, expert)
        names = ("gate_proj", "up_proj", "down_proj")
        found = {n: self._parts(layer, expert, n) for n in names}
        missing = [n for n in names[1:] if not found[n]]
        if missing:
            raise CheckpointError(
                f"{self.path}: layer {layer}, expert {expert} has no {' and no '.join(missing)}"
            )
        values = {n: self._decode(p, self.quantization).double() for n, p in found.items() if p}
        return ExpertMatrices(values.get("gate_proj"), values["up_proj"], values["down_proj"])

    def _fused(self, layer: int, expert: int) -> ExpertMatrices:
        """All experts in one tensor: gpt-oss interleaves gate and up, others put gate first."""
        both = self._parts(layer, None, "gate_up_proj", expert)
        down = self._parts(layer, None, "down_proj", expert)
        gate_up, w2 = (self._decode(_unfused(p), self.quantization).double() for p in (both, down))
        if gate_up.shape != (2 * w2.shape[1], w2.shape[0]):
            gate_up, w2 = gate_up.T, w2.T  # stored as [K, N]
        bias, down_bias = (p["bias"].double() if "bias" in p else None for p in (both, down))
        inter = w2.shape[1]
        interleaved = self.config.get("model_type") == "gpt_oss"
        gate = slice(0, None, 2) if interleaved else slice(0, inter)
        up = slice(1, None, 2) if interleaved else slice(inter, None)
        return ExpertMatrices(
            gate_up[gate],
            gate_up[up],
            w2,
            None if bias is None else bias[gate],
            None if bias is None else bias[up],
            down_bias,
        )

    def _parts(
        self, layer: int, expert: int | None, projection: str, row: int | None = None
    ) -> Parts:
        parts = {}
        for part, (file, name) in self._names.get((layer, expert, projection), {}).items():
            with safe_open(file, "pt") as tensors:
                if row is None:
                    parts[part] = tensors.get_tensor(name)
                else:
                    parts[part] = tensors.get_slice(name)[row]
        return parts


def _unfused(parts: Parts) -> Parts:
    """Parts of one expert by the names they have where experts are stored one by one."""
    names = {"": "weight", "scale": "weight_scale", "scale_inv": "weight_scale_inv"}
    return {names.get(part, part): tensor for part, tensor in parts.items()}


def _files(path: Path) -> list[Path]:
    """Safetensors files that the index names; all of them where there is none."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path.glob("*.safetensors"))
    return [path / n for n in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The quantization config, wherever tools put it; {} if there is none."""
    for holder in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return dict(holder[key])
    for name in ("hf_quant_config.json", "quantize_config.json"):
        if (path / name).exists():
            record = json.loads((path / name).read_text())
            return dict(record.get("quantization", record))
    return {}


def decode_matrix(parts: Parts, quantization: dict[str, Any]) -> Tensor:
    """Values [N, K] (fp64) of one projection from its stored tensors, told apart by their names.

    Raises UnsupportedError for tensors that are no format known here.
    """
    if "blocks" in parts:
        return _mxfp4(parts["blocks"].flatten(-2), parts["scales"])
    if "qweight" in parts:
        awq = quantization.get("quant_method") == "awq"
        return (_awq if awq else _gptq)(parts, quantization)
    if "weight_packed" in parts:
        return _compressed_tensors_packed(parts)
    weight = parts.get("weight")
    if weight is not None and weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return weight.double()
    scales = [parts[n] for n in ("weight_scale_inv", "weight_scale", "scale") if n in parts]
    if weight is None or not scales:
        raise UnsupportedError(f"no format known by definition stores {', '.join(sorted(parts))}")
    scale = scales[0]
    if weight.dtype == torch.float4_e2m1fn_x2:  # safetensors' F4, which says what it is
        return _scaled(_e2m1(_nibbles(weight.view(torch.uint8))), scale, {})
    if weight.dtype == torch.uint8:
        return _modelopt(weight, scale, parts)
    if weight.dtype == torch.int8 and _is_packed(weight, quantization):
        table = _e2m1 if quantization.get("expert_dtype") == "fp4" else _twos_complement
        return _scaled(table(_nibbles(weight)), scale, quantization)
    codes = weight.double()
    if "weight_zero_point" in parts:
        codes = codes - _spread(parts["weight_zero_point"].double(), tuple(codes.shape))
    return _scaled(codes, scale, quantization)


def _is_packed(weight: Tensor, quantization: dict[str, Any]) -> bool:
    """Whether int8 bytes hold two 4-bit codes: DeepSeek's FP4 experts and its W4AFP8 builds."""
    mixed = str(quantization.get("quant_algo", "")).upper() == "MIXED_PRECISION"
    w4afp8 = mixed or quantization.get("quant_method") == "w4afp8"
    return w4afp8 or quantization.get("expert_dtype") == "fp4"


def _mxfp4(packed: Tensor, scales: Tensor) -> Tensor:
    return _scaled(_e2m1(_nibbles(packed)), scales, {})


def _compressed_tensors_packed(parts: Parts) -> Tensor:
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    if packed.dtype == torch.uint8:
        values = _scaled(_e2m1(_nibbles(packed)), scale, {})
        divisor = parts.get("weight_global_scale")
        return values if divisor is None else values / divisor.double()
    rows, columns = (int(n) for n in parts["weight_shape"])
    codes = _nibbles(packed)[:, :columns]
    if "weight_zero_point" in parts:
        zero = _nibbles(parts["weight_zero_point"].T).T[:rows]
        return _scaled(codes - _spread(zero, (rows, columns)), scale, {})
    return _scaled(codes - 8, scale, {})


def _modelopt(weight: Tensor, scale: Tensor, parts: Parts) -> Tensor:
    """NVFP4 and MXFP4 along K; int4 in pairs of output rows, with its float scales.

    weight_scale_2 is a factor in NVFP4 alone: int4's describes a second, fp8 rounding of weights.
    """
    if scale.dtype not in (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return _scaled(_twos_complement(_nibbles(weight.T).T), scale, {})
    values = _scaled(_e2m1(_nibbles(weight)), scale, {})
    return values * parts["weight_scale_2"].double() if "weight_scale_2" in parts else values


def _gptq(parts: Parts, quantization: dict[str, Any]) -> Tensor:
    codes = _nibbles(parts["qweight"].T).T  # [K, N]
    zeros = _nibbles(parts["qzeros"])  # [groups, N]
    if quantization.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    groups = zeros.shape[0]
    index = torch.arange(codes.shape[0]) // (codes.shape[0] // groups)
    if "g_idx" in parts:
        index = parts["g_idx"].long()
    return ((codes - zeros[index]) * parts["scales"].double()[index]).T


def _awq(parts: Parts, quantization: dict[str, Any]) -> Tensor:
    def columns(words: Tensor) -> Tensor:
        # Nibbles 0..7 of a word hold its columns 0, 2, 4, 6, 1, 3, 5, 7.
        nibbles = _nibbles(words)
        groups = nibbles.view(nibbles.shape[0], -1, 8)
        return groups[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)

    codes, zeros = columns(parts["qweight"]), columns(parts["qzeros"])
    index = torch.arange(codes.shape[0]) // (codes.shape[0] // zeros.shape[0])
    return ((codes - zeros[index]) * parts["scales"].double()[index]).T


def _nibbles(words: Tensor) -> Tensor:
    """4-bit fields of integer words along the last axis, lowest first, as fp64 0..15."""
    count = 2 * words.element_size()
    shifts = 4 * torch.arange(count)
    return ((words.long()[..., None] >> shifts) & 15).flatten(-2).double()


def _e2m1(nibbles: Tensor) -> Tensor:
    return torch.tensor((*_E2M1, *(-v for v in _E2M1)), dtype=torch.float64)[nibbles.long()]


def _twos_complement(nibbles: Tensor) -> Tensor:
    return torch.where(nibbles >= 8, nibbles - 16, nibbles)


def _scaled(codes: Tensor, scale: Tensor, quantization: dict[str, Any]) -> Tensor:
    if scale.dtype == torch.uint8:  # e8m0
        scale = torch.pow(2.0, scale.double() - 127)
    return codes * _spread(scale.double(), tuple(codes.shape), _block(quantization))


def _block(quantization: dict[str, Any]) -> tuple[int, int] | None:
    """[rows, columns] of a scale block where the config gives it: shapes alone leave it open."""
    if quantization.get("quant_algo") == "FP8_PB_WO":
        return (128, 128)
    groups = quantization.get("config_groups") or {}
    stated = quantization.get("weight_block_size") or next(
        (g["weights"].get("block_structure") for g in groups.values() if g.get("weights")), None
    )
    return (int(stated[0]), int(stated[1])) if stated else None


def _spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None = None) -> Tensor:
    """One value per block to one per element; blocks as stated, else the shapes' ratio."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    scale = scale.reshape(scale.shape[0], -1)  # [N] per row; [rows, 1, columns, 1] per block
    rows, columns = scale.shape
    ratio = (-(-shape[0] // rows), -(-shape[1] // columns))
    if block and (rows, columns) == (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
        ratio = block
    spread = scale.repeat_interleave(ratio[0], 0).repeat_interleave(ratio[1], 1)
    return spread[: shape[0], : shape[1]]


Activation = Callable[[Tensor | None, Tensor], Tensor]
"""(gate or None, up), each [P, I], to [P, I]."""
Rounding = Callable[[str, int, Tensor], Tensor]
"""("w13" or "w2", expert, fp32 rows [P, K]) to the rows as the activation format stores them."""


def activation_of(config: dict[str, Any]) -> Activation | None:
    """What stands between the two GEMMs, from config.json; None where this file does not know."""
    config = config.get("text_config") or config
    kind = config.get("model_type")

    def gpt_oss(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        limit, alpha = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    def deepseek_v4(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        limit = config.get("swiglu_limit", 10.0)
        return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    def plain(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        return silu(gate) * up

    special: dict[Any, Activation] = {"gpt_oss": gpt_oss, "deepseek_v4": deepseek_v4}
    return special.get(kind) or (plain if kind in _PLAIN_SWIGLU else None)


def plain_moe(
    x: Tensor,
    experts: dict[int, ExpertMatrices],
    ids: Tensor,
    weights: Tensor,
    activation: Activation,
    rounding: Rounding,
) -> Tensor:
    """The layer on decoded experts: outputs [T, H] in fp64, one (token, slot) pair at a time.

    A pair whose expert is not in `experts` adds nothing.
    """
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in torch.ones_like(ids).nonzero().tolist():
        expert = int(ids[token, slot])
        if expert in experts:
            m = experts[expert]
            row = rounding("w13", expert, x[token : token + 1].float()).double()
            gate = None if m.gate is None else _linear(row, m.gate, m.gate_bias)
            hidden = activation(gate, _linear(row, m.up, m.up_bias))
            y = _linear(rounding("w2", expert, hidden.float()).double(), m.down, m.down_bias)
            out[token] += float(weights[token, slot]) * y[0]
    return out


def _linear(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ matrix.T if bias is None else rows @ matrix.T + bias
