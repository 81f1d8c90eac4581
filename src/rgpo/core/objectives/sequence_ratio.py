"""PPO-like surrogates whose ratio is that of a whole sequence, length-normalised."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.objective import Objective, Scope, require_positive, safe_ratio
from rgpo.core.objectives.ppo import PPO
from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.recipes import Recipe, register
from rgpo.core.units import through_own, unit_mean


@dataclass(frozen=True)
class GSPOToken(Objective):
    """PPO's clip on the ratio s that a sequence's tokens share, each with its A (2507.18071).

    J_t = min(s_t A_t, clip(s_t) A_t), s_t = sg[s / r_t] r_t and s = exp(mean d). w = s A_t where
    not clipped; with one A for the sequence the gradient is GSPO's.
    """

    clip_low: float = 3e-4
    """Distance of the lower bound of s from 1; 1 or more removes it."""

    clip_high: float = 4e-4
    """Distance of the upper bound of s from 1."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high)

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        shared = through_own(unit_mean(log_ratio, mask), log_ratio)
        return PPO(self.clip_low, self.clip_high).value(shared, advantage)

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        return PPO(self.clip_low, self.clip_high).weight(unit_mean(log_ratio, mask), advantage)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


@dataclass(frozen=True)
class GMPO(Objective):
    """J_t = A_t exp(mean of clipped d), each d clipped in log-space (arXiv 2507.20673).

    The clip is one-sided like PPO's: d <= bound for A > 0, d >= -bound for A < 0. Every token that
    is not clipped has w = mean(A) exp(mean of clipped d), the others 0. A < 0 with large d is
    left unclipped by design (the authors' answer in their issue 4).
    """

    bound: float = 0.4
    """Bound of |d| per token."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)
    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        require_positive(bound=self.bound)

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(unit_mean(self._clipped(log_ratio, advantage), mask))
        return torch.where(mask, ratio * advantage, 0)

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        clipped = self._clipped(log_ratio, advantage)
        shared = safe_ratio(unit_mean(clipped, mask)) * unit_mean(advantage, mask)
        return shared * (clipped == log_ratio)

    def _clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        below, above = log_ratio.clamp(max=self.bound), log_ratio.clamp(min=-self.bound)
        return torch.where(advantage > 0, below, above)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "gspo-token",
        GSPOToken(),
        paper="2507.18071",
        summary="GSPO's sequence ratio and clip, with an advantage per token",
        reduction="sequence-mean",
    ),
    Recipe(
        "luspo",
        PPO(clip_low=2e-3, clip_high=2.5e-3),
        paper="2602.05261",
        summary="GSPO times the length: a long sequence weighs as much as its tokens",
        level="sequence",
        confidence="formula and bounds: TRL's code; divided by tokens in place of sequences",
    ),
    Recipe(
        "gmpo",
        GMPO(),
        paper="2507.20673",
        summary="geometric mean of token ratios that are clipped one by one",
        reduction="sequence-mean",
        confidence="formula and bound 0.4: authors' code",
    ),
    Recipe(
        "rgpo-sequence",
        RGPO(sharpness=5000.0),
        paper="2604.14895",
        summary="RGPO's gate on the length-normalised sequence ratio",
        level="sequence",
        reduction="sequence-mean",
        confidence="gate: paper's abstract; level and k = 2/eps with GSPO's eps of 4e-4: ours",
    ),
)
