"""Actor-critic training with any recipe of the core, from top to bottom.

    for every update:
        collect    T steps in E environments, with R policies side by side
        prepare    normalise rewards, values, generalised advantage estimation
        update     epochs of minibatches of the recipe's surrogate       (learner.py, fast.py)
               --certified: taken back until it is certified         (certify.py)
        measure    exact KL(old || new), ratio tails, ESS, ... of the new policy on the rollout
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
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgpo.control import state
from rgpo.control.certify import (
    CONFIDENCE,
    PARTS,
    certified_fraction,
    certify_runs,
    confidence_per_candidate,
    place,
    policy_parameters,
    total_variation,
)
from rgpo.control.config import TrainConfig, shared_fields
from rgpo.control.device import usable_device
from rgpo.control.distributions import Categorical, distribution_for
from rgpo.control.environments import make_environments
from rgpo.control.fast import FastLearner
from rgpo.control.learner import Batch, Learner, PlainLearner, Schedule, objective_inputs
from rgpo.control.networks import ActorCritic
from rgpo.control.normalize import ObservationNormalizer, RewardScaler
from rgpo.core.advantage import gae, normalize
from rgpo.core.anchor import ParameterAverage
from rgpo.core.diagnostics import KL_SPIKE, explained_variance, ratio_diagnostics
from rgpo.core.kl import KLPenalty
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint

Rows = list[dict[str, float | None]]


@dataclass
class Rollout:
    """What R policies saw and did: (R, T, E, ...), observations (R, T + 1, E, ...)."""

    observation: dict[str, np.ndarray]
    """As the policies saw them: vectors are normalised."""

    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    """False for the dummy step of an autoreset."""

    episodes: list[list[tuple[float, int]]] = field(default_factory=list)
    """Per run, return and length of every episode that ended."""

    seconds_act: float = 0.0
    seconds_step: float = 0.0


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
        self.current = self.environments.reset()
        self.running_return = np.zeros(self.runs * self.envs)
        self.running_length = np.zeros(self.runs * self.envs, dtype=np.int64)
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
                    f"{what} forms its ratio per {unit}, but a control "
                    "task has one action per step: use its token-level relative, such as ppo"
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
        with self._acting(self.past[0]):
            rollout = self._collect()
        learn_start = time.perf_counter()
        batch, before = self._prepare(rollout)
        progress = self.updates_done / self.config.updates
        decay = 1 - progress if self.config.schedule == "linear" else 1.0
        learning_rate = np.array([c.learning_rate * decay for c in self.configs])
        learning_rate *= self.rate_scales
        coefficients = [p.weight(progress) if p else 0.0 for p in self.penalties]
        reverse = np.array([p is not None and p.direction == "reverse" for p in self.penalties])
        schedule = Schedule(
            learning_rate, np.where(reverse, 0, coefficients), np.where(reverse, coefficients, 0)
        )
        order = self._minibatch_order()
        old = policy_parameters(self.learner.policies) if self.config.certified else None
        learned = self.learner.update(batch, order, schedule)
        accepted = np.ones(self.runs) if old is None else self._shorten(batch, old)
        metrics = self._measure(batch, before) | learned | {"accepted_step": accepted}
        for key in PARTS.keys() & metrics.keys():  # a null step changes nothing, for certain
            metrics[key] = np.where(accepted == 0, 0, metrics[key])
        metrics |= {"learning_rate": learning_rate, "kl_coefficient": np.array(coefficients)}
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
        """T steps of every environment with the policies as they are."""
        rollout, noise = self._empty_rollout(), self._noise()
        lead = (self.runs, self.envs)
        size = self.environments.observation_shapes.get("vector", (0,))[0]
        raw = np.empty((self.runs, self.time, self.envs, size), dtype=np.float32)
        for t in range(self.time):
            acting = time.perf_counter()
            seen = {k: v.reshape(*lead, *v.shape[1:]) for k, v in self.current.items()}
            if "vector" in seen:
                raw[:, t] = seen["vector"]
                seen["vector"] = self.normalizer(seen["vector"])
            action = self.learner.act(seen, noise[:, t])
            stepping = time.perf_counter()
            flat = action.reshape(-1, action.shape[-1])
            step = self.environments.step_all(self.distribution.to_env(flat))
            stepped = time.perf_counter()
            for key, array in seen.items():
                rollout.observation[key][:, t] = array
            rollout.action[:, t] = action
            for name in ("reward", "terminated", "truncated", "valid"):
                getattr(rollout, name)[:, t] = getattr(step, name).reshape(lead)
            self.current = step.observation
            rollout.seconds_act += stepping - acting
            rollout.seconds_step += stepped - stepping
        last = {k: v.reshape(*lead, *v.shape[1:]) for k, v in self.current.items()}
        if "vector" in last:
            last["vector"] = self.normalizer(last["vector"])
            self.normalizer.moments.update(raw.reshape(self.runs, -1, raw.shape[-1]))
        for key, array in last.items():
            rollout.observation[key][:, self.time] = array
        rollout.episodes = self._finished_episodes(rollout)
        for index, failure in self.environments.failures.items():
            run, place = divmod(index, self.envs)
            told = f"environment {place} of the run {failure.what.rstrip('.')}"
            self.failed.setdefault(run, f"{told} (after step {self.steps_done})")
        return rollout

    def _empty_rollout(self) -> Rollout:
        steps = (self.runs, self.time, self.envs)
        seen = {
            key: np.empty((self.runs, self.time + 1, self.envs, *v.shape[1:]), dtype=v.dtype)
            for key, v in self.current.items()
        }
        size = (*steps, self.distribution.action_size)
        action = torch.empty(size, dtype=self.distribution.action_dtype).numpy()
        flags = [np.empty(steps, dtype=bool) for _ in range(3)]
        return Rollout(seen, action, np.empty(steps, dtype=np.float32), *flags)

    def _noise(self) -> np.ndarray:
        """(R, T, E, K), from each run's own generator."""
        shape = (self.time, self.envs, self.distribution.noise_size)
        if self.distribution.noise == "normal":
            draws = [g.standard_normal(shape, dtype=np.float32) for g in self.generators]
        else:
            draws = [g.random(shape, dtype=np.float32) for g in self.generators]
        return np.stack(draws)

    def _minibatch_order(self) -> np.ndarray:
        """(R, epochs, N) permutations, from each run's own generator."""
        size, epochs = self.config.batch_size, self.config.epochs
        return np.stack(
            [np.stack([g.permutation(size) for _ in range(epochs)]) for g in self.generators]
        )

    def _finished_episodes(self, rollout: Rollout) -> list[list[tuple[float, int]]]:
        """Returns and lengths of the episodes that ended, by run, in the order they ended."""
        time_first = (self.time, self.runs * self.envs)
        reward = np.moveaxis(rollout.reward, 0, 1).reshape(time_first).astype(np.float64)
        valid = np.moveaxis(rollout.valid, 0, 1).reshape(time_first)
        done = np.moveaxis(rollout.terminated | rollout.truncated, 0, 1).reshape(time_first)
        total = self.running_return + np.cumsum(reward, axis=0)
        length = self.running_length + np.cumsum(valid, axis=0)
        episodes: list[list[tuple[float, int]]] = [[] for _ in range(self.runs)]
        spent_return = np.zeros_like(self.running_return)
        spent_length = np.zeros_like(self.running_length)
        for t, i in np.argwhere(done):
            ended = (float(total[t, i] - spent_return[i]), int(length[t, i] - spent_length[i]))
            episodes[i // self.envs].append(ended)
            spent_return[i], spent_length[i] = total[t, i], length[t, i]
        self.running_return = total[-1] - spent_return
        self.running_length = length[-1] - spent_length
        return episodes

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

    @torch.no_grad()
    def _measure(self, batch: Batch, before: Tensor) -> dict[str, np.ndarray]:
        """Every diagnostic of the new policies against the behaviour policies, on the rollout.

        `before` (R, N, P) are the policies at the start of the update, the same unless stale.
        """
        mask, count = batch.mask, torch.clamp(batch.mask.sum(-1), min=1)
        parameters, _ = self.learner.evaluate(batch.observation)
        log_ratio = self.distribution.log_prob(parameters, batch.action) - batch.log_prob
        advantage = normalize(batch.advantage, mask, dim=-1)
        weight = torch.stack(
            [
                self._weight(r, batch.run(r), parameters[r], log_ratio[r], advantage[r])
                for r in range(self.runs)
            ]
        )
        kl = behavior_kl = self.distribution.kl(before, parameters)
        if before is not batch.parameters:
            behavior_kl = self.distribution.kl(batch.parameters, parameters)
        entropy = self.distribution.entropy(parameters)
        metrics = ratio_diagnostics(log_ratio, advantage, weight, mask)
        metrics["kl"] = torch.where(mask, kl, 0).sum(-1) / count
        metrics["kl_behavior"] = torch.where(mask, behavior_kl, 0).sum(-1) / count
        metrics["kl_spike"] = (metrics["kl"] > KL_SPIKE).float()
        metrics["entropy"] = torch.where(mask, entropy, 0).sum(-1) / count
        metrics["explained_variance"] = explained_variance(batch.value, batch.returns, mask)
        table = torch.stack([tensor.double() for tensor in metrics.values()]).cpu().numpy()
        found = self._certificates(batch, parameters, log_ratio, behavior_kl)
        return dict(zip(metrics, table, strict=True)) | {k: v.numpy() for k, v in found.items()}

    def _certificates(
        self,
        batch: Batch,
        parameters: Tensor,
        log_ratio: Tensor,
        kl: Tensor,
        confidence: float = CONFIDENCE,
    ) -> dict[str, Tensor]:
        """What the rollout guarantees about policies with these `parameters` (R, N, P); on the CPU.

        `certify` tells reasons, and so looks at numbers.
        """
        tv = total_variation(self.distribution, batch.parameters, parameters, kl)
        objectives = [recipe.objective for recipe in self.recipes]
        data = [x.cpu() for x in (log_ratio, batch.advantage, tv, batch.mask)]
        return certify_runs(objectives, *data, gamma=self.config.gamma, confidence=confidence)

    @torch.no_grad()
    def _shorten(self, batch: Batch, old: list[dict[str, Tensor]]) -> np.ndarray:
        """Take policies back towards `old` until their steps are certified: fractions (R,)."""
        policies = self.learner.policies
        new = policy_parameters(policies)

        def promise(fraction: Tensor) -> Tensor:
            place(policies, old, new, fraction)
            parameters, _ = self.learner.evaluate(batch.observation)
            log_ratio = self.distribution.log_prob(parameters, batch.action) - batch.log_prob
            kl = self.distribution.kl(batch.parameters, parameters)
            found = self._certificates(batch, parameters, log_ratio, kl, confidence_per_candidate())
            return found["certificate"]

        fraction = certified_fraction(promise, self.runs)
        place(policies, old, new, fraction)
        return fraction.numpy()

    def _weight(
        self, r: int, batch: Batch, parameters: Tensor, log_ratio: Tensor, advantage: Tensor
    ) -> Tensor:
        """The weight of every sample of one run; its advantages stand in for the median's."""
        objective = self.recipes[r].objective
        inputs = objective_inputs(
            objective, self.distribution, parameters, log_ratio + batch.log_prob, batch
        )
        if "median_advantage" in objective.needs:
            inputs["median_advantage"] = batch.returns - batch.value
        return objective.weight(log_ratio, advantage, **inputs)

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
