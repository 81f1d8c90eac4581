"""What reuse, ratio weight and KL each contribute where the dynamics are differentiable.

Arms: ReparamPPO with 1 epoch (SHAC) and with 2, 5 and 10, each with five weights on the ratio
(the ratio alone, the published mask [0.2, 2], a PPO-like mask [0.8, 1.2], the RGPO gate, GIPO), the
KL penalty on and off; and PPO and RGPO by the score function on the very same tasks. One setting
for all; nothing is tuned per arm.

All seeds of an arm on a task are trained as one computation. Every run is an ordinary run directory
(`rgpo report OUT/runs` draws them). A run has reached the stated return when the mean of its newest
32 training episodes has; training episodes are played with the policy's own noise.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from rgpo.control import session as score_session
from rgpo.control.config import TrainConfig
from rgpo.differentiable import session as reparam_session
from rgpo.differentiable.config import ReparamConfig
from rgpo.errors import RgpoError
from rgpo.runs.directory import Run
from rgpo.runs.statistics import Improvement, probability_of_improvement, summarize
from rgpo.runs.table import number
from rgpo.studies.jobs import Cell, Result, Watch, hold_lengths, missing, read_results, run_jobs
from rgpo.studies.text import markdown_table

THRESHOLDS = {
    "rgpo/Pendulum": -250.0,
    "rgpo/Cartpole": 100.0,
    "rgpo/Quadrotor": 170.0,
    "rgpo/Reacher": -25.0,
}
"""Return that counts as reached, by task; all tasks of the study."""

STEPS = {
    "rgpo/Pendulum": 40_000,
    "rgpo/Cartpole": 80_000,
    "rgpo/Quadrotor": 30_000,
    "rgpo/Reacher": 60_000,
}
"""Of a run through the simulator's gradient: good arms need about half of them."""

WEIGHTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ratio": ("importance", ()),
    "mask": ("reparam-mask", ("clip_low=0.8", "clip_high=1.0")),
    "narrow mask": ("reparam-mask", ("clip_low=0.2", "clip_high=0.2")),
    "gate": ("rgpo-gate", ()),
    "gipo": ("gipo", ()),
}
"""Recipe and hyper-parameters behind each weight."""

EPOCHS = (2, 5, 10)
KL = 0.05
"""Coefficient of the KL penalty where it is on."""

SCORE_FUNCTION = ("ppo", "rgpo")
EPISODES = 32
"""Training episodes whose mean return is compared with the threshold."""

SECONDS_PER_100K = {"reparam": 4.0, "score": 3.0}
"""Rough time on one idle core, before a run was measured."""


def arms() -> list[str]:
    """All arms by name: "shac", "5 mask kl", "5 mask", ..., "ppo", "rgpo"."""
    grid = product(EPOCHS, WEIGHTS, (" kl", ""))
    return ["shac", *(f"{m} {w}{kl}" for m, w, kl in grid), *SCORE_FUNCTION]


def _kind(arm: str) -> str:
    return "score" if arm in SCORE_FUNCTION else "reparam"


def config_of(cell: Cell, steps: int) -> ReparamConfig | TrainConfig:
    """The run behind a cell."""
    common: dict[str, Any] = {
        "env": cell.task,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "track": (),
        "keep": 1,
        "checkpoint_every": 10**6,
    }
    if cell.arm in SCORE_FUNCTION:
        return TrainConfig(recipe=cell.arm, steps=3 * steps, **common)
    if cell.arm == "shac":
        return ReparamConfig(epochs=1, steps=steps, **common)
    epochs, _, weight = cell.arm.partition(" ")
    recipe, changes = WEIGHTS[weight.removesuffix(" kl")]
    coefficient = KL if weight.endswith(" kl") else 0
    changes = (*changes, f"kl_coefficient={coefficient}")
    return ReparamConfig(epochs=int(epochs), recipe=recipe, set=changes, steps=steps, **common)


def train(cells: Sequence[Cell], *, directory: Path, steps: int | None) -> list[Result]:
    """Train the cells of one arm and task together; what was measured of each."""
    arm, task = cells[0].arm, cells[0].task
    paths = []
    for cell in cells:
        name = f"{task.removeprefix('rgpo/')}-{arm.replace(' ', '-')}-seed{cell.seed}"
        paths.append(directory / "runs" / name)
        shutil.rmtree(paths[-1], ignore_errors=True)  # of a study that was killed
    sessions: Any = score_session if arm in SCORE_FUNCTION else reparam_session
    try:
        statuses = sessions.start([config_of(cell, steps or STEPS[task]) for cell in cells], paths)
    except RgpoError:
        if not all((path / "status.json").exists() for path in paths):
            raise
    else:
        if "interrupted" in statuses:  # a signal to this process alone
            raise RgpoError(f"{arm} on {task} was stopped: the same command begins it again")
    return [
        vars(cell) | measured(Run.open(path), THRESHOLDS[task])
        for cell, path in zip(cells, paths, strict=True)
    ]


def measured(run: Run, threshold: float) -> Result:
    """What the study keeps of a run; `steps` and `seconds_to` are None where it fell short."""
    rows, status = run.metrics(), run.status
    reached = reached_at(rows, threshold)
    found = status.get("result") or {}
    result: Result = {"status": status["status"], "final_return": found.get("eval_return")}
    result |= {"steps": None, "seconds_to": None}
    if reached is not None:
        result["steps"] = rows[reached]["step"]
        result["seconds_to"] = sum(row["seconds"] for row in rows[: reached + 1])
    result["seconds"] = sum(row["seconds"] for row in rows)
    for key in ("kl", "ess", "ratio_kept"):
        values = [row[key] for row in rows if row.get(key) is not None]
        result[key] = float(np.mean(values)) if values else None
    return result


def reached_at(rows: Sequence[dict[str, Any]], threshold: float) -> int | None:
    """Index of the first row at which the newest 32 training episodes have the return."""
    newest: list[float] = []
    for index, row in enumerate(rows):
        if row.get("return") is not None:
            newest = [*newest, *[row["return"]] * int(row["episodes"])][-EPISODES:]
        if len(newest) == EPISODES and float(np.mean(newest)) >= threshold:
            return index
    return None


@dataclass(frozen=True)
class Differentiable:
    """The study in one directory."""

    directory: Path
    """Holds results.jsonl, tables.md and runs/."""

    tasks: tuple[str, ...] = tuple(THRESHOLDS)
    arms: tuple[str, ...] = tuple(arms())
    seeds: int = 10
    steps: int | None = None
    """Of a run through the simulator's gradient, instead of STEPS; the score function gets three
    times as many."""

    def __post_init__(self) -> None:
        for what, chosen, known in (
            ("task", self.tasks, tuple(THRESHOLDS)),
            ("arm", self.arms, tuple(arms())),
        ):
            unknown = [name for name in chosen if name not in known]
            if unknown:
                raise RgpoError(f"{unknown[0]!r} is no {what} of this study: {', '.join(known)}")

    def cells(self) -> list[Cell]:
        """Every run, task by task, the seeds of an arm side by side.

        The learning rate is the method's default.
        """
        rates = {True: TrainConfig().learning_rate, False: ReparamConfig().learning_rate}
        grid = product(self.tasks, self.arms, range(self.seeds))
        return [Cell(t, a, 0, s, rates[a in SCORE_FUNCTION]) for t, a, s in grid]

    def todo(self) -> list[Cell]:
        """What has no result yet."""
        return missing(self.cells(), self.directory)

    def seconds(self, workers: int) -> float:
        """Wall-clock time of what is left, from runs that are done or a rough estimate."""
        spent: dict[str, list[float]] = {kind: [] for kind in SECONDS_PER_100K}
        for result in read_results(self.directory):
            share = self.budget(result["arm"], result["task"]) / 1e5
            spent[_kind(result["arm"])].append(result["seconds"] / share)
        rough = SECONDS_PER_100K
        each = {kind: np.mean(found or [rough[kind]]) for kind, found in spent.items()}
        left = (each[_kind(c.arm)] * self.budget(c.arm, c.task) / 1e5 for c in self.todo())
        return float(sum(left)) / workers

    def run(self, watch: Watch | None = None, workers: int = 2) -> None:
        """Train what is missing."""
        hold_lengths(self.directory, {task: self.steps or STEPS[task] for task in self.tasks})
        work = partial(train, directory=self.directory, steps=self.steps)
        jobs = [list(job) for _, job in groupby(self.todo(), lambda cell: (cell.task, cell.arm))]
        run_jobs(jobs, work, self.directory, workers=workers, watch=watch)

    def results(self) -> list[Result]:
        """Results that belong to this study."""
        keys = {cell.key() for cell in self.cells()}
        found = read_results(self.directory)
        fields = Cell.__dataclass_fields__
        return [r for r in found if tuple(r[name] for name in fields) in keys]

    def budget(self, arm: str, task: str) -> int:
        """Steps that a run of this arm may take."""
        return (self.steps or STEPS[task]) * (3 if arm in SCORE_FUNCTION else 1)


HEADER = (
    "arm",
    "reached",
    "steps, median",
    "95% interval",
    "seconds to it",
    "final return, IQM",
    "95% interval",
    "KL per update",
    "kept",
    "runs",
)
IN_A_TERMINAL = ("arm", "reached", "steps, median", "final return, IQM", "KL per update")
"""Columns that fit 80 characters; tables.md has all."""


def table(study: Differentiable, task: str) -> list[list[str]]:
    """One line per arm, header first; a run that fell short counts with its whole budget."""
    lines = [list(HEADER)]
    for arm in study.arms:
        runs = [r for r in study.results() if r["task"] == task and r["arm"] == arm]
        if runs:
            lines.append(_line(study, arm, runs))
    return lines


def _line(study: Differentiable, arm: str, runs: list[Result]) -> list[str]:
    budget = study.budget(arm, runs[0]["task"])
    steps = summarize({arm: [r["steps"] or budget for r in runs]})[arm]
    finals = [r["final_return"] for r in runs if r["final_return"] is not None]
    final = summarize({arm: finals})[arm] if finals else None
    seconds = [r["seconds_to"] for r in runs if r["seconds_to"] is not None]
    reached = sum(r["steps"] is not None for r in runs)

    def mean(key: str) -> str:
        found = [r[key] for r in runs if r[key] is not None]
        return number(float(np.mean(found))) if found else "–"

    return [
        arm,
        f"{reached} of {len(runs)}",
        f"{'> ' if reached * 2 <= len(runs) else ''}{number(steps.median)}",
        f"{number(steps.median_low)} to {number(steps.median_high)}",
        number(float(np.median(seconds))) if seconds else "–",
        number(final.iqm) if final else "–",
        f"{number(final.iqm_low)} to {number(final.iqm_high)}" if final else "–",
        mean("kl"),
        mean("ratio_kept"),
        str(len(runs)),
    ]


def _with_and_without_kl(*epochs: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"{m} {weight} kl", f"{m} {weight}") for m in epochs for weight in WEIGHTS)


CONTRASTS: dict[str, tuple[tuple[str, str], ...]] = {
    "reuse: 5 epochs against 1 (mask, KL)": (("5 mask kl", "shac"),),
    "less reuse: 2 epochs against 5 (mask, KL)": (("2 mask kl", "5 mask kl"),),
    "more reuse: 10 epochs against 5 (mask, KL)": (("10 mask kl", "5 mask kl"),),
    "KL on against off (10 epochs, every weight)": _with_and_without_kl(10),
    "KL on against off (10 epochs, ratio alone)": (("10 ratio kl", "10 ratio"),),
    "KL on against off (10 epochs, mask)": (("10 mask kl", "10 mask"),),
    "mask against ratio alone (10 epochs, no KL)": (("10 mask", "10 ratio"),),
    "mask against ratio alone (10 epochs, KL)": (("10 mask kl", "10 ratio kl"),),
    "narrow mask against mask (10 epochs, KL)": (("10 narrow mask kl", "10 mask kl"),),
    "narrow mask against mask (10 epochs, no KL)": (("10 narrow mask", "10 mask"),),
    "RGPO gate against mask (10 epochs, KL)": (("10 gate kl", "10 mask kl"),),
    "GIPO against mask (10 epochs, KL)": (("10 gipo kl", "10 mask kl"),),
    "RGPO gate against mask (10 epochs, no KL)": (("10 gate", "10 mask"),),
    "simulator's gradient against PPO": (("5 mask kl", "ppo"),),
    "simulator's gradient against RGPO": (("5 mask kl", "rgpo"),),
}
"""What each part contributes: pairs of arms that differ in it alone."""

NEVER = 1e12
"""Steps of a run that fell short: later than any budget."""


def contrasts(
    study: Differentiable, tasks: Sequence[str]
) -> dict[str, tuple[Improvement, Improvement]]:
    """P(a run of the first arm reaches the return sooner), P(it ends higher); ties half.

    Pairs of runs of one task; tasks and pairs of arms count alike.
    """
    found = {}
    for name, pairs in CONTRASTS.items():
        strata = [[_scores(study, t, arm) for arm in pair] for t in tasks for pair in pairs]
        runs = min(len(scores) for pair in strata for scores in pair)
        if runs:
            sides = [np.stack([pair[k][:runs] for pair in strata], axis=1) for k in range(2)]
            sooner, higher = (
                probability_of_improvement(*(side[..., i] for side in sides)) for i in range(2)
            )
            found[name] = (sooner, higher)
    return found


def _scores(study: Differentiable, task: str, arm: str) -> np.ndarray:
    """Minus the steps to the return, and the final return, (runs, 2); a failed run's is lowest."""
    runs = [r for r in study.results() if (r["task"], r["arm"]) == (task, arm)]
    scores = [
        [
            -NEVER if r["steps"] is None else -r["steps"],
            -NEVER if r["final_return"] is None else r["final_return"],
        ]
        for r in runs
    ]
    return np.array(scores, dtype=np.float64).reshape(-1, 2)


def markdown(study: Differentiable, command: str) -> str:
    """Tables and contrasts as a page."""
    parts = [f"`{command}`\n"]
    for task in study.tasks:
        header, *lines = table(study, task)
        parts.append(f"### {task}, return {THRESHOLDS[task]:g}\n")
        parts += [markdown_table(header, lines) + "\n", _contrast_table(study, [task]) + "\n"]
    if len(study.tasks) > 1:
        parts += ["### All tasks\n", _contrast_table(study, study.tasks)]
    return "\n".join(parts) + "\n"


def _contrast_table(study: Differentiable, tasks: Sequence[str]) -> str:
    rows = [[name, *map(_told, pair)] for name, pair in contrasts(study, tasks).items()]
    return markdown_table(["first against second", "sooner", "ends higher"], rows)


def sentences(study: Differentiable) -> list[str]:
    """One per contrast, over all tasks."""
    found = contrasts(study, study.tasks)
    return [
        f"{name}: sooner {_told(sooner)}, ends higher {_told(higher)}"
        for name, (sooner, higher) in found.items()
    ]


def _told(found: Improvement) -> str:
    """Probability and interval, with a verdict only where the interval leaves out one half."""
    verdict = "?"
    if not found.single and (found.low > 0.5 or found.high < 0.5):
        verdict = "yes" if found.low > 0.5 else "no"
    return f"{verdict}: {found.probability:.0%} ({found.low:.0%} to {found.high:.0%})"
