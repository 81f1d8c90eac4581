"""`rgpo study NAME`: what a person types, sees before it starts, and while it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console

from rgpo.studies import staleness as stale
from rgpo.studies import staleness_report
from rgpo.studies.jobs import Result, Watch
from rgpo.studies.progress import StudyProgress

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
    console.print(
        f"{len(study.arms)} recipes on {', '.join(study.tasks)}: {planned['tune']} runs to tune "
        f"learning rates, about {planned['report']} to report; about "
        f"{_duration(study.seconds(workers))} from here on. Ctrl-C stops it, the same command "
        "continues it."
    )
    _run(study.run, workers)
    return _tell(study)


def _workload(name: str) -> Callable[..., stale.Study]:
    if name == "control":
        return stale.control
    from rgpo.studies.language_cells import language

    return language


def _run(run: Callable[[Callable[[str], Watch], int | None], None], workers: int | None) -> None:
    """Run all phases with a bar for each."""
    open_bars: list[StudyProgress] = []

    def watch(phase: str) -> Watch:
        for bar in open_bars:
            bar.__exit__(None, None, None)
        bar = StudyProgress(console, phase)
        open_bars[:] = [bar.__enter__()]

        def tell(done: int, total: int, results: list[Result]) -> None:
            bar(done, total, results)

        return tell

    try:
        run(watch, workers)
    finally:
        for bar in open_bars:
            bar.__exit__(None, None, None)


def _tell(study: stale.Study) -> int:
    command = f"rgpo study staleness --workload {study.workload}"
    for task in study.tasks:
        for sentence in staleness_report.conclusion(staleness_report.rows(study, task), task):
            console.print(sentence)
    text = study.directory / "tables.md"
    text.write_text(staleness_report.markdown(study, command))
    console.print(f"tables: {text}\nreport: {staleness_report.write(study, command).resolve()}")
    return 0


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


STUDIES = {"staleness": staleness}
"""Every study by the name it has on the command line."""
