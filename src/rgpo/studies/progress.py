"""What a person sees while runs train."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy.stats import trim_mean

from rgpo.control.train import Rows

RECENT = 10
"""Updates of every run over which the shown return, KL and spikes are averaged."""

HIGHEST = 12
"""Rows of a study's live table."""


class _Display:
    """A live progress bar; on a console that is no terminal, a line now and then."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task(title, total=1.0, note="starting")
        self.started = time.perf_counter()
        self.first_shown: tuple[float, float] | None = None  # when, and how much was done
        self.live = Live(self.bar, console=console, refresh_per_second=4, transient=False)
        self.said = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        else:
            self.console.print(f"{self.title}: starting")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def show(self, fraction: float, note: str, below: Table | None = None) -> None:
        """Move the bar to `fraction`; a console that is no terminal gets a line per tenth."""
        self.bar.update(self.task, completed=fraction, note=note)
        if self.console.is_terminal:
            self.live.update(self.bar if below is None else Group(self.bar, below))
        elif fraction >= self.said + 0.1 or fraction >= 1:
            self.said = fraction
            seconds = time.perf_counter() - self.started
            told = f"{fraction:4.0%}  {_clock(seconds)}{self._left(fraction)}  {note}"
            self.console.print(told, highlight=False, soft_wrap=True)
        if self.first_shown is None:
            self.first_shown = time.perf_counter(), fraction

    def _left(self, fraction: float) -> str:
        """Time left at the speed since the first update, which alone pays for what is made once."""
        when, done = self.first_shown or (0.0, 1.0)
        if not done < fraction < 1:
            return ""
        left = (time.perf_counter() - when) * (1 - fraction) / (fraction - done)
        return f", {_clock(left)} left"

    def skip(self, fraction: float) -> None:
        """Leave a part that was done before out of the speed that tells the time left."""
        if self.first_shown is not None:
            when, done = self.first_shown
            self.first_shown = when, done + fraction

    def speed(self, steps: float) -> str:
        """Environment steps per second since the start."""
        return f"{steps / max(time.perf_counter() - self.started, 1e-9):,.0f} steps/s"


class RunProgress(_Display):
    """Progress of one run; a `session.Progress`."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, title)
        self.first_step: float | None = None
        self.history: list[dict[str, float | None]] = []

    def __call__(self, update: int, total: int, rows: Rows) -> None:
        """Take in one update."""
        row = rows[0]
        self.history = [*self.history, row][-RECENT:]
        step = float(row["step"] or 0)
        if self.first_step is None:
            self.first_step = step * (1 - 1 / update)
        note = (
            f"step {step:,.0f}  return {_recent(self.history, 'return')}  "
            f"KL {_recent(self.history, 'kl', '.4f')}  {self.speed(step - self.first_step)}"
        )
        self.show(update / total, note)


class ComparisonProgress(_Display):
    """Progress of a comparison with a live table of its arms; a `compare.Watch`."""

    def __init__(
        self, console: Console, labels: Sequence[Sequence[str]], updates: int, batch: int
    ) -> None:
        arms = list(dict.fromkeys(label for group in labels for label in group))
        runs = sum(len(group) for group in labels)
        super().__init__(console, f"{len(arms)} recipes, {runs} runs")
        self.labels, self.updates, self.batch, self.arms = labels, updates, batch, arms
        self.done = [0] * len(labels)
        self.first: list[int | None] = [None] * len(labels)
        self.history: dict[tuple[int, int], list[dict[str, float | None]]] = {}

    def __call__(self, group: int, update: int, _: int, rows: Rows) -> None:
        """Take in one update of one group."""
        sizes = [len(labels) for labels in self.labels]
        self.done[group] = update
        if self.first[group] is None:
            self.first[group] = update - 1
            self.skip(update / self.updates * sizes[group] / sum(sizes))
        for i, row in enumerate(rows):
            self.history[group, i] = [*self.history.get((group, i), []), row][-RECENT:]
        fraction = float(np.average(self.done, weights=sizes)) / self.updates
        fresh = [d - (f or 0) for d, f in zip(self.done, self.first, strict=True)]
        steps = self.batch * sum(f * s for f, s in zip(fresh, sizes, strict=True))
        table = self._table()
        note = self.speed(steps)
        if not self.console.is_terminal:
            note += "  " + "  ".join(f"{a} {self._arm(a)[0]}" for a in self.arms)
        self.show(fraction, note, table)

    def _arm(self, arm: str) -> tuple[str, str, str]:
        """Interquartile mean of the runs' returns, means of KL and spikes."""
        runs = [h for (group, i), h in self.history.items() if self.labels[group][i] == arm]
        rows = [row for history in runs for row in history]
        returns = [_mean(history, "return") for history in runs]
        known = [one for one in returns if one is not None]
        return (
            f"{trim_mean(known, 0.25):.1f}" if known else "-",
            _recent(rows, "kl", ".4f"),
            _recent(rows, "kl_spike", ".0%"),
        )

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2))
        table.add_column("recipe")
        for heading in (f"return (IQM), last {RECENT} updates", "KL", "KL spikes"):
            table.add_column(heading, justify="right")
        for arm in self.arms:
            table.add_row(arm, *self._arm(arm))
        return table


class StudyProgress(_Display):
    """Progress of one phase of a study with a live table; a `jobs.Watch`.

    `lengths` are the environment steps of a run by task, where that is what runs are made of.
    """

    def __init__(
        self, console: Console, title: str, lengths: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(console, title)
        self.lengths, self.steps = lengths, 0
        self.scores: dict[str, dict[str, list[float]]] = {}

    def __call__(self, done: int, total: int, results: list[dict[str, Any]]) -> None:
        """Take in one job."""
        for result in results:
            scores = self.scores.setdefault(result["task"], {}).setdefault(_variant(result), [])
            if result["final_return"] is not None and not result.get("failed"):
                scores.append(result["final_return"])
            self.steps += (self.lengths or {}).get(result["task"], 0)
        newest = results[-1]
        score = newest["final_return"]
        told = "-" if score is None else f"{score:.4g}"
        speed = f"  {self.speed(self.steps)}" if self.lengths else ""
        note = f"{done} of {total} runs{speed}  newest: {_variant(newest)}: {told}"
        self.show(done / total, note, self._table(newest["task"]))

    def _table(self, task: str) -> Table:
        """The highest of this phase on one task; runs that diverged are not among them."""
        known = {variant: x for variant, x in self.scores[task].items() if x}
        iqm = {variant: float(trim_mean(x, 0.25)) for variant, x in known.items()}
        table = Table(box=None, padding=(0, 2))
        table.add_column(f"{task}, highest {HIGHEST}" if len(iqm) > HIGHEST else task)
        table.add_column("runs", justify="right")
        table.add_column("score (IQM)", justify="right")
        for variant in sorted(iqm, key=iqm.__getitem__, reverse=True)[:HIGHEST]:
            table.add_row(variant, str(len(known[variant])), f"{iqm[variant]:.4g}")
        return table


class StageProgress:
    """A bar for each stage of a job, one after the other; `tell` is a `stages.Watch`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage = ""
        self.bar: _Display | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def tell(self, stage: str, fraction: float, note: str) -> None:
        """Move the bar of a stage; a new stage opens a new one."""
        if stage != self.stage:
            self._close()
            self.stage, self.bar = stage, _Display(self.console, stage).__enter__()
        if self.bar is not None:
            self.bar.show(fraction, note)
        if fraction >= 1:
            self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None


def _variant(result: dict[str, Any]) -> str:
    """What runs with other seeds have in common: arm, age of the data, learning rate."""
    age = f", age {result['staleness']}" if result["staleness"] else ""
    return f"{result['arm']}{age}, rate {result['learning_rate']:g}"


def _clock(seconds: float) -> str:
    """As the bar of a terminal has it: 0:01:23."""
    return str(timedelta(seconds=round(seconds)))


def _recent(rows: Sequence[dict[str, float | None]], key: str, style: str = ".1f") -> str:
    mean = _mean(rows, key)
    return "-" if mean is None else format(mean, style)


def _mean(rows: Sequence[dict[str, float | None]], key: str) -> float | None:
    numbers = [number for row in rows if (number := row.get(key)) is not None]
    return float(np.mean(numbers)) if numbers else None
