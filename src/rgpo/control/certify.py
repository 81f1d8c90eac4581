"""Certificates of control updates: what is guaranteed about a step, and steps with a guarantee.

The bound itself is `rgpo.core.certificate`. Here it is taken over the rollout that the update was
fitted to, with estimated advantages and states that are correlated and undiscounted: its
confidence is nominal (docs/certificates.md says what that means and how large the parts are).
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from rgpo.control.distributions import Categorical, Distribution
from rgpo.control.learner import Batch, Learner
from rgpo.core.certificate import categorical_tv, certify, has_gate, tv_bound
from rgpo.core.objective import Objective
from rgpo.core.objectives.importance import Importance

CONFIDENCE = 0.95
"""Of the logged certificate, and of all candidates of one certified update together."""

HALVINGS = 10
"""Of a certified update before it becomes the null step."""

PARTS = {
    "certificate": "bound",
    "certificate_surrogate": "surrogate",
    "certificate_gate": "gate",
    "certificate_shift": "shift",
    "certificate_interval": "interval",
}
"""Row keys of the fields of a `Certificate`."""

_VALUE_HEADS = ("critic.", "median.")

GLOSSARY: dict[str, str] = {
    "certificate": (
        f"Lower bound of J(new) - J(behaviour) at a nominal {CONFIDENCE:.0%} confidence, in units "
        "of the (scaled) discounted return: certificate_surrogate - certificate_gate - "
        "certificate_shift - certificate_interval. Far below 0 for a gamma near 1."
    ),
    "certificate_surrogate": (
        "Mean of (g - 1) A over 1 - gamma: the gain that the surrogate promises, g being the "
        "recipe's gate, normalised (r where the weight depends on more than r and A)."
    ),
    "certificate_gate": (
        "What the gate gives up: certificate_surrogate minus the gain by importance weights "
        "truncated at 2; negative where the gate promises too little."
    ),
    "certificate_shift": (
        "What the change of the visited states may cost: by far the largest part in long tasks."
    ),
    "certificate_interval": "Width of the confidence interval (empirical Bernstein).",
    "accepted_step": (
        "Share of the policy's update that was kept: 1 unless --certified shortened it; 0 is the "
        "null step, whose certificate is 0."
    ),
}
"""The row keys that come from here."""


def total_variation(distribution: Distribution, old: Tensor, new: Tensor, kl: Tensor) -> Tensor:
    """TV between two policies in each state, or an upper bound: (..., P) twice -> (...).

    Exact for one categorical action; for several the sum of theirs, which bounds that of the
    product, where it is smaller than the bound from `kl` = KL(old || new), which serves all others.
    """
    bound = tv_bound(kl)
    if not isinstance(distribution, Categorical):
        return bound
    pairs = zip(old.split(distribution.sizes, -1), new.split(distribution.sizes, -1), strict=True)
    total = torch.stack([categorical_tv(p, q) for p, q in pairs]).sum(0)
    return torch.minimum(total, bound) if len(distribution.sizes) > 1 else total


def certify_runs(
    objectives: Iterable[Objective],
    log_ratio: Tensor,
    advantage: Tensor,
    tv: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    confidence: float = CONFIDENCE,
) -> dict[str, Tensor]:
    """`rgpo.core.certificate.certify` for R runs (R, N), by row key: (R,) float64.

    Neighbours with equal objectives are computed together. No certificate exists for gamma = 1.
    """
    if gamma == 1:
        return {}
    found, start = [], 0
    for objective, group in groupby(map(_gated, objectives)):
        end = start + len(list(group))
        data = [x[start:end] for x in (log_ratio, advantage, mask)]
        found.append(
            certify(objective, *data, tv=tv[start:end], gamma=gamma, confidence=confidence)
        )
        start = end
    return {key: torch.cat([getattr(c, name) for c in found]) for key, name in PARTS.items()}


def certificates(
    distribution: Distribution,
    objectives: Sequence[Objective],
    batch: Batch,
    parameters: Tensor,
    log_ratio: Tensor,
    kl: Tensor,
    *,
    gamma: float,
    confidence: float = CONFIDENCE,
) -> dict[str, Tensor]:
    """What the rollout guarantees about policies with these `parameters` (R, N, P); on the CPU.

    `certify` tells reasons, and so looks at numbers.
    """
    tv = total_variation(distribution, batch.parameters, parameters, kl)
    data = [x.cpu() for x in (log_ratio, batch.advantage, tv, batch.mask)]
    return certify_runs(objectives, *data, gamma=gamma, confidence=confidence)


@torch.no_grad()
def shorten(
    learner: Learner,
    distribution: Distribution,
    objectives: Sequence[Objective],
    batch: Batch,
    old: list[dict[str, Tensor]],
    *,
    gamma: float,
) -> np.ndarray:
    """Take policies back towards `old` until their steps are certified: fractions (R,)."""
    policies = learner.policies
    new = policy_parameters(policies)

    def promise(fraction: Tensor) -> Tensor:
        place(policies, old, new, fraction)
        parameters, _ = learner.evaluate(batch.observation)
        log_ratio = distribution.log_prob(parameters, batch.action) - batch.log_prob
        kl = distribution.kl(batch.parameters, parameters)
        found = certificates(
            distribution,
            objectives,
            batch,
            parameters,
            log_ratio,
            kl,
            gamma=gamma,
            confidence=confidence_per_candidate(),
        )
        return found["certificate"]

    fraction = certified_fraction(promise, len(policies))
    place(policies, old, new, fraction)
    return fraction.numpy()


def _gated(objective: Objective) -> Objective:
    """What splits the bound: the objective, or plain r where more than r and A decides."""
    return objective if has_gate(objective) and not objective.needs else Importance()


def certified_fraction(promise: Callable[[Tensor], Tensor], runs: int) -> Tensor:
    """The largest of 1, 1/2, ..., 2^-HALVINGS of each run's step whose promise is >= 0, else 0.

    `promise` maps fractions (R,) to certificates (R,). It is asked HALVINGS + 1 times at most:
    each answer should hold with confidence `confidence_per_candidate()` for all to hold together.
    """
    fraction = torch.ones(runs, dtype=torch.float64)
    for _ in range(HALVINGS + 1):
        short = ~(promise(fraction) >= 0)
        if not short.any():
            return fraction
        fraction = torch.where(short, fraction / 2, fraction)
    return torch.where(short, 0, fraction)


def confidence_per_candidate(confidence: float = CONFIDENCE) -> float:
    """What every candidate of a certified update needs for `confidence` in all (union bound)."""
    return 1 - (1 - confidence) / (HALVINGS + 1)


def policy_parameters(policies: Iterable[nn.Module]) -> list[dict[str, Tensor]]:
    """A copy of every parameter that the actions depend on: all but the value heads', by run.

    A CNN shared by actor and critic belongs to the policy.
    """
    return [
        {
            name: parameter.detach().clone()
            for name, parameter in policy.named_parameters()
            if not name.startswith(_VALUE_HEADS)
        }
        for policy in policies
    ]


@torch.no_grad()
def place(
    policies: Iterable[nn.Module],
    old: list[dict[str, Tensor]],
    new: list[dict[str, Tensor]],
    fraction: Tensor,
) -> None:
    """Put every policy at `fraction` (R,) of the line from `old` to `new`, in place.

    Exactly `new` at 1 and exactly `old` at 0, even where `new` is not finite.
    """
    for policy, start, end, share in zip(policies, old, new, fraction.tolist(), strict=True):
        own = dict(policy.named_parameters())
        for name in start:
            point = torch.lerp(start[name], end[name], share) if share else start[name]
            own[name].copy_(point)
