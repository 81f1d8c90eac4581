"""Evaluation: whole episodes of a policy on fresh environments, with a video on request."""

import ctypes.util
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgpo.control.environments import (
    Environments,
    GymnasiumEnvironments,
    best_backend,
    make_environments,
)
from rgpo.control.observations import Observation
from rgpo.errors import RgpoError
from rgpo.runs.atomic import write_atomic

Act = Callable[[Observation], np.ndarray]
"""Maps batched, encoded observations to a batch of actions as the environment takes them."""


@dataclass(frozen=True)
class EpisodeResults:
    """What the episodes gave, in order."""

    returns: np.ndarray
    """Undiscounted, float64 (episodes,)."""
    lengths: np.ndarray
    """In steps, int64 (episodes,)."""


def evaluate(
    act: Act,
    env_id: str,
    *,
    episodes: int = 10,
    seed: int = 0,
    video: Path | None = None,
    max_steps: int = 100_000,
    **env_kwargs: Any,
) -> EpisodeResults:
    """Play `episodes` episodes with `act`; the first of them goes to `video` (mp4) if given.

    `act` sees a batch: of one, or of all episodes where the task steps many environments as one
    computation (backend "vector") and nothing is filmed. Episode i is seeded with `seed` + i
    whatever happened before, so that policies are compared on the same initial states. An episode
    is cut after `max_steps`, for tasks without a time limit.

    Raises RgpoError if a video is asked for and cannot be made here, and what `Environments` do.
    """
    if episodes < 1:
        raise ValueError(f"evaluation needs at least one episode, got {episodes}")
    if video is not None:
        _prepare_rendering()
        env_kwargs["render_mode"] = "rgb_array"
    elif not env_kwargs and best_backend(env_id) == "vector":
        seeds = [seed + index for index in range(episodes)]
        return _play_together(act, make_environments(env_id, seeds, backend="vector"), max_steps)
    environments = GymnasiumEnvironments(env_id, [seed], **env_kwargs)
    try:
        played = []
        for index in range(episodes):
            observation = environments.reset([seed + index])
            with _film(environments, video if index == 0 else None) as shoot:
                played.append(_play(act, environments, observation, max_steps, shoot))
    finally:
        environments.close()
    returns, lengths = zip(*played, strict=True)
    return EpisodeResults(np.array(returns, np.float64), np.array(lengths, np.int64))


def _play(
    act: Act,
    environments: GymnasiumEnvironments,
    observation: Observation,
    max_steps: int,
    shoot: Callable[[], None],
) -> tuple[float, int]:
    """Return and length of one episode from `observation` on; `shoot` is called at every state."""
    total = 0.0
    shoot()
    for length in range(1, max_steps + 1):
        step = environments.step(act(observation))
        shoot()
        total += float(step.reward[0])
        if step.terminated[0] or step.truncated[0]:
            return total, length
        observation = step.observation
    return total, max_steps


def _play_together(act: Act, environments: Environments, max_steps: int) -> EpisodeResults:
    """The first episode of every environment."""
    returns = np.zeros(environments.num_envs)
    lengths, going = np.zeros(len(returns), np.int64), np.ones(len(returns), bool)
    observation = environments.reset()
    while going.any() and lengths.max() < max_steps:
        step = environments.step(act(observation))
        observation = step.observation
        returns += np.where(going, step.reward, 0)
        lengths += going
        going &= ~(step.terminated | step.truncated)
    environments.close()
    return EpisodeResults(returns, lengths)


@contextmanager
def _film(environments: GymnasiumEnvironments, video: Path | None) -> Iterator[Callable[[], None]]:
    """Give a function that films the present state; `video` appears, whole, when all went well."""
    if video is None:
        yield lambda: None
        return
    import imageio.v2 as imageio

    _require_frame(environments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        fps = environments.envs[0].metadata.get("render_fps", 30)
        # H.264 needs even sides; imageio would by default rescale to multiples of 16.
        with imageio.get_writer(path, fps=fps, macro_block_size=2) as writer:
            yield lambda: writer.append_data(environments.render())
        video.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(video, path.read_bytes())


def _prepare_rendering() -> None:
    """Refuse without the packages; without a display let MuJoCo render off screen.

    MuJoCo's default, GLFW, needs a display, and Gymnasium does not fall back to another.
    """
    if not (importlib.util.find_spec("imageio") and importlib.util.find_spec("imageio_ffmpeg")):
        raise RgpoError('A video needs imageio and ffmpeg: `pip install "rgpo[video]"`.')
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if sys.platform == "linux" and not has_display and not os.environ.get("MUJOCO_GL"):
        here = [name for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)]
        if here:
            os.environ["MUJOCO_GL"] = here[0].lower()


def _require_frame(environments: GymnasiumEnvironments) -> None:
    try:
        frame = environments.render()
    except Exception as error:
        raise RgpoError(
            f"{environments.env_id} cannot be rendered here ({type(error).__name__}: {error}): "
            'install `pip install "rgpo[video]"` and, for MuJoCo without a display, the system '
            "library EGL or OSMesa (Debian: libegl1 with libgl1-mesa-dri, or libosmesa6)."
        ) from error
    if frame.ndim != 3:
        raise RgpoError(
            f"{environments.env_id} gives no image (H, W, 3) to film: leave the video out."
        )
