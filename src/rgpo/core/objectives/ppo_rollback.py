"""PPO with rollback, and the trust-region tests on the KL of its authors."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.kl import k3
from rgpo.core.objective import SAFE_LOG_RATIO, Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class PPORollback(Objective):
    """PPO whose flat part has the slope -rollback (PPO-RB, arXiv 1903.07940).

    Beyond its bound b = 1 +- clip on the side that A pushes to, r is replaced by
    (1 + rollback) b - rollback r, so that w = -rollback r A there and r A elsewhere.
    """

    clip: float = 0.2
    """Distance of the bounds from 1."""

    rollback: float = 0.3
    """-alpha of the paper: strength of the pull back."""

    def __post_init__(self) -> None:
        require_positive(clip=self.clip, rollback=self.rollback)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        high = ratio - (1 + self.rollback) * torch.relu(ratio - (1 + self.clip))
        low = ratio + (1 + self.rollback) * torch.relu((1 - self.clip) - ratio)
        return torch.where(advantage > 0, high, low) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        outside = torch.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        force = ratio * advantage
        return torch.where(outside, -self.rollback * force, force)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


@dataclass(frozen=True)
class TRPPO(Objective):
    """W = r A, but 0 where KL(old || new) >= delta at the state and r A > A (arXiv 1903.07940).

    The trust region is tested on the distribution, not on the ratio of the action taken. J = r A,
    with the gradient stopped where the test fails.
    """

    delta: float = 0.035
    """KL at which a state counts as left."""

    needs: ClassVar[tuple[str, ...]] = ("kl",)

    def __post_init__(self) -> None:
        require_positive(delta=self.delta)

    def value(self, log_ratio: Tensor, advantage: Tensor, kl: Tensor) -> Tensor:  # noqa: D102
        surrogate = safe_ratio(log_ratio) * advantage
        return torch.where(
            _left(log_ratio, advantage, kl, self.delta), surrogate.detach(), surrogate
        )

    def weight(self, log_ratio: Tensor, advantage: Tensor, kl: Tensor) -> Tensor:  # noqa: D102
        inside = ~_left(log_ratio, advantage, kl, self.delta)
        return safe_ratio(log_ratio) * advantage * inside

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


@dataclass(frozen=True)
class TrulyPPO(Objective):
    """J = r A, but likelihood r A - penalty KL(old || new) where TR-PPO's test fails.

    arXiv 1903.07940. The authors differentiate the exact KL of the state. A weight on the log-prob
    of the action taken cannot; here it has the slope of the sampled estimate k3 = r - 1 - log r,
    so that w = likelihood r A - penalty (r - 1): the action's own ratio is pulled back, not the
    whole distribution. (Over all actions k3 has the mean and the mean gradient of the KL; over
    those that A pushes outward, where the penalty acts, it has not.) The test is on the exact KL.
    """

    delta: float = 0.03
    """KL at which a state counts as left."""

    penalty: float = 5.0
    """Weight of the KL where it does."""

    likelihood: float = 1.0
    """Factor on r A where it does."""

    homogeneous = False
    needs: ClassVar[tuple[str, ...]] = ("kl",)

    def __post_init__(self) -> None:
        require_positive(delta=self.delta, penalty=self.penalty)
        if not 0 <= self.likelihood < float("inf"):
            raise ValueError(f"likelihood must be finite and not negative, got {self.likelihood}")

    def value(self, log_ratio: Tensor, advantage: Tensor, kl: Tensor) -> Tensor:  # noqa: D102
        surrogate = safe_ratio(log_ratio) * advantage
        pulled = self.likelihood * surrogate - self.penalty * k3(
            torch.clamp(log_ratio, max=SAFE_LOG_RATIO)
        )
        return torch.where(_left(log_ratio, advantage, kl, self.delta), pulled, surrogate)

    def weight(self, log_ratio: Tensor, advantage: Tensor, kl: Tensor) -> Tensor:  # noqa: D102
        ratio = safe_ratio(log_ratio)
        pulled = self.likelihood * ratio * advantage - self.penalty * (ratio - 1)
        return torch.where(_left(log_ratio, advantage, kl, self.delta), pulled, ratio * advantage)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


def _left(log_ratio: Tensor, advantage: Tensor, kl: Tensor, delta: float) -> Tensor:
    """Whether the state has left the trust region and A pushes the ratio further from 1."""
    return (kl >= delta) & (log_ratio * torch.sign(advantage) > 0)


CODE = "formula and defaults for MuJoCo: the authors' code"

register(
    Recipe(
        "ppo-rb",
        PPORollback(),
        paper="1903.07940",
        summary="PPO with a negative slope in place of the flat one",
        confidence=CODE + "; Humanoid there: rollback 0.02, Atari: 0.01 and clip 0.1",
    ),
    Recipe(
        "tr-ppo",
        TRPPO(),
        paper="1903.07940",
        summary="no force outward where the state's KL is too large, whatever the ratio",
        confidence=CODE + "; Humanoid there: delta 0.05, Atari: 0.001",
    ),
    Recipe(
        "truly-ppo",
        TrulyPPO(),
        paper="1903.07940",
        summary="tr-ppo with a KL penalty where the state's KL is too large",
        confidence=CODE + "; the KL's slope, through the sampled k3: ours",
    ),
)
