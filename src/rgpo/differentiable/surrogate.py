"""The surrogate of reused pathwise gradients, and the normal policy that it is made of.

With a = mu(s) + sigma(s) eps and PPO's surrogate L = E_old[r A], differentiating the form in eps
and changing variables back to the actions that were taken gives (arXiv 2508.06214, Eq. 7 to 11)

    grad L = E_old[ w(r) (d f_theta(eps; s) / d theta)' G ],      G = dR / da at the cached action,

eps = (a - mu) / sigma being regenerated, so that f_theta(eps; s) is the cached action and carries
the present policy's derivative. The exact weight is w = r; the paper masks it to r in [0.2, 2];
here it is that of any objective of the core at A = 1: a step along G is an ascent whatever the
sign of an advantage, so PPO's one-sided clip has no meaning. At r = 1 every such weight is 1, and
the gradient that of back-propagation through time.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from rgpo.core.objective import Objective


class Objectives:
    """The objectives of R runs as one; neighbours with equal ones are computed together."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.groups = [(one, len(list(same))) for one, same in groupby(objectives)]

    def weight(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Of samples (R, ...), each row under its own run's objective."""
        if len(self.groups) == 1:
            return self.groups[0][0].weight(log_ratio, advantage)
        sizes = [size for _, size in self.groups]
        parts = zip(self.groups, log_ratio.split(sizes), advantage.split(sizes), strict=True)
        return torch.cat([one.weight(ratios, signs) for (one, _), ratios, signs in parts])


def normal_log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """Log-density (...) of independent normals at actions (..., A)."""
    z = (action - mean) * torch.exp(-log_std)
    return -(z**2 / 2 + log_std + math.log(2 * math.pi) / 2).sum(-1)


def normal_entropy(log_std: Tensor) -> Tensor:
    """Entropy (...) of independent normals, from (..., A)."""
    return (log_std + (1 + math.log(2 * math.pi)) / 2).sum(-1)


def squash_log_slope(action: Tensor) -> Tensor:
    """Sum of log d tanh(u) / du at u (..., A): what squashing adds to the entropy, per sample."""
    return 2 * (math.log(2) - action - torch.nn.functional.softplus(-2 * action)).sum(-1)


def regenerated(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """The cached actions (..., A) as the present policy's function of fixed noise."""
    noise = ((action - mean) * torch.exp(-log_std)).detach()
    return mean + torch.exp(log_std) * noise


def reparam_surrogate(
    objective: Objective | Objectives,
    mean: Tensor,
    log_std: Tensor,
    action: Tensor,
    action_gradient: Tensor,
    behavior_log_prob: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample surrogate to be maximised, log-ratio and weight, (..., N) each.

    `mean`, `log_std` (..., N, A) are the present policy's, with gradient; `action` and
    `action_gradient` (..., N, A) and `behavior_log_prob` (..., N) are data. Log-ratio and weight
    carry no gradient: the derivative of the surrogate is weight * (d a / d theta)' G exactly.
    """
    with torch.no_grad():
        log_ratio = normal_log_prob(mean, log_std, action) - behavior_log_prob
        weight = objective.weight(log_ratio, torch.ones_like(log_ratio))
    again = regenerated(mean, log_std, action)
    return weight * (action_gradient * again).sum(-1), log_ratio, weight
