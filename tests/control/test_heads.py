"""Derivatives written by hand are those of autograd."""

import gymnasium as gym
import pytest
import torch

from rgpo.control.distributions import distribution_for
from rgpo.control.heads import categorical_head, gaussian_head, value_gradient

RUNS, SAMPLES = 2, 7
TERMS = ["force", "forward", "reverse", "bonus", "all"]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)


def coefficients(term):
    """(R, B) of force, forward KL, reverse KL and entropy bonus; None where they are not meant."""
    found = [draw(RUNS, SAMPLES) if term in (name, "all") else None for name in TERMS[:4]]
    return [torch.zeros(RUNS, SAMPLES).double() if found[0] is None else found[0], *found[1:]]


def loss(distribution, parameters, old, action, weights):
    force, forward, reverse, bonus = (0 if w is None else w for w in weights)
    terms = -force * distribution.log_prob(parameters, action)
    terms = terms + forward * distribution.kl(old, parameters)
    terms = terms + reverse * distribution.kl(parameters, old)
    return (terms - bonus * distribution.entropy(parameters)).sum()


@pytest.mark.parametrize("term", TERMS)
def test_a_normal_with_a_free_deviation(term):
    distribution = distribution_for(gym.spaces.Box(-1, 1, (3,)))
    mean = draw(RUNS, SAMPLES, 3).requires_grad_()
    log_std = (0.3 * draw(RUNS, 1, 3)).requires_grad_()
    action, old, weights = draw(RUNS, SAMPLES, 3), draw(RUNS, SAMPLES, 6), coefficients(term)
    parameters = torch.cat([mean, log_std.expand_as(mean)], -1)
    loss(distribution, parameters, old, action, weights).backward()
    log_prob, backward = gaussian_head(mean.detach(), log_std.detach(), action)
    torch.testing.assert_close(log_prob, distribution.log_prob(parameters, action).detach())
    d_mean, d_log_std = backward(weights[0], old, *weights[1:])
    torch.testing.assert_close(d_mean, mean.grad)
    torch.testing.assert_close(d_log_std, log_std.grad[:, 0])


@pytest.mark.parametrize("term", TERMS)
def test_one_categorical_action(term):
    distribution = distribution_for(gym.spaces.Discrete(4))
    logits = draw(RUNS, SAMPLES, 4).requires_grad_()
    action = torch.randint(4, (RUNS, SAMPLES, 1), generator=GENERATOR)
    old, weights = draw(RUNS, SAMPLES, 4), coefficients(term)
    loss(distribution, logits, old, action, weights).backward()
    log_prob, backward = categorical_head(logits.detach(), None, action)
    torch.testing.assert_close(log_prob, distribution.log_prob(logits, action).detach())
    d_logits, d_log_std = backward(weights[0], old, *weights[1:])
    torch.testing.assert_close(d_logits, logits.grad)
    assert d_log_std is None


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_value_loss(clip):
    value, old, returns = (draw(RUNS, SAMPLES) for _ in range(3))
    value.requires_grad_()
    error = (value - returns) ** 2
    if clip is not None:
        near = old + torch.clamp(value - old, -clip, clip)
        assert (near != value).any()
        error = torch.maximum(error, (near - returns) ** 2)
    (0.5 * error).sum().backward()
    found = value_gradient(value.detach(), old, returns, clip)
    torch.testing.assert_close(found, value.grad)
