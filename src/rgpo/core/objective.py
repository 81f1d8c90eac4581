"""What an objective is: a per-sample value and its weight, and the law that ties them.

For any surrogate J(d, A) of the log-ratio d = log pi - log pi_old and the advantage A,

    grad J = w(d, A) grad log pi        with        w = dJ / dd.

So an objective of the family is a frozen dataclass (its fields are its hyper-parameters) with two
closed-form per-element functions, `value` and `weight`. The law "weight equals the derivative of
value" is tested for every registered recipe. See docs/architecture.md.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

SAFE_LOG_RATIO = 40.0
"""Log-ratios are saturated here before `exp` inside values and weights.

exp(40) = 2.4e17, whose square still fits float32 and bfloat16, so that quadratic surrogates stay
finite. Metrics never see this clamp: they are computed from the log-ratio itself.
"""


def safe_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), saturated at exp(SAFE_LOG_RATIO); same shape and dtype."""
    return torch.exp(torch.clamp(log_ratio, max=SAFE_LOG_RATIO))


class Objective(ABC):
    """A ratio-controlling surrogate, to be maximised.

    Subclasses are frozen dataclasses. All tensors of one call broadcast to one shape (any shape)
    and one floating dtype of at least 32 bits; masking and reduction happen outside
    (`rgpo.core.loss`).
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Names of further per-element inputs of `value` and `weight`, such as
    `reference_log_ratio`; a trainer that cannot supply one refuses the recipe by name."""

    @abstractmethod
    def value(self, log_ratio: Tensor, advantage: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """J per element. Pieces the paper stops the gradient through are detached."""

    @abstractmethod
    def weight(self, log_ratio: Tensor, advantage: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """W = dJ / d log_prob per element, in closed form, for |log_ratio| up to 1e4 finite."""

    @property
    @abstractmethod
    def sup_weight(self) -> float:
        """Sup |w| / |A| over all ratios and both signs of A, or infinity.

        The variance of the gradient is at most `sup_weight**2 * E[A^2 |grad log pi|^2]`
        (docs/theory.md section 4), whatever the tails of r.
        """

    @property
    def unit_slope(self) -> bool:
        """Whether w = A at r = 1, so that changing the objective keeps the learning rate."""
        return True

    def surrogate(self, log_ratio: Tensor, advantage: Tensor, **inputs: Tensor) -> Tensor:
        """`value`, with `weight` as its exact derivative and no graph through the gate.

        Automatic differentiation through e.g. s(k (exp(d) - 1)) meets 0 * inf for large d; this
        form is finite wherever the weight is. The gradient reaches `log_ratio` only: every
        further log-ratio moves with the same log-prob and is already counted in the weight.
        """
        with torch.no_grad():
            value = self.value(log_ratio, advantage, **inputs)
            weight = self.weight(log_ratio, advantage, **inputs)
        return value + weight * (log_ratio - log_ratio.detach())


def require_positive(**fields: float) -> None:
    """Raise ValueError naming the first field that is not a positive finite number."""
    for name, number in fields.items():
        if not (0 < number < float("inf")):
            raise ValueError(f"{name} must be positive and finite, got {number}")
