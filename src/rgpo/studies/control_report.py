"""What the control study says: the paper's columns beside ours, and plain sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from rgpo.runs.atomic import write_atomic
from rgpo.runs.figures import colors, styled
from rgpo.runs.page import card, page
from rgpo.runs.statistics import Improvement, Summary, probability_of_improvement, summarize
from rgpo.runs.table import chance, number
from rgpo.studies.control import TARGETS, ControlStudy
from rgpo.studies.jobs import Result
from rgpo.studies.text import html_table, markdown_table, percent, scored
from rgpo.studies.tuning import score

BASELINE = "ppo"

PUBLISHED = {"Walker2d-v5": "+81%", "Ant-v5": "+47%", "HalfCheetah-v5": "~", "Hopper-v5": "~"}
"""RGPO's return against PPO's in the paper (arXiv 2604.14895, abstract; ~: about equal)."""

HEADS = ["arm", "n", "return", "CV", "KL", "KL spikes", "to PPO", "P(better than PPO)"]


@dataclass(frozen=True)
class Row:
    """One arm on one task, as published or at one KL."""

    arm: str
    """With its strength where it was chosen."""

    returns: Summary
    kl: float
    spikes: float
    failed: int
    ratio: float | None
    """IQM over the baseline's, where that is positive."""

    better: Improvement | None


def published(study: ControlStudy, task: str) -> list[Row]:
    """Every arm with its paper's hyper-parameters."""
    return _rows({arm: study.results(task, arm) for arm in study.arms})


def at_kl(study: ControlStudy, task: str, target: float) -> list[Row]:
    """Every arm whose mean KL could be brought near `target`."""
    variants = {
        arm: variant
        for (where, kl, arm), variant in study.matched().items()
        if (where, kl) == (task, target)
    }
    return _rows({variant: study.results(task, variant) for variant in variants.values()})


def conclusion(rows: Sequence[Row], what: str) -> str:
    """One sentence: who is better than PPO, who is worse, who cannot be told from it."""
    compared = [row for row in rows if row.better is not None]
    better = [row.arm for row in compared if row.better.low > 0.5]  # type: ignore[union-attr]
    worse = [row.arm for row in compared if row.better.high < 0.5]  # type: ignore[union-attr]
    rest = [row.arm for row in compared if row.arm not in better + worse]
    parts = [
        f"{words}: {', '.join(arms)}"
        for words, arms in (
            ("better than PPO", better),
            ("worse", worse),
            ("not distinguishable", rest),
        )
        if arms
    ]
    return f"{what}: " + ("; ".join(parts) or "nothing to compare") + "."


def tables(study: ControlStudy) -> Iterator[tuple[str, str, list[Row]]]:
    """Every table that has rows: its task, its title and the rows."""
    for task in study.tasks:
        kinds = [("as published", published(study, task))]
        kinds += [(f"at a KL of {target:g}", at_kl(study, task, target)) for target in TARGETS]
        yield from ((task, title, rows) for title, rows in kinds if rows)


def markdown(study: ControlStudy, command: str) -> str:
    """The page of the docs."""
    parts = [f"Command: `{command}`\n"]
    for task, title, rows in tables(study):
        parts.append(f"\n## {task}, {title}\n")
        if task in PUBLISHED:
            parts.append(f"In the paper RGPO's return is {PUBLISHED[task]} against PPO's.\n")
        parts += [conclusion(rows, title) + "\n", markdown_table(HEADS, map(_cells, rows))]
    return "\n".join(parts) + "\n"


def write(study: ControlStudy, command: str) -> Path:
    """Write report.html beside the results and return its path."""
    body = "<header><h1>Control: as published, and at equal KL</h1></header>"
    for index, (task, title, rows) in enumerate(tables(study)):
        read = conclusion(rows, title) + " Bars: 95% bootstrap intervals of the interquartile mean."
        body += f"<h2>{escape(task)}, {escape(title)}</h2>"
        body += card("Return", read, _bars(rows), f"return{index}")
        body += html_table(HEADS, map(_cells, rows))
    body += f"<h2>How this was made</h2><pre>{escape(command)}</pre>"
    path = study.directory / "report.html"
    write_atomic(path, page("Control study", body).encode())
    return path


def _rows(runs: dict[str, list[Result]]) -> list[Row]:
    runs = {arm: results for arm, results in runs.items() if results}
    base = next((r for arm, r in runs.items() if arm.partition(":")[0] == BASELINE), None)
    rows = [_row(arm, results, base) for arm, results in runs.items()]
    return sorted(rows, key=lambda row: -row.returns.iqm)


def _row(arm: str, results: list[Result], base: list[Result] | None) -> Row:
    scores = [score(r) for r in results]
    returns = summarize({arm: scores})[arm]
    ratio = better = None
    if base is not None and base is not results:
        theirs = [score(r) for r in base]
        middle = summarize({BASELINE: theirs})[BASELINE].iqm
        ratio = returns.iqm / middle if middle > 0 else None
        better = probability_of_improvement(scores, theirs)
    return Row(
        arm,
        returns,
        _mean(results, "kl"),
        _mean(results, "kl_spike"),
        sum(r["failed"] is not None for r in results),
        ratio,
        better,
    )


def _cells(row: Row) -> list[str]:
    runs = str(row.returns.n) + (f" ({row.failed} diverged)" if row.failed else "")
    return [
        row.arm,
        runs,
        scored(row.returns),
        percent(row.returns.cv),
        number(row.kl),
        percent(row.spikes),
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        chance(row.better),
    ]


def _bars(rows: Sequence[Row]) -> go.Figure:
    figure = go.Figure()
    color = colors([row.arm for row in rows])
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
            marker={"size": 11, "color": color[row.arm]},
            showlegend=False,
        )
    figure.update_xaxes(title_text="return of training episodes, last 10% of the steps")
    return styled(figure, height=120 + 34 * len(rows), hovermode="closest")


def _mean(results: Sequence[Result], key: str) -> float:
    values = [r[key] for r in results if r[key] is not None]
    return float(np.mean(values)) if values else float("nan")
