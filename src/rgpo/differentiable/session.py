"""Runs on disk: train, checkpoint, stop cleanly, resume, evaluate; as `rgpo.control.session`."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rgpo.control.evaluate import EpisodeResults
from rgpo.control.evaluate import evaluate as play
from rgpo.control.session import Progress, Session
from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.tasks import TASKS
from rgpo.differentiable.train import ReparamTrainer, part_of
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.directory import Run


def start(
    configs: Sequence[ReparamConfig], directories: Sequence[Path], progress: Progress | None = None
) -> list[str]:
    """Train new runs, one after the other; returns each one's final status.

    Everything that can be refused is refused before a directory is made. Raises RgpoError when
    training cannot go on; the run is then marked as failed and keeps its last checkpoint.
    """
    return [_start(*pair, progress) for pair in zip(configs, directories, strict=True)]


def _start(config: ReparamConfig, directory: Path, progress: Progress | None) -> str:
    trainer = ReparamTrainer(config)
    document = dataclasses.asdict(config) | {
        "label": config.label,
        "hyper_parameters": config.resolve().hyper_parameters(),
    }
    run = Run.create(directory, document, trackers=config.track)
    return Session(trainer, [run], evaluate_run, progress).train()[0]


def resume(directories: Sequence[Path], progress: Progress | None = None) -> list[str]:
    """Continue runs from their newest whole checkpoints, exactly as if they had not stopped."""
    return [_resume(directory, progress) for directory in directories]


def _resume(directory: Path, progress: Progress | None) -> str:
    run = Run.open(directory)
    config = config_of(run)
    saved, skipped = checkpoint.newest(run.checkpoints)
    if saved.update >= config.updates:
        raise RgpoError(f"{directory} has all its {saved.update} updates: nothing to resume")
    trainer = ReparamTrainer(config)
    trainer.restore(saved)
    run.truncate_after(saved.update)
    for sentence in skipped:
        warnings.warn(sentence, stacklevel=2)
    return Session(trainer, [run], evaluate_run, progress).train()[0]


def config_of(run: Run) -> ReparamConfig:
    """The configuration a run was started with."""
    return ReparamConfig.from_json(run.config)


@torch.no_grad()
def evaluate_run(
    directory: Path, *, episodes: int = 10, seed: int = 1_000_000, video: Path | None = None
) -> EpisodeResults:
    """Episodes with deterministic actions from a run's newest whole checkpoint, as in control.

    Played in the task's Gymnasium view, so that the initial states are those that score-function
    policies are judged on. Raises RgpoError if the run has no checkpoint.
    """
    if episodes < 1:
        raise RgpoError(f"episodes must be at least 1, got {episodes}")
    run = Run.open(directory)
    config = config_of(run)
    saved, _ = checkpoint.newest(run.checkpoints)
    trainer = ReparamTrainer(dataclasses.replace(config, device="cpu"))
    trainer.actor.load_state_dict(part_of(saved.tensors, "actor."))
    trainer.moments.restore(0, {k: v.numpy() for k, v in part_of(saved.tensors, "obs.").items()})
    trainer.refresh()
    env_id = "rgpo/Task" if config.env not in TASKS else config.env
    options = {"task_name": config.env} if config.env not in TASKS else {}

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        seen = torch.as_tensor(observation["vector"], dtype=trainer.dtype)
        return trainer.mode(seen).numpy().astype(np.float32)

    return play(act, env_id, episodes=episodes, seed=seed, video=video, **options)
