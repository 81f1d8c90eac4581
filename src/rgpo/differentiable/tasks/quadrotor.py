"""A planar quadrotor that flies to the origin and hovers there."""

import math

import torch
from torch import Tensor

from rgpo.differentiable.tasks.task import Segment, Task, between

GRAVITY, ARM, INERTIA, ARENA = 9.8, 0.25, 0.1, 5.0


class Quadrotor(Task):
    """State (x, y, tilt, and their velocities); action: two thrusts, 0 is half the weight each.

    Mass 1 kg, thrust up to twice hovering. Reward in (0, 1], 1 at rest in the origin; bounded,
    because under a quadratic cost a few lost starts would decide the mean. Terminated outside of
    |x|, |y| <= 5.
    """

    state_size, observation_size, action_size, noise_size = 6, 7, 2, 6
    max_steps, dt = 200, 0.05
    view = (-3.5, 3.5, -3.5, 3.5)

    def initial(self, noise: Tensor) -> Tensor:  # noqa: D102
        return between(noise, -1, 1) * noise.new_tensor([2.0, 2.0, 0.5, 0.5, 0.5, 0.5])

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        place, motion = state.split(3, dim=-1)
        tilt = place[:, 2]
        left, right = (GRAVITY / 2 * (1 + action)).unbind(-1)
        lift = left + right
        turning = (right - left) * ARM / INERTIA
        rise = torch.cos(tilt) * lift - GRAVITY
        motion = motion + self.dt * torch.stack([-torch.sin(tilt) * lift, rise, turning], dim=-1)
        place = place + self.dt * motion
        x, y, tilt = place.unbind(-1)
        cost = x**2 + y**2 + 0.1 * (motion**2).sum(-1) + 1 - torch.cos(tilt)
        lost = (torch.abs(x) > ARENA) | (torch.abs(y) > ARENA)
        return torch.cat([place, motion], dim=-1), 1 / (1 + cost), lost

    def observe(self, state: Tensor) -> Tensor:  # noqa: D102
        tilt = state[:, 2:3]
        return torch.cat([state[:, :2], torch.sin(tilt), torch.cos(tilt), state[:, 3:]], dim=-1)

    def drawing(self, state: Tensor) -> list[Segment]:  # noqa: D102
        x, y, tilt = state[:3].tolist()
        dx, dy = ARM * math.cos(tilt), ARM * math.sin(tilt)
        cross: list[Segment] = [((-0.1, 0.0), (0.1, 0.0)), ((0.0, -0.1), (0.0, 0.1))]
        return [*cross, ((x - dx, y - dy), (x + dx, y + dy)), ((x, y), (x - dy, y + dx))]
