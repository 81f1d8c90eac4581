"""The table and the page of a run of `rgpo rlhf`."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from rgpo.runs import figures
from rgpo.runs.atomic import write_atomic
from rgpo.runs.directory import Run
from rgpo.runs.figures import Panel
from rgpo.runs.page import card, page
from rgpo.runs.table import Record, recorded
from rgpo.studies.text import html_table

SHOWN = 12
"""Answers of each policy on the page."""

PANELS = (
    Panel("reward", "reward"),
    Panel("ratio/kl_k3", "KL(old || new) per token", log=True, combine=max),
    Panel("entropy", "entropy per token"),
    Panel("ratio/ess", "effective sample size"),
    Panel("grad_norm", "gradient norm", log=True, combine=max),
    Panel("kl", "KL to the reference, per token"),
)
"""What is drawn of the training of a language model."""

READ = "One point per update, on the training prompts; the reward is the reward model's."
READ_ANSWERS = (
    "Log ratio: log pi - log pi_ref of the answer, the policy's over that before RL. Its mean over "
    "a policy's own answers is the KL."
)
GOLD = (
    "Gold is vaderSentiment's compound score of the answer, in [-1, 1], where the answer is as "
    "likely per token under the policy before RL as 95% of that policy's own answers, else -1. "
    "It labelled the preference pairs; the policy never saw it."
)


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for each policy that was measured, before and after RL."""
    heads = ["policy", "reward model", "gold", "KL to start", "tokens", "entropy", "cut"]
    return heads, [_row(when, result[when]) for when in ("before", "after") if when in result]


def write(path: Path, output: Path | None = None) -> Path:
    """The page of a finished run; by default its report.html."""
    run = Run.open(path)
    result, own = run.status["result"], record(run)
    answers = [json.loads(row) for row in (path / "evaluation" / "answers.jsonl").open()]
    told = (
        f"{run.config['model']} with {run.config['recipe']}: {result['pairs']} preference pairs, "
        f"reward model right on {result['reward_accuracy']:.1%} of unseen ones, "
        f"{result['answers']} answers to held-out prompts before and after, means ± standard error."
    )
    body = [
        f"<h1>RLHF with {escape(run.config['recipe'])}</h1><p>{escape(told)}</p>",
        html_table(*table(result)),
        "" if result["before"].get("gold") is None else f'<p class="read">{escape(GOLD)}</p>',
        card("Training", READ, curves([own], figures.colors([own.recipe])), "training"),
        *(_answers(when, answers) for when in ("before", "after")),
        f'<p class="read">{escape(READ_ANSWERS)}</p>',
        f"<h2>How this was made</h2><pre>{escape(str(run.versions['command']))}</pre>",
        settings(run, "Configuration and versions"),
    ]
    file = output or path / "report.html"
    write_atomic(file, page(f"RLHF with {run.config['recipe']}", "".join(body)).encode())
    return file


def _row(when: str, measured: dict[str, Any]) -> list[str]:
    def told(name: str) -> str:
        found = measured.get(name)
        return "-" if found is None else f"{found['mean']:.2f} ± {found['se']:.2f}"

    shares = [f"{measured['entropy']:.2f}", f"{measured['cut']:.0%}"]
    return [f"{when} RL", *(told(name) for name in ("proxy", "gold", "kl", "length")), *shares]


def record(run: Run) -> Record:
    """A language run as the figures take it: runs that differ in the seed share a name."""
    rows = [{**row, "step": row["update"]} for row in run.metrics()]
    name = re.sub(r"-seed\d+$", "", run.path.resolve().name)
    return Record(run.path, name, "", run.config, run.versions, run.status, rows)


def curves(records: Sequence[Record], color: Mapping[str, str]) -> go.Figure:
    """Training curves against optimiser steps."""
    groups = {r.recipe: [s for s in records if s.recipe == r.recipe] for r in records}
    known = [panel for panel in PANELS if any(recorded(r.rows, panel.key) for r in records)]
    figure = figures.curves(groups, known or PANELS[:1], color)
    last = {"title.text": "environment steps"}
    return figure.update_xaxes(title_text="optimiser steps", selector=last)


def settings(run: Run, heading: str) -> str:
    """Configuration and versions, folded."""
    facts = {"config": dict(run.config), "versions": dict(run.versions)}
    told = escape(json.dumps(facts, indent=1))
    return f"<details><summary>{escape(heading)}</summary><pre>{told}</pre></details>"


def _answers(when: str, answers: list[dict[str, Any]]) -> str:
    own = [row for row in answers if row["policy"] == when][:SHOWN]
    rows = [
        [
            _asked(row["prompt"]),
            row["answer"],
            f"{row['proxy']:.2f}",
            f"{row['gold']:.2f}" if "gold" in row else "-",
            f"{row['kl']:.1f}",
        ]
        for row in own
    ]
    heads = ["prompt", "answer", "reward model", "gold", "log ratio"]
    told = html_table(heads, rows).replace("<table>", '<table class="answers">')
    return f"<h2>Answers {when} RL</h2>{told}"


def _asked(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
