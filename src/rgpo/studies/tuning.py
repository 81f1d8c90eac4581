"""Scores of runs, and learning rates chosen by them on seeds that are not reported."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from rgpo.studies.jobs import Result

RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates that every arm is tuned over."""

Key = TypeVar("Key", bound=Hashable)


def score(result: Result) -> float:
    """What a run is judged by: its final return or accuracy; the worst number where it has none."""
    value = result["final_return"]
    return -np.inf if value is None else float(value)


def judged(results: Iterable[Result]) -> list[Result]:
    """The same; a run without a score, which diverged at once, gets the worst one of its task."""
    found, worst = list(results), dict[str, float]()
    for result in found:
        if result["final_return"] is not None:
            low = worst.get(result["task"], np.inf)
            worst[result["task"]] = min(low, float(result["final_return"]))
    return [
        result | {"final_return": worst.get(result["task"], 0.0)}
        if result["final_return"] is None
        else result
        for result in found
    ]


def scaled(results: Sequence[Result]) -> list[Result]:
    """The same with scores from 0 to 1: a task's lowest and highest mean of an arm at an age."""
    cells: dict[str, dict[tuple[str, int], list[float]]] = {}
    for result in results:
        task = cells.setdefault(result["task"], {})
        task.setdefault((result["arm"], result["staleness"]), []).append(score(result))
    means = {task: [np.mean(scores) for scores in found.values()] for task, found in cells.items()}
    low = {task: float(np.min(found)) for task, found in means.items()}
    size = {task: float(np.ptp(found)) or 1.0 for task, found in means.items()}
    return [r | {"final_return": (score(r) - low[r["task"]]) / size[r["task"]]} for r in results]


def matrix(cells: Sequence[Sequence[Result]]) -> np.ndarray:
    """Scores (seeds, cells), of the seeds that every one of the cells has."""
    by_cell = [{r["seed"]: score(r) for r in cell} for cell in cells]
    seeds = set.intersection(*(set(scores) for scores in by_cell))
    return np.array([[scores[seed] for scores in by_cell] for seed in sorted(seeds)])


def average(results: Iterable[Result], key: str) -> float:
    """Mean of a measurement over those that have it as a number; NaN if none does."""
    values = [x for r in results if (x := r.get(key)) is not None and not np.isnan(x)]
    return float(np.mean(values)) if values else float("nan")


def best_rates(results: Iterable[Result], key: Callable[[Result], Key]) -> dict[Key, float]:
    """The learning rate with the best mean score, for every key of the results."""
    found: dict[Key, dict[float, list[float]]] = {}
    for result in results:
        by_rate = found.setdefault(key(result), {})
        by_rate.setdefault(result["learning_rate"], []).append(score(result))
    return {
        name: max(by_rate, key=lambda rate: float(np.mean(by_rate[rate])))
        for name, by_rate in found.items()
    }
