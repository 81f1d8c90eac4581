"""Claim 2: a bounded weight has a finite variance where that of importance sampling is infinite."""

import math
from collections.abc import Iterator, Mapping

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy.stats import gamma
from torch import Tensor

from rgpo.core.diagnostics import ratio_diagnostics
from rgpo.core.objective import Objective
from rgpo.core.objectives.rgpo import RGPO
from rgpo.runs.figures import colors, styled
from rgpo.studies.verify.finding import (
    Finding,
    Picture,
    Row,
    brief,
    element_objectives,
    generator,
    quantiles,
)

TAILS = (1.1, 1.2, 1.5, 1.8, 2.5, 3.0)
"""Tail indices alpha: P(r > t) falls like t^-alpha."""

SHOWN_TAIL = 1.2
"""The tail whose numbers docs/theory.md quotes."""

CHUNK = 100_000

RGPO_ARMS = {"RGPO, k = 10": RGPO(sharpness=10.0), "RGPO, k = 4": RGPO(sharpness=4.0)}
"""They see all ratios. The others see the first tenth: bounded moments settle early."""

HILL_CONFIDENCE = 0.999
"""Of each interval; six of them then all hold with 99.4%."""

SLOPE_TOLERANCE = 0.25
"""How far the measured growth may be off: medians of few blocks are noisy."""


def check(*, quick: bool) -> Finding:
    """Draw ratios with mean 1 from Pareto distributions and watch second moments."""
    samples = 10**6 if quick else 10**7
    arms = element_objectives(bounded=True) | RGPO_ARMS
    moments, hills = {}, {}
    weights: dict[str, dict[float, tuple[float, float, float]]] = {name: {} for name in arms}
    for number, alpha in enumerate(TAILS):
        moments[alpha], found = _measure(alpha, samples, arms, number)
        for name, three in found.items():
            weights[name][alpha] = three
        hills[alpha] = _hill(alpha, min(samples, 10**6), number)
    rows = [
        _growth_row(moments, samples),
        _weight_row(arms, weights, samples),
        _hill_row(hills, min(samples, 10**6)),
    ]
    statement = (
        "If a few samples can have huge ratios r, weighting samples by r (importance sampling) has "
        "an infinite variance, and more data do not help. A weight that never exceeds M has a "
        "second moment of at most M squared, whatever the ratios. It is the weight that must be "
        "bounded, not the gate. The price is bias, claim 3."
    )
    read = (
        "Left: mean of r squared over n ratios (line: median over independent batches, shade: "
        "quartiles). For tail indices up to 2 it grows with every decade of data; above 2 it "
        f"settles. Dashed: the gates' second moments at tail index {SHOWN_TAIL}, which stay put. "
        "Right: the tail index estimated from the ratios alone (the metric tail_index of every "
        f"run), with {HILL_CONFIDENCE:.1%} intervals, against the true one."
    )
    return Finding(
        "variance",
        statement,
        rows,
        [Picture("Second moments", read, _draw(moments, weights, hills))],
    )


def pareto_log_ratios(alpha: float, samples: int, source: torch.Generator) -> Iterator[Tensor]:
    """Log of Pareto ratios with mean 1, r = (1 - 1/alpha) u^(-1/alpha), float64, in chunks."""
    low = math.log1p(-1 / alpha)
    for begin in range(0, samples, CHUNK):
        size = min(CHUNK, samples - begin)
        uniform = torch.rand(size, dtype=torch.float64, generator=source)
        yield low - torch.log1p(-uniform) / alpha


def _measure(
    alpha: float, samples: int, arms: Mapping[str, Objective], seed: int
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, tuple[float, float, float]]]:
    """First and second moment of r in batches of each size; mean, second moment, max of |w|."""
    source = generator(seed)
    first, second = [], []
    sums = {name: [0.0, 0.0, 0.0, 0.0] for name in arms}
    for log_ratio in pareto_log_ratios(alpha, samples, source):
        ratio = log_ratio.exp().view(-1, 1000)
        first.append(ratio.sum(-1))
        second.append((ratio**2).sum(-1))
        d = log_ratio.float()
        sign = torch.randint(2, d.shape, generator=source).float() * 2 - 1
        early = len(first) * CHUNK <= samples // 10
        for name in arms if early else RGPO_ARMS:
            weight, total = arms[name].weight(d, sign).abs(), sums[name]
            total[0] += len(weight)
            total[1] += float(weight.sum())
            total[2] += float((weight**2).sum())
            total[3] = max(total[3], float(weight.max()))
    sizes = [10**e for e in range(3, int(math.log10(samples)) + 1)]
    parts = torch.cat(first), torch.cat(second)
    moments = {n: tuple(p.view(-1, n // 1000).sum(-1) / n for p in parts) for n in sizes}
    return moments, {name: (a / n, b / n, c) for name, (n, a, b, c) in sums.items()}


def _hill(alpha: float, samples: int, seed: int) -> tuple[float, float, float]:
    """The library's estimate from the largest 5% and its exact interval for a Pareto tail."""
    log_ratio = torch.cat(list(pareto_log_ratios(alpha, samples, generator(100 + seed))))
    one = torch.ones_like(log_ratio)
    estimate = float(ratio_diagnostics(log_ratio, one, one)["tail_index"])
    k = math.ceil(samples / 20)
    tail = (1 - HILL_CONFIDENCE) / 2
    low, high = (estimate * float(gamma.ppf(q, k)) / k for q in (tail, 1 - tail))
    return estimate, low, high


def _growth_row(moments: Mapping[float, Mapping[int, tuple[Tensor, Tensor]]], samples: int) -> Row:
    """The second moment of alpha-stable sums grows like n^(2/alpha - 1)."""
    heavy = [alpha for alpha in TAILS if alpha < 1.6]
    slopes = {alpha: _slope(moments[alpha]) for alpha in heavy}
    expected = {alpha: 2 / alpha - 1 for alpha in heavy}
    holds = all(abs(slopes[a] - expected[a]) <= SLOPE_TOLERANCE for a in heavy)
    variances = {
        n: quantiles(second - first**2, 0.25, 0.5, 0.75)
        for n, (first, second) in moments[SHOWN_TAIL].items()
    }
    told = [f"{variances[n][1]:,.0f} (n = {brief(n)})" for n in variances if n in (10**3, samples)]
    growth = ", ".join(f"n^{slopes[a]:.2f} (tail {a})" for a in heavy)
    return Row(
        "importance sampling: the second moment grows without limit for tail index < 2",
        f"Pareto ratios of mean 1, tail index {TAILS[0]} to {TAILS[-1]}, n up to {brief(samples)}",
        f"grows like {growth}; variance at tail {SHOWN_TAIL}: {' to '.join(told)}",
        "n^(2/tail - 1): " + ", ".join(f"{e:.2f}" for e in expected.values()),
        holds,
        numbers={
            "growth": {str(a): slopes[a] for a in heavy},
            "expected": {str(a): expected[a] for a in heavy},
            "variance_quartiles": {str(n): q for n, q in variances.items()},
        },
    )


def _slope(by_size: Mapping[int, tuple[Tensor, Tensor]]) -> float:
    """Least squares in logarithms, over the sizes of which there are several batches."""
    sizes = [n for n, (_, second) in by_size.items() if len(second) > 1]
    x = torch.tensor([math.log(n) for n in sizes])
    y = torch.tensor([math.log(quantiles(by_size[n][1], 0.5)[0]) for n in sizes])
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def _weight_row(
    arms: Mapping[str, Objective],
    weights: Mapping[str, Mapping[float, tuple[float, float, float]]],
    samples: int,
) -> Row:
    shares = {
        name: max(second for _, second, _ in weights[name].values()) / arms[name].sup_weight ** 2
        for name in arms
    }
    peaks = {
        name: max(peak for _, _, peak in weights[name].values()) / arms[name].sup_weight
        for name in arms
    }
    rounding = 1 + 1e-4  # the weights are computed in float32
    variance = {
        name: weights[name][SHOWN_TAIL][1] - weights[name][SHOWN_TAIL][0] ** 2 for name in arms
    }
    k10, k4 = (variance[name] for name in RGPO_ARMS)
    return Row(
        f"bounded weights: E[w²] <= (sup w)², all {len(arms) - 2} bounded objectives",
        f"the same ratios, n = {brief(samples // 10)} (RGPO: {brief(samples)}), A = 1 and -1",
        f"at most {max(shares.values()):.2f} of the bound, largest weight "
        f"{max(peaks.values()):.4f} of sup w; RGPO's variance at tail {SHOWN_TAIL}: {k10:.3f} "
        f"(k = 10), {k4:.3f} (k = 4)",
        "1 and 1",
        max(shares.values()) <= rounding and max(peaks.values()) <= rounding,
        numbers={"share_of_bound": shares, "share_of_sup": peaks, "variance": variance},
    )


def _hill_row(hills: Mapping[float, tuple[float, float, float]], samples: int) -> Row:
    inside = {alpha: low <= alpha <= high for alpha, (_, low, high) in hills.items()}
    told = ", ".join(f"{hills[a][0]:.3f}" for a in hills)
    return Row(
        "the tail index can be read off the ratios, so a run can say that it is in danger",
        f"Hill's estimate from the largest 5% of {brief(samples)} ratios",
        f"{told}; inside its interval {sum(inside.values())} of {len(inside)}",
        "the truth, " + ", ".join(str(alpha) for alpha in hills),
        all(inside.values()),
        "no claim",
        numbers={
            str(alpha): {"estimate": estimate, "low": low, "high": high}
            for alpha, (estimate, low, high) in hills.items()
        },
    )


def _draw(
    moments: Mapping[float, Mapping[int, tuple[Tensor, Tensor]]],
    weights: Mapping[str, Mapping[float, tuple[float, float, float]]],
    hills: Mapping[float, tuple[float, float, float]],
) -> go.Figure:
    titles = ("E[w²] against sample size", "tail index: estimate against truth")
    figure = make_subplots(cols=2, subplot_titles=titles, column_widths=[0.66, 0.34])
    color = colors([str(alpha) for alpha in TAILS])
    for alpha, by_size in moments.items():
        figure.add_traces(_growth_traces(alpha, by_size, color[str(alpha)]), rows=1, cols=1)
    ends = [min(moments[SHOWN_TAIL]), max(moments[SHOWN_TAIL])]
    for name in RGPO_ARMS:
        level = weights[name][SHOWN_TAIL][1]
        line = {"dash": "dash", "width": 2, "color": "#334155" if "4" in name else "#64748B"}
        figure.add_trace(go.Scatter(x=ends, y=[level] * 2, name=name, line=line), row=1, col=1)
    truth, found = list(hills), list(hills.values())
    error = {
        "array": [high - middle for middle, _, high in found],
        "arrayminus": [middle - low for middle, low, _ in found],
    }
    points = go.Scatter(
        x=truth,
        y=[m for m, _, _ in found],
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
    figure.add_traces([diagonal, points], rows=[1, 1], cols=[2, 2])
    figure.update_xaxes(type="log", title_text="number of ratios n", dtick=1, col=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, col=1)
    figure.update_xaxes(title_text="true tail index", col=2)
    styled(figure, height=430, hovermode="closest")
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})


def _growth_traces(
    alpha: float, by_size: Mapping[int, tuple[Tensor, Tensor]], color: str
) -> list[go.Scatter]:
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
