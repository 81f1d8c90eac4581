"""Aggregate scores over runs, with bootstrap intervals, as arXiv 2108.13264 (rliable) advises.

Few runs are the rule here, so the centre is the interquartile mean (IQM: the mean of the middle
half) and every number comes with an interval. Everything is deterministic given `seed`. The
bootstrap is scipy's: rliable's draws one resample after the other, a second for each method; the
tests compare with it. scipy.stats is imported where it is used, because that takes a while.

Shapes: R runs, K tasks, P points of a curve.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FALSE_DISCOVERIES = 0.05
"""Share of what `discoveries` names that does not differ, at most, on average."""

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
class Change:
    """By which share of it the IQM of one method differs from that of another."""

    share: float
    """IQM(a) / IQM(b) - 1."""
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

    def wins(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        del axis  # the last one
        tasks = zip(samples[:count], samples[count:], strict=True)
        each = [np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in tasks]
        return (1 + np.mean(each, axis=0)) / 2

    first, second = _matrix("a", a), _matrix("b", b)
    count = first.shape[1]
    if second.shape[1] != count:
        raise ValueError("the two methods need the same number of tasks")
    samples = (*first.T, *second.T)
    point, low, high = _bootstrap(samples, wins, confidence, reps, seed)
    single = min(len(first), len(second)) == 1
    return Improvement(float(point), float(low), float(high), single)


def relative_change(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, reps: int = 2000, seed: int = 0
) -> Change | None:
    """Return IQM(a) / IQM(b) - 1 of scores of shapes (R_a,) and (R_b,), each resampled on its own.

    None where the interval of IQM(b) reaches 0: a share of nothing says nothing.
    """
    first, second = _matrix("a", a)[:, 0], _matrix("b", b)[:, 0]
    _, lowest, _ = _bootstrap((second,), _iqm, confidence, reps, seed)
    if lowest <= 0:
        return None

    def share(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> Any:
        return _iqm(x, axis) / _iqm(y, axis) - 1

    point, low, high = _bootstrap((first, second), share, confidence, reps, seed)
    return Change(float(point), float(low), float(high), min(len(first), len(second)) == 1)


def rank_test(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p-value that runs of `a` and `b` score alike; shapes as above.

    The sum over tasks of the Mann-Whitney statistics against its exact distribution when every
    order of a task's runs is equally likely and tasks are independent. Ties count half and are
    rounded towards no difference, so that the test stays conservative.
    """
    first, second = _matrix("a", a), _matrix("b", b)
    if first.shape[1] != second.shape[1]:
        raise ValueError("the two methods need the same number of tasks")
    above = np.sign(first[:, None] - second[None]).sum() / 2
    pairs = first.shape[0] * second.shape[0] * first.shape[1]
    chances = np.ones(1)
    for _ in range(first.shape[1]):
        chances = np.convolve(chances, _mann_whitney(len(first), len(second)))
    extreme = int(np.ceil((pairs - 1) / 2 + abs(above)))
    return float(min(1.0, 2 * chances[extreme:].sum()))


def discoveries(p_values: Mapping[str, float]) -> list[str]:
    """Those of many comparisons that differ, false discoveries held (Benjamini-Hochberg)."""
    from scipy.stats import false_discovery_control

    if not p_values:
        return []
    adjusted = false_discovery_control(list(p_values.values()))
    return [name for name, q in zip(p_values, adjusted, strict=True) if q <= FALSE_DISCOVERIES]


def _mann_whitney(n: int, m: int) -> NDArray[np.float64]:
    """Chance of 0, 1, ..., n m wins when n runs are compared with m of the same kind.

    The Gaussian binomial coefficient: the last of all runs is one of the n and beats all m, or it
    is one of the m.
    """
    counts = {(0, j): np.ones(1) for j in range(m + 1)}
    for i in range(1, n + 1):
        counts[i, 0] = np.ones(1)
        for j in range(1, m + 1):
            counts[i, j] = np.zeros(i * j + 1)
            counts[i, j][j:] += counts[i - 1, j]
            counts[i, j][: i * (j - 1) + 1] += counts[i, j - 1]
    return counts[n, m] / counts[n, m].sum()


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
    from scipy import stats

    def centres(*tasks: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        scores = np.concatenate(tasks, axis=axis)
        return np.stack([stats.trim_mean(scores, _TRIM, axis=axis), np.median(scores, axis=axis)])

    point, low, high = _bootstrap(tuple(matrix.T), centres, confidence, reps, seed)
    mean = float(matrix.mean())
    std = float(matrix.mean(axis=1).std(ddof=1)) if len(matrix) > 1 else None
    gap = None
    if target is not None:
        if np.any(np.asarray(target) <= 0):
            raise ValueError("the target of the optimality gap must be positive")
        gap = float(np.maximum(1 - matrix / np.asarray(target), 0).mean())
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
    return _bootstrap((whole.T,), _iqm, confidence, reps, seed)


def _iqm(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    from scipy import stats

    return np.asarray(stats.trim_mean(values, _TRIM, axis=axis))


def _bootstrap(
    samples: tuple[NDArray[np.float64], ...],
    statistic: Callable[..., NDArray[np.float64]],
    confidence: float,
    reps: int,
    seed: int,
) -> tuple[NDArray[np.float64], ...]:
    """Return point, low and high of a statistic along the last axis, samples resampled apart.

    Where a sample has one run, the ends are the point.
    """
    from scipy import stats

    point = statistic(*samples)
    if min(sample.shape[-1] for sample in samples) == 1:
        return point, point, point
    with warnings.catch_warnings():  # equal scores: the interval is the point, as it should be
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        ends = stats.bootstrap(
            samples,
            statistic,
            vectorized=True,
            n_resamples=reps,
            batch=200,  # bounds the memory
            confidence_level=confidence,
            method="percentile",
            axis=-1,
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return point, ends.low, ends.high


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
