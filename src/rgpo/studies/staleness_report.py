"""What the staleness study says: tables, figures and sentences, all made from its results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from rgpo.runs.atomic import write_atomic
from rgpo.runs.figures import colors, styled
from rgpo.runs.page import card, page
from rgpo.runs.statistics import Improvement, Summary, probability_of_improvement, summarize
from rgpo.studies.jobs import Result
from rgpo.studies.staleness import FIRST_SEEDS, LEADER_SEEDS, Study
from rgpo.studies.text import chance, html_table, listed, markdown_table, scored, short
from rgpo.studies.tuning import score

BASELINES = {"control": "ppo", "language": "grpo"}
"""What every recipe is compared with, by workload."""

WEIGHTS = {
    "weight_mean": "mean |w|/|A|",
    "active_clip_fraction": "share under 0.05",
    "pull_back_fraction": "share pulling back",
    "ess": "ESS",
    "kl_spike": "KL spikes",
}
"""Columns about the weights, averaged over ages and seeds."""


@dataclass(frozen=True)
class Row:
    """One recipe on one task."""

    arm: str
    scores: dict[int, Summary]
    """By age."""

    rates: dict[int, float]
    """Learning rate by age."""

    seeds: int
    failed: int
    """Runs that diverged."""

    fresh: Improvement | None
    """Against the baseline on fresh data; None for the baseline itself."""

    stale: Improvement | None
    """Against the baseline on all older data together."""

    weights: dict[str, float]
    """Keys of WEIGHTS."""


def rows(study: Study, task: str) -> list[Row]:
    """One row per recipe with results at every age, best mean over the ages first."""
    runs = _by_arm(study, task)
    baseline = BASELINES[study.workload]
    found = [
        _row(arm, ages, None if arm == baseline else runs.get(baseline))
        for arm, ages in runs.items()
    ]
    return sorted(found, key=lambda row: -np.mean([s.iqm for s in row.scores.values()]))


def conclusion(table: Sequence[Row], task: str, baseline: str = "ppo") -> list[str]:
    """Sentences from the numbers: who is better or worse than the baseline, fresh and stale."""
    sentences = []
    for what, pick in (("fresh", "fresh"), ("old", "stale")):
        compared = {r.arm: getattr(r, pick) for r in table if getattr(r, pick) is not None}
        better = [arm for arm, p in compared.items() if p.low > 0.5]
        worse = [arm for arm, p in compared.items() if p.high < 0.5]
        same = len(compared) - len(better) - len(worse)
        sentences.append(
            f"{task}, {what} data: of {len(compared)} recipes {len(better)} score higher than "
            f"{baseline} more often than not (interval above 50%)"
            + (f": {', '.join(better)}" if better else "")
            + f"; {len(worse)} lower"
            + (f": {', '.join(worse)}" if worse else "")
            + f"; {same} are not distinguishable from it."
        )
    rank = {row.arm: place for place, row in enumerate(table, start=1)}
    ours = [f"{arm} {rank[arm]}" for arm in rank if arm.startswith("rgpo")]
    if ours:
        sentences.append(f"Ranks of RGPO's forms among {len(rank)}: {', '.join(ours)}.")
    return sentences


def markdown(study: Study, command: str) -> str:
    """The page of the docs: per task the table, the learning rates and the sentences."""
    parts = [f"Command: `{command}`\n"]
    for task in study.tasks:
        table = rows(study, task)
        if not table:
            continue
        ages = list(table[0].scores)
        parts += [
            f"\n## {task}\n",
            *(f"- {s}" for s in conclusion(table, task, BASELINES[study.workload])),
            "",
        ]
        parts.append(markdown_table(_heads(ages), [_cells(row, ages) for row in table]))
    if study.refused:
        parts += ["\n## Not run\n"]
        parts += [f"- {task}: {reason}" for (task, _), reason in study.refused.items()]
    return "\n".join(parts) + "\n"


def write(study: Study, command: str) -> Path:
    """Write report.html beside the results and return its path."""
    body = "".join(_body(study, command))
    path = study.directory / "report.html"
    write_atomic(path, page(f"Old data: {study.workload}", body).encode())
    return path


def _body(study: Study, command: str) -> Iterator[str]:
    yield f"<header><h1>How good is every recipe when its data are old? ({study.workload})</h1>"
    yield f"<p>{len(study.arms)} recipes, learning rates {listed(study.rates)} tuned on seeds that "
    yield "are not shown; intervals are 95% bootstrap intervals of the interquartile mean.</p>"
    yield "</header>"
    for number, task in enumerate(study.tasks):
        table = rows(study, task)
        if not table:
            continue
        ages = list(table[0].scores)
        sentences = "".join(
            f"<p>{escape(s)}</p>" for s in conclusion(table, task, BASELINES[study.workload])
        )
        yield f'<h2>{escape(task)}</h2><section class="card">{sentences}</section>'
        read = (
            "Interquartile mean of the final score against the age of the data in updates. The "
            "eight best recipes, PPO and RGPO; click a name to hide it."
        )
        yield card("Score against age", read, _lines(table, ages), f"age{number}")
        baseline = BASELINES[study.workload]
        read = f"Probability that a run scores higher than one of {baseline}: fresh data, old data."
        yield card(f"Better than {baseline}?", read, _improvements(table), f"better{number}")
        yield html_table(_heads(ages), (_cells(row, ages) for row in table))
    yield f"<h2>How this was made</h2><pre>{escape(command)}</pre>"


def _lines(table: Sequence[Row], ages: Sequence[int]) -> go.Figure:
    figure = go.Figure()
    always = {"ppo", "grpo", "rgpo", "rgpo-gate", "rgpo-signed"}
    shown = [r for place, r in enumerate(table) if place < 8 or r.arm in always]
    color = colors([row.arm for row in shown])
    for row in shown:
        scores = [row.scores[a] for a in ages]
        figure.add_scatter(
            x=[str(a) for a in ages],
            y=[s.iqm for s in scores],
            error_y={
                "array": [s.iqm_high - s.iqm for s in scores],
                "arrayminus": [s.iqm - s.iqm_low for s in scores],
                "thickness": 1,
            },
            name=row.arm,
            line={"color": color[row.arm], "width": 2.5},
        )
    figure.update_xaxes(title_text="age of the data, updates", type="category")
    return styled(figure, height=460, hovermode="closest")


def _improvements(table: Sequence[Row]) -> go.Figure:
    figure = go.Figure()
    for name, pick, symbol in (("fresh", "fresh", "circle"), ("old", "stale", "diamond")):
        compared = [(r.arm, p) for r in reversed(table) if (p := getattr(r, pick)) is not None]
        figure.add_scatter(
            x=[p.probability for _, p in compared],
            y=[arm for arm, _ in compared],
            error_x={
                "array": [p.high - p.probability for _, p in compared],
                "arrayminus": [p.probability - p.low for _, p in compared],
                "thickness": 1,
            },
            mode="markers",
            marker={"symbol": symbol},
            name=f"{name} data",
        )
    figure.add_vline(x=0.5, line={"dash": "dot", "width": 1})
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%")
    return styled(figure, height=140 + 19 * len(table), hovermode="closest")


def _heads(ages: Sequence[int]) -> list[str]:
    return ["recipe", "n", *(f"age {a}" for a in ages), "P fresh", "P old", *WEIGHTS.values()]


def _cells(row: Row, ages: Sequence[int]) -> list[str]:
    runs = str(row.seeds) + (f" ({row.failed} diverged)" if row.failed else "")
    scores = [scored(row.scores[a]) for a in ages]
    against = [chance(p) for p in (row.fresh, row.stale)]
    return [row.arm, runs, *scores, *against, *(short(row.weights[k]) for k in WEIGHTS)]


def _by_arm(study: Study, task: str) -> dict[str, dict[int, list[Result]]]:
    """Reported results at the chosen learning rates; arms that have some at every age."""
    rates = study.chosen_rates()
    found: dict[str, dict[int, list[Result]]] = {}
    for result in study.results((*FIRST_SEEDS, *LEADER_SEEDS)):
        arm, age = result["arm"], result["staleness"]
        chosen = rates.get((result["task"], arm, study.tuned_at(age)))
        if result["task"] == task and result["learning_rate"] == chosen:
            found.setdefault(arm, {age: [] for age in study.ages})[age].append(result)
    return {arm: ages for arm, ages in found.items() if all(ages.values())}


def _row(arm: str, ages: dict[int, list[Result]], baseline: dict[int, list[Result]] | None) -> Row:
    every = [result for results in ages.values() for result in results]
    fresh = stale = None
    if baseline is not None:
        youngest = min(ages)
        older = [age for age in ages if age != youngest]
        fresh = probability_of_improvement(*(_matrix(r, [youngest]) for r in (ages, baseline)))
        stale = probability_of_improvement(*(_matrix(r, older) for r in (ages, baseline)))
    return Row(
        arm,
        {age: summarize({arm: _matrix(ages, [age])})[arm] for age in ages},
        {age: results[0]["learning_rate"] for age, results in ages.items()},
        min(len(results) for results in ages.values()),
        sum(result["failed"] is not None for result in every),
        fresh,
        stale,
        {key: _mean(every, key) for key in WEIGHTS},
    )


def _matrix(ages: dict[int, list[Result]], chosen: Sequence[int]) -> np.ndarray:
    """Scores (seeds, ages), of the seeds that every one of the chosen ages has."""
    seeds = set.intersection(*({r["seed"] for r in ages[age]} for age in chosen))
    by_age = [{r["seed"]: score(r) for r in ages[age]} for age in chosen]
    return np.array([[scores[seed] for scores in by_age] for seed in sorted(seeds)])


def _mean(results: Sequence[Result], key: str) -> float:
    values = [r[key] for r in results if r.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")
