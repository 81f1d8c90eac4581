"""Reparameterised PPO from top to bottom.

    for every update:
        unroll     H steps of E environments, graph attached                    (window.py)
        gradients  one back-propagation through time caches G = dR / da
        policy     M epochs on weight * <G, a regenerated> - KL - entropy       (learner.py)
        critics    TD(lambda) targets from the target critics, a few passes
        measure    exact KL(old || new), ratio tails, |G|, variances            (measuring.py)
        log, adapt the KL penalty, checkpoint                                   (state.py)

One epoch is SHAC (arXiv 2204.07137); reusing the cached gradients is RPO (arXiv 2508.06214), here
called ReparamPPO, because RPO is also the name of another method. Under `reppo` nothing is
differentiated but the critic: G = dQ / da of a learned Q at the cached actions, after REPPO
(arXiv 2507.11019), whose separate action samples, categorical critic and gating of states by
their KL are not taken over.

Tensors carry a leading axis of runs R: several seeds and recipes on one task are trained as one
computation, one run being the special case. Every run has its own random generators, environments,
statistics, optimiser state and KL penalty: it does not depend on its neighbours.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgpo.control import memory
from rgpo.control.device import usable_device
from rgpo.core.advantage import gae
from rgpo.core.diagnostics import explained_variance
from rgpo.core.kl import KLPenalty
from rgpo.differentiable import state
from rgpo.differentiable.config import ReparamConfig, require_shared
from rgpo.differentiable.learner import Batch, Learner, Schedule
from rgpo.differentiable.measuring import Episodes, measure, variances
from rgpo.differentiable.normalize import Normalizer
from rgpo.differentiable.surrogate import normal_entropy, normal_log_prob, squash_log_slope
from rgpo.differentiable.tasks import make_task
from rgpo.differentiable.vector import TaskVectorEnv
from rgpo.differentiable.window import (
    Window,
    action_gradients,
    graph_bytes,
    require_gradient,
    unroll,
)
from rgpo.errors import RgpoError
from rgpo.runs import checkpoint

Row = dict[str, float | None]


class ReparamTrainer:
    """R runs of E environments each; `step` makes one update of all of them: a row per run.

    Raises RgpoError for configurations that cannot run or cannot be trained together, and where
    training cannot go on; a run that diverges is set aside in `failed`.
    """

    def __init__(self, configs: Sequence[ReparamConfig]) -> None:
        self.configs = list(configs)
        require_shared(self.configs)
        self.config = config = self.configs[0]
        self.runs = len(self.configs)
        recipes = [c.resolve() for c in self.configs]
        self.penalties: list[KLPenalty | None] = [recipe.kl for recipe in recipes]
        self.device, self.dtype = usable_device(config.device), getattr(torch, config.dtype)
        self.task = make_task(config.env)
        self.environments = TaskVectorEnv(
            self.task,
            self.runs * config.num_envs,
            seed=[c.seed for c in self.configs],
            device=self.device,
            dtype=self.dtype,
        )
        self.environments.reset(options={"stagger": True})
        self.learner = Learner(self.task, self.configs, recipes, self.device, self.dtype)
        self.normalizer = Normalizer(
            self.runs,
            self.task.observation_size,
            enabled=config.normalize_observations,
            dtype=self.dtype,
            device=self.device,
        )
        start = np.log(max(config.entropy_coefficient, 1e-30))
        self.log_entropy_weights = np.full(self.runs, start)
        self.updates_done = 0
        self.episodes = Episodes(self.environments.elapsed.view(self.runs, -1))
        self.failed: dict[int, str] = {}
        self.told_nonfinite = False
        self._refuse_early()

    # ---- construction ---------------------------------------------------------------------

    @torch.enable_grad()
    def _refuse_early(self) -> None:
        if self.learns_q:
            return
        require_gradient(self.environments)
        functions = (self.learner.actor, self.normalizer, self._bootstrap)
        needed = self.config.window * graph_bytes(self.environments, *functions, self.runs)
        free = memory.available_bytes(self.device)
        if needed > 0.9 * free:
            raise RgpoError(
                f"a window of {self.config.window} steps x {self.environments.num_envs} "
                f"environments needs about {needed / 2**30:.1f} GiB for its graph and "
                f"{free / 2**30:.1f} GiB are free: shorten --window or lower --num-envs"
            )

    @property
    def learns_q(self) -> bool:
        """Whether the critics take the action too, and give its gradient."""
        return self.config.algo == "reppo"

    # ---- one update -----------------------------------------------------------------------

    def step(self) -> list[Row]:
        """Unroll, differentiate, learn, measure: one row of metrics per run."""
        start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        schedule = self._schedule()
        window = self._timed("rollout", self._unroll, schedule)
        if self.learns_q:  # the critics first: their gradient is the policy's
            alive = self._alive(window, None)
            critics = self._timed("critic", self._update_critics, window, alive, schedule)
            gradient = self._timed("backward", self._q_gradients, window)
        else:
            gradient = self._timed("backward", action_gradients, window)
            alive = self._alive(window, gradient)
        batch = self._batch(window, gradient, alive)
        metrics = self._timed("actor", self.learner.update_actor, batch, schedule)
        if not self.learns_q:
            critics = self._timed("critic", self._update_critics, window, alive, schedule)
        advantage, metrics["explained_variance"] = critics
        metrics |= measure(self.learner, batch, bounded=self.task.bounded)
        metrics |= variances(batch, by_run(window.discount * advantage))
        metrics["nonfinite_environments"] = (~alive).sum(1)
        metrics["learning_rate"] = schedule.learning_rate[:, 0]
        metrics["kl_coefficient"] = schedule.kl_coefficient[:, 0]
        metrics["entropy_coefficient"] = schedule.entropy_weight[:, 0]
        self.updates_done += 1
        found = torch.stack([tensor.double() for tensor in metrics.values()]).cpu().numpy()
        numbers = dict(zip(metrics, found, strict=True))
        self._adapt(numbers)
        self.normalizer.update(by_run(window.raw), batch.mask)
        ended = self.episodes.add(window, alive)
        seconds = self.seconds | {"seconds": time.perf_counter() - start}
        return [
            {"update": self.updates_done, "step": self.steps_done}
            | ended[run]
            | {name: float(array[run]) for name, array in numbers.items()}
            | {name: value / self.runs for name, value in seconds.items()}
            for run in range(self.runs)
        ]

    def _timed(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` gives; its seconds are noted."""
        start = time.perf_counter()
        result = work(*arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start
        return result

    def _schedule(self) -> Schedule:
        share = self.updates_done / self.config.updates
        decay = 1 - share if self.config.schedule == "linear" else 1.0
        weights = np.exp(self.log_entropy_weights) * (self.config.entropy_coefficient > 0)
        columns = (
            [c.learning_rate * decay for c in self.configs],
            [c.critic_learning_rate * decay for c in self.configs],
            [penalty.coefficient if penalty else 0.0 for penalty in self.penalties],
            list(weights),
        )
        return Schedule(
            *(torch.tensor(x, dtype=self.dtype, device=self.device)[:, None] for x in columns)
        )

    def _noise(self, *lead: int) -> Tensor:
        """Standard normal numbers (lead, R, E, A), from each run's own generator."""
        size = (*lead, self.config.num_envs, self.task.action_size)
        draws = [
            torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)
            for generator in self.learner.generators
        ]
        return torch.stack(draws, dim=len(lead))

    def _unroll(self, schedule: Schedule) -> Window:
        soft = self.config.soft_rewards and not self.learns_q
        with torch.set_grad_enabled(not self.learns_q):
            return unroll(
                self.environments,
                self.learner.actor,
                self.normalizer,
                self._no_value if self.learns_q else self._bootstrap,
                self._noise(self.config.window),
                gamma=self.config.gamma,
                entropy_reward=schedule.entropy_weight if soft else None,
            )

    def _bootstrap(self, final: Tensor) -> Tensor:
        return self.learner.targets(final).mean(1)

    def _no_value(self, final: Tensor) -> Tensor:
        return final.new_zeros(final.shape[:2])

    def _alive(self, window: Window, gradient: Tensor | None) -> Tensor:
        """Environments (R, E) whose window is finite throughout; the others begin new episodes.

        A run without any has failed.
        """
        parts = [window.final, window.reward[..., None]] + ([] if gradient is None else [gradient])
        finite = torch.stack([torch.isfinite(part).all(-1) for part in parts]).all(0)
        alive = finite.all(0)
        if not bool(alive.all()):
            for run in (~alive).any(1).nonzero().flatten().tolist():
                if run not in self.failed:
                    self._tell_nonfinite(run, finite[:, run])
            self.environments.restart(~alive.flatten())
        return alive

    def _tell_nonfinite(self, run: int, finite: Tensor) -> None:
        """Warn, once, that a run has environments that went wrong; fail it if all have: (H, E)."""
        t, e = (int(i) for i in (~finite).nonzero()[0])
        where = f"environment {e}, step {t} of the window of update {self.updates_done + 1}"
        if not bool(finite.all(0).any()):
            self.failed[run] = (
                f"every environment's gradient or state was not finite, first in {where}: "
                "shorten --window, lower --learning-rate or bound the dynamics"
            )
        elif not self.told_nonfinite:
            warnings.warn(
                f"a gradient or state was not finite in {where}; such environments are left "
                "out of the update and start anew (metric nonfinite_environments)",
                stacklevel=2,
            )
            self.told_nonfinite = True

    def _batch(self, window: Window, gradient: Tensor, alive: Tensor) -> Batch:
        keep = alive[:, :, None]
        parts = (window.observation, torch.stack(window.action).detach(), gradient)
        policy = (window.mean, window.log_std)
        flat = [by_run(torch.where(keep, part, 0)) for part in (*parts, *policy)]
        observation, action, gradient, mean, log_std = flat
        log_prob = normal_log_prob(mean, log_std, action)
        mask = by_run(alive.expand(len(window.raw), *alive.shape))
        return Batch(observation, action, gradient, mean, log_std, log_prob, mask)

    # ---- critics --------------------------------------------------------------------------

    def _update_critics(
        self, window: Window, alive: Tensor, schedule: Schedule
    ) -> tuple[Tensor, Tensor]:
        """Regression on TD(lambda) targets, then the targets follow.

        Returns the advantages (H, R, E) and the explained variance (R,), both of the targets
        before.
        """
        inputs, returns, value = self._critic_targets(window, schedule)
        advantage = returns - value
        keep = alive[:, :, None]
        data = [by_run(torch.where(keep, part, 0)) for part in (inputs, returns[..., None])]
        mask = by_run(alive.expand(len(inputs), *alive.shape))
        explained = explained_variance(by_run(value), by_run(returns), mask)
        self.learner.update_critics(data[0], data[1].squeeze(-1), mask, schedule)
        return advantage, explained

    @torch.no_grad()
    def _critic_targets(self, window: Window, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (H, R, E, I), TD(lambda) returns and values (H, R, E), by the targets' minimum.

        Q: on-policy next actions, in the window those that were taken; the entropy of the next
        state is not counted where the task ended there.
        """
        inputs, following = window.observation, window.final
        reward = window.reward + window.bonus
        if self.learns_q:
            taken = torch.stack(window.action)
            inputs = torch.cat([inputs, self._squash(taken)], dim=-1)
            mean, log_std = (_as_window(x, taken) for x in self.learner.actor(by_run(following)))
            action = mean + torch.exp(log_std) * self._noise(self.config.window)
            going = ~(window.terminated | window.truncated)[:-1, ..., None]
            action = torch.cat([torch.where(going, taken[1:], action[:-1]), action[-1:]])
            following = torch.cat([following, self._squash(action)], dim=-1)
            if self.config.soft_rewards:
                entropy = normal_entropy(log_std)
                entropy = entropy + (squash_log_slope(action) if self.task.bounded else 0.0)
                bonus = self.config.gamma * schedule.entropy_weight * entropy
                reward = reward + torch.where(window.terminated, 0, bonus)
        value, next_value = (
            _as_window(self.learner.targets(by_run(x)).amin(1), reward) for x in (inputs, following)
        )
        ends = (window.terminated, window.truncated)
        _, returns = gae(reward, value, next_value, *ends, self.config.gamma, self.config.lam)
        return inputs, returns, value

    def _q_gradients(self, window: Window) -> Tensor:
        """DQ / da at the cached actions, before squashing, mean over critics: (H, R, E, A)."""
        action = torch.stack(window.action).detach().requires_grad_()
        inputs = torch.cat([window.observation, self._squash(action)], dim=-1)
        value = self.learner.critics(by_run(inputs)).mean(1).sum()
        (gradient,) = torch.autograd.grad(value, action)
        return gradient

    def _squash(self, action: Tensor) -> Tensor:
        return torch.tanh(action) if self.task.bounded else action

    # ---- after the update -----------------------------------------------------------------

    def _adapt(self, metrics: dict[str, np.ndarray]) -> None:
        """Adapt KL penalties and entropy weights; set runs aside whose update was not finite."""
        healthy = np.isfinite(metrics["kl"]) & np.isfinite(metrics["gradient_norm"])
        for run in np.flatnonzero(~healthy):
            self.failed.setdefault(
                int(run),
                f"update {self.updates_done} (step {self.steps_done}) had a non-finite gradient "
                "or KL: lower the learning rate or add a KL penalty (--set kl_coefficient=0.2)",
            )
        pairs = zip(self.penalties, metrics["kl"], strict=True)
        self.penalties = [p.adapt(float(kl)) if p else None for p, kl in pairs]
        if self.config.entropy_target is not None:  # d/d(log a) of a (H - target), SAC's form
            target = self.config.entropy_target * self.task.action_size
            self.log_entropy_weights -= 5e-3 * np.sign(metrics["entropy"] - target)

    @property
    def steps_done(self) -> int:
        """Environment steps of each run so far."""
        return self.updates_done * self.config.batch_size

    # ---- checkpoints (state.py) -----------------------------------------------------------

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Tensors and JSON of every run; with `restore`, training continues bit for bit."""
        return state.states(self)

    def restore(self, saved: Sequence[checkpoint.Checkpoint]) -> None:
        """Continue where `states` was taken, every run after the same update."""
        state.restore(self, saved)


def by_run(tensor: Tensor) -> Tensor:
    """(H, R, E, ...) as samples of every run, (R, H * E, ...)."""
    return tensor.transpose(0, 1).flatten(1, 2)


def _as_window(tensor: Tensor, like: Tensor) -> Tensor:
    """Samples (R, H * E, ...) as those of a window (H, R, E, ...), whose lengths `like` tells."""
    return tensor.unflatten(1, (len(like), -1)).transpose(0, 1)
