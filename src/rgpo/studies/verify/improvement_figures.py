"""The figures of claim 4."""

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from rgpo.core.objectives.rgpo import RGPO
from rgpo.core.objectives.rgpo_raw import RawRGPO
from rgpo.runs.figures import colors, styled
from rgpo.studies.verify.steps import Steps

LINEAR = 1e-5
"""Where the vertical axis turns from linear to logarithmic."""

DRAWN = 1500
"""Points per panel; the table counts all."""

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#64748B"


def draw_bounds(steps: Steps) -> go.Figure:
    """Draw promised minus true improvement, repaired and published, k = 10, by size of the step."""
    titles = ("repaired bound", "as published: no state shift")
    figure = make_subplots(
        cols=2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.05
    )
    for column, promised in ((1, steps.bound[10.0]), (2, steps.published[10.0])):
        gap = promised - steps.true
        broken = gap > 1e-10
        for chosen, color, name in ((~broken, BLUE, "kept"), (broken, ORANGE, "broken")):
            index = torch.nonzero(chosen).flatten()[:DRAWN]
            points = go.Scatter(
                x=steps.size[index].tolist(),
                y=_signed_log(gap[index]).tolist(),
                mode="markers",
                marker={"color": color, "size": 4, "opacity": 0.5},
                name=f"promise {name}",
                hoverinfo="skip",
                legendgroup=name,
                showlegend=column == 2,
            )
            figure.add_trace(points, row=1, col=column)
    figure.add_hline(y=0, line={"width": 1, "color": GREY})
    figure.update_xaxes(type="log", dtick=1, title_text="size of the step in logits")
    figure.update_yaxes(**_ticks())
    figure.update_yaxes(title_text="promised minus true", col=1)
    styled(figure, height=440, hovermode="closest")
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})


def draw_share(steps: Steps) -> go.Figure:
    """Draw how often the bound is positive and how tight it then is, by size of the step."""
    titles = ("bound above 0", "bound over true improvement, where above 0")
    figure = make_subplots(cols=2, subplot_titles=titles, horizontal_spacing=0.09)
    edges = torch.logspace(-3, torch.tensor(5.0).log10().item(), 13, dtype=torch.float64)
    middles = (edges[1:] * edges[:-1]).sqrt().tolist()
    bins = torch.bucketize(steps.size, edges[1:-1])
    bound = steps.bound[10.0]
    for along, color, name in ((True, BLUE, "along the advantage"), (False, ORANGE, "anywhere")):
        chosen = [(bins == i) & (steps.along == along) for i in range(len(middles))]
        share = [float((bound[c] > 0).double().mean()) if c.any() else None for c in chosen]
        positive = [c & (bound > 0) for c in chosen]
        tight = [
            float((bound / steps.true)[p].median()) if p.sum() >= 10 else None for p in positive
        ]
        for column, y in ((1, share), (2, tight)):
            line = go.Scatter(
                x=middles,
                y=y,
                name=f"steps {name}",
                mode="lines+markers",
                line={"color": color},
                showlegend=column == 1,
            )
            figure.add_trace(line, row=1, col=column)
    figure.update_xaxes(type="log", title_text="size of the step in logits", dtick=1)
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05])
    styled(figure, height=360, hovermode="closest")
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.25})


def draw_gaps() -> go.Figure:
    """Draw |r - g(r)| of the raw and the normalised gate, and the line |r - 1|."""
    r = torch.linspace(0.01, 2, 400, dtype=torch.float64)
    d, one, shift = r.log(), torch.ones_like(r), (r - 1).abs()
    lines = {
        "raw sigmoid, k = 4": (r - RawRGPO(4.0).value(d, one)).abs(),
        "raw sigmoid, k = 10": (r - RawRGPO(10.0).value(d, one)).abs(),
        "normalised gate, k = 10": (r - RGPO(10.0).value(d, one)).abs(),
        "|r - 1|": shift,
        "k²|r - 1|³/12, k = 10": 100 / 12 * shift**3,
    }
    color = colors(list(lines))
    dashes = dict.fromkeys(lines, "solid") | {"|r - 1|": "dash", "k²|r - 1|³/12, k = 10": "dot"}
    figure = go.Figure(
        [
            go.Scatter(x=r, y=y, name=name, line={"color": color[name], "dash": dashes[name]})
            for name, y in lines.items()
        ]
    )
    figure.update_xaxes(title_text="ratio r")
    figure.update_yaxes(title_text="|r - g(r)|", range=[-0.03, 1.05])
    styled(figure, height=380)
    return figure.update_layout(showlegend=True)


def _signed_log(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log10(1 + x.abs() / LINEAR)


def _ticks() -> dict[str, list]:
    values = [sign * 10.0**e for sign in (-1, 1) for e in (-4, -2, 0, 2)] + [0.0]
    places = _signed_log(torch.tensor(values, dtype=torch.float64)).tolist()
    return {"tickvals": places, "ticktext": [f"{v:g}" for v in values]}
