"""Checkpoints: tensors as safetensors, everything else as JSON, each checkpoint whole or named.

`update-000123.safetensors` is written first, `update-000123.json` last: the JSON file is the
commit mark. It holds the update, the state, the SHA-256 of the tensor file, and a SHA-256 of
itself, so that a flipped bit in either file is found.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from rgpo.errors import RgpoError
from rgpo.runs.atomic import json_bytes, nonfinite_path, sync_folder, write_atomic

_NAME = re.compile(r"(?P<stem>update-(?P<update>\d{6,})(\.(?P<suffix>\d+))?)\.(json|safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds."""

    update: int
    """Number of updates done when it was saved."""
    tensors: dict[str, torch.Tensor]
    """Parameters, optimiser moments, normalisation statistics, torch RNG state; on the CPU."""
    state: dict[str, Any]
    """Everything that is not a tensor."""
    path: Path
    """The JSON file."""


def save(
    folder: Path,
    update: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and return its JSON file; `prune` deletes those that are old.

    Nothing that is already there is overwritten, whole or corrupt: a name that is taken gets a
    suffix (`update-000123.1.json`).

    Raises RgpoError, before anything is written, if a tensor or the state holds NaN or infinity,
    and when the disk is full; ValueError if the state would not come back from JSON as it is
    (tuples, keys that are not strings).
    """
    if update < 0:
        raise ValueError(f"need update >= 0, got update={update}")
    _refuse_nonfinite(update, tensors, state)
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()  # views of one flat buffer must not share memory
    }
    data = safetensors.torch.save(copies)
    document = {
        "update": update,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "state": dict(state),
    }
    document["document_sha256"] = _digest(document)
    text = json_bytes(document)
    if json.loads(text)["state"] != document["state"]:
        raise ValueError("the state does not survive JSON: use string keys and lists, not tuples")

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".update-*.tmp"):  # of a process that was killed while it saved
        leftover.unlink(missing_ok=True)
    path = _free_path(folder, update)
    write_atomic(_tensor_path(path), data)
    try:
        write_atomic(path, text)
    except RgpoError:
        _tensor_path(path).unlink(missing_ok=True)
        raise
    return path


def prune(folder: Path, keep: int) -> None:
    """Delete whole checkpoints beyond the newest `keep`.

    Corrupt ones do not count and are never deleted: they are evidence. Runs that train together
    are pruned once all of them have saved, and truncated to the update that they resume from:
    whenever one is killed, they have an update in common.
    """
    if keep < 1:
        raise ValueError(f"need keep >= 1, got keep={keep}")
    _delete(folder, [path for path, _ in _newest_first(folder) if _is_whole(path)][keep:])


def truncate_after(folder: Path, update: int) -> None:
    """Delete whole checkpoints newer than `update`: a resumed run makes them again."""
    newer = [path for path, (number, _) in _newest_first(folder) if number > update]
    _delete(folder, [path for path in newer if _is_whole(path)])


def load(path: Path) -> Checkpoint:
    """Read the checkpoint whose JSON file is `path` and check every byte of it.

    Raises RgpoError that names the file which is missing, half-written or damaged.
    """
    document = _read_document(path)
    data = _read(_tensor_path(path))
    if hashlib.sha256(data).hexdigest() != document["tensors_sha256"]:
        raise RgpoError(f"{_tensor_path(path)} is damaged or incomplete: its SHA-256 is wrong.")
    tensors = safetensors.torch.load(data)
    return Checkpoint(document["update"], tensors, document["state"], path)


def newest(folder: Path, at_most: int | None = None) -> tuple[Checkpoint, list[str]]:
    """Return the newest whole checkpoint and one sentence for each newer one that is not whole.

    With `at_most`, those of later updates do not count (runs that train together resume from the
    newest update that all of them have). Raises RgpoError if there is none; the sentences are then
    part of the message.
    """
    skipped: list[str] = []
    for path, (update, _) in _newest_first(folder):
        if at_most is not None and update > at_most:
            continue
        try:
            return load(path), skipped
        except RgpoError as error:
            skipped.append(str(error))
    reasons = "".join(f" {sentence}" for sentence in skipped)
    raise RgpoError(f"There is no whole checkpoint in {folder}: start a new run.{reasons}")


def generator_state(rng: np.random.Generator) -> dict[str, Any]:
    """Return the state of a NumPy generator as JSON: arrays as lists, 128-bit integers exactly.

    The seed sequence is part of it, so that `spawn` continues too.
    """
    bit_generator = rng.bit_generator
    seed = bit_generator.seed_seq
    sequence = None
    if isinstance(seed, np.random.SeedSequence):
        sequence = _to_json(seed.state)
    return {"bit_generator": _to_json(bit_generator.state), "seed_sequence": sequence}


def restore_generator(state: Mapping[str, Any]) -> np.random.Generator:
    """Return a NumPy generator that continues where `generator_state` was taken.

    Raises RgpoError if the state names a bit generator that this NumPy does not have.
    """
    inner = _from_json(state["bit_generator"])
    kind = getattr(np.random, inner["bit_generator"], None)
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
        raise RgpoError(f"NumPy {np.__version__} has no bit generator {inner['bit_generator']!r}.")
    sequence = state["seed_sequence"]
    seed = None if sequence is None else np.random.SeedSequence(**_from_json(sequence))
    bit_generator = kind(seed)
    bit_generator.state = inner
    return np.random.Generator(bit_generator)


def _refuse_nonfinite(
    update: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    where = nonfinite_path(state)
    if where is not None:
        bad.append(where)
    if bad:
        raise RgpoError(
            f"Not saving update {update}: {', '.join(bad)} holds NaN or infinity; resume from the "
            "last checkpoint with a smaller learning rate or stronger KL control."
        )


def _delete(folder: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)  # first: without its JSON file there is no checkpoint
        _tensor_path(path).unlink(missing_ok=True)
    if paths:
        sync_folder(folder)


def _is_whole(path: Path) -> bool:
    try:
        digest = _read_document(path)["tensors_sha256"]
        return bool(hashlib.sha256(_read(_tensor_path(path))).hexdigest() == digest)
    except RgpoError:
        return False


def _newest_first(folder: Path) -> list[tuple[Path, tuple[int, int]]]:
    """Return every checkpoint's JSON file, present or not, with update and suffix, newest first."""
    order: dict[Path, tuple[int, int]] = {}
    for file in folder.glob("update-*"):
        match = _NAME.fullmatch(file.name)
        if match:
            path = file.with_name(f"{match['stem']}.json")
            order[path] = (int(match["update"]), int(match["suffix"] or 0))
    return sorted(order.items(), key=lambda item: item[1], reverse=True)


def _free_path(folder: Path, update: int) -> Path:
    suffix = 0
    while True:
        stem = f"update-{update:06d}" + (f".{suffix}" if suffix else "")
        path = folder / f"{stem}.json"
        if not path.exists() and not _tensor_path(path).exists():
            return path
        suffix += 1


def _tensor_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".json") + ".safetensors")


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(document)).hexdigest()


def _read_document(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        document = json.loads(data)
        digest = document.pop("document_sha256")
        whole = digest == _digest(document)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise RgpoError(f"{path} is half-written or damaged: it is not the JSON it was.") from None
    if not whole:
        raise RgpoError(f"{path} is damaged: its SHA-256 is wrong.")
    return dict(document)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RgpoError(f"{path} is missing: the checkpoint is half-written.") from None
    except OSError as error:
        raise RgpoError(f"{path} cannot be read ({error.strerror}).") from error


def _to_json(value: Any) -> Any:
    """Turn NumPy arrays and scalars inside nested dicts into plain JSON that `_from_json` reads."""
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    if isinstance(value, tuple):
        return list(value)
    return value.item() if isinstance(value, np.generic) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"dtype", "values"}:
        return np.array(value["values"], dtype=value["dtype"])
    if isinstance(value, Mapping):
        return {key: _from_json(item) for key, item in value.items()}
    return value
