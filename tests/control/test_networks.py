"""The actor-critic: initialisation from its seed alone, heads, and what it refuses."""

import dataclasses

import gymnasium as gym
import pytest
import torch

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import distribution_for
from rgpo.control.networks import ActorCritic
from rgpo.errors import RgpoError

BOX = distribution_for(gym.spaces.Box(-1, 1, (3,)))
CONFIG = TrainConfig(hidden=(32, 32))


def test_initialisation_is_orthogonal_and_depends_on_the_seed_alone():
    torch.manual_seed(5)
    one = ActorCritic({"vector": (7,)}, BOX, CONFIG, seed=1)
    torch.manual_seed(6)
    two = ActorCritic({"vector": (7,)}, BOX, CONFIG, seed=1)
    other = ActorCritic({"vector": (7,)}, BOX, CONFIG, seed=2)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    hidden, head = one.actor[2].weight, one.actor[-1].weight
    torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(32))
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(3))
    assert not torch.equal(hidden, other.actor[2].weight)


def test_a_predicted_deviation_starts_where_it_is_told_and_stays_in_bounds():
    config = dataclasses.replace(CONFIG, state_dependent_std=True, initial_log_std=-1.0)
    policy = ActorCritic({"vector": (7,)}, BOX, config, seed=0)
    log_std = policy.policy({"vector": torch.randn(64, 7)})[:, 3:]
    torch.testing.assert_close(log_std, torch.full_like(log_std, -1.0), atol=0.1, rtol=0)
    with torch.no_grad():
        policy.actor[-1].weight.mul_(1e6)
    log_std = policy.policy({"vector": torch.randn(64, 7)})[:, 3:]
    assert log_std.min() >= -5
    assert log_std.max() <= 2


def test_images_and_vectors_side_by_side_and_images_that_are_too_small():
    shapes = {"image": (3, 64, 48), "vector": (4,)}
    policy = ActorCritic(shapes, BOX, CONFIG, seed=0)
    image = torch.randint(0, 256, (5, 3, 64, 48), dtype=torch.uint8)
    parameters, value = policy({"image": image, "vector": torch.randn(5, 4)})
    assert parameters.shape == (5, 6)
    assert value.shape == (5,)
    with pytest.raises(RgpoError, match="20 x 20 are too small"):
        ActorCritic({"image": (3, 20, 20)}, BOX, CONFIG, seed=0)
