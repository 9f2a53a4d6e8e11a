"""Which experts each token visits, and with what weight: router logits [T, E] to a `Routing`.

Selection order, in every method and on every device: NaN of either sign, +inf, finite values
descending, -inf; -0 equals +0; equal scores go to the lower id. So the ids of a row are distinct
and in 0..E-1. A logit of -inf masks its expert: it is taken only when no other is left. Scores are
fp32, the formula's value rounded once (evaluated in fp64), so equal logits tie in every position
and a row does not depend on its batch. Weights are fp32 and follow their formula: NaN or +inf
logits may make NaN weights, in their own row only. Not here: the router GEMM, dropping or balancing
tokens, and the map from global to local ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from moelten.errors import UnsupportedError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTS = (torch.int32, torch.int64)
_EPS = 1e-20
_INF = float("inf")


@dataclass(frozen=True, eq=False)
class Routing:
    """Experts and weights chosen for each token; the input of the MoE layer.

    Args:
        ids: [T, top_k] int32 or int64, global expert ids. Ids outside the local range (-1 for one)
            are legal and contribute exactly 0; an id may repeat in a row, its weights add up.
        weights: [T, top_k] float32, bfloat16 or float16, on the same device; any sign.
        on_input: the weight multiplies the expert's input, not its output (Llama-4).

    Raises TypeError for a field of another Python type, ValueError for another dtype, shape or
    device. Values are never inspected: no device sync, and it traces under torch.compile.

    >>> r = Routing(torch.tensor([[3, -1]]), torch.tensor([[0.75, 0.25]]))
    >>> r.num_tokens, r.top_k
    (1, 2)
    """

    ids: Tensor
    weights: Tensor
    on_input: bool = False

    def __post_init__(self) -> None:
        _check_tensor("Routing.ids", self.ids, _INTS, "[T, top_k]")
        _check_tensor("Routing.weights", self.weights, _FLOATS, "[T, top_k]")
        if self.ids.shape != self.weights.shape or self.ids.device != self.weights.device:
            raise ValueError(
                "Routing: expected ids and weights of one shape on one device, got "
                f"{_describe(self.ids)} on {self.ids.device} and {_describe(self.weights)} on "
                f"{self.weights.device}; gather the selected weights, move them with .to(device)"
            )
        if not isinstance(self.on_input, bool):
            raise TypeError(
                f"Routing.on_input: expected a bool, got {type(self.on_input).__name__}; "
                "pass True where the weight scales the expert's input"
            )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.ids.shape[1]

    @classmethod
    def from_words(cls, words: Tensor, *, on_input: bool = False) -> Routing:
        """Unpack int32 words [T, top_k], the input of FlashInfer's `trtllm_*_routed_moe`::

            id = word >> 16 (arithmetic: -1 survives)     weight = bfloat16 of bits word & 0xFFFF

        Returns int32 ids and bfloat16 weights. The word has no room for `on_input`: state it again.
        Raises ValueError for another dtype or rank.

        >>> r = Routing.from_words(torch.tensor([[0x00033F40, 0xBF00 - 2**16]], dtype=torch.int32))
        >>> r.ids.tolist(), r.weights.tolist()
        ([[3, -1]], [[0.75, -0.5]])
        """
        _check_tensor("words", words, (torch.int32,), "[T, top_k]")
        bits = (words & 0xFFFF).to(torch.int16)
        return cls(words >> 16, bits.view(torch.bfloat16), on_input)

    def to_words(self) -> Tensor:
        """Pack into int32 words [T, top_k]: ``(id << 16) | (bits of bfloat16(weight) & 0xFFFF)``.

        Weights round half to even. Raises ValueError for an id outside int16; that check reads the
        ids back, so it waits for the device and cannot run inside CUDA-graph capture.

        >>> r = Routing(torch.tensor([[3, 5]]), torch.tensor([[0.75, -0.5]]))
        >>> [hex(word) for word in r.to_words()[0].tolist()]
        ['0x33f40', '0x5bf00']
        """
        low, high = (int(v) for v in self.ids.aminmax()) if self.ids.numel() else (0, 0)
        if low < -(2**15) or high >= 2**15:
            raise ValueError(
                f"Routing.to_words: expected ids in -32768..32767 (16 bits), got {low}..{high}; "
                "pass ids and weights unpacked, or mark skipped slots with -1"
            )
        # NOTE: the mask keeps a negative weight's sign bit out of the id.
        bits = self.weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
        return (self.ids.to(torch.int32) << 16) | bits


def softmax_topk(logits: Tensor, top_k: int) -> Routing:
    """Select on the softmax over all experts and keep its values, not renormalised::

        p = softmax(s);  ids = top_k(p);  w = p[ids]

    Args, in every method:
        logits: [T, E] float32, bfloat16 or float16; T may be 0.
        top_k: experts per token, 1..E.

    Returns ids int32 and weights float32, both [T, top_k], by descending selection score. Raises,
    in every method, TypeError where `logits` is no tensor or `top_k` no int, and ValueError for
    another dtype or rank of `logits` or a `top_k` out of range.

    Source: `Default` of FlashInfer's RoutingMethodType; Qwen3-MoE without norm_topk_prob. One NaN
    or +inf logit makes the whole softmax NaN: then the lowest unmasked ids are taken.

    >>> r = softmax_topk(torch.tensor([[1., 3., 2., 3.]]), 2)
    >>> r.ids.tolist(), r.weights
    ([[1, 3]], tensor([[0.3995, 0.3995]]))
    """
    _check_logits(logits, top_k)
    probs = _wide(logits).softmax(dim=-1).float()
    return Routing(*_take(probs, _choice(probs, logits), top_k))


def topk_softmax(logits: Tensor, top_k: int) -> Routing:
    """Select on the raw logits (in their own dtype), then take the softmax of the selected ones::

        ids = top_k(s);  w = softmax(s[ids])

    Source: `Renormalize` of FlashInfer; gpt-oss. Arguments and errors: `softmax_topk`.

    >>> r = topk_softmax(torch.tensor([[1., 3., 2., 3.]]), 3)
    >>> r.ids.tolist(), r.weights
    ([[1, 3, 2]], tensor([[0.4223, 0.4223, 0.1554]]))
    """
    _check_logits(logits, top_k)
    ids, selected = _take(logits, logits, top_k)
    return Routing(ids, _wide(selected).softmax(dim=-1).float())


def softmax_topk_renormalize(logits: Tensor, top_k: int) -> Routing:
    """Select on the softmax over all experts and rescale the selected values to sum to 1::

        p = softmax(s);  ids = top_k(p);  w = p[ids] / sum(p[ids])

    `topk_softmax` but for ties: distinct logits may have one fp32 value p. Source: Mixtral, Qwen3;
    `RenormalizeNaive` of FlashInfer, run as `topk_softmax`. Arguments and errors: `softmax_topk`.

    >>> softmax_topk_renormalize(torch.tensor([[1., 3., 2., 3.]]), 3).weights
    tensor([[0.4223, 0.4223, 0.1554]])
    """
    probs = softmax_topk(logits, top_k)
    return Routing(probs.ids, probs.weights / probs.weights.sum(dim=-1, keepdim=True))


def topk_raw(logits: Tensor, top_k: int) -> Routing:
    """Select on the raw logits and use them as weights: ``ids = top_k(s);  w = s[ids]``.

    Weights may be negative, and -inf for a masked expert that has to be taken. Source: `TopK` of
    FlashInfer. Arguments and errors: `softmax_topk`.

    >>> topk_raw(torch.tensor([[-1., -3., 2., -3.]]), 3).weights
    tensor([[ 2., -1., -3.]])
    """
    _check_logits(logits, top_k)
    ids, selected = _take(logits, logits, top_k)
    return Routing(ids, selected.float())


def sigmoid_topk(logits: Tensor, top_k: int) -> Routing:
    """Select on the sigmoid and keep its values: ``p = sigmoid(s);  ids = top_k(p);  w = p[ids]``.

    Logits above about 17.4 saturate (p = 1) and tie. Source: `Sigmoid` of FlashInfer. Arguments and
    errors: `softmax_topk`.

    >>> sigmoid_topk(torch.tensor([[18., 0., 25., 3.]]), 3).ids.tolist()
    [[0, 2, 3]]
    """
    _check_logits(logits, top_k)
    probs = _wide(logits).sigmoid().float()
    return Routing(*_take(probs, _choice(probs, logits), top_k))


def topk_sigmoid(logits: Tensor, top_k: int) -> Routing:
    """Select on the raw logits, weigh with their sigmoid: ``ids = top_k(s);  w = sigmoid(s[ids])``.

    Differs from `sigmoid_topk` only where the sigmoid saturates. Source: `TopKSigmoid` of
    FlashInfer. Arguments and errors: `softmax_topk`.

    >>> topk_sigmoid(torch.tensor([[18., 0., 25., 3.]]), 3).ids.tolist()
    [[2, 0, 3]]
    """
    _check_logits(logits, top_k)
    ids, selected = _take(logits, logits, top_k)
    return Routing(ids, _wide(selected).sigmoid().float())


def sigmoid_topk_renormalize(logits: Tensor, top_k: int) -> Routing:
    """Select on the sigmoid and rescale the selected values to sum to 1::

        p = sigmoid(s);  ids = top_k(p);  w = p[ids] / max(sum(p[ids]), 1e-20)

    Source: `SigmoidRenorm` of FlashInfer with normTopkProb. Arguments and errors: `softmax_topk`.

    >>> sigmoid_topk_renormalize(torch.tensor([[0., 0., 25., -1.]]), 3).weights
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    probs = sigmoid_topk(logits, top_k)
    return Routing(probs.ids, probs.weights / probs.weights.sum(dim=-1, keepdim=True).clamp(_EPS))


def minimax2(
    logits: Tensor, top_k: int, bias: Tensor, *, routed_scaling_factor: float = 1.0
) -> Routing:
    """Select on the biased sigmoid; weigh with the unbiased one, rescaled::

        p = sigmoid(s);  ids = top_k(p + b);  w = p[ids] / (sum(p[ids]) + 1e-20) * scaling

    `bias` is [E] floating, used in fp32 (bfloat16 rounding moves ids); other arguments and errors:
    `softmax_topk`. Source: MiniMax-M2; `MiniMax2` of FlashInfer and TensorRT-LLM.

    >>> minimax2(torch.zeros(1, 4), 2, torch.tensor([0., -1., 0.5, 0.])).ids.tolist()
    [[2, 0]]
    """
    _check_tensor("bias", bias, _FLOATS, "[E]")
    return deepseek_v3(logits, top_k, bias, routed_scaling_factor=routed_scaling_factor)


def deepseek_v3(
    logits: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    *,
    num_expert_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
    norm_topk_prob: bool = True,
) -> Routing:
    """Select on the biased sigmoid within the best groups of experts; weigh with the unbiased one::

        p = sigmoid(s);  c = p + b
        group score = sum of its two largest c  (its largest p where there is no bias)
        ids = top_k(c in the topk_group best groups)
        w = p[ids] / (sum(p[ids]) + 1e-20) * scaling       (norm_topk_prob False: p[ids] * scaling)

    Experts of other groups are never taken (as if -inf, not 0), however negative c is. Groups are
    runs of consecutive experts; one with fewer than two unmasked experts scores -inf.

    Args:
        bias: [E] floating (e_score_correction_bias), used in fp32; or None.
        num_expert_group: number of groups, a divisor of E; 1 for no groups.
        topk_group: groups kept, 1..num_expert_group, of at least `top_k` experts together.
        routed_scaling_factor: multiplies the weights (2.5 in DeepSeek-V3).

    Other arguments and errors: `softmax_topk`; ValueError for these too. Source: DeepSeek-V3's
    inference code and transformers (bias), vLLM (no bias).

    >>> s, b = torch.tensor([[0., 0., 3., -3.]]), torch.tensor([1., 1., 0., 0.])
    >>> r = deepseek_v3(s, 2, b, num_expert_group=2, topk_group=1, routed_scaling_factor=2.5)
    >>> r.ids.tolist(), r.weights
    ([[0, 1]], tensor([[1.2500, 1.2500]]))
    """
    _check_logits(logits, top_k)
    size = _check_groups(logits.shape[1], top_k, num_expert_group, topk_group)
    probs = _wide(logits).sigmoid().float()
    choice = _choice(probs, logits, bias)
    if topk_group == num_expert_group:
        ids, weights = _take(probs, choice, top_k)
    else:
        best = choice.unflatten(1, [num_expert_group, size]).topk(
            1 if bias is None else min(2, size)
        )
        groups = _top(best.values.sum(dim=-1), topk_group).sort(dim=-1).values.unsqueeze(-1)
        experts = (groups * size + torch.arange(size, device=logits.device)).flatten(1)
        ids = experts.gather(1, _top(choice.gather(1, experts), top_k))
        ids, weights = ids.int(), probs.gather(1, ids)
    return Routing(
        ids, (_normalize(weights) if norm_topk_prob else weights) * routed_scaling_factor
    )


def llama4(logits: Tensor, top_k: int = 1) -> Routing:
    """Select the largest logit; its sigmoid multiplies the expert's input (`on_input`)::

        id = argmax(s);  w = sigmoid(s[id])

    Arguments and errors: `softmax_topk`; ValueError for a `top_k` other than 1. Source: Llama-4 in
    transformers, which scales the hidden states; `Llama4` of FlashInfer.

    >>> r = llama4(torch.tensor([[1., 3., 2., 3.]]))
    >>> r.ids.tolist(), r.weights, r.on_input
    ([[1]], tensor([[0.9526]]), True)
    """
    if top_k != 1:
        raise ValueError(f"llama4: expected top_k=1, got {top_k!r}; topk_sigmoid takes any top_k")
    routing = topk_sigmoid(logits, top_k)
    return Routing(routing.ids, routing.weights, on_input=True)


def sqrt_softplus_topk(
    logits: Tensor, top_k: int, bias: Tensor | None = None, *, routed_scaling_factor: float = 1.0
) -> Routing:
    """Select on the (biased) square root of softplus; weigh with the unbiased one, rescaled::

        p = sqrt(log(1 + e^s));  ids = top_k(p + b);  w = p[ids] / (sum(p[ids]) + 1e-20) * scaling

    `bias` is [E] floating, used in fp32, or None; other arguments and errors: `softmax_topk`.
    Source: DeepSeek-V4 (not its hash-routed layers, which look ids up); `DeepseekV4` of vLLM.

    >>> sqrt_softplus_topk(torch.tensor([[0., 4., -4., 4.]]), 3, routed_scaling_factor=1.5).weights
    tensor([[0.6210, 0.6210, 0.2579]])
    """
    _check_logits(logits, top_k)
    # Past the threshold torch returns s itself: its default of 20 is off by 1e-10, 40 is exact.
    scores = torch.nn.functional.softplus(_wide(logits), threshold=40.0).sqrt().float()
    ids, weights = _take(scores, _choice(scores, logits, bias), top_k)
    return Routing(ids, _normalize(weights) * routed_scaling_factor)


RoutingMethod: TypeAlias = Callable[..., Routing]

# RoutingMethodType of FlashInfer 0.7.2, TensorRT-LLM and vLLM 0.33: one number, different methods.
_LIBRARIES = ("flashinfer", "tensorrt_llm", "vllm")
_ENUMS: tuple[tuple[str, RoutingMethod | None, tuple[int | None, ...]], ...] = (
    ("Default", softmax_topk, (0, 0, 0)),
    ("Renormalize", topk_softmax, (1, 1, 1)),
    ("DeepSeekV3", deepseek_v3, (2, 2, 2)),
    ("Llama4", llama4, (3, 3, 3)),
    ("RenormalizeNaive", softmax_topk_renormalize, (4, 4, 4)),
    ("TopK", topk_raw, (5, None, 5)),
    ("SigmoidRenorm", sigmoid_topk_renormalize, (6, None, 6)),
    ("MiniMax2", minimax2, (7, 5, 7)),
    ("Sigmoid", sigmoid_topk, (8, None, 8)),
    ("TopKSigmoid", topk_sigmoid, (9, None, None)),
    ("DeepseekV4", sqrt_softplus_topk, (None, None, 100)),
    ("Unspecified", None, (10, 6, 9)),
    ("AdaptiveK", None, (None, 7, None)),
    ("Custom", None, (None, None, 101)),
    ("Simulated", None, (None, None, 102)),
)
METHODS: dict[str, RoutingMethod] = {f.__name__: f for _, f, _ in _ENUMS if f is not None}


def method_from_enum(library: str, value: int) -> str:
    """Name in `METHODS` of a RoutingMethodType value of "flashinfer", "tensorrt_llm" or "vllm".

    Raises ValueError for an unknown library or a value that its enum lacks, NotImplementedError for
    a value without a method here (Unspecified, AdaptiveK, Custom, Simulated).

    >>> [method_from_enum(library, 5) for library in ("flashinfer", "tensorrt_llm", "vllm")]
    ['topk_raw', 'minimax2', 'topk_raw']
    """
    if library not in _LIBRARIES:
        raise ValueError(f"method_from_enum: expected library in {_LIBRARIES}, got {library!r}")
    column = _LIBRARIES.index(library)
    rows = {values[column]: (name, f) for name, f, values in _ENUMS if values[column] is not None}
    supported = {number: name for number, (name, f) in rows.items() if f is not None}
    if value not in rows:
        raise ValueError(
            f"method_from_enum: {library} has no RoutingMethodType {value!r}, expected one of "
            f"{supported}; check which library the number comes from"
        )
    name, method = rows[value]
    if method is None:
        raise UnsupportedError(
            f"method_from_enum: {library}'s {name} ({int(value)}) has no method here; supported "
            f"are {supported}; otherwise build Routing(ids, weights) yourself"
        )
    return method.__name__


def _wide(logits: Tensor) -> Tensor:
    # NOTE: torch's fp32 sigmoid on CPU differs by an ulp between SIMD lanes and the scalar tail,
    # which breaks ties by position and makes a row depend on its batch. MPS has no fp64.
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)


def _choice(scores: Tensor, logits: Tensor, bias: Tensor | None = None) -> Tensor:
    """What selection compares: the scores, biased, and masked where the logit is -inf."""
    if bias is not None:
        _check_tensor("bias", bias, _FLOATS, "[E]")
        if bias.shape[0] != logits.shape[1] or bias.device != logits.device:
            raise ValueError(
                f"bias: expected [{logits.shape[1]}], one value per expert, on {logits.device}, "
                f"got {_describe(bias)} on {bias.device}; pass it whole, move it with .to(device)"
            )
        scores = scores + bias.float()
    return scores.masked_fill(logits == -_INF, -_INF)


def _top(choice: Tensor, count: int) -> Tensor:
    """Columns of the `count` highest values (int64), in the order of the module docstring."""
    # NOTE: x86 makes negative NaN and CUDA positive; a radix sort would tell them apart.
    choice = choice.masked_fill(choice.isnan(), float("nan"))
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _take(scores: Tensor, choice: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    ids = _top(choice, top_k)
    return ids.int(), scores.gather(1, ids)


def _normalize(weights: Tensor) -> Tensor:
    return weights / (weights.sum(dim=-1, keepdim=True) + _EPS)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], axes: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes or tensor.ndim != axes.count(",") + 1:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {allowed} {axes}, got {_describe(tensor)}; "
            f"cast with .to({dtypes[0]}), reshape with .view()"
        )


def _check_logits(logits: Tensor, top_k: int) -> None:
    _check_tensor("logits", logits, _FLOATS, "[T, E]")
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"top_k: expected an int, got {type(top_k).__name__}; cast it with int()")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"top_k: expected 1..{logits.shape[1]} for logits {_describe(logits)}, got {top_k}; "
            "check that the columns of logits are the experts"
        )


def _check_groups(num_experts: int, top_k: int, num_expert_group: int, topk_group: int) -> int:
    """Experts per group."""
    if num_expert_group < 1 or num_experts % num_expert_group:
        raise ValueError(
            f"num_expert_group: expected a divisor of {num_experts} experts, got "
            f"{num_expert_group}; pass n_group of the model's configuration"
        )
    size = num_experts // num_expert_group
    if not 1 <= topk_group <= num_expert_group or top_k > topk_group * size:
        raise ValueError(
            f"topk_group: expected 1..{num_expert_group} groups of {size} experts holding "
            f"top_k={top_k}, got {topk_group}; pass topk_group of the model's configuration"
        )
    return size
