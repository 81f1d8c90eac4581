"""One HTML file that shows a comparison and opens without a network."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rgpo.core.diagnostics import KL_SPIKE
from rgpo.errors import RgpoError
from rgpo.runs import figures
from rgpo.runs.atomic import write_atomic
from rgpo.runs.figures import ObjectiveCurve
from rgpo.runs.page import card, dot, legend, page
from rgpo.runs.table import (
    Record,
    TableRow,
    cells,
    final_return,
    final_table,
    group,
    print_table,
    read_runs,
    table_of,
)

__all__ = [
    "ObjectiveCurve",
    "TableRow",
    "final_return",
    "final_table",
    "print_table",
    "write_objectives",
    "write_report",
]

_READ_TABLE = (
    "Return: mean of the training episodes that ended in the last 10% of the steps, then the mean "
    "of the middle half of the runs (IQM), with a 95% bootstrap interval over runs (too narrow if "
    f"the runs are few). KL is KL(old || new) of one update; above {KL_SPIKE} it is a spike. "
    "ESS is 1 when every sample counts the same. “Better than ppo”: the chance that one run "
    "beats one ppo run. Only finished runs count, unless a recipe has none."
)
_READ_RETURN = (
    "Higher is better. Thin lines are the runs, the thick line is their IQM, the shade its 95% "
    "bootstrap interval, point by point."
)
_READ_KL = (
    "How far one update moved the policy, on a logarithmic axis. Points above the dashed line are "
    "KL spikes: the policy left the region that its data describe. In a long run each point is "
    "the highest of a few updates."
)
_READ_RATIOS = (
    "The importance ratio new / old over the samples of an update, logarithmic axes. At 1 nothing "
    "moved; tails far from 1 mean that a few samples carry the update. In a long run each point "
    "is the most extreme of a few updates."
)
_READ_TRUST = (
    "Effective sample size: the part of the batch that still counts, 1 is best. Active clip "
    "fraction: samples whose gradient a clip has removed. Gate acceptance: the mean of the gate, "
    "for recipes that have one."
)
_READ_CERTIFICATE = (
    "How much better the new policy is at least, in units of the (scaled) discounted return: the "
    "promised gain minus the other parts. Usually far below 0, which proves nothing either way: "
    "with a long discount the largest part is the bound on the shift of the visited states. It "
    "rests on estimated advantages, on the batch's largest advantage and policy change standing "
    "for all, and on samples that the policy was fitted to: a nominal 95% confidence. Logarithmic "
    "axes for the shift and the interval."
)
_READ_PATHWISE = (
    "G is the derivative of the return by a cached action. Kept: samples whose weight is not 0 at "
    "the end of the update. Variance: of two estimates of the same derivative by the "
    "mean action, over the samples of a window; the score function's is what PPO would have "
    "learnt from. Logarithmic axes for |G| and the variances."
)
_READ_LEARNING = (
    "Entropy falls as the policy commits itself. Explained variance: 1 means that the critic "
    "predicts the returns, 0 or less that it does not. Gradient norm before clipping, "
    "logarithmic axis."
)
_READ_SECONDS = (
    "Where the wall-clock time of one run went, mean over the runs that the table counts."
)
_READ_OBJECTIVES = (
    "What a sample adds to the objective (g, above) and how strongly it pulls on its own "
    "log-probability (w = r g'(r), below), by its ratio. Dotted: r = 1, where old and new agree."
)


def write_report(
    runs: Sequence[Path],
    output: Path,
    *,
    title: str,
    command: str = "",
    objective_curves: Mapping[str, ObjectiveCurve] | None = None,
) -> Path:
    """Write the report on `runs` to the HTML file `output` and return its path.

    Runs are grouped by the `env` and the `label` (else `recipe`) of their configuration, one
    section per environment; `objective_curves` are named likewise, so that the colours agree.
    `command` is the one that made the report; without it the commands of the runs are shown.
    Raises RgpoError if there are no runs or one cannot be read.
    """
    if not runs:
        raise RgpoError("There are no runs to report on: name at least one run directory.")
    records = read_runs(runs)
    drawn = dict(objective_curves or {})
    color = figures.colors([*(record.recipe for record in records), *drawn])
    body = "".join(_body(records, title, command, drawn, color))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page(title, body).encode())
    return output


def write_objectives(drawn: Mapping[str, ObjectiveCurve], output: Path) -> Path:
    """Write a page with only the curves of `drawn` to the HTML file `output`; return its path."""
    title = "Objectives: value g and weight w"
    color = figures.colors(list(drawn))
    body = f"<header><h1>{title}</h1></header>{legend(color)}" + _objectives(drawn, color)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page(title, body).encode())
    return output


def _body(
    records: Sequence[Record],
    title: str,
    command: str,
    drawn: Mapping[str, ObjectiveCurve],
    color: Mapping[str, str],
) -> Iterator[str]:
    groups = group(records)
    rows = table_of(records)
    yield f"<header><h1>{escape(title)}</h1><p>{escape(_sentence(records))}</p></header>"
    yield legend(color)
    envs = list(dict.fromkeys(env for env, _ in groups))
    for env in envs:
        yield f"<h2>{escape(env)}</h2>"
        own = {recipe: runs for (where, recipe), runs in groups.items() if where == env}
        yield _table([row for row in rows if row.env == env], color)
        yield from _figures(own, color, f"env{envs.index(env)}")
    if drawn:
        yield "<h2>Objectives</h2>"
        yield _objectives(drawn, color)
    yield "<h2>How this was made</h2>"
    yield _origin(records, command)
    configs = "".join(_config(env, recipe, runs) for (env, recipe), runs in groups.items())
    yield f'<section class="card"><h3>Configurations</h3>{configs}</section>'
    yield _notes(records)


def _figures(own: figures.Groups, color: Mapping[str, str], name: str) -> Iterator[str]:
    def drawn(panels: Sequence[figures.Panel]) -> Any:
        return figures.curves(own, panels, color)

    yield card("Learning curves", _READ_RETURN, drawn(figures.RETURN), f"{name}-return")
    yield card("KL per update", _READ_KL, figures.kl(own, color), f"{name}-kl")
    yield card("Ratio quantiles", _READ_RATIOS, drawn(figures.RATIOS), f"{name}-ratios")
    yield card("Is the data still trusted?", _READ_TRUST, drawn(figures.TRUST), f"{name}-trust")
    recorded = {key for runs in own.values() for run in runs for row in run.rows for key in row}
    if "ratio_kept" in recorded:
        pathwise = drawn(figures.PATHWISE)
        yield card("Pathwise gradients", _READ_PATHWISE, pathwise, f"{name}-pathwise")
    if "certificate" in recorded:
        certificate = drawn(figures.CERTIFICATE)
        yield card("What is guaranteed?", _READ_CERTIFICATE, certificate, f"{name}-certificate")
    yield card("Policy and critic", _READ_LEARNING, drawn(figures.LEARNING), f"{name}-learning")
    yield card("Time", _READ_SECONDS, figures.seconds(own), f"{name}-seconds")


def _objectives(drawn: Mapping[str, ObjectiveCurve], color: Mapping[str, str]) -> str:
    figure = figures.objectives(drawn, color)
    return card("g and w of the objectives", _READ_OBJECTIVES, figure, "objectives")


def _sentence(records: Sequence[Record]) -> str:
    """Say in plain words what was compared."""
    groups = group(records)
    recipes = _joined(list(dict.fromkeys(record.recipe for record in records)))
    envs = _joined(list(dict.fromkeys(record.env for record in records)))
    sizes = {len(runs) for runs in groups.values()}
    many = f"{sizes.pop()} runs each" if len(sizes) == 1 else f"{len(records)} runs in total,"
    steps = max((row.get("step", 0) for record in records for row in record.rows), default=0)
    verb = "Compares" if len({recipe for _, recipe in groups}) > 1 else "Shows"
    many = "1 run each" if many == "1 runs each" else many
    return f"{verb} {recipes} on {envs}: {many} of up to {steps:,} environment steps."


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(rows: Sequence[TableRow], color: Mapping[str, str]) -> str:
    header, *lines = cells(rows)
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join(
        f"<tr><td>{dot(color, line[0])}{escape(line[0])}</td>"
        + "".join(f"<td>{escape(text)}</td>" for text in line[1:])
        + "</tr>"
        for line in lines
    )
    return (
        '<section class="card"><h3>Final table</h3>'
        f'<p class="read">{escape(_READ_TABLE)}</p><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _origin(records: Sequence[Record], command: str) -> str:
    """Show the commands and versions; what differs between runs is listed with commas."""
    made_by = (
        [command] if command else _distinct(record.versions.get("command") for record in records)
    )
    commands = "".join(f"<pre>{escape(str(line))}</pre>" for line in made_by)
    skipped = {"command", "identity", "trackers"}
    flat = [_flat(record.versions) for record in records]
    facts = {key: text for key, text in _facts(flat).items() if key not in skipped}
    return (
        f'<section class="card"><h3>Command</h3>{commands}'
        f"<details><summary>Versions and machine</summary>{_facts_table(facts)}</details></section>"
    )


def _config(env: str, recipe: str, runs: Sequence[Record]) -> str:
    facts = _facts([_flat(run.config) for run in runs])
    name = f"Configuration of {recipe} on {env}"
    return (
        f'<details class="config"><summary>{escape(name)}</summary>{_facts_table(facts)}</details>'
    )


def _notes(records: Sequence[Record]) -> str:
    """Name the runs that did not finish and those that recorded NaN or infinity."""
    notes = []
    for record in records:
        status = record.status["status"]
        if status != "finished":
            why = record.status.get("message")
            notes.append(f"{record.path}: {status}" + (f" ({why})" if why else ""))
        names = _distinct(name for row in record.rows for name in row.get("not_finite", []))
        if names:
            notes.append(f"{record.path}: NaN or infinite {_joined([str(n) for n in names])}")
    if not notes:
        return "<p>Every run finished, and none recorded NaN or infinity.</p>"
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section class="card" id="notes"><h3>Runs to look at</h3><ul>{items}</ul></section>'


def _facts(mappings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return each key with its value, or its different values, over several flat mappings."""
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    return {
        key: ", ".join(_distinct(_text(mapping.get(key)) for mapping in mappings)) for key in keys
    }


def _facts_table(facts: Mapping[str, str]) -> str:
    lines = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(text)}</td></tr>" for key, text in facts.items()
    )
    return f'<table class="facts">{lines}</table>'


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value is not None))
