"""Environment steps per CPU-second of `rgpo train` against Stable-Baselines3's PPO.

HalfCheetah-v5, 8 environments x 256 steps, 10 epochs, minibatches of 64, two hidden layers of 64,
observation and reward normalisation on. Every measurement is a fresh process on one torch thread
that trains a warm-up (imports, compilation, first updates: not counted) and then counts; the
variants take turns, so that a noisy machine disturbs all of them alike. CPU-seconds are those of
the process, its threads and its children.

    python benchmarks/throughput.py [--rounds 5] [--steps 40960] [--variants sb3 rgpo ...]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

ENV = "HalfCheetah-v5"
ENVS, TIME = 8, 256
WARM_UP = 5  # rollouts
RGPO = {  # what differs from `rgpo train --env HalfCheetah-v5`
    "rgpo": {},
    "rgpo compiled": {"compile": True},
    "rgpo without EnvPool": {"backend": "gymnasium"},
    "rgpo plain learner": {"learner": "plain"},
    "rgpo plain, no EnvPool": {"learner": "plain", "backend": "gymnasium"},
}
VARIANTS = ["sb3", "sb3 + VecNormalize", *RGPO]


def main() -> None:
    """Run the variants in turn, print medians, spread and paired ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 * ENVS * TIME)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.steps)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for number in range(options.rounds):
        for name in options.variants:
            command = [sys.executable, __file__, "--measure", name, "--steps", str(options.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            rate = results[name][-1]["per_cpu_second"]
            print(f"round {number + 1}: {name}: {rate:,.0f} steps per CPU-second", flush=True)
    show(results)


def show(results: dict[str, list[dict[str, float]]]) -> None:
    """One row per variant; ratios are taken round by round against the first variant."""
    baseline = next(iter(results))
    table = Table(title=f"{ENV}, steps per CPU-second (median \\[lowest, highest])")
    for heading in ("", "per CPU-s", f"/ {baseline}", "wall steps/s", "act / step / learn, us"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, rows in results.items():
        pairs = zip(rows, results[baseline], strict=True)
        ratios = [r["per_cpu_second"] / b["per_cpu_second"] for r, b in pairs]
        parts = [statistics.median(r[key] for r in rows) for key in ("act", "step", "learn")]
        table.add_row(
            name,
            spread([r["per_cpu_second"] for r in rows], ",.0f"),
            spread(ratios, ".2f"),
            spread([r["per_second"] for r in rows], ",.0f"),
            " / ".join(f"{p:.0f}" for p in parts) if any(parts) else "-",
        )
    Console(width=140).print(table)


def spread(numbers: list[float], style: str) -> str:
    """Median [lowest, highest]."""
    low, high = min(numbers), max(numbers)
    return f"{statistics.median(numbers):{style}} [{low:{style}}, {high:{style}}]"


def measure(name: str, steps: int) -> dict[str, float]:
    """Train in this process; steps per CPU-second and per second after the warm-up."""
    import torch

    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())
    return measure_sb3(name, steps) if name.startswith("sb3") else measure_rgpo(name, steps)


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure_rgpo(name: str, steps: int) -> dict[str, float]:
    """The trainer of `rgpo train`, with its defaults."""
    from rgpo.control.config import TrainConfig
    from rgpo.control.train import Trainer

    config = TrainConfig(env=ENV, num_envs=ENVS, rollout_steps=TIME, **RGPO[name])
    trainer = Trainer([config])
    for _ in range(WARM_UP):
        trainer.step()
    wall, cpu, rows = time.perf_counter(), cpu_seconds(), []
    for _ in range(steps // config.batch_size):
        rows += trainer.step()
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    parts = {
        k: 1e6 * sum(r[f"seconds_{k}"] for r in rows) / steps for k in ("act", "step", "learn")
    }
    return {"per_cpu_second": steps / cpu, "per_second": steps / wall, **parts}


def measure_sb3(name: str, steps: int) -> dict[str, float]:
    """Stable-Baselines3's PPO on a DummyVecEnv, with the same hyper-parameters."""
    import gymnasium as gym
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    class Clock(BaseCallback):
        """Notes the times at the start of the first rollout after the warm-up."""

        def _on_rollout_start(self) -> None:
            if self.num_timesteps == WARM_UP * ENVS * TIME:
                self.cpu, self.wall = cpu_seconds(), time.perf_counter()

        def _on_step(self) -> bool:
            return True

    envs = DummyVecEnv([lambda: gym.make(ENV) for _ in range(ENVS)])
    if "VecNormalize" in name:
        envs = VecNormalize(envs)
    model = PPO(
        "MlpPolicy",
        envs,
        n_steps=TIME,
        batch_size=64,
        n_epochs=10,
        learning_rate=3e-4,
        device="cpu",
    )
    clock = Clock()
    model.learn(WARM_UP * ENVS * TIME + steps, callback=clock)
    cpu, wall = cpu_seconds() - clock.cpu, time.perf_counter() - clock.wall
    return {
        "per_cpu_second": steps / cpu,
        "per_second": steps / wall,
        "act": 0.0,
        "step": 0.0,
        "learn": 0.0,
    }


if __name__ == "__main__":
    main()
