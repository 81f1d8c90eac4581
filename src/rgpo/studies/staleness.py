"""How good is every recipe when its data are old? The study behind docs/objectives.

The question: return (or accuracy) as a function of how many updates old the data are. Everything
but the weight is the same: trainer, data, budget, and the same learning-rate grid for every recipe,
chosen on seeds that are not reported. Three phases, each resumable:

    tune      every recipe x learning rate x tuning seeds, on fresh and on old data
    first     every recipe at its learning rates, a few seeds at every age
    leaders   more seeds for the ten best of those on fresh and on old data, and a few contrasts
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Protocol

import numpy as np

from rgpo.control.config import TrainConfig
from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.studies.control_cells import ControlCells
from rgpo.studies.jobs import Cell, Result, Watch, missing, read_results, run_phases
from rgpo.studies.tuning import RATES, best_rates, judged, scaled, score

AGES = {"control": (0, 1, 2, 4, 8, 16), "language": (0, 8, 32)}
"""Updates between the policy that acts and the one that learns."""

TUNING_AGES = {"control": (0, 8), "language": (0, 8, 32)}
"""Ages at which learning rates are chosen; other ages get the rate of the nearest one."""

TUNING_SEEDS = {"control": (100, 101), "language": (100,)}
"""Seeds on which learning rates are chosen; never reported."""

BASELINES = {"control": "ppo", "language": "grpo"}
"""Whom the sentences of a workload compare every recipe with."""

RIVALS = ("ppo", "grpo")
"""Whom the tables compare every recipe with."""

CONTRASTS = {
    ("rgpo-signed", "rgpo-gate"): "gate on the outward side only, against both sides",
    ("rgpo-signed-kl", "rgpo"): "the same, both with the KL penalty",
    ("rgpo-pullback", "rgpo-signed"): "a bounded pull back, against none",
    ("rgpo", "rgpo-gate"): "KL penalty on top of the gate",
    ("rgpo", "ppo-kl"): "gate on top of the KL penalty",
    ("rgpo-decoupled", "rgpo-gate"): "gate around the present policy, against the old one",
    ("rgpo-decoupled-signed", "rgpo-signed"): "the same, sign-aware",
    ("rgpo-decoupled-signed", "rgpo-decoupled"): "outward side only, around the present policy",
    ("rgpo-decoupled", "ppo-tis"): "gate in place of the clip, both around the present policy",
}
"""Pairs of recipes that differ in one choice: what of RGPO does what.

Around the present policy there is a truncated correction for the age of the data as well.
"""

FIRST_SEEDS = (0, 1, 2)
LEADER_SEEDS = (3, 4)
LEADERS = 10

CONTROL = {
    "HalfCheetah-v5": TrainConfig(env="HalfCheetah-v5", steps=80_000),
    "CartPole-v1": TrainConfig(env="CartPole-v1", steps=40_000),
}
"""Tasks of the control workload; rollouts are short, so that a run has 79 or 40 updates, of which
at age 16 the first 17 see data of the untrained policy."""

CONTROL_SETTINGS = {
    "num_envs": 8,
    "rollout_steps": 128,
    "epochs": 5,
    "minibatch_size": 128,
    "eval_episodes": 0,
    "track": (),
}


class Trains(Protocol):
    """What trains the cells of a workload."""

    seconds_per_run: float
    """Rough time of one run on one core, before there is a measured one."""

    lengths: dict[str, int]
    """Environment steps or updates of a run, by task."""

    def refusal(self, task: str, arm: str) -> str | None:
        """Why this arm cannot be trained on this task, None if it can."""

    def jobs(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """Cells that train together."""

    def __call__(self, cells: Sequence[Cell]) -> list[Result]:
        """Train one job."""


@dataclass(frozen=True)
class Study:
    """One workload of the study in one directory."""

    workload: str
    """control or language."""

    directory: Path
    """Holds results.jsonl and report.html."""

    trains: Trains
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    """Recipes that at least one task can train."""

    ages: tuple[int, ...]
    rates: tuple[float, ...]
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """(task, arm) that cannot be trained, and why."""

    def tuned_at(self, age: int) -> int:
        """The tuning age whose learning rate data of this age get: the nearer one."""
        return min(TUNING_AGES[self.workload], key=lambda tuned: abs(tuned - age))

    def pairs(self) -> list[tuple[str, str]]:
        """Every task with every arm that it can train."""
        return [pair for pair in product(self.tasks, self.arms) if pair not in self.refused]

    def tuning(self) -> list[Cell]:
        """Cells of the first phase."""
        grid = product(
            self.pairs(), TUNING_AGES[self.workload], TUNING_SEEDS[self.workload], self.rates
        )
        return [Cell(task, arm, age, seed, rate) for (task, arm), age, seed, rate in grid]

    def reported(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
        """Cells of these arms at their chosen learning rates."""
        rates = self.chosen_rates()
        return [
            Cell(task, arm, age, seed, rates[task, arm, self.tuned_at(age)])
            for (task, arm), age, seed in product(self.pairs(), self.ages, seeds)
            if arm in arms
        ]

    def chosen_rates(self) -> dict[tuple[str, str, int], float]:
        """The learning rate with the best mean over the tuning seeds, by task, arm, tuning age."""
        tuned = self.results(TUNING_SEEDS[self.workload])
        return best_rates(tuned, lambda r: (r["task"], r["arm"], r["staleness"]))

    def leaders(self) -> list[str]:
        """The best ten arms on fresh data and on old ones in the first seeds, and a few more.

        By the mean over tasks and ages on one scale. The baseline and the recipes of CONTRASTS get
        as many seeds in any case.
        """
        found = scaled(judged(self.results(FIRST_SEEDS)))
        kept = {BASELINES[self.workload], *chain.from_iterable(CONTRASTS)}
        for fresh in (True, False):
            scores: dict[str, list[float]] = {}
            for result in found:
                if (result["staleness"] == self.ages[0]) == fresh:
                    scores.setdefault(result["arm"], []).append(score(result))
            kept |= set(sorted(scores, key=lambda arm: -float(np.mean(scores[arm])))[:LEADERS])
        return [arm for arm in self.arms if arm in kept]

    def results(self, seeds: Sequence[int]) -> list[Result]:
        """Results of these seeds, of arms and ages that belong to the study."""
        return [
            r
            for r in read_results(self.directory)
            if r["seed"] in seeds and r["arm"] in self.arms and r["staleness"] in self.ages
        ]

    def run(self, watch: Callable[[str], Watch] | None = None, workers: int | None = None) -> None:
        """All phases, from where they stand; `watch(phase)` is told of every job."""
        phases: tuple[tuple[str, Callable[[], list[Cell]]], ...] = (
            ("tune", self.tuning),
            ("first", lambda: self.reported(self.arms, FIRST_SEEDS)),
            ("leaders", lambda: self.reported(self.leaders(), LEADER_SEEDS)),
        )
        run_phases(phases, self.trains, self.directory, workers=workers, watch=watch)

    def planned(self) -> dict[str, int]:
        """Runs that are still missing, by phase; of those that depend on results, at most."""
        tune = len(missing(self.tuning(), self.directory))
        if not tune and not missing(self.reported(self.arms, FIRST_SEEDS), self.directory):
            leaders = self.reported(self.leaders(), LEADER_SEEDS)
            return {"tune": 0, "report": len(missing(leaders, self.directory))}
        known = {BASELINES[self.workload], *chain.from_iterable(CONTRASTS)}
        leading = min(2 * LEADERS + len(known), len(self.arms)) * len(self.tasks)
        total = len(self.pairs()) * len(FIRST_SEEDS) + leading * len(LEADER_SEEDS)
        done = len(self.results((*FIRST_SEEDS, *LEADER_SEEDS)))
        return {"tune": tune, "report": max(0, total * len(self.ages) - done)}

    def seconds(self, workers: int | None = None) -> float:
        """Wall-clock time of what is still missing, from the time of the jobs already done.

        Before there are any, from the workload's own estimate per run.
        """
        timed = [r["seconds"] for r in read_results(self.directory) if "seconds" in r]
        each = float(np.mean(timed)) if timed else self.trains.seconds_per_run
        return each * sum(self.planned().values()) / (workers or os.cpu_count() or 1)


def control(
    directory: Path,
    *,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    steps: int | None = None,
) -> Study:
    """The control workload; by default every recipe that control can train."""
    tasks, settings = tuple(tasks) or tuple(CONTROL), {}
    for task in tasks:
        base = CONTROL.get(task, TrainConfig(env=task, steps=100_000))
        shorter = {} if steps is None else {"steps": steps}
        settings[task] = replace(base, **CONTROL_SETTINGS, **shorter)
    trains = ControlCells(tuple(settings.items()))
    return make("control", directory, trains, tasks, arms)


def make(
    workload: str, directory: Path, trains: Trains, tasks: tuple[str, ...], arms: Sequence[str]
) -> Study:
    """The study of a workload, of what it can train; RgpoError for an arm that it cannot."""
    wanted = tuple(arms) or tuple(recipes.names())
    refused = {
        (task, arm): reason
        for task, arm in product(tasks, wanted)
        if (reason := trains.refusal(task, arm)) is not None
    }
    able = tuple(arm for arm in wanted if any((task, arm) not in refused for task in tasks))
    if arms and len(able) < len(arms):
        arm = next(a for a in arms if a not in able)
        raise RgpoError(refused[tasks[0], arm])
    return Study(workload, directory, trains, tasks, able, AGES[workload], RATES, refused)
