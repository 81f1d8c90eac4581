"""What the RLHF study says: tables, fronts and sentences, all made from its results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self

import numpy as np
import plotly.graph_objects as go

from rgpo.core.diagnostics import KL_SPIKE
from rgpo.language.rlhf import RlhfConfig
from rgpo.runs.atomic import write_atomic
from rgpo.runs.figures import colors, styled
from rgpo.runs.page import card, legend, page
from rgpo.runs.statistics import Change, Curve, Summary, rank_test
from rgpo.runs.table import chance, number
from rgpo.studies.rlhf_cells import ARMS, TUNING_SEEDS
from rgpo.studies.rlhf_front import (
    BASELINES,
    LEVELS,
    PUBLISHED,
    REWARDS,
    Row,
    Runs,
    all_at_kl,
    apart,
    changes,
    common_levels,
    end,
    rows,
    second_half,
    spread,
    trajectory,
)
from rgpo.studies.rlhf_study import FINALISTS, RATES, RlhfStudy
from rgpo.studies.text import html_table, markdown_table, percent

Table = tuple[str, str, list[str], list[list[str]]]
"""Title, how to read it, headings, rows."""

FRONT = (
    "One point per evaluation of the runs of an arm, the last one large: interquartile means with "
    "95% bootstrap intervals of both axes. Dotted: gates without a KL term. Up and left is better."
)

FORMS = ("geometric", "detached", "product")
"""Of the dual gate, the simplest first: one gate at a mixed ratio, a gate times a factor, a product
of two gates."""

WORDS = {"gold": "gold reward", "proxy": "proxy reward", "kl": "KL to the reference"}
"""What is compared, in words."""


@dataclass(frozen=True)
class Report:
    """Everything that is said, computed once."""

    study: RlhfStudy
    runs: Runs
    sentences: list[str]
    tables: list[Table]

    @classmethod
    def of(cls, study: RlhfStudy) -> Self:
        """What the results so far say."""
        runs = study.runs()
        table = rows(runs)
        tables = [
            _end_table(table, study.chosen()),
            _way_table(table),
            *(_level_table(runs, name) for name in REWARDS),
            _change_table(runs),
            _tuning_table(study),
        ]
        return cls(study, runs, conclusion(runs), tables)

    def markdown(self, command: str) -> str:
        """The page of the docs."""
        parts = [f"Command: `{command}`\n", *(f"- {s}" for s in self.sentences)]
        for title, read, heads, lines in self.tables:
            parts += [f"\n## {title}\n", f"{read}\n", markdown_table(heads, lines)]
        return "\n".join(parts) + "\n"

    def write(self, command: str) -> Path:
        """Write report.html beside the results and return its path."""
        path = self.study.directory / "report.html"
        body = "".join(self._body(command))
        write_atomic(path, page("RLHF: reward against KL", body).encode())
        return path

    def _body(self, command: str) -> Iterator[str]:
        hue = colors([arm.removesuffix("+kl") for arm in self.runs])
        color = {arm: hue[arm.removesuffix("+kl")] for arm in self.runs}
        yield "<header><h1>Which method gets how much reward at which KL?</h1>"
        yield f"<p>{escape(setting(self.study.config))}</p></header>"
        sentences = "".join(f"<p>{escape(s)}</p>" for s in self.sentences)
        yield f'<section class="card">{sentences}</section>'
        yield legend(color)
        for name, heading in (("gold", "True reward"), ("proxy", "What the policy is trained on")):
            drawn = _front(self.runs, color, "kl", name)
            yield card(f"{heading}: {WORDS[name]} against KL", FRONT, drawn, name)
        read = "The same points. Where a curve bends down, the reward model pays for losing gold."
        drawn = _front(self.runs, color, "proxy", "gold")
        yield card("Over-optimisation: gold against proxy reward", read, drawn, "over")
        for title, read, heads, lines in self.tables:
            yield f'<h2>{escape(title)}</h2><p class="read">{escape(read)}</p>'
            yield html_table(heads, lines)
        yield f"<h2>How this was made</h2><pre>{escape(command)}</pre>"


def conclusion(runs: Runs) -> list[str]:
    """Sentences from the numbers."""
    said = [*_ends(runs), *_equal_kl(runs), *_overoptimised(runs), *_published(runs)]
    form, why = best_form(runs)
    return [*said, why] if form is not None else said


def best_form(runs: Runs) -> tuple[str | None, str]:
    """The form of the dual gate to use beside a KL term, and why; None without runs of all three.

    The simplest of those that do not end with less gold reward than another one (rank tests at 5%,
    Bonferroni over the three pairs).
    """
    arms = {form: f"rgpo-dual-{form}+kl" for form in FORMS}
    if not all(arm in runs for arm in arms.values()):
        return None, ""
    gold = {form: end(runs[arm], "gold") for form, arm in arms.items()}
    left = [form for form in FORMS if not any(_less(gold[form], gold[other]) for other in FORMS)]
    told = ", ".join(f"{form} {_two(spread(gold[form]))}" for form in FORMS)
    rest = [form for form in FORMS if form not in left]
    worse = f"; less than another form: {' and '.join(rest)}" if rest else ""
    same = (
        f"{' and '.join(left)} are not distinguishable" if len(left) > 1 else f"{left[0]} is best"
    )
    return left[0], (
        f"Form of the dual gate beside a KL term, by gold reward at the end ({told}): {same}"
        f"{worse}. The simplest of the best: {left[0]}."
    )


def _less(mine: list[float], theirs: list[float]) -> bool:
    return np.mean(mine) < np.mean(theirs) and rank_test(mine, theirs) <= 0.05 / len(FORMS)


def _ends(runs: Runs) -> Iterator[str]:
    for name in ("gold", "kl"):
        scores = {arm: end(results, name) for arm, results in runs.items()}
        for baseline in BASELINES:
            if baseline in runs and len(runs) > 1:
                yield f"{_upper(WORDS[name])} at the end: {_against(scores, baseline)}"


def _against(scores: dict[str, list[float]], baseline: str) -> str:
    higher, lower = apart(scores, baseline)
    rest = len(scores) - 1 - len(higher) - len(lower)
    return (
        f"of {len(scores) - 1} arms {_named(higher)} higher than {baseline}, {_named(lower)} "
        f"lower, {rest} not distinguishable."
    )


def _upper(words: str) -> str:
    return words[0].upper() + words[1:]


def _named(arms: Sequence[str]) -> str:
    return f"{len(arms)}" + (f" ({', '.join(arms)})" if arms else "")


def _equal_kl(runs: Runs) -> Iterator[str]:
    levels = common_levels(runs)
    if not levels:
        yield "There is no KL that every run of every arm reaches."
        return
    level = levels[-1]
    scores = {arm: all_at_kl(results, "gold", level) or [] for arm, results in runs.items()}
    for baseline in BASELINES:
        if baseline in runs and len(runs) > 1:
            told = _against(scores, baseline)
            yield f"Gold reward at a KL of {level:g}, which all runs reach: {told}"


def _overoptimised(runs: Runs) -> Iterator[str]:
    halves = {arm: second_half(results) for arm, results in runs.items()}
    found = [
        a for a, half in halves.items() if half["proxy"].iqm_low > 0 and half["gold"].iqm_high < 0
    ]
    yield (
        "Over-optimisation in the second half of the updates (proxy rises, gold falls, both "
        f"intervals without 0): {', '.join(found) or 'in no arm'}."
    )


def _published(runs: Runs) -> Iterator[str]:
    for arm in (arm for arm in runs if arm.endswith("+critic")):
        found = changes(runs, arm)
        for (name, baseline), theirs in PUBLISHED.items():
            if (name, baseline) in found:
                ours = found[name, baseline]
                verdict = "the interval has no 0" if _clear(ours) else "not distinguishable from 0"
                yield (
                    f"{_upper(WORDS[name])} of {arm} against {baseline}: {_change(ours)} "
                    f"({verdict}); the paper has {theirs} for its own setting."
                )


def _clear(change: Change | None) -> bool:
    return change is not None and not change.single and (change.low > 0 or change.high < 0)


def _end_table(table: Sequence[Row], chosen: dict[str, tuple[str, float]]) -> Table:
    against = [f"P(gold > {baseline})" for baseline in BASELINES]
    heads = ["arm", "tuned to", "n", "gold", "proxy", "KL", *against]
    lines = [
        [
            row.arm,
            f"{chosen[row.arm][0]}, {chosen[row.arm][1]:g}",
            str(row.runs) + (f" ({row.failed} broke down)" if row.failed else ""),
            *(_two(row.ends[name]) for name in ("gold", "proxy", "kl")),
            *(chance(row.better.get(baseline)) for baseline in BASELINES),
        ]
        for row in table
    ]
    read = (
        "Interquartile means over the runs with 95% bootstrap intervals; rewards are gains over "
        "the policy before RL, KL is in nats per answer. P: probability that a run ends with more "
        "gold reward than one of the baseline."
    )
    return "At the end", read, heads, lines


def _way_table(table: Sequence[Row]) -> Table:
    heads = [
        "arm", "gold, 2nd half", "proxy, 2nd half", "tokens", "entropy", "cut", "KL per update",
        "KL spikes", "CPU s",
    ]  # fmt: skip
    lines = [
        [
            row.arm,
            *(_two(row.second_half[name]) for name in REWARDS),
            *(number(row.ends[name].mean) for name in ("length", "entropy")),
            percent(row.ends["cut"].mean),
            number(row.ends["update_kl"].mean),
            percent(row.ends["kl_spike"].mean),
            number(row.ends["cpu"].mean),
        ]
        for row in table
    ]
    read = (
        "Change of both rewards over the second half of the updates; length, entropy per token and "
        "share of answers cut at the limit at the end; KL(old to new policy) per token over an "
        f"update, the share of updates where it is above {KL_SPIKE}; CPU-seconds of training."
    )
    return "On the way", read, heads, lines


def _level_table(runs: Runs, name: str) -> Table:
    reached = [level for level in LEVELS if any(all_at_kl(r, name, level) for r in runs.values())]
    heads = ["arm", *(f"at {level:g}" for level in reached)]
    lines = []
    for arm, results in runs.items():
        found = [all_at_kl(results, name, level) for level in reached]
        lines.append([arm, *("-" if x is None else _two(spread(x)) for x in found)])
    read = (
        "Gains where a run first reaches a KL to the reference, by linear interpolation between "
        "two evaluations, the first of which may be the policy before RL: the lower the level, the "
        "less exact. A dash where not every run of the arm reaches it."
    )
    return f"{_upper(WORDS[name])} at equal KL", read, heads, lines


def _two(summary: Summary) -> str:
    """IQM [low, high] with two decimals, so that rewards line up."""
    return f"{summary.iqm:.2f} [{summary.iqm_low:.2f}, {summary.iqm_high:.2f}]"


def _change_table(runs: Runs) -> Table:
    keys = [
        (name, baseline)
        for baseline in BASELINES
        if baseline in runs
        for name in ("proxy", "gold", "kl")
    ]
    heads = ["arm", *(f"{name} to {baseline}" for name, baseline in keys)]
    lines = [["the paper", *(PUBLISHED.get(key, "-") for key in keys)]]
    for arm in runs:
        if arm not in BASELINES:
            found = changes(runs, arm)
            lines.append([arm, *(_change(found[key]) for key in keys)])
    read = (
        "Changes of the interquartile mean at the end in percent, with 95% bootstrap intervals. "
        "Only gains have percentages: the reward model's scale has no zero, ours is the policy "
        "before RL. Which zero the paper has is not known."
    )
    return "The paper's percentages beside ours", read, heads, lines


def _change(change: Change | None) -> str:
    if change is None:
        return "-"
    return f"{change.share:+.1%} [{change.low:+.0%}, {change.high:+.0%}]"


def _tuning_table(study: RlhfStudy) -> Table:
    chosen, lines = study.chosen(), []
    for arm in chosen:
        trials, default = study.trials(arm), ARMS[arm].strengths[0]
        told = {
            trial: f"{np.mean(scores):.2f}" + (f" (n = {len(scores)})" if len(scores) > 1 else "")
            for trial, scores in trials.items()
        }
        told[chosen[arm]] = f"*{told[chosen[arm]]}*"
        others = [f"{trial[0]}: {told[trial]}" for trial in told if trial[0] != default]
        line = [arm, default, *(told.get((default, rate), "-") for rate in RATES), *others]
        lines.append(line + [""] * (4 + len(RATES) - len(line)))
    heads = ["arm", "default", *(f"{rate:g}" for rate in RATES), "other strengths", ""]
    read = (
        f"Gold reward at the end with seed {TUNING_SEEDS[0]}: four learning rates at the default "
        f"strength, then two more strengths at the best of them; the best {FINALISTS} of these "
        f"once more, with seed {TUNING_SEEDS[1]} (n = 2, means). *Chosen*. Neither is reported."
    )
    return "Tuning", read, heads, lines


def setting(config: RlhfConfig) -> str:
    """The experiment in one paragraph."""
    batch = (config.batch or 0) * config.group
    answers = (config.updates or 0) * batch
    return (
        f"Model {config.model}, one reward model from {config.pairs} preference pairs of the "
        f"policy's own answers, labelled by the gold scorer; from there every run has "
        f"{config.updates} updates with {config.epochs} passes over {batch} "
        f"answers, {answers} in all. Every arm had eight runs of tuning on seeds that are not "
        "shown, judged by gold reward."
    )


def _front(runs: Runs, color: dict[str, str], x: str, y: str) -> go.Figure:
    figure = go.Figure()
    for arm, results in runs.items():
        across, up = trajectory(results, x), trajectory(results, y)
        has_kl_term = "beta" in ARMS[arm].strengths[0]
        figure.add_scatter(
            x=across.iqm[1:],
            y=up.iqm[1:],
            error_x=_bars(across, color[arm]),
            error_y=_bars(up, color[arm]),
            mode="lines+markers",
            name=arm,
            meta=arm,
            line={"color": color[arm], "width": 2.2, "dash": "solid" if has_kl_term else "dot"},
            marker={"size": [5] * (len(across.iqm) - 2) + [11]},
            hovertemplate=f"{arm}<br>{x} %{{x:.2f}}, {y} %{{y:.2f}}<extra></extra>",
        )
    figure.update_xaxes(title_text=WORDS[x], type="log" if x == "kl" else "linear")
    figure.update_yaxes(title_text=WORDS[y])
    return styled(figure, height=520, hovermode="closest")


def _bars(curve: Curve, color: str) -> dict[str, Any]:
    """Error bars of the points after the start."""
    return {
        "array": (curve.high - curve.iqm)[1:],
        "arrayminus": (curve.iqm - curve.low)[1:],
        "thickness": 1,
        "width": 2,
        "color": color,
    }
