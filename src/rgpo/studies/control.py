"""The paper's control table, as published and at equal step size: docs/control-study.md.

Early trials showed that the size of the policy's steps explains most differences between
objectives. So the arms are compared twice: with the hyper-parameters of their papers, and with
their strength (clip, sharpness, KL target, ...) chosen so that the mean KL per update is the same.
Learning rates come from one grid; strengths from one list per arm, or the middle of two neighbours
that enclose a KL and are not near it. Both are chosen on seeds that are not reported.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from rgpo.control.config import TrainConfig
from rgpo.core.recipes import Recipe
from rgpo.settings import split_arm
from rgpo.studies.control_cells import ControlCells
from rgpo.studies.jobs import Cell, Result, Watch, missing, read_results, run_phases
from rgpo.studies.tuning import RATES, best_rates, judged

TASKS = {
    "HalfCheetah-v5": 100_000,
    "Hopper-v5": 100_000,
    "Walker2d-v5": 100_000,
    "Ant-v5": 50_000,
}
"""Environment steps of a run. The paper's length is not known; these are what two cores can do."""


Strengths = tuple[tuple[str, ...], tuple[float, ...]]
"""Hyper-parameters that get the same value, and the values that are tried."""

STRENGTHS: dict[str, Strengths] = {
    "rgpo": (("kl_target",), (0.005, 0.01, 0.02, 0.03, 0.06)),
    "rgpo-gate": (("sharpness",), (2.5, 5, 10, 20, 40, 100)),
    "rgpo-signed": (("sharpness",), (2.5, 5, 10, 20, 40, 100)),
    "rgpo-signed-kl": (("kl_target",), (0.005, 0.01, 0.02, 0.03, 0.06)),
    "ppo": (("clip_low", "clip_high"), (0.05, 0.1, 0.2, 0.4, 0.8)),
    "ppo-kl": (("kl_target",), (0.005, 0.01, 0.02, 0.03, 0.06)),
    "trpo": (("max_kl",), (0.005, 0.01, 0.02, 0.03, 0.06)),
    "awr": ((), ()),
    "gipo": (("sigma",), (0.05, 0.1, 0.2, 0.5, 1)),
    "sapo": (("tau_positive", "tau_negative"), (1, 4, 10, 20, 40)),
    "spo": (("epsilon",), (0.05, 0.1, 0.2, 0.4, 0.8)),
}
"""Every arm of the table, with the hyper-parameter that sets its step size."""

TARGETS = (0.01, 0.03)
"""Mean KL(old || new) per update at which arms are compared."""

REACHED = 1.5
"""An arm is compared at a target if its best strength is within this factor of it."""

TUNING_SEEDS = (100, 101)

STEPS_PER_SECOND = 8_000
"""Of one process with TrainConfig's 10 epochs, before a run of the task has been timed: between
HalfCheetah's and Ant's."""


@dataclass(frozen=True)
class ControlStudy:
    """The runs of the control table in one directory."""

    directory: Path
    trains: ControlCells
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]

    def tuning(self) -> list[Cell]:
        """Every published arm at every learning rate."""
        grid = product(self.tasks, self.arms, TUNING_SEEDS, RATES)
        return [Cell(task, arm, 0, seed, rate) for task, arm, seed, rate in grid]

    def strengths(self) -> list[Cell]:
        """Every arm at its learning rate with every strength that is not its published one."""
        rates = self.rates()
        return [
            Cell(task, variant, 0, seed, rates[task, arm])
            for task, arm, seed in product(self.tasks, self.arms, TUNING_SEEDS)
            for variant in self._variants(arm, _numbers(arm))
            if variant != arm
        ]

    def between(self) -> list[Cell]:
        """Where two neighbouring strengths enclose a target that none is near: their middle."""
        rates, kl, matched = self.rates(), self._kl(), self.matched()
        found = []
        for task, arm, target in product(self.tasks, self.arms, TARGETS):
            if (task, target, arm) in matched:
                continue
            for pair in pairwise(_numbers(arm)):
                ends = [kl[task, variant] for variant in self._variants(arm, pair)]
                if min(ends) < target < max(ends):
                    middle = float(f"{math.sqrt(math.prod(pair)):.2g}")
                    [variant] = self._variants(arm, [middle])
                    found += [Cell(task, variant, 0, s, rates[task, arm]) for s in TUNING_SEEDS]
        return found

    def _variants(self, arm: str, numbers: Sequence[float]) -> list[str]:
        """The arm with each of these strengths; the arm itself for the one that it has anyway."""
        names = STRENGTHS[arm][0] if numbers else ()
        each = [f"{arm}:" + ",".join(f"{name}={n:g}" for name in names) for n in numbers]
        published = self._settings(arm)
        return [arm if self._settings(name) == published else name for name in each]

    def _settings(self, variant: str) -> tuple[Recipe, float]:
        config = self.trains.config(Cell(self.tasks[0], variant, 0, 0, 1e-3))
        return config.resolve(), config.max_kl

    def reported(self) -> list[Cell]:
        """Published arms, and those that reach a target, on the seeds that are shown."""
        return [
            Cell(task, variant, 0, seed, rate)
            for (task, variant), rate in self._chosen().items()
            for seed in self.seeds
        ]

    def _chosen(self) -> dict[tuple[str, str], float]:
        """Learning rate of every task and variant that is shown."""
        rates = self.rates()
        chosen = {(task, arm): rates[task, arm] for task, arm in product(self.tasks, self.arms)}
        for (task, _, arm), variant in self.matched().items():
            chosen[task, variant] = rates[task, arm]
        return chosen

    def rates(self) -> dict[tuple[str, str], float]:
        """The learning rate with the best mean return over the tuning seeds."""
        tuned = (r for r in self.tuned() if r["arm"] in self.arms)
        return best_rates(tuned, lambda r: (r["task"], r["arm"]))

    def matched(self) -> dict[tuple[str, float, str], str]:
        """The variant of every arm whose mean KL is nearest to the target, if it is near it."""
        found: dict[tuple[str, float, str], str] = {}
        off: dict[tuple[str, float, str], float] = {}
        for ((task, variant), kl), target in product(self._kl().items(), TARGETS):
            key, distance = (task, target, split_arm(variant)[0]), abs(float(np.log(kl / target)))
            if distance <= np.log(REACHED) and distance < off.get(key, np.inf):
                found[key], off[key] = variant, distance
        return found

    def _kl(self) -> dict[tuple[str, str], float]:
        """Mean KL per update of every task and variant on the tuning seeds, at its arm's rate."""
        rates = self.rates()
        measured: dict[tuple[str, str], list[float]] = {}
        for r in self.tuned():
            if r["learning_rate"] == rates.get((r["task"], split_arm(r["arm"])[0])):
                measured.setdefault((r["task"], r["arm"]), []).append(r["kl"] or np.inf)
        return {variant: float(np.mean(kl)) for variant, kl in measured.items()}

    def shown(self) -> list[Result]:
        """Reported runs of every arm and variant at its learning rate."""
        chosen = self._chosen()
        return judged(
            r
            for r in read_results(self.directory)
            if r["seed"] in self.seeds and r["learning_rate"] == chosen.get((r["task"], r["arm"]))
        )

    def tuned(self) -> list[Result]:
        """Runs of the tuning seeds: every arm at every learning rate, every strength at one."""
        found = read_results(self.directory)
        return [r for r in found if r["seed"] in TUNING_SEEDS and r["task"] in self.tasks]

    def run(self, watch: Callable[[str], Watch] | None = None, workers: int | None = None) -> None:
        """All phases, from where they stand."""
        phases = (
            ("learning rates", self.tuning),
            ("strengths", self.strengths),
            ("between", self.between),
            ("report", self.reported),
        )
        run_phases(phases, self.trains, self.directory, workers=workers, watch=watch)

    def planned(self) -> dict[str, int]:
        """Runs still to be made, by task; of one whose strengths are not known, at most."""
        return {task: self._left(task) for task in self.tasks}

    def _left(self, task: str) -> int:
        alone = replace(self, tasks=(task,))
        known = (alone.tuning, alone.strengths, alone.between)
        if not any(missing(cells(), self.directory) for cells in known):
            return len(missing(alone.reported(), self.directory))
        each = [self._variants(arm, _numbers(arm)) for arm in self.arms]
        options = sum(v != arm for arm, found in zip(self.arms, each, strict=True) for v in found)
        enclosed = sum(len(found) > 1 for found in each) * len(TARGETS)
        tuned = (len(self.arms) * len(RATES) + options + enclosed) * len(TUNING_SEEDS)
        shown = len(self.arms) * (1 + len(TARGETS)) * len(self.seeds)
        done = sum(r["task"] == task for r in read_results(self.directory))
        return max(tuned + shown - done, 0)

    def seconds(self, workers: int | None = None) -> float:
        """Wall-clock time of what is left, at most: from a task's runs so far or a rough guess."""
        timed: dict[str, list[float]] = {task: [] for task in self.tasks}
        for result in read_results(self.directory):
            timed.get(result["task"], []).append(result["seconds"])
        rough = {task: [length / STEPS_PER_SECOND] for task, length in self.trains.lengths.items()}
        left = self.planned()
        total = sum(left[task] * np.mean(timed[task] or rough[task]) for task in self.tasks)
        return float(total) / (workers or os.cpu_count() or 1)


def _numbers(arm: str) -> tuple[float, ...]:
    return STRENGTHS[arm][1] if arm in STRENGTHS else ()


def control(
    directory: Path,
    *,
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: int = 10,
    steps: int | None = None,
) -> ControlStudy:
    """The control table, by default the whole of it; RgpoError for an unknown arm."""
    chosen = tuple(tasks) or tuple(TASKS)
    shared = TrainConfig(eval_episodes=0, track=())
    settings = tuple(
        (task, replace(shared, env=task, steps=steps or TASKS.get(task, 100_000)))
        for task in chosen
    )
    trains = ControlCells(settings)
    for arm in arms:
        trains.config(Cell(chosen[0], arm, 0, 0, 1e-3)).resolve()
    return ControlStudy(
        directory, trains, chosen, tuple(arms) or tuple(STRENGTHS), tuple(range(seeds))
    )
