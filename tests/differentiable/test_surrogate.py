"""The estimator of reused gradients: unbiased, where the naive ones are not."""

import pytest
import torch

from rgpo.core import recipes
from rgpo.differentiable.surrogate import (
    normal_entropy,
    normal_log_prob,
    regenerated,
    reparam_surrogate,
    squash_log_slope,
)

N = 200_000
OLD = (0.3, -0.4)
"""Mean and log std of the behaviour policy of a task with one state."""
NEW = (0.55, -0.6)


def q_gradient(action):
    """Of Q(a) = -(a - 1)^2 - a^4 / 4."""
    return -2 * (action - 1) - action**3


def exact(mean, log_std):
    """d E[Q(mean + std eps)] / d (mean, log std) in closed form; moments of the normal."""
    variance = torch.exp(torch.tensor(2.0 * log_std, dtype=torch.float64))
    by_mean = -2 * (mean - 1) - (mean**3 + 3 * mean * variance)
    by_log_std = -2 * variance - (3 * mean**2 * variance + 3 * variance**2)
    return torch.stack([by_mean, by_log_std])


def samples():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N, 1, generator=generator, dtype=torch.float64)
    action = OLD[0] + torch.exp(torch.tensor(OLD[1], dtype=torch.float64)) * noise
    return action, noise


def estimate(weight, noise):
    """Mean and standard error of the estimators of both gradients, from weights (N,) and noise."""
    action, _ = samples()
    std = torch.exp(torch.tensor(NEW[1], dtype=torch.float64))
    per_sample = weight * q_gradient(action)[:, 0]
    each = torch.stack([per_sample, per_sample * std * noise[:, 0]])
    return each.mean(1), each.std(1) / N**0.5


def parameters():
    return [torch.tensor([[x]], dtype=torch.float64, requires_grad=True) for x in NEW]


def test_the_off_policy_estimator_is_unbiased():
    action, _ = samples()
    mean, log_std = parameters()
    behavior = normal_log_prob(*(torch.tensor([[x]]).double() for x in OLD), action)
    objective = recipes.get("importance").objective
    value, log_ratio, weight = reparam_surrogate(
        objective, mean, log_std, action, q_gradient(action), behavior
    )
    found = torch.cat(torch.autograd.grad(value.mean(), [mean, log_std])).flatten()
    noise = ((action - NEW[0]) * torch.exp(-log_std)).detach()
    by_hand, error = estimate(weight, noise)
    torch.testing.assert_close(found, by_hand)
    assert (abs(found - exact(*NEW)) < 3 * error).all()
    assert float((error / abs(exact(*NEW))).max()) < 0.03  # and the test has power
    assert float(log_ratio.exp().mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("variant", ["ratio, old noise", "no ratio", "no ratio, old noise"])
def test_the_naive_estimators_are_biased(variant):
    action, old_noise = samples()
    mean, log_std = (torch.tensor([[x]]).double() for x in NEW)
    behavior = normal_log_prob(*(torch.tensor([[x]]).double() for x in OLD), action)
    ratio = torch.exp(normal_log_prob(mean, log_std, action) - behavior)
    noise = old_noise if "old noise" in variant else (action - mean) * torch.exp(-log_std)
    found, error = estimate(torch.ones(N) if "no ratio" in variant else ratio, noise)
    assert float((abs(found - exact(*NEW)) / error).max()) > 10


def test_a_narrow_mask_loses_samples_and_turns_the_direction():
    action, _ = samples()
    behavior = normal_log_prob(*(torch.tensor([[x]]).double() for x in OLD), action)
    angles, kept = [], []
    for changes in ({}, {"clip_low": 0.2, "clip_high": 0.2}):
        mean, log_std = parameters()
        objective = recipes.get("reparam-mask").configure(**changes).objective
        value, _, weight = reparam_surrogate(
            objective, mean, log_std, action, q_gradient(action), behavior
        )
        found = torch.cat(torch.autograd.grad(value.mean(), [mean, log_std])).flatten()
        angles.append(float(torch.cosine_similarity(found, exact(*NEW), dim=0)))
        kept.append(float((weight != 0).double().mean()))
    assert kept[0] > 0.9 > 0.5 > kept[1]
    assert angles[0] > 0.99 > angles[1]


def test_outside_the_mask_a_sample_exerts_nothing_whatever_the_sign_of_its_gradient():
    mean, log_std = parameters()
    action = torch.tensor([[0.5], [3.0], [-2.0]]).double()
    behavior = normal_log_prob(*(torch.tensor([[x]]).double() for x in OLD), action)
    for sign in (1.0, -1.0):
        value, _, weight = reparam_surrogate(
            recipes.get("reparam-mask").objective,
            mean,
            log_std,
            action,
            sign * torch.ones_like(action),
            behavior,
        )
        assert (weight != 0).tolist() == [True, False, False]
        (gradient,) = torch.autograd.grad(value[1:].sum(), mean)
        assert float(gradient) == 0


def test_regenerated_actions_are_the_cached_ones_and_carry_the_policys_derivative():
    mean, log_std = parameters()
    action = torch.tensor([[1.7], [-0.2]]).double()
    again = regenerated(mean, log_std, action)
    torch.testing.assert_close(again, action)
    gradients = torch.autograd.grad(again.sum(), [mean, log_std])
    assert float(gradients[0]) == 2
    assert float(gradients[1]) == pytest.approx(float((action - NEW[0]).sum()))


def test_log_prob_entropy_and_slope_are_those_of_torch():
    mean, log_std, action = torch.randn(3, 4, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(
        normal_log_prob(mean, log_std, action), normal.log_prob(action).sum(-1)
    )
    torch.testing.assert_close(normal_entropy(log_std), normal.entropy().sum(-1))
    tanh = torch.distributions.TanhTransform()
    slope = tanh.log_abs_det_jacobian(action, torch.tanh(action)).sum(-1)
    torch.testing.assert_close(squash_log_slope(action), slope)
