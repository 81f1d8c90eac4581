"""The final table of a comparison: what the report shows and the command line prints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rgpo.runs.directory import Run
from rgpo.runs.statistics import Improvement, Summary, probability_of_improvement, summarize

FINAL_FRACTION = 0.1
"""The part of a run, at its end, whose episodes make the final return."""

BASELINE = "ppo"
"""The recipe that the others are compared with, where it is present."""

_Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Record:
    """A run as it was read: everything the table and the report need."""

    path: Path
    """The run directory."""
    recipe: str
    """The `label` of its configuration, else the `recipe`: runs that share it and the environment
    are repetitions of each other."""
    env: str
    """The environment id."""
    config: Mapping[str, Any]
    """config.json."""
    versions: Mapping[str, Any]
    """versions.json."""
    status: Mapping[str, Any]
    """status.json, or `unfinished`."""
    rows: list[dict[str, Any]]
    """metrics.jsonl."""


@dataclass(frozen=True)
class TableRow:
    """One recipe on one environment; None where no run recorded the metric."""

    env: str
    """The environment id."""
    recipe: str
    """The recipe."""
    runs: int
    """Runs there are."""
    finished: int
    """Runs that finished; only these count, unless there is none."""
    returns: Summary | None
    """Over the final returns of the runs that have one."""
    kl: float | None
    """KL(old || new) per update: mean over updates, then over runs."""
    kl_spike_rate: float | None
    """Part of the updates whose KL was a spike, in [0, 1]."""
    ess: float | None
    """Effective sample size as a part of the batch, in (0, 1]: mean over updates, then runs."""
    seconds: float | None
    """Wall-clock seconds of training per run."""
    improvement: Improvement | None
    """Probability that a run beats one of the baseline; None for the baseline or without one."""


def read_runs(paths: Sequence[Path]) -> list[Record]:
    """Read run directories; RgpoError that names the first which is no run or damaged."""
    return [_read_run(path) for path in paths]


def final_return(rows: _Rows) -> float | None:
    """Return the mean return of the training episodes that ended in the last 10% of the steps.

    Each row counts as often as it has `episodes`. None if no episode ended there.
    """
    last = max((row.get("step", 0) for row in rows), default=0)
    ended = [
        (row["return"], row.get("episodes", 1))
        for row in rows
        if row.get("return") is not None and row.get("step", 0) > (1 - FINAL_FRACTION) * last
    ]
    total = sum(episodes for _, episodes in ended)
    return sum(value * episodes for value, episodes in ended) / total if total else None


def final_table(paths: Sequence[Path]) -> list[TableRow]:
    """Return one row per environment and recipe, in the order in which they first appear."""
    return table_of(read_runs(paths))


def table_of(records: Sequence[Record]) -> list[TableRow]:
    """Do what `final_table` does, with runs that were already read."""
    groups = group(records)
    returns = {key: _returns(counted(runs)) for key, runs in groups.items()}
    return [
        _table_row(env, recipe, runs, returns[env, recipe], returns.get((env, BASELINE), []))
        for (env, recipe), runs in groups.items()
    ]


def group(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """Return the runs by environment and recipe."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.env, record.recipe), []).append(record)
    return groups


def counted(runs: Sequence[Record]) -> list[Record]:
    """Return the runs that finished; all of them if none did."""
    return [run for run in runs if run.status["status"] == "finished"] or list(runs)


def print_table(rows: Sequence[TableRow], console: Console) -> None:
    """Print one table per environment."""
    for env in dict.fromkeys(row.env for row in rows):
        header, *lines = cells([row for row in rows if row.env == env])
        table = Table(
            title=env, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
        )
        for index, name in enumerate(header):
            ranges = "95%" in name or "better" in name  # these may wrap in a narrow terminal
            table.add_column(
                name,
                justify="right" if index else "left",
                no_wrap=not ranges,
                min_width=10 if ranges else None,
            )
        for line in lines:
            table.add_row(*line)
        console.print(table)


def cells(rows: Sequence[TableRow]) -> list[list[str]]:
    """Return the table as text, header first; a column that nobody has is left out."""
    header = ["recipe", "return\n(IQM)", "95%\ninterval", "KL per\nupdate", "KL\nspikes", "ESS"]
    header += ["time\n(s)", "runs", f"better\nthan {BASELINE}"]
    table = [header, *(_cells(row) for row in rows)]
    used = [any(line[i] != "–" for line in table[1:]) for i in range(len(header))]
    return [[text for text, keep in zip(line, used, strict=True) if keep] for line in table]


def number(value: float | None, digits: int = 3) -> str:
    """Return `value` for a reader: significant digits, thousands apart, rarely an exponent."""
    if value is None or np.isnan(value):
        return "–"
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))}f}"


def chance(improvement: Improvement | None) -> str:
    """Return a probability and its interval for a reader."""
    if improvement is None:
        return "–"
    if improvement.single:
        return "one run"
    ends = f"{100 * improvement.low:.0f}–{improvement.high:.0%}"
    return f"{improvement.probability:.0%} ({ends})"


def _cells(row: TableRow) -> list[str]:
    returns = row.returns
    point = span = "–"
    if returns is not None:
        point = number(returns.iqm)
        span = f"{number(returns.iqm_low)} to {number(returns.iqm_high)}"
        span = "one run" if returns.single else span
    spikes = "–" if row.kl_spike_rate is None else f"{row.kl_spike_rate:.1%}"
    runs = str(row.runs) if row.finished == row.runs else f"{row.finished} of {row.runs}"
    return [
        row.recipe,
        point,
        span,
        number(row.kl),
        spikes,
        number(row.ess),
        number(row.seconds),
        runs,
        chance(row.improvement),
    ]


def _table_row(
    env: str, recipe: str, runs: Sequence[Record], own: list[float], baseline: list[float]
) -> TableRow:
    usable = counted(runs)
    compared = recipe != BASELINE and own and baseline
    return TableRow(
        env=env,
        recipe=recipe,
        runs=len(runs),
        finished=sum(run.status["status"] == "finished" for run in runs),
        returns=summarize({recipe: own})[recipe] if own else None,
        kl=_over_runs(usable, "kl", np.mean),
        kl_spike_rate=_over_runs(usable, "kl_spike", np.mean),
        ess=_over_runs(usable, "ess", np.mean),
        seconds=_over_runs(usable, "seconds", np.sum),
        improvement=probability_of_improvement(own, baseline) if compared else None,
    )


def _returns(runs: Sequence[Record]) -> list[float]:
    found = [final_return(run.rows) for run in runs]
    return [value for value in found if value is not None]


def _over_runs(
    runs: Sequence[Record], key: str, over_updates: Callable[[list[float]], Any]
) -> float | None:
    """Return the mean over runs of what `over_updates` makes of one metric of a run."""
    values = [over_updates(found) for run in runs if (found := recorded(run.rows, key))]
    return float(np.mean(values)) if values else None


def recorded(rows: _Rows, key: str) -> list[float]:
    """Return the values of one metric, without nulls."""
    return [row[key] for row in rows if row.get(key) is not None]


def _read_run(path: Path) -> Record:
    run = Run.open(path)
    config = run.config
    return Record(
        path=path,
        recipe=str(config.get("label", config.get("recipe", "?"))),
        env=str(config.get("env", "?")),
        config=config,
        versions=run.versions,
        status=run.status,
        rows=run.metrics(),
    )
