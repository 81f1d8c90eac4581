"""Recipes side by side on one task, several seeds each: trained together, then reported."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import queue
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from rgpo.control import memory, session
from rgpo.control.config import TrainConfig
from rgpo.control.fast import FastLearner
from rgpo.control.train import Rows, Trainer
from rgpo.errors import RgpoError
from rgpo.runs.atomic import json_bytes, write_atomic
from rgpo.runs.directory import Run
from rgpo.runs.report import write_report
from rgpo.settings import split_arm
from rgpo.studies.curves import objective_curve

PLAN = "comparison.json"

Watch = Callable[[int, int, int, Rows], None]
"""Called with the index of a group, its updates done, those in total, and each run's row."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which runs there are, and which are trained together in one process."""

    directory: Path
    """Where the runs, the plan and the report go."""

    configs: tuple[TrainConfig, ...]
    """Every run, in the order of the arms."""

    deal: tuple[tuple[int, ...], ...]
    """Groups of runs by their places in `configs`, one process each, those that take longest
    first."""

    parallel: int
    """Processes at a time; the other groups wait."""

    threads: int
    """Threads of each: 1, except where a CNN can use the cores that are left."""

    command: str
    """The command line, for the report."""

    @property
    def groups(self) -> list[list[TrainConfig]]:
        """The runs of each group."""
        return [[self.configs[i] for i in group] for group in self.deal]

    @property
    def started(self) -> list[TrainConfig]:
        """The runs that have a directory."""
        return [c for c in self.configs if (self.path(c) / "config.json").exists()]

    def path(self, config: TrainConfig) -> Path:
        """The directory of one run."""
        name = "-".join(part.replace("=", "") for part in config.label.split())
        return self.directory / f"{name}-seed{config.seed}"

    def save(self) -> None:
        """Write the plan, so that `resume` finds it."""
        document = dataclasses.asdict(self) | {"directory": None}
        write_atomic(self.directory / PLAN, json_bytes(document))

    @classmethod
    def load(cls, directory: Path) -> "Plan":
        """Read a plan; RgpoError if there is none or it is damaged."""
        try:
            document = json.loads((directory / PLAN).read_text())
            document |= {
                "directory": directory,
                "configs": tuple(TrainConfig.from_json(c) for c in document["configs"]),
                "deal": tuple(tuple(group) for group in document["deal"]),
            }
            return cls(**document)
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

    An arm is a recipe, or a recipe with what `TrainConfig.set` takes:
    "rgpo:sharpness=4,learning_rate=1e-3".
    Warns where the runs do not fit into memory together, and plans as many at a time as do.
    RgpoError for an unknown recipe or hyper-parameter, an arm given twice, fewer than 1 seed, and
    for a task or recipe that cannot be trained.
    """
    if seeds < 1:
        raise RgpoError(f"seeds must be at least 1, got {seeds}")
    if len(set(arms)) < len(arms) or not arms:
        raise RgpoError("give at least one recipe, and each one once")
    configs = []
    for arm in arms:
        recipe, options = split_arm(arm)
        change = {"recipe": recipe, "set": (*base.set, *options)}
        for seed in range(seeds):
            configs.append(dataclasses.replace(base, **change, seed=base.seed + seed))
            configs[-1].resolve()
    cores = os.cpu_count() or 1
    probes = {c.label: _Probe(c) for c in configs[::seeds]}
    kinds = [probes[c.label].fast for c in configs]
    parallel = min(workers or cores, len(configs))
    parallel, most = _fit(parallel, len(configs), list(probes.values()))
    deal = _deal(kinds, parallel, most)
    images = any(p.images for p in probes.values())
    threads = max(1, cores // parallel) if images else 1
    return Plan(directory, tuple(configs), deal, parallel, threads, command)


class _Probe:
    """What one run of an arm shows about all of them, before any is trained."""

    def __init__(self, config: TrainConfig) -> None:
        trainer = Trainer([config])
        memory.require_room(trainer)
        self.fast = isinstance(trainer.learner, FastLearner)
        self.images = "image" in trainer.environments.observation_shapes
        self.footprint = memory.footprint(trainer)
        self.free = memory.room(trainer)
        trainer.environments.close()


def _fit(parallel: int, runs: int, probes: list[_Probe]) -> tuple[int, int]:
    """How many processes at a time, and how many runs in each, memory has room for."""
    run = max(p.footprint.per_run for p in probes)
    process = max(p.footprint.per_process for p in probes)
    free = min(p.free for p in probes)
    need, budget = parallel * process + runs * run, memory.SHARE * free
    if need <= budget:
        return parallel, runs
    parallel = max(1, min(parallel, int(budget / (process + run))))
    most = memory.Footprint(run, process).runs(budget / parallel)
    warnings.warn(
        f"{runs} runs need about {need / 2**30:.1f} GiB ({run / 2**20:.0f} MiB each) and "
        f"{free / 2**30:.1f} are free: training {min(runs, parallel * most)} at a time",
        stacklevel=3,
    )
    return parallel, most


def _deal(kinds: Sequence[bool], parallel: int, most: int) -> tuple[tuple[int, ...], ...]:
    """Groups to train together, of at most `most` runs; those of the fast learner by themselves.

    Either kind is spread over all processes, the slow one first, so that no core is idle for long.
    A stride keeps every group's share of each arm alike, and equal objectives together.
    """
    groups: list[tuple[int, ...]] = []
    for fast in (False, True):
        kind = [i for i, is_fast in enumerate(kinds) if is_fast == fast]
        waves = math.ceil(len(kind) / (parallel * most))
        number = min(waves * parallel, len(kind))
        groups += [tuple(kind[i::number]) for i in range(number)]
    return tuple(groups)


def run(comparison: Plan, watch: Watch | None = None) -> tuple[list[str], list[str]]:
    """Train what is not finished, group by group in parallel processes.

    Returns every run's final status, and a sentence for every group that could not go on; the
    others are trained to their end. A group that was interrupted continues from its newest common
    checkpoint; one without starts again. Raises RgpoError, before anything is written, if the
    directory is taken.
    """
    if not (comparison.directory / PLAN).exists():
        _refuse_directory(comparison.directory)
        comparison.directory.mkdir(parents=True, exist_ok=True)
        comparison.save()
    context = multiprocessing.get_context("spawn")
    events: Queue[Any] = context.Queue()
    stop = context.Event()
    workers = [
        context.Process(target=_worker, args=(comparison, index, events, stop), daemon=True)
        for index in range(len(comparison.deal))
    ]
    with _stopping(stop):
        errors = _attend(workers, comparison.parallel, events, stop, watch)
    started = comparison.started
    statuses = [
        str(Run.open(comparison.path(c)).status["status"]) if c in started else "interrupted"
        for c in comparison.configs
    ]
    return statuses, sorted(set(errors))


def report(comparison: Plan) -> Path:
    """Write report.html of the comparison's runs and return its path."""
    configs = comparison.started
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


def _refuse_directory(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise RgpoError(f"{directory} is not an empty directory: choose another --out")


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


def _start(worker: Any) -> None:
    """Start it deaf to Ctrl-C: the terminal sends it to the workers too, even while they import."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _attend(
    workers: list[Any], parallel: int, events: "Queue[Any]", stop: Event, watch: Watch | None
) -> list[str]:
    """Start workers, `parallel` at a time, and pass progress on until all have ended; errors."""
    errors: list[str] = []
    waiting, running = dict(enumerate(workers)), dict[int, Any]()
    while waiting or running:
        if stop.is_set():
            waiting.clear()
        while waiting and len(running) < parallel:
            index = next(iter(waiting))
            running[index] = waiting.pop(index)
            _start(running[index])
        try:
            kind, index, *rest = events.get(timeout=1)
        except queue.Empty:
            for index, worker in list(running.items()):
                if not worker.is_alive() and events.empty():
                    del running[index]
                    errors.append(_death(worker))
            continue
        if kind == "progress" and watch is not None:
            watch(index, *rest)
        elif kind == "warning":
            warnings.warn(rest[0], stacklevel=3)
        elif kind == "error":
            errors.append(rest[0])
        elif kind == "end":
            worker = running.pop(index)
            worker.join()
            if worker.exitcode:  # an error that nobody foresaw, its traceback is on the terminal
                errors.append(_death(worker))
    return errors


def _death(worker: Any) -> str:
    return f"a worker died with exit code {worker.exitcode}: resume the comparison to go on"


def _worker(comparison: Plan, index: int, events: "Queue[Any]", stop: Event) -> None:
    torch.set_num_threads(comparison.threads)
    os.setpgrp()  # from here on Ctrl-C in the terminal reaches the parent alone
    parent = multiprocessing.parent_process()

    def tell(update: int, total: int, rows: Rows) -> None:
        # asked before the event goes out: whoever stops at the last one finds a finished run
        ended = stop.is_set() or not parent.is_alive()  # alone it would race a resumed comparison
        events.put(("progress", index, update, total, rows))
        if ended:
            signal.raise_signal(signal.SIGINT)

    def warn(message: Warning | str, *_: Any) -> None:
        events.put(("warning", index, str(message)))

    warnings.showwarning = warn
    try:
        _train_group(comparison, index, tell)
    except RgpoError as error:
        events.put(("error", index, str(error)))
    except KeyboardInterrupt:  # the second Ctrl-C: what was saved stays
        pass
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
    if not open_runs:  # what a person sees counts them too
        updates = group[0].updates
        tell(updates, updates, [(Run.open(path).metrics() or [{}])[-1] for path in paths])
        return

    def placed(update: int, total: int, rows: Rows) -> None:
        """Each run's row where the group has the run; nothing for those that have ended."""
        found: Rows = [{} for _ in group]
        for i, row in zip(open_runs, rows, strict=True):
            found[i] = row
        tell(update, total, found)

    if all(states[i] == "resumable" for i in open_runs):
        session.resume([paths[i] for i in open_runs], placed)
        return
    for i in open_runs:  # killed before all of them had a checkpoint: nothing worth keeping
        (paths[i] / "config.json").unlink(missing_ok=True)  # what is left is a run no more
        shutil.rmtree(paths[i], ignore_errors=True)
    session.start([group[i] for i in open_runs], [paths[i] for i in open_runs], placed)


def _state(path: Path) -> str:
    if not (path / "config.json").exists():
        return "missing"
    status = Run.open(path).status["status"]
    if status in ("finished", "failed"):
        return str(status)
    return "resumable" if any((path / "checkpoints").glob("*.json")) else "missing"
