"""Tabular decision problems that are solved exactly, many at a time.

All tensors are float64 and lead with M, the number of problems of one shape: S states, A actions.
With P_pi the transition matrix of a policy and mu the distribution of the first state,

    V = (I - gamma P_pi)^-1 r_pi        Q = r + gamma P V        A = Q - V
    d = (1 - gamma) (I - gamma P_pi^T)^-1 mu        J = mu . V

so d sums to 1 and J is the discounted return. The performance difference lemma
(Kakade & Langford 2002) is then exact, with A that of the old policy and d that of the new one:

    J(pi) - J(pi_old) = E_{s ~ d, a ~ pi} A(s, a) / (1 - gamma)
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problems:
    """M decision problems of one shape; ValueError for what is no decision problem."""

    transition: Tensor
    """(M, S, A, S): probability of the next state."""

    reward: Tensor
    """(M, S, A)."""

    start: Tensor
    """(M, S): distribution of the first state."""

    gamma: float
    """Discount of all of them, in [0, 1)."""

    def __post_init__(self) -> None:
        m, s, a = self.reward.shape
        for name, shape in (("transition", (m, s, a, s)), ("start", (m, s))):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} must be {shape} to fit the reward, got {found}")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1) for finite sums, got {self.gamma}")
        _require_distribution("transition", self.transition)
        _require_distribution("start", self.start)
        if not torch.isfinite(self.reward).all():
            raise ValueError("the reward must be finite")


@dataclass(frozen=True)
class Solution:
    """What one policy is worth, exactly."""

    value: Tensor
    """(M, S): V."""

    advantage: Tensor
    """(M, S, A): Q - V; its mean under the policy is 0 in every state."""

    visits: Tensor
    """(M, S): discounted state distribution, sums to 1."""

    performance: Tensor
    """(M,): J, the expected discounted return from the first state."""


def solve(problems: Problems, policy: Tensor) -> Solution:
    """Evaluate `policy` (M, S, A), probabilities over the last axis, on every problem."""
    if policy.shape != problems.reward.shape:
        wanted, found = tuple(problems.reward.shape), tuple(policy.shape)
        raise ValueError(f"the policy must be (M, S, A) = {wanted}, got {found}")
    _require_distribution("policy", policy)
    gamma = problems.gamma
    move = torch.einsum("msa,msat->mst", policy, problems.transition)
    system = torch.eye(move.shape[-1], dtype=move.dtype) - gamma * move
    value = torch.linalg.solve(system, (policy * problems.reward).sum(-1))
    visits = (1 - gamma) * torch.linalg.solve(system.mT, problems.start)
    future = torch.einsum("msat,mt->msa", problems.transition, value)
    advantage = problems.reward + gamma * future - value[..., None]
    return Solution(value, advantage, visits, (problems.start * value).sum(-1))


def random_problems(
    count: int, states: int, actions: int, gamma: float, generator: torch.Generator
) -> Problems:
    """Draw problems: transition rows and first state uniform on the simplex, normal rewards."""

    def simplex(*shape: int) -> Tensor:
        uniform = torch.rand(count, *shape, dtype=torch.float64, generator=generator)
        weight = -torch.log1p(-uniform)  # exponential, whose shares are uniform on the simplex
        return weight / weight.sum(-1, keepdim=True)

    reward = torch.randn(count, states, actions, dtype=torch.float64, generator=generator)
    return Problems(simplex(states, actions, states), reward, simplex(states), gamma)


def _require_distribution(name: str, probability: Tensor) -> None:
    total = probability.sum(-1)
    if not ((probability >= 0).all() and torch.allclose(total, torch.ones_like(total))):
        raise ValueError(f"{name} must hold probabilities that sum to 1 over the last axis")
