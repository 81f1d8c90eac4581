"""Run directories with the look of real ones: PPO, and a gate without KL control."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgpo.runs.directory import Run

UPDATES = 40


def _rows(recipe: str, seed: int, updates: int = UPDATES) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, len(recipe)])
    gated = recipe.startswith("rgpo")
    middle, top = rng.normal(18, 2), rng.normal(2300 if gated else 1900, 200)
    rows = []
    for update in range(1, updates + 1):
        ended = int(rng.integers(0, 12)) if update > 1 else 0  # no episode ends in the first
        progress = 1 / (1 + np.exp(-(update - middle) / 5))
        kl = float(rng.lognormal(np.log(0.02 if gated else 0.008), 0.7 if gated else 0.3))
        tail = float(np.exp(2.5 * np.sqrt(2 * kl)))
        mean_return = float(30 + top * progress + rng.normal(0, 120) * progress)
        rows.append(
            {
                "update": update,
                "step": 2048 * update,
                "return": mean_return if ended else None,
                "episodes": ended,
                "episode_length": mean_return / 3 if ended else None,
                "kl": kl,
                "kl_spike": int(kl > 0.04),
                "kl_k3": kl * 0.97,
                "ess": float(np.exp(-2 * kl)),
                "ratio_min": tail**-1.6,
                "ratio_q001": tail**-1.2,
                "ratio_q01": tail**-0.8,
                "ratio_q50": float(1 - kl),
                "ratio_q99": tail**0.8,
                "ratio_q999": tail**1.2,
                "ratio_max": tail**1.6,
                "active_clip_fraction": None if gated else float(rng.beta(2, 20)),
                "gate_acceptance": float(rng.beta(30, 30)) if gated else None,
                "pull_back_fraction": 0.0,
                "tail_index": float(rng.normal(6, 1)),
                "entropy": float(4.2 - 3 * progress + rng.normal(0, 0.05)),
                "explained_variance": float(np.tanh(update / 10) - rng.uniform(0, 0.1)),
                "gradient_norm": float(rng.lognormal(-0.5, 0.4)),
                "kl_coefficient": 0.0,
                "learning_rate": 3e-4 * (1 - update / updates),
                "seconds_act": float(rng.normal(0.11, 0.01)),
                "seconds_step": float(rng.normal(0.22, 0.02)),
                "seconds_learn": float(rng.normal(0.35, 0.02)),
                "seconds": float(rng.normal(0.72, 0.02)),
            }
        )
    return rows


@pytest.fixture
def fake_rows() -> Callable[..., list[dict[str, Any]]]:
    """Return the rows of one run, given recipe, seed and number of updates."""
    return _rows


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write one run directory and return its path."""

    folder, number = tmp_path / "runs", itertools.count()

    def make(
        recipe: str,
        seed: int,
        env: str = "Hopper-v5",
        status: str | None = "finished",
        rows: list[dict[str, Any]] | None = None,
        message: str = "",
        **config: Any,
    ) -> Path:
        config |= {
            "recipe": recipe,
            "env": env,
            "seed": seed,
            "learning_rate": 3e-4,
            "objective": {"name": recipe, "k": 10.0},
        }
        run = Run.create(folder / str(next(number)), config, trackers=())
        for row in _rows(recipe, seed) if rows is None else rows:
            run.log(row)
        if status is not None:
            run.finish(status, message)
        run.close()
        return run.path

    return make


@pytest.fixture
def comparison(make_run: Callable[..., Path]) -> list[Path]:
    """Two recipes with three seeds each."""
    return [make_run(recipe, seed) for recipe in ("ppo", "rgpo-gate") for seed in (0, 1, 2)]
