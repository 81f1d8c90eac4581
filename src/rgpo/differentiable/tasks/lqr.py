"""A linear-quadratic regulator: the task whose optimum is known in closed form."""

import torch
from torch import Tensor

from rgpo.differentiable.tasks.task import Segment, Task, between


class LQR(Task):
    """Two double integrators: state (x, y, and their velocities), action: two accelerations.

    Reward: -(|position|^2 + 0.1 |velocity|^2 + 0.1 |action|^2). The optimal mean policy is linear
    and the same for any exploration noise that does not depend on the state.
    """

    state_size, observation_size, action_size, noise_size = 4, 4, 2, 4
    max_steps, dt = 200, 0.1
    bounded = False

    def initial(self, noise: Tensor) -> Tensor:  # noqa: D102
        return between(noise, -1, 1)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        place, motion = state.split(2, dim=-1)
        cost = (place**2).sum(-1) + 0.1 * (motion**2).sum(-1) + 0.1 * (action**2).sum(-1)
        state = torch.cat([place + self.dt * motion, motion + self.dt * action], dim=-1)
        return state, -cost, torch.zeros_like(cost, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:  # noqa: D102
        return state

    def drawing(self, state: Tensor) -> list[Segment]:  # noqa: D102
        x, y = state[:2].tolist()
        return [
            ((-0.1, 0.0), (0.1, 0.0)),
            ((x - 0.1, y), (x + 0.1, y)),
            ((x, y - 0.1), (x, y + 0.1)),
        ]

    def optimum(self, gamma: float) -> tuple[Tensor, Tensor]:
        """(P, K) in float64: the optimal cost of state x is x' P x, the optimal action is -K x.

        The discounted Riccati equation by iteration to its fixed point:
        K = (R + g B'PB)^-1 g B'PA,  P = Q + g A'P(A - BK).
        """
        eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        a = torch.cat([torch.cat([eye, self.dt * eye], 1), torch.cat([zero, eye], 1)])
        b = torch.cat([zero, self.dt * eye])
        q = torch.diag(torch.tensor([1.0, 1.0, 0.1, 0.1], dtype=torch.float64))
        p, change = q, 1.0
        gain = torch.zeros(2, 4, dtype=torch.float64)
        while change > 1e-13:
            gain = torch.linalg.solve(0.1 * eye + gamma * b.T @ p @ b, gamma * b.T @ p @ a)
            old, p = p, q + gamma * a.T @ p @ (a - b @ gain)
            change = float((p - old).abs().max())
        return p, gain
