"""What an objective is: a per-sample value and its weight, and the law that ties them.

For any surrogate J(d, A) of the log-ratio d = log pi - log pi_old and the advantage A,

    grad J = w(d, A) grad log pi        with        w = dJ / dd.

So an objective of the family is a frozen dataclass (its fields are its hyper-parameters) with two
closed-form per-element functions, `value` and `weight`. The law "weight equals the derivative of
value" is tested for every registered recipe. See docs/architecture.md.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

Scope = Literal["element", "batch", "sequence", "group"]
"""How much of the data one element's weight depends on, see `Objective.scope`."""

INPUTS = {
    "reference_log_ratio": "log pi - log pi_ref, pi_ref the frozen reference model",
    "proximal_log_ratio": "log pi - log pi_prox, pi_prox an anchor other than the behaviour policy",
    "log_prob": "log pi itself, of a discrete action or token",
    "kl": "exact KL(old || new) at the element's state",
    "median_advantage": "return or score minus its median given the state or prompt",
    "mask": "boolean, True where an element counts",
}
"""Every further input that an objective may ask for, per element and without gradient."""

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
    """Names of further inputs of `value` and `weight`, out of `INPUTS`; a trainer that cannot
    supply one refuses the recipe by name."""

    scope: ClassVar[Scope] = "element"
    """`element`: the weight depends on that element alone, in any shape. Otherwise the last axis
    of every tensor is one unit, whose elements act on each other: a whole mini-batch (`batch`),
    the tokens of one sequence (`sequence`) or the sequences of one prompt (`group`); `mask` is
    then among the inputs. The law holds for the sum over the unit:
    weight_i = d (sum_j value_j) / d log_ratio_i."""

    @abstractmethod
    def value(self, log_ratio: Tensor, advantage: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """J per element. Pieces the paper stops the gradient through are detached."""

    @abstractmethod
    def weight(self, log_ratio: Tensor, advantage: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """W = dJ / d log_prob per element, in closed form, for |log_ratio| up to 1e4 finite."""

    @property
    @abstractmethod
    def sup_weight(self) -> float:
        """Sup |w| over all ratios at |A| = 1, both signs of A, or infinity.

        For a homogeneous objective the variance of the gradient is at most
        `sup_weight**2 * E[A^2 |grad log pi|^2]` (docs/theory.md section 4), whatever the tails
        of r.
        """

    @property
    def homogeneous(self) -> bool:
        """Whether w is proportional to |A|, so that an element with A = 0 exerts no force."""
        return True

    @property
    def unit_slope(self) -> bool:
        """Whether w = A at r = 1, so that changing the objective keeps the learning rate."""
        return True

    def adapt(self, diagnostics: Mapping[str, float]) -> Self:  # noqa: ARG002
        """The objective for the next update, given what this one measured; by default the same.

        `diagnostics` are those of `rgpo.core.diagnostics` and `progress`, the share of training
        that is done, in [0, 1]. Adapted fields are hyper-parameters like the others, so that a
        checkpoint needs nothing but them.
        """
        return self

    def learning_rate_scale(self, diagnostics: Mapping[str, float]) -> float:  # noqa: ARG002
        """Factor on the learning rate of the next update; 1 unless the method has one."""
        return 1.0

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


def neutral_inputs(objective: Objective, log_ratio: Tensor, advantage: Tensor) -> dict[str, Tensor]:
    """What `objective` needs, saying nothing: for pictures and for tables of w against r.

    The reference model is the policy, the proximal policy the behaviour policy, the old
    probability 0.3 (less where the ratio does not allow it), the KL 0, the median the mean, and
    nothing is masked.
    """
    every = {
        "reference_log_ratio": torch.zeros_like(log_ratio),
        "proximal_log_ratio": log_ratio,
        "log_prob": torch.clamp(log_ratio + math.log(0.3), max=-1e-6),
        "kl": torch.zeros_like(log_ratio),
        "median_advantage": advantage,
        "mask": torch.ones_like(log_ratio, dtype=torch.bool),
    }
    return {name: every[name] for name in objective.needs}


def require_positive(**fields: float) -> None:
    """Raise ValueError naming the first field that is not a positive finite number."""
    for name, number in fields.items():
        if not (0 < number < float("inf")):
            raise ValueError(f"{name} must be positive and finite, got {number}")
