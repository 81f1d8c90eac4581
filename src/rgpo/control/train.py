"""Actor-critic training with any recipe of the core, from top to bottom.

    for every update:
        collect    T steps in E environments, R policies side by side     (collect.py)
        prepare    normalise rewards, values, generalised advantage estimation
        update     epochs of minibatches of the recipe's surrogate        (learner.py, fast.py)
                   --certified: taken back until it is certified          (certify.py)
        measure    exact KL(old || new), ratio tails, ESS, ... on the rollout  (measure.py)
        log, adapt the KL penalty, checkpoint

Arrays carry a leading axis of runs R: several seeds and recipes on one environment are trained as
one computation, one run being the special case. Every run has its own random generator,
environments, statistics and optimiser state, so that it does not depend on its neighbours.
Environments reset on the step after an episode's end: that dummy step is masked everywhere, and
the observation before it is the episode's last, whose value a truncated episode bootstraps from.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgpo.control import state
from rgpo.control.certify import PARTS, policy_parameters, shorten
from rgpo.control.collect import Collector, Rollout
from rgpo.control.config import TrainConfig, shared_fields
from rgpo.control.device import usable_device
from rgpo.control.distributions import Categorical, distribution_for
from rgpo.control.environments import make_environments
from rgpo.control.fast import FastLearner
from rgpo.control.learner import Batch, Learner, PlainLearner, Schedule
from rgpo.control.measure import measure
from rgpo.control.networks import ActorCritic
from rgpo.control.normalize import ObservationNormalizer, RewardScaler
from rgpo.core.advantage import gae
from rgpo.core.anchor import ParameterAverage
from rgpo.core.kl import KLPenalty
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint

Rows = list[dict[str, float | None]]

ELSEWHERE = {
    "sequence": "whole sequences (the language trainer has them: rgpo rlvr)",
    "turn": "the turns of a dialogue (rgpo.core.loss.policy_loss takes their segment_ids)",
    "group": "all answers to a prompt (rgpo.core.loss.group_loss takes them)",
}
"""What recipes above single actions need, and where it is."""


class Trainer:
    """R runs on one environment; `step` makes one update of all of them and returns their rows.

    Raises RgpoError for configurations that cannot run or cannot be trained together.
    """

    def __init__(self, configs: Sequence[TrainConfig], *, generation: int = 0) -> None:
        self.configs = list(configs)
        shared_fields(self.configs)
        self.config = config = self.configs[0]
        self.runs, self.envs, self.time = len(configs), config.envs, config.rollout_steps
        self.recipes = [c.resolve() for c in self.configs]
        self.device = usable_device(config.device)
        self.environments = make_environments(
            config.env, self._environment_seeds(generation), backend=config.backend
        )
        shapes = self.environments.observation_shapes
        self.distribution = distribution_for(self.environments.action_space, squash=config.squash)
        self._refuse_missing_inputs()
        self.learner = self._make_learner(shapes)
        size = shapes.get("vector", (0,))[0]
        normalize_vectors = config.normalize_observations and "vector" in shapes
        self.normalizer = ObservationNormalizer(self.runs, size, enabled=normalize_vectors)
        self.scaler = RewardScaler(
            self.runs, self.envs, config.gamma, enabled=config.normalize_rewards
        )
        self.generators = [np.random.default_rng([c.seed, 1]) for c in self.configs]
        self.penalties: list[KLPenalty | None] = [recipe.kl for recipe in self.recipes]
        self.updates_done = 0
        self.rate_scales = np.ones(self.runs)
        first = self.learner.parameters_of_runs()
        self.past = deque([first], maxlen=config.staleness + 1)  # [0] is the one that acts
        self.anchors = self._make_anchors(first)
        self.collector = Collector(self.environments, self.distribution, self.normalizer, self.runs)
        self.failed: dict[int, str] = {}

    # ---- construction ---------------------------------------------------------------------

    def _environment_seeds(self, generation: int) -> list[int]:
        """One seed per environment, from its run's seed alone; a new generation starts afresh."""
        seeds: list[int] = []
        for config in self.configs:
            sequence = np.random.SeedSequence([config.seed, 2, generation])
            seeds += [int(s) >> 1 for s in sequence.generate_state(self.envs)]
        return seeds

    def _refuse_missing_inputs(self) -> None:
        discrete = isinstance(self.distribution, Categorical)
        for recipe in self.recipes:
            what, objective = f"recipe {recipe.name!r}", recipe.objective
            if recipe.data == "expert":
                raise RgpoError(
                    f"{what} learns from an expert's samples, which control tasks do not have: "
                    "mix it into a language model's loss (docs/objectives/pairs.md)"
                )
            if "reference_log_ratio" in objective.needs:
                raise RgpoError(
                    f"{what} needs reference_log_ratio, and control tasks have no reference model: "
                    "the language trainer has one"
                )
            if "log_prob" in objective.needs and not discrete:
                raise RgpoError(
                    f"{what} needs the probability of a discrete action (log_prob), and "
                    f"{self.config.env} has continuous ones: choose another recipe"
                )
            if recipe.level != "token" or objective.scope in ("sequence", "group"):
                unit = recipe.level if recipe.level != "token" else objective.scope
                raise RgpoError(
                    f"{what} needs {ELSEWHERE[unit]}, and a control task has one action per step: "
                    "use a recipe of actions, such as ppo"
                )

    def _make_learner(self, shapes: dict[str, tuple[int, ...]]) -> Learner:
        policies = [
            ActorCritic(shapes, self.distribution, c, c.seed).to(self.device) for c in self.configs
        ]
        arguments = (policies, self.recipes, self.distribution, self.configs)
        supported = FastLearner.supports(shapes, self.distribution, self.recipes, self.config)
        if self.config.learner == "fast" and not supported:
            raise RgpoError(
                "the fast learner covers MLPs of equal widths on vector observations with "
                "gradient steps only: use --learner auto"
            )
        if self.config.learner == "plain" or not supported:
            return PlainLearner(*arguments)
        return FastLearner(*arguments)

    # ---- one update -----------------------------------------------------------------------

    def step(self) -> Rows:
        """Collect, learn, measure: one row of metrics per run."""
        start = time.perf_counter()
        rollout = self._collect()
        learn_start = time.perf_counter()
        batch, before = self._prepare(rollout)
        schedule = self._schedule()
        old = policy_parameters(self.learner.policies) if self.config.certified else None
        learned = self.learner.update(batch, self._minibatch_order(), schedule)
        subject = (self.learner, self.distribution, [r.objective for r in self.recipes], batch)
        accepted = np.ones(self.runs)
        if old is not None:
            accepted = shorten(*subject, old, gamma=self.config.gamma)
        metrics = measure(*subject, before, gamma=self.config.gamma)
        metrics |= learned | {"accepted_step": accepted}
        for key in PARTS.keys() & metrics.keys():  # a null step changes nothing, for certain
            metrics[key] = np.where(accepted == 0, 0, metrics[key])
        metrics["learning_rate"] = schedule.learning_rate
        metrics["kl_coefficient"] = schedule.kl_coefficient + schedule.reverse_kl_coefficient
        self.updates_done += 1
        self._adapt(metrics)
        self.normalizer.refresh()
        seconds = {
            "seconds_act": rollout.seconds_act,
            "seconds_step": rollout.seconds_step,
            "seconds_learn": time.perf_counter() - learn_start,
            "seconds": time.perf_counter() - start,
        }
        return self._rows(metrics, rollout, seconds)

    def _collect(self) -> Rollout:
        """A rollout of the policies that act; a run one of whose environments fails has failed."""
        with self._acting(self.past[0]):
            rollout = self.collector.collect(self.learner.act, self._noise())
        for index, failure in self.environments.failures.items():
            run, place = divmod(index, self.envs)
            where = f"environment {place} of the run {failure.what} (after step {self.steps_done})"
            self.failed.setdefault(run, f"{where}: {failure.advice}")
        return rollout

    def _noise(self) -> np.ndarray:
        """(R, T, E, K), from each run's own generator."""
        shape = (self.time, self.envs, self.distribution.noise_size)
        if self.distribution.noise == "normal":
            draws = [g.standard_normal(shape, dtype=np.float32) for g in self.generators]
        else:
            draws = [g.random(shape, dtype=np.float32) for g in self.generators]
        return np.stack(draws)

    def _schedule(self) -> Schedule:
        """Learning rates and KL coefficients of the next update."""
        progress = self.updates_done / self.config.updates
        decay = 1 - progress if self.config.schedule == "linear" else 1.0
        learning_rate = np.array([c.learning_rate * decay for c in self.configs])
        coefficients = np.array([p.weight(progress) if p else 0.0 for p in self.penalties])
        reverse = np.array([p is not None and p.direction == "reverse" for p in self.penalties])
        return Schedule(
            learning_rate * self.rate_scales,
            np.where(reverse, 0, coefficients),
            np.where(reverse, coefficients, 0),
        )

    def _minibatch_order(self) -> np.ndarray:
        """(R, epochs, N) permutations, from each run's own generator."""
        size, epochs = self.config.batch_size, self.config.epochs
        return np.stack(
            [np.stack([g.permutation(size) for _ in range(epochs)]) for g in self.generators]
        )

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> tuple[Batch, Tensor]:
        """Values, log-probs and advantages, (R, N) with N = T * E, time-major; and the policy.

        The values are the present critic's, however old the rollout; the second part are the
        present distribution parameters (R, N, P), which are the batch's own unless it is stale.
        """
        done = rollout.terminated | rollout.truncated
        reward = self.scaler(np.moveaxis(rollout.reward, 0, 1), np.moveaxis(done, 0, 1))
        observation = {
            k: self._tensor(v.reshape(self.runs, -1, *v.shape[3:]))
            for k, v in rollout.observation.items()
        }
        parameters, values = self.learner.evaluate(observation)
        size = self.config.batch_size
        observation = {k: v[:, :size].contiguous() for k, v in observation.items()}
        before = parameters = parameters[:, :size].contiguous()
        if self.config.staleness:
            with self._acting(self.past[0]):
                parameters, _ = self.learner.evaluate(observation)
        values = values.view(self.runs, self.time + 1, self.envs).transpose(0, 1)
        advantage, returns = gae(
            self._tensor(np.ascontiguousarray(reward)),
            values[:-1],
            values[1:],
            self._tensor(np.moveaxis(rollout.terminated, 0, 1)),
            self._tensor(np.moveaxis(rollout.truncated, 0, 1)),
            self.config.gamma,
            self.config.lam,
        )
        action = self._tensor(rollout.action.reshape(self.runs, size, -1))

        def by_run(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).reshape(self.runs, size)

        batch = Batch(
            observation=observation,
            action=action,
            parameters=parameters,
            log_prob=self.distribution.log_prob(parameters, action),
            proximal_log_prob=self._anchor_log_prob(observation, action, before),
            advantage=by_run(advantage),
            returns=by_run(returns),
            value=by_run(values[:-1]),
            mask=self._tensor(rollout.valid.reshape(self.runs, size)),
        )
        return batch, before

    def _tensor(self, array: np.ndarray) -> Tensor:
        """On the learner's device; on the CPU the same memory."""
        return torch.from_numpy(array).to(self.device)

    @contextmanager
    def _acting(self, parameters: Tensor) -> Iterator[None]:
        """Every policy with other parameters, for as long as the context lasts."""
        if not self.config.staleness and parameters is self.past[-1]:
            yield  # they are the present ones
            return
        present = self.learner.parameters_of_runs()
        self.learner.load_parameters(parameters)
        try:
            yield
        finally:
            self.learner.load_parameters(present)

    def _make_anchors(self, parameters: Tensor) -> ParameterAverage | None:
        """The averaged policies of recipes with an anchor_decay, where there are any."""
        decays = torch.tensor([recipe.anchor_decay for recipe in self.recipes])
        return ParameterAverage(parameters, decays.view(-1, 1)) if decays.any() else None

    def _anchor_log_prob(
        self, observation: dict[str, Tensor], action: Tensor, before: Tensor
    ) -> Tensor:
        """(R, N) log-probs of the proximal policies: the present or the averaged ones."""
        if self.anchors is not None:
            with self._acting(self.anchors.average):
                before, _ = self.learner.evaluate(observation)
        return self.distribution.log_prob(before, action)

    def _adapt(self, metrics: dict[str, np.ndarray]) -> None:
        """Adapt penalties, objectives and anchors; set runs aside whose update was not finite."""
        self._adapt_objectives(metrics)
        for r, penalty in enumerate(self.penalties):
            healthy = np.isfinite(metrics["gradient_norm"][r]) and np.isfinite(metrics["kl"][r])
            if not healthy and r not in self.failed:
                self.failed[r] = (
                    f"update {self.updates_done} (step {self.steps_done}) had a non-finite "
                    "gradient or KL: lower the learning rate or choose a recipe that controls "
                    "the ratio"
                )
            if r in self.failed:
                self._silence(r)
            if penalty is not None:
                self.penalties[r] = penalty.adapt(float(metrics["kl_behavior"][r]))
        present = self.learner.parameters_of_runs()
        self.past.append(present)
        if self.anchors is not None:
            self.anchors.update(present, self._tensor(metrics["optimizer_steps"]).view(-1, 1))
            floors = np.array([recipe.anchor_reset for recipe in self.recipes])
            behind = self._tensor(1 - metrics["active_clip_fraction"] < floors)
            self.anchors.reset(present, behind.view(-1, 1))

    def _adapt_objectives(self, metrics: dict[str, np.ndarray]) -> None:
        progress = self.updates_done / self.config.updates
        for r, recipe in enumerate(self.recipes):
            found = {k: float(v[r]) for k, v in metrics.items()} | {"progress": progress}
            self.rate_scales[r] = recipe.objective.learning_rate_scale(found)
            adapted = recipe.objective.adapt(found)
            if adapted != recipe.objective:
                self.recipes[r] = replace(recipe, objective=adapted)
                self.learner.set_recipes(self.recipes)

    def _silence(self, run: int) -> None:
        """Start a failed run from zeros, after each update: its NaN must not reach neighbours.

        They share the environments, which refuse a batch with one NaN in it.
        """
        state = self.learner.state(run)
        self.learner.restore(run, {k: torch.zeros_like(v) for k, v in state.items()})
        for parameters in self.past:
            parameters[run] = 0

    @property
    def steps_done(self) -> int:
        """Environment steps of each run so far, dummy steps of autoresets included."""
        return self.updates_done * self.config.batch_size

    def _rows(
        self, metrics: dict[str, np.ndarray], rollout: Rollout, seconds: dict[str, float]
    ) -> Rows:
        """One flat row per run; the seconds are the run's share."""
        rows: Rows = []
        for r in range(self.runs):
            ended = rollout.episodes[r]
            row: dict[str, float | None] = {
                "update": self.updates_done,
                "step": self.steps_done,
                "return": float(np.mean([e[0] for e in ended])) if ended else None,
                "episode_length": float(np.mean([e[1] for e in ended])) if ended else None,
                "episodes": len(ended),
            }
            row |= {name: float(array[r]) for name, array in metrics.items()}
            row |= {name: value / self.runs for name, value in seconds.items()}
            rows.append(row)
        return rows

    # ---- checkpoints (state.py) -----------------------------------------------------------

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Tensors and JSON of every run; with `restore`, training continues bit for bit."""
        return state.states(self)

    def restore(self, saved: Sequence[checkpoint.Checkpoint]) -> None:
        """Continue where `states` was taken, every run after the same update.

        Environments whose state could not be captured (EnvPool's) have started new episodes.
        """
        state.restore(self, saved)
