"""Cart-pole swing-up: the pole hangs at the start."""

import math

import torch
from torch import Tensor

from rgpo.differentiable.tasks.task import Segment, Task, between

GRAVITY, CART, POLE, HALF_LENGTH, MAX_FORCE = 9.8, 1.0, 0.1, 0.5, 20.0


class Cartpole(Task):
    """State (x, velocity, angle from upright, angular velocity); action: force / 20 N.

    Reward in [-2.01, 1]: cos angle - tanh(x^2 / 20) - action^2 / 100; bounded, so that a cart
    that ran away does not decide the mean. The track has no end: a pathwise gradient does not see
    a termination coming.
    Equations of motion without friction as in Gymnasium's CartPole, semi-implicit Euler.
    """

    state_size, observation_size, action_size, noise_size = 4, 5, 1, 4
    max_steps, dt = 200, 0.04
    view = (-3.2, 3.2, -1.6, 1.6)

    def initial(self, noise: Tensor) -> Tensor:  # noqa: D102
        small = between(noise, -0.1, 0.1)
        return small + small.new_tensor([0.0, 0.0, math.pi, 0.0])

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        x, velocity, angle, spin = state.unbind(-1)
        sin, cos = torch.sin(angle), torch.cos(angle)
        total, lever = CART + POLE, POLE * HALF_LENGTH
        push = (MAX_FORCE * action[:, 0] + lever * spin**2 * sin) / total
        inertia = HALF_LENGTH * (4 / 3 - POLE * cos**2 / total)
        turning = (GRAVITY * sin - cos * push) / inertia
        velocity = velocity + self.dt * (push - lever * turning * cos / total)
        spin = spin + self.dt * turning
        x, angle = x + self.dt * velocity, angle + self.dt * spin
        state = torch.stack([x, velocity, angle, spin], dim=-1)
        return state, self.reward(state, action), torch.zeros_like(x, dtype=torch.bool)

    def reward(self, state: Tensor, action: Tensor) -> Tensor:
        """Of the states after a step and its actions, (E,)."""
        cost = torch.tanh(state[:, 0] ** 2 / 20) + 0.01 * action[:, 0] ** 2
        return torch.cos(state[:, 2]) - cost

    def observe(self, state: Tensor) -> Tensor:  # noqa: D102
        x, velocity, angle, spin = state.unbind(-1)
        return torch.stack([x, velocity, torch.cos(angle), torch.sin(angle), spin], dim=-1)

    def drawing(self, state: Tensor) -> list[Segment]:  # noqa: D102
        x, _, angle, _ = state.tolist()
        tip = (x + 2 * HALF_LENGTH * math.sin(angle), 2 * HALF_LENGTH * math.cos(angle))
        return [((-3.0, 0.0), (3.0, 0.0)), ((x - 0.2, 0.05), (x + 0.2, 0.05)), ((x, 0.0), tip)]
