"""Many short runs on all cores, resumable: what every study is made of.

A study is a set of cells, one run each. Cells that can be trained as one computation make a job;
jobs run in worker processes with one thread each, so that the cores are never oversubscribed. The
result of every cell is a line of results.jsonl, written by the parent as soon as its job is done: a
study that was killed, at any moment, continues with the cells that have no line yet.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rgpo.errors import RgpoError
from rgpo.runs.atomic import write_atomic

RESULTS, LENGTHS = "results.jsonl", "lengths.json"

Result = dict[str, Any]
"""The fields of a cell and what was measured."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    task: str
    """Environment id or language task."""

    arm: str
    """Recipe, or recipe with hyper-parameters: "rgpo:sharpness=4,kl_target=0.02"."""

    staleness: int
    """Updates between the policy that acts and the one that learns."""

    seed: int
    learning_rate: float

    def key(self) -> tuple[Any, ...]:
        """What tells this cell from every other one of the study."""
        return tuple(asdict(self).values())


Train = Callable[[Sequence[Cell]], list[Result]]
"""Trains cells together and returns what was measured, in their order. Picklable."""

Watch = Callable[[int, int, list[Result]], None]
"""Called after every job with the cells done, those in total, and the job's results."""


def read_results(directory: Path) -> list[Result]:
    """Every result so far, one for each cell; a line that was cut off by a kill is left out."""
    path = directory / RESULTS
    if not path.exists():
        return []
    stat = path.stat()
    return list(_parsed(path, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=4)
def _parsed(path: Path, _changed: int, _size: int) -> tuple[Result, ...]:
    """The lines of a file that has not changed are parsed once: reports ask for them often."""
    lines = path.read_text().splitlines(keepends=True)
    whole = lines if not lines or lines[-1].endswith("\n") else lines[:-1]
    try:
        results = [json.loads(line) for line in whole]
    except ValueError as error:
        raise RgpoError(f"{path} is damaged ({error}): move it away to start again") from None
    found: dict[tuple[Any, ...], Result] = {}
    for result in results:
        found.setdefault(cell_of(result).key(), result)
    return tuple(found.values())


def cell_of(result: Result) -> Cell:
    """The cell whose result this is."""
    return Cell(**{name: result[name] for name in Cell.__dataclass_fields__})


def missing(cells: Iterable[Cell], directory: Path) -> list[Cell]:
    """The cells that have no result yet, in their order, each once."""
    done = {cell_of(result).key() for result in read_results(directory)}
    return [cell for cell in dict.fromkeys(cells) if cell.key() not in done]


def run_jobs(
    jobs: Sequence[Sequence[Cell]],
    train: Train,
    directory: Path,
    *,
    workers: int | None = None,
    watch: Watch | None = None,
) -> None:
    """Run the jobs in `workers` processes (default: one per core), appending to results.jsonl.

    Ctrl-C ends at once: at most the jobs in progress are lost. Raises the first error of a job,
    after those in progress have ended and their results are written; RgpoError if another process
    trains in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        _run_all(jobs, train, directory, workers, watch)


def _run_all(
    jobs: Sequence[Sequence[Cell]],
    train: Train,
    directory: Path,
    workers: int | None,
    watch: Watch | None,
) -> None:
    _drop_cut_line(directory / RESULTS)
    total, done = sum(map(len, jobs)), 0
    context = multiprocessing.get_context("spawn")
    number = min(workers or os.cpu_count() or 1, max(len(jobs), 1))
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_deaf_worker)
    waiting, running = list(reversed(jobs)), set[Future[list[Result]]]()
    errors: list[BaseException] = []
    try:
        while waiting or running:
            while waiting and len(running) < number:
                running.add(pool.submit(train, waiting.pop()))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda one: one.exception() is not None):
                error = future.exception()
                if error is not None and not isinstance(error, BrokenProcessPool):
                    errors.append(error)
                    waiting.clear()
                    continue
                results = future.result()  # or the broken pool's error
                _append(directory / RESULTS, results)
                done += len(results)
                if watch is not None:
                    watch(done, total, results)
    except BrokenProcessPool as error:
        less = "; --workers 1 needs less" if number > 1 else ""
        raise RgpoError(
            "a worker process was killed, perhaps for lack of memory: the same command goes on "
            f"with the runs that are left{less}"
        ) from error
    except BaseException:
        for process in list(pool._processes.values()):  # noqa: SLF001
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if errors:
        raise errors[0]


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else trains in this directory meanwhile; the lock ends with the process."""
    import fcntl  # not on Windows, where the rest of this module can be imported

    with (directory / RESULTS).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RgpoError(
                f"another process trains in {directory}: wait for its end, or choose another --out"
            ) from None
        yield


def hold_lengths(directory: Path, lengths: Mapping[str, int]) -> None:
    """Note how long a run of each task is, in steps or updates.

    RgpoError if the directory holds runs of another length: a cell does not tell them apart.
    """
    path = directory / LENGTHS
    before = json.loads(path.read_text()) if path.exists() else {}
    for task, length in lengths.items():
        if before.setdefault(task, length) != length:
            raise RgpoError(
                f"the runs of {task} in {directory} have a length of {before[task]:,}, not "
                f"{length:,}: ask for {before[task]:,} again, or choose another --out"
            )
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(before).encode())


def run_phases(
    phases: Sequence[tuple[str, Callable[[], list[Cell]]]],
    trains: Any,
    directory: Path,
    *,
    workers: int | None = None,
    watch: Callable[[str], Watch] | None = None,
) -> None:
    """Run phase after phase from where they stand; the cells of one depend on those before it.

    `trains` is a `Train` that groups cells into `jobs` and knows the `lengths` of its runs;
    `watch(phase)` is told of every job.
    """
    hold_lengths(directory, trains.lengths)
    for name, cells in phases:
        jobs = trains.jobs(missing(cells(), directory))
        if jobs:
            told = None if watch is None else watch(name)
            run_jobs(jobs, trains, directory, workers=workers, watch=told)


def _deaf_worker() -> None:
    """One thread of work; Ctrl-C is the parent's to handle, and its end, however it came, ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _append(path: Path, results: Sequence[Result]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(result) + "\n" for result in results))
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    """Remove what a kill left of a last line, so that the next one starts afresh."""
    if path.exists():
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
