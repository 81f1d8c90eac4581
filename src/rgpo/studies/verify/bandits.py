"""Finite problems of one state, on which every expectation is a sum and nothing is sampled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.kl import categorical_kl
from rgpo.core.objective import Objective
from rgpo.studies.verify.finding import generator, normal


@dataclass(frozen=True)
class Bandits:
    """M problems with A actions, two softmax policies each; gradients are those by the logits."""

    old: Tensor
    """(M, A): probabilities of the policy that collected the data."""

    log_ratio: Tensor
    """(M, A): log pi - log pi_old."""

    advantage: Tensor
    """(M, A): of mean 0 under `old`."""

    kl: Tensor
    """(M,): KL(old || new)."""

    @property
    def ratio(self) -> Tensor:
        """(M, A)."""
        return self.log_ratio.exp()

    @property
    def score(self) -> Tensor:
        """(M, A, A): gradient of log pi of each action."""
        new = self.old * self.ratio
        return torch.eye(new.shape[-1], dtype=new.dtype) - new[:, None, :]

    @property
    def size(self) -> Tensor:
        """(M, A): norm of psi = A grad log pi."""
        return self.advantage.abs() * self.score.norm(dim=-1)

    @property
    def true_gradient(self) -> Tensor:
        """(M, A): E_old[r A grad log pi]."""
        return self.gradient(self.ratio * self.advantage)

    def mean(self, x: Tensor) -> Tensor:
        """(M,): E_old[x]."""
        return (self.old * x).sum(-1)

    def gradient(self, weight: Tensor) -> Tensor:
        """(M, A): E_old[w grad log pi] for weights (M, A), which hold the advantage."""
        return torch.einsum("ma,mab->mb", self.old * weight, self.score)

    def variance(self, weight: Tensor) -> Tensor:
        """(M,): E|x|^2 - |E x|^2 of x = w grad log pi."""
        second = self.mean((weight[..., None] * self.score).square().sum(-1))
        return torch.clamp(second - self.gradient(weight).square().sum(-1), min=0)

    def bias(self, objective: Objective) -> Tensor:
        """(M,): norm of the error of the objective's gradient."""
        weight = objective.weight(self.log_ratio, self.advantage)
        return (self.gradient(weight) - self.true_gradient).norm(dim=-1)


def random_bandits(count: int, actions: int, step: float, seed: int) -> Bandits:
    """Softmax policies of standard normal logits, changed by `step` times standard normals."""
    source = generator(seed)
    logits = normal(count, actions, source=source)
    moved = logits + step * normal(count, actions, source=source)
    old, advantage = torch.softmax(logits, -1), normal(count, actions, source=source)
    advantage = advantage - (old * advantage).sum(-1, keepdim=True)
    log_ratio = torch.log_softmax(moved, -1) - torch.log_softmax(logits, -1)
    return Bandits(old, log_ratio, advantage, categorical_kl(logits, moved))
