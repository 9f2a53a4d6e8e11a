"""Flips of what is quantized again are told from errors."""

from __future__ import annotations

import pytest
import ties
from cases import ALL_SCHEMES, Case, make_input, make_weights
from metrics import assert_matches
from ties import assert_matches_but_for_ties

from moelten import reference


@pytest.mark.parametrize("name", ["int4g32_fp8", "int8_int8", "fp8tensor_fp8", "fp8block_fp8"])
def test_a_flip_is_right_where_a_value_lies_between_two_codes(monkeypatch, name):
    case = Case(ALL_SCHEMES[name], num_experts=3, hidden_size=512, tokens=20, top_k=2)
    weights, (x, routing) = make_weights(case), make_input(case)
    expected = reference.moe(x, weights, routing)
    monkeypatch.setattr(ties, "NEAR", 3e-3)  # so that some lie there
    flips = list(ties._flips(x, weights, routing))
    out = expected + flips[0] + flips[ties.MOST]  # one of either slot
    with pytest.raises(AssertionError, match="row"):
        assert_matches(out, expected)
    monkeypatch.setitem(ties.BOUNDS, "all", 1.0)  # which so many flips in a small layer pass
    assert_matches_but_for_ties(out, x, weights, routing, expected)
    # A step too far, and a flip of what does not lie there.
    with pytest.raises(AssertionError):
        assert_matches_but_for_ties(out + flips[0], x, weights, routing, expected)
    monkeypatch.setattr(ties, "NEAR", 1e-7)
    with pytest.raises(AssertionError):
        assert_matches_but_for_ties(out, x, weights, routing, expected)
