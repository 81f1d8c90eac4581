"""DRO, also Kimi k1.5's mirror descent: a quadratic penalty on the log-ratio."""

from dataclasses import dataclass

from torch import Tensor

from rgpo.core.objective import Objective, require_positive
from rgpo.core.recipes import Recipe, register


@dataclass(frozen=True)
class DRO(Objective):
    """J = A d - (beta/2) d^2, w = A - beta d with d = log r (arXiv 2405.19107, 2501.12599).

    No importance weight; pulls back linearly in the log-ratio, whatever |A|, and is stationary at
    r = exp(A / beta). The value function that DRO learns jointly is the trainer's baseline.
    """

    beta: float = 0.1
    """Strength of the pull back."""

    homogeneous = False

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)

    def value(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return advantage * log_ratio - self.beta / 2 * log_ratio**2

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:  # noqa: D102
        return advantage - self.beta * log_ratio

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return float("inf")


register(
    Recipe(
        "dro",
        DRO(),
        paper="2405.19107",
        summary="REINFORCE with a quadratic penalty on the log-ratio",
        confidence="formula: verl's code; beta: ROLL's default for Kimi-1.5",
    )
)
