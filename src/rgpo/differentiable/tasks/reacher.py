"""A two-link arm in the plane whose tip reaches for a random goal."""

import math

import torch
from torch import Tensor

from rgpo.differentiable.tasks.task import Segment, Task, between

LINK, MASS, DAMPING, MAX_TORQUE = 0.5, 1.0, 0.2, 1.0


class Reacher(Task):
    """State (two joint angles, two velocities, goal x, y); action: two torques / 1 Nm.

    Two uniform rods without gravity. Reward: minus the distance to the goal (rounded at 1 cm, so
    that it has a gradient everywhere), minus 0.01 |action|^2.
    """

    state_size, observation_size, action_size, noise_size = 6, 10, 2, 4
    max_steps, dt = 150, 0.05
    view = (-1.25, 1.25, -1.0, 1.0)

    def initial(self, noise: Tensor) -> Tensor:  # noqa: D102
        joints = between(noise[:, :2], -math.pi, math.pi)
        radius, angle = between(noise[:, 2], 0.2, 0.9), between(noise[:, 3], -math.pi, math.pi)
        goal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
        return torch.cat([joints, torch.zeros_like(joints), goal], dim=-1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        first, second, spin1, spin2, goal_x, goal_y = state.unbind(-1)
        # mass matrix of two rods: [a + 2 b cos q2, d + b cos q2; d + b cos q2, d]
        a, b, d = MASS * LINK**2 * 5 / 3, MASS * LINK**2 / 2, MASS * LINK**2 / 3
        cos, sin = torch.cos(second), torch.sin(second)
        torque = MAX_TORQUE * action
        force1 = torque[:, 0] - DAMPING * spin1 + b * sin * (2 * spin1 * spin2 + spin2**2)
        force2 = torque[:, 1] - DAMPING * spin2 - b * sin * spin1**2
        m11, m12 = a + 2 * b * cos, d + b * cos
        determinant = m11 * d - m12**2
        spin1 = spin1 + self.dt * (d * force1 - m12 * force2) / determinant
        spin2 = spin2 + self.dt * (m11 * force2 - m12 * force1) / determinant
        first, second = first + self.dt * spin1, second + self.dt * spin2
        state = torch.stack([first, second, spin1, spin2, goal_x, goal_y], dim=-1)
        gap = (self._tip(state) - state[:, 4:]) ** 2
        reward = -torch.sqrt(gap.sum(-1) + 1e-4) - 0.01 * (action**2).sum(-1)
        return state, reward, torch.zeros_like(reward, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:  # noqa: D102
        joints, goal = state[:, :2], state[:, 4:]
        angles = [torch.cos(joints), torch.sin(joints)]
        return torch.cat([*angles, state[:, 2:4], goal, goal - self._tip(state)], dim=-1)

    def drawing(self, state: Tensor) -> list[Segment]:  # noqa: D102
        first, x, y = float(state[0]), float(state[4]), float(state[5])
        elbow = (LINK * math.cos(first), LINK * math.sin(first))
        tip_x, tip_y = self._tip(state[None])[0].tolist()
        goal: Segment = ((x - 0.03, y), (x + 0.03, y))
        return [goal, ((0.0, 0.0), elbow), (elbow, (tip_x, tip_y))]

    @staticmethod
    def _tip(state: Tensor) -> Tensor:
        first = state[:, 0]
        both = first + state[:, 1]
        x = LINK * (torch.cos(first) + torch.cos(both))
        y = LINK * (torch.sin(first) + torch.sin(both))
        return torch.stack([x, y], dim=-1)
