"""The numbers of the RLHF study: ends of runs, rewards at equal KL, comparisons.

A reward has no zero of its own: percentages of it would depend on an arbitrary offset. So every
reward here is a gain over the policy before RL, measured on the same held-out prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rgpo.runs.statistics import (
    Change,
    Curve,
    Improvement,
    Summary,
    discoveries,
    interval,
    probability_of_improvement,
    rank_test,
    relative_change,
    summarize,
)
from rgpo.studies.jobs import Result

REWARDS = ("gold", "proxy")
BASELINES = ("ppo-rlhf", "grpo")

ENDS = ("gold", "proxy", "kl", "length", "entropy", "cut")
"""Measured on the held-out prompts after the last update."""

TRAINING = ("update_kl", "kl_spike", "cpu")
"""Measured over a whole run."""

LEVELS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""KL to the reference, nats per answer, at which rewards are compared."""

PUBLISHED = {
    ("proxy", "ppo-rlhf"): "+14.8%",
    ("kl", "ppo-rlhf"): "-16.0%",
    ("kl", "grpo"): "-53.1%",
}
"""Dual-ratio RGPO's reward and KL to the reference in the paper (arXiv 2604.14895, abstract)."""

Runs = Mapping[str, Sequence[Result]]
"""Reported runs by arm."""


@dataclass(frozen=True)
class Row:
    """One arm at the end of its runs."""

    arm: str
    runs: int
    failed: int
    """Runs that broke down; they count with their last evaluation."""

    ends: dict[str, Summary]
    """Keys of ENDS and TRAINING; rewards as gains."""

    second_half: dict[str, Summary]
    """Keys of REWARDS: the change from half of the updates to the end."""

    better: dict[str, Improvement]
    """By baseline, that a run ends with more gold reward; without the arm itself."""


def rows(runs: Runs) -> list[Row]:
    """One row per arm, most gold reward first."""
    return sorted((_row(arm, runs) for arm in runs), key=lambda row: -row.ends["gold"].iqm)


def second_half(results: Sequence[Result]) -> dict[str, Summary]:
    """Change of both rewards from half of the updates to the end."""
    return {
        name: spread(
            [_value(r, name, -1) - _value(r, name, len(r["points"]) // 2) for r in results]
        )
        for name in REWARDS
    }


def spread(values: Sequence[float]) -> Summary:
    """Of one number per run."""
    return summarize({"runs": values})["runs"]


def end(results: Sequence[Result], name: str) -> list[float]:
    """What runs end with: keys of ENDS (rewards as gains) or TRAINING."""
    if name in TRAINING:
        return [float(r[name]) for r in results if r[name] is not None]
    return [_value(r, name, -1) for r in results]


def at_kl(result: Result, name: str, level: float) -> float | None:
    """Gain in a reward where a run first reaches this KL, between two evaluations linearly."""
    points = result["points"]
    for i, (a, b) in enumerate(pairwise(points)):
        if a["kl"] < level <= b["kl"]:
            share = (level - a["kl"]) / (b["kl"] - a["kl"])
            return (1 - share) * _value(result, name, i) + share * _value(result, name, i + 1)
    return None


def all_at_kl(results: Sequence[Result], name: str, level: float) -> list[float] | None:
    """`at_kl` of every run; None unless every one reaches the level."""
    found = [at_kl(result, name, level) for result in results]
    return None if None in found else [x for x in found if x is not None]


def common_levels(runs: Runs) -> list[float]:
    """The LEVELS that every run of every arm reaches."""
    return [
        level
        for level in LEVELS
        if all(all_at_kl(results, "gold", level) is not None for results in runs.values())
    ]


def changes(runs: Runs, arm: str) -> dict[tuple[str, str], Change | None]:
    """An arm's reward and KL at the end against those of the baselines, as shares of theirs."""
    return {
        (name, baseline): relative_change(end(runs[arm], name), end(runs[baseline], name))
        for name in ("proxy", "gold", "kl")
        for baseline in BASELINES
        if baseline in runs
    }


def apart(scores: Mapping[str, Sequence[float]], baseline: str) -> tuple[list[str], list[str]]:
    """Arms that score higher than the baseline, and lower: rank tests, false discoveries held."""
    others = [arm for arm in scores if arm != baseline]
    found = discoveries({arm: rank_test(scores[arm], scores[baseline]) for arm in others})
    higher = [
        arm
        for arm in found
        if np.sign(np.subtract.outer(scores[arm], scores[baseline])).sum() > 0  # wins more pairs
    ]
    return higher, [arm for arm in found if arm not in higher]


def trajectory(results: Sequence[Result], name: str) -> Curve:
    """IQM over the runs at every evaluation, with intervals; a run that broke down stays put."""
    length = max(len(r["points"]) for r in results)
    return interval(np.stack([_path(r, name, length) for r in results]))


def _path(result: Result, name: str, length: int) -> NDArray[np.float64]:
    values = [_value(result, name, i) for i in range(len(result["points"]))]
    return np.array(values + values[-1:] * (length - len(values)))


def _value(result: Result, name: str, point: int) -> float:
    """A measure at an evaluation; rewards less those of the policy before RL."""
    points = result["points"]
    start = points[0][name] if name in REWARDS else 0.0
    return float(points[point][name] - start)


def _row(arm: str, runs: Runs) -> Row:
    results = runs[arm]
    others = [baseline for baseline in BASELINES if baseline in runs and baseline != arm]
    return Row(
        arm,
        len(results),
        sum(r["failed"] is not None for r in results),
        {name: spread(end(results, name)) for name in (*ENDS, *TRAINING)},
        second_half(results),
        {
            baseline: probability_of_improvement(end(results, "gold"), end(runs[baseline], "gold"))
            for baseline in others
        },
    )
