"""Training the cells of a study on control tasks, many runs as one computation."""

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from rgpo.control.config import TrainConfig
from rgpo.control.fast import FastLearner
from rgpo.control.train import Trainer
from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.runs.table import final_return
from rgpo.settings import parse_options, split_arm
from rgpo.studies.jobs import Cell, Result

TOGETHER = 24
"""Runs in one job at most; with 16 MiB a run its process has less than a GiB."""

FEW = 4
"""Runs below which jobs are not divided: they have most of what training together gains
(docs/results.md)."""

JOB_STEPS = 2_400_000
"""Environment steps of a job, if FEW runs are not longer: what a kill can lose, in each process a
few minutes."""

MEASURED = (
    "kl",
    "kl_behavior",
    "kl_spike",
    "ess",
    "weight_mean",
    "active_clip_fraction",
    "pull_back_fraction",
    "entropy",
)
"""Metrics of a row that are averaged over the updates of a run."""


@dataclass(frozen=True)
class ControlCells:
    """Trains cells of control tasks; a `jobs.Train`."""

    settings: tuple[tuple[str, TrainConfig], ...]
    """For every task what its runs share."""

    @property
    def lengths(self) -> dict[str, int]:
        """Environment steps of a run, by task."""
        return {task: config.steps for task, config in self.settings}

    @property
    def seconds_per_run(self) -> float:
        """At 15,000 steps per second and core, about what HalfCheetah takes."""
        return float(np.mean([config.steps for _, config in self.settings])) / 15_000

    def config(self, cell: Cell) -> TrainConfig:
        """The configuration of one run; RgpoError for an arm with a learning rate of its own."""
        recipe, options = split_arm(cell.arm)
        if "learning_rate" in parse_options(options):
            raise RgpoError(f"{cell.arm}: a study tunes the learning rates itself, leave it out")
        return dataclasses.replace(
            dict(self.settings)[cell.task],
            recipe=recipe,
            set=options,
            staleness=cell.staleness,
            seed=cell.seed,
            learning_rate=cell.learning_rate,
        )

    def refusal(self, task: str, arm: str) -> str | None:
        """Why this arm cannot be trained on this task, None if it can."""
        config = self.config(Cell(task, arm, 0, 0, 1e-3))
        try:
            Trainer([config]).environments.close()
        except RgpoError as error:
            return str(error)
        return None

    def jobs(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """Cells that train together: one task, one staleness, one kind of learner."""

        def kind(cell: Cell) -> tuple[Any, ...]:
            recipe = recipes.get(split_arm(cell.arm)[0])
            plain = recipe.step != "gradient" or "median_advantage" in recipe.objective.needs
            return cell.task, cell.staleness, plain

        order = sorted(cells, key=lambda c: (*kind(c), c.arm))
        jobs = []
        for (_, _, plain), group in groupby(order, key=kind):
            alike = list(group)
            most = min(TOGETHER, JOB_STEPS // self.lengths[alike[0].task])
            even = -(-len(alike) // (os.cpu_count() or 1))  # a short phase, too, is for all cores
            size = FEW if plain else max(FEW, min(most, even))
            number = -(-len(alike) // size)
            ends = [len(alike) * i // number for i in range(number + 1)]
            jobs += [alike[i:j] for i, j in pairwise(ends)]
        return jobs

    def __call__(self, cells: Sequence[Cell]) -> list[Result]:
        """Train to the end; a run that diverges is scored by its first update's return."""
        start = time.perf_counter()
        trainer = Trainer([self.config(cell) for cell in cells])
        rows = [list(run) for run in zip(*_all_rows(trainer), strict=True)]
        trainer.environments.close()
        learner = "fast" if isinstance(trainer.learner, FastLearner) else "plain"
        shared = {"learner": learner, "seconds": (time.perf_counter() - start) / len(cells)}
        return [
            dataclasses.asdict(cell) | _measured(mine, trainer.failed.get(r)) | shared
            for r, (cell, mine) in enumerate(zip(cells, rows, strict=True))
        ]


def _all_rows(trainer: Trainer) -> Iterator[list[dict[str, float | None]]]:
    for _ in range(trainer.config.updates):
        yield trainer.step()


def _measured(rows: list[dict[str, float | None]], failure: str | None) -> Result:
    """Final and mean return, and the means of MEASURED over the updates that were finite."""
    returns = [row["return"] for row in rows if row["return"] is not None]
    final = final_return(rows) if failure is None else next(iter(returns), None)
    found: Result = {"final_return": final, "failed": failure}
    found["mean_return"] = float(np.mean(returns)) if returns else None
    for name in MEASURED:
        values = [row[name] for row in rows if row[name] is not None and math.isfinite(row[name])]
        found[name] = float(np.mean(values)) if values else None
    return found
