"""Finished and unfinished runs of `rgpo rlvr` and `rgpo rlhf` side by side: `rgpo report`."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rgpo.errors import RgpoError
from rgpo.runs import figures
from rgpo.runs.atomic import write_atomic
from rgpo.runs.directory import Run
from rgpo.runs.page import card, legend, page
from rgpo.studies import rlhf_report
from rgpo.studies.text import html_table

Table = tuple[str, list[str], list[list[str]]]
"""Title, headings, rows."""

COLUMNS = {
    "rlvr": (("sampled", "right, sampled"), ("greedy", "right, greedy"), ("kl", "KL to start")),
    "rlhf": (("proxy", "reward model"), ("gold", "gold"), ("kl", "KL to start")),
}
"""What each job measures before and after RL."""

READ = (
    "Measured on held-out prompts before → after RL, with ± one standard error where answers were "
    "scored one by one. KL(policy || policy before RL) is per answer, in nats."
)
READ_TRAINING = (
    "One point per update, on the training prompts. Runs whose names differ in the seed alone "
    "share a colour: thin lines are the runs, the thick line is their IQM, the shade its 95% "
    "bootstrap interval."
)


def is_language(path: Path) -> bool:
    """Whether this is a run of `rgpo rlvr` or `rgpo rlhf`."""
    return (path / "config.json").exists() and "job" in Run.open(path).config


def tables(paths: Sequence[Path]) -> list[Table]:
    """One table per job and task or model, a row per run."""
    runs = sorted((Run.open(path) for path in paths), key=lambda r: (_title(r), str(r.path)))
    return [
        (title, ["run", *(name for _, name in COLUMNS[title.split()[0]]), "status"],
         [_row(run) for run in own])
        for title, own in groupby(runs, key=_title)
    ]  # fmt: skip


def write(paths: Sequence[Path], output: Path, command: str) -> Path:
    """The page of these runs: of one finished `rgpo rlhf` its own, else a comparison."""
    runs = [Run.open(path) for path in paths]
    output.parent.mkdir(parents=True, exist_ok=True)
    if len(runs) == 1 and runs[0].config["job"] == "rlhf" and runs[0].status.get("result"):
        return rlhf_report.write(paths[0], output)
    records = [(_title(run), rlhf_report.record(run)) for run in runs]
    color = figures.colors([record.recipe for _, record in records])
    body = ["<header><h1>Language models</h1></header>", legend(color)]
    for i, (title, heads, rows) in enumerate(tables(paths)):
        own = [record for where, record in records if where == title]
        body += [f"<h2>{escape(title)}</h2>", html_table(heads, rows)]
        body += [f'<p class="read">{escape(READ)}</p>']
        body += [card("Training", READ_TRAINING, rlhf_report.curves(own, color), f"training{i}")]
    body += [
        f"<h2>How this was made</h2><pre>{escape(command)}</pre>",
        *(rlhf_report.settings(run, str(run.path)) for run in runs),
    ]
    write_atomic(output, page("Language models", "".join(body)).encode())
    return output


def only_language(paths: Sequence[Path]) -> bool:
    """Whether all of these are language runs; RgpoError where some are and some are not."""
    found = [is_language(path) for path in paths]
    if any(found) and not all(found):
        raise RgpoError(
            f"{paths[found.index(True)]} trained a language model and "
            f"{paths[found.index(False)]} did not: report on them apart"
        )
    return all(found)


def _title(run: Run) -> str:
    job = run.config["job"]
    return f"{job} {Path(run.config['task' if job == 'rlvr' else 'model']).name}"


def _row(run: Run) -> list[str]:
    result = run.status.get("result") or {}
    before, after = result.get("before", {}), result.get("after", {})
    told = [_change(before.get(key), after.get(key)) for key, _ in COLUMNS[run.config["job"]]]
    return [run.path.resolve().name, *told, run.status["status"]]


def _change(before: Any, after: Any) -> str:
    """Shares of right answers are numbers, all else means with their standard errors."""
    if after is None:
        return "-"
    if isinstance(after, float):
        return f"{before:.1%} → {after:.1%}"
    start = f"{before['mean']:.2f} → " if before and before["mean"] else ""
    return f"{start}{after['mean']:.2f} ± {after['se']:.2f}"
