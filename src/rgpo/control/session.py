"""Runs on disk: train, checkpoint, stop cleanly, resume, evaluate."""

import dataclasses
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rgpo.control import memory
from rgpo.control.config import TrainConfig
from rgpo.control.distributions import distribution_for
from rgpo.control.environments import make_environments
from rgpo.control.evaluate import EpisodeResults, evaluate
from rgpo.control.learner import load_policy
from rgpo.control.networks import ActorCritic
from rgpo.control.normalize import ObservationNormalizer
from rgpo.control.train import Rows, Trainer
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint
from rgpo.runs.directory import Run
from rgpo.runs.table import final_return

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Progress = Callable[[int, int, Rows], None]
"""Called after every update with the updates done, those in total, and each run's row."""


def start(
    configs: Sequence[TrainConfig], directories: Sequence[Path], progress: Progress | None = None
) -> list[str]:
    """Train new runs together; returns each one's final status.

    Everything that can be refused is refused before a directory is made. Raises RgpoError when an
    environment fails; the runs are then marked as failed and keep their last checkpoint.
    """
    trainer = Trainer(configs)
    memory.require_room(trainer)
    runs = []
    for config, directory in zip(configs, directories, strict=True):
        document = dataclasses.asdict(config) | {
            "label": config.label,
            "hyper_parameters": config.resolve().hyper_parameters(),
            "backend_used": trainer.environments.backend,
            "learner_used": type(trainer.learner).__name__,
        }
        runs.append(Run.create(directory, document, trackers=config.track))
    return Session(trainer, runs, evaluate_run, progress).train()


def resume(directories: Sequence[Path], progress: Progress | None = None) -> list[str]:
    """Continue runs from the newest update that all of them have a whole checkpoint of.

    Where they have all their updates, what is left is the evaluation. Exactly as if uninterrupted
    where the environments' state is part of the checkpoint (not EnvPool's: there new episodes
    begin). The backend stays the one they were started with.
    """
    runs = [Run.open(directory) for directory in directories]
    configs = [
        dataclasses.replace(config_of(run), backend=run.config["backend_used"]) for run in runs
    ]
    saved, skipped = common_checkpoints(runs, configs[0].updates)
    updates = saved[0].update
    trainer = Trainer(configs, generation=updates)
    trainer.restore(saved)
    for run in runs:
        run.truncate_after(updates)
    for sentence in skipped:
        warnings.warn(sentence, stacklevel=2)
    return Session(trainer, runs, evaluate_run, progress).train()


class Session:
    """The life of some runs from one start to the next stop.

    `trainer` is a `Trainer` or one with the same `step`, `states` and public attributes;
    `evaluate` takes a run directory and `episodes`.
    """

    def __init__(
        self,
        trainer: Any,
        runs: list[Run],
        evaluate: Callable[..., EpisodeResults],
        progress: Progress | None,
    ) -> None:
        self.trainer, self.runs, self.evaluate, self.progress = trainer, runs, evaluate, progress
        self.saved = [trainer.updates_done] * len(runs)
        self.status = ["unfinished"] * len(runs)

    def train(self) -> list[str]:
        """Train to the end or the next stop; each run's final status."""
        config = self.trainer.config
        if self.trainer.updates_done == config.updates and self.progress is not None:
            rows = [(run.metrics() or [{}])[-1] for run in self.runs]
            self.progress(config.updates, config.updates, rows)
        try:
            with _interruptible() as stop:
                while self.trainer.updates_done < config.updates and not stop.requested:
                    self._update()
                    if not self._alive():
                        break
            self._save()
            if stop.requested and self.trainer.updates_done < config.updates:
                self._finish("interrupted", "stopped by Ctrl-C: `rgpo resume` continues it")
            else:
                self._finish("finished", evaluate_too=True)
        except RgpoError as error:
            self._fail(error)
        finally:
            self.trainer.environments.close()
            for run in self.runs:
                run.close()
        return self.status

    def _alive(self) -> list[int]:
        return [r for r in range(len(self.runs)) if r not in self.trainer.failed]

    def _update(self) -> None:
        rows = self.trainer.step()
        for r in range(len(self.runs)):
            if r in self.trainer.failed:
                if self.status[r] == "unfinished":
                    self._mark_failed(r, self.trainer.failed[r])
            else:
                self.runs[r].log(rows[r])
        if self.trainer.updates_done % self.trainer.config.checkpoint_every == 0:
            self._save()
        if self.progress is not None:
            self.progress(self.trainer.updates_done, self.trainer.config.updates, rows)

    def _save(self) -> None:
        update = self.trainer.updates_done
        due = [r for r in self._alive() if self.saved[r] < update]
        states = self.trainer.states() if due else []
        for r in due:
            tensors, state = states[r]
            checkpoint.save(self.runs[r].checkpoints, update, tensors, state)
            self.saved[r] = update
        for r in due:
            checkpoint.prune(self.runs[r].checkpoints, self.trainer.config.keep)

    def _finish(self, status: str, message: str = "", *, evaluate_too: bool = False) -> None:
        for r in self._alive():
            run, config = self.runs[r], self.trainer.configs[r]
            result: dict[str, Any] = {"final_return": final_return(run.metrics())}
            if evaluate_too and config.eval_episodes:
                results = self.evaluate(run.path, episodes=config.eval_episodes)
                result["eval_return"] = float(np.mean(results.returns))
                result["eval_returns"] = [float(x) for x in results.returns]
            run.finish(status, message, result)
            self.status[r] = status

    def _mark_failed(self, r: int, reason: str) -> None:
        where = "no checkpoint was saved yet"
        if self.saved[r]:
            where = f"its last checkpoint is that of update {self.saved[r]}"
        self.status[r] = f"failed: {reason}; {where}"
        self.runs[r].finish("failed", f"{reason}; {where}")

    def _fail(self, error: RgpoError) -> None:
        step = self.trainer.steps_done
        sentence = f"{str(error).rstrip('.')} (after step {step})"
        broken = [r for r in self._alive() if self.status[r] == "unfinished"]
        for r in broken:
            self._mark_failed(r, sentence)
        raise RgpoError(self.status[broken[0]].removeprefix("failed: ")) from error


class _Stop:
    requested = False


@contextmanager
def _interruptible() -> Iterator[_Stop]:
    """The first Ctrl-C asks for a stop after the running update, the second stops at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(*_: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def config_of(run: Run) -> TrainConfig:
    """The configuration a run was started with."""
    return TrainConfig.from_json(run.config)


def common_checkpoints(
    runs: Sequence[Run], updates: int
) -> tuple[list[checkpoint.Checkpoint], list[str]]:
    """The newest whole checkpoint of every run, all of one update; and what was skipped.

    RgpoError if there is none, or if the runs are finished and have all their `updates`.
    """
    newest = [checkpoint.newest(run.checkpoints) for run in runs]
    common = min(one.update for one, _ in newest)
    found = [checkpoint.newest(run.checkpoints, at_most=common) for run in runs]
    if len({one.update for one, _ in found}) > 1:
        raise RgpoError("these runs have no checkpoint of the same update: resume them one by one")
    finished = all(run.status["status"] == "finished" for run in runs)
    if finished and found[0][0].update >= updates:
        raise RgpoError(f"{runs[0].path} has all its {updates} updates: nothing to resume")
    skipped = dict.fromkeys(sentence for _, told in newest + found for sentence in told)
    return [one for one, _ in found], list(skipped)


@torch.no_grad()
def evaluate_run(
    directory: Path, *, episodes: int = 10, seed: int = 1_000_000, video: Path | None = None
) -> EpisodeResults:
    """Episodes with deterministic actions from a run's newest whole checkpoint.

    The seed differs from any training seed's environments. `video` writes the first episode as
    mp4. Raises RgpoError if the run has no checkpoint, or for a video that cannot be made.
    """
    if episodes < 1:
        raise RgpoError(f"episodes must be at least 1, got {episodes}")
    run = Run.open(directory)
    config = config_of(run)
    saved, _ = checkpoint.newest(run.checkpoints)
    environments = make_environments(config.env, [0], backend="gymnasium")
    shapes, space = environments.observation_shapes, environments.action_space
    environments.close()
    distribution = distribution_for(space, squash=config.squash)
    policy = ActorCritic(shapes, distribution, config, config.seed)
    load_policy(policy, saved.tensors)
    size = shapes.get("vector", (0,))[0]
    enabled = config.normalize_observations and "vector" in shapes
    normalizer = ObservationNormalizer(1, size, enabled=enabled)
    if enabled:
        moments = {k: saved.tensors[f"obs.{k}"].numpy() for k in ("mean", "variance", "count")}
        normalizer.moments.restore(0, moments)
        normalizer.refresh()

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        seen = dict(observation)
        if "vector" in seen:
            seen["vector"] = normalizer(seen["vector"][None])[0]
        inputs = {k: torch.from_numpy(v) for k, v in seen.items()}
        return distribution.to_env(distribution.mode(policy.policy(inputs)).numpy())

    return evaluate(act, config.env, episodes=episodes, seed=seed, video=video)
