"""Finished and unfinished runs of `rgpo rlvr` and `rgpo rlhf` side by side: `rgpo report`."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rgpo.errors import RgpoError
from rgpo.runs import figures
from rgpo.runs.atomic import write_atomic
from rgpo.runs.directory import Run
from rgpo.runs.figures import Panel
from rgpo.runs.page import card, legend, page
from rgpo.runs.table import Record
from rgpo.studies import rlhf_report
from rgpo.studies.text import html_table

Table = tuple[str, list[str], list[list[str]]]
"""Title, headings, rows."""

COLUMNS = {
    "rlvr": (("sampled", "right, sampled"), ("greedy", "right, greedy"), ("kl", "KL to the start")),
    "rlhf": (("proxy", "reward model"), ("gold", "gold"), ("kl", "KL to the start")),
}
"""What each job measures before and after RL."""

PANELS = (
    Panel("reward", "reward"),
    Panel("ratio/kl_k3", "KL(old || new) per token", log=True, combine=max),
    Panel("entropy", "entropy per token"),
    Panel("ratio/ess", "effective sample size"),
    Panel("grad_norm", "gradient norm", log=True, combine=max),
    Panel("kl", "KL to the reference, per token"),
)
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
    records = [_record(run) for run in runs]
    color = figures.colors([record.recipe for record in records])
    body = ["<header><h1>Language models</h1></header>", legend(color)]
    for i, (title, heads, rows) in enumerate(tables(paths)):
        own = [record for record in records if record.env == title]
        body += [f"<h2>{escape(title)}</h2>", html_table(heads, rows)]
        body += [f'<p class="read">{escape(READ)}</p>']
        body += [card("Training", READ_TRAINING, _curves(own, color), f"training{i}")]
    body += [f"<h2>How this was made</h2><pre>{escape(command)}</pre>", *map(_config, runs)]
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
    return [run.path.name, *told, run.status["status"]]


def _change(before: Any, after: Any) -> str:
    """Shares of right answers are numbers, all else means with their standard errors."""
    if after is None:
        return "-"
    if isinstance(after, float):
        return f"{before:.1%} → {after:.1%}"
    start = f"{before['mean']:.2f} → " if before and before["mean"] else ""
    return f"{start}{after['mean']:.2f} ± {after['se']:.2f}"


def _record(run: Run) -> Record:
    rows = [{**row, "step": row["update"]} for row in run.metrics()]
    name = re.sub(r"-seed\d+$", "", run.path.name)
    return Record(run.path, name, _title(run), run.config, run.versions, run.status, rows)


def _curves(records: Sequence[Record], color: Mapping[str, str]) -> Any:
    groups = {r.recipe: [s for s in records if s.recipe == r.recipe] for r in records}
    curves = figures.curves(groups, PANELS, color)
    return curves.update_xaxes(title_text="optimiser steps", row=2)


def _config(run: Run) -> str:
    facts = {"config": dict(run.config), "versions": dict(run.versions)}
    told = escape(json.dumps(facts, indent=1))
    return f"<details><summary>{escape(str(run.path))}</summary><pre>{told}</pre></details>"
