"""The public routing functions on a CPU are the methods themselves: results, errors, gradients."""

from __future__ import annotations

import inspect

import pytest
import torch

import moelten
from moelten import router, routing


@pytest.mark.parametrize("name", routing.METHODS)
def test_same_signature_and_documentation(name):
    public, method = router.METHODS[name], routing.METHODS[name]
    assert public is getattr(router, name) and public is not method
    assert public.__doc__ == method.__doc__
    assert inspect.signature(public) == inspect.signature(method)


@pytest.mark.parametrize("name", routing.METHODS)
def test_same_result(name):
    logits = torch.randn(20, 8)
    bias = {"bias": torch.randn(8)} if name in ("minimax2", "sqrt_softplus_topk") else {}
    top_k = 1 if name == "llama4" else 3
    found, wanted = (m[name](logits, top_k, **bias) for m in (router.METHODS, routing.METHODS))
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.weights, wanted.weights)
    assert found.on_input == wanted.on_input


def test_every_option_is_handed_on():
    logits, bias = torch.randn(20, 8), torch.randn(8)
    options = {"num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    for norm in (True, False):
        both = (
            m.deepseek_v3(logits, 2, bias, norm_topk_prob=norm, **options)
            for m in (router, routing)
        )
        found, wanted = both
        assert torch.equal(found.ids, wanted.ids) and torch.equal(found.weights, wanted.weights)
    for name in ("minimax2", "sqrt_softplus_topk"):
        found, wanted = (
            m.METHODS[name](logits, 2, bias, routed_scaling_factor=3.0) for m in (router, routing)
        )
        assert torch.equal(found.weights, wanted.weights)


def test_same_errors():
    with pytest.raises(ValueError, match="top_k: expected an int"):
        router.topk_softmax(torch.zeros(2, 4), 5)
    with pytest.raises(TypeError, match="expected a tensor"):
        router.topk_softmax([1.0, 2.0], 1)
    with pytest.raises(TypeError):
        router.topk_softmax(torch.zeros(2, 4))


def test_gradients_pass():
    logits = torch.randn(3, 4, requires_grad=True)
    router.topk_softmax(logits, 2).weights.square().sum().backward()
    assert logits.grad.abs().sum() > 0


def test_the_public_name_is_this_one():
    assert moelten.topk_softmax is router.topk_softmax
