"""Log-ratios: promotion, masking, and every level against its definition and its identities."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgpo.core.ratio import Level, at_level, log_ratio, raw_ratio, saturate_exponent

LEVELS = get_args(Level)
NAN, INF = float("nan"), float("inf")


def batch(seed: int = 0, rows: int = 3, tokens: int = 7):
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    segments = torch.randint(-3, 3, (rows, tokens), generator=generator)
    return d, mask, segments


def test_promotes_before_subtracting():
    """256 - 1/256 has 16 significant bits: float32 holds it, bfloat16 (8 bits) does not."""
    a = torch.tensor([-8.0625, 256.0], dtype=torch.bfloat16)
    b = torch.tensor([-8.0, 1 / 256], dtype=torch.bfloat16)
    found = log_ratio(a, b)
    assert found.dtype == torch.float32
    assert found.tolist() == [-0.0625, 256 - 1 / 256]
    assert float((a - b)[1]) == 256.0  # what subtracting first would give
    assert log_ratio(a.double(), b).dtype == torch.float64


def test_gradient_reaches_log_prob_only():
    a = torch.randn(4, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    log_ratio(a, b).sum().backward()
    assert a.grad.tolist() == [1.0] * 4
    assert b.grad is None


def test_masked_elements_contribute_exactly_nothing():
    a = torch.tensor([0.5, NAN, INF, -INF, 2.0], requires_grad=True)
    b = torch.tensor([0.25, 1.0, INF, NAN, -INF])
    mask = torch.tensor([True, False, False, False, False])
    d = log_ratio(a, b, mask)
    assert d.tolist() == [0.25, 0, 0, 0, 0]
    torch.exp(d).sum().backward()
    assert a.grad.tolist() == [pytest.approx(1.2840254), 0, 0, 0, 0]


@pytest.mark.parametrize("level", LEVELS)
def test_masked_inf_and_nan_contribute_nothing_at_any_level(level):
    d, mask, segments = batch()
    clean = d.clone().requires_grad_()
    dirty = torch.where(
        mask, d, torch.tensor([NAN, INF, -INF, NAN, INF, -INF, NAN])
    ).requires_grad_()
    found = [at_level(x, mask, level, segments) for x in (clean, dirty)]
    assert torch.equal(found[0], found[1])
    assert (found[1][~mask] == 0).all()
    for x in found:
        torch.expm1(x).sum().backward()
    assert torch.equal(clean.grad, dirty.grad)
    assert (dirty.grad[~mask] == 0).all()


def test_levels_by_hand():
    """One row, tokens 1, 2, (4 masked), 6 with turns a a b b: turn means 1.5 and 6."""
    d = torch.tensor([[1.0, 2.0, 4.0, 6.0]])
    mask = torch.tensor([[True, True, False, True]])
    turns = torch.tensor([[70, 70, -5, -5]])
    expected = {
        "token": [1, 2, 0, 6],
        "turn": [1.5, 1.5, 0, 6],
        "sequence": [3, 3, 0, 3],
        "sequence-sum": [9, 9, 0, 9],
        "prefix": [1, 3, 0, 9],
        "prefix-mean": [1, 1.5, 0, 3],
    }
    assert set(expected) == set(LEVELS)
    for level, values in expected.items():
        assert at_level(d, mask, level, turns).tolist() == [values], level


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), tokens=st.integers(1, 9))
def test_levels_against_their_definition_in_loops(level, seed, rows, tokens):
    d, mask, segments = batch(seed, rows, tokens)
    found = at_level(d, mask, level, segments)
    for i in range(rows):
        for t in range(tokens):
            unit = [
                float(d[i, j])
                for j in range(tokens)
                if mask[i, j]
                and (level != "token" or j == t)
                and (level != "turn" or segments[i, j] == segments[i, t])
                and (not level.startswith("prefix") or j <= t)
            ]
            mean = level in ("turn", "sequence", "prefix-mean")
            expected = sum(unit) / (len(unit) if mean else 1) if mask[i, t] else 0
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_gradient_of_every_level(level):
    d, mask, segments = batch(1)
    d.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: at_level(x, mask, level, segments), d)


def test_identities_between_levels():
    d, mask, _ = batch(2)
    full = torch.ones_like(mask)
    one_turn = torch.full(d.shape, 4)
    each_its_own = torch.arange(d.shape[1]).expand_as(d)
    close = torch.testing.assert_close
    for level in LEVELS:  # a sequence of length 1 is a token
        one = at_level(d[:, :1], full[:, :1], level, one_turn[:, :1])
        assert torch.equal(one, d[:, :1]), level
    close(at_level(d, mask, "turn", one_turn), at_level(d, mask, "sequence"))
    close(at_level(d, mask, "turn", each_its_own), at_level(d, mask, "token"))
    close(at_level(d, full, "prefix")[:, -1], at_level(d, full, "sequence-sum")[:, -1])
    close(at_level(d, full, "prefix-mean")[:, -1], at_level(d, full, "sequence")[:, -1])
    close(at_level(d, full, "prefix").diff(dim=1), d[:, 1:])


def test_segments_of_different_rows_do_not_mix():
    d = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    assert torch.equal(at_level(d, d > 0, "turn", torch.zeros(2, 2, dtype=torch.int32)), d)


@pytest.mark.parametrize("level", LEVELS)
def test_a_fully_masked_batch_is_zero_with_zero_gradient(level):
    d, mask, segments = batch()
    d = (d * NAN).requires_grad_()
    found = at_level(d, mask & False, level, segments)
    found.sum().backward()
    assert not found.any()
    assert not d.grad.any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_the_extremes(level, dtype):
    d = torch.full((2, 64), 1e4, dtype=dtype)
    d[1] *= -1
    d.requires_grad_()
    found = at_level(d, torch.ones(2, 64, dtype=torch.bool), level, torch.zeros(2, 64).long())
    assert found.dtype == torch.float32
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(d.grad).all()


def test_wrong_use_is_refused_by_name():
    d, mask, segments = batch()
    with pytest.raises(ValueError, match="'turn' needs segment_ids"):
        at_level(d, mask, "turn")
    with pytest.raises(ValueError, match="unknown level 'word': choose from token, turn"):
        at_level(d, mask, "word")
    with pytest.raises(ValueError, match="segment_ids must be an integer"):
        at_level(d, mask, "turn", segments.double())
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        at_level(d[0], mask[0], "sequence")
    with pytest.raises(ValueError, match="mask must be boolean"):
        log_ratio(d, d, mask.long())
    with pytest.raises(ValueError, match="same shape"):
        log_ratio(d, d[0])
    with pytest.raises(ValueError, match="log_prob must be a floating"):
        log_ratio(segments, d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raw_ratio_saturates_just_below_the_largest_float(dtype):
    d = torch.tensor([-1e4, 0.0, 2.0, 80.0, 1e4, INF], dtype=dtype, requires_grad=True)
    r = raw_ratio(d)
    largest = torch.finfo(dtype).max
    assert r[:4].tolist() == torch.exp(d[:4]).tolist()
    assert 0.999 * largest < float(r.detach()[4]) <= largest
    assert float(r.detach()[5]) == float(r.detach()[4])
    r.sum().backward()
    assert torch.isfinite(d.grad).all()
    with pytest.raises(ValueError, match="floating"):
        saturate_exponent(torch.arange(3))


@pytest.mark.parametrize("level", LEVELS)
def test_inference_mode_and_no_host_read(level):
    """Meta tensors hold no values: reading one back to the host raises."""
    d, mask, segments = batch()
    with torch.inference_mode():
        assert torch.equal(
            at_level(log_ratio(d, d * 0, mask), mask, level, segments),
            at_level(d, mask, level, segments),
        )
    d, mask, segments = d.to("meta"), mask.to("meta"), segments.to("meta")
    assert at_level(log_ratio(d, d, mask), mask, level, segments).device.type == "meta"
