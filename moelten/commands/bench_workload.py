"""What is benchmarked: layers of real models, random experts in any scheme, draws of tokens.

Experts are one Gaussian expert with its rows in other orders: as random to the hardware, and as
fast to make as a copy, for hundreds of experts on either kind of device. A draw is one call's
inputs and routing. Everything is made on the device of the generator that is passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moelten.activations import GPT_OSS, Activation, SwiGLU
from moelten.errors import FormatError, UnsupportedError
from moelten.formats import Float, Scheme
from moelten.kernels import backend_of
from moelten.moe import fused_moe
from moelten.packed import PackedExperts
from moelten.qtensor import NVFP4_RANGE, QTensor, quantize
from moelten.routing import Routing, softmax_topk_renormalize
from moelten.weights import EXTRAS, ExpertSpec, ExpertWeights

ROUTINGS = ("uniform", "zipf", "onehot")
_SIZES = {"hidden_size": "H", "intermediate_size": "I", "num_experts": "E", "top_k": "k"}
_GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """One MoE layer of a model: its sizes, its activation, and whether its experts have biases."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: Activation = SwiGLU()
    biases: bool = False

    def spec(self, scheme: Scheme) -> ExpertSpec:
        """The layer's experts in a scheme."""
        sizes = self.num_experts, self.hidden_size, self.intermediate_size
        extras = tuple(
            name
            for name in EXTRAS
            if (self.biases and name.endswith("_bias"))
            or (scheme.static and name.endswith("_input_scale"))
        )
        return ExpertSpec(scheme, *sizes, self.activation, extras)

    def flops(self, tokens: int) -> float:
        """Useful work of a call: two per weight of every (token, slot); padding does not count."""
        halves = self.activation.halves + 1
        return 2.0 * halves * tokens * self.top_k * self.hidden_size * self.intermediate_size


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("small", 2048, 1024, 32, 4),
        Shape("A", 4096, 2048, 256, 6),
        Shape("gpt-oss-20b", 2880, 2880, 32, 4, GPT_OSS, biases=True),
        Shape("gpt-oss-120b", 2880, 2880, 128, 4, GPT_OSS, biases=True),
        Shape("deepseek-v3", 7168, 2048, 256, 8),
        Shape("kimi-k2", 7168, 2048, 384, 8),
        Shape("qwen3-30b", 2048, 768, 128, 8),
        Shape("qwen3-235b", 4096, 1536, 128, 8),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2),
    )
}


def find_shape(name: str, sizes: dict[str, int]) -> Shape:
    """A named shape, with `sizes` (fields of Shape) in place of its own.

    >>> find_shape("A", {"num_experts": 64}).name
    'A(E=64)'
    """
    if name not in SHAPES:
        raise UnsupportedError(f"unknown shape {name!r}; shapes: {', '.join(SHAPES)}")
    for size, value in sizes.items():
        if value < 1:
            raise FormatError(f"{size} is at least 1, got {value}")
    label = ",".join(f"{_SIZES[size]}={value}" for size, value in sizes.items())
    fields: dict[str, Any] = sizes | ({"name": f"{name}({label})"} if sizes else {})
    shape = replace(SHAPES[name], **fields)
    if shape.top_k > shape.num_experts:
        raise FormatError(f"top_k is 1..{shape.num_experts} (num_experts), got {shape.top_k}")
    return shape


@dataclass(frozen=True)
class Draw:
    """One call's inputs: x [T, H] and its routing."""

    x: Tensor
    routing: Routing

    def active_experts(self) -> int:
        """How many experts the routing visits."""
        return len(set(self.routing.ids.flatten().tolist()))


def make_draw(
    scheme: Scheme, shape: Shape, tokens: int, routing: str, generator: torch.Generator
) -> Draw:
    """Fresh inputs and fresh routing of one of the `ROUTINGS`."""
    fmt = scheme.activations
    dtype = fmt.data_dtype if isinstance(fmt, Float) else torch.bfloat16
    x = _normal(generator, tokens, shape.hidden_size).to(dtype)
    return Draw(x, draw_routing(routing, tokens, shape.num_experts, shape.top_k, generator))


def draw_routing(
    kind: str, tokens: int, experts: int, top_k: int, generator: torch.Generator
) -> Routing:
    """Distinct experts per token.

    uniform: all alike; zipf: the expert of rank r is wanted like 1/r, ranks dealt anew in every
    draw; onehot: one expert, another in every draw, is visited by every token.
    """
    device = generator.device
    logits = torch.zeros(experts, device=device)
    order = torch.randperm(experts, generator=generator, device=device)
    if kind == "zipf":
        logits[order] = -torch.arange(1, experts + 1, device=device).float().log()
    elif kind == "onehot":
        logits[order[0]] = 100.0
    # Gumbel noise: the top k are a sample without replacement from softmax(logits).
    uniform = torch.rand(tokens, experts, generator=generator, device=device).clamp_min(1e-20)
    ids = softmax_topk_renormalize(logits - (-uniform.log()).log(), top_k).ids
    # Weights of their own: those of a hot expert's logits would leave all others unchecked.
    return Routing(ids, _normal(generator, tokens, top_k).softmax(-1))


@dataclass(frozen=True)
class Layer:
    """Random experts of a shape in a scheme, packed; draws come from `generator`.

    backend: the one that was asked for, None for the first that runs
    """

    scheme: Scheme
    shape: Shape
    backend: str | None
    generator: torch.Generator
    packed: PackedExperts

    @property
    def backend_name(self) -> str:
        return self.backend or backend_of(self.packed.layout.name, self.packed.device).name

    def draw(self, tokens: int, routing: str) -> Draw:
        return make_draw(self.scheme, self.shape, tokens, routing, self.generator)

    def run(self, draw: Draw, experts: PackedExperts, out: Tensor | None = None) -> Tensor:
        """The call that is timed, on `packed` or a copy of it."""
        return fused_moe(draw.x, experts, draw.routing, out=out, backend=self.backend)

    def copy(self) -> PackedExperts:
        """The packed experts once more, in memory of their own."""
        tensors = {name: part.clone() for name, part in self.packed.tensors.items()}
        return replace(self.packed, tensors=tensors)


def random_expert(spec: ExpertSpec, generator: torch.Generator) -> ExpertWeights:
    """One expert (E = 1) of a layer; its outputs have about the magnitude of its inputs."""
    one = replace(spec, num_experts=1)
    fmt, activations = spec.scheme.weights, spec.scheme.activations
    # Static activation scales hold values up to 6.
    static = 6.0 / (NVFP4_RANGE if activations.packed else activations.max_code)
    extras: dict[str, Any] = {
        name: _normal(generator, *one.extra_shape(name)) * 0.3
        if name.endswith("_bias")
        else torch.full((1,), static, device=generator.device)
        for name in spec.extras
    }
    w13 = _normal(generator, 1, *spec.matrix_shape("w13")) * spec.hidden_size**-0.5
    w2 = _normal(generator, 1, *spec.matrix_shape("w2")) * spec.intermediate_size**-0.5
    matrices = quantize(w13, fmt), quantize(w2, fmt)
    return ExpertWeights(*matrices, spec.activation, activations, **extras)


def derive_experts(first: ExpertWeights, count: int) -> Iterator[ExpertWeights]:
    """`first`, then others like it: its rows in other orders, scales and biases with them."""
    for expert in range(count):
        w13, w2 = roll_matrix(first.w13, expert), roll_matrix(first.w2, expert)
        biases: dict[str, Any] = {
            name: part.roll(expert, -1)
            for name, part in first.extras().items()
            if name.endswith("_bias")
        }
        yield replace(first, w13=w13, w2=w2, **biases)


def roll_matrix(matrix: QTensor, expert: int) -> QTensor:
    """Rows in another order: all scale blocks but a partial last one move on by `expert`."""
    block = matrix.format.block[0] or 1
    blocks = matrix.shape[-2] // block
    parts = {"data": roll_rows(matrix.data, expert * block, blocks * block)}
    for name in ("scale", "zero"):
        part = getattr(matrix, name)
        if part is not None and matrix.format.block[0] is not None:
            parts[name] = roll_rows(part, expert, blocks)
    return matrix.with_parts(parts)


def roll_rows(part: Tensor, shift: int, rows: int) -> Tensor:
    """The first `rows` rows of [..., rows, columns] moved on by `shift`, those after them kept."""
    raw = part.view(torch.uint8) if part.is_floating_point() else part  # float8 cannot roll
    return torch.cat((raw[..., :rows, :].roll(shift, -2), raw[..., rows:, :]), -2).view(part.dtype)


def require_memory(needed: float, available: int, what: str, experts: int) -> None:
    """Refuse what does not fit, saying how many of its `experts` would."""
    if needed > 0.9 * available:
        fit = int(0.9 * available / needed * experts)
        raise UnsupportedError(
            f"{what} needs {needed / _GIB:.1f} GiB of memory, {available / _GIB:.1f} GiB are free; "
            + (f"{fit} experts would fit: --num-experts" if fit else "choose a smaller shape")
        )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)
