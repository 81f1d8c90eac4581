"""Which method of RLHF gets how much reward at which KL to the reference, from as many samples.

One base, made by the stages of `rgpo rlhf` before RL; from it every arm of `rlhf_cells.ARMS` learns
with the same number of answers. Every arm has the same eight runs of tuning, on seeds that are not
reported, and is judged by the gold reward at the end, the only one that over-optimisation cannot
raise:

    rates      four learning rates, at the arm's default strength
    strengths  two more strengths, at the best of them
    finalists  the best two of these six trials, on a second seed
    report     the better one, on fresh seeds, evaluated along the way
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
from rgpo.studies.jobs import Cell, Result, Watch, read_results, run_phases
from rgpo.studies.rlhf_cells import ARMS, BETAS, POINTS, TASK, TUNING_SEEDS, RlhfCells, evaluated
from rgpo.studies.tuning import score

SETTINGS = RlhfConfig(
    model=TASK, pairs=1000, reward_steps=150, batch=16, group=4, epochs=2, minibatches=2,
    held_out=16, samples=16, cpu=True,
)  # fmt: skip
"""What all arms share. The reward model learns from half of the pairs of `rgpo rlhf --model tiny`
and is right on about 80% of unseen ones, so that a policy that follows it too far is seen to lose
gold reward."""

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
"""Learning rates that every arm is tuned over."""

FINALISTS = 2
"""Trials of each arm that get the second tuning seed."""

REFERENCE_SAMPLES = 64
"""Answers to each held-out prompt that measure the policy before RL, the zero of all rewards."""

SECONDS = {"base": 30.0, "update": 0.35, "evaluation": 0.8}
"""CPU-seconds on a busy machine, before there are measured ones."""


Trial = tuple[str, float]
"""Strength and learning rate."""


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
        grid = product(self.arms, RATES)
        return [_cell(arm, ARMS[arm].strengths[0], TUNING_SEEDS[0], rate) for arm, rate in grid]

    def strengths(self) -> list[Cell]:
        """Every arm at its learning rate with its other strengths."""
        chosen = {arm: self._ranked(arm, ARMS[arm].strengths[:1])[0][1] for arm in self.arms}
        return [
            _cell(arm, strength, TUNING_SEEDS[0], chosen[arm])
            for arm in self.arms
            for strength in ARMS[arm].strengths[1:]
        ]

    def finalists(self) -> list[Cell]:
        """The best trials of every arm once more."""
        return [
            _cell(arm, strength, TUNING_SEEDS[1], rate)
            for arm in self.arms
            for strength, rate in self._ranked(arm, ARMS[arm].strengths)[:FINALISTS]
        ]

    def reported(self) -> list[Cell]:
        """Every arm as it was chosen, on the seeds that are shown."""
        chosen = self.chosen()
        grid = product(self.seeds, self.arms)
        return [_cell(arm, chosen[arm][0], seed, chosen[arm][1]) for seed, arm in grid]

    def trials(self, arm: str) -> dict[Trial, list[float]]:
        """Gold rewards of an arm's trials at their end, one per tuning seed that is done."""
        found: dict[Trial, list[float]] = {}
        for result in self._results():
            if _name(result) == arm and result["seed"] in TUNING_SEEDS:
                trial = _strength(result), float(result["learning_rate"])
                found.setdefault(trial, []).append(score(result))
        return found

    def chosen(self) -> dict[str, Trial]:
        """The trial of every arm with the highest mean, of those with the most seeds."""
        every = {arm: self.trials(arm) for arm in self.arms}
        return {
            arm: max(trials, key=lambda t: (len(trials[t]), np.mean(trials[t])))
            for arm, trials in every.items()
            if trials
        }

    def _ranked(self, arm: str, strengths: Sequence[str]) -> list[Trial]:
        """Trials of these strengths by their first seed, the best one first."""
        trials = {t: scores for t, scores in self.trials(arm).items() if t[0] in strengths}
        return sorted(trials, key=lambda t: -trials[t][0])

    def runs(self) -> dict[str, list[Result]]:
        """Reported runs by arm, of arms that have some."""
        chosen = self.chosen()
        found: dict[str, list[Result]] = {arm: [] for arm in self.arms}
        for result in self._results():
            arm = _name(result)
            trial = _strength(result), float(result["learning_rate"])
            if chosen.get(arm) == trial and result["seed"] in self.seeds:
                found[arm].append(result)
        return {arm: sorted(rs, key=lambda r: r["seed"]) for arm, rs in found.items() if rs}

    def run(
        self,
        trains: RlhfCells,
        watch: Callable[[str], Watch] | None = None,
        workers: int | None = None,
    ) -> None:
        """All phases, from where they stand."""
        phases = (
            ("rates", self.rates),
            ("strengths", self.strengths),
            ("finalists", self.finalists),
            ("report", self.reported),
        )
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
        """Runs that are still missing, to tune and to report."""
        trials = len(RATES) + len(BETAS) - 1 + FINALISTS
        done = sum(len(scores) for arm in self.arms for scores in self.trials(arm).values())
        shown = sum(map(len, self.runs().values()))
        return {
            "tune": len(self.arms) * trials - done,
            "report": len(self.arms) * len(self.seeds) - shown,
        }

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
