"""The table and the page of a run of `rgpo rlhf`."""

import json
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rgpo.runs.atomic import write_atomic
from rgpo.runs.directory import Run
from rgpo.runs.page import card, page
from rgpo.studies.text import html_table

SHOWN = 12
"""Answers of each policy on the page."""

CURVES = (
    ("reward", "proxy reward"),
    ("kl", "KL to the reference, per token"),
    ("ratio/kl_k3", "KL(old || new), per token"),
    ("entropy", "entropy per token"),
)
GOLD = (
    "Gold is vaderSentiment's compound score of the answer, in [-1, 1], where the answer is as "
    "likely per token under the policy before RL as 95% of that policy's own answers, else -1. "
    "It labelled the preference pairs; the policy never saw it."
)


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row for each policy that was measured, before and after RL."""
    heads = ["policy", "reward model", "gold", "KL to reference", "tokens", "entropy", "cut"]
    return heads, [_row(when, result[when]) for when in ("before", "after") if when in result]


def write(path: Path, output: Path | None = None) -> Path:
    """The page of a finished run; by default its report.html."""
    run = Run.open(path)
    result = run.status["result"]
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
        card("Training", "One point per update.", _curves(run.metrics()), "training"),
        *(_answers(when, answers) for when in ("before", "after")),
        f"<h2>How this was made</h2><pre>{escape(str(run.versions['command']))}</pre>",
        f"<pre>{escape(json.dumps(dict(run.config), indent=1))}</pre>",
        f"<pre>{escape(json.dumps(dict(run.versions), indent=1))}</pre>",
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


def _curves(rows: list[dict[str, Any]]) -> go.Figure:
    figure = make_subplots(1, len(CURVES), subplot_titles=[title for _, title in CURVES])
    for i, (key, _) in enumerate(CURVES):
        points = [(row["update"], row[key]) for row in rows if row.get(key) is not None]
        x, y = zip(*points, strict=True) if points else ((), ())
        trace = go.Scatter(x=x, y=y, mode="lines", line={"color": "#0072B2"}, showlegend=False)
        figure.add_trace(trace, 1, i + 1)
        figure.update_xaxes(title_text="optimiser step", row=1, col=i + 1)
    figure.update_layout(height=320, template="plotly_white", margin={"t": 40, "l": 40, "r": 10})
    return figure


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
    heads = ["prompt", "answer", "reward model", "gold", "KL"]
    return f"<h2>Answers {when} RL</h2>{html_table(heads, rows)}"


def _asked(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
