"""Claim 2: a bounded weight has a finite variance where that of importance sampling is infinite."""

import math
from collections.abc import Mapping

import torch

from rgpo.core.objective import Objective
from rgpo.studies.verify.finding import (
    Finding,
    Picture,
    Row,
    brief,
    element_objectives,
    quantiles,
)
from rgpo.studies.verify.pareto import (
    HILL_CONFIDENCE,
    RGPO_ARMS,
    Estimate,
    Moments,
    Weight,
    hill,
    measure,
)
from rgpo.studies.verify.variance_figures import SHOWN_TAIL, draw_moments

TAILS = (1.1, 1.2, 1.5, 1.8, 2.5, 3.0)
"""Tail indices alpha: P(r > t) falls like t^-alpha."""

SLOPE_TOLERANCE = 0.25
"""How far the measured growth may be off: medians of few blocks are noisy."""


def check(*, quick: bool) -> Finding:
    """Draw ratios with mean 1 from Pareto distributions and watch second moments."""
    samples = 10**6 if quick else 10**7
    arms = element_objectives(bounded=True) | RGPO_ARMS
    moments, hills = {}, {}
    weights: dict[str, dict[float, Weight]] = {name: {} for name in arms}
    for number, alpha in enumerate(TAILS):
        moments[alpha], found = measure(alpha, samples, arms, number)
        for name, weight in found.items():
            weights[name][alpha] = weight
        hills[alpha] = hill(alpha, min(samples, 10**6), number)
    rows = [
        _growth_row(moments, samples),
        _weight_row(arms, weights, samples),
        _hill_row(hills, min(samples, 10**6)),
    ]
    statement = (
        "If a few samples can have huge ratios r, weighting samples by r (importance sampling) has "
        "an infinite variance, and more data do not help. A weight that never exceeds M has a "
        "second moment of at most M squared, whatever the ratios. It is the weight that must be "
        "bounded, not the gate. The price is bias, claim 3."
    )
    read = (
        "Left: mean of r squared over n ratios (line: median over independent batches, shade: "
        "quartiles). For tail indices up to 2 it grows with every decade of data; above 2 it "
        f"settles. Dashed: the gates' second moments at tail index {SHOWN_TAIL}, which stay put. "
        "Right: the tail index estimated from the ratios alone (the metric tail_index of every "
        f"run), with {HILL_CONFIDENCE:.1%} intervals, against the true one."
    )
    return Finding(
        "variance",
        statement,
        rows,
        [Picture("Second moments", read, draw_moments(moments, weights, hills))],
    )


def _growth_row(moments: Mapping[float, Moments], samples: int) -> Row:
    """The second moment of alpha-stable sums grows like n^(2/alpha - 1)."""
    heavy = [alpha for alpha in TAILS if alpha < 1.6]
    slopes = {alpha: _slope(moments[alpha]) for alpha in heavy}
    expected = {alpha: 2 / alpha - 1 for alpha in heavy}
    holds = all(abs(slopes[a] - expected[a]) <= SLOPE_TOLERANCE for a in heavy)
    variances = {
        n: quantiles(second - first**2, 0.25, 0.5, 0.75)
        for n, (first, second) in moments[SHOWN_TAIL].items()
    }
    told = [f"{variances[n][1]:,.0f} (n = {brief(n)})" for n in variances if n in (10**3, samples)]
    growth = ", ".join(f"n^{slopes[a]:.2f} (tail {a})" for a in heavy)
    return Row(
        "importance sampling: the second moment grows without limit for tail index < 2",
        f"Pareto ratios of mean 1, tail index {TAILS[0]} to {TAILS[-1]}, n up to {brief(samples)}",
        f"grows like {growth}; variance at tail {SHOWN_TAIL}: {' to '.join(told)}",
        "n^(2/tail - 1): " + ", ".join(f"{e:.2f}" for e in expected.values()),
        holds,
        numbers={
            "growth": {str(a): slopes[a] for a in heavy},
            "expected": {str(a): expected[a] for a in heavy},
            "variance_quartiles": {str(n): q for n, q in variances.items()},
        },
    )


def _slope(by_size: Moments) -> float:
    """Least squares in logarithms, over the sizes of which there are several batches."""
    sizes = [n for n, (_, second) in by_size.items() if len(second) > 1]
    x = torch.tensor([math.log(n) for n in sizes])
    y = torch.tensor([math.log(quantiles(by_size[n][1], 0.5)[0]) for n in sizes])
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def _weight_row(
    arms: Mapping[str, Objective],
    weights: Mapping[str, Mapping[float, Weight]],
    samples: int,
) -> Row:
    shares = {
        name: max(w.second for w in weights[name].values()) / arms[name].sup_weight ** 2
        for name in arms
    }
    peaks = {
        name: max(w.largest for w in weights[name].values()) / arms[name].sup_weight
        for name in arms
    }
    rounding = 1 + 1e-4  # the weights are computed in float32
    variance = {
        name: weights[name][SHOWN_TAIL].second - weights[name][SHOWN_TAIL].mean ** 2
        for name in arms
    }
    k10, k4 = (variance[name] for name in RGPO_ARMS)
    return Row(
        f"bounded weights: E[w²] <= (sup w)², all {len(arms) - 2} bounded objectives",
        f"the same ratios, n = {brief(samples // 10)} (RGPO: {brief(samples)}), A = 1 and -1",
        f"at most {max(shares.values()):.2f} of the bound, largest weight "
        f"{max(peaks.values()):.4f} of sup w; RGPO's variance at tail {SHOWN_TAIL}: {k10:.3f} "
        f"(k = 10), {k4:.3f} (k = 4)",
        "1 and 1",
        max(shares.values()) <= rounding and max(peaks.values()) <= rounding,
        numbers={"share_of_bound": shares, "share_of_sup": peaks, "variance": variance},
    )


def _hill_row(hills: Mapping[float, Estimate], samples: int) -> Row:
    inside = {alpha: own.low <= alpha <= own.high for alpha, own in hills.items()}
    told = ", ".join(f"{own.value:.3f}" for own in hills.values())
    return Row(
        "the tail index can be read off the ratios, so a run can say that it is in danger",
        f"Hill's estimate from the largest 5% of {brief(samples)} ratios",
        f"{told}; inside its interval {sum(inside.values())} of {len(inside)}",
        "the truth, " + ", ".join(str(alpha) for alpha in hills),
        all(inside.values()),
        "no claim",
        numbers={str(alpha): own._asdict() for alpha, own in hills.items()},
    )
