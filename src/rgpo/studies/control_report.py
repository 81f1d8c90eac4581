"""What the control study says: the paper's columns beside ours, and plain sentences."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from rgpo.runs.atomic import write_atomic
from rgpo.runs.figures import colors, styled
from rgpo.runs.page import card, page
from rgpo.runs.statistics import (
    Improvement,
    Summary,
    discoveries,
    probability_of_improvement,
    rank_test,
    summarize,
)
from rgpo.runs.table import chance, number
from rgpo.settings import split_arm
from rgpo.studies.control import TARGETS, ControlStudy
from rgpo.studies.jobs import Result
from rgpo.studies.text import html_table, listed, markdown_table, percent, scored
from rgpo.studies.tuning import average, judged, matrix, scaled

BASELINE = "ppo"

PUBLISHED = {
    "Walker2d-v5": "81% above PPO's",
    "Ant-v5": "47% above PPO's",
    "HalfCheetah-v5": "about PPO's",
    "Hopper-v5": "about PPO's",
}
"""RGPO's return in the paper (arXiv 2604.14895, abstract)."""

HEADS = [
    "arm",
    "n",
    "learning rate",
    "return",
    "CV",
    "KL",
    "KL spikes",
    "to PPO",
    "P(better than PPO)",
    "p",
]

ALL = "All tasks"
"""Name of the table over all tasks, whose scores are on `tuning.scaled`'s scale."""

SCALE = (
    "Scores of this table: 0 is a task's lowest mean of any row of this page, 1 the highest. Runs "
    "are compared within a task."
)

BANDS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Edges of the classes of KL per update in `sizes`."""

TUNED = (
    "Runs of the tuning seeds, every learning rate included: median return of the variants with a "
    "mean KL per update between these (how many). The tables below have only the learning rate "
    "that was best for an arm, which leaves most updates out that were too large."
)

_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star")


@dataclass(frozen=True)
class Row:
    """One arm on one task or on all, as published or at one KL."""

    arm: str
    """With its strength where it was chosen, and the table is of one task."""

    rates: tuple[float, ...]
    """Learning rates, chosen task by task."""

    returns: Summary
    kl: float
    spikes: float
    failed: int
    ratio: float | None
    """IQM over the baseline's, where both are positive and the scores are returns."""

    better: Improvement | None
    """Than the baseline; None for itself."""

    p: float | None
    """Of the rank test that both score alike."""


Variants = dict[tuple[str, str], str]
"""For every task and arm of a comparison the variant of the arm that takes part."""


@dataclass(frozen=True)
class Findings:
    """All that is told of a study: made once, for the terminal, the docs and the page."""

    study: ControlStudy
    tables: list[tuple[str, str, list[Row]]]
    """Every table that has rows: its task, its title and the rows, the highest score first."""

    tuned: tuple[list[str], list[list[str]]]
    """Head and rows of `sizes`."""

    def sized(self) -> dict[str, list[Row]]:
        """All variants of a task's tables, of tasks with enough to speak of a correlation."""
        found: dict[str, dict[str, Row]] = {}
        for task, _, rows in self.tables:
            if task != ALL:
                found.setdefault(task, {}).update({row.arm: row for row in rows})
        return {task: list(rows.values()) for task, rows in found.items() if len(rows) > 2}


def findings(study: ControlStudy) -> Findings:
    """What the results so far say."""
    compared, results = comparisons(study), study.shown()
    tables = []
    if len(study.tasks) > 1:
        together = scaled(results)
        tables += [(ALL, title, _on_all(study, v, together)) for title, v in compared.items()]
    for task in study.tasks:
        tables += [
            (task, title, _on_task(study, v, task, results)) for title, v in compared.items()
        ]
    return Findings(study, [table for table in tables if table[-1]], sizes(study))


def comparisons(study: ControlStudy) -> dict[str, Variants]:
    """As published, then at every target all arms whose mean KL could be brought near it."""
    found = {"as published": {(task, arm): arm for task in study.tasks for arm in study.arms}}
    matched = study.matched()
    for target in TARGETS:
        found[f"at a KL of {target:g}"] = {
            (task, arm): variant for (task, kl, arm), variant in matched.items() if kl == target
        }
    return found


def _on_task(
    study: ControlStudy, variants: Variants, task: str, results: Sequence[Result]
) -> list[Row]:
    """Every arm of the comparison that has runs on this task."""
    mine = [variants[task, arm] for arm in study.arms if (task, arm) in variants]
    return _rows({variant: [_runs(results, task, variant)] for variant in mine})


def _on_all(study: ControlStudy, variants: Variants, results: Sequence[Result]) -> list[Row]:
    """Every arm of the comparison that has runs on all tasks."""
    runs = {
        arm: [_runs(results, task, variants[task, arm]) for task in study.tasks]
        for arm in study.arms
        if all((task, arm) in variants for task in study.tasks)
    }
    return [  # the zero of the scores is arbitrary: ratios of them say nothing
        replace(row, ratio=None, returns=replace(row.returns, cv=None)) for row in _rows(runs)
    ]


def step_size(rows: Sequence[Row]) -> str:
    """How the return goes with the size of the updates."""
    from scipy.stats import spearmanr

    rank = float(spearmanr([r.kl for r in rows], [r.returns.iqm for r in rows]).statistic)
    return (
        f"Rank correlation of return and mean KL per update over {len(rows)} variants: {rank:.2f}."
    )


def sizes(study: ControlStudy) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of `TUNED`: a row for every class of KL, a column for a task."""
    runs: dict[tuple[str, str, float], list[Result]] = {}
    for r in judged(study.tuned()):
        runs.setdefault((r["task"], r["arm"], r["learning_rate"]), []).append(r)
    returns: dict[tuple[str, int], list[float]] = {}
    for (task, *_), both in runs.items():
        band = bisect(BANDS, average(both, "kl"))  # none was measured where a run diverged at once
        returns.setdefault((task, band), []).append(average(both, "final_return"))

    def cell(task: str, band: int) -> str:
        found = returns.get((task, band))
        return f"{number(float(np.median(found)))} ({len(found)})" if found else "–"

    names = [f"below {BANDS[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in pairwise(BANDS)]
    names += [f"above {BANDS[-1]:g}"]
    rows = [[name, *(cell(t, band) for t in study.tasks)] for band, name in enumerate(names)]
    return ["KL per update", *study.tasks], rows


def conclusion(rows: Sequence[Row]) -> str:
    """Who is better than PPO, who is worse, who cannot be told from it."""
    compared = {row.arm: row for row in rows if row.better is not None}
    found = discoveries({arm: row.p for arm, row in compared.items() if row.p is not None})
    better = [a for a in found if compared[a].better.probability > 0.5]  # type: ignore[union-attr]
    groups = {
        "Better than PPO": better,
        "Worse": [arm for arm in found if arm not in better],
        "Not distinguishable": [arm for arm in compared if arm not in found],
    }
    parts = [f"{words}: {', '.join(arms)}." for words, arms in groups.items() if arms]
    return " ".join(parts) or "Nothing to compare."


def markdown(found: Findings, command: str) -> str:
    """The page of the docs."""
    parts = [f"Command: `{command}`\n\n## Size of the updates\n"]
    parts += [f"- {task}: {step_size(rows)}" for task, rows in found.sized().items()]
    parts += [f"\n{TUNED}\n", markdown_table(*found.tuned)]
    for task, title, rows in found.tables:
        parts.append(f"\n## {task}, {title}\n")
        if task == ALL:
            parts.append(SCALE + "\n")
        if task in PUBLISHED:
            parts.append(f"In the paper RGPO's return is {PUBLISHED[task]}.\n")
        parts += [conclusion(rows) + "\n", markdown_table(HEADS, map(_cells, rows))]
    return "\n".join(parts) + "\n"


def write(found: Findings, command: str) -> Path:
    """Write report.html beside the results and return its path."""
    body = "<header><h1>Control: as published, and at equal KL</h1></header>"
    color, symbol = colors(found.study.arms), dict(zip(found.study.arms, cycle(_SYMBOLS)))
    for index, (task, rows) in enumerate(found.sized().items()):
        read = (
            f"{step_size(rows)} A point is an arm as published (named) or at another strength; a "
            "line joins those of one arm."
        )
        body += card(
            f"{task}: size of the updates", read, _sizes(rows, color, symbol), f"size{index}"
        )
    body += f"<p>{escape(TUNED)}</p>" + html_table(*found.tuned)
    for index, (task, title, rows) in enumerate(found.tables):
        read = conclusion(rows) + " Bars: 95% bootstrap intervals of the interquartile mean."
        body += f"<h2>{escape(task)}, {escape(title)}</h2>"
        body += card("Return", read, _bars(rows, color), f"return{index}")
        body += html_table(HEADS, map(_cells, rows))
    body += f"<h2>How this was made</h2><pre>{escape(command)}</pre>"
    path = found.study.directory / "report.html"
    write_atomic(path, page("Control study", body).encode())
    return path


def _runs(results: Sequence[Result], task: str, variant: str) -> list[Result]:
    return [r for r in results if (r["task"], r["arm"]) == (task, variant)]


def _rows(runs: dict[str, list[list[Result]]]) -> list[Row]:
    """A row for every arm with runs on every task of the table."""
    runs = {arm: cells for arm, cells in runs.items() if all(cells)}
    base = next((cells for arm, cells in runs.items() if split_arm(arm)[0] == BASELINE), None)
    rows = [_row(arm, cells, base) for arm, cells in runs.items()]
    return sorted(rows, key=lambda row: -row.returns.iqm)


def _row(arm: str, cells: list[list[Result]], base: list[list[Result]] | None) -> Row:
    scores, every = matrix(cells), [result for cell in cells for result in cell]
    returns = summarize({arm: scores})[arm]
    ratio = better = p = None
    if base is not None and base is not cells:
        theirs = matrix(base)
        middle = summarize({BASELINE: theirs})[BASELINE].iqm
        ratio = returns.iqm / middle if min(middle, returns.iqm) > 0 else None
        better = probability_of_improvement(scores, theirs)
        p = rank_test(scores, theirs)
    failed = sum(r["failed"] is not None for r in every)
    rates = tuple(sorted({r["learning_rate"] for r in every}))
    kl, spikes = average(every, "kl"), average(every, "kl_spike")
    return Row(arm, rates, returns, kl, spikes, failed, ratio, better, p)


def _cells(row: Row) -> list[str]:
    runs = str(row.returns.n) + (f" ({row.failed} diverged)" if row.failed else "")
    return [
        row.arm,
        runs,
        listed(row.rates),
        scored(row.returns),
        percent(row.returns.cv if row.returns.iqm > 0 else None),
        number(row.kl),
        percent(row.spikes),
        "–" if row.ratio is None else f"{row.ratio:.2f}",
        chance(row.better),
        "–" if row.p is None else f"{row.p:.2g}",
    ]


def _sizes(rows: Sequence[Row], color: dict[str, str], symbol: dict[str, str]) -> go.Figure:
    """Return against KL per update; the published form of an arm carries its name."""
    figure = go.Figure()
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(split_arm(row.arm)[0], []).append(row)
    for arm, variants in arms.items():
        mine = sorted(variants, key=lambda row: row.kl)
        scores = [row.returns for row in mine]
        figure.add_scatter(
            x=[row.kl for row in mine],
            y=[s.iqm for s in scores],
            error_y={
                "array": [s.iqm_high - s.iqm for s in scores],
                "arrayminus": [s.iqm - s.iqm_low for s in scores],
                "thickness": 1,
            },
            text=[row.arm if row.arm == arm else "" for row in mine],
            hovertext=[row.arm for row in mine],
            name=arm,
            mode="lines+markers+text",
            marker={"size": 9, "color": color[arm], "symbol": symbol[arm]},
            line={"width": 1, "dash": "dot", "color": color[arm]},
            textposition="bottom right",
            textfont={"size": 12},
        )
    figure.update_xaxes(type="log", title_text="KL per update")
    figure.update_yaxes(title_text="return")
    return styled(figure, height=460, hovermode="closest").update_layout(showlegend=True)


def _bars(rows: Sequence[Row], color: dict[str, str]) -> go.Figure:
    figure = go.Figure()
    for row in reversed(rows):
        s = row.returns
        figure.add_scatter(
            x=[s.iqm],
            y=[row.arm],
            error_x={
                "array": [s.iqm_high - s.iqm],
                "arrayminus": [s.iqm - s.iqm_low],
                "thickness": 1.5,
            },
            mode="markers",
            marker={"size": 11, "color": color[split_arm(row.arm)[0]]},
            showlegend=False,
        )
    figure.update_xaxes(title_text="return of training episodes, last 10% of the steps")
    return styled(figure, height=120 + 34 * len(rows), hovermode="closest")
