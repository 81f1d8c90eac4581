"""Files that are whole or absent: the one way in which a run writes JSON and checkpoints."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgpo.errors import RgpoError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, a crash or a full disk never sees half of it.

    A temporary file in the same folder is written and synced, renamed over `path`, and the folder
    is synced, because the rename itself lives in the folder. The temporary name is fixed, so that
    a killed process leaves at most one per file and the next write takes it over. One writer per
    file at a time.

    Raises RgpoError (naming the file) if the disk is full or the folder cannot be written; `path`
    is then as it was before.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _unlink_quietly(temporary)
        raise RgpoError(
            f"Could not write {path} ({error.strerror or error}): free some space or make the "
            "folder writable, then resume the run."
        ) from error


def temporary_path(path: Path) -> Path:
    """Return the name under which `write_atomic` prepares `path`."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (renames, deletions) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any, *, indent: int | None = 1) -> bytes:
    """Encode `value` as strict JSON in UTF-8; a Path becomes its text.

    Python's `json` writes integers of any size and floats by their shortest exact form, so both
    come back equal. Raises ValueError for NaN and infinity, which JSON does not have, and
    TypeError for anything that is not JSON.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False, default=_path_text)
    return (text + "\n").encode()


def nonfinite_path(value: Any, name: str = "") -> str | None:
    """Return where in nested mappings and lists the first NaN or infinity stands, else None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return None
    found = (nonfinite_path(item, f"{name}.{key}" if name else key) for key, item in items)
    return next((path for path in found if path is not None), None)


def _path_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")


def _unlink_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the first error is the one worth telling
