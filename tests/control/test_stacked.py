"""Several networks in one matrix: what each module would give, and its gradient."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import distribution_for
from rgpo.control.networks import ActorCritic
from rgpo.control.stacked import StackedNetworks

INPUTS, SAMPLES = 5, 9
SPACES = {"box": gym.spaces.Box(-1, 1, (3,)), "discrete": gym.spaces.Discrete(4)}


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(8,), (8, 8, 8)])
@pytest.mark.parametrize("space", SPACES)
def test_outputs_and_gradients_are_those_of_the_modules(space, hidden, activation):
    config = dataclasses.replace(TrainConfig(), hidden=hidden, activation=activation)
    shapes, distribution = {"vector": (INPUTS,)}, distribution_for(SPACES[space])
    policies, twins = (
        [ActorCritic(shapes, distribution, config, seed) for seed in (0, 1)] for _ in range(2)
    )
    stacked = StackedNetworks(policies, config)
    vector = torch.randn(2, SAMPLES, INPUTS, generator=torch.Generator().manual_seed(0))
    views = stacked.views(stacked.parameters)
    layers = stacked.hidden(views, vector)
    output, value = stacked.heads(views, layers[-1])
    size = output.shape[-1]
    d_log_std = torch.full((2, size), 0.5) if stacked.gaussian else None
    gradient = stacked.backward(views, layers, output, value.unsqueeze(-1), d_log_std)
    np.testing.assert_allclose(stacked.actor_array(vector.numpy()), output, rtol=1e-5, atol=1e-6)
    for run, twin in enumerate(twins):
        seen = {"vector": vector[run]}
        theirs, critic = twin(seen)
        torch.testing.assert_close(output[run], theirs[:, :size], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value[run], critic, rtol=1e-5, atol=1e-6)
        loss = ((theirs[:, :size] ** 2).sum() + (critic**2).sum()) / 2
        if stacked.gaussian:
            loss = loss + 0.5 * twin.log_std.sum()
        loss.backward()
        for name, parameter in twin.named_parameters():
            home = stacked.home(name, gradient[run]).reshape(parameter.shape)
            torch.testing.assert_close(home, parameter.grad, rtol=1e-4, atol=1e-5)
