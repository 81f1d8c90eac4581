"""Claim 5: a gate costs no more than a clip."""

import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import plotly.graph_objects as go
import torch
from scipy.stats import binom

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import distribution_for
from rgpo.control.fast import FastLearner
from rgpo.control.learner import Batch, Schedule
from rgpo.control.networks import ActorCritic
from rgpo.runs.figures import colors, styled
from rgpo.studies.verify.finding import Finding, Picture, Row

OBSERVATION, ACTIONS, SAMPLES, EPOCHS = 17, 6, 2048, 2
"""HalfCheetah-v5's sizes; minibatches of 64, two hidden layers of 64, all as `rgpo train` has."""

VARIANTS = {
    "ppo": "ppo",
    "ppo again": "ppo",
    "rgpo-gate": "rgpo-gate",
    "rgpo (gate + KL)": "rgpo",
}

ALLOWED = 1.1
"""Ratio of the medians that the claim allows."""

WARM_UP = 2


def check(*, quick: bool) -> Finding:
    """Time one update of each in turn, round after round, in CPU time."""
    updates = {name: _update(name, recipe) for name, recipe in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    shuffles = np.random.default_rng(0)
    for number in range(WARM_UP + (6 if quick else 30)):
        for name in shuffles.permutation(list(updates)):
            start = time.process_time()
            updates[name]()
            if number >= WARM_UP:
                seconds[name].append(time.process_time() - start)
    times = {name: np.array(own) for name, own in seconds.items()}
    ratios = {name: own / times["ppo"] for name, own in times.items() if name != "ppo"}
    statement = (
        "The gate replaces PPO's minimum and clip; the rest of an update is the same. One update "
        "of each is timed in turn on the same rollout, so that whatever else the machine does "
        "hits all alike. PPO against itself tells how exact the comparison is."
    )
    read = (
        "Each point is one round: CPU time of an update over that of PPO's in the same round. "
        "The spread of PPO against itself is noise."
    )
    return Finding(
        "cost",
        statement,
        [_row(times, ratios)],
        [Picture("Time of an update", read, _draw(ratios))],
    )


def _update(name: str, recipe: str) -> Callable[[], object]:
    """One update, two epochs over the same rollout of random numbers, ready to call."""
    config = TrainConfig(recipe=recipe)
    distribution = distribution_for(gym.spaces.Box(-1, 1, (ACTIONS,)))
    policy = ActorCritic({"vector": (OBSERVATION,)}, distribution, config, 0)
    learner = FastLearner([policy], [config.resolve()], distribution, [config])
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, SAMPLES, *shape, generator=source)

    observation = {"vector": draw(OBSERVATION)}
    parameters, value = learner.evaluate(observation)
    action = distribution.sample(parameters, draw(ACTIONS))
    log_prob = distribution.log_prob(parameters, action)
    mask = torch.ones(1, SAMPLES, dtype=torch.bool)
    batch = Batch(
        observation=observation,
        action=action,
        parameters=parameters,
        log_prob=log_prob,
        proximal_log_prob=log_prob,
        advantage=draw(),
        returns=value + draw(),
        value=value,
        mask=mask,
    )
    shuffles = np.random.default_rng(0)
    order = np.stack([shuffles.permutation(SAMPLES) for _ in range(EPOCHS)])[None]
    penalty = np.array([1.0 if "KL" in name else 0.0])
    schedule = Schedule(np.array([1e-5]), penalty, np.zeros(1))
    return lambda: learner.update(batch, order, schedule)


def _row(times: dict[str, np.ndarray], ratios: dict[str, np.ndarray]) -> Row:
    spread = {name: np.quantile(own, [0.1, 0.5, 0.9]).tolist() for name, own in ratios.items()}
    intervals = {name: _interval_of_median(own) for name, own in ratios.items()}
    told = [
        f"{name} {spread[name][1]:.2f} ({low:.2f} to {high:.2f})"
        for name, (low, high) in intervals.items()
    ]
    rounds = len(times["ppo"])
    return Row(
        "an update with RGPO's gate costs what one of PPO costs",
        f"CPU time, {rounds} interleaved rounds, {SAMPLES:,} samples, {EPOCHS} epochs of "
        "minibatches of 64",
        "time over PPO's, median of rounds (95% interval): " + ", ".join(told),
        f"{ALLOWED:g} not surpassed by the whole interval",
        intervals["rgpo-gate"][0] <= ALLOWED,
        numbers={
            "rounds": rounds,
            "interval_of_median": intervals,
            "ratio_10_50_90": spread,
            "ppo_seconds": float(np.median(times["ppo"])),
        },
    )


def _interval_of_median(ratio: np.ndarray) -> tuple[float, float]:
    """95% interval from order statistics, whatever the distribution (the sign test's)."""
    low = max(int(binom.ppf(0.025, len(ratio), 0.5)) - 1, 0)
    ordered = np.sort(ratio)
    return float(ordered[low]), float(ordered[-1 - low])


def _draw(ratios: dict[str, np.ndarray]) -> go.Figure:
    color = colors(list(ratios))
    figure = go.Figure(
        [
            go.Box(
                name=name,
                x=own.tolist(),
                boxpoints="all",
                pointpos=0,
                jitter=0.6,
                marker={"color": color[name], "size": 5, "opacity": 0.5},
                showlegend=False,
            )
            for name, own in ratios.items()
        ]
    )
    figure.add_vline(x=1, line={"dash": "dot", "width": 1})
    figure.update_xaxes(title_text="time over PPO's")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return styled(figure, height=300, hovermode="closest")
