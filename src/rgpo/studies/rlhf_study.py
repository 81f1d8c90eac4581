"""Which method of RLHF gets how much reward at which KL to the reference, from as many samples.

One base, made by the stages of `rgpo rlhf` before RL; from it every arm of `rlhf_cells.ARMS` learns
with the same number of answers. Every arm has the same six trials of tuning, on seeds that are not
reported, and is judged by the gold reward at the end, the only one that over-optimisation cannot
raise:

    rates      four learning rates, at the arm's default strength
    strengths  two more strengths, at the best of them
    report     the best, on fresh seeds, evaluated along the way
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from rgpo.errors import RgpoError
from rgpo.language.rlhf import RlhfConfig, opened, prepared
from rgpo.language.sample import load_policy
from rgpo.language.stages import Watch as StageWatch
from rgpo.studies.jobs import Cell, Result, Watch, missing, read_results, run_phases
from rgpo.studies.rlhf_cells import ARMS, BETAS, POINTS, TASK, TUNING_SEEDS, RlhfCells, evaluated
from rgpo.studies.tuning import best

SETTINGS = RlhfConfig(
    model=TASK, pairs=1000, reward_steps=150, batch=16, group=4, epochs=2, minibatches=2,
    held_out=16, samples=16, cpu=True,
)  # fmt: skip
"""What all arms share. The reward model learns from half of the pairs of `rgpo rlhf --model tiny`
and is right on about 80% of unseen ones, so that a policy that follows it too far is seen to lose
gold reward."""

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
"""Learning rates that every arm is tuned over."""

REFERENCE_SAMPLES = 64
"""Answers to each held-out prompt that measure the policy before RL, the zero of all rewards."""

SECONDS = {"base": 30.0, "update": 0.35, "evaluation": 0.8}
"""CPU-seconds on a busy machine, before there are measured ones."""


@dataclass(frozen=True)
class RlhfStudy:
    """The runs of the study in one directory."""

    directory: Path
    """Holds base, results.jsonl, tables.md and report.html."""

    config: RlhfConfig
    """What all arms share."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    """Those that are reported."""

    def rates(self) -> list[Cell]:
        """Every arm at every learning rate."""
        grid = product(self.arms, TUNING_SEEDS, RATES)
        return [_cell(arm, ARMS[arm].strengths[0], seed, rate) for arm, seed, rate in grid]

    def strengths(self) -> list[Cell]:
        """Every arm at its learning rate with its other strengths."""
        chosen = self.best_rates()
        return [
            _cell(arm, strength, seed, chosen[arm])
            for arm, seed in product(self.arms, TUNING_SEEDS)
            for strength in ARMS[arm].strengths[1:]
        ]

    def reported(self) -> list[Cell]:
        """Every arm as it was chosen, on the seeds that are shown."""
        chosen = self.chosen()
        grid = product(self.seeds, self.arms)
        return [_cell(arm, chosen[arm][0], seed, chosen[arm][1]) for seed, arm in grid]

    def best_rates(self) -> dict[str, float]:
        """The learning rate with the highest gold reward at the default strength."""
        tuned = [r for r in self.tuned() if _strength(r) == ARMS[_name(r)].strengths[0]]
        return best(tuned, _name, lambda r: float(r["learning_rate"]))

    def chosen(self) -> dict[str, tuple[str, float]]:
        """Strength and learning rate of every arm: the trial with the highest gold reward."""
        return best(self.tuned(), _name, lambda r: (_strength(r), float(r["learning_rate"])))

    def tuned(self) -> list[Result]:
        """Trials that are done."""
        return [r for r in self._results() if r["seed"] in TUNING_SEEDS]

    def runs(self) -> dict[str, list[Result]]:
        """Reported runs by arm, of arms that have some."""
        chosen = self.chosen()
        found: dict[str, list[Result]] = {arm: [] for arm in self.arms}
        for result in self._results():
            arm = _name(result)
            is_chosen = chosen[arm] == (_strength(result), result["learning_rate"])
            if is_chosen and result["seed"] in self.seeds:
                found[arm].append(result)
        return {arm: sorted(rs, key=lambda r: r["seed"]) for arm, rs in found.items() if rs}

    def run(
        self,
        trains: RlhfCells,
        watch: Callable[[str], Watch] | None = None,
        workers: int | None = None,
    ) -> None:
        """All phases, from where they stand."""
        phases = (("rates", self.rates), ("strengths", self.strengths), ("report", self.reported))
        run_phases(phases, trains, self.directory, workers=workers, watch=watch)

    def trains(self, tell: StageWatch) -> RlhfCells:
        """What trains the cells; makes the base, or continues it."""
        job = opened(self.config, self.directory / "base", tell)
        with job.finishing():
            base = prepared(job, self.config)
            many = replace(self.config, samples=REFERENCE_SAMPLES)
            reference = job.stage(
                "reference",
                lambda _: dict(evaluated(base, many, load_policy(base.start), base.judges())),
            )
            job.run.finish("finished", result={"reward_accuracy": base.accuracy, **reference})
        reference.pop("seconds")
        return RlhfCells(base, self.config, reference)

    def planned(self) -> dict[str, int]:
        """Runs that are still missing, by phase; later phases as if nothing of them was done."""
        tuning = len(self.arms) * len(TUNING_SEEDS) * (len(RATES) + len(BETAS) - 1)
        report = len(self.arms) * len(self.seeds)
        left = len(missing(self.rates(), self.directory))
        if left or not self.tuned():
            return {"tune": tuning - len(self.tuned()), "report": report}
        left = len(missing(self.strengths(), self.directory))
        done = sum(map(len, self.runs().values()))
        return {"tune": left, "report": report - done}

    def seconds(self, workers: int | None = None) -> float:
        """Time of what is still missing, from that of the runs already done."""
        timed = [r["seconds"] for r in read_results(self.directory)]
        updates = self.config.updates or 0
        each = SECONDS["update"] * updates + SECONDS["evaluation"] * POINTS
        each = float(np.mean(timed)) if timed else each
        base = 0.0 if (self.directory / "base" / "reference").exists() else SECONDS["base"]
        return base + each * sum(self.planned().values()) / (workers or os.cpu_count() or 1)

    def _results(self) -> list[Result]:
        return [r for r in read_results(self.directory) if _name(r) in self.arms]


def study(
    directory: Path, *, arms: Sequence[str] = (), seeds: int = 5, updates: int = 24
) -> RlhfStudy:
    """The study, by default the whole of it; RgpoError for an unknown arm or too little of all."""
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise RgpoError(f"unknown arm {unknown[0]!r}: choose from {', '.join(ARMS)}")
    if updates < POINTS:
        raise RgpoError(f"--updates {updates} is less than the {POINTS} evaluations of a run")
    if not 0 < seeds <= min(TUNING_SEEDS):
        raise RgpoError(f"--seeds must lie between 1 and {min(TUNING_SEEDS)}, got {seeds}")
    config = replace(SETTINGS, updates=updates).resolved()
    return RlhfStudy(directory, config, tuple(arms) or tuple(ARMS), tuple(range(seeds)))


def _cell(arm: str, strength: str, seed: int, rate: float) -> Cell:
    return Cell(TASK, f"{arm}:{strength}", 0, seed, rate)


def _name(result: Result) -> str:
    return str(result["arm"]).partition(":")[0]


def _strength(result: Result) -> str:
    return str(result["arm"]).partition(":")[2]
