"""What a gate costs: one update of RGPO against one of PPO, on the same rollout.

HalfCheetah-v5's sizes: 2,048 samples, 10 epochs of minibatches of 64, two hidden layers of 64.
Every round times each variant once, in turn, in CPU time on one thread; a second PPO measures the
noise of the comparison. Prints medians, and the median and the 10% and 90% quantiles of the ratios
taken round by round.

    python benchmarks/update.py [--rounds 40]
"""

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import distribution_for
from rgpo.control.fast import FastLearner
from rgpo.control.learner import Batch, PlainLearner, Schedule
from rgpo.control.networks import ActorCritic

OBSERVATION, ACTIONS, SAMPLES = 17, 6, 2048
VARIANTS = {"ppo": "ppo", "ppo again": "ppo", "rgpo-gate": "rgpo-gate", "rgpo (gate + KL)": "rgpo"}


def make(learner_class: type, recipe: str) -> tuple[PlainLearner | FastLearner, Batch]:
    """A learner and a rollout of standard normal observations and advantages."""
    config = TrainConfig(recipe=recipe)
    distribution = distribution_for(gym.spaces.Box(-1, 1, (ACTIONS,)))
    policy = ActorCritic({"vector": (OBSERVATION,)}, distribution, config, 0)
    learner = learner_class([policy], [config.resolve()], distribution, [config])
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, SAMPLES, *shape, generator=generator)

    observation = {"vector": draw(OBSERVATION)}
    parameters, value = learner.evaluate(observation)
    action = distribution.sample(parameters, draw(ACTIONS))
    log_prob = distribution.log_prob(parameters, action)
    mask = torch.ones(1, SAMPLES, dtype=torch.bool)
    rest = (draw(), value + draw(), value, mask)
    batch = Batch(observation, action, parameters, log_prob, log_prob, *rest)
    return learner, batch


def main() -> None:
    """Time the variants with both learners and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = Table(title="One update, CPU time")
    for heading in ("learner", "recipe", "median ms", "ratio to ppo", "10%", "90%"):
        table.add_column(heading, justify="left" if heading in ("learner", "recipe") else "right")
    order = np.random.default_rng(0)
    shuffles = np.stack([order.permutation(SAMPLES) for _ in range(10)])[None]
    for name, learner_class, count in (
        ("fast", FastLearner, rounds),
        ("plain", PlainLearner, rounds // 4),
    ):
        made = {label: make(learner_class, recipe) for label, recipe in VARIANTS.items()}
        seconds: dict[str, list[float]] = {label: [] for label in VARIANTS}
        for number in range(count + 2):
            for label, (learner, batch) in made.items():
                penalty = 1.0 if "KL" in label else 0.0
                schedule = Schedule(np.array([1e-5]), np.array([penalty]), np.zeros(1))
                start = time.process_time()
                learner.update(batch, shuffles, schedule)
                if number >= 2:  # the first two warm the caches
                    seconds[label].append(time.process_time() - start)
        for label, times in seconds.items():
            ratios = np.array(times) / np.array(seconds["ppo"])
            low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
            ms = f"{1e3 * float(np.median(times)):.1f}"
            table.add_row(name, label, ms, f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
