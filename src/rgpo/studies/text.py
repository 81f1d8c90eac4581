"""How studies write scores and tables."""

from collections.abc import Iterable
from html import escape

from rgpo.runs.statistics import Summary
from rgpo.runs.table import number


def scored(summary: Summary | None) -> str:
    """IQM [low, high]."""
    if summary is None:
        return "–"
    middle, low, high = (number(x) for x in (summary.iqm, summary.iqm_low, summary.iqm_high))
    return f"{middle} [{low}, {high}]"


def percent(x: float | None) -> str:
    """A share as a whole percentage."""
    return "–" if x is None else f"{100 * x:.0f}%"


def listed(numbers: Iterable[float]) -> str:
    """1e-4, 3e-4 and so on."""
    return ", ".join(f"{number:g}" for number in numbers)


def markdown_table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A table of a docs page."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])


def html_table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """The same as a card of a report."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<section class="card scroll"><table><tr>{head}</tr>{body}</table></section>'
