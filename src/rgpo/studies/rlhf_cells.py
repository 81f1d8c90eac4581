"""The arms of the RLHF study, and training one of them.

A cell is the stage of online RL of `rgpo rlhf` from one base: the same policy, reward model and
prompts for all, the same number of answers, with another method, learning rate and seed.
"""

import contextlib
import dataclasses
import io
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from rgpo.core.diagnostics import KL_SPIKE
from rgpo.language.evaluation import measured
from rgpo.language.gold import Gold
from rgpo.language.reward_model import RewardModel
from rgpo.language.rlhf import Base, RlhfConfig, learner
from rgpo.language.sample import Policy, load_policy
from rgpo.language.stages import hush
from rgpo.settings import split_arm
from rgpo.studies.jobs import Cell, Result

Judges = tuple[Policy, RewardModel, Gold | None]

TASK = "tiny"
TUNING_SEEDS = (100, 101)
"""Evaluated at their end only, never reported; the second for the best trials of the first."""

POINTS = 6
"""Evaluations of a reported run, evenly over its updates."""

MEASURED = ("proxy", "gold", "kl", "length", "entropy", "cut")
"""Of every evaluation: means over the policy's own answers to held-out prompts."""

TRAINER = {"logging_steps": 1, "save_strategy": "no", "adam_epsilon": 1e-5}
"""A row per optimiser step; a cell that was cut short is made again."""

BETAS = ("beta=0.05", "beta=0.02", "beta=0.15")
"""KL coefficients: 0.05 of arXiv 2403.17031 and trlX's HH example, and
about a third and three times of it."""

REFERENCE_SHARPNESS = tuple(f"reference_sharpness={k}" for k in (1, 3, 10))
MIX = tuple(f"mix={share}" for share in (0.2, 0.5, 0.8))


@dataclass(frozen=True)
class Arm:
    """One method of the study."""

    recipe: str

    strengths: tuple[str, ...] = BETAS
    """What is tuned beside the learning rate, as many values for every arm, the default first: the
    KL coefficient, or for a gate without a KL term how hard it holds to the reference."""

    advantage: Literal["group", "critic"] = "group"

    @property
    def kl_in(self) -> Literal["loss", "reward"]:
        """With a critic the penalty is k1 per token in the reward, without one k3 in the loss."""
        return "reward" if self.advantage == "critic" else "loss"


ARMS = {
    "rgpo-dual-product": Arm("rgpo-dual-product", REFERENCE_SHARPNESS),
    "rgpo-dual-detached": Arm("rgpo-dual-detached", REFERENCE_SHARPNESS),
    "rgpo-dual-geometric": Arm("rgpo-dual-geometric", MIX),
    "rgpo-dual-product+kl": Arm("rgpo-dual-product"),
    "rgpo-dual-detached+kl": Arm("rgpo-dual-detached"),
    "rgpo-dual-geometric+kl": Arm("rgpo-dual-geometric"),
    "rgpo-dual-product+critic": Arm("rgpo-dual-product", advantage="critic"),
    "rgpo-gate+kl": Arm("rgpo-gate"),
    "ppo-rlhf": Arm("ppo", advantage="critic"),
    "grpo": Arm("grpo"),
    "kl-only": Arm("reinforce"),
}
"""The dual gate alone is held to the reference by nothing else (beta 0: its claim); with `+kl` and
`+critic` it replaces the clip of GRPO and of PPO-RLHF and nothing else (the paper's setting as far
as it is known: its KL coefficient is not). `rgpo-gate+kl` is RGPO with one ratio, `kl-only` the
penalty without any gate."""


@dataclass(frozen=True)
class RlhfCells:
    """Trains cells of the RLHF study; a `jobs.Train`."""

    base: Base
    config: RlhfConfig
    """What all cells share, resolved."""

    reference: dict[str, float]
    """The policy before RL on the held-out prompts, keys of MEASURED: the start of every run."""

    @property
    def lengths(self) -> dict[str, int]:
        """Generated batches of a run."""
        return {TASK: self.config.updates or 0}

    def jobs(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """Every cell is a job of its own."""
        return [[cell] for cell in cells]

    def settings(self, cell: Cell) -> RlhfConfig:
        """The configuration of one run."""
        name, options = split_arm(cell.arm)
        arm, further = ARMS[name], dict[str, float]()
        for option in options:
            key, _, number = option.partition("=")
            further[key] = float(number)
        return dataclasses.replace(
            self.config,
            recipe=arm.recipe,
            advantage=arm.advantage,
            beta=further.pop("beta", 0.0),
            kl_in=arm.kl_in,
            recipe_options=json.dumps(further),
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            trainer=json.dumps(TRAINER),
        )

    def __call__(self, cells: Sequence[Cell]) -> list[Result]:
        """Train one after the other."""
        hush()
        return [dataclasses.asdict(cell) | self._train(cell) for cell in cells]

    def _train(self, cell: Cell) -> Result:
        started, config = time.perf_counter(), self.settings(cell)
        points = 1 if cell.seed in TUNING_SEEDS else POINTS
        evaluator, failed = _Evaluator(self.base, config, points), None
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = learner(config, self.base, Path(folder))
            evaluator.trainer = trainer
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(evaluator)
            cpu = time.process_time()
            try:
                trainer.train()
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                failed = f"probabilities were not finite at step {trainer.state.global_step}"
            cpu = time.process_time() - cpu - evaluator.seconds
        found = [{"update": 0, **self.reference}, *evaluator.found]
        kl = update_kl([r["ratio/kl_k3"] for r in trainer.state.log_history if "ratio/kl_k3" in r],
                       config.minibatches, config.epochs)  # fmt: skip
        return {
            "final_return": None if failed else found[-1]["gold"],
            "failed": failed,
            "points": found,
            "update_kl": float(np.mean(kl)) if kl else None,
            "kl_spike": float(np.mean([not one <= KL_SPIKE for one in kl])) if kl else None,
            "cpu": cpu,
            "seconds": time.perf_counter() - started,
        }


class _Evaluator(TrainerCallback):
    """Measures the policy on the held-out prompts at some updates of a run."""

    def __init__(self, base: Base, config: RlhfConfig, points: int) -> None:
        self.base, self.config, self.judges = base, config, base.judges()
        self.copy, self.trainer = load_policy(base.start), None  # the latter: once there is one
        updates = config.updates or 0
        self.at = {round(updates * (i + 1) / points) for i in range(points)}
        self.found: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """After the last optimiser step of an update."""
        update, rest = divmod(state.global_step, self.config.epochs * self.config.minibatches)
        if rest or update not in self.at:
            return
        started = time.process_time()
        self.copy.model.load_state_dict(self.trainer.model.state_dict())
        self.found.append(
            {"update": update, **evaluated(self.base, self.config, self.copy, self.judges)}
        )
        self.seconds += time.process_time() - started


def evaluated(base: Base, config: RlhfConfig, policy: Policy, judges: Judges) -> dict[str, float]:
    """MEASURED over a policy's answers to the held-out prompts, with fixed random numbers."""
    with torch.random.fork_rng():
        samples = policy.sample(base.held_out * config.samples, config.max_tokens or 1, seed=31)
    found, _ = measured(policy, *judges, samples)
    return {k: v["mean"] if isinstance(v, dict) else v for k, v in found.items() if k in MEASURED}


def update_kl(rows: Sequence[float], minibatches: int, epochs: int) -> list[float]:
    """KL(old || new) of every update from that of its optimiser steps: mean of its last pass."""
    steps = minibatches * epochs
    whole = np.reshape(rows[: len(rows) // steps * steps], (-1, steps))
    return [float(x) for x in whole[:, -minibatches:].mean(axis=1)]
