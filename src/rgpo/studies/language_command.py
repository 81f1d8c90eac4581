"""`rgpo rlvr` and `rgpo rlhf`: what a person types, and sees while they run."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from rgpo.errors import RgpoError
from rgpo.language import rlhf as preferred
from rgpo.language import rlvr as verifiable
from rgpo.language.rlhf import RlhfConfig
from rgpo.language.rlvr import RlvrConfig
from rgpo.language.stages import DONE, Watch, hush
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
    _print_rlvr(config, result)
    console.print(f"run: {path}   policy: {path / 'trained'}   (`rgpo report {path}` draws it)")
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
    _print_rlhf(result)
    console.print(f"reward model: {result['reward_accuracy']:.1%} of unseen pairs ranked correctly")
    console.print(f"run: {path}   policy: {path / 'trained'}")
    console.print(f"report: {rlhf_report.write(path).resolve()}")
    return 0


def resume(path: Path) -> int:
    """Continue the job in a run directory."""
    job, config = _job_of(path)
    return JOBS[job](config, path)


def evaluate(
    path: Annotated[Path, tyro.conf.Positional], samples: int = 8, seed: int = 1_000_000
) -> int:
    """Measure the policy of a finished run again: other answers to its held-out prompts.

    Args:
        path: The run directory.
        samples: Answers to each prompt; `rgpo rlvr` takes one sampled and one greedy.
        seed: Of the sampling.
    """
    job, config = _job_of(path)
    if not (path / "trained" / DONE).exists():
        raise RgpoError(f"{path} has no trained policy yet: `rgpo resume {path}` continues it")
    hush()
    if job == "rlvr":
        _print_rlvr(config, verifiable.evaluate(config, path, seed))
    else:
        _print_rlhf(preferred.evaluate(config, path, samples, seed))
    return 0


def _job_of(path: Path) -> tuple[str, Any]:
    """Name and configuration of the job in a run directory."""
    settings = dict(Run.open(path).config)
    job = settings.pop("job")
    kind = CONFIGS[job]
    if set(settings) != {field.name for field in dataclasses.fields(kind)}:
        raise RgpoError(f"{path} was made by another version of rgpo: start a new run")
    return job, kind(**settings)


def _print_rlvr(config: RlvrConfig, result: dict[str, Any]) -> None:
    """Right answers of the policies that were measured, with standard errors."""
    count, whens = result["held_out"], [w for w in ("before", "after") if w in result]
    rows = []
    for kind in ("sampled", "greedy"):
        shares = [result[when][kind] for when in whens]
        rows.append([kind, *(f"{p:.1%} ± {(p * (1 - p) / count) ** 0.5:.1%}" for p in shares)])
    console.print(f"{config.task}, {count} held-out entries (± standard error)")
    _print_table(["right answers", *whens], rows)
    kl = result["after"]["kl"]
    console.print(f"KL to the policy before RL: {kl['mean']:.2f} ± {kl['se']:.2f} nats per answer")


def _print_rlhf(result: dict[str, Any]) -> None:
    console.print(f"on {result['answers']} answers to held-out prompts (± standard error):")
    _print_table(*rlhf_report.table(result))


def _print_table(heads: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None)
    for heading in heads:
        table.add_column(heading, justify="left" if heading == heads[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


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
    hush()
    threads = torch.get_num_threads()
    if not small:  # matrix products worth a second thread
        torch.set_num_threads(os.cpu_count() or 1)
    with StageProgress(console) as watch:
        try:
            yield _as_watch(watch)
        except KeyboardInterrupt:
            console.print(f"interrupted: `rgpo resume {path}` continues it")
            raise
        finally:
            torch.set_num_threads(threads)


def _as_watch(progress: StageProgress) -> Watch:
    return progress.tell


JOBS: dict[str, Callable[..., int]] = {"rlvr": rlvr, "rlhf": rlhf}
"""Every job by its name on the command line."""

CONFIGS: dict[str, Any] = {"rlvr": RlvrConfig, "rlhf": RlhfConfig}
"""Every job's configuration."""
