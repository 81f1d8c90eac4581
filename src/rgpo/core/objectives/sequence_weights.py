"""Detached weights on the log-likelihood that depend on the whole sequence or on its prefix."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgpo.core.objective import Objective, Scope, require_positive, safe_ratio
from rgpo.core.recipes import Recipe, register
from rgpo.core.units import unit_sum


class SequenceWeighted(Objective):
    """J_t = sg[c_t] A_t d_t, w_t = c_t A_t, with a coefficient c_t >= 0 from the sequence."""

    needs: ClassVar[tuple[str, ...]] = ("mask",)
    scope: ClassVar[Scope] = "sequence"

    @abstractmethod
    def coefficient(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """C per element, of any shape that broadcasts."""

    def value(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        return self.coefficient(log_ratio, advantage, mask).detach() * log_ratio * advantage

    def weight(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        return self.coefficient(log_ratio, advantage, mask) * advantage


@dataclass(frozen=True)
class VESPO(SequenceWeighted):
    """c = W^k exp(decay (1 - W)), W = exp(sum d) the exact sequence ratio (arXiv 2602.10693).

    c = 1 at W = 1, the largest c is (k/decay)^k exp(decay - k) at W = k/decay, and c falls to 0 on
    both sides. k and the decay depend on the sign of A. Formula and defaults: authors' code.
    """

    power_positive: float = 2.0
    """k for A > 0."""

    decay_positive: float = 3.0
    """The decay for A > 0."""

    power_negative: float = 3.0
    """k for A <= 0."""

    decay_negative: float = 2.0
    """The decay for A <= 0."""

    def __post_init__(self) -> None:
        require_positive(
            power_positive=self.power_positive,
            decay_positive=self.decay_positive,
            power_negative=self.power_negative,
            decay_negative=self.decay_negative,
        )

    def coefficient(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        total = unit_sum(log_ratio, mask)
        excess = 1 - safe_ratio(total)
        positive = torch.exp(self.power_positive * total + self.decay_positive * excess)
        negative = torch.exp(self.power_negative * total + self.decay_negative * excess)
        return torch.where(advantage > 0, positive, negative)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        pairs = (
            (self.power_positive, self.decay_positive),
            (self.power_negative, self.decay_negative),
        )
        return max(math.exp(k * math.log(k / decay) + decay - k) for k, decay in pairs)


@dataclass(frozen=True)
class SequenceTOPR(SequenceWeighted):
    """c = 1 for A > 0 and min(W, cap) for A < 0, W = exp(sum d) (arXiv 2503.14286).

    What went well is imitated however old it is; what went badly is pushed away only while the
    policy would still do it.
    """

    cap: float = 1.0
    """Largest coefficient of a negative sequence."""

    def __post_init__(self) -> None:
        require_positive(cap=self.cap)

    def coefficient(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        tapered = torch.clamp(safe_ratio(unit_sum(log_ratio, mask)), max=self.cap)
        return torch.where(advantage > 0, 1, tapered)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return max(1.0, self.cap)


@dataclass(frozen=True)
class VCPO(SequenceWeighted):
    """c = min(W, cap), W = exp(sum d), and a learning rate scaled by the ESS (arXiv 2602.17616).

    The authors' code truncates W of the training engine's old policy and multiplies PPO's ratio
    without a clip; with one optimiser step per batch, its setting, that is this weight.
    """

    cap: float = 8.0
    """Largest coefficient."""

    base: float = 1.0
    """Share of effective samples at and above which the learning rate is left as it is
    (authors: 1, and 0.55 for several turns)."""

    def __post_init__(self) -> None:
        require_positive(cap=self.cap, base=self.base)

    def coefficient(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002, D102
        return torch.clamp(safe_ratio(unit_sum(log_ratio, mask)), max=self.cap)

    @property
    def sup_weight(self) -> float:  # noqa: D102
        return self.cap

    def learning_rate_scale(self, diagnostics: Mapping[str, float]) -> float:
        """sqrt(min(1, ESS / base)); the ESS is that of the untruncated sequence ratios.

        `sequence_ess` where the samples are tokens, else `ess`; where neither could be measured
        the learning rate stays.
        """
        ess = diagnostics["sequence_ess" if "sequence_ess" in diagnostics else "ess"]
        return math.sqrt(min(1.0, ess / self.base))


@dataclass(frozen=True)
class MinPRO(SequenceWeighted):
    """c_t = min(r_t, high) min_{j<t} r_j, the minimum over nothing being 1 (arXiv 2601.22718).

    The smallest earlier ratio stands in for the product of all of them. Whether the paper's clip
    encloses the product is not known to us (confidence: third-party notes; the nesting and the
    cap: inferred).
    """

    high: float = 5.0
    """Cap of the token's own ratio."""

    def __post_init__(self) -> None:
        require_positive(high=self.high)

    def coefficient(self, log_ratio: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002, D102
        smallest = torch.where(mask, log_ratio, torch.inf).cummin(-1).values
        before = torch.cat([torch.full_like(smallest[..., :1], torch.inf), smallest[..., :-1]], -1)
        before = torch.where(torch.isinf(before), 0, before)
        return torch.clamp(safe_ratio(log_ratio), max=self.high) * safe_ratio(before)

    @property
    def sup_weight(self) -> float:
        """Infinite: all earlier ratios may be large, although some of them seldom is not."""
        return float("inf")


register(
    Recipe(
        "vespo",
        VESPO(),
        paper="2602.10693",
        summary="smooth two-sided weight on the exact sequence ratio, no length normalisation",
        confidence="formula and defaults: authors' code (its docstring has older ones)",
    ),
    Recipe(
        "topr-sequence",
        SequenceTOPR(),
        paper="2503.14286",
        summary="REINFORCE for what went well, truncated sequence ratio for what did not",
        confidence="formula: paper, by way of third-party notes",
    ),
    Recipe(
        "vcpo",
        VCPO(),
        paper="2602.17616",
        summary="truncated sequence ratio, and a learning rate that follows the ESS",
        reduction="sequence-mean",
        confidence="formula and defaults: authors' code",
    ),
    Recipe(
        "minpro-variant",
        MinPRO(),
        paper="2601.22718",
        summary="own ratio times the smallest ratio of the prefix",
        confidence="formula: third-party notes; what the clip encloses and its cap: inferred",
    ),
)
