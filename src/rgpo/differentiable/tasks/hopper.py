"""A planar one-legged hopper: a task with contact."""

import torch
from torch import Tensor

from rgpo.differentiable.tasks.task import Segment, Task, between

GRAVITY, BODY, FOOT, LEG, STROKE = 9.8, 1.0, 0.2, 1.0, 0.3
LEG_STIFFNESS, LEG_DAMPING, HIP_FORCE = 200.0, 4.0, 8.0
GROUND_STIFFNESS, GROUND_DAMPING, FRICTION, SLIP = 2000.0, 20.0, 1.0, 0.1
LOWEST, SUBSTEPS = 0.5, 8


class Hopper(Task):
    """State (body x, z; foot x, z; and their velocities); actions: leg length, hip force.

    Two point masses joined by a spring whose rest length the first action moves by up to 0.3 m;
    the second swings the leg by a pair of opposite forces across it. The ground pushes back with
    a damped spring where the foot is below it (never pulls), and rubs with Coulomb friction that
    is linear below 0.1 m/s. The force is continuous, its derivative jumps at touch-down: gradients
    are exact on either side. Eight substeps of 2.5 ms, semi-implicit Euler.

    Reward: forward speed of the body up to 2 m/s, plus 1 - 10 relu(0.95 - z)^2 for height z, minus
    0.05 |action|^2. Terminated where the body is below 0.5 m: the height term warns of that, since
    a pathwise gradient does not see a termination coming. Model and constants are our own.
    """

    state_size, observation_size, action_size, noise_size = 8, 7, 2, 4
    max_steps, dt = 200, 0.02
    view = (-2.5, 2.5, -0.3, 3.7)

    def initial(self, noise: Tensor) -> Tensor:  # noqa: D102
        z = between(noise[:, 0], 1.05, 1.15)
        lean, speed, rise = between(noise[:, 1:], -0.1, 0.1).unbind(-1)
        zero = torch.zeros_like(z)
        return torch.stack([zero, z, lean, z - LEG, speed, rise, speed, rise], dim=-1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        before = state[:, 0]
        for _ in range(SUBSTEPS):
            state = self._substep(state, action)
        speed = (state[:, 0] - before) / self.dt
        # saturates smoothly: a hard limit would have no gradient beyond it
        height = 1 - 10 * torch.relu(0.95 - state[:, 1]) ** 2
        reward = 2 * torch.tanh(speed / 2) + height - 0.05 * (action**2).sum(-1)
        return state, reward, state[:, 1] < LOWEST

    def _substep(self, state: Tensor, action: Tensor) -> Tensor:
        place, motion = state[:, :4], state[:, 4:]
        leg, stretch = place[:, :2] - place[:, 2:], motion[:, :2] - motion[:, 2:]
        length = torch.sqrt((leg**2).sum(-1, keepdim=True) + 1e-6)
        axis = leg / length
        across = torch.stack([axis[:, 1], -axis[:, 0]], dim=-1)
        rate = (stretch * axis).sum(-1, keepdim=True)
        rest = LEG + STROKE * action[:, :1]
        force = (LEG_STIFFNESS * (rest - length) - LEG_DAMPING * rate) * axis
        force = force + HIP_FORCE * action[:, 1:] * across
        weight = torch.tensor([0.0, GRAVITY], dtype=state.dtype, device=state.device)
        body = force / BODY - weight
        foot = (self._ground(place[:, 3], motion[:, 2], motion[:, 3]) - force) / FOOT - weight
        motion = motion + self.dt / SUBSTEPS * torch.cat([body, foot], dim=-1)
        return torch.cat([place + self.dt / SUBSTEPS * motion, motion], dim=-1)

    @staticmethod
    def _ground(height: Tensor, sliding: Tensor, rising: Tensor) -> Tensor:
        """Force of the ground on the foot, (E, 2)."""
        depth = torch.relu(-height)
        inside = torch.clamp(depth / 0.005, max=1)  # damping sets in without a jump
        normal = torch.relu(GROUND_STIFFNESS * depth - GROUND_DAMPING * inside * rising)
        return torch.stack([-FRICTION * normal * torch.tanh(sliding / SLIP), normal], dim=-1)

    def observe(self, state: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([state[:, 1:2], state[:, 2:4] - state[:, :2], state[:, 4:]], dim=-1)

    def drawing(self, state: Tensor) -> list[Segment]:  # noqa: D102
        x, z, foot_x, foot_z = state[:4].tolist()
        marks: list[Segment] = [((k - x % 1, 0.0), (k - x % 1, -0.1)) for k in range(-3, 4)]
        body: Segment = ((-0.15, z), (0.15, z))
        return [((-2.5, 0.0), (2.5, 0.0)), *marks, body, ((0.0, z), (foot_x - x, foot_z))]
