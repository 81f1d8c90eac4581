"""Actor-critic training with any recipe of the core, from top to bottom.

    for every update:
        collect    T steps in E environments, with R policies side by side
        prepare    normalise rewards, values, generalised advantage estimation
        update     epochs of minibatches of the recipe's surrogate       (learner.py, fast.py)
        measure    exact KL(old || new), ratio tails, ESS, ... of the new policy on the rollout
        log, adapt the KL penalty, checkpoint

Arrays carry a leading axis of runs R: several seeds and recipes on one environment are trained as
one computation, one run being the special case. Every run has its own random generator,
environments, statistics and optimiser state, so that it does not depend on its neighbours.
Environments reset on the step after an episode's end: that dummy step is masked everywhere, and
the observation before it is the episode's last, whose value a truncated episode bootstraps from.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgpo.control.config import TrainConfig, shared_fields
from rgpo.control.distributions import distribution_for
from rgpo.control.environments import make_environments
from rgpo.control.fast import FastLearner
from rgpo.control.learner import Batch, Learner, PlainLearner, Schedule
from rgpo.control.networks import ActorCritic
from rgpo.control.normalize import ObservationNormalizer, RewardScaler
from rgpo.core.advantage import gae, normalize
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
        self.runs, self.envs, self.time = len(configs), config.num_envs, config.rollout_steps
        self.recipes = [c.resolve() for c in self.configs]
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
        for recipe in self.recipes:
            if recipe.objective.needs:
                missing = ", ".join(recipe.objective.needs)
                raise RgpoError(
                    f"recipe {recipe.name!r} needs {missing}, which control tasks do not have: "
                    "choose another recipe"
                )
            if recipe.level != "token":
                raise RgpoError(
                    f"recipe {recipe.name!r} forms its ratio per {recipe.level}, but a control "
                    "task has one action per step: use its token-level relative, such as ppo"
                )

    def _make_learner(self, shapes: dict[str, tuple[int, ...]]) -> Learner:
        policies = [ActorCritic(shapes, self.distribution, c, c.seed) for c in self.configs]
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
        batch = self._prepare(rollout)
        progress = self.updates_done / self.config.updates
        decay = 1 - progress if self.config.schedule == "linear" else 1.0
        learning_rate = np.array([c.learning_rate * decay for c in self.configs])
        coefficients = np.array([p.coefficient if p else 0.0 for p in self.penalties])
        order = self._minibatch_order()
        learned = self.learner.update(batch, order, Schedule(learning_rate, coefficients))
        metrics = self._measure(batch) | learned
        metrics |= {"learning_rate": learning_rate, "kl_coefficient": coefficients}
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
            step = self.environments.step(self.distribution.to_env(flat))
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
    def _prepare(self, rollout: Rollout) -> Batch:
        """Values, behaviour log-probs and advantages: (R, N) with N = T * E, time-major."""
        done = rollout.terminated | rollout.truncated
        reward = self.scaler(np.moveaxis(rollout.reward, 0, 1), np.moveaxis(done, 0, 1))
        observation = {
            k: torch.from_numpy(v.reshape(self.runs, -1, *v.shape[3:]))
            for k, v in rollout.observation.items()
        }
        parameters, values = self.learner.evaluate(observation)
        size = self.config.batch_size
        observation = {k: v[:, :size].contiguous() for k, v in observation.items()}
        parameters = parameters[:, :size].contiguous()
        values = values.view(self.runs, self.time + 1, self.envs).transpose(0, 1)
        advantage, returns = gae(
            torch.from_numpy(np.ascontiguousarray(reward)),
            values[:-1],
            values[1:],
            torch.from_numpy(np.moveaxis(rollout.terminated, 0, 1)),
            torch.from_numpy(np.moveaxis(rollout.truncated, 0, 1)),
            self.config.gamma,
            self.config.lam,
        )
        action = torch.from_numpy(rollout.action.reshape(self.runs, size, -1))

        def by_run(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).reshape(self.runs, size)

        return Batch(
            observation=observation,
            action=action,
            parameters=parameters,
            log_prob=self.distribution.log_prob(parameters, action),
            advantage=by_run(advantage),
            returns=by_run(returns),
            value=by_run(values[:-1]),
            mask=torch.from_numpy(rollout.valid.reshape(self.runs, size)),
        )

    @torch.no_grad()
    def _measure(self, batch: Batch) -> dict[str, np.ndarray]:
        """Every diagnostic of the new policy against the old one, on the whole rollout."""
        mask, count = batch.mask, torch.clamp(batch.mask.sum(-1), min=1)
        parameters, _ = self.learner.evaluate(batch.observation)
        log_ratio = self.distribution.log_prob(parameters, batch.action) - batch.log_prob
        advantage = normalize(batch.advantage, mask, dim=-1)
        weight = torch.stack(
            [
                recipe.objective.weight(log_ratio[r], advantage[r])
                for r, recipe in enumerate(self.recipes)
            ]
        )
        kl = self.distribution.kl(batch.parameters, parameters)
        entropy = self.distribution.entropy(parameters)
        metrics = ratio_diagnostics(log_ratio, advantage, weight, mask)
        metrics["kl"] = torch.where(mask, kl, 0).sum(-1) / count
        metrics["kl_spike"] = (metrics["kl"] > KL_SPIKE).float()
        metrics["entropy"] = torch.where(mask, entropy, 0).sum(-1) / count
        metrics["explained_variance"] = explained_variance(batch.value, batch.returns, mask)
        return {name: tensor.double().numpy() for name, tensor in metrics.items()}

    def _adapt(self, metrics: dict[str, np.ndarray]) -> None:
        """Adapt the KL penalties; set runs aside whose update was not finite."""
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
                self.penalties[r] = penalty.adapt(float(metrics["kl"][r]))

    def _silence(self, run: int) -> None:
        """Start a failed run from zeros, after each update: its NaN must not reach neighbours.

        They share the environments, which refuse a batch with one NaN in it.
        """
        state = self.learner.state(run)
        self.learner.restore(run, {k: torch.zeros_like(v) for k, v in state.items()})

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

    # ---- checkpoints ----------------------------------------------------------------------

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Tensors and JSON of every run; with `restore`, training continues bit for bit."""
        environments = self.environments.state()  # of all runs, once
        return [self._state_of_run(run, environments) for run in range(self.runs)]

    def _state_of_run(
        self, run: int, environments: dict[str, Any] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {k: v.contiguous() for k, v in self.learner.state(run).items()}
        for prefix, moments in (("obs", self.normalizer.moments), ("ret", self.scaler.moments)):
            for name, array in moments.state(run).items():
                tensors[f"{prefix}.{name}"] = torch.from_numpy(array)
        mine = slice(run * self.envs, (run + 1) * self.envs)
        tensors["discounted"] = torch.from_numpy(self.scaler.discounted[run].copy())
        tensors["running_return"] = torch.from_numpy(self.running_return[mine].copy())
        tensors["running_length"] = torch.from_numpy(self.running_length[mine].copy())
        for key, array in self.current.items():
            tensors[f"current.{key}"] = torch.from_numpy(array[mine].copy())
        penalty = self.penalties[run]
        return tensors, {
            "generator": checkpoint.generator_state(self.generators[run]),
            "kl_coefficient": None if penalty is None else penalty.coefficient,
            "environments": _part(environments, mine),
        }

    def restore(self, saved: Sequence[checkpoint.Checkpoint]) -> None:
        """Continue where `states` was taken, every run after the same update.

        Environments whose state could not be captured (EnvPool's) have started new episodes.
        """
        self.updates_done = saved[0].update
        for run, one in enumerate(saved):
            self._restore_run(run, one.tensors, one.state)
        self.normalizer.refresh()
        states = [one.state["environments"] for one in saved]
        if any(state is None for state in states):
            return
        self.environments.restore(_joined(states))
        for run, one in enumerate(saved):
            mine = slice(run * self.envs, (run + 1) * self.envs)
            self.scaler.discounted[run] = one.tensors["discounted"].numpy()
            self.running_return[mine] = one.tensors["running_return"].numpy()
            self.running_length[mine] = one.tensors["running_length"].numpy()
            for key, array in self.current.items():
                array[mine] = one.tensors[f"current.{key}"].numpy()

    def _restore_run(self, run: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.learner.restore(run, tensors)
        for prefix, moments in (("obs", self.normalizer.moments), ("ret", self.scaler.moments)):
            moments.restore(
                run, {k: tensors[f"{prefix}.{k}"].numpy() for k in ("mean", "variance", "count")}
            )
        self.generators[run] = checkpoint.restore_generator(state["generator"])
        penalty = self.penalties[run]
        if penalty is not None and state["kl_coefficient"] is not None:
            self.penalties[run] = replace(penalty, coefficient=state["kl_coefficient"])


def _part(state: dict[str, Any] | None, mine: slice) -> dict[str, Any] | None:
    """The part of a batch's environments that belongs to one run."""
    if state is None:
        return None
    lists = {k: v[mine] for k, v in state.items() if isinstance(v, list)}
    return state | lists


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of all runs' environments, put together again."""
    lists = {
        k: [one for state in states for one in state[k]]
        for k, v in states[0].items()
        if isinstance(v, list)
    }
    return states[0] | lists
