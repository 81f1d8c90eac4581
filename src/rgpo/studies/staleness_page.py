"""The staleness study's report: one HTML file that opens offline."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from rgpo.runs.atomic import write_atomic
from rgpo.runs.figures import colors, styled
from rgpo.runs.page import card, page
from rgpo.studies.staleness import BASELINES
from rgpo.studies.staleness_report import (
    PLACES,
    TUNED,
    Findings,
    Row,
    columns,
    place_cells,
    row_cells,
    together,
    tuning_table,
)
from rgpo.studies.text import html_table, listed

SHOWN = 6
"""The best recipes that a figure shows."""

NAMED = (
    "ppo",
    "grpo",
    "ppo-kl",
    "rgpo",
    "rgpo-gate",
    "rgpo-signed",
    "rgpo-decoupled",
    "rgpo-decoupled-signed",
)
"""Recipes that every figure shows."""


def write(found: Findings, command: str) -> Path:
    """Write report.html beside the results and return its path."""
    body = "".join(_body(found, command))
    path = found.study.directory / "report.html"
    write_atomic(path, page(f"Old data: {found.study.workload}", body).encode())
    return path


def _body(found: Findings, command: str) -> Iterator[str]:
    study = found.study
    yield f"<header><h1>How good is every recipe when its data are old? ({study.workload})</h1>"
    yield f"<p>{len(study.arms)} recipes, learning rates {listed(study.rates)} tuned on seeds that "
    yield "are not shown; intervals are 95% bootstrap intervals of the interquartile mean.</p>"
    yield "</header>"
    if found.places:
        yield f'<h2>{together(study)}</h2><section class="card">{_told(found.general)}</section>'
        yield html_table(PLACES, map(place_cells, found.places))
    for index, (task, (table, told)) in enumerate(found.tasks.items()):
        ages = list(table[0].scores)
        yield f'<h2>{escape(task)}</h2><section class="card">{_told(told)}</section>'
        read = (
            "Interquartile mean of the final score against the age of the data in updates. The "
            f"{SHOWN} best recipes and {', '.join(NAMED)}; click a name to hide it."
        )
        yield card("Score against age", read, _lines(table, ages), f"age{index}")
        baseline = BASELINES[study.workload]
        read = f"Probability that a run scores higher than one of {baseline}: fresh data, old data."
        yield card(
            f"Better than {baseline}?", read, _improvements(table, baseline), f"better{index}"
        )
        read = (
            "KL from the policy that acted to the one after the update, on the oldest data, and "
            "the score there: one point for every recipe."
        )
        yield card("Who may leave the old policy?", read, _distances(table), f"distance{index}")
        yield html_table(columns(ages), (row_cells(row, ages) for row in table))
        yield f"<h3>Tuning</h3><p>{TUNED}</p>"
        yield html_table(*tuning_table(study, task))
    yield f"<h2>How this was made</h2><pre>{escape(command)}</pre>"


def _told(sentences: Sequence[str]) -> str:
    return "".join(f"<p>{escape(s)}</p>" for s in sentences)


def _lines(table: Sequence[Row], ages: Sequence[int]) -> go.Figure:
    figure = go.Figure()
    shown = [r for place, r in enumerate(table) if place < SHOWN or r.arm in NAMED]
    color = colors([row.arm for row in shown])
    for row in shown:
        scores = [row.scores[a] for a in ages]
        figure.add_scatter(
            x=[str(a) for a in ages],
            y=[s.iqm for s in scores],
            error_y={
                "array": [s.iqm_high - s.iqm for s in scores],
                "arrayminus": [s.iqm - s.iqm_low for s in scores],
                "thickness": 1,
            },
            name=row.arm,
            line={"color": color[row.arm], "width": 2.5},
        )
    figure.update_xaxes(title_text="age of the data, updates", type="category")
    return styled(figure, height=460, hovermode="closest").update_layout(showlegend=True)


def _improvements(table: Sequence[Row], baseline: str) -> go.Figure:
    figure = go.Figure()
    for name, pick, symbol in (("fresh", "fresh", "circle"), ("old", "stale", "diamond")):
        picked = [(r.arm, getattr(r, pick).get(baseline)) for r in reversed(table)]
        compared = [(arm, against.chance) for arm, against in picked if against is not None]
        figure.add_scatter(
            x=[p.probability for _, p in compared],
            y=[arm for arm, _ in compared],
            error_x={
                "array": [p.high - p.probability for _, p in compared],
                "arrayminus": [p.probability - p.low for _, p in compared],
                "thickness": 1,
            },
            mode="markers",
            marker={"symbol": symbol},
            name=f"{name} data",
        )
    figure.add_vline(x=0.5, line={"dash": "dot", "width": 1})
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%")
    figure.update_yaxes(range=[-0.7, len(table) - 0.3])
    styled(figure, height=140 + 19 * len(table), hovermode="closest")
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02})


def _distances(table: Sequence[Row]) -> go.Figure:
    figure, oldest = go.Figure(), max(table[0].scores)
    order = sorted(table, key=lambda row: row.scores[oldest].iqm)
    named = {order[0].arm, order[-1].arm, *NAMED}
    for row in table:
        figure.add_scatter(
            x=[row.moves["kl_behavior"][oldest]],
            y=[row.scores[oldest].iqm],
            text=[row.arm if row.arm in named else ""],
            name=row.arm,
            mode="markers+text",
            marker={"color": "#D55E00" if row.arm in named else "#64748B", "size": 8},
            textposition="bottom right",
            textfont={"size": 12},
        )
    figure.update_xaxes(type="log", title_text=f"KL from behaviour, age {oldest}")
    figure.update_yaxes(title_text=f"score, age {oldest}")
    return styled(figure, height=460, hovermode="closest")
