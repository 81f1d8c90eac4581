"""The frame of every HTML page: one file, style and plotly inlined, that opens offline."""

from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root { --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: 1.05rem; margin: 0; }
p { margin: .2rem 0 .6rem; }
.read { color: var(--soft); font-size: .92rem; max-width: 56rem; }
section.card { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.2rem; margin: 0 0 1.1rem; }
nav { position: sticky; top: 0; z-index: 10; background: #f8fafcee; padding: .6rem 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .5rem;
  align-items: center; }
nav button { font: inherit; font-size: .92rem; color: var(--ink); background: #fff;
  border: 1px solid var(--line); border-radius: 999px; padding: .15rem .8rem; cursor: pointer; }
nav button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .5em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child { color: var(--soft); width: 16rem; white-space: nowrap; }
table.answers td:nth-child(-n+2), table.answers th:nth-child(2) { text-align: left;
  white-space: normal; }
pre { background: #f1f5f9; padding: .7rem .9rem; border-radius: 8px; overflow-x: auto;
  margin: .4rem 0; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      const mine = plot.data.flatMap((trace, i) => trace.meta === button.value ? [i] : []);
      if (mine.length) Plotly.restyle(plot, {visible: shown}, mine);
    }
  });
}
"""


def page(title: str, body: str) -> str:
    """Return the whole page: plotly and the style inlined once, nothing to load."""
    from plotly.offline import get_plotlyjs

    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head>"
        f"<body><main>{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def card(heading: str, read: str, figure: Any, name: str) -> str:
    """Return a box with a heading, how to read the figure, and the figure in `plot-NAME`."""
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        config={
            "displaylogo": False,
            "responsive": True,
            "modeBarButtons": [["toImage", "resetScale2d"]],
        },
    )
    text = f'<h3>{escape(heading)}</h3><p class="read">{escape(read)}</p>'
    return f'<section class="card">{text}{plot}</section>'


def legend(color: Mapping[str, str]) -> str:
    """Return buttons, one per name, that hide or show its traces in all figures."""
    buttons = "".join(
        f'<button value="{escape(name)}" aria-pressed="true">{dot(color, name)}{escape(name)}'
        "</button>"
        for name in color
    )
    return (
        f'<nav aria-label="recipes">{buttons}<span class="read">click to hide or show</span></nav>'
    )


def dot(color: Mapping[str, str], name: str) -> str:
    """Return a dot in the colour of a name."""
    return f'<span class="dot" style="background:{color[name]}"></span>'
