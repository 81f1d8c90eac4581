"""The REC family: REINFORCE with a mask, a detached weight and a regulariser, and its relatives."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rgpo.core.objective import SAFE_LOG_RATIO, Objective, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register

Mask = Literal["none", "one-side", "two-side", "ring"]
Weighting = Literal["none", "is", "truncated", "advantage", "tempered"]
Regularizer = Literal["none", "k2", "forward-kl"]


@dataclass(frozen=True)
class REC(Objective):
    """J = sg[M W A] log r + R, w = M W A + dR/dd (arXiv 2509.24203).

    | mask     | M = 1 where                                                          |
    |----------|----------------------------------------------------------------------|
    | one-side | r <= 1 + clip_high for A >= 0, r >= 1 - clip_low for A <= 0 (PPO's)  |
    | two-side | 1 - clip_low <= r <= 1 + clip_high                                   |
    | ring     | two-side, or restoring and beyond 1 - outer_low or 1 + outer_high    |

    | weighting | W                                        | regularizer | R          |
    |-----------|------------------------------------------|-------------|------------|
    | is        | r                                        | k2          | -c d^2     |
    | truncated | clip(r, 1 - outer_low, 1 + outer_high)   | forward-kl  | c d        |
    | advantage | exp(A / temperature) (RED-Weight)        |             |            |
    | tempered  | 1 / (1 + temperature) (Trinity's OPMD)   |             |            |

    The regulariser acts on masked elements too. forward-kl is the same as c added to every
    advantage (AsymRE); k2 is Kimi's OPMD with c = tau/2 and DRO with c = beta/2.
    """

    mask: Mask = "none"
    """Which elements keep their weight."""

    weighting: Weighting = "none"
    """The detached weight on them."""

    regularizer: Regularizer = "none"
    """What is added, with `coefficient`."""

    coefficient: float = 0.0
    """c of the regulariser."""

    clip_low: float = 0.2
    """Distance of the mask's lower bound from 1."""

    clip_high: float = 0.2
    """Distance of the mask's upper bound from 1."""

    outer_low: float = 0.6
    """Distance from 1 of the ring's lower edge and of the truncation's lower bound."""

    outer_high: float = 2.0
    """Distance from 1 of the ring's upper edge and of the truncation's upper bound."""

    temperature: float = 1.0
    """tau of `advantage` and `tempered`."""

    def __post_init__(self) -> None:
        for name, kinds in (("mask", Mask), ("weighting", Weighting), ("regularizer", Regularizer)):
            if (chosen := getattr(self, name)) not in get_args(kinds):
                raise ValueError(f"unknown {name} {chosen!r}: choose {', '.join(get_args(kinds))}")
        require_positive(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            outer_low=self.outer_low,
            outer_high=self.outer_high,
            temperature=self.temperature,
        )
        if not 0 <= self.coefficient < float("inf"):
            raise ValueError(f"coefficient must be finite and not negative, got {self.coefficient}")
        if (self.regularizer == "none") != (self.coefficient == 0):
            raise ValueError(
                f"regularizer {self.regularizer!r} contradicts coefficient {self.coefficient}: "
                "give both or neither"
            )

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        value = self._masked(log_ratio.detach(), advantage) * log_ratio
        if self.regularizer == "k2":
            return value - self.coefficient * log_ratio**2
        return value + self.coefficient * log_ratio

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        weight = self._masked(log_ratio, advantage)
        if self.regularizer == "k2":
            return weight - 2 * self.coefficient * log_ratio
        return weight + self.coefficient

    def _masked(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """M W A."""
        ratio = safe_ratio(log_ratio)
        below, above = ratio <= 1 + self.clip_high, ratio >= 1 - self.clip_low
        if self.mask == "one-side":
            advantage = advantage * torch.where(advantage > 0, below, above)
        elif self.mask == "two-side":
            advantage = advantage * (below & above)
        elif self.mask == "ring":
            far = torch.where(
                advantage > 0, ratio <= 1 - self.outer_low, ratio >= 1 + self.outer_high
            )
            advantage = advantage * (below & above | far)
        if self.weighting == "is":
            return ratio * advantage
        if self.weighting == "truncated":
            return torch.clamp(ratio, 1 - self.outer_low, 1 + self.outer_high) * advantage
        if self.weighting == "advantage":
            return torch.exp(torch.clamp(advantage / self.temperature, max=SAFE_LOG_RATIO)) * (
                advantage
            )
        return advantage / (1 + self.temperature) if self.weighting == "tempered" else advantage

    @property
    def homogeneous(self) -> bool:  # noqa: D102
        return self.regularizer == "none" and self.weighting != "advantage"

    @property
    def unit_slope(self) -> bool:  # noqa: D102
        return self.weighting in ("none", "is", "truncated") and self.regularizer != "forward-kl"

    @property
    def sup_weight(self) -> float:  # noqa: D102
        bounded = 1 + self.clip_high if self.mask == "two-side" else float("inf")
        largest = {
            "none": 1.0,
            "is": bounded,
            "truncated": min(1 + self.outer_high, bounded),
            "advantage": math.exp(1 / self.temperature),
            "tempered": 1 / (1 + self.temperature),
        }[self.weighting]
        return float("inf") if self.regularizer == "k2" else largest + self.coefficient


CODE = "formula and defaults: the authors' code (Trinity-RFT)"
OTHERS = "formula and c: Trinity-RFT, the code of 2509.24203"


def _recipe(
    name: str,
    objective: REC,
    summary: str,
    paper: str = "2509.24203",
    confidence: str = CODE,
) -> Recipe:
    return Recipe(name, objective, paper=paper, summary=summary, confidence=confidence)


register(
    _recipe(
        "rec-oneside-is",
        REC(mask="one-side", weighting="is"),
        "REINFORCE with PPO's mask and importance weight: PPO's gradient exactly",
    ),
    _recipe(
        "rec-oneside-nois",
        REC(mask="one-side"),
        "REINFORCE with PPO's mask and no importance weight",
    ),
    _recipe(
        "rec-twoside",
        REC(mask="two-side", weighting="is"),
        "importance-weighted REINFORCE inside the clip interval only",
    ),
    _recipe(
        "rec-ring",
        REC(mask="ring", weighting="is"),
        "rec-twoside that also keeps restoring samples far outside",
        confidence=CODE + "; weight r: their REC-Ring-IS, their documented REC-Ring has none",
    ),
    _recipe(
        "opmd-kimi",
        REC(regularizer="k2", coefficient=0.1),
        "REINFORCE with a quadratic penalty on the log-ratio: dro at beta = 0.2",
        "2501.12599",
        OTHERS,
    ),
    _recipe(
        "opmd-trinity",
        REC(weighting="tempered"),
        "REINFORCE over 1 + tau; for the baseline tau log mean exp(r / tau), or the mean",
    ),
    _recipe(
        "asymre",
        REC(regularizer="forward-kl", coefficient=0.1),
        "REINFORCE with a baseline lowered by c",
        "2506.20520",
        OTHERS,
    ),
    _recipe(
        "red-weight",
        REC(weighting="advantage"),
        "REINFORCE with weights exp(A / tau): good samples count more",
    ),
)
