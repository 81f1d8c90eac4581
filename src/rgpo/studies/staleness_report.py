"""What the staleness study says: tables and sentences, all made from its results."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from rgpo.runs.statistics import (
    Improvement,
    Summary,
    discoveries,
    probability_of_improvement,
    rank_test,
    summarize,
)
from rgpo.runs.table import chance, number
from rgpo.studies.jobs import Result
from rgpo.studies.staleness import (
    BASELINES,
    CONTRASTS,
    FIRST_SEEDS,
    LEADER_SEEDS,
    RIVALS,
    TUNING_AGES,
    TUNING_SEEDS,
    Study,
)
from rgpo.studies.text import listed, markdown_table, scored
from rgpo.studies.tuning import RATES, average, judged, matrix, scaled, score

WEIGHTS = {
    "weight_mean": "mean |w|/|A|",
    "active_clip_fraction": "share under 0.05",
    "pull_back_fraction": "share pulling back",
    "ess": "ESS",
    "kl_spike": "KL spikes",
}
"""Columns about the weights, averaged over ages and seeds."""


MOVES = {"kl": "KL per update", "kl_behavior": "KL from behaviour"}
"""Columns about how far the policy moves, on the youngest and on the oldest data."""

PLACES = ["recipe", "score on fresh data", "score on old data"]
"""Columns of the table over all tasks."""

TUNED = "Mean score over the tuning seeds at every learning rate; the highest of an age was chosen."

SCALE = (
    "On the scale of this table 0 is a task's lowest mean of any recipe at any age, 1 the highest."
)


@dataclass(frozen=True)
class Against:
    """The runs of one recipe against those of another, at some ages."""

    chance: Improvement
    """That a run scores higher."""

    p: float
    """Two-sided p-value of the rank test that they score alike, ages taken as independent."""


@dataclass(frozen=True)
class Row:
    """One recipe on one task."""

    arm: str
    scores: dict[int, Summary]
    """By age."""

    rates: dict[int, float]
    """Learning rate by the age that it was tuned at."""

    seeds: int
    failed: int
    """Runs that diverged."""

    fresh: dict[str, Against]
    """Against every other recipe of RIVALS on fresh data."""

    stale: dict[str, Against]
    """The same on all older data together."""

    weights: dict[str, float]
    """Keys of WEIGHTS."""

    moves: dict[str, dict[int, float]]
    """Keys of MOVES, then by age."""


def rows(study: Study, task: str) -> list[Row]:
    """One row per recipe with results at every age, best mean over the ages first."""
    runs = _by_arm(_reported(study), task)
    found = [_row(arm, runs, study.tuned_at) for arm in runs]
    return sorted(found, key=lambda row: -np.mean([s.iqm for s in row.scores.values()]))


def conclusion(table: Sequence[Row], task: str, baseline: str = "ppo") -> list[str]:
    """Sentences from the numbers: who is better or worse than the baseline, fresh and stale."""
    sentences = []
    for what, pick in (("fresh", "fresh"), ("old", "stale")):
        against = {row.arm: getattr(row, pick) for row in table}
        compared = {arm: rivals[baseline] for arm, rivals in against.items() if baseline in rivals}
        if not compared:
            continue
        found = discoveries({arm: a.p for arm, a in compared.items()})
        better = [arm for arm in found if compared[arm].chance.probability > 0.5]
        worse = [arm for arm in found if arm not in better]
        sentences.append(
            f"{task}, {what} data: of {len(compared)} recipes {_named(better, 'score higher')} "
            f"than {baseline}, {_named(worse, 'lower')}; {len(compared) - len(found)} are not "
            "distinguishable from it."
        )
    rank = {row.arm: place for place, row in enumerate(table, start=1)}
    ours = [f"{arm} {rank[arm]}" for arm in rank if arm.startswith("rgpo")]
    if ours:
        sentences.append(f"Ranks of RGPO's forms among {len(rank)}: {', '.join(ours)}.")
    return sentences


@dataclass(frozen=True)
class Place:
    """Where one recipe stands among all, over all tasks."""

    arm: str
    fresh: Summary
    """Of scores on a scale from 0, a task's lowest mean of any recipe and age, to 1, its highest.
    """

    stale: Summary
    """The same over all older ages together."""


def places(study: Study) -> list[Place]:
    """The recipes that every task can train, the best on old data first."""
    results = scaled(_reported(study))
    tasks = [_by_arm(results, task) for task in study.tasks]
    youngest, *older = study.ages

    def over(arm: str, ages: Sequence[int]) -> Summary:
        cells = [runs[arm][age] for runs in tasks for age in ages]
        return summarize({arm: matrix(cells)})[arm]

    shared = [arm for arm in tasks[0] if all(arm in runs for runs in tasks)]
    found = [Place(arm, over(arm, [youngest]), over(arm, older)) for arm in shared]
    return sorted(found, key=lambda place: -place.stale.iqm)


def leading(found: Sequence[Place], count: int = 5) -> list[str]:
    """Two sentences: the best on fresh data and the best on old data."""
    told = []
    for what, pick in (("fresh", "fresh"), ("old", "stale")):
        order = sorted(found, key=lambda place: -getattr(place, pick).iqm)[:count]
        named = ", ".join(f"{place.arm} {scored(getattr(place, pick))}" for place in order)
        told.append(f"Highest of {len(found)} recipes on {what} data: {named}.")
    return told


def caveats(study: Study) -> list[str]:
    """What a reader must know of the tuning and of the test, measured."""
    rates = study.chosen_rates()
    highest = sum(rate == max(RATES) for rate in rates.values())
    chosen = Counter((age, rate) for (_, _, age), rate in rates.items())
    counts = "; ".join(
        f"{listed(chosen[age, rate] for rate in RATES)} times at age {age}"
        for age in sorted({age for age, _ in chosen})
    )
    told = [f"{highest} of {len(rates)} tuned learning rates are the highest of the grid."]
    told.append(f"{listed(RATES)} were chosen {counts}.")
    results = _reported(study)
    correlations = [_seed_correlation(_by_arm(results, task)) for task in study.tasks]
    if all(np.isfinite(correlations)):
        told.append(
            "Runs of one seed at different ages correlate by "
            f"{listed(round(x, 2) for x in correlations)} ({', '.join(study.tasks)}); the tests "
            "of old data take them as independent."
        )
    return told


def distance(table: Sequence[Row], task: str) -> str:
    """How the score goes with the KL from behaviour over the recipes, at every age."""
    from scipy.stats import spearmanr

    def rank(age: int) -> float:
        far = [row.moves["kl_behavior"][age] for row in table]
        return float(spearmanr(far, [row.scores[age].iqm for row in table]).statistic)

    told = ", ".join(f"{rank(age):.2f} at age {age}" for age in table[0].scores)
    return (
        f"{task}, rank correlation of the score and the KL from the policy that acted over "
        f"{len(table)} recipes: {told}."
    )


def contrasts(study: Study, task: str) -> list[str]:
    """A sentence for every pair of recipes that differ in one thing."""
    runs = _by_arm(_reported(study), task)
    sentences = []
    for (arm, other), what in CONTRASTS.items():
        if arm in runs and other in runs:
            fresh, stale = _compare(runs[arm], runs[other])
            told = ", ".join(
                f"{chance(a.chance)} on {age} data (p = {a.p:.2g})"
                for age, a in (("fresh", fresh), ("old", stale))
            )
            sentences.append(f"{task}, {what}: {arm} scores higher than {other} with {told}.")
    return sentences


def _named(arms: Sequence[str], what: str) -> str:
    return f"{len(arms)} {what}" + (f" ({', '.join(arms)})" if arms else "")


@dataclass(frozen=True)
class Findings:
    """All that is told of a study: made once, for the terminal, the docs and the page."""

    study: Study
    places: list[Place]
    general: list[str]
    """Sentences over all tasks."""

    tasks: dict[str, tuple[list[Row], list[str]]]
    """Of each task that has results, the table and its sentences."""


def findings(study: Study) -> Findings:
    """What the results so far say."""
    found = places(study)
    general = [*leading(found), SCALE, *caveats(study)] if found else []
    tables = {task: rows(study, task) for task in study.tasks}
    told = {t: (table, sentences(study, t, table)) for t, table in tables.items() if table}
    return Findings(study, found, general, told)


def markdown(found: Findings, command: str) -> str:
    """The page of the docs: who leads, each task's sentences and table, and what was not run."""
    parts = [f"Command: `{command}`\n"]
    if found.places:
        parts += [f"\n## {together(found.study)}\n", *(f"- {s}" for s in found.general), ""]
        parts.append(markdown_table(PLACES, map(place_cells, found.places)))
    for task, (table, told) in found.tasks.items():
        ages = list(table[0].scores)
        parts += [f"\n## {task}\n", *(f"- {s}" for s in told), ""]
        parts.append(markdown_table(columns(ages), [row_cells(row, ages) for row in table]))
    for task in found.tasks:
        parts += [f"\n## {task}: tuning\n", f"{TUNED}\n"]
        parts.append(markdown_table(*tuning_table(found.study, task)))
    if found.study.refused:
        parts += ["\n## Not run\n"]
        reasons: dict[str, list[str]] = {}
        for (task, _), reason in found.study.refused.items():
            reasons.setdefault(reason, []).append(task)
        parts += [f"- {', '.join(tasks)}: {reason}" for reason, tasks in reasons.items()]
    return "\n".join(parts) + "\n"


def tuning_table(study: Study, task: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the tuning: every recipe's mean score at every age and learning rate."""
    found: dict[str, dict[tuple[int, float], list[float]]] = {}
    for result in judged(study.results(TUNING_SEEDS[study.workload])):
        if result["task"] == task:
            cells = found.setdefault(result["arm"], {})
            place = result["staleness"], result["learning_rate"]
            cells.setdefault(place, []).append(score(result))
    places = list(product(TUNING_AGES[study.workload], study.rates))
    head = ["recipe", *(f"age {age}, {rate:g}" for age, rate in places)]
    lines = [
        [arm, *(number(float(np.mean(cells[place]))) for place in places)]
        for arm, cells in sorted(found.items())
        if all(place in cells for place in places)
    ]
    return head, lines


def together(study: Study) -> str:
    """Heading of what is told over all tasks, on one scale."""
    return "All tasks together" if len(study.tasks) > 1 else "Fresh and old data"


def sentences(study: Study, task: str, table: Sequence[Row]) -> list[str]:
    """What the numbers of a task say."""
    told = conclusion(table, task, BASELINES[study.workload])
    if len(table) > 2:
        told.append(distance(table, task))
    return [*told, *contrasts(study, task)]


def place_cells(place: Place) -> list[str]:
    """Its line of the table over all tasks."""
    return [place.arm, scored(place.fresh), scored(place.stale)]


def _seed_correlation(runs: dict[str, dict[int, list[Result]]]) -> float:
    """Correlation of two ages' scores of one seed, each less the mean of its recipe and age."""
    products, squares = [], []
    for ages in runs.values():
        scores = matrix(list(ages.values()))
        off = scores - scores.mean(0)
        if len(off) > 1:
            every = off.T @ off
            squares.append(np.trace(every) / len(every))
            products.append((every.sum() - np.trace(every)) / (every.size - len(every)))
    return float(np.sum(products) / np.sum(squares)) if np.sum(squares) > 0 else float("nan")


def columns(ages: Sequence[int]) -> list[str]:
    """Columns of the table of a task."""
    scores = (f"age {a}" for a in ages)
    return [
        "recipe",
        "n",
        "learning rate",
        *scores,
        *(f"P fresh, {rival}" for rival in RIVALS),
        *(f"P old, {rival}" for rival in RIVALS),
        *WEIGHTS.values(),
        *MOVES.values(),
    ]


def row_cells(row: Row, ages: Sequence[int]) -> list[str]:
    """Its line of that table."""
    runs = str(row.seeds) + (f" ({row.failed} diverged)" if row.failed else "")
    scores = [scored(row.scores[a]) for a in ages]
    picked = [against.get(rival) for against in (row.fresh, row.stale) for rival in RIVALS]
    against = [chance(a and a.chance) for a in picked]
    each = [f"{rate:g}" for rate in row.rates.values()]
    rate = " / ".join(each if len(set(each)) > 1 else each[:1])
    weights = [number(row.weights[key]) for key in WEIGHTS]
    ends = (min(ages), max(ages))
    moves = [" → ".join(number(row.moves[key][age]) for age in ends) for key in MOVES]
    return [row.arm, runs, rate, *scores, *against, *weights, *moves]


def _reported(study: Study) -> list[Result]:
    """What is shown: chosen learning rates, and arms that have a run at every age."""
    rates = study.chosen_rates()
    found = [
        r
        for r in study.results((*FIRST_SEEDS, *LEADER_SEEDS))
        if r["learning_rate"] == rates.get((r["task"], r["arm"], study.tuned_at(r["staleness"])))
    ]
    ages: dict[tuple[str, str], set[int]] = {}
    for r in found:
        ages.setdefault((r["task"], r["arm"]), set()).add(r["staleness"])
    return judged(r for r in found if len(ages[r["task"], r["arm"]]) == len(study.ages))


def _by_arm(results: Sequence[Result], task: str) -> dict[str, dict[int, list[Result]]]:
    """A task's results by arm and age, youngest first."""
    found: dict[str, dict[int, list[Result]]] = {}
    for result in sorted(results, key=lambda r: r["staleness"]):
        if result["task"] == task:
            ages = found.setdefault(result["arm"], {})
            ages.setdefault(result["staleness"], []).append(result)
    return found


def _row(arm: str, runs: dict[str, dict[int, list[Result]]], tuned_at: Callable[[int], int]) -> Row:
    ages = runs[arm]
    every = [result for results in ages.values() for result in results]
    rivals = [rival for rival in RIVALS if rival in runs and rival != arm]
    against = {rival: _compare(ages, runs[rival]) for rival in rivals}
    return Row(
        arm,
        {age: summarize({arm: matrix([cell])})[arm] for age, cell in ages.items()},
        {tuned_at(age): results[0]["learning_rate"] for age, results in ages.items()},
        min(len(results) for results in ages.values()),
        sum(result["failed"] is not None for result in every),
        {rival: fresh for rival, (fresh, _) in against.items()},
        {rival: stale for rival, (_, stale) in against.items()},
        {key: float(np.mean([average(cell, key) for cell in ages.values()])) for key in WEIGHTS},
        {key: {age: average(cell, key) for age, cell in ages.items()} for key in MOVES},
    )


def _compare(
    ages: dict[int, list[Result]], other: dict[int, list[Result]]
) -> tuple[Against, Against]:
    """On the youngest data, and on all older ones together."""
    youngest, *older = sorted(ages)
    pairs = [
        [matrix([runs[age] for age in chosen]) for runs in (ages, other)]
        for chosen in ([youngest], older)
    ]
    fresh, stale = (Against(probability_of_improvement(*p), rank_test(*p)) for p in pairs)
    return fresh, stale
