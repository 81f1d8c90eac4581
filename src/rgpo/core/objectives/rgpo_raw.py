"""Other readings of RGPO's gate: the raw sigmoid of the ratio, and a sigmoid of its logarithm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rgpo.core.gates import Gate, log_cosh
from rgpo.core.objective import SAFE_LOG_RATIO, Objective, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class RawRGPO(Objective):
    """J = s(k (r - 1)) A, w = k r s (1 - s) A = (k/4) times the normalised gate's weight.

    arXiv 2604.14895, abstract; g(1) = 1/2 and slope k/4 at r = 1, so that k also scales the policy
    term against entropy bonus, value loss and gradient clipping.
    """

    sharpness: float = 4.0
    """k; at 4 the slope at r = 1 happens to be 1."""

    def __post_init__(self) -> None:
        require_positive(sharpness=self.sharpness)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        ratio_minus_one = torch.expm1(torch.clamp(log_ratio, max=SAFE_LOG_RATIO))
        return torch.sigmoid(self.sharpness * ratio_minus_one) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return self.sharpness / 4 * Gate(self.sharpness).weight(log_ratio) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.sharpness / 4 * Gate(self.sharpness).sup_weight

    @property
    def unit_slope(self) -> bool:  # noqa: D102
        return self.sharpness == 4


@dataclass(frozen=True)
class LogRGPO(Objective):
    """J = (1 + (2/k) tanh(k d / 2)) A, w = sech^2(k d / 2) A: a sigmoid in d = log r, normalised.

    The other reading of "sigmoid gate" (inferred); symmetric in d, largest
    weight exactly at r = 1. (4/k) s(k d) differs from it by a constant.
    """

    sharpness: float = 10.0
    """k: the gate saturates at |log r| of about 2/k."""

    def __post_init__(self) -> None:
        require_positive(sharpness=self.sharpness)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        half = self.sharpness / 2
        return (1 + torch.tanh(half * log_ratio) / half) * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return torch.exp(-2 * log_cosh(self.sharpness / 2 * log_ratio)) * advantage

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return 1.0


register(
    Recipe(
        "rgpo-raw",
        RawRGPO(),
        paper="2604.14895",
        summary="the paper's sigmoid without normalisation: k also scales the step",
        confidence="gate: paper's abstract; its argument and k: inferred",
    ),
    Recipe(
        "rgpo-log",
        LogRGPO(),
        paper="2604.14895",
        summary="normalised sigmoid gate in the log-ratio",
        confidence="inferred: another reading of the paper's gate",
    ),
)
