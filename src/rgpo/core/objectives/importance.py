"""Importance sampling: the exact but unbounded weight, alone and inside KL-controlled methods."""

from dataclasses import dataclass

from torch import Tensor

from rgpo.core.kl import KLPenalty
from rgpo.core.objective import Objective, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class Importance(Objective):
    """J = r A, w = r A: TRPO's and CPI's surrogate (arXiv 1502.05477, Eq. 14)."""

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return safe_ratio(log_ratio) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return safe_ratio(log_ratio) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "importance",
        Importance(),
        paper="1502.05477",
        summary="plain importance ratio, nothing holds the policy: the control arm of every study",
    ),
    Recipe(
        "trpo",
        Importance(),
        paper="1502.05477",
        summary="importance ratio with a natural-gradient step inside a KL ball",
        step="natural-gradient",
    ),
    Recipe(
        "ppo-kl",
        Importance(),
        paper="1707.06347",
        summary="importance ratio, adaptive KL penalty, no clip (section 4): KL control alone",
        kl=KLPenalty(1.0, target=0.01),
    ),
    Recipe(
        "mdpo",
        Importance(),
        paper="2005.09814",
        summary="importance ratio, KL(new || old) penalty over the share of training left, no clip",
        kl=KLPenalty(1.0, direction="reverse", annealed=True),
        confidence="on-policy form, as in the authors' code, whose KL coefficient is unused there",
    ),
)
