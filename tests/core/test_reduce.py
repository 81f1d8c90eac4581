"""Reductions: values by hand, masking, and that parts add up to the whole."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgpo.core.reduce import Reduction, reduce, sequence_mean, sequence_sum, token_mean

REDUCTIONS = get_args(Reduction)
NAN, INF = float("nan"), float("inf")


def constant_of(reduction):
    return 5.0 if reduction == "sequence-sum" else None


def batch(seed: int, rows: int, tokens: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    return x, torch.rand(rows, tokens, generator=generator) < 0.6


def global_count(mask, reduction):
    return int(mask.sum()) if reduction == "token-mean" else mask.shape[0]


def test_by_hand():
    """Rows 1 2 (3) and (9) (9) 6; the third row is masked altogether.

    token: (1 + 2 + 6) / 3 = 3; sequence mean: (1.5 + 6 + 0) / 3 = 2.5;
    sequence sum over 10: (0.3 + 0.6 + 0) / 3 = 0.3.
    """
    x = torch.tensor([[1.0, 2, 3], [9, 9, 6], [7, 7, 7]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    assert float(token_mean(x, mask)) == 3.0
    assert float(sequence_mean(x, mask)) == 2.5
    assert float(sequence_sum(x, mask, 10.0)) == pytest.approx(0.3)
    assert float(token_mean(x, mask, 9)) == 1.0
    assert float(sequence_mean(x, mask, torch.tensor(5))) == 1.5
    assert float(sequence_sum(x, mask, 10.0, 9.0)) == pytest.approx(0.1)


def test_token_mean_takes_any_shape():
    x = torch.arange(6.0)
    assert float(token_mean(x, x > 3)) == 4.5
    assert float(token_mean(x.view(1, 2, 3), x.view(1, 2, 3) > 3)) == 4.5
    assert float(token_mean(x[5], x[5] > 3)) == 5.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 8),
    tokens=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 8), max_size=4),
)
def test_micro_batches_add_up_exactly(reduction, seed, rows, tokens, cuts):
    """Any split, empty parts and masked rows included: same value and same gradient."""
    x, mask = batch(seed, rows, tokens)
    count, constant = global_count(mask, reduction), constant_of(reduction)
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = reduce(whole, mask, reduction, constant=constant)
    edges = [0, *sorted(min(c, rows) for c in cuts), rows]
    found = sum(
        reduce(parts[a:b], mask[a:b], reduction, denominator=count, constant=constant)
        for a, b in pairwise(edges)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.backward()
    found.backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), ranks=st.integers(1, 4), rows=st.integers(1, 3), order=st.randoms()
)
def test_data_parallel_ranks_add_up_exactly(reduction, seed, ranks, rows, order):
    """Rows dealt to ranks at random: all-reduce with sum, and with mean given count / ranks."""
    x, mask = batch(seed, ranks * rows, 5)
    count, constant = global_count(mask, reduction), constant_of(reduction)
    expected = reduce(x, mask, reduction, constant=constant)
    dealt = list(range(ranks * rows))
    order.shuffle(dealt)
    shares = [dealt[rank::ranks] for rank in range(ranks)]
    summed = [
        reduce(x[s], mask[s], reduction, denominator=torch.tensor(count), constant=constant)
        for s in shares
    ]
    averaged = [
        reduce(x[s], mask[s], reduction, denominator=count / ranks, constant=constant)
        for s in shares
    ]
    torch.testing.assert_close(sum(summed), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(averaged) / ranks, expected, rtol=1e-12, atol=1e-12)


def test_local_means_do_not_add_up():
    """Why denominators are arguments: rows of 1 and 3 tokens, 3 and 1: (3 + 3) / 4, not 2."""
    x = torch.tensor([[3.0, 0, 0], [1, 1, 1]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    assert float(token_mean(x, mask)) == 1.5
    assert float(token_mean(x[:1], mask[:1]) + token_mean(x[1:], mask[1:])) / 2 == 2.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_inf_and_nan_contribute_exactly_nothing(reduction):
    x, mask = batch(3, 4, 6)
    clean = x.clone().requires_grad_()
    dirty = torch.where(mask, x, torch.tensor([NAN, INF, -INF, NAN, INF, -INF])).requires_grad_()
    found = [reduce(y, mask, reduction, constant=constant_of(reduction)) for y in (clean, dirty)]
    assert torch.equal(found[0], found[1])
    for y in found:
        y.backward()
    assert torch.equal(clean.grad, dirty.grad)
    assert (dirty.grad[~mask] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", [None, 0, 7, torch.tensor(0), torch.tensor(0.0)])
def test_an_all_masked_batch_is_exactly_zero(reduction, denominator):
    x = torch.full((2, 3), NAN, requires_grad=True)
    found = reduce(
        x,
        torch.zeros(2, 3, dtype=torch.bool),
        reduction,
        denominator=denominator,
        constant=constant_of(reduction),
    )
    found.backward()
    assert float(found.detach()) == 0.0
    assert not x.grad.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_rows_is_zero(reduction):
    x = torch.zeros(0, 3)
    assert float(reduce(x, x > 0, reduction, constant=constant_of(reduction))) == 0.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_low_precision_is_summed_in_float32(reduction):
    """4096 times 1 + 1/128: bfloat16 partial sums would stop growing at 256."""
    x = torch.full((1, 4096), 1 + 1 / 128, dtype=torch.bfloat16)
    constant = 4096.0 if reduction == "sequence-sum" else None
    found = reduce(x, torch.ones(1, 4096, dtype=torch.bool), reduction, constant=constant)
    assert found.dtype == torch.float32
    assert float(found) == 1 + 1 / 128


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inference_mode_and_no_host_read(reduction):
    x, mask = batch(0, 2, 3)
    constant = constant_of(reduction)
    with torch.inference_mode():
        assert torch.isfinite(reduce(x, mask, reduction, constant=constant))
    assert reduce(x.to("meta"), mask.to("meta"), reduction, constant=constant).shape == ()


def test_wrong_use_is_refused_by_name():
    x, mask = batch(0, 2, 3)
    with pytest.raises(ValueError, match="unknown reduction 'mean': choose from token-mean"):
        reduce(x, mask, "mean")
    with pytest.raises(ValueError, match="constant is what"):
        reduce(x, mask, "sequence-sum")
    with pytest.raises(ValueError, match="constant is what"):
        reduce(x, mask, "token-mean", constant=3.0)
    for constant in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="constant must be positive"):
            sequence_sum(x, mask, constant)
    for denominator in (-1, NAN, INF):
        with pytest.raises(ValueError, match="denominator must be a finite count"):
            token_mean(x, mask, denominator)
    for over_sequences in (
        lambda: sequence_mean(x[0], mask[0]),
        lambda: sequence_sum(x[0], mask[0], 2),
    ):
        with pytest.raises(ValueError, match=r"\(B, T\)"):
            over_sequences()
    with pytest.raises(ValueError, match="same shape"):
        token_mean(x, mask[0])
    with pytest.raises(ValueError, match="mask must be boolean"):
        token_mean(x, x)
