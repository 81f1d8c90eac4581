"""A run directory: everything that a run leaves behind, each file readable while it trains.

config.json     the resolved configuration
versions.json   command line, package versions, git revision, machine, trackers
metrics.jsonl   one strict JSON object per update
status.json     how the run ended; absent while it runs, and if it was killed
events/         TensorBoard
checkpoints/    see rgpo.runs.checkpoint
"""

import importlib.metadata
import io
import json
import math
import numbers
import os
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import rgpo
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.atomic import json_bytes, nonfinite_path, write_atomic
from rgpo.runs.trackers import Tracker, TrackerName, open_trackers, require_trackers

_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "envpool", "ale-py", "rgpo")


class Run:
    """One run directory; made by `Run.create`, found again by `Run.open`."""

    def __init__(self, path: Path, config: Mapping[str, Any], versions: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config
        self.versions = versions
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._file: io.FileIO | None = None
        self._trackers: list[Tracker] = []

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        *,
        trackers: Sequence[TrackerName] = ("tensorboard",),
    ) -> Self:
        """Make a new run directory.

        Raises RgpoError, before anything is written, if a tracker is unknown or not installed, if
        `path` is there and not empty, or if `config` holds NaN or infinity.
        """
        require_trackers(trackers)
        where = nonfinite_path(config)
        if where is not None:
            raise RgpoError(f"The setting {where} is not finite: give a number, or none.")
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise RgpoError(
                f"{path} is not empty: resume it with `rgpo resume {path}` or choose another path."
            )
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RgpoError(
                f"Could not make the run directory {path} ({error.strerror}): choose another path."
            ) from error
        write_atomic(path / "versions.json", json_bytes(_versions(trackers)))
        write_atomic(path / "config.json", json_bytes(config))  # last: it makes this a run
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run to read it or to continue it; nothing is written by this.

        Raises RgpoError if `path` is no run or its JSON is damaged.
        """
        config, versions = (_read_json(path / name) for name in ("config.json", "versions.json"))
        if config is None or versions is None:
            raise RgpoError(f"{path} is no run directory: it lacks config.json or versions.json.")
        return cls(path, config, versions)

    @property
    def status(self) -> dict[str, Any]:
        """How the run ended; `{"status": "unfinished"}` while it trains and after a kill."""
        return _read_json(self.path / "status.json") or {"status": "unfinished", "message": ""}

    def log(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row, which has an `update`, to metrics.jsonl and the trackers.

        NaN and infinity become null and their names a list under `not_finite`. Raises RgpoError if
        the disk is full; the rows that were there stay whole.
        """
        if row.get("update") is None:
            raise ValueError("a row of metrics needs its update")
        plain = {name: _plain(value) for name, value in row.items()}
        given = {name: value for name, value in plain.items() if value is not None}
        nonfinite = [name for name, value in given.items() if not math.isfinite(value)]
        clean: dict[str, Any] = plain | dict.fromkeys(nonfinite)
        if nonfinite:
            clean["not_finite"] = nonfinite
        if self._file is None:
            self._file = self._start_writing()
        _append(self._file, json_bytes(clean, indent=None), self._metrics)
        for tracker in self._trackers:
            tracker.log({name: given[name] for name in given if name not in nonfinite})

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows; a last line that is half-written (no newline) does not count.

        Raises RgpoError that names the line if one before it is damaged.
        """
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_bytes().split(b"\n")[:-1]
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise RgpoError(
                    f"Line {number} of {self._metrics} is damaged: delete that line to go on."
                ) from None
        return rows

    def truncate_after(self, update: int) -> None:
        """Drop what is newer than `update`: a resumed run makes it again.

        The rows, all or none of them, and the checkpoints that are whole.
        """
        self.close()
        checkpoint.truncate_after(self.checkpoints, update)
        rows = [row for row in self.metrics() if row["update"] <= update]
        write_atomic(self._metrics, b"".join(json_bytes(row, indent=None) for row in rows))

    def finish(
        self,
        status: Literal["finished", "interrupted", "failed"],
        message: str = "",
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """Write status.json and close; NaN and infinity in `result` become null."""
        document = {
            "status": status,
            "message": message,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "result": None if result is None else _without_nonfinite(result),
        }
        write_atomic(self.path / "status.json", json_bytes(document))
        self.close()

    def close(self) -> None:
        """Close the files and trackers; the next `log` opens them again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def _start_writing(self) -> io.FileIO:
        """Open metrics.jsonl behind its last whole line, and the trackers; the run is running."""
        rows = self.metrics()
        last = rows[-1] if rows else {"update": -1}
        next_step = int(last.get("step", last["update"])) + 1
        names = self.versions["trackers"]
        identity = self.versions["identity"]
        self._trackers = open_trackers(names, self.path, self.config, identity, next_step)
        (self.path / "status.json").unlink(missing_ok=True)
        file = io.FileIO(self._metrics, "a+")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        return file


def _append(file: io.FileIO, line: bytes, path: Path) -> None:
    """Write the whole of `line` at the end of `file`, or nothing and raise RgpoError."""
    size = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        file.truncate(size)
        raise RgpoError(
            f"Could not write {path} ({error.strerror}): free some space, then resume the run."
        ) from error


def _plain(value: Any) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in `path`, None if there is none; RgpoError if it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        raise RgpoError(f"{path} is damaged: it is not a JSON object.") from None


def _versions(trackers: Sequence[str]) -> dict[str, Any]:
    """Return what made this run, enough to make it again."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "identity": uuid.uuid4().hex[:8],
        "trackers": list(trackers),
        "python": platform.python_version(),
        **{name: _package_version(name) for name in _PACKAGES},
        "git": _git(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Return the revision of the rgpo checkout and whether it was changed; None if installed."""
    root = Path(rgpo.__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed rgpo may lie inside another repository
        return None
    try:
        revision, changes = (
            subprocess.run(  # noqa: S603 (fixed arguments)
                ["git", "-C", str(root), *arguments],  # noqa: S607
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "dirty": bool(changes)}
