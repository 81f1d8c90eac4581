"""SAPO: a sigmoid gate with its own temperature for each sign of the advantage."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.gates import Gate
from rgpo.core.kl import KLPenalty
from rgpo.core.objective import SAFE_LOG_RATIO, Objective, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class SAPO(Objective):
    """J = (4/tau) s(tau (r - 1)) A, w = sech^2(tau (r - 1)/2) r A (arXiv 2511.20347).

    tau_positive for A > 0, tau_negative otherwise. With equal temperatures it is RGPO's normalised
    gate at k = tau, and P3O's scopic objective (arXiv 2205.10047), up to a constant.
    """

    tau_positive: float = 1.0
    """Temperature for A > 0."""

    tau_negative: float = 1.05
    """Temperature for A <= 0."""

    def __post_init__(self) -> None:
        require_positive(tau_positive=self.tau_positive, tau_negative=self.tau_negative)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        shift = torch.expm1(torch.clamp(log_ratio, max=SAFE_LOG_RATIO))
        positive = 4 / self.tau_positive * torch.sigmoid(self.tau_positive * shift)
        negative = 4 / self.tau_negative * torch.sigmoid(self.tau_negative * shift)
        return torch.where(advantage > 0, positive, negative) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        positive = Gate(self.tau_positive).weight(log_ratio)
        negative = Gate(self.tau_negative).weight(log_ratio)
        return torch.where(advantage > 0, positive, negative) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return max(Gate(self.tau_positive).sup_weight, Gate(self.tau_negative).sup_weight)


register(
    Recipe(
        "sapo",
        SAPO(),
        paper="2511.20347",
        summary="wide sigmoid gate, slightly narrower for A < 0",
        reduction="sequence-mean",
        confidence="formula and defaults: four frameworks' code agree",
    ),
    Recipe(
        "p3o-scopic",
        SAPO(tau_positive=4.0, tau_negative=4.0),
        paper="2205.10047",
        summary="one sigmoid gate for both signs, with a fixed KL penalty",
        kl=KLPenalty(0.1),
        confidence="formula, tau and coefficient for MuJoCo: the authors' code; Atari: 2 and 1",
    ),
)
