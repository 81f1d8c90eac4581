"""The figure of claim 2."""

from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rgpo.runs.figures import colors, styled
from rgpo.studies.verify.finding import quantiles
from rgpo.studies.verify.pareto import RGPO_ARMS, Estimate, Moments, Weight

SHOWN_TAIL = 1.2
"""The tail whose numbers docs/theory.md quotes."""


def draw_moments(
    moments: Mapping[float, Moments],
    weights: Mapping[str, Mapping[float, Weight]],
    hills: Mapping[float, Estimate],
) -> go.Figure:
    """Draw second moments against the sample size, and tail indices against the truth."""
    titles = ("E[w²] against sample size", "tail index: estimate against truth")
    figure = make_subplots(cols=2, subplot_titles=titles, column_widths=[0.66, 0.34])
    color = colors([str(alpha) for alpha in moments])
    for alpha, by_size in moments.items():
        figure.add_traces(_growth_traces(alpha, by_size, color[str(alpha)]), rows=1, cols=1)
    ends = [min(moments[SHOWN_TAIL]), max(moments[SHOWN_TAIL])]
    for name in RGPO_ARMS:
        level = weights[name][SHOWN_TAIL].second
        line = {"dash": "dash", "width": 2, "color": "#334155" if "4" in name else "#64748B"}
        figure.add_trace(go.Scatter(x=ends, y=[level] * 2, name=name, line=line), row=1, col=1)
    figure.add_traces(_hill_traces(hills), rows=1, cols=2)
    figure.update_xaxes(type="log", title_text="number of ratios n", dtick=1, col=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, col=1)
    figure.update_xaxes(title_text="true tail index", col=2)
    styled(figure, height=430, hovermode="closest")
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})


def _growth_traces(alpha: float, by_size: Moments, color: str) -> list[go.Scatter]:
    sizes = list(by_size)
    low, middle, high = zip(
        *(quantiles(second, 0.25, 0.5, 0.75) for _, second in by_size.values()), strict=True
    )
    band = go.Scatter(
        x=sizes + sizes[::-1],
        y=high + low[::-1],
        fill="toself",
        fillcolor=color,
        opacity=0.15,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )
    line = go.Scatter(x=sizes, y=middle, name=f"r, tail index {alpha}", line={"color": color})
    return [band, line]


def _hill_traces(hills: Mapping[float, Estimate]) -> list[go.Scatter]:
    truth, found = list(hills), list(hills.values())
    error = {
        "array": [own.high - own.value for own in found],
        "arrayminus": [own.value - own.low for own in found],
    }
    points = go.Scatter(
        x=truth,
        y=[own.value for own in found],
        error_y=error,
        mode="markers",
        showlegend=False,
        marker={"color": "#0072B2"},
    )
    diagonal = go.Scatter(
        x=[1, 3.1],
        y=[1, 3.1],
        mode="lines",
        line={"dash": "dot", "color": "#64748B"},
        showlegend=False,
    )
    return [diagonal, points]
