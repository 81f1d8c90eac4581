"""Clips around a proximal policy, corrected for data that a third, older policy has sampled.

d = log pi - log mu against the behaviour policy mu, d_prox = log pi - log pi_prox against the
anchor. Their difference c = d - d_prox = log pi_prox - log mu does not depend on pi: e^c corrects
for the age of the data and for another inference engine, the clip acts on e^d_prox alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rgpo.core.clips import clipped_value, clipped_weight
from rgpo.core.objective import Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register

Guard = Literal["truncate", "mask", "total"]


@dataclass(frozen=True)
class DecoupledPPO(Objective):
    """J = sg[G(e^c)] min(u A, clip(u, 1 - clip_low, 1 + clip_high) A), u = pi / pi_prox.

    arXiv 2110.00641 and 2505.24298. w = G(e^c) u A, which is r A where the guard G is inactive,
    and 0 where PPO clips u. Dropped elements stay in the reduction's denominator.

    | guard    | G(e^c)                                              |
    |----------|-----------------------------------------------------|
    | truncate | min(e^c, correction_high)                           |
    | mask     | e^c in [correction_low, correction_high], else 0    |
    | total    | e^c, less where the whole weight r would exceed correction_high |
    """

    clip_low: float = 0.2
    """Distance of the lower bound of u from 1; 1 or more removes it."""

    clip_high: float = 0.2
    """Distance of the upper bound of u from 1."""

    guard: Guard = "truncate"
    """What keeps the correction e^c from exploding."""

    correction_low: float = 0.0
    """Smallest correction that `mask` keeps."""

    correction_high: float = 5.0
    """Largest correction, or largest weight (`total`)."""

    needs: ClassVar[tuple[str, ...]] = ("proximal_log_ratio",)

    def __post_init__(self) -> None:
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high)
        if self.guard not in ("truncate", "mask", "total"):
            raise ValueError(f"unknown guard {self.guard!r}: choose truncate, mask or total")
        if not 0 <= self.correction_low <= 1 <= self.correction_high < float("inf"):
            raise ValueError(
                "need 0 <= correction_low <= 1 <= correction_high < inf, got "
                f"correction_low {self.correction_low}, correction_high {self.correction_high}"
            )

    def value(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, proximal_log_ratio: Tensor
    ) -> Tensor:
        correction, kept = self._correction(log_ratio.detach(), proximal_log_ratio.detach())
        low = math.log1p(-self.clip_low) if self.clip_low < 1 else -math.inf
        clipped = torch.clamp(proximal_log_ratio, low, math.log1p(self.clip_high))
        surrogate = torch.minimum(
            safe_ratio(correction + proximal_log_ratio) * advantage,
            safe_ratio(correction + clipped) * advantage,
        )
        return torch.where(kept, surrogate, 0)

    def weight(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, proximal_log_ratio: Tensor
    ) -> Tensor:
        correction, kept = self._correction(log_ratio, proximal_log_ratio)
        ratio = safe_ratio(proximal_log_ratio)
        inside = torch.where(advantage > 0, ratio <= 1 + self.clip_high, ratio >= 1 - self.clip_low)
        return safe_ratio(correction + proximal_log_ratio) * advantage * (kept & inside)

    def _correction(self, log_ratio: Tensor, proximal_log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Log G(e^c), and where it is not 0."""
        correction = log_ratio - proximal_log_ratio
        high = math.log(self.correction_high)
        if self.guard == "mask":
            low = math.log(self.correction_low) if self.correction_low > 0 else -math.inf
            return correction, (correction >= low) & (correction <= high)
        limit = (
            high - proximal_log_ratio
            if self.guard == "total"
            else torch.full_like(correction, high)
        )
        return torch.minimum(correction, limit), torch.ones_like(correction, dtype=torch.bool)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.correction_high if self.guard == "total" else float("inf")


@dataclass(frozen=True)
class ReMix(Objective):
    """J = min(r A, clip(r, e^c - clip, e^c + clip) A), w = r A inside (arXiv 2507.06892).

    PPO's clip on the ratio to the behaviour policy, centred where the proximal policy, the one at
    the start of the update, stands: old data start unclipped. Formula: third-party notes.
    """

    clip: float = 0.2
    """Half-width of the interval."""

    needs: ClassVar[tuple[str, ...]] = ("proximal_log_ratio",)

    def __post_init__(self) -> None:
        require_positive(clip=self.clip)

    def value(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, proximal_log_ratio: Tensor
    ) -> Tensor:
        return clipped_value(log_ratio, advantage, *self._bounds(log_ratio, proximal_log_ratio))

    def weight(  # noqa: D102
        self, log_ratio: Tensor, advantage: Tensor, proximal_log_ratio: Tensor
    ) -> Tensor:
        return clipped_weight(log_ratio, advantage, *self._bounds(log_ratio, proximal_log_ratio))

    def _bounds(self, log_ratio: Tensor, proximal_log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        center = safe_ratio((log_ratio - proximal_log_ratio).detach())
        return center - self.clip, center + self.clip

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


WINDOW = 16
"""Staleness window W of the averaged anchors, in optimiser steps: decay = W / (W + 2) = 0.889."""

register(
    Recipe(
        "decoupled-ppo",
        DecoupledPPO(),
        paper="2505.24298",
        summary="PPO's clip around the policy at the start of the update, data of an older one",
        confidence="formula: paper; cap 5: AReaL's code, which also offers a mask",
    ),
    Recipe(
        "ppo-tis",
        DecoupledPPO(correction_high=2.0),
        paper="verl, slime",
        summary="PPO times the truncated ratio of the training to the inference engine (TIS)",
        confidence="formula and cap 2: frameworks' code",
    ),
    Recipe(
        "ppo-mis",
        DecoupledPPO(guard="mask", correction_low=0.5, correction_high=2.0),
        paper="verl, TRL",
        summary="PPO without the tokens whose training and inference engines disagree (IcePop)",
        confidence="formula: frameworks' code; [0.5, 2]: TRL's example",
    ),
    Recipe(
        "ppo-ewma",
        DecoupledPPO(guard="total", correction_high=100.0),
        paper="2110.00641",
        summary="PPO's clip around an average of past parameters: batch-size invariant",
        anchor_decay=WINDOW / (WINDOW + 2),
        confidence="formula and cap 100: authors' code; decay 0.889: recalled, not re-checked",
    ),
    Recipe(
        "ppo-ewma-revised",
        DecoupledPPO(correction_high=2.0),
        paper="2605.12070",
        summary="averaged anchor in place of lost old log-probs, correction truncated to [0, 2]",
        anchor_decay=WINDOW / (WINDOW + 2),
        anchor_reset=0.9,
        confidence="formula, truncation, reset, decay W/(W+2): third-party notes; W = 16: inferred",
    ),
    Recipe(
        "remix",
        ReMix(),
        paper="2507.06892",
        summary="PPO's clip centred on the ratio that old data have at the start of the update",
        confidence="formula: third-party notes; clip 0.2: inferred",
    ),
)
