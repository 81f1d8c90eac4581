"""Pendulum swing-up, the task of Gymnasium's Pendulum-v1."""

import math

import torch
from torch import Tensor

from rgpo.differentiable.tasks.task import Segment, Task, between

GRAVITY, MASS, LENGTH, MAX_SPEED, MAX_TORQUE = 10.0, 1.0, 1.0, 8.0, 2.0


class Pendulum(Task):
    """State (angle from upright, angular velocity); action: torque / 2 Nm.

    The same numbers as Pendulum-v1 (tested); actions are scaled to [-1, 1].
    """

    state_size, observation_size, action_size, noise_size = 2, 3, 1, 2
    max_steps, dt = 200, 0.05

    def initial(self, noise: Tensor) -> Tensor:  # noqa: D102
        angle = between(noise[:, 0], -math.pi, math.pi)
        return torch.stack([angle, between(noise[:, 1], -1, 1)], dim=-1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        angle, speed = state.unbind(-1)
        torque = MAX_TORQUE * action[:, 0]
        wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
        gravity = 3 * GRAVITY / (2 * LENGTH) * torch.sin(angle)
        acceleration = gravity + 3 / (MASS * LENGTH**2) * torque
        speed = torch.clamp(speed + acceleration * self.dt, -MAX_SPEED, MAX_SPEED)
        state = torch.stack([angle + speed * self.dt, speed], dim=-1)
        return state, reward, torch.zeros_like(reward, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:  # noqa: D102
        angle, speed = state.unbind(-1)
        return torch.stack([torch.cos(angle), torch.sin(angle), speed], dim=-1)

    def drawing(self, state: Tensor) -> list[Segment]:  # noqa: D102
        angle = float(state[0])
        return [((0.0, 0.0), (-math.sin(angle), math.cos(angle)))]
