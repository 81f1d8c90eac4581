"""KL: every estimator against the exact value or gradient, by enumerating a small categorical."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from rgpo.core.kl import (
    KLPenalty,
    categorical_kl,
    convex_kl_share,
    forward_kl_gradient,
    k1,
    k2,
    k3,
    normal_kl,
    reverse_kl_gradient,
)

EXTREMES = [-1e4, -89.0, -1e-6, 0.0, 1e-6, 89.0, 1e4]


def policies(seed: int = 0, step: float = 1.0):
    """Logits of pi (to differentiate), pi_old and pi_ref over 5 actions, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64) * step
    return logits[0].requires_grad_(), logits[1], logits[2]


def log_softmaxes(*logits):
    return [torch.log_softmax(x, -1) for x in logits]


def gradient(scalar, logits):
    return torch.autograd.grad(scalar, logits, retain_graph=True)[0]


# ---- value estimators


def test_value_estimators_by_hand():
    """d = log 2: k1 = -0.6931, k2 = 0.6931^2 / 2 = 0.2402, k3 = 2 - 1 - 0.6931 = 0.3069."""
    d = torch.tensor([math.log(2)], dtype=torch.float64)
    assert float(k1(d)) == pytest.approx(-0.69314718056)
    assert float(k2(d)) == pytest.approx(0.24022650696)
    assert float(k3(d)) == pytest.approx(0.30685281944)


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_are_unbiased_for_kl_sampling_to_other(seed):
    pi, old, _ = policies(seed)
    log_pi, log_old = log_softmaxes(pi.detach(), old)
    exact = kl_divergence(Categorical(logits=old), Categorical(logits=pi.detach()))
    for estimator in (k1, k3):
        mean = (log_old.exp() * estimator(log_pi - log_old)).sum()
        assert float(mean) == pytest.approx(float(exact), rel=1e-12)


def test_k2_is_biased_at_third_order_only():
    """Halving the distance divides the relative error by about 2 (third order over second)."""
    errors = []
    for scale in (1e-2, 5e-3):
        pi, old, _ = policies(1)
        log_pi, log_old = log_softmaxes(old + scale * pi.detach(), old)
        exact = categorical_kl(log_old, log_pi)
        errors.append(float((log_old.exp() * k2(log_pi - log_old)).sum() / exact - 1))
    assert abs(errors[0]) > 1e-5
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", [k1, k2, k3, forward_kl_gradient, reverse_kl_gradient])
def test_finite_value_and_gradient_at_the_extremes(estimator, dtype):
    d = torch.tensor(EXTREMES, dtype=dtype, requires_grad=True)
    found = estimator(d)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    for value in found:
        (slope,) = torch.autograd.grad(value, d, retain_graph=True)
        assert torch.isfinite(slope).all()


def test_k3_is_never_negative_in_float32():
    size = torch.logspace(-30, 4, 20_000)
    d = torch.cat([size, -size, torch.zeros(1)])
    assert (k3(d) >= 0).all()
    assert (k2(d) >= 0).all()


# ---- exact values


@pytest.mark.parametrize("seed", range(3))
def test_categorical_kl_against_torch_and_gradcheck(seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 4, 3, 6, generator=generator, dtype=torch.float64)
    exact = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(categorical_kl(p, q), exact)
    torch.testing.assert_close(categorical_kl(p + 3, q - 2), exact)
    p, q = p[0].requires_grad_(), q[0].requires_grad_()
    assert torch.autograd.gradcheck(categorical_kl, (p, q))


def test_categorical_kl_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): log 2 / 2 + log(2/3) / 2 = log(4/3) / 2."""
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    q = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    assert float(categorical_kl(p, q)) == pytest.approx(math.log(4 / 3) / 2, rel=1e-12)


def test_categorical_kl_with_banned_actions():
    p = torch.tensor([0.3, -math.inf, 1.0], requires_grad=True)
    q = torch.tensor([0.1, -math.inf, 0.2], requires_grad=True)
    found = categorical_kl(p, q)
    torch.testing.assert_close(found, categorical_kl(p[[0, 2]], q[[0, 2]]))
    found.backward()
    assert torch.isfinite(p.grad).all()
    assert torch.isfinite(q.grad).all()
    assert p.grad[1] == q.grad[1] == 0
    assert categorical_kl(torch.zeros(3), q.detach()) == math.inf  # p allows what q bans


@pytest.mark.parametrize("seed", range(3))
def test_normal_kl_against_torch_and_gradcheck(seed):
    generator = torch.Generator().manual_seed(seed)
    args = torch.randn(4, 7, 3, generator=generator, dtype=torch.float64)
    m, s, n, t = args
    exact = kl_divergence(Independent(Normal(m, s.exp()), 1), Independent(Normal(n, t.exp()), 1))
    torch.testing.assert_close(normal_kl(m, s, n, t), exact)
    assert torch.autograd.gradcheck(normal_kl, [x[:2].clone().requires_grad_() for x in args])


def test_normal_kl_by_hand_and_broadcast():
    """N(1, 1) against N(0, 2^2): log 2 + (1 + 1) / 8 - 1/2 = 0.4431."""
    one, zero, log2 = (torch.tensor([x], dtype=torch.float64) for x in (1, 0, math.log(2)))
    by_hand = math.log(2) + 0.25 - 0.5
    assert float(normal_kl(one, zero, zero, log2)) == pytest.approx(by_hand, rel=1e-12)
    many = normal_kl(one.expand(6, 5, 1), zero, zero.expand(5, 1), log2)
    assert many.shape == (6, 5)
    assert many.tolist() == [[pytest.approx(by_hand)] * 5] * 6


def test_normal_kl_keeps_its_digits_near_zero():
    """log_std 1e-4 apart: 2 e^2 / 2 = 1e-8 to second order; 1 - 1 would lose it in float32."""
    zero = torch.zeros(1)
    assert float(normal_kl(zero, zero + 1e-4, zero, zero)) == pytest.approx(1e-8, rel=2e-2)


# ---- gradient estimators


@pytest.mark.parametrize("seed", range(5))
def test_forward_kl_gradient_is_the_gradient_of_kl_old_pi(seed):
    pi, old, _ = policies(seed)
    log_pi, log_old = log_softmaxes(pi, old)
    estimate = (log_old.exp() * forward_kl_gradient(log_pi - log_old)).sum()
    exact = categorical_kl(old, pi)
    torch.testing.assert_close(estimate, exact)  # its value is an estimate too
    torch.testing.assert_close(gradient(estimate, pi), gradient(exact, pi))


@pytest.mark.parametrize("seed", range(5))
def test_reverse_kl_gradient_is_the_gradient_of_kl_pi_anchor(seed):
    pi, old, ref = policies(seed)
    log_pi, log_old, log_ref = log_softmaxes(pi, old, ref)
    for anchor, log_anchor, argument in (
        (old, log_old, None),
        (ref, log_ref, log_pi - log_ref),
    ):
        term = reverse_kl_gradient(log_pi - log_old, argument)
        estimate = (log_old.exp() * term).sum()
        exact = (log_pi.exp() * (log_pi - log_anchor)).sum()
        torch.testing.assert_close(exact, categorical_kl(pi, anchor))
        torch.testing.assert_close(estimate, exact)
        got, wanted = gradient(estimate, pi), gradient(exact, pi)
        torch.testing.assert_close(got, wanted)
        assert wanted.abs().max() > 1e-3


def test_reverse_kl_gradient_per_sample_is_r_log_r_grad_log_pi():
    d = torch.tensor([math.log(2), math.log(0.5)], dtype=torch.float64, requires_grad=True)
    (weight,) = torch.autograd.grad(reverse_kl_gradient(d).sum(), d)
    assert weight.tolist() == pytest.approx([2 * math.log(2), -0.5 * math.log(2)])
    (weight,) = torch.autograd.grad(forward_kl_gradient(d).sum(), d)
    assert weight.tolist() == pytest.approx([1.0, -0.5])


def test_both_gradients_vanish_per_sample_where_the_policies_agree():
    d = torch.zeros(3, requires_grad=True)
    for term in (forward_kl_gradient, reverse_kl_gradient):
        (slope,) = torch.autograd.grad(term(d).sum(), d)
        assert not slope.any()


def test_value_estimators_as_on_policy_losses_are_the_traps_of_the_docstring():
    """Samples of pi, weights pi detached, d = log pi_ref - log pi: OpenRLHF #1309."""
    pi, _, ref = policies(3)
    log_pi, log_ref = log_softmaxes(pi, ref)
    probability = log_pi.exp().detach()
    from_k1 = gradient((probability * k1(log_ref - log_pi)).sum(), pi)
    assert from_k1.abs().max() < 1e-14
    from_k3 = gradient((probability * k3(log_ref - log_pi)).sum(), pi)
    forward = gradient(categorical_kl(ref, pi), pi)
    reverse = gradient(categorical_kl(pi, ref), pi)
    torch.testing.assert_close(from_k3, forward)
    assert (forward - reverse).abs().max() > 0.05


# ---- penalty


def test_penalty_adapts_by_the_factors_of_ppo():
    penalty = KLPenalty(1.0, target=0.02)
    assert penalty.adapt(0.0301) == KLPenalty(2.0, target=0.02)
    assert penalty.adapt(0.0299) is penalty
    assert penalty.adapt(0.0134) is penalty
    assert penalty.adapt(0.0133) == KLPenalty(0.5, target=0.02)
    assert penalty.adapt(math.inf).coefficient == 2.0
    assert penalty.adapt(math.nan) is penalty


def test_penalty_stays_within_its_bounds():
    assert KLPenalty(6e3, 0.02).adapt(1.0).coefficient == 1e4
    assert KLPenalty(1.5e-4, 0.02).adapt(0.0).coefficient == 1e-4


def test_penalty_without_target_is_fixed():
    assert KLPenalty(3.0).adapt(1e3) == KLPenalty(3.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_penalty_refuses_bad_fields(bad):
    with pytest.raises(ValueError, match=r"KL coefficient must be positive and finite, got"):
        KLPenalty(bad)
    with pytest.raises(ValueError, match=r"KL target must be positive and finite, got"):
        KLPenalty(1.0, target=bad)


def test_wrong_use_is_refused_by_name():
    x, n = torch.zeros(2, 3), torch.zeros(2, 3).long()
    for estimator in (k1, k2, k3, forward_kl_gradient, reverse_kl_gradient):
        with pytest.raises(ValueError, match="log_ratio must be a floating"):
            estimator(n)
    with pytest.raises(ValueError, match="same shape"):
        categorical_kl(x, x[0])
    with pytest.raises(ValueError, match="same shape"):
        reverse_kl_gradient(x, x[0])
    with pytest.raises(ValueError, match="broadcast to one shape"):
        normal_kl(x, torch.zeros(2), x, x)
    with pytest.raises(ValueError, match="log_std_q must be a floating"):
        normal_kl(x, x, x, n)


def test_inference_mode_and_no_host_read():
    x = torch.randn(4, 3)
    with torch.inference_mode():
        for y in (forward_kl_gradient(x), reverse_kl_gradient(x, x), categorical_kl(x, x)):
            assert torch.isfinite(y).all()
    m = x.to("meta")
    for y in (k3(m), forward_kl_gradient(m), categorical_kl(m, m), normal_kl(m, m, m, m)):
        assert y.device.type == "meta"


def test_convex_share_falls_from_the_base_model_to_one_half():
    shares = [convex_kl_share(t) for t in (0, 50, 51, 60, 61, 91, 100, 1000)]
    assert shares == pytest.approx([1, 1, 0.9, 0.9, 0.8, 0.5, 0.5, 0.5])
