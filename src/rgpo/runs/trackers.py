"""Where metrics go besides metrics.jsonl: TensorBoard, and W&B and Trackio where installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from rgpo.errors import RgpoError

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """Takes rows of finite numbers until it is closed."""

    def log(self, row: Mapping[str, float]) -> None:
        """Record one row."""

    def close(self) -> None:
        """Write what is buffered."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise RgpoError for an unknown tracker or one whose package is missing."""
    for name in names:
        if name not in get_args(TrackerName):
            known = ", ".join(get_args(TrackerName))
            raise RgpoError(f"There is no tracker {name!r}: choose from {known}.")
        if importlib.util.find_spec(name) is None:
            raise RgpoError(
                f"The tracker {name!r} needs a package that is not installed: pip install {name}"
            )


def open_trackers(
    names: Sequence[str], path: Path, config: Mapping[str, Any], identity: str, next_step: int
) -> list[Tracker]:
    """Open every tracker of the run at `path`; `identity` tells runs of the same name apart.

    `next_step` is the first environment step to come: TensorBoard drops what it has from there on,
    which a resumed run writes again.
    """
    require_trackers(names)
    opened: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            opened.append(_TensorBoard(path / "events", next_step))
        elif name == "wandb":
            opened.append(_WandB(path, config, identity))
        else:
            opened.append(_Trackio(path, config, identity))
    return opened


class _TensorBoard:
    def __init__(self, folder: Path, next_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=next_step, flush_secs=30)

    def log(self, row: Mapping[str, float]) -> None:
        step = int(row.get("step", row["update"]))
        for name in row.keys() - {"step"}:
            self._writer.add_scalar(name, row[name], step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """The run keeps its own step axis, because W&B refuses steps that a resumed run repeats."""

    def __init__(self, path: Path, config: Mapping[str, Any], identity: str) -> None:
        import wandb

        self._run = wandb.init(
            project="rgpo",
            name=path.name,
            id=identity,
            resume="allow",
            reinit="create_new",
            dir=str(path),
            config=dict(config),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, float]) -> None:
        self._run.log(dict(row))

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, path: Path, config: Mapping[str, Any], identity: str) -> None:
        import trackio

        self._run = trackio.init(
            project="rgpo",
            name=f"{path.name}-{identity}",
            config=dict(config),
            resume="allow",
            embed=False,
        )

    def log(self, row: Mapping[str, float]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}  # reserved there
        self._run.log(values, step=int(row.get("step", row["update"])))

    def close(self) -> None:
        self._run.finish()
