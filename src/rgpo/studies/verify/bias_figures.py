"""The figures of claim 3."""

from collections.abc import Callable, Mapping

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from rgpo.core.objective import Objective
from rgpo.core.objectives.rgpo import RGPO
from rgpo.runs.figures import colors, styled
from rgpo.studies.verify.bandits import Bandits
from rgpo.studies.verify.finding import element_objectives, quantiles

SMALLEST = 1e-9
"""Relative biases below it are not drawn: rounding."""

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#64748B"
POWER_COLORS = {2: BLUE, 1: ORANGE, 0: GREY}
INFINITY = float("inf")

NAMED = ("importance", "ppo", "rgpo", "reinforce", "spo")
"""Points with a label; the others have theirs on hover."""

SWEEP = (0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0, 40.0)
"""Sharpnesses of the line of RGPO's gates."""


def draw_bias(
    gates: Mapping[str, RGPO],
    arms: Mapping[str, Objective],
    powers: Mapping[str, int],
    problems: Mapping[float, list[Bandits]],
    bound: Callable[[RGPO, Bandits], Tensor],
) -> go.Figure:
    """Draw the relative bias against the median KL, of gates with their bounds, and of all arms."""
    titles = ("RGPO's gate by sharpness k", "all bounded objectives")
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.17)
    color = colors(list(gates))
    for name, gate in gates.items():
        line = _line(problems, lambda b, gate=gate: b.bias(gate), name, color[name])
        limit = _line(problems, lambda b, gate=gate: bound(gate, b), f"bound, {name}", color[name])
        limit.update(line={"dash": "dot", "width": 1}, showlegend=False)
        figure.add_traces([line, limit], rows=1, cols=1)
    known: set[int] = set()
    for name, arm in arms.items():
        line = _line(problems, lambda b, arm=arm: b.bias(arm), name, POWER_COLORS[powers[name]])
        if len(line.x) < 2:
            continue
        label = {2: "vanishes fast (p = 2)", 1: "slowly (p = 1)", 0: "not at all (p = 0)"}
        line.update(text=[name] * len(line.x), hovertemplate="%{text}<extra></extra>")
        line.update(name=label[powers[name]], legend="legend2", legendgroup=str(powers[name]))
        line.update(showlegend=powers[name] not in known, legendrank=-powers[name])
        known.add(powers[name])
        figure.add_trace(line, row=1, col=2)
    figure.update_xaxes(type="log", title_text="KL(old || new)", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, range=[-6.3, 0.5])
    figure.update_yaxes(title_text="bias / length of the true gradient", col=1)
    styled(figure, height=450, hovermode="closest")
    legend = {"yanchor": "top", "y": 1, "font": {"size": 11}}
    return figure.update_layout(
        showlegend=True, legend=legend | {"x": 0.42}, legend2=legend | {"x": 1.01}
    )


def draw_front(near: list[Bandits], far: list[Bandits]) -> go.Figure:
    """Draw bias against noise of all element-wise objectives for two distances."""
    middles = [quantiles(torch.cat([b.kl for b in own]), 0.5)[0] for own in (near, far)]
    titles = [f"median KL {middle:.2g}" for middle in middles]
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.08)
    arms = element_objectives(bounded=False)
    for column, own in ((1, near), (2, far)):
        traces = [_sweep(own)]
        places = {name: _front(arm, own) for name, arm in arms.items()}
        for bounded, color, symbol in ((True, BLUE, "circle"), (False, ORANGE, "circle-open")):
            chosen = {n: p for n, p in places.items() if (arms[n].sup_weight < INFINITY) == bounded}
            traces.append(
                go.Scatter(
                    x=[noise for _, noise in chosen.values()],
                    y=[bias for bias, _ in chosen.values()],
                    text=[_label(name) for name in chosen],
                    customdata=list(chosen),
                    textposition="top right",
                    textfont={"size": 11},
                    mode="markers+text",
                    marker={"color": color, "size": 9, "symbol": symbol},
                    hovertemplate="%{customdata}<extra></extra>",
                    name="bounded weight" if bounded else "unbounded weight",
                )
            )
        for trace in traces:
            trace.update(showlegend=column == 1)
        figure.add_traces(traces, rows=1, cols=column)
        figure.update_yaxes(range=[-0.05, 1.1], col=column)
    figure.update_xaxes(title_text="noise of one sample / length of the true gradient")
    figure.update_yaxes(title_text="bias / length of the true gradient", col=1)
    styled(figure, height=480, hovermode="closest")
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.17})


def _label(names: str) -> str:
    return next((name for name in names.split(", ") if name in NAMED), "")


def _sweep(own: list[Bandits]) -> go.Scatter:
    bias, noise = zip(*(_front(RGPO(sharpness=k), own) for k in SWEEP), strict=True)
    return go.Scatter(
        x=noise,
        y=bias,
        text=[f"RGPO, k = {k:g}" for k in SWEEP],
        mode="lines+markers",
        line={"color": "#94A3B8", "width": 1.5},
        marker={"size": 4},
        hovertemplate="%{text}<extra></extra>",
        name="RGPO's gate, k from 0.5 to 40",
    )


def _line(
    problems: Mapping[float, list[Bandits]],
    measure: Callable[[Bandits], Tensor],
    name: str,
    color: str,
) -> go.Scatter:
    """Median over the problems of each distance, relative to the true gradient."""
    x, y = [], []
    for own in problems.values():
        relative = torch.cat([measure(b) / b.true_gradient.norm(dim=-1) for b in own])
        middle = quantiles(relative, 0.5)[0]
        if middle > SMALLEST:
            x.append(quantiles(torch.cat([b.kl for b in own]), 0.5)[0])
            y.append(middle)
    return go.Scatter(x=x, y=y, name=name, mode="lines", line={"color": color})


def _front(objective: Objective, own: list[Bandits]) -> tuple[float, float]:
    """Medians of bias and noise, over the true gradient, of the scaled gradient of one sample.

    A problem on which the objective rejects every action has no gradient to scale: 0/0, left out.
    """
    bias, noise = [], []
    for b in own:
        weight = objective.weight(b.log_ratio, b.advantage)
        true, mean = b.true_gradient, b.gradient(weight)
        length, scale = true.norm(dim=-1), true.norm(dim=-1) / mean.norm(dim=-1)
        bias.append((scale[:, None] * mean - true).norm(dim=-1) / length)
        noise.append(scale * b.variance(weight).sqrt() / length)
    return quantiles(torch.cat(bias), 0.5)[0], quantiles(torch.cat(noise), 0.5)[0]
