"""`rgpo rlvr` and `rgpo rlhf`: what a person types, and sees while they run."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from rgpo.errors import RgpoError
from rgpo.language import rlhf as preferred
from rgpo.language import rlvr as verifiable
from rgpo.language.rlhf import RlhfConfig
from rgpo.language.rlvr import RlvrConfig
from rgpo.language.stages import Watch
from rgpo.runs.directory import Run
from rgpo.studies import rlhf_report
from rgpo.studies.progress import StageProgress

console = Console()

Flat = tyro.conf.OmitArgPrefixes


def rlvr(config: Flat[RlvrConfig], out: Path | None = None) -> int:
    """Train a language model on rewards that a program verifies; the same command continues it.

    Args:
        config: What to train. --config FILE reads options from YAML; those after it win.
        out: Run directory; default: runs/rlvr-TASK-RECIPE-seedN.
    """
    path = out or Path("runs") / f"rlvr-{config.task}-{config.recipe}-seed{config.seed}"
    with _told(path, small=config.model is None) as watch:
        result = verifiable.run(config, path, watch)
    console.print(f"{config.task}, {result['held_out']} held-out entries")
    table = Table(box=None)
    for heading in ("right answers", "before", "after"):
        table.add_column(heading, justify="left" if heading == "right answers" else "right")
    for kind in ("sampled", "greedy"):
        table.add_row(kind, *(f"{result[when][kind]:.1%}" for when in ("before", "after")))
    console.print(table)
    console.print(f"run: {path}   policy: {path / 'trained'}")
    return 0


def rlhf(config: Flat[RlhfConfig], out: Path | None = None) -> int:
    """Train a language model on preferences, from the pairs to the report; continues itself.

    Stages: policy (supervised, where asked for), preferences (given, or labelled here by a gold
    scorer), reward model, online RL, evaluation.

    Args:
        config: What to train. --config FILE reads options from YAML; those after it win.
        out: Run directory; default: runs/rlhf-MODEL-RECIPE-seedN.
    """
    name = Path(config.model).name
    path = out or Path("runs") / f"rlhf-{name}-{config.recipe}-seed{config.seed}"
    with _told(path, small=config.model == "tiny") as watch:
        result = preferred.run(config, path, watch)
    heads, rows = rlhf_report.table(result)
    console.print(f"on {result['answers']} answers to held-out prompts (± standard error):")
    table = Table(box=None)
    for heading in heads:
        table.add_column(heading, justify="left" if heading == heads[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"reward model: {result['reward_accuracy']:.1%} of unseen pairs ranked correctly")
    console.print(f"run: {path}   policy: {path / 'trained'}")
    console.print(f"report: {rlhf_report.write(path).resolve()}")
    return 0


def resume(path: Path) -> int:
    """Continue the job in a run directory."""
    settings = dict(Run.open(path).config)
    command, kind = JOBS_BY_NAME[settings.pop("job")]
    known = {field.name for field in dataclasses.fields(kind)}
    if set(settings) != known:
        raise RgpoError(f"{path} was made by another version of rgpo: start a new run")
    return command(kind(**settings), path)


def with_file(arguments: list[str]) -> list[str]:
    """Arguments with --config FILE replaced by the options that the YAML file holds."""
    if "--config" not in arguments[:-1]:
        return arguments
    import yaml

    place = arguments.index("--config")
    file = Path(arguments[place + 1])
    try:
        options = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RgpoError(f"could not read --config {file}: {error}") from None
    if not isinstance(options, dict):
        raise RgpoError(f"{file} must hold options, one a line, such as recipe: rgpo-gate")
    told: list[str] = []
    for name, value in options.items():
        if value is not None:
            told += [f"--{str(name).replace('_', '-')}", str(value)]
    return [*arguments[:1], *told, *arguments[1:place], *arguments[place + 2 :]]


@contextmanager
def _told(path: Path, *, small: bool) -> Any:
    """A watch that shows stages as bars, and libraries that keep quiet beside them."""
    _hush()
    if not small:  # matrix products worth a second thread
        torch.set_num_threads(os.cpu_count() or 1)
    with StageProgress(console) as watch:
        try:
            yield _as_watch(watch)
        except KeyboardInterrupt:
            console.print(f"interrupted: `rgpo resume {path}` continues it")
            raise


def _as_watch(progress: StageProgress) -> Watch:
    return progress.tell


def _hush() -> None:
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


JOBS: dict[str, Callable[..., int]] = {"rlvr": rlvr, "rlhf": rlhf}
"""Every job by its name on the command line."""

JOBS_BY_NAME: dict[str, tuple[Callable[..., int], Any]] = {
    "rlvr": (rlvr, RlvrConfig),
    "rlhf": (rlhf, RlhfConfig),
}
"""Every job with its configuration."""
