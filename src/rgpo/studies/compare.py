"""Recipes side by side on one task, several seeds each: trained together, then reported."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import queue
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from rgpo.control import session
from rgpo.control.config import TrainConfig
from rgpo.control.train import Rows, Trainer
from rgpo.errors import RgpoError
from rgpo.runs.atomic import json_bytes, write_atomic
from rgpo.runs.directory import Run
from rgpo.runs.report import write_report
from rgpo.studies.curves import objective_curve

PLAN = "comparison.json"

Watch = Callable[[int, int, int, Rows], None]
"""Called with the index of a group, its updates done, those in total, and each run's row."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which runs there are, and which are trained together in one process."""

    directory: Path
    """Where the runs, the plan and the report go."""

    groups: tuple[tuple[TrainConfig, ...], ...]
    """One process each."""

    command: str
    """The command line, for the report."""

    @property
    def configs(self) -> list[TrainConfig]:
        """Every run, in the order of the arms, those with natural gradients last."""
        dealt = itertools.chain(*itertools.zip_longest(*self.groups))  # as `_spread` dealt them out
        return sorted(filter(None, dealt), key=lambda config: config.resolve().step)

    def path(self, config: TrainConfig) -> Path:
        """The directory of one run."""
        name = "-".join(part.replace("=", "") for part in config.label.split())
        return self.directory / f"{name}-seed{config.seed}"

    def save(self) -> None:
        """Write the plan, so that `resume` finds it."""
        groups = [[dataclasses.asdict(c) for c in group] for group in self.groups]
        document = {"command": self.command, "groups": groups}
        write_atomic(self.directory / PLAN, json_bytes(document))

    @classmethod
    def load(cls, directory: Path) -> "Plan":
        """Read a plan; RgpoError if there is none or it is damaged."""
        try:
            document = json.loads((directory / PLAN).read_text())
            groups = tuple(
                tuple(TrainConfig.from_json(c) for c in group) for group in document["groups"]
            )
            return cls(directory, groups, document["command"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RgpoError(f"{directory} holds no readable comparison ({error})") from None


def plan(
    base: TrainConfig,
    arms: Sequence[str],
    seeds: int,
    directory: Path,
    *,
    workers: int | None = None,
    command: str = "",
) -> Plan:
    """Every arm with seeds base.seed, base.seed + 1, ..., spread evenly over worker processes.

    An arm is a recipe, or a recipe with hyper-parameters: "rgpo:sharpness=4,kl_target=0.02".
    RgpoError for an unknown recipe or hyper-parameter, an arm given twice, or fewer than 1 seed.
    """
    if seeds < 1:
        raise RgpoError(f"seeds must be at least 1, got {seeds}")
    if len(set(arms)) < len(arms) or not arms:
        raise RgpoError("give at least one recipe, and each one once")
    configs = []
    for arm in arms:
        recipe, _, changes = arm.partition(":")
        change = {"recipe": recipe, "set": (*base.set, *filter(None, changes.split(",")))}
        for seed in range(seeds):
            configs.append(dataclasses.replace(base, **change, seed=base.seed + seed))
            configs[-1].resolve()
    groups = _spread(configs, workers or os.cpu_count() or 1)
    return Plan(directory, groups, command)


def _spread(configs: list[TrainConfig], workers: int) -> tuple[tuple[TrainConfig, ...], ...]:
    """Groups to train together, about one per worker; natural-gradient runs among themselves.

    A stride keeps every group's share of each arm alike, and equal objectives together.
    """
    groups: list[tuple[TrainConfig, ...]] = []
    for step in ("gradient", "natural-gradient"):
        kind = [c for c in configs if c.resolve().step == step]
        number = min(max(1, round(workers * len(kind) / len(configs))), len(kind))
        groups += [tuple(kind[i::number]) for i in range(number)]
    return tuple(groups)


def run(comparison: Plan, watch: Watch | None = None) -> list[str]:
    """Train what is not finished, group by group in parallel processes; the runs' final status.

    A group that was interrupted continues from its newest common checkpoint; one without starts
    again. Refused before anything is written if the task or a recipe cannot be trained.
    """
    if not (comparison.directory / PLAN).exists():
        _refuse_early(comparison)
        comparison.directory.mkdir(parents=True, exist_ok=True)
        comparison.save()
    context = multiprocessing.get_context("spawn")
    events: Queue[Any] = context.Queue()
    stop = context.Event()
    workers = [
        context.Process(target=_worker, args=(comparison, index, events, stop), daemon=True)
        for index in range(len(comparison.groups))
    ]
    with _stopping(stop):
        _start(workers)
        errors = _listen(workers, events, watch)
    if errors:
        raise RgpoError("; ".join(sorted(set(errors))))
    return [Run.open(comparison.path(c)).status["status"] for c in comparison.configs]


def report(comparison: Plan) -> Path:
    """Write report.html of the comparison's runs and return its path."""
    configs = comparison.configs
    curves = {c.label: objective_curve(c.resolve()) for c in configs}
    arms = list(dict.fromkeys(c.label for c in configs))
    title = f"{' against '.join(arms)} on {configs[0].env}"
    return write_report(
        [comparison.path(c) for c in configs],
        comparison.directory / "report.html",
        title=title,
        command=comparison.command,
        objective_curves=curves,
    )


def _refuse_early(comparison: Plan) -> None:
    directory = comparison.directory
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise RgpoError(f"{directory} is not an empty directory: choose another --out")
    for group in comparison.groups:
        Trainer(group).environments.close()


@contextlib.contextmanager
def _stopping(stop: Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`, at which the workers save and end; the second ends at once."""

    def request(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, request) for number in session.STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(workers: list[Any]) -> None:
    """Start them deaf to Ctrl-C: the terminal sends it to them too, even while they import."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for worker in workers:
            worker.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _listen(workers: list[Any], events: "Queue[Any]", watch: Watch | None) -> list[str]:
    """Pass progress on until every worker has ended; the errors they reported."""
    errors: list[str] = []
    ended: set[int] = set()
    while len(ended) < len(workers):
        try:
            kind, index, *rest = events.get(timeout=1)
        except queue.Empty:
            for i, worker in enumerate(workers):
                if i not in ended and not worker.is_alive() and events.empty():
                    ended.add(i)
                    errors.append(
                        f"a worker died with exit code {worker.exitcode}: "
                        "resume the comparison to go on"
                    )
            continue
        if kind == "progress" and watch is not None:
            watch(index, *rest)
        elif kind == "error":
            errors.append(rest[0])
        elif kind == "end":
            ended.add(index)
    for worker in workers:
        worker.join()
    return errors


def _worker(comparison: Plan, index: int, events: "Queue[Any]", stop: Event) -> None:
    torch.set_num_threads(1)
    os.setpgrp()  # from here on Ctrl-C in the terminal reaches the parent alone
    parent = multiprocessing.parent_process()

    def tell(update: int, total: int, rows: Rows) -> None:
        events.put(("progress", index, update, total, rows))
        if stop.is_set() or not parent.is_alive():  # alone it would race a resumed comparison
            signal.raise_signal(signal.SIGINT)

    try:
        _train_group(comparison, index, tell)
    except RgpoError as error:
        events.put(("error", index, str(error)))
    finally:
        events.put(("end", index))
        if not parent.is_alive():
            events.cancel_join_thread()  # nobody reads it any more


def _train_group(comparison: Plan, index: int, tell: session.Progress) -> None:
    """Start, continue or leave alone one group, by what its directories hold."""
    group = comparison.groups[index]
    paths = [comparison.path(config) for config in group]
    states = [_state(path) for path in paths]
    open_runs = [i for i, state in enumerate(states) if state not in ("finished", "failed")]
    if not open_runs:
        return
    if all(states[i] == "resumable" for i in open_runs):
        session.resume([paths[i] for i in open_runs], tell)
        return
    for i in open_runs:  # killed before all of them had a checkpoint: nothing worth keeping
        shutil.rmtree(paths[i], ignore_errors=True)
    session.start([group[i] for i in open_runs], [paths[i] for i in open_runs], tell)


def _state(path: Path) -> str:
    if not (path / "config.json").exists():
        return "missing"
    status = Run.open(path).status["status"]
    if status in ("finished", "failed"):
        return str(status)
    return "resumable" if any((path / "checkpoints").glob("*.json")) else "missing"
