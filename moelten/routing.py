"""Which experts each token visits, and with what weight: router logits [T, E] to a `Routing`.

Selection order, in every method and on every device: NaN of either sign, +inf, finite values
descending, -inf; -0 equals +0; equal scores go to the lower id. So the ids of a row are distinct
and in 0..E-1. A logit of -inf masks its expert: it is taken only when no other is left. Scores are
fp32, the formula's value rounded once (evaluated in fp64), so equal logits tie in every position
and a row does not depend on its batch. Weights are fp32 and follow their formula: NaN or +inf
logits may make NaN weights, in their own row only. `softmax_topk` documents the arguments and
errors that all methods share. `moelten.router` runs these methods in one launch where the logits
are on a GPU. Not here: the router GEMM, balancing, the map to local ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moelten.errors import UnsupportedError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EPS = 1e-20


@dataclass(frozen=True, eq=False)
class Routing:
    """Experts and weights chosen for each token; the input of the MoE layer.

    Args:
        ids: [T, top_k] int32 or int64, global expert ids. Ids outside the local range (-1 for one)
            are legal and contribute exactly 0; an id may repeat in a row, its weights add up.
        weights: [T, top_k] float32, bfloat16 or float16, on the same device; any sign.
        on_input: the weight multiplies the expert's input, not its output (Llama-4).

    Raises TypeError for a field of another Python type, ValueError for another dtype, shape or
    device. Values are never inspected, so this neither syncs nor breaks a compiled graph.

    >>> Routing(torch.tensor([[3, -1]]), torch.tensor([[0.75, 0.25]])).top_k
    2
    """

    ids: Tensor
    weights: Tensor
    on_input: bool = False

    def __post_init__(self) -> None:
        _check_tensor("Routing.ids", self.ids, (torch.int32, torch.int64), "[T, top_k]")
        _check_tensor("Routing.weights", self.weights, _FLOATS, "[T, top_k]")
        if self.ids.shape != self.weights.shape or self.ids.device != self.weights.device:
            raise ValueError(
                "Routing: expected ids and weights of one shape on one device, got "
                f"{_describe(self.ids)} on {self.ids.device} and {_describe(self.weights)} on "
                f"{self.weights.device}; gather the selected weights, move them with .to(device)"
            )
        if not isinstance(self.on_input, bool):
            raise TypeError(f"Routing.on_input: expected True or False, got {type(self.on_input)}")

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @classmethod
    def from_words(cls, words: Tensor, *, on_input: bool = False) -> Routing:
        """Unpack int32 words [T, top_k]: ``id = word >> 16, weight = bfloat16 of word & 0xFFFF``.

        FlashInfer's routed MoE functions take such words. Returns int32 ids and bfloat16 weights;
        the word has no room for `on_input`: state it again. Raises ValueError as `Routing` does.

        >>> Routing.from_words(torch.tensor([[0x00033F40]], dtype=torch.int32)).weights
        tensor([[0.7500]], dtype=torch.bfloat16)
        """
        _check_tensor("words", words, (torch.int32,), "[T, top_k]")
        return cls(words >> 16, (words & 0xFFFF).to(torch.int16).view(torch.bfloat16), on_input)

    def to_words(self) -> Tensor:
        """Pack into int32 words [T, top_k]: ``(id << 16) | (bits of bfloat16(weight) & 0xFFFF)``.

        Weights round half to even. Raises ValueError for an id outside int16; that check reads the
        ids back, so it waits for the device and cannot run inside CUDA-graph capture.

        >>> hex(Routing(torch.tensor([[5]]), torch.tensor([[-0.5]])).to_words().item())
        '0x5bf00'
        """
        low, high = (int(v) for v in self.ids.aminmax()) if self.ids.numel() else (0, 0)
        if low < -(2**15) or high >= 2**15:
            raise ValueError(f"Routing.to_words: expected int16 ids, got {low}..{high}; -1 skips")
        # NOTE: the mask keeps a negative weight's sign bit out of the id.
        bits = self.weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
        return (self.ids.to(torch.int32) << 16) | bits


def softmax_topk(logits: Tensor, top_k: int) -> Routing:
    """Select on the softmax and keep its values: ``p = softmax(s);  ids = top_k(p);  w = p[ids]``.

    Args, in every method:
        logits: [T, E] float32, bfloat16 or float16; T may be 0.
        top_k: experts per token, 1..E.

    Returns ids int32 and weights float32, both [T, top_k], by descending selection score. Raises,
    in every method, TypeError where `logits` is no tensor, ValueError for another dtype or rank or
    a `top_k` out of range. One NaN or +inf logit makes the whole softmax NaN: then the lowest
    unmasked ids are taken. Source: FlashInfer `Default`; Qwen3-MoE without norm_topk_prob.

    >>> r = softmax_topk(torch.tensor([[1., 3., 2., 3.]]), 2)
    >>> r.ids.tolist(), r.weights
    ([[1, 3]], tensor([[0.3995, 0.3995]]))
    """
    check_logits(logits, top_k)
    probs = _wide(logits).softmax(dim=-1).float()
    ids = _top(_choice(probs, logits), top_k)
    return Routing(ids.int(), probs.gather(1, ids))


def topk_softmax(logits: Tensor, top_k: int) -> Routing:
    """Select on the raw logits, weigh with their softmax: ``ids = top_k(s);  w = softmax(s[ids])``.

    Logits compare in their own dtype. Source: FlashInfer `Renormalize`; gpt-oss.

    >>> topk_softmax(torch.tensor([[1., 3., 2., 3.]]), 3).weights
    tensor([[0.4223, 0.4223, 0.1554]])
    """
    raw = topk_raw(logits, top_k)
    return Routing(raw.ids, _wide(raw.weights).softmax(dim=-1).float())


def softmax_topk_renormalize(logits: Tensor, top_k: int) -> Routing:
    """Select on the softmax p of all experts and rescale to sum 1: ``w = p[ids] / sum(p[ids])``.

    `topk_softmax` but for ties: distinct logits may have one fp32 value p. Source: Mixtral, Qwen3;
    FlashInfer `RenormalizeNaive`, which its kernels run as `topk_softmax`.

    >>> softmax_topk_renormalize(torch.tensor([[1., 3., 2., 3.]]), 3).weights
    tensor([[0.4223, 0.4223, 0.1554]])
    """
    probs = softmax_topk(logits, top_k)
    return Routing(probs.ids, probs.weights / probs.weights.sum(dim=-1, keepdim=True))


def topk_raw(logits: Tensor, top_k: int) -> Routing:
    """Select on the raw logits and use them as weights: ``ids = top_k(s);  w = s[ids]``.

    Negative weights are legal; a masked expert, if taken, has -inf. Source: FlashInfer `TopK`.

    >>> topk_raw(torch.tensor([[-1., -3., 2., -3.]]), 3).weights
    tensor([[ 2., -1., -3.]])
    """
    check_logits(logits, top_k)
    ids = _top(logits, top_k)
    return Routing(ids.int(), logits.gather(1, ids).float())


def sigmoid_topk(logits: Tensor, top_k: int) -> Routing:
    """Select on the sigmoid and keep its values: ``p = sigmoid(s);  ids = top_k(p);  w = p[ids]``.

    Saturated logits (p = 1, above about 17.4) tie. Source: FlashInfer `Sigmoid`.

    >>> sigmoid_topk(torch.tensor([[18., 0., 25., 3.]]), 3).ids.tolist()
    [[0, 2, 3]]
    """
    check_logits(logits, top_k)
    probs = _wide(logits).sigmoid().float()
    ids = _top(_choice(probs, logits), top_k)
    return Routing(ids.int(), probs.gather(1, ids))


def topk_sigmoid(logits: Tensor, top_k: int) -> Routing:
    """Select on the raw logits, weigh with their sigmoid: ``ids = top_k(s);  w = sigmoid(s[ids])``.

    `sigmoid_topk` but where the sigmoid saturates. Source: FlashInfer `TopKSigmoid`.

    >>> topk_sigmoid(torch.tensor([[18., 0., 25., 3.]]), 3).ids.tolist()
    [[2, 0, 3]]
    """
    raw = topk_raw(logits, top_k)
    return Routing(raw.ids, _wide(raw.weights).sigmoid().float())


def sigmoid_topk_renormalize(logits: Tensor, top_k: int) -> Routing:
    """Select on the sigmoid p and rescale to sum 1: ``w = p[ids] / max(sum(p[ids]), 1e-20)``.

    Source: FlashInfer `SigmoidRenorm` with normTopkProb.

    >>> sigmoid_topk_renormalize(torch.tensor([[0., 0., 25., -1.]]), 3).weights
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    probs = sigmoid_topk(logits, top_k)
    return Routing(probs.ids, probs.weights / probs.weights.sum(dim=-1, keepdim=True).clamp(_EPS))


def minimax2(
    logits: Tensor, top_k: int, bias: Tensor, *, routed_scaling_factor: float = 1.0
) -> Routing:
    """Select on p + b, p = sigmoid(s); weigh with p: ``p[ids] / (sum(p[ids]) + 1e-20) * scaling``.

    `bias` is [E] floating, used in fp32 (rounding it to bfloat16 moves ids), ValueError otherwise.
    Source: MiniMax-M2; FlashInfer and TensorRT-LLM `MiniMax2`.

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

    Raises ValueError for these too. Source: DeepSeek-V3's inference code; without bias, vLLM.

    >>> s, b = torch.tensor([[0., 0., 3., -3.]]), torch.tensor([1., 1., 0., 0.])
    >>> r = deepseek_v3(s, 2, b, num_expert_group=2, topk_group=1, routed_scaling_factor=2.5)
    >>> r.ids.tolist(), r.weights
    ([[0, 1]], tensor([[1.2500, 1.2500]]))
    """
    check_logits(logits, top_k)
    groups, size = num_expert_group, logits.shape[1] // max(num_expert_group, 1)
    if groups * size != logits.shape[1] or not top_k <= topk_group * size <= groups * size:
        raise ValueError(
            f"deepseek_v3: expected num_expert_group to divide {logits.shape[1]} experts and "
            f"topk_group of the groups to hold top_k={top_k}, got num_expert_group={groups}, "
            f"topk_group={topk_group}; pass n_group and topk_group of the model's configuration"
        )
    probs = _wide(logits).sigmoid().float()
    choice = _choice(probs, logits, bias)
    if topk_group == groups:
        ids = _top(choice, top_k)
    else:
        count = 1 if bias is None else min(2, size)
        best = choice.view(len(logits), groups, size).topk(count).values
        kept = _top(best.sum(dim=-1), topk_group).sort(dim=-1).values.unsqueeze(-1)
        experts = (kept * size + torch.arange(size, device=logits.device)).flatten(1)
        ids = experts.gather(1, _top(choice.gather(1, experts), top_k))
    weights = probs.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + _EPS)
    return Routing(ids.int(), weights * routed_scaling_factor)


def llama4(logits: Tensor, top_k: int = 1) -> Routing:
    """Select the top logit; its sigmoid multiplies the expert's input: ``w = sigmoid(max(s))``.

    Raises ValueError for a `top_k` other than 1. Source: Llama-4; FlashInfer `Llama4`.

    >>> llama4(torch.tensor([[1., 3., 2., 3.]])).on_input
    True
    """
    if top_k != 1:
        raise ValueError(f"llama4: expected top_k=1, got {top_k!r}; topk_sigmoid takes any top_k")
    routing = topk_sigmoid(logits, top_k)
    return Routing(routing.ids, routing.weights, on_input=True)


def sqrt_softplus_topk(
    logits: Tensor, top_k: int, bias: Tensor | None = None, *, routed_scaling_factor: float = 1.0
) -> Routing:
    """Select on p + b, p = sqrt(log(1 + e^s)); ``w = p[ids] / (sum(p[ids]) + 1e-20) * scaling``.

    `bias` is [E] floating, used in fp32. Source: DeepSeek-V4, its scored layers; vLLM `DeepseekV4`.

    >>> sqrt_softplus_topk(torch.tensor([[0., 4., -4., 4.]]), 3, routed_scaling_factor=1.5).weights
    tensor([[0.6210, 0.6210, 0.2579]])
    """
    check_logits(logits, top_k)
    # Past the threshold torch returns s itself: its default of 20 is off by 1e-10, 40 is exact.
    scores = torch.nn.functional.softplus(_wide(logits), threshold=40.0).sqrt().float()
    ids = _top(_choice(scores, logits, bias), top_k)
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + _EPS)
    return Routing(ids.int(), weights * routed_scaling_factor)


RoutingMethod = Callable[..., Routing]
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
    return scores.masked_fill(logits == -torch.inf, -torch.inf)


def _top(choice: Tensor, count: int) -> Tensor:
    """Columns of the `count` highest values (int64), in the order of the module docstring."""
    # NOTE: x86 makes negative NaN and CUDA positive; a radix sort would tell them apart.
    choice = choice.masked_fill(choice.isnan(), torch.nan)
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :count]


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


def check_logits(logits: Tensor, top_k: int) -> None:
    """Refuse what no method takes: see `softmax_topk`."""
    _check_tensor("logits", logits, _FLOATS, "[T, E]")
    if not isinstance(top_k, int) or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"top_k: expected an int in 1..{logits.shape[1]} for logits {_describe(logits)}, got "
            f"{top_k!r}; check that the columns of logits are the experts"
        )
