"""Tiny checkpoints in every format, written without moelten's packing.

An encoder turns one bf16 matrix [N, K] into what its format stores, plus the values that an
independent decoder reads back: compressed-tensors' own decompress where it has the format, else
this file's slow loops over the format's definition. `write_model` places experts under the names
of a model family, beside a dense layer, shared experts and attention that no loader may touch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from safetensors.torch import save_file
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Stored:
    """tensors: suffix -> tensor; values: what they decode to, in the decoder's own dtype."""

    tensors: dict[str, Tensor]
    values: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)


Encoder = Callable[[Tensor], Stored]


def to_int32(words: list[list[int]]) -> Tensor:
    """Unsigned 32-bit words as the int32 that checkpoints hold."""
    signed = [[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


def words_along_rows(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[R, C] codes 0..15 to words [R, C/8]; nibble i of a word is column 8w + order[i]."""
    rows = codes.tolist()
    words = [
        [
            sum(row[start + c] << (4 * i) for i, c in enumerate(order))
            for start in range(0, len(row), 8)
        ]
        for row in rows
    ]
    return to_int32(words)


def bytes_along_rows(codes: Tensor) -> Tensor:
    """[R, C] codes 0..15 to uint8 [R, C/2], low nibble = even column."""
    rows = [[row[c] + 16 * row[c + 1] for c in range(0, len(row), 2)] for row in codes.tolist()]
    return torch.tensor(rows, dtype=torch.uint8)


def groups(w: Tensor, size: int | None) -> Tensor:
    return w.float().unflatten(-1, (-1, size or w.shape[-1]))


def spread(scale: Tensor, size: int | None, columns: int) -> Tensor:
    return scale.repeat_interleave(size or columns, -1)


def int4_codes(w: Tensor, group: int | None, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = (groups(w, group).abs().amax(-1) / 7).to(scale_dtype)
    codes = (w.float() / spread(scale.float(), group, w.shape[-1])).round().clamp(-8, 7).int()
    return codes, scale


def e2m1_codes(x: Tensor) -> Tensor:
    distance = (x[..., None].abs() - torch.tensor(E2M1[:8])).abs()
    return distance.argmin(-1).int() + 8 * (x < 0).int()


def e8m0(amax: Tensor, top: float) -> Tensor:
    return (amax / top).log2().ceil().clamp(-127, 127) + 127


def compressed(
    layout: str, scheme: dict, *, scales: Callable[[Tensor], dict[str, Tensor]]
) -> Encoder:
    """Written and read back by compressed-tensors' own compressor of `layout`."""
    compressor = BaseCompressor.get_value_from_registry(layout)
    parsed = QuantizationScheme(targets=["Linear"], **scheme)

    def encode(w: Tensor) -> Stored:
        stored = compressor.compress({"weight": w, **scales(w)}, parsed)
        return Stored(dict(stored), compressor.decompress(dict(stored), parsed)["weight"])

    return encode


def ct_symmetric(group: int | None, top: float, dtype: torch.dtype = torch.bfloat16) -> Callable:
    return lambda w: {"weight_scale": (groups(w, group).abs().amax(-1) / top).to(dtype)}


def ct_asymmetric(group: int | None) -> Callable[[Tensor], dict[str, Tensor]]:
    def scales(w: Tensor) -> dict[str, Tensor]:
        low, high = groups(w, group).amin(-1).clamp(max=0), groups(w, group).amax(-1).clamp(min=0)
        scale = ((high - low) / 15).bfloat16()
        zero = ((-low / scale.float()).round() - 8).clamp(-8, 7).to(torch.int8)
        return {"weight_scale": scale, "weight_zero_point": zero}

    return scales


def ct_mx(top: float) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda w: {"weight_scale": 2.0 ** (e8m0(groups(w, 32).abs().amax(-1), top) - 127)}


def ct_rows(top: float) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda w: {"weight_scale": (w.float().abs().amax(-1, True) / top).bfloat16()}


def ct_block(w: Tensor) -> dict[str, Tensor]:
    return {"weight_scale": (block_amax(w) / 448).bfloat16()}


def ct_nvfp4(w: Tensor) -> dict[str, Tensor]:
    g = torch.tensor([2688.0]) / w.float().abs().amax()
    scale = (groups(w, 16).abs().amax(-1) / 6 * g).to(torch.float8_e4m3fn)
    return {"weight_scale": scale.float(), "weight_global_scale": g}


def ct_nvfp4_encoder(scheme: dict, input_amax: float | None) -> Encoder:
    """CT's bytes; the values are code * scale * (1/g) here, `theirs` are CT's code * (scale/g)."""
    inner = compressed("nvfp4-pack-quantized", scheme, scales=ct_nvfp4)
    parsed = QuantizationScheme(targets=["Linear"], **scheme)

    def encode(w: Tensor) -> Stored:
        stored = inner(w)
        packed, g = stored.tensors["weight_packed"], stored.tensors["weight_global_scale"]
        scale = stored.tensors["weight_scale"].float()
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
        values = torch.tensor(E2M1)[codes]
        extras = {
            "theirs": ct_dequantize(
                values, scale, args=parsed.weights, global_scale=g, dtype=torch.float32
            )
        }
        if input_amax is not None:
            stored.tensors["input_global_scale"] = torch.tensor([2688.0 / input_amax])
            extras["input_scale"] = 1.0 / stored.tensors["input_global_scale"]
        values = values * spread(scale, 16, w.shape[-1]) * (1.0 / g)
        return Stored(stored.tensors, values, extras)

    return encode


def nvfp4_modelopt(input_amax: float | None = 4.0, pre_scale: Tensor | None = None) -> Encoder:
    def encode(w: Tensor) -> Stored:
        second = w.float().abs().amax() / 2688
        scale = (groups(w, 16).abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
        wide = spread(scale.float(), 16, w.shape[-1])
        codes = e2m1_codes(w.float() / (wide * second).clamp(min=1e-30))
        tensors = {
            "weight": bytes_along_rows(codes),
            "weight_scale": scale,
            "weight_scale_2": second,
        }
        stored = Stored(tensors, torch.tensor(E2M1)[codes.long()] * wide * second)
        if input_amax is not None:
            tensors["input_scale"] = stored.extras["input_scale"] = torch.tensor(input_amax / 2688)
        if pre_scale is not None:
            tensors["pre_quant_scale"] = stored.extras["pre_scale"] = pre_scale[: w.shape[-1]]
        return stored

    return encode


def mxfp4(
    weight: str,
    scale: str,
    view: torch.dtype = torch.uint8,
    e8m0_dtype: bool = False,
    **static: float,
) -> Encoder:
    def encode(w: Tensor) -> Stored:
        exponent = e8m0(groups(w, 32).abs().amax(-1), 6.0)
        wide = spread(2.0 ** (exponent - 127), 32, w.shape[-1])
        codes = e2m1_codes(w.float() / wide)
        stored_scale = exponent.to(torch.uint8)
        tensors = {
            weight: bytes_along_rows(codes).view(view),
            scale: stored_scale.view(torch.float8_e8m0fnu) if e8m0_dtype else stored_scale,
        }
        extras = {name: torch.tensor(value) for name, value in static.items()}
        return Stored(tensors | extras, torch.tensor(E2M1)[codes.long()] * wide, extras)

    return encode


def mxfp8(scale_name: str, e8m0_dtype: bool) -> Encoder:
    def encode(w: Tensor) -> Stored:
        exponent = e8m0(groups(w, 32).abs().amax(-1), 448.0)
        wide = spread(2.0 ** (exponent - 127), 32, w.shape[-1])
        codes = (w.float() / wide).to(torch.float8_e4m3fn)
        scale = exponent.to(torch.uint8)
        scale = scale.view(torch.float8_e8m0fnu) if e8m0_dtype else scale
        return Stored({"weight": codes, scale_name: scale}, codes.float() * wide)

    return encode


def block_amax(w: Tensor, size: int = 128) -> Tensor:
    return torch.stack(
        [
            torch.stack([tile.float().abs().amax() for tile in row.split(size, 1)])
            for row in w.split(size, 0)
        ]
    )


def blocks(
    dtype: torch.dtype,
    scale_name: str,
    scale_dtype: torch.dtype = torch.float32,
    view: torch.dtype | None = None,
    axes: int = 2,
) -> Encoder:
    """fp8 or int8 in 128x128 blocks; e8m0 scales if scale_dtype is uint8."""
    top = 448.0 if dtype == torch.float8_e4m3fn else 127.0

    def encode(w: Tensor) -> Stored:
        scale = (block_amax(w) / top).to(
            scale_dtype if scale_dtype.is_floating_point else torch.float32
        )
        if scale_dtype == torch.uint8:
            scale = 2.0 ** (e8m0(block_amax(w), top) - 127)
        codes = torch.empty(w.shape, dtype=dtype)
        values = torch.empty(w.shape)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                tile, one = (
                    (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)),
                    scale[i, j],
                )
                scaled = (w[tile].float() / one.float()).clamp(-top, top)
                codes[tile] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
                values[tile] = codes[tile].float() * one.float()
        if scale_dtype == torch.uint8:
            scale = (scale.log2() + 127).to(torch.uint8)
        scale = scale if view is None else scale.view(view)
        stored = scale[:, None, :, None] if axes == 4 else scale
        return Stored({"weight": codes, scale_name: stored}, values)

    return encode


def rows(dtype: torch.dtype, scale_name: str, scale_dtype: torch.dtype, axes: int) -> Encoder:
    """fp8 or int8 with one scale per row, [N, 1] or [N]."""
    top = 448.0 if dtype == torch.float8_e4m3fn else 127.0

    def encode(w: Tensor) -> Stored:
        scale = (w.float().abs().amax(-1, keepdim=True) / top).to(scale_dtype)
        scaled = (w.float() / scale.float()).clamp(-top, top)
        codes = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        stored = scale if axes == 2 else scale[:, 0]
        return Stored({"weight": codes, scale_name: stored}, codes.float() * scale.float())

    return encode


def fp8_tensor(input_scale: float | None, shape: tuple[int, ...] = ()) -> Encoder:
    def encode(w: Tensor) -> Stored:
        scale = w.float().abs().amax() / 448
        codes = (w.float() / scale).to(torch.float8_e4m3fn)
        stored = Stored(
            {"weight": codes, "weight_scale": scale.reshape(shape)}, codes.float() * scale
        )
        if input_scale is not None:
            stored.tensors["input_scale"] = torch.tensor(input_scale).reshape(shape)
            stored.extras["input_scale"] = torch.tensor(input_scale)
        return stored

    return encode


def w4afp8(input_scale_dtype: torch.dtype) -> Encoder:
    """TensorRT-LLM's script: two's complement nibbles in int8, fp32 scales per 128, amax/7."""

    def encode(w: Tensor) -> Stored:
        codes, scale = int4_codes(w, 128, torch.float32)
        packed = bytes_along_rows(codes & 15).view(torch.int8)
        static = (w.float().abs().amax() * 3 / 448).to(input_scale_dtype)
        tensors = {"weight": packed, "weight_scale_inv": scale, "input_scale": static[None]}
        values = codes.float() * spread(scale, 128, w.shape[-1])
        return Stored(tensors, values, {"input_scale": static.float()})

    return encode


def row_pairs(
    group: int, pre_scale: Tensor, second: float | None, input_scale: float | None
) -> Encoder:
    """ModelOpt int4: byte [n, k] holds rows 2n (low) and 2n + 1 (high), two's complement."""

    def encode(w: Tensor) -> Stored:
        codes, scale = int4_codes(w, group, torch.float32)
        low, high = codes[0::2] & 15, codes[1::2] & 15
        extras = {"pre_scale": pre_scale[: w.shape[-1]]}
        tensors = {
            "weight": (low + 16 * high).to(torch.uint8),
            "weight_scale": scale,
            "pre_quant_scale": extras["pre_scale"],
        }
        if second is not None:
            tensors["weight_scale_2"] = torch.tensor(second)
        if input_scale is not None:
            tensors["input_scale"] = extras["input_scale"] = torch.tensor(input_scale)
        return Stored(tensors, codes.float() * spread(scale, group, w.shape[-1]), extras)

    return encode


def zero_point_codes(w: Tensor, group: int, lowest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes, zero points lowest..15, and fp16 scales, of each row's groups."""
    low, high = groups(w, group).amin(-1).clamp(max=0), groups(w, group).amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(lowest, 15).int()
    wide, wide_zero = spread(scale.float(), group, w.shape[-1]), spread(zero, group, w.shape[-1])
    return ((w.float() / wide).round() + wide_zero).clamp(0, 15).int(), zero, scale


def gptq(group: int, version: int, symmetric: bool, order: Tensor | None = None) -> Encoder:
    def encode(w: Tensor) -> Stored:
        if symmetric:
            codes, scale = int4_codes(w, group if group > 0 else None, torch.float16)
            codes, zero = codes + 8, torch.full(scale.shape, 8, dtype=torch.int32)
        else:
            codes, zero, scale = zero_point_codes(w, group, 1)
        size = group if group > 0 else w.shape[-1]
        values = (codes - spread(zero, size, w.shape[-1])).float() * spread(
            scale.float(), size, w.shape[-1]
        )
        natural = torch.arange(w.shape[-1], dtype=torch.int32) // size
        return Stored(
            {
                "qweight": words_along_rows(codes).T.contiguous(),
                "qzeros": words_along_rows(zero.T - (1 if version == 1 else 0)),
                "scales": scale.T.contiguous(),
                "g_idx": natural if order is None else natural[order],
            },
            values,
        )

    return encode


def awq(group: int) -> Encoder:
    def encode(w: Tensor) -> Stored:
        codes, zero, scale = zero_point_codes(w, group, 0)
        values = (codes - spread(zero, group, w.shape[-1])).float() * spread(
            scale.float(), group, w.shape[-1]
        )
        tensors = {
            "qweight": words_along_rows(codes.T, AWQ_ORDER),
            "qzeros": words_along_rows(zero.T, AWQ_ORDER),
            "scales": scale.T.contiguous(),
        }
        return Stored(tensors, values)

    return encode


def plain(dtype: torch.dtype) -> Encoder:
    return lambda w: Stored({"weight": w.to(dtype)}, w.to(dtype))


@dataclass(frozen=True)
class Sizes:
    experts: int = 3
    hidden: int = 64
    inter: int = 96
    moe_layers: tuple[int, ...] = (1, 2)

    def matrix(self, layer: int, expert: int, role: str) -> Tensor:
        """The bf16 weights to encode: unlike for every layer, expert and role."""
        seed = 1000 * layer + 10 * expert + ("gate", "up", "down").index(role)
        shape = (self.hidden, self.inter) if role == "down" else (self.inter, self.hidden)
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return (w * (1 + 0.1 * expert) * {"gate": 1.0, "up": 2.0, "down": 0.5}[role]).bfloat16()


PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def write_model(
    path: Path,
    encode: Encoder,
    sizes: Sizes,
    *,
    names: str = "model.layers.{layer}.mlp.experts.{expert}.{projection}.{suffix}",
    projections: dict[str, str] = PROJECTIONS,
    renamed: dict[str, str] | None = None,
    roles: tuple[str, ...] = ("gate", "up", "down"),
    shards: int = 3,
) -> dict[tuple[int, int, str], Stored]:
    """Write experts one by one, spread over shards with an index; return what each should read as.

    `renamed` gives other projection names to single suffixes.
    """
    tensors: dict[str, Tensor] = {}
    stored = {}
    for layer in sizes.moe_layers:
        for expert in range(sizes.experts):
            for role in roles:
                one = stored[layer, expert, role] = encode(sizes.matrix(layer, expert, role))
                for suffix, tensor in one.tensors.items():
                    projection = projections[role]
                    if renamed and suffix in renamed:
                        projection = MIXTRAL[role]
                    place = {"layer": layer, "expert": expert, "suffix": suffix}
                    tensors[names.format(projection=projection, **place)] = tensor
    save(path, tensors | other_tensors(sizes), shards)
    return stored


def other_tensors(sizes: Sizes) -> dict[str, Tensor]:
    """What else a model has: a dense layer, shared experts, routers, attention, an MTP module."""
    some = torch.ones(sizes.hidden, sizes.hidden, dtype=torch.bfloat16)
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.mtp.layers.0.mlp.experts.0.gate_proj.weight",
    ]
    return {name: some.clone() for name in names}


def save(path: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write tensors to `shards` files, which separates the tensors of an expert, or to one."""
    path.mkdir(exist_ok=True)
    if shards == 1:
        save_file(
            {k: v.clone().contiguous() for k, v in tensors.items()}, path / "model.safetensors"
        )
        return
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {
            k: v.clone().contiguous()
            for i, (k, v) in enumerate(tensors.items())
            if i % shards == shard
        }
        save_file(part, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_config(
    path: Path, sizes: Sizes, quantization: dict | None = None, **config: object
) -> None:
    path.mkdir(exist_ok=True)
    record = {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "num_experts": sizes.experts,
        "dtype": "bfloat16",
        **config,
    }
    if quantization is not None:
        record["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(record))
