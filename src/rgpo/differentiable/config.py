"""Everything one run through a simulator's (or a critic's) gradient depends on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from rgpo.core.objective import Objective
from rgpo.core.recipes import Recipe
from rgpo.errors import RgpoError
from rgpo.settings import Settings

PER_RUN = ("recipe", "set", "seed", "learning_rate", "critic_learning_rate", "target_kl")
"""Fields in which runs that are trained together as one computation may differ."""

_COUNTS = ("steps", "num_envs", "window", "epochs", "minibatches", "critics", "critic_epochs")
_MORE_COUNTS = ("critic_minibatches", "checkpoint_every", "keep")
_POSITIVE = ("learning_rate", "critic_learning_rate", "target_kl")
_NOT_NEGATIVE = ("seed", "eval_episodes", "max_grad_norm", "entropy_coefficient")


@dataclass(frozen=True)
class ReparamConfig(Settings):
    """Defaults train every task of the library; those of the paper differ (docs)."""

    algo: Literal["reparam-ppo", "reppo"] = "reparam-ppo"
    """reparam-ppo: the simulator's gradient (arXiv 2508.06214; SHAC with --epochs 1). reppo: the
    action gradient of a learned Q in its place (after arXiv 2507.11019)."""

    env: str = "rgpo/Pendulum"
    """rgpo/Pendulum, Cartpole, Quadrotor, Reacher, LQR, Hopper, or your own "module:ClassName"."""

    recipe: str = "reparam-mask"
    """Weight of a reused sample, its w at A = 1: any recipe of `rgpo objectives`. `importance`:
    the ratio alone; `reinforce`: no ratio at all (biased)."""

    set: tuple[str, ...] = ()
    """Hyper-parameters of the recipe, such as clip_low=0.2 kl_coefficient=0 (no KL penalty)."""

    seed: int = 0
    """Seed of initialisation, environments, noise and minibatches."""

    steps: int = 100_000
    """Environment steps in total, rounded up to whole windows."""

    num_envs: int = 32
    """E: environments stepped together."""

    window: int = 16
    """H: steps that one gradient reaches back through; the rest of the return is the critic's."""

    epochs: int = 5
    """M: passes of the policy over one window's cached gradients. 1: no reuse, SHAC."""

    minibatches: int = 1
    """Optimiser steps of the policy in one epoch."""

    learning_rate: float = 5e-3
    """AdamW's learning rate for the policy at the start."""

    critic_learning_rate: float = 5e-3
    """AdamW's learning rate for the critics at the start."""

    schedule: Literal["linear", "constant"] = "linear"
    """Both learning rates over the run: linear to zero, or constant."""

    gamma: float = 0.99
    """Discount."""

    lam: float = 0.95
    """Lambda of the critics' TD(lambda) targets."""

    entropy_coefficient: float = 0.0
    """Weight of the policy's entropy; the start value if it is tuned."""

    entropy_target: float | None = None
    """Tune that weight so that the entropy stays near this many nats per action dimension, of the
    action as the environment sees it (SAPO: -0.5). None: fixed."""

    soft_rewards: bool = False
    """Count the entropy as reward too, in the returns and in the critics (SAPO, 2412.12089)."""

    target_kl: float | None = None
    """End the epochs once the mean KL exceeds 1.5 times this. None: off."""

    max_grad_norm: float = 1.0
    """Gradient-norm clip of the policy and of the critics; 0 switches it off."""

    critics: int = 2
    """Critics: their mean bootstraps the return, their minimum the critics' targets."""

    critic_epochs: int = 8
    """Passes of the critics over one window."""

    critic_minibatches: int = 2
    """Optimiser steps of the critics in one pass."""

    target_keep: float = 0.2
    """How much of the old target critic stays after each update (SHAC's alpha)."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of policy and critics each."""

    initial_log_std: float = -0.5
    """Start of the log standard deviation, before squashing."""

    state_dependent_std: bool = False
    """Let the network predict the log standard deviation, within [-5, 2]."""

    normalize_observations: bool = True
    """Running mean and variance, frozen within a window and its update."""

    dtype: Literal["float32", "float64"] = "float32"
    """Of everything."""

    device: str = "cpu"
    """Where everything runs, such as cuda."""

    checkpoint_every: int = 50
    """Updates between checkpoints; the last one is always saved."""

    keep: int = 3
    """Checkpoints kept."""

    eval_episodes: int = 10
    """Episodes with deterministic actions after training; 0 for none."""

    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        infinity = math.inf
        self._require("at least 1", lambda x: x >= 1, (*_COUNTS, *_MORE_COUNTS))
        self._require("positive", lambda x: 0 < x < infinity, _POSITIVE)
        self._require("at least 0", lambda x: 0 <= x < infinity, _NOT_NEGATIVE)
        self._require("in [0, 1]", lambda x: 0 <= x <= 1, ("gamma", "lam", "target_keep"))
        for name in ("minibatches", "critic_minibatches"):
            if self.batch_size % getattr(self, name):
                raise RgpoError(
                    f"{name} {getattr(self, name)} does not divide the {self.batch_size} samples "
                    "of a window (num_envs x window): choose a divisor"
                )
        if self.entropy_target is not None and self.entropy_coefficient == 0:
            raise RgpoError(
                "entropy_target tunes entropy_coefficient, which must start above 0: "
                "add --entropy-coefficient 1"
            )
        if self.soft_rewards and self.entropy_coefficient == 0:
            raise RgpoError("soft_rewards needs an entropy_coefficient above 0")

    @property
    def label(self) -> str:
        """What tells this arm of a comparison from another: method, epochs and weight."""
        return " ".join((f"{self.algo} x{self.epochs}", self.recipe, *self.set))

    @property
    def batch_size(self) -> int:
        """Samples in one window, N = E * H."""
        return self.num_envs * self.window

    @property
    def updates(self) -> int:
        """Windows, and therefore updates, in the whole run."""
        return -(-self.steps // self.batch_size)

    def resolve(self) -> Recipe:
        """The recipe that weights reused samples; RgpoError for one that cannot."""
        recipe = super().resolve()
        objective = recipe.objective
        plain = not objective.needs and objective.scope == "element"
        fixed = type(objective).adapt is Objective.adapt
        if not (plain and fixed and recipe.level == "token" and recipe.step == "gradient"):
            raise RgpoError(
                f"recipe {self.recipe!r} is not a fixed weight of one action's ratio alone, which "
                "is what reused gradients need: choose reparam-mask, importance, rgpo-gate, gipo "
                "or another per-action recipe"
            )
        return recipe

    def warnings(self) -> list[str]:
        """Sentences about combinations that run, but not as their user may think."""
        found = []
        self.resolve()
        if self.epochs == 1 and self.minibatches == 1:
            found.append(
                "one optimiser step per window is SHAC: the ratio stays 1, so that weight and KL "
                "penalty do nothing"
            )
        return found


def require_shared(configs: Sequence[ReparamConfig]) -> None:
    """RgpoError naming the first field in which runs trained together must agree and do not."""
    for name in (f.name for f in fields(ReparamConfig) if f.name not in PER_RUN):
        if len({getattr(config, name) for config in configs}) > 1:
            raise RgpoError(f"runs trained together must share {name}: start them separately")
