"""The command line: parses, calls, prints."""

import itertools
import os
import select
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rgpo.control import session
from rgpo.control.config import TrainConfig
from rgpo.core import recipes
from rgpo.differentiable import session as reparam_session
from rgpo.differentiable.config import ReparamConfig
from rgpo.errors import RgpoError
from rgpo.runs.directory import Run
from rgpo.runs.report import write_objectives, write_report
from rgpo.runs.table import final_table, print_table
from rgpo.studies import compare as comparison
from rgpo.studies import language_runs
from rgpo.studies.catalogue import needs
from rgpo.studies.command import STUDIES
from rgpo.studies.curves import objective_curve
from rgpo.studies.progress import ComparisonProgress, RunProgress

console = Console()

Flat = tyro.conf.OmitArgPrefixes


def train(
    config: Flat[TrainConfig],
    algo: Literal["score-function", "reparam-ppo", "reppo"] = "score-function",
    out: Path | None = None,
) -> int:
    """Train one policy with a recipe on a Gymnasium task.

    Args:
        config: What to train.
        algo: score-function: PPO's family. The others follow the gradient of a differentiable
            task (reparam-ppo) or of a critic (reppo); `rgpo train --algo reparam-ppo --help`
            shows their options.
        out: Run directory; default: runs/ENV-RECIPE-seedN.
    """
    del algo  # the others are `train_reparam`
    return _train(config, session, out)


def train_reparam(config: Flat[ReparamConfig], out: Path | None = None) -> int:
    """Train one policy through the gradient of a differentiable task, or of a critic.

    Args:
        config: What to train.
        out: Run directory; default: runs/ENV-METHOD-seedN.
    """
    return _train(config, reparam_session, out)


def compare(
    base: Flat[TrainConfig],
    recipes: tuple[str, ...] = ("rgpo", "ppo"),
    seeds: int = 5,
    out: Path | None = None,
    workers: int | None = None,
) -> int:
    """Train several recipes with several seeds each, and write the table and the report.

    Args:
        base: What all runs share; its recipe is not used, its seed is the first one.
        recipes: Arms; hyper-parameters as in rgpo:sharpness=4,learning_rate=1e-3.
        seeds: Runs of each arm.
        out: Directory of the comparison; default: runs/compare-ENV-TIME.
        workers: Processes; default: one per core.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    directory = out or Path("runs") / f"compare-{_file_name(base.env)}-{stamp}"
    for sentence in base.warnings():
        warnings.warn(sentence, stacklevel=1)
    planned = comparison.plan(base, recipes, seeds, directory, workers=workers, command=_command())
    return _run_comparison(planned)


def resume(path: Annotated[Path, tyro.conf.Positional]) -> int:
    """Continue an interrupted run or comparison from its newest whole checkpoint.

    Args:
        path: The run's or comparison's directory.
    """
    if (path / comparison.PLAN).exists():
        return _run_comparison(comparison.Plan.load(path))
    if language_runs.is_language(path):
        from rgpo.studies import language_command

        return language_command.resume(path)
    with RunProgress(console, f"resuming {path}") as progress:
        statuses = _session_of(path).resume([path], progress)
    return _tell_run(path, statuses)


def evaluate(
    path: Annotated[Path, tyro.conf.Positional],
    episodes: int = 10,
    seed: int = 1_000_000,
    video: Path | None = None,
) -> int:
    """Play episodes with deterministic actions from a run's newest checkpoint.

    Args:
        path: The run directory.
        episodes: How many.
        seed: Seed of the first episode.
        video: Write the first episode to this mp4 file.
    """
    results = _session_of(path).evaluate_run(path, episodes=episodes, seed=seed, video=video)
    mean = sum(results.returns) / len(results.returns)
    console.print(
        f"return {mean:.1f} over {episodes} episodes "
        f"(lowest {min(results.returns):.1f}, highest {max(results.returns):.1f}), "
        f"mean length {sum(results.lengths) / len(results.lengths):.0f}"
    )
    if video is not None:
        console.print(f"video: {video}")
    return 0


def report(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("report.html")
) -> int:
    """Write one self-contained HTML report of any runs or comparisons, and print their table.

    Args:
        paths: Run directories, or directories that hold some.
        out: The file to write.
    """
    runs = _runs_below(paths)
    if language_runs.only_language(runs):
        return _report_language(runs, out)
    curves = {}
    for run in runs:
        config = _session_of(run).config_of(Run.open(run))
        curves[config.label] = objective_curve(config.resolve())
    print_table(final_table(runs), console)
    title = "Comparison of " + ", ".join(curves)
    written = write_report(runs, out, title=title, command=_command(), objective_curves=curves)
    console.print(f"report: {written.resolve()}")
    return 0


def _report_language(runs: list[Path], out: Path) -> int:
    for title, heads, rows in language_runs.tables(runs):
        table = Table(title=title, title_justify="left", box=None)
        for heading in heads:
            table.add_column(heading, justify="left" if heading == heads[0] else "right")
        table.columns[0].overflow = "fold"
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"report: {language_runs.write(runs, out, _command()).resolve()}")
    return 0


def objectives(
    action: Annotated[Literal["list", "plot"], tyro.conf.Positional] = "list",
    names: tuple[str, ...] = (),
    out: Path = Path("objectives.html"),
) -> int:
    """List every recipe with its paper and defaults, or plot value g and weight w.

    Args:
        action: list or plot.
        names: Only these recipes.
        out: The HTML file that plot writes.
    """
    try:
        chosen = [recipes.get(n) for n in names] if names else list(recipes.recipes())
    except ValueError as error:
        raise RgpoError(str(error)) from None
    if action == "plot":
        written = write_objectives({r.name: objective_curve(r) for r in chosen}, out)
        console.print(f"curves of {len(chosen)} recipes: {written.resolve()}")
        return 0
    table = Table("recipe", "what it is, its paper and its defaults", show_lines=True)
    table.columns[0].no_wrap = True
    for recipe in chosen:
        told = [escape(recipe.summary), f"[dim]{escape('; '.join(_facts(recipe)))}[/]"]
        if names:
            told.append(f"[dim]source: {escape(recipe.confidence)}[/]")
        table.add_row(recipe.name, "\n".join(told))
    console.print(table)
    return 0


def _facts(recipe: recipes.Recipe) -> Iterator[str]:
    yield recipe.paper
    yield from (f"{k} {_short(v)}" for k, v in recipe.hyper_parameters().items())
    if found := ", ".join(needs(recipe)):
        yield f"needs {found}"
    yield f"sup |w| {_short(round(recipe.objective.sup_weight, 4))}"


def verify(out: Path = Path("runs/verify"), quick: tyro.conf.UseCounterAction[int] = 0) -> int:
    """Check the paper's claims on this machine, repaired where they do not hold as published.

    Args:
        out: Directory of verify.html and verify.json.
        quick: Reduced size, for tests: fewer problems and samples.
    """
    from rgpo.studies.verify import run as verification

    verification.prepare(out)
    with console.status("") as status:
        findings = verification.run(
            quick=bool(quick),
            starting=lambda name: status.update(f"checking {name}"),
            done=lambda name, seconds: console.print(f"{name:12} {seconds:5.1f} s"),
        )
    verification.print_findings(findings, console)
    page = verification.write(findings, out, quick=bool(quick))
    console.print(f"figures: {page.resolve()}")
    failed = [finding.name for finding in findings if not finding.holds]
    if failed:
        console.print(f"[bold red]failed:[/] {', '.join(failed)}")
    return 1 if failed else 0


def study() -> int:
    """Named, reproducible studies: `rgpo study --help` lists them."""
    raise RgpoError("which study? `rgpo study --help` lists them")


def rlvr() -> int:
    """Train a language model on rewards that a program verifies; resumable."""
    raise NotImplementedError  # `_with_jobs` has the real one


def rlhf() -> int:
    """Train a language model on preferences, from the pairs to the report; resumable."""
    raise NotImplementedError  # `_with_jobs` has the real one


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "compare": compare,
    "resume": resume,
    "eval": evaluate,
    "report": report,
    "objectives": objectives,
    "verify": verify,
    "study": study,
    "rlvr": rlvr,
    "rlhf": rlhf,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `rgpo`: exit status 0, 1 for an error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    torch.set_num_threads(1)  # tiny matrix products: a second thread only spins
    warnings.showwarning = _show_warning
    commands, program = COMMANDS, "rgpo"
    if arguments[:1] == ["study"] and len(arguments) > 1:
        commands, program, arguments = STUDIES, "rgpo study", arguments[1:]
    if arguments[:1] == ["train"] and _option(arguments, "--algo") in ("reparam-ppo", "reppo"):
        commands = COMMANDS | {"train": train_reparam}
    try:
        if program == "rgpo":  # rlhf is also a study
            commands, arguments = _with_jobs(commands, arguments)
        status = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog=program,
            description=(
                "Policy optimisation that controls how far data may be from the policy. "
                "Add --debug to any command for the traceback of an error."
            ),
            args=arguments,
            config=(tyro.conf.FlagConversionOff,),
        )
    except RgpoError as error:
        if debug:
            raise
        Console(stderr=True).print(
            f"[bold red]rgpo:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if debug or not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        sys.exit(1)  # as rich does
    sys.exit(status)


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as after `rgpo ... | head`."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _with_jobs(
    commands: dict[str, Callable[..., int]], arguments: list[str]
) -> tuple[dict[str, Callable[..., int]], list[str]]:
    """Language jobs in place of their names; their packages take seconds to import."""
    asked, of_job = arguments[:1], map(language_runs.is_language, map(Path, arguments[1:]))
    if asked not in (["rlvr"], ["rlhf"]) and not (asked == ["eval"] and any(of_job)):
        return commands, arguments
    from rgpo.studies import language_command

    jobs = language_command.JOBS | {"eval": language_command.evaluate}
    return commands | jobs, language_command.with_file(arguments)


def _option(arguments: list[str], name: str) -> str | None:
    """The value of --name VALUE or --name=VALUE, the last one if repeated."""
    words = [part for word in arguments for part in word.split("=", 1)]
    found = [value for key, value in itertools.pairwise(words) if key == name]
    return found[-1] if found else None


def _session_of(path: Path) -> Any:
    """The module that trains, resumes and evaluates runs like the one in this directory."""
    if not (path / "config.json").exists():  # control's says what is missing
        return session
    algo = Run.open(path).config.get("algo", "score-function")
    return session if algo == "score-function" else reparam_session


def _train(config: Any, sessions: Any, out: Path | None) -> int:
    for sentence in config.warnings():
        warnings.warn(sentence, stacklevel=1)
    default = f"{_file_name(config.env)}-{_file_name(config.label)}-seed{config.seed}"
    directory = out or Path("runs") / default
    with RunProgress(console, f"{config.label} on {config.env}") as progress:
        statuses = sessions.start([config], [directory], progress)
    return _tell_run(directory, statuses)


def _run_comparison(planned: comparison.Plan) -> int:
    updates = planned.configs[0].updates
    labels = [[c.label for c in group] for group in planned.groups]
    with ComparisonProgress(console, labels, updates, planned.configs[0].batch_size) as progress:
        statuses, errors = comparison.run(planned, progress)
    if planned.started:
        print_table(final_table([planned.path(c) for c in planned.started]), console)
        console.print(f"report: {comparison.report(planned).resolve()}")
    failed = [c for c, s in zip(planned.configs, statuses, strict=True) if s == "failed"]
    for config in failed:
        message = Run.open(planned.path(config)).status["message"]
        console.print(f"[red]failed[/] {config.label} seed {config.seed}: {escape(message)}")
        errors = [error for error in errors if error != message]
    if errors:
        raise RgpoError("; ".join(errors))
    if set(statuses) - {"finished", "failed"}:
        console.print(f"interrupted: `rgpo resume {planned.directory}` continues it")
        return 130
    return 1 if failed else 0


def _tell_run(directory: Path, statuses: list[str]) -> int:
    run = Run.open(directory)
    result = run.status.get("result") or {}
    for key, name in (
        ("final_return", "training return, last 10% of steps"),
        ("eval_return", "evaluation return, deterministic actions"),
    ):
        if result.get(key) is not None:
            console.print(f"{name}: {result[key]:.1f}")
    console.print(f"run: {directory}   (`rgpo report {directory}` draws it)")
    if statuses[0] == "finished":
        return 0
    if statuses[0] != "interrupted":
        raise RgpoError(run.status["message"])
    console.print(f"interrupted: {run.status['message']}")
    return 130


def _runs_below(paths: tuple[Path, ...]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        # a model's folder has a config.json too, but is no run
        inside = sorted(p.parent for p in path.rglob("versions.json") if p.parent != path)
        found += [path] if (path / "config.json").exists() else inside
    if not found:
        raise RgpoError("there is no run in these directories: give the output of rgpo train")
    return found


def _command() -> str:
    return shlex.join(["rgpo", *sys.argv[1:]])


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, UserWarning):
        Console(stderr=True).print(f"[yellow]rgpo:[/] {message}", highlight=False, soft_wrap=True)
    elif os.environ.get("PYTHONWARNINGS"):
        sys.stderr.write(f"{category.__name__}: {message}\n")


if __name__ == "__main__":
    main()
