"""A job of several stages in one run directory: each stage is made once, resumes inside itself.

The same command continues an interrupted job: finished stages are read, the one that was under way
continues from its newest whole checkpoint.
"""

import errno
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import datasets
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging

from rgpo.errors import RgpoError
from rgpo.runs.atomic import json_bytes, write_atomic
from rgpo.runs.directory import Run

DONE = "done.json"
WHOLE = "whole"
"""Written into a checkpoint after everything else of it."""

Watch = Callable[[str, float, str], None]
"""Told the stage, its done fraction in [0, 1] and what is worth seeing."""

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
DISK_WORDS = ("PytorchStreamWriter failed", "No space left", "File too large", "I/O error")


class Job:
    """The stages of one run directory."""

    def __init__(self, run: Run, watch: Watch) -> None:
        self.run, self.watch = run, watch

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], watch: Watch) -> Self:
        """A new run directory, or the one that is there with the same configuration.

        One in which no stage has begun, such as after a refusal, takes the new configuration.
        """
        if not (path / "config.json").exists():
            return cls(Run.create(path, config), watch)
        if not any(p.is_dir() and p.name not in ("checkpoints", "events") for p in path.iterdir()):
            write_atomic(path / "config.json", json_bytes(config))
        run = Run.open(path)
        wanted = json.loads(json_bytes(config))
        differ = sorted(
            key for key in {*run.config, *wanted} if run.config.get(key) != wanted.get(key)
        )
        if differ:
            raise RgpoError(
                f"{path} holds a run with another {differ[0]} ({run.config.get(differ[0])!r}, "
                f"not {wanted.get(differ[0])!r}): choose another --out"
            )
        return cls(run, watch)

    def stage(self, name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What `make(folder)` returned, now or in an earlier session."""
        folder = self.run.path / name
        if (folder / DONE).exists():
            return dict(json.loads((folder / DONE).read_bytes()))
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            self.watch(name, 0.0, "")
            found = make(folder)
            found["seconds"] = time.perf_counter() - started
            self.watch(name, 1.0, "")
            write_atomic(folder / DONE, json_bytes(found))
        return found

    def train(self, trainer: Trainer, stage: str, show: tuple[str, ...], *, log: bool) -> None:
        """Run a trainer to its end, from the newest whole checkpoint of its output folder."""
        folder = Path(trainer.args.output_dir)
        start = newest_checkpoint(folder)
        if log:
            step = -1 if start is None else int(start.name.rpartition("-")[2])
            self.run.truncate_after(step)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Watching(self, stage, show, log=log))
        trainer.train(resume_from_checkpoint=None if start is None else str(start))

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Write how the job ended, also when it did not end well."""
        try:
            yield
        except KeyboardInterrupt:
            self.run.finish("interrupted", "stopped by the user: the same command continues it")
            raise
        except RgpoError as error:
            self.run.finish("failed", str(error))
            raise


class _Watching(TrainerCallback):
    """Rows for metrics.jsonl, progress, and the mark of a whole checkpoint."""

    def __init__(self, job: Job, stage: str, show: tuple[str, ...], *, log: bool) -> None:
        self.job, self.stage, self.show, self.log = job, stage, show, log
        self.note, self.started = "", time.perf_counter()

    def on_log(self, _: Any, state: Any, __: Any, logs: Any = None, **___: Any) -> None:
        """One row per update."""
        row = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "train_runtime" in row:
            return
        found = {key: row[key] for key in self.show if key in row}
        self.note = "  ".join(f"{key} {value:.3f}" for key, value in found.items())
        if self.log:
            seconds = time.perf_counter() - self.started
            self.job.run.log({"update": state.global_step, **row, "seconds": seconds})

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Move the bar."""
        self.job.watch(self.stage, state.global_step / max(state.max_steps, 1), self.note)

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Everything of this checkpoint is written."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if folder.exists():
            (folder / WHOLE).touch()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a trainer; those that were cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for broken in [path for path in found if not (path / WHOLE).exists()]:
        shutil.rmtree(broken)
    whole = [path for path in found if path.exists()]
    return whole[-1] if whole else None


def cache_folder() -> Path:
    """Where models are kept between runs: $RGPO_CACHE, else ~/.cache/rgpo."""
    return Path(os.environ.get("RGPO_CACHE") or Path.home() / ".cache" / "rgpo")


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A folder in the cache, whole or absent: made in another one that is then renamed."""
    folder = cache_folder() / name
    if not folder.exists():
        temporary = folder.with_name(f".{name}.{os.getpid()}")
        try:
            with disk_errors(folder):
                temporary.mkdir(parents=True)
                make(temporary)
                if not folder.exists():
                    temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full or read-only disk as one sentence, whichever library noticed it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        known = isinstance(error, OSError) and error.errno in DISK
        if not known and not any(words in str(error) for words in DISK_WORDS):
            raise
        raise RgpoError(
            f"Could not write in {folder} ({error}): free some space, then give the same command "
            "again; what was finished is kept."
        ) from error


def parsed(text: str, name: str) -> dict[str, Any]:
    """Settings given as a JSON object on the command line."""
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RgpoError(f"--{name} takes a JSON object such as '{{\"key\": 1}}', got {text!r}")
    return found


def hush() -> None:
    """Bars and warnings of the libraries would tear those of the job."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def mean(numbers: list[float]) -> float:
    """Mean; NaN of nothing."""
    return sum(numbers) / len(numbers) if numbers else math.nan
