"""How much better is the new policy at least? The improvement bound, exact and from a batch.

With r = pi / pi_old, a gate g, the advantage A of pi_old, |A| <= M, the discounted state
distribution d_old of pi_old (sums to 1), TV(s) the total variation between the policies at s and
eps = max_s |E_{a ~ pi} A(s, a)|,

    (1 - gamma) (J(pi) - J(pi_old))
        >= E_old[(g - 1) A]                         the surrogate: what was optimised
         - E_old[|r - g| |A|]                       what the gate gives up
         - 2 gamma eps / (1 - gamma) E_{d_old}[TV]  the change of the state distribution.

The published proof (arXiv 2604.14895, as known to us) leaves out the last term, which is that of
CPO (1705.10528), and rests on an inequality that is false at r = 1. The statement is about two
policies: any g gives a valid bound, whatever objective was optimised. docs/certificates.md derives
it step by step.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rgpo.core.checks import require_boolean, require_floating, require_same_shape, working_dtype
from rgpo.core.objective import Objective, neutral_inputs

FAR = 1e4
"""|log r| up to which objectives are finite (docs/architecture.md)."""

ROUNDING = 1 + 1e-6
"""Factor by which float32 data may exceed a bound that they are said to keep."""


@dataclass(frozen=True)
class Certificate:
    """bound = surrogate - gate - shift - interval, all in units of the return J; float64, (...)."""

    surrogate: Tensor
    """E_old[(g - 1) A] / (1 - gamma): the gain that the surrogate promises."""

    gate: Tensor
    """What the gate gives up: the surrogate minus what is left of E_old[r A] / (1 - gamma).

    Never negative where it is exact; from a batch it is, where the gate promises too little.
    """

    shift: Tensor
    """What the change of the state distribution may cost."""

    interval: Tensor
    """Width of the confidence interval, 0 where nothing was sampled."""

    bound: Tensor
    """J(pi) - J(pi_old) is at least this; -inf where nothing can be said, see `reason`."""

    reason: tuple[str, ...]
    """Per element of `bound`, row by row: why it is -inf (all parts are then NaN), or ""."""


def improvement_bound(
    objective: Objective,
    old: Tensor,
    new: Tensor,
    advantage: Tensor,
    occupancy: Tensor,
    gamma: float,
) -> Certificate:
    """The bound of the module, exactly, for finite states S and actions A; nothing is estimated.

    `old`, `new` (..., S, A) probabilities of the two policies, `advantage` (..., S, A) of `old`,
    `occupancy` (..., S) its discounted state distribution, all float64; results are (...).
    The gate is `gate_value`, which may be unbounded. -inf where `new` takes actions that `old`
    never takes in a state that it visits: no weight on old data can see them. ValueError for
    probabilities that are none, non-finite numbers and gamma outside [0, 1).
    """
    _require_number(gamma=gamma)
    _require_tables(old, new, advantage, occupancy)
    log_ratio = torch.where(old > 0, new.log() - old.log(), 0).clamp(min=-FAR)
    gate = gate_value(objective, log_ratio, advantage)
    joint = occupancy.unsqueeze(-1) * old
    # where old is 0 so is joint, and the ratio that stands there does not count
    surrogate = (joint * (gate - 1) * advantage).sum((-2, -1))
    gap = (joint * (log_ratio.exp() - gate).abs() * advantage.abs()).sum((-2, -1))
    distance = (occupancy * (new - old).abs().sum(-1) / 2).sum(-1)
    epsilon = (new * advantage).sum(-1).abs().amax(-1)
    shift = 2 * gamma / (1 - gamma) * epsilon * distance
    gain, none = surrogate - gap, torch.zeros_like(gap)
    unseen = ((occupancy.unsqueeze(-1) > 0) & (old == 0) & (new > 0)).flatten(-2).any(-1)
    problem = (unseen, "the new policy takes actions the old one never takes")
    return _certificate(gain, surrogate, shift, none, 1 / (1 - gamma), [problem])


def certify(
    objective: Objective,
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    tv: Tensor | None = None,
    confidence: float = 0.95,
    max_advantage: Tensor | float | None = None,
    max_tv: Tensor | float | None = None,
    cap: float = 2.0,
    **inputs: Tensor,
) -> Certificate:
    """Lower confidence bound on J(pi) - J(pi_old) from samples of pi_old: (..., B) -> (...).

    `log_ratio`, `advantage`, `tv` (TV(s) of each sample's state or an upper bound of it, needed
    unless gamma is 0) and the boolean `mask` are of one shape (..., B); what masked elements hold
    does not count. `inputs` are what the objective needs besides. With m = min(r, cap),

        E_old[r A] = E_old[(r - 1)(A + M)] >= E_old[(m - 1)(A + M)],

    because E_old[r - 1] = E_old[A] = 0 and A + M >= 0. What is averaged is bounded although r is
    not, so an empirical Bernstein interval (Maurer & Pontil 2009) holds whatever the tails of r;
    the mean of |r - g| |A| has none: a ratio too rare for the batch may carry all of it. The
    truncation is that of Ionides (2008); `cap` 2 costs next to nothing in an update and is fixed
    in advance. A second interval is that of the mean of TV; each fails with probability
    (1 - confidence) / 2. The bound is about two policies, whatever objective moved one of them:
    its gate decides only how the bound is split into `surrogate` and `gate`.

    Assumptions. (1) `advantage` is unbiased given state and action, up to any function of the
    state, with |advantage| <= `max_advantage`; None takes the batch's largest. (2) eps is at most
    M min(1, 2 `max_tv`), `max_tv` being the largest TV of any state; None takes the batch's.
    (3) Samples are independent, states drawn from d_old. (4) pi was not fitted to these samples.
    A training rollout breaks all four: the confidence is then nominal, and a policy that learned
    the noise of the batch is certified for it (tests/core/test_certificate.py); a second batch
    that only certifies restores (3) in part and (4).

    ValueError for shapes, dtypes and numbers that do not fit; -inf with a reason, for that batch
    alone, for fewer than two samples, non-finite data and data that contradict the arguments.
    """
    _require_number(gamma=gamma, confidence=confidence, cap=cap)
    require_same_shape(log_ratio=log_ratio, advantage=advantage, mask=mask, tv=tv, **inputs)
    require_floating(log_ratio=log_ratio, advantage=advantage, tv=tv)
    require_boolean(mask=mask)
    if tv is None and gamma > 0:
        raise ValueError("for gamma > 0 a change of policy changes the states: pass tv")
    if log_ratio.dim() == 0 or log_ratio.shape[-1] == 0:
        raise ValueError(f"log_ratio must be (..., B) with B > 0, got {tuple(log_ratio.shape)}")
    keep = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask
    tv = torch.zeros_like(log_ratio) if tv is None else tv
    d, a, t = (torch.where(keep, x, 0).double() for x in (log_ratio, advantage, tv))
    inputs = {name: torch.where(keep, x, 0).double() for name, x in inputs.items()}
    largest = a.abs().amax(-1) if max_advantage is None else _number_like(a, max_advantage)
    furthest = t.amax(-1) if max_tv is None else _number_like(t, max_tv)
    n, bound_on_a = keep.sum(-1), largest.unsqueeze(-1)

    surrogate = _mean((gate_value(objective, d, a, **inputs) - 1) * a, keep, n)
    kept = torch.expm1(torch.clamp(d, max=math.log(cap))) * (a + bound_on_a)
    gain = _mean(kept, keep, n)
    level = confidence if gamma == 0 else (1 + confidence) / 2
    interval = empirical_bernstein(kept, 2 * largest * cap, level, keep)
    price = 2 * gamma / (1 - gamma) * largest * torch.clamp(2 * furthest, max=1)
    shift = price * _mean(t, keep, n)
    if gamma > 0:
        interval = interval + price * empirical_bernstein(t, furthest, level, keep)
    broken = ~torch.stack([d, a, t, *inputs.values()]).isfinite().all(0)
    problems = [
        (n < 2, "fewer than two samples count"),
        (broken.any(-1), "a log-ratio, an advantage or a TV is not finite"),
        (~((t >= 0) & (t <= ROUNDING)).all(-1), "a TV is outside [0, 1]"),
        (largest == 0, "every advantage is 0: give max_advantage"),
        ((a.abs() > bound_on_a * ROUNDING).any(-1), "an advantage is larger than max_advantage"),
        ((t > furthest.unsqueeze(-1) * ROUNDING).any(-1), "a TV is larger than max_tv"),
    ]
    return _certificate(gain, surrogate, shift, interval, 1 / (1 - gamma), problems)


def certify_sequences(
    objective: Objective,
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    confidence: float = 0.95,
    max_advantage: float | None = None,
    **inputs: Tensor,
) -> Certificate:
    """`certify` for language models: a whole answer is one action, () results.

    `log_ratio`, `inputs` and the boolean `mask` are per token (B, T), `advantage` (B,) per answer.
    Prompts do not depend on the policy, so nothing shifts: gamma = 0 and no TV. The ratio is that
    of the sequence, the product over its tokens: a length-normalised ratio (GSPO's) has no mean
    of 1 and no bound. Advantages relative to a group's mean make its answers dependent: nominal
    confidence. Answers without unmasked token do not count.
    """
    require_same_shape(log_ratio=log_ratio, mask=mask, **inputs)
    require_boolean(mask=mask)
    if log_ratio.dim() != 2:
        raise ValueError(f"log_ratio must be (B, T), got {tuple(log_ratio.shape)}")
    sums: dict[str, Any] = {k: torch.where(mask, x, 0).double().sum(-1) for k, x in inputs.items()}
    return certify(
        objective,
        torch.where(mask, log_ratio, 0).double().sum(-1),
        advantage,
        mask.any(-1),
        gamma=0.0,
        confidence=confidence,
        max_advantage=max_advantage,
        **sums,
    )


def gate_value(
    objective: Objective, log_ratio: Tensor, advantage: Tensor, **inputs: Tensor
) -> Tensor:
    """The normalised gate g of an objective J, for the sign of the advantage; any shape.

    g = 1 + (J(d) - J(0)) / (A w(0)): the affine change that gives it value 1 and slope 1 where all
    log-ratios are 0, and that changes no direction. For `RGPO` it is the gate itself. ValueError
    for an objective without one, see `has_gate`.
    """
    if not has_gate(objective):
        raise ValueError(
            f"{objective} is no function of the ratio times the advantage: split the certificate "
            "by another objective, such as Importance(), which does not change the bound"
        )
    sign = torch.where(advantage < 0, -1, 1).to(working_dtype(log_ratio))
    (start_down, slope_down), (start_up, slope_up) = _origin(objective, -1), _origin(objective, 1)
    start = torch.where(advantage < 0, start_down, start_up)
    slope = torch.where(advantage < 0, slope_down, slope_up)
    return 1 + (objective.value(log_ratio, sign, **inputs) * sign - start) / slope


def has_gate(objective: Objective) -> bool:
    """Whether J is g A per element, with a g that rises at r = 1 and may depend on A's sign."""
    alone = objective.scope == "element" and objective.homogeneous
    return alone and all(0 < _origin(objective, sign)[1] < math.inf for sign in (-1, 1))


def empirical_bernstein(
    x: Tensor, width: Tensor | float, confidence: float, mask: Tensor | None = None
) -> Tensor:
    """Half-width e with P(|mean - E x| <= e one way) >= `confidence`: (..., B) -> (...).

    e = sqrt(2 V L / n) + 7 w L / (3 (n - 1)), L = log(2 / (1 - confidence)), V the sample variance
    and w the `width` of an interval that holds every x (Maurer & Pontil 2009, Theorem 4); n >= 2.
    """
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    n = keep.sum(-1)
    level = math.log(2 / (1 - confidence))
    deviation = torch.where(keep, x - _mean(x, keep, n).unsqueeze(-1), 0)
    degrees = torch.clamp(n - 1, min=1)
    variance = (deviation**2).sum(-1) / degrees
    return torch.sqrt(2 * variance * level / n) + 7 * width * level / (3 * degrees)


def categorical_tv(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Exact total variation of categoricals over the last axis: (..., A) -> (...), in [0, 1]."""
    require_same_shape(logits_p=logits_p, logits_q=logits_q)
    require_floating(logits_p=logits_p, logits_q=logits_q)
    dtype = working_dtype(logits_p, logits_q)
    difference = torch.softmax(logits_p.to(dtype), -1) - torch.softmax(logits_q.to(dtype), -1)
    return torch.clamp(difference.abs().sum(-1) / 2, max=1)


def tv_bound(kl: Tensor) -> Tensor:
    """Upper bound of the total variation from a KL >= 0 of either direction, elementwise.

    The smaller of sqrt(KL / 2) (Pinsker) and sqrt(1 - exp(-KL)) (Bretagnolle & Huber), which is
    the smaller one above KL = 1.59 and never exceeds 1.
    """
    kl = torch.clamp(kl, min=0)  # rounding
    return torch.sqrt(torch.minimum(kl / 2, -torch.expm1(-kl)))


@lru_cache(maxsize=256)  # an objective that adapts is another one after every update
def _origin(objective: Objective, sign: int) -> tuple[float, float]:
    """Value and weight per unit of advantage where all log-ratios are 0."""
    zero = torch.zeros((), dtype=torch.float64)
    unit = zero + sign
    inputs = neutral_inputs(objective, zero, unit)
    slope = sign * float(objective.weight(zero, unit, **inputs))
    return sign * float(objective.value(zero, unit, **inputs)), slope


def _mean(x: Tensor, keep: Tensor, n: Tensor) -> Tensor:
    return torch.where(keep, x, 0).sum(-1) / n


def _certificate(
    gain: Tensor,
    surrogate: Tensor,
    shift: Tensor,
    interval: Tensor,
    horizon: float,
    problems: list[tuple[Tensor, str]],
) -> Certificate:
    """Parts times the horizon; where a problem is true, the first one is the reason for -inf."""
    told = torch.stack([found for found, _ in problems]).view(len(problems), -1).T.tolist()
    sentences = [sentence for _, sentence in problems]
    reason = tuple(
        next((s for s, yes in zip(sentences, row, strict=True) if yes), "") for row in told
    )
    bad = torch.tensor([bool(r) for r in reason], device=gain.device).view(gain.shape)
    parts = (surrogate, surrogate - gain, shift, interval)
    surrogate, gate, shift, interval = (torch.where(bad, math.nan, horizon * x) for x in parts)
    # not from the parts: an unbounded gate is huge in both of the first two
    bound = torch.where(bad, -math.inf, horizon * gain - shift - interval)
    return Certificate(surrogate, gate, shift, interval, bound, reason)


def _number_like(x: Tensor, number: Tensor | float) -> Tensor:
    """A bound given as a number or (...), for every batch of x (..., B)."""
    number = torch.as_tensor(number, dtype=x.dtype, device=x.device)
    if not bool((number >= 0).all() & number.isfinite().all()):
        raise ValueError("max_advantage and max_tv must be finite and not negative")
    return number.expand(x.shape[:-1])


def _require_number(*, gamma: float, confidence: float = 0.5, cap: float = 1.0) -> None:
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must lie in [0, 1), got {gamma}: the bound needs a discount")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if not 1 <= cap < math.inf:
        raise ValueError(f"cap must be at least 1 and finite, got {cap}: it truncates the ratio")


def _require_tables(old: Tensor, new: Tensor, advantage: Tensor, occupancy: Tensor) -> None:
    require_same_shape(old=old, new=new, advantage=advantage)
    if old.dim() < 2 or occupancy.shape != old.shape[:-1]:
        raise ValueError(
            f"need old (..., S, A) and occupancy (..., S), got {tuple(old.shape)} "
            f"and {tuple(occupancy.shape)}"
        )
    for name, table in (("old", old), ("new", new), ("occupancy", occupancy)):
        if table.dtype != torch.float64:
            raise ValueError(f"{name} must be float64, got {table.dtype}")
        if not bool(((table >= 0) & ((table.sum(-1, keepdim=True) - 1).abs() < 1e-6)).all()):
            raise ValueError(f"{name} must hold probabilities that sum to 1 over the last axis")
    if not bool(advantage.isfinite().all()):
        raise ValueError("advantage must be finite")
