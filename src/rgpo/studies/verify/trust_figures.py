"""The figures of claim 6."""

from collections.abc import Mapping

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from rgpo.runs.figures import colors, styled
from rgpo.studies.verify.drift import Form

DASHES = {"PPO's clip": "dash", "two-sided rejection": "dot"}
"""Lines that run along others."""


def draw_forces(compared: Mapping[str, Form]) -> go.Figure:
    """Draw the force on a sample against its ratio for A = 1 and A = -1."""
    figure = make_subplots(cols=2, subplot_titles=("A = 1", "A = -1"), horizontal_spacing=0.07)
    ratio = torch.linspace(0.01, 2.5, 500, dtype=torch.float64)
    color = colors(list(compared))
    for column, sign in ((1, 1.0), (2, -1.0)):
        for name, form in compared.items():
            line = go.Scatter(
                x=ratio.tolist(),
                y=form.force(ratio.log(), torch.full_like(ratio, sign)).tolist(),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": color[name], "width": 2, "dash": DASHES.get(name)},
                hovertemplate="%{y:.2f}",
            )
            figure.add_trace(line, row=1, col=column)
        against = {"x0": 0, "x1": 1} if sign > 0 else {"x0": 1, "x1": 2.5}
        shade = {"fillcolor": "#CBD5E1", "opacity": 0.4, "layer": "below", "line_width": 0}
        figure.add_vrect(**against, **shade, row=1, col=column)
    figure.add_hline(y=0, line={"width": 1, "color": "#334155"})
    figure.update_xaxes(title_text="ratio r", range=[0, 2.5])
    figure.update_yaxes(range=[-2.1, 2.1])
    figure.update_yaxes(title_text="force on log π of the sample", col=1)
    styled(figure, height=430)
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})


def draw_paths(free: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> go.Figure:
    """Draw the exact KL over epochs, from the old and from a displaced policy."""
    titles = ("from the old policy", "from a displaced policy")
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.07)
    color = colors(list(free))
    for column, paths in ((1, free), (2, back)):
        for name, kl in paths.items():
            epochs = list(range(column == 1, len(kl)))  # no logarithm of the 0 at the start
            low, middle, high = torch.quantile(
                kl[epochs], torch.tensor([0.25, 0.5, 0.75], dtype=kl.dtype), dim=1
            ).tolist()
            common = {"name": name, "legendgroup": name}
            band = go.Scatter(
                **common,
                x=epochs + epochs[::-1],
                y=high + low[::-1],
                fill="toself",
                fillcolor=color[name],
                opacity=0.12,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
            line = go.Scatter(
                **common,
                x=epochs,
                y=middle,
                line={"color": color[name], "width": 2},
                showlegend=column == 1,
                hovertemplate="%{y:.2~g}",
            )
            figure.add_traces([band, line], rows=1, cols=column)
    figure.update_xaxes(title_text="epochs on one batch")
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(title_text="KL(old || new)", col=1)
    styled(figure, height=450)
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})
