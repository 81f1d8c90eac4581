"""Aggregate scores over runs, with bootstrap intervals, by rliable (arXiv 2108.13264) and scipy.

Few runs are the rule here, so the centre is the interquartile mean (IQM: the mean of the middle
half) and every number comes with an interval. Everything is deterministic given `seed`. rliable is
imported where it is used, because that takes over a second.

Shapes: R runs, K tasks, P points of a curve.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_TRIM = 0.25  # on each side: what remains is the middle half


@dataclass(frozen=True)
class Summary:
    """Scores of one method over R runs (of K tasks), with bootstrap intervals over the runs."""

    iqm: float
    """Mean of the middle half of all R x K scores."""
    iqm_low: float
    """Lower end of its interval."""
    iqm_high: float
    """Upper end of its interval."""
    median: float
    """Median of all R x K scores (rliable's median is over task means: with one task, a mean)."""
    median_low: float
    """Lower end of its interval."""
    median_high: float
    """Upper end of its interval."""
    mean: float
    """Mean of all scores."""
    optimality_gap: float | None
    """How far the scores fall short of the target, in targets; None without one."""
    std: float | None
    """Standard deviation between runs (n - 1) of their mean over tasks; None with one run."""
    cv: float | None
    """std / |mean|; None with one run or a mean of zero."""
    n: int
    """Number of runs."""
    single: bool
    """True with one run: the intervals are the point itself and say nothing."""


@dataclass(frozen=True)
class Improvement:
    """How likely a run of one method scores higher than a run of another (ties count half)."""

    probability: float
    """P(a > b), averaged over tasks."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    single: bool
    """True if one of the two has one run: the interval is then too narrow to be believed."""


@dataclass(frozen=True)
class Curve:
    """A curve over R runs; each field has shape (P,)."""

    iqm: NDArray[np.float64]
    """Interquartile mean over the runs at each point."""
    low: NDArray[np.float64]
    """Lower end of its interval, point by point."""
    high: NDArray[np.float64]
    """Upper end of its interval, point by point."""


def summarize(
    scores: Mapping[str, ArrayLike],
    *,
    confidence: float = 0.95,
    reps: int = 2000,
    seed: int = 0,
    target: ArrayLike | None = None,
) -> dict[str, Summary]:
    """Summarise each method's scores, shape (R,) or (R, K), by a stratified percentile bootstrap.

    `target` (a number or one per task, positive) is the score that counts as solved, for the
    optimality gap. Each method is resampled with the same seed, so that its summary does not
    depend on the others. Raises ValueError for empty or non-finite scores.
    """
    return {
        name: _summarize(_matrix(name, values), confidence, reps, seed, target)
        for name, values in scores.items()
    }


def probability_of_improvement(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, reps: int = 2000, seed: int = 0
) -> Improvement:
    """Return P(a run of `a` scores higher than one of `b`); shapes (R_a,) or (R_a, K), likewise b.

    The Mann-Whitney statistic over all pairs, tasks averaged; each method is resampled on its own.
    """
    from rliable import metrics

    def statistic(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([metrics.probability_of_improvement(x, y)])

    pair = [_matrix("a", a), _matrix("b", b)]
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ValueError("the two methods need the same number of tasks")
    point, low, high = _bootstrap(pair, statistic, confidence, reps, seed)
    single = min(len(scores) for scores in pair) == 1
    return Improvement(float(point[0]), float(low[0]), float(high[0]), single)


def interval(
    curves: ArrayLike, *, confidence: float = 0.95, reps: int = 2000, seed: int = 0
) -> Curve:
    """Return the IQM of curves, shape (R, P), and its percentile bootstrap interval at each point.

    Whole runs are resampled. NaN means that a run has no value there: each point uses the runs
    that have one. With one run the interval is the curve, with none it is NaN.
    """
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"curves need shape (runs, points), got {values.shape}")
    iqm, low, high = np.full((3, values.shape[1]), np.nan)
    patterns, which = np.unique(np.isfinite(values), axis=1, return_inverse=True)
    for index, present in enumerate(patterns.T):
        if present.any():
            points = which.ravel() == index
            whole = values[np.ix_(present, points)]
            iqm[points], low[points], high[points] = _curve(whole, confidence, reps, seed)
    return Curve(iqm, low, high)


def _summarize(
    matrix: NDArray[np.float64],
    confidence: float,
    reps: int,
    seed: int,
    target: ArrayLike | None,
) -> Summary:
    from rliable import metrics

    def statistics(scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([metrics.aggregate_iqm(scores), np.median(scores)])

    point, low, high = _bootstrap(matrix, statistics, confidence, reps, seed)
    mean = float(matrix.mean())
    std = float(matrix.mean(axis=1).std(ddof=1)) if len(matrix) > 1 else None
    gap = None
    if target is not None:
        if np.any(np.asarray(target) <= 0):
            raise ValueError("the target of the optimality gap must be positive")
        gap = float(metrics.aggregate_optimality_gap(matrix / np.asarray(target)))
    return Summary(
        iqm=float(point[0]),
        iqm_low=float(low[0]),
        iqm_high=float(high[0]),
        median=float(point[1]),
        median_low=float(low[1]),
        median_high=float(high[1]),
        mean=mean,
        optimality_gap=gap,
        std=std,
        cv=None if std is None or mean == 0 else std / abs(mean),
        n=len(matrix),
        single=len(matrix) == 1,
    )


def _curve(
    whole: NDArray[np.float64], confidence: float, reps: int, seed: int
) -> tuple[NDArray[np.float64], ...]:
    """Return IQM, low and high of curves without gaps, shape (R, P)."""
    from scipy import stats

    def iqm(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray(stats.trim_mean(values, _TRIM, axis=axis))

    point = iqm(whole, axis=0)
    if len(whole) == 1:
        return point, point, point
    ends = stats.bootstrap(
        (whole,),
        iqm,
        axis=0,
        vectorized=True,
        n_resamples=reps,
        batch=200,  # bounds the memory
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return point, ends.low, ends.high


def _bootstrap(
    scores: NDArray[np.float64] | Sequence[NDArray[np.float64]],
    statistic: Callable[..., NDArray[np.float64]],
    confidence: float,
    reps: int,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return rliable's point, low and high of `statistic`."""
    from rliable.library import get_interval_estimates

    with _seeded(seed):
        points, ends = get_interval_estimates(
            {"scores": scores}, statistic, reps=reps, confidence_interval_size=confidence
        )
    return points["scores"], ends["scores"][0], ends["scores"][1]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator for a while.

    rliable 1.2.0 resamples from the global generator and ignores its `random_state` argument.
    """
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _matrix(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return scores as (R, K), checked."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"scores of {name} need shape (runs,) or (runs, tasks), not empty")
    if not np.isfinite(matrix).all():
        raise ValueError(f"scores of {name} hold NaN or infinity")
    return matrix
