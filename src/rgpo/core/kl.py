"""Kullback-Leibler divergences: value estimators, exact values, gradient estimators, penalty.

A number to look at and a term to differentiate are two things, and have two sets of names. With
samples a ~ p and the log-ratio d = log q(a) - log p(a), OTHER policy over SAMPLING policy,

| value estimator | term       | E_p                  | sign  |
|-----------------|------------|----------------------|-------|
| k1              | -d         | KL(p || q), unbiased | any   |
| k2              | d^2 / 2    | KL(p || q) + O(d^3)  | >= 0  |
| k3              | e^d - 1 - d| KL(p || q), unbiased | >= 0  |

(J. Schulman, "Approximating KL divergence", 2020). Everywhere else in this library
d = log pi - log pi_old with samples of pi_old, so these estimate KL(pi_old || pi). To estimate
KL(pi || pi_ref) from samples of pi, call them with log pi_ref - log pi.

As losses they are traps where the samples are those of the policy that is differentiated (a ~ pi,
d = log pi_ref - log pi): the gradient of k1 is then grad log pi, whose expectation is 0, and that
of k3 is the gradient of KL(pi_ref || pi), not of KL(pi || pi_ref). Use the gradient estimators
below; they agree with the exact gradients by enumeration (tests/core/test_kl.py).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rgpo.core.checks import require_broadcast, require_floating, require_same_shape, working_dtype
from rgpo.core.objective import safe_ratio
from rgpo.core.ratio import saturate_exponent


def k1(log_ratio: Tensor) -> Tensor:
    """-d per element: unbiased for KL(sampling || other), high variance, may be negative."""
    require_floating(log_ratio=log_ratio)
    return -log_ratio.to(working_dtype(log_ratio))


def k2(log_ratio: Tensor) -> Tensor:
    """d^2 / 2 per element: biased for KL(sampling || other) at third order in d, never negative."""
    require_floating(log_ratio=log_ratio)
    return log_ratio.to(working_dtype(log_ratio)) ** 2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """e^d - 1 - d per element: unbiased for KL(sampling || other), never negative.

    Finite for every finite d: the exponential saturates at the largest float.
    """
    require_floating(log_ratio=log_ratio)
    d = log_ratio.to(working_dtype(log_ratio))
    return torch.expm1(saturate_exponent(d)) - d


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Exact KL(p || q) of categoricals over the last axis: (..., A) -> (...).

    Logits need not be normalised; -inf bans an action. Infinite where p allows what q bans.
    """
    require_same_shape(logits_p=logits_p, logits_q=logits_q)
    require_floating(logits_p=logits_p, logits_q=logits_q)
    dtype = working_dtype(logits_p, logits_q)
    log_p = torch.log_softmax(logits_p.to(dtype), -1)
    log_q = torch.log_softmax(logits_q.to(dtype), -1)
    p = torch.exp(log_p)
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)


def normal_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """Exact KL(p || q) of diagonal normals, summed over the last axis: (..., A) -> (...).

    Shapes broadcast, so that a state-independent log_std may be (A,).
    """
    require_floating(mean_p=mean_p, log_std_p=log_std_p, mean_q=mean_q, log_std_q=log_std_q)
    require_broadcast(mean_p=mean_p, log_std_p=log_std_p, mean_q=mean_q, log_std_q=log_std_q)
    dtype = working_dtype(mean_p, log_std_p, mean_q, log_std_q)
    spread = (log_std_p - log_std_q).to(dtype)
    shift = (mean_p - mean_q).to(dtype) * torch.exp(-log_std_q.to(dtype))
    return ((torch.expm1(2 * spread) - 2 * spread + shift**2) / 2).sum(-1)


def forward_kl_gradient(log_ratio: Tensor) -> Tensor:
    """Per-element term whose mean over samples of pi_old has the gradient of KL(pi_old || pi).

    grad KL(pi_old || pi) = -E_old[grad log pi] = E_old[(r - 1) grad log pi], because
    E_old[r grad log pi] = 0. The second form has no variance at pi = pi_old; it is the derivative
    of k3, which is also the value of this term.
    """
    return _with_gradient(k3(log_ratio), _ratio(log_ratio) - 1, log_ratio)


def reverse_kl_gradient(log_ratio: Tensor, anchor_log_ratio: Tensor | None = None) -> Tensor:
    """Per-element term whose mean over samples of pi_old has the gradient of KL(pi || anchor).

    grad KL(pi || anchor) = E_pi[(log pi - log anchor) grad log pi]
                          = E_old[r (log pi - log anchor) grad log pi],   r = pi / pi_old.

    `log_ratio` is log pi - log pi_old, `anchor_log_ratio` is log pi - log anchor (same shape;
    None: the anchor is pi_old). The value is r (log pi - log anchor), unbiased for the KL. The
    weight is detached and the gradient flows through `log_ratio` alone, which must be per token: a
    sequence ratio would add the gradient of the other tokens. For sequences this is the gradient
    with the distribution of the prefixes held fixed.
    """
    require_same_shape(log_ratio=log_ratio, anchor_log_ratio=anchor_log_ratio)
    require_floating(log_ratio=log_ratio, anchor_log_ratio=anchor_log_ratio)
    anchored = log_ratio if anchor_log_ratio is None else anchor_log_ratio
    weight = _ratio(log_ratio) * anchored
    return _with_gradient(weight, weight, log_ratio)


def convex_kl_share(update: int) -> float:
    """ReMix's share of KL(pi || base) at `update`; 1 minus it goes to KL(pi || policy before).

    max(1 - 0.1 ceil(max(update - 50, 0) / 10), 0.5) (arXiv 2507.06892, KL-convex; formula:
    third-party notes): the base model alone for 50 updates, then half and half within 50 more.
    """
    return max(1 - 0.1 * math.ceil(max(update - 50, 0) / 10), 0.5)


@dataclass(frozen=True)
class KLPenalty:
    """`coefficient` * KL added to the loss; adaptive if it has a target (1707.06347, section 4)."""

    coefficient: float
    """Weight of the KL; the present one if it adapts."""

    target: float | None = None
    """KL per update that `adapt` steers to; None: the coefficient stays as it is."""

    direction: Literal["forward", "reverse"] = "forward"
    """`forward` is KL(old || new), `reverse` KL(new || old)."""

    annealed: bool = False
    """Whether the coefficient is divided by the share of training that is left, so that the
    penalty grows without bound (MDPO, arXiv 2005.09814)."""

    def __post_init__(self) -> None:
        if not 0 < self.coefficient < float("inf"):
            raise ValueError(
                f"the KL coefficient must be positive and finite, got {self.coefficient}: "
                "leave the penalty out to have none"
            )
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f"unknown direction {self.direction!r}: choose forward or reverse")
        if self.target is not None and not 0 < self.target < float("inf"):
            raise ValueError(
                f"the KL target must be positive and finite, got {self.target}: "
                "leave it out to keep the coefficient fixed"
            )

    def weight(self, progress: float) -> float:
        """The coefficient at `progress`, the share of training that is done, in [0, 1)."""
        return self.coefficient / (1 - progress) if self.annealed else self.coefficient

    def adapt(self, kl: float) -> "KLPenalty":
        """Twice the coefficient if kl > 1.5 target, half of it if kl < target / 1.5.

        Kept within [1e-4, 1e4]. Without target, or for a NaN, unchanged.
        """
        if self.target is None:
            return self
        if kl > 1.5 * self.target:
            return replace(self, coefficient=min(2 * self.coefficient, 1e4))
        if kl < self.target / 1.5:
            return replace(self, coefficient=max(self.coefficient / 2, 1e-4))
        return self


def _ratio(log_ratio: Tensor) -> Tensor:
    return safe_ratio(log_ratio.to(working_dtype(log_ratio)))


def _with_gradient(value: Tensor, weight: Tensor, log_ratio: Tensor) -> Tensor:
    """A tensor of this value whose derivative by `log_ratio` is exactly `weight`."""
    return value.detach() + weight.detach() * (log_ratio - log_ratio.detach())
