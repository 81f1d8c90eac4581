"""Tasks that go wrong, each in its own way."""

import torch

from rgpo.differentiable.tasks.pendulum import Pendulum


class Rounded(Pendulum):
    """No gradient reaches the action."""

    def step(self, state, action):
        return super().step(state, action.detach())


class InPlace(Pendulum):
    """Overwrites a tensor that the gradient needs."""

    def step(self, state, action):
        speed = state[:, 1] + action[:, 0]
        cost = speed**2
        new = torch.stack([state[:, 0], speed], dim=-1)
        speed += 1
        return new, -cost, torch.zeros_like(cost, dtype=torch.bool)


class Exploding(Pendulum):
    """The gradient of environments that turn left is infinite where the angle is large."""

    max_steps = 20

    def step(self, state, action):
        state, reward, terminated = super().step(state, action)
        bad = state[:, 0] > 2.5
        safe = torch.where(bad, 0 * reward, 1)
        return state, torch.where(bad, torch.sqrt(safe), reward), terminated


class AllExploding(Pendulum):
    """Every gradient is infinite."""

    def step(self, state, action):
        state, reward, terminated = super().step(state, action)
        return state, torch.sqrt(reward * 0), terminated


class Mortal(Pendulum):
    """Short episodes that also end by termination: every kind of reset inside a window."""

    max_steps = 5

    def step(self, state, action):
        state, reward, _ = super().step(state, action)
        return state, reward, torch.abs(state[:, 1]) > 1.5
