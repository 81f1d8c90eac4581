"""`rgpo study NAME`: what a person types, sees before it starts, and while it runs."""

import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from rgpo.studies import control as control_study
from rgpo.studies import control_report, staleness_page, staleness_report
from rgpo.studies import differentiable as pathwise
from rgpo.studies import staleness as stale
from rgpo.studies.jobs import Watch
from rgpo.studies.progress import StageProgress, StudyProgress

console = Console()


def staleness(
    workload: Literal["control", "language"] = "control",
    recipes: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    steps: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
) -> int:
    """Return against the age of the data, for every recipe; the same command continues it.

    Args:
        workload: control (MuJoCo and a discrete task) or language (a small transformer).
        recipes: Only these; default: all that the workload can train.
        tasks: Other tasks of the control workload.
        steps: Environment steps (control) or updates (language) of a run.
        out: Directory of results.jsonl and report.html; default: runs/staleness-WORKLOAD.
        workers: Processes; default: one per core.
    """
    directory = out or Path("runs") / f"staleness-{workload}"
    study = _workload(workload)(directory, tasks=tasks, arms=recipes, steps=steps)
    planned = study.planned()
    _announce(
        f"{len(study.arms)} recipes on {', '.join(study.tasks)}: {planned['tune']} runs to tune "
        f"learning rates, about {planned['report']} to report",
        study.seconds(workers),
    )
    _run(study.run, workers, study.trains.lengths if workload == "control" else None)
    return _tell(study)


def differentiable(
    tasks: tuple[str, ...] = tuple(pathwise.THRESHOLDS),
    arms: tuple[str, ...] = tuple(pathwise.arms()),
    seeds: int = 10,
    steps: int | None = None,
    out: Path = Path("runs/differentiable"),
    workers: int = 2,
) -> int:
    """What reuse, ratio weight and KL contribute through a simulator's gradient; resumable.

    Args:
        tasks: Differentiable tasks.
        arms: Only these, such as "5 mask kl", shac, ppo.
        seeds: Runs of each arm on each task.
        steps: Environment steps of a run; default: by task, 30,000 to 80,000. PPO and RGPO get
            three times as many.
        out: Directory of results.jsonl, tables.md and the runs.
        workers: Processes.
    """
    study = pathwise.Differentiable(out, tasks, arms, seeds, steps)
    todo = len(study.todo())
    _announce(
        f"{len(arms)} arms x {seeds} seeds on {', '.join(tasks)}: {todo} runs to go",
        study.seconds(workers),
    )
    if todo:
        with StudyProgress(console, "differentiable") as bar:
            study.run(bar, workers)
    for task in tasks:
        header, *lines = pathwise.table(study, task)
        kept = [header.index(name) for name in pathwise.IN_A_TERMINAL]
        shown = Table(title=f"{task}, return {pathwise.THRESHOLDS[task]:g}", title_justify="left")
        for i in kept:
            shown.add_column(header[i], no_wrap=i == 0)
        for line in lines:
            shown.add_row(*(line[i] for i in kept))
        console.print(shown)
    for sentence in pathwise.sentences(study):
        console.print(sentence)
    text = out / "tables.md"
    text.write_text(pathwise.markdown(study, _typed()))
    console.print(f"tables: {text}   (`rgpo report {out / 'runs'}` draws the runs)")
    return 0


def control(
    tasks: tuple[str, ...] = (),
    recipes: tuple[str, ...] = (),
    seeds: int = 10,
    steps: int | None = None,
    out: Path = Path("runs/control"),
    workers: int | None = None,
) -> int:
    """The paper's control table, as published and at equal KL; the same command continues it.

    Args:
        tasks: Gymnasium ids; default: HalfCheetah, Hopper, Walker2d and Ant, v5.
        recipes: Only these arms; default: all of the table.
        seeds: Runs of each arm that are reported.
        steps: Environment steps of a run; default: 100,000, for Ant 50,000.
        out: Directory of results.jsonl and report.html.
        workers: Processes; default: one per core.
    """
    study = control_study.control(out, tasks=tasks, arms=recipes, seeds=seeds, steps=steps)
    _announce(
        f"{len(study.arms)} arms on {', '.join(study.tasks)}: at most "
        f"{sum(study.planned().values()):,} runs to go",
        study.seconds(workers),
    )
    _run(study.run, workers, study.trains.lengths)
    found, command = control_report.findings(study), _typed()
    for task, title, rows in found.tables:
        console.print(f"{task}, {title}. {control_report.conclusion(rows)}")
    text = control_report.markdown(found, command)
    return _written(out, text, control_report.write(found, command))


def rlhf(
    arms: tuple[str, ...] = (),
    seeds: int = 5,
    updates: int = 24,
    out: Path = Path("runs/rlhf-study"),
    workers: int | None = None,
) -> int:
    """Reward against KL to the reference: dual gates, single gate, PPO-RLHF, GRPO, KL only.

    Args:
        arms: Only these; default: all.
        seeds: Runs of each arm that are reported.
        updates: Generated batches of a run, 64 answers each.
        out: Directory of base, results.jsonl, tables.md and report.html.
        workers: Processes; default: one per core.
    """
    from rgpo.language.stages import hush
    from rgpo.studies import rlhf_study, rlhf_study_report

    study = rlhf_study.study(out, arms=arms, seeds=seeds, updates=updates)
    planned = study.planned()
    _announce(
        f"{len(study.arms)} arms: {planned['tune']} runs to tune them, "
        f"{planned['report']} to report",
        study.seconds(workers),
    )
    hush()
    with StageProgress(console) as progress:
        trains = study.trains(progress.tell)
    _run(partial(study.run, trains), workers)
    command, report = _typed(), rlhf_study_report.Report.of(study)
    for sentence in report.sentences:
        console.print(sentence)
    return _written(out, report.markdown(command), report.write(command))


def _announce(what: str, seconds: float) -> None:
    """What is going to be done, before it starts."""
    console.print(
        f"{what}; about {_duration(seconds)} on idle cores. Ctrl-C stops it, the same command "
        "continues it."
    )


def _workload(name: str) -> Callable[..., stale.Study]:
    if name == "control":
        return stale.control
    from rgpo.studies.language_cells import language

    return language


def _run(
    run: Callable[[Callable[[str], Watch], int | None], None],
    workers: int | None,
    lengths: Mapping[str, int] | None = None,
) -> None:
    """Run all phases with a bar for each; `lengths` are those of runs made of environment steps."""
    open_bars: list[StudyProgress] = []

    def watch(phase: str) -> Watch:
        for bar in open_bars:
            bar.__exit__(None, None, None)
        bar = StudyProgress(console, phase, lengths)
        open_bars[:] = [bar.__enter__()]
        return bar

    try:
        run(watch, workers)
    finally:
        for bar in open_bars:
            bar.__exit__(None, None, None)


def _tell(study: stale.Study) -> int:
    found, command = staleness_report.findings(study), _typed()
    for _, sentences in found.tasks.values():
        for sentence in sentences:
            console.print(sentence)
    text = staleness_report.markdown(found, command)
    return _written(study.directory, text, staleness_page.write(found, command))


def _typed() -> str:
    """The command as it was given, for the reports."""
    return shlex.join(["rgpo", *sys.argv[1:]])


def _written(directory: Path, markdown: str, report: Path) -> int:
    """Write the tables beside the report and say where both are."""
    text = directory / "tables.md"
    text.write_text(markdown)
    console.print(f"tables: {text}\nreport: {report.resolve()}")
    return 0


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


STUDIES = {
    "staleness": staleness,
    "control": control,
    "differentiable": differentiable,
    "rlhf": rlhf,
}
"""Every study by the name it has on the command line."""
