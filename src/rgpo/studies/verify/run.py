"""Check all claims, and tell what came out: a table, a page, and JSON for programs."""

import time
from collections.abc import Callable
from html import escape
from pathlib import Path

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table

import rgpo
from rgpo.errors import RgpoError
from rgpo.runs.atomic import json_bytes, write_atomic
from rgpo.runs.page import card, page
from rgpo.studies.verify import bias, cost, improvement, trust, unification, variance
from rgpo.studies.verify.finding import Finding, Row

CHECKS = (unification, variance, bias, improvement, cost, trust)
"""The six claims, in order; each module has `check(quick=...)`."""

HEADINGS = ("claim, and how it was tested", "measured, and its bound", "published", "here")

_STYLE = """<style>
table.claims th, table.claims td { text-align: left; white-space: normal; vertical-align: top; }
table.claims td:nth-child(1) { width: 38%; } table.claims small { color: var(--soft); }
table.claims td:last-child, table.claims td:nth-last-child(2) { white-space: nowrap; }
.holds { color: #15803d; font-weight: 600; } .fails { color: #b91c1c; font-weight: 600; }
.none { color: var(--soft); }
</style>"""

_READ_TABLE = (
    "Here: whether the statement in the first column, which is what this library relies on, passed "
    "on this machine. Published: whether the paper's own version of it does; where that fails, the "
    "first column has the repaired one and the second says how the published one fails. No claim: "
    "the paper, as far as it is known to us, does not speak of it."
)


def run(
    *, quick: bool, starting: Callable[[str], object], done: Callable[[str, float], object]
) -> list[Finding]:
    """Check every claim, and call `starting(name)` and `done(name, seconds)` around each."""
    findings = []
    for check in CHECKS:
        name = check.__name__.rpartition(".")[-1]
        starting(name)
        start = time.perf_counter()
        findings.append(check.check(quick=quick))
        done(name, time.perf_counter() - start)
    return findings


def prepare(directory: Path) -> None:
    """Make the directory before anything is computed; RgpoError if that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RgpoError(
            f"{directory} cannot be a directory ({error.strerror}): choose another --out"
        ) from None


def write(findings: list[Finding], directory: Path, *, quick: bool) -> Path:
    """Write verify.html and verify.json, and return the page's path."""
    record = {
        "version": rgpo.__version__,
        "torch": torch.__version__,
        "quick": quick,
        "holds": all(finding.holds for finding in findings),
        "claims": [
            {
                "number": number,
                "name": finding.name,
                "statement": finding.statement,
                "holds": finding.holds,
                "note": finding.note,
                "rows": [vars(row) for row in finding.rows],
            }
            for number, finding in enumerate(findings, start=1)
        ],
    }
    write_atomic(directory / "verify.json", json_bytes(record))
    path = directory / "verify.html"
    write_atomic(path, page("rgpo verify", _body(findings, quick=quick)).encode())
    return path


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print one entry per row, then the notes; at least 100 columns where nobody watches."""
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 100))
    table = Table(box=HORIZONTALS, show_lines=True, pad_edge=False)
    for heading, share in zip(HEADINGS, (5, 7, None, None), strict=True):
        table.add_column(heading, ratio=share, no_wrap=share is None)
    for number, finding in enumerate(findings, start=1):
        for row in finding.rows:
            color = {"holds": "green", "fails": "red"}.get(row.published, "dim")
            table.add_row(
                f"[bold]{number} {plain(row.claim)}[/]\n[dim]test: {plain(row.tested)}[/]",
                f"{plain(row.measured)}\n[dim]bound: {plain(row.bound)}[/]",
                f"[{color}]{row.published}[/]",
                "[green]holds[/]" if row.holds else "[bold red]FAILS[/]",
            )
    console.print(table, highlight=False)
    for finding in findings:
        if finding.note:
            console.print(finding.note, markup=False, highlight=False)


def _body(findings: list[Finding], *, quick: bool) -> str:
    rows = [row for finding in findings for row in finding.rows]
    failed = sum(not row.holds for row in rows)
    verdict = f"All {len(rows)} hold." if not failed else f"{failed} of {len(rows)} fail."
    size = " Reduced size (--quick)." if quick else ""
    header = (
        "<header><h1>rgpo verify</h1><p>The claims behind rejection-gated policy optimisation, "
        f"checked on this machine. {verdict}{size}</p></header>"
    )
    parts = [_STYLE, header, _table(findings)]
    for number, finding in enumerate(findings, start=1):
        parts.append(f"<h2>{number} {escape(finding.name.capitalize())}</h2>")
        parts.append(f"<p>{escape(finding.statement)}</p>")
        if finding.note:
            parts.append(f"<p>{escape(finding.note)}</p>")
        for index, picture in enumerate(finding.pictures):
            name = f"{finding.name}-{index}"
            parts.append(card(picture.title, picture.read, picture.figure, name))
    return "".join(parts)


def _table(findings: list[Finding]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    lines = "".join(
        _line(number, row)
        for number, finding in enumerate(findings, start=1)
        for row in finding.rows
    )
    return (
        f'<section class="card"><h3>Results</h3><p class="read">{escape(_READ_TABLE)}</p>'
        f'<div class="scroll"><table class="claims"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></section>"
    )


def _line(number: int, row: Row) -> str:
    pairs = (
        (f"{number} {row.claim}", f"test: {row.tested}"),
        (row.measured, f"bound: {row.bound}"),
    )
    cells = "".join(f"<td>{escape(a)}<br><small>{escape(b)}</small></td>" for a, b in pairs)
    kind = "none" if row.published == "no claim" else row.published
    here = "holds" if row.holds else "fails"
    return f'<tr>{cells}<td class="{kind}">{row.published}</td><td class="{here}">{here}</td></tr>'
