"""Off-policy sequence mask: what went badly and is no longer likely is left alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.objective import Objective, Scope, require_positive
from rgpo.core.objectives.ppo import PPO
from rgpo.core.recipes import Recipe, register
from rgpo.core.units import unit_mean


@dataclass(frozen=True)
class MaskedPPO(Objective):
    """PPO's J and w, 0 where A < 0 and the sequence's mean of log mu - log pi exceeds a threshold.

    DeepSeek-V3.2's mask (arXiv 2512.02556; formula: TRL and slime). The dropped tokens stay in the
    denominator.
    """

    clip_low: float = 0.2
    """Distance of the lower bound of the token ratio from 1; 1 or more removes it."""

    clip_high: float = 0.2
    """Distance of the upper bound from 1."""

    threshold: float = 0.5
    """delta (TRL suggests 0.5, slime 1e-4)."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high, threshold=self.threshold)

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        surrogate = PPO(self.clip_low, self.clip_high).value(log_ratio, advantage)
        return torch.where(self._dropped(log_ratio, advantage, mask), 0, surrogate)

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        weight = PPO(self.clip_low, self.clip_high).weight(log_ratio, advantage)
        return torch.where(self._dropped(log_ratio, advantage, mask), 0, weight)

    def _dropped(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        return (advantage < 0) & (unit_mean(-log_ratio, mask) > self.threshold)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "ppo-opsm",
        MaskedPPO(),
        paper="2512.02556",
        summary="PPO without the negative sequences that the policy has left: DeepSeek-V3.2's mask",
        reduction="sequence-mean",
        confidence="formula: frameworks' code; threshold 0.5: TRL's suggestion",
    )
)
