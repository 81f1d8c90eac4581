"""Runs on disk: train, checkpoint, stop cleanly, resume, evaluate; as `rgpo.control.session`."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rgpo.control.evaluate import EpisodeResults
from rgpo.control.evaluate import evaluate as play
from rgpo.control.session import Progress, Session, common_checkpoints
from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.learner import part_of
from rgpo.differentiable.networks import Actors
from rgpo.differentiable.normalize import Normalizer
from rgpo.differentiable.tasks import TASKS, make_task
from rgpo.differentiable.train import ReparamTrainer
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.directory import Run


def start(
    configs: Sequence[ReparamConfig], directories: Sequence[Path], progress: Progress | None = None
) -> list[str]:
    """Train new runs together; returns each one's final status.

    Everything that can be refused is refused before a directory is made. Raises RgpoError when
    training cannot go on; the runs are then marked as failed and keep their last checkpoint.
    """
    trainer = ReparamTrainer(configs)
    runs = []
    for config, directory in zip(configs, directories, strict=True):
        document = dataclasses.asdict(config) | {
            "label": config.label,
            "hyper_parameters": config.resolve().hyper_parameters(),
        }
        runs.append(Run.create(directory, document, trackers=config.track))
    return Session(trainer, runs, evaluate_run, progress).train()


def resume(directories: Sequence[Path], progress: Progress | None = None) -> list[str]:
    """Continue runs from the newest update that all of them have a whole checkpoint of.

    Exactly as if they had not stopped.
    """
    runs = [Run.open(directory) for directory in directories]
    configs = [config_of(run) for run in runs]
    saved, skipped = common_checkpoints(runs, configs[0].updates)
    updates = saved[0].update
    trainer = ReparamTrainer(configs)
    trainer.restore(saved)
    for run in runs:
        run.truncate_after(updates)
    for sentence in skipped:
        warnings.warn(sentence, stacklevel=2)
    return Session(trainer, runs, evaluate_run, progress).train()


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
    act = _mode(config, saved.tensors)
    env_id = "rgpo/Task" if config.env not in TASKS else config.env
    options = {"task_name": config.env} if config.env not in TASKS else {}
    return play(act, env_id, episodes=episodes, seed=seed, video=video, **options)


def _mode(
    config: ReparamConfig, tensors: dict[str, Tensor]
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Deterministic actions (E, A), as the environment takes them, of a checkpoint's policy."""
    task, dtype, device = make_task(config.env), getattr(torch, config.dtype), torch.device("cpu")
    actor = Actors(task, config, [torch.Generator()])
    actor.to(device, dtype)
    actor.restore(0, part_of(tensors, "learner.actor."))
    enabled = config.normalize_observations
    seen = Normalizer(1, task.observation_size, enabled=enabled, dtype=dtype, device=device)
    seen.restore(0, part_of(tensors, "obs."))

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        raw = torch.as_tensor(observation["vector"], dtype=dtype)[None]
        mean = actor(seen(raw))[0][0]
        return (torch.tanh(mean) if task.bounded else mean).numpy().astype(np.float32)

    return act
