"""Draws the weight plots of this folder and writes the table of its README from the registry.

    python docs/objectives/build.py

Needs matplotlib and pillow (constraints.txt pins them).
"""
# ruff: noqa: INP001

import io
import re
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from rgpo.core import recipes
from rgpo.studies.catalogue import markdown
from rgpo.studies.curves import objective_curve

HERE = Path(__file__).parent
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#6B7280")
PLOTS = {
    "gates": ("rgpo-gate", "rgpo-erf", "rgpo-arctan", "rgpo-signed", "sapo", "gipo", "mhpo"),
    "clips": ("importance", "ppo", "ppo-dual-clip", "two-sided-mask", "dppo-tv", "dppo-kl"),
    "pull-back": ("spo", "r2vpo", "ppo-rb", "bpo", "ano", "rgpo-pullback", "biris-token"),
    "detached": ("cispo", "dispo", "topr-token", "rec-oneside-nois", "rec-ring", "opmd-kimi"),
    "likelihood": ("reinforce", "awr", "vmpo", "red-weight", "asymre", "dro"),
}
"""Which recipes a plot of weights shows, with the defaults."""


def draw_weights(names: tuple[str, ...]) -> Figure:
    """Weight over A against r, one panel for each sign of A: below 0 the weight is against A."""
    figure, panels = _panels()
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        curve = objective_curve(recipes.get(name))
        negative = [-w for w in curve.weight_neg]
        width = 3.4 - 0.36 * i  # so that lines on top of each other all show
        for panel, weight in zip(panels, (curve.weight_pos, negative), strict=True):
            panel.plot(curve.ratio, weight, color=colour, label=name, linewidth=width)
    for panel, title in zip(panels, ("A > 0", "A < 0"), strict=True):
        panel.axhline(0, color="#334155", linewidth=0.8)
        panel.axvline(1, color="#94A3B8", linewidth=0.8, linestyle=":")
        panel.set(title=title, xlabel="ratio r", xlim=(0, 3), ylim=(-2, 3))
    panels[0].set_ylabel("weight over advantage, w / A")
    return figure


def draw_bounds() -> Figure:
    """Bounds of the ratio that a batch gets, against the spread of its log-ratios.

    100,000 normal log-ratios with mean -spread^2 / 2, so that the mean ratio is 1, and standard
    normal advantages shifted so that half, or 35%, of them are positive. Seed 0.
    """
    figure, panels = _panels()
    generator = torch.Generator().manual_seed(0)
    noise, drawn = torch.randn(2, 100_000, generator=generator)
    every = torch.ones_like(noise, dtype=torch.bool)
    spreads = torch.linspace(0.01, 1, 100)
    for name, colour in zip(("m2po", "bapo", "bapo-published"), COLOURS, strict=False):
        objective = recipes.get(name).objective
        for panel, shift in zip(panels, (0.0, 0.385), strict=True):
            bounds = [
                objective.bounds(s * noise - s * s / 2, drawn - shift, every) for s in spreads
            ]
            low, high = (torch.cat(ends) for ends in zip(*bounds, strict=True))
            panel.plot(spreads, low, color=colour, linewidth=1.6)
            panel.plot(spreads, high, color=colour, linewidth=1.6, label=name)
    for panel, title in zip(panels, ("half of A positive", "35% of A positive"), strict=True):
        panel.axhspan(0.8, 1.2, color="#E2E8F0", label="ppo")
        panel.set(title=title, xlabel="standard deviation of log r", xlim=(0, 1), ylim=(0, 3.2))
    panels[0].set_ylabel("bounds of the ratio")
    return figure


def _panels() -> tuple[Figure, list[Axes]]:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for panel in panels:
        panel.grid(color="#E8EDF3")
    return figure, list(panels)


def save(figure: Figure, name: str) -> None:
    """As a PNG with a palette, which is a quarter of the size."""
    figure.axes[1].legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    palette = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    palette.save(HERE / f"{name}.png", optimize=True)


def main() -> None:
    """All plots, and the part of README.md below its first table heading."""
    mpl.use("agg")
    for name, shown in PLOTS.items():
        save(draw_weights(shown), name)
    save(draw_bounds(), "adaptive")
    page = HERE / "README.md"
    text = re.sub(r"\| recipe \| paper .*", lambda _: markdown(), page.read_text(), flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    main()
