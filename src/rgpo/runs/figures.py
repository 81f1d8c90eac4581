"""The figures of the report, as plotly figures.

One recipe has one colour everywhere. Traces carry their recipe in `meta`, and no figure has a
legend of recipes: the page has one, which shows and hides a recipe in all figures.
"""

import colorsys
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from rgpo.core.diagnostics import KL_SPIKE
from rgpo.runs.statistics import interval
from rgpo.runs.table import Record, counted, recorded

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#6B7280")
_GREYS = ("#1E293B", "#64748B", "#A8B3C4", "#E2E8F0")
_INK, _GRID = "#334155", "#E8EDF3"

Groups = Mapping[str, Sequence[Record]]
"""The runs of one environment, by recipe."""


@dataclass(frozen=True)
class ObjectiveCurve:
    """Value g and weight w = r g'(r) of one objective over the ratio; all lists of one length."""

    ratio: list[float]
    """Importance ratios."""
    value_pos: list[float]
    """g for a positive advantage."""
    weight_pos: list[float]
    """w for a positive advantage."""
    value_neg: list[float]
    """g for a negative advantage."""
    weight_neg: list[float]
    """w for a negative advantage."""


@dataclass(frozen=True)
class Panel:
    """One metric against environment steps."""

    key: str
    """Its name in metrics.jsonl."""
    title: str
    """What the reader is told it is."""
    log: bool = False
    """Whether the axis is logarithmic; values that are not positive are then left out."""
    combine: Callable[[list[float]], float] = field(default=np.mean)
    """How several updates become one point of a long run: the worst must not be averaged away."""
    shown: tuple[float, float] | None = None
    """The part of the axis that says something; zooming out shows the rest."""


RETURN = (Panel("return", "return of training episodes"),)
KL = (Panel("kl", "KL(old || new) per update", log=True, combine=max),)
RATIOS = (
    Panel("ratio_q001", "0.1% quantile of the ratio", log=True, combine=min),
    Panel("ratio_q50", "median ratio", log=True),
    Panel("ratio_q999", "99.9% quantile of the ratio", log=True, combine=max),
)
TRUST = (
    Panel("ess", "effective sample size"),
    Panel("active_clip_fraction", "active clip fraction"),
    Panel("gate_acceptance", "gate acceptance"),
)
LEARNING = (
    Panel("entropy", "entropy"),
    Panel("explained_variance", "explained variance", shown=(-1, 1)),
    Panel("gradient_norm", "gradient norm", log=True, combine=max),
)
CERTIFICATE = (
    Panel("certificate", "certificate"),
    Panel("certificate_surrogate", "gain that the surrogate promises"),
    Panel("certificate_gate", "what the gate gives up"),
    Panel("certificate_shift", "shift of the states", log=True, combine=max),
    Panel("certificate_interval", "confidence interval", log=True, combine=max),
    Panel("accepted_step", "share of the step that was kept", combine=min, shown=(0, 1)),
)
PATHWISE = (
    Panel("ratio_kept", "share of samples kept"),
    Panel("action_gradient_norm", "mean |G|", log=True, combine=max),
    Panel("nonfinite_environments", "environments left out", combine=max),
    Panel("variance_pathwise", "variance, pathwise", log=True),
    Panel("variance_score", "variance, score function", log=True),
)
_COLUMNS = 3
_SECONDS = {
    "seconds_act": "acting",
    "seconds_step": "stepping",
    "seconds_learn": "learning",
    "seconds_rollout": "rollout",
    "seconds_backward": "back-propagation",
    "seconds_actor": "policy epochs",
    "seconds_critic": "critics",
}


def colors(names: Sequence[str]) -> dict[str, str]:
    """Return one colour per name; the first eight are distinct for colour-blind readers."""
    return {name: _color(index) for index, name in enumerate(dict.fromkeys(names))}


def curves(groups: Groups, panels: Sequence[Panel], color: Mapping[str, str]) -> go.Figure:
    """Draw each metric against steps: runs thin, their IQM thick, its interval shaded.

    Long runs are binned, to 300 points in a wide panel and to 100 in one of several.
    """
    titles = [panel.title for panel in panels]
    rows, columns = -(-len(panels) // _COLUMNS), min(len(panels), _COLUMNS)
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.07, vertical_spacing=0.15
    )
    points = 300 if len(panels) == 1 else 100
    for index, panel in enumerate(panels):
        row, column = index // _COLUMNS + 1, index % _COLUMNS + 1
        traces = [
            trace
            for recipe, runs in groups.items()
            for trace in _recipe_traces(recipe, runs, panel, color[recipe], points)
        ]
        figure.add_traces(traces, rows=row, cols=column)
        if panel.log:
            figure.update_yaxes(**_log_axis([trace.y for trace in traces]), row=row, col=column)
        if panel.shown is not None:
            low, high = panel.shown
            margin = 0.05 * (high - low)
            figure.update_yaxes(range=[low - margin, high + margin], row=row, col=column)
        if not traces:
            figure.add_trace(go.Scatter(x=[None], y=[None]), row, column)  # else there are no axes
            _say_empty(figure, index + 1)
    figure.update_xaxes(title_text="environment steps", row=rows)
    return styled(figure, height=420 if len(panels) == 1 else 330 * rows)


def kl(groups: Groups, color: Mapping[str, str]) -> go.Figure:
    """Draw KL per update with the line above which it is a spike."""
    figure = curves(groups, KL, color)
    figure.add_hline(y=KL_SPIKE, line={"dash": "dash", "width": 1.5, "color": _INK})
    figure.add_annotation(
        text=f"spikes above<br>{KL_SPIKE}",
        x=1.01,
        xref="x domain",
        xanchor="left",
        align="left",
        y=math.log10(KL_SPIKE),
        showarrow=False,
    )
    return figure.update_layout(margin={"r": 100})


def seconds(groups: Groups) -> go.Figure:
    """Draw the mean seconds per run of each recipe as stacked bars, of the runs in the table."""
    names = list(groups)
    used = [counted(runs) for runs in groups.values()]
    bars = {title: [_mean_total(runs, key) for runs in used] for key, title in _SECONDS.items()}
    bars = {title: values for title, values in bars.items() if any(values)}
    total = [_mean_total(runs, "seconds") for runs in used]
    parted = [sum(column) for column in zip(*bars.values(), strict=True)] or [0.0] * len(names)
    bars["the rest"] = [max(0.0, a - b) for a, b in zip(total, parted, strict=True)]
    figure = go.Figure(
        [
            go.Bar(
                name=title,
                y=names,
                x=values,
                orientation="h",
                marker={"color": grey},
                hovertemplate="%{x:.1f} s",
            )
            for (title, values), grey in zip(bars.items(), itertools.cycle(_GREYS), strict=False)
        ]
    )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text="seconds per run")
    figure.update_yaxes(autorange="reversed", automargin=True)
    drawn = styled(figure, height=150 + 45 * len(names), hovermode="y unified")
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}
    return drawn.update_layout(showlegend=True, legend=legend)


def objectives(drawn: Mapping[str, ObjectiveCurve], color: Mapping[str, str]) -> go.Figure:
    """Draw g (above) and w (below) against the ratio, for positive and negative advantage."""
    titles = [f"{what}, {sign}" for what in ("value g", "weight w") for sign in ("A > 0", "A < 0")]
    figure = make_subplots(
        rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.07, vertical_spacing=0.14
    )
    for name, curve in drawn.items():
        lines = (curve.value_pos, curve.value_neg, curve.weight_pos, curve.weight_neg)
        for index, line in enumerate(lines):
            trace = go.Scatter(
                x=curve.ratio,
                y=line,
                name=name,
                meta=name,
                line={"color": color[name], "width": 2},
                hovertemplate="%{y:.3~r}",
            )
            figure.add_trace(trace, row=index // 2 + 1, col=index % 2 + 1)
    for index in range(4):  # a quadratic penalty would flatten all others; zooming out shows it
        line = [y for trace in figure.data[index::4] for y in trace.y]
        low, high = max(min(line, default=0), -3.2), min(max(line, default=1), 3.2)
        margin = 0.05 * (high - low)
        span = [low - margin, high + margin]
        figure.update_yaxes(range=span, row=index // 2 + 1, col=index % 2 + 1)
    figure.add_vline(x=1, line={"dash": "dot", "width": 1, "color": _INK})
    figure.update_xaxes(title_text="ratio r", row=2)
    return styled(figure, height=620)


def align(
    runs: Sequence[Record],
    key: str,
    combine: Callable[[list[float]], float] = np.mean,
    points: int = 300,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps, shape (P,), and one metric of each run there, shape (R, P).

    Up to `points` different steps are taken as they are, more are binned by `combine`. Gaps inside
    a run are interpolated (an update in which no episode ended has no return); before its first
    and after its last value a run is NaN.
    """
    steps = np.unique([row["step"] for run in runs for row in run.rows if "step" in row])
    if len(steps) > points:
        steps = np.linspace(0, steps[-1], points + 1)[1:]
    matrix = np.full((len(runs), len(steps)), np.nan)
    for line, run in zip(matrix, runs, strict=True):
        cells: dict[int, list[float]] = {}
        for row in run.rows:
            if row.get(key) is not None and "step" in row:
                cells.setdefault(int(np.searchsorted(steps, row["step"])), []).append(row[key])
        if cells:
            known = sorted(cells)
            inside = slice(known[0], known[-1] + 1)
            values = [float(combine(cells[index])) for index in known]
            line[inside] = np.interp(steps[inside], steps[known], values)
    return steps, matrix


def _recipe_traces(
    recipe: str, runs: Sequence[Record], panel: Panel, color: str, points: int
) -> list[go.Scatter]:
    steps, matrix = align(runs, panel.key, panel.combine, points)
    if panel.log:
        matrix = np.where(matrix > 0, matrix, np.nan)
    if not np.isfinite(matrix).any():
        return []
    common: dict[str, Any] = {"name": recipe, "meta": recipe, "mode": "lines"}
    thin = [
        go.Scatter(
            x=steps,
            y=line,
            **common,
            line={"color": color, "width": 1},
            opacity=0.3,
            hoverinfo="skip",
        )
        for line in matrix
        if len(runs) > 1
    ]
    curve = interval(matrix, reps=1000)
    shown = np.isfinite(curve.iqm)
    x, low, high = steps[shown], curve.low[shown], curve.high[shown]
    band = go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        **common,
        fill="toself",
        fillcolor=color,
        line={"width": 0},
        opacity=0.15,
        hoverinfo="skip",
    )
    middle = go.Scatter(
        x=x,
        y=curve.iqm[shown],
        **common,
        line={"color": color, "width": 2.5},
        customdata=np.stack([low, high], axis=1),
        hovertemplate="%{y:,.3~r} (%{customdata[0]:,.3~r} to %{customdata[1]:,.3~r})",
    )
    return [*thin, band, middle]


def styled(figure: go.Figure, height: int, hovermode: str = "x unified") -> go.Figure:
    """Give a figure the look of the report and return it."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        hovermode=hovermode,
        showlegend=False,
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
    )
    figure.update_annotations(font={"size": 13, "color": _INK})
    axis = {"gridcolor": _GRID, "linecolor": "#CBD5E1", "showline": True, "zeroline": False}
    figure.update_xaxes(**axis, title={"font": {"size": 13}, "standoff": 8})
    figure.update_yaxes(**axis, title={"font": {"size": 13}})
    return figure


def _log_axis(lines: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Return a logarithmic axis; over about a decade plotly's own choice of labels overlaps."""
    values = np.concatenate([np.log10(line) for line in lines]) if lines else np.zeros(1)
    decades = np.nanmax(values) - np.nanmin(values)
    return {
        "type": "log",
        "tickformat": "~g",  # 0.01, 500, 1e-9
        "nticks": 6,
        "dtick": "D2" if 0.8 < decades < 3 else None,
    }


def _say_empty(figure: go.Figure, subplot: int) -> None:
    suffix = "" if subplot == 1 else str(subplot)
    figure.add_annotation(
        text="no recipe here records it",
        x=0.5,
        xref=f"x{suffix} domain",
        y=0.5,
        yref=f"y{suffix} domain",
        showarrow=False,
    )


def _mean_total(runs: Sequence[Record], key: str) -> float:
    totals = [sum(recorded(run.rows, key)) for run in runs]
    return float(np.mean(totals))


def _color(index: int) -> str:
    if index < len(_PALETTE):
        return _PALETTE[index]
    red, green, blue = colorsys.hls_to_rgb(index * 0.382 % 1, 0.42, 0.55)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
