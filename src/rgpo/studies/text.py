"""How studies write numbers and tables: short, with their interval."""

from collections.abc import Iterable
from html import escape

from rgpo.runs.statistics import Improvement, Summary


def short(x: float | None) -> str:
    """Three digits, whole numbers from 100 on; a dash for nothing."""
    if x is None or x != x:
        return "-"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def scored(summary: Summary | None) -> str:
    """IQM [low, high]."""
    if summary is None:
        return "-"
    middle, low, high = (short(x) for x in (summary.iqm, summary.iqm_low, summary.iqm_high))
    return f"{middle} [{low}, {high}]"


def chance(improvement: Improvement | None) -> str:
    """Probability (interval) in percent."""
    if improvement is None:
        return "-"
    middle, low, high = (
        f"{100 * x:.0f}" for x in (improvement.probability, improvement.low, improvement.high)
    )
    return f"{middle}% ({low}-{high})"


def percent(x: float | None) -> str:
    """A share as a whole percentage."""
    return "-" if x is None else f"{100 * x:.0f}%"


def listed(numbers: Iterable[float]) -> str:
    """1e-4, 3e-4 and so on."""
    return ", ".join(f"{number:g}" for number in numbers)


def markdown_table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A table of a docs page."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def html_table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """The same as a card of a report."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<section class="card scroll"><table><tr>{head}</tr>{body}</table></section>'
