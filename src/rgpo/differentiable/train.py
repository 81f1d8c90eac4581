"""Reparameterised PPO from top to bottom.

    for every update:
        unroll     H steps of E environments, graph attached                    (window.py)
        gradients  one back-propagation through time caches G = dR / da
        policy     M epochs on weight * <G, a regenerated> - KL - entropy       (surrogate.py)
        critics    TD(lambda) targets from the target critics, a few passes
        measure    exact KL(old || new), ratio tails, |G|, variances
        log, adapt the KL penalty, checkpoint

One epoch is SHAC (arXiv 2204.07137); reusing the cached gradients is RPO (arXiv 2508.06214), here
called ReparamPPO, because RPO is also the name of another method. Under `reppo` nothing is
differentiated but the critic: G = dQ / da of a learned Q at the cached actions, after REPPO
(arXiv 2507.11019), whose separate action samples, categorical critic and gating of states by
their KL are not taken over.
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgpo.control.device import usable_device
from rgpo.control.normalize import RunningMoments
from rgpo.core.advantage import gae
from rgpo.core.diagnostics import KL_SPIKE, explained_variance, ratio_diagnostics
from rgpo.core.kl import KLPenalty, normal_kl
from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.networks import Actor, Critics
from rgpo.differentiable.surrogate import (
    normal_entropy,
    normal_log_prob,
    reparam_surrogate,
    squash_log_slope,
)
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


@dataclass
class Batch:
    """One window without graph, N samples, those of environments that went wrong left out."""

    observation: Tensor
    """(N, O), normalised."""
    action: Tensor
    """(N, A), before squashing."""
    gradient: Tensor
    """G, (N, A)."""
    mean: Tensor
    """Of the behaviour policy, (N, A)."""
    log_std: Tensor
    """Likewise."""
    log_prob: Tensor
    """Of the actions under the behaviour policy, (N,)."""


class ReparamTrainer:
    """One run on E environments; `step` makes one update and returns its row in a list.

    Raises RgpoError for configurations that cannot run, and where training cannot go on.
    """

    def __init__(self, config: ReparamConfig) -> None:
        self.config, self.configs = config, [config]
        self.recipe = config.resolve()
        self.penalty: KLPenalty | None = self.recipe.kl
        self.device, self.dtype = usable_device(config.device), getattr(torch, config.dtype)
        self.task = make_task(config.env)
        self.environments = TaskVectorEnv(
            self.task, config.num_envs, seed=config.seed, device=self.device, dtype=self.dtype
        )
        self.environments.reset(options={"stagger": True})
        self._make_networks()
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.moments = RunningMoments(1, (self.task.observation_size,))
        self.refresh()
        self.log_entropy_weight = np.log(max(config.entropy_coefficient, 1e-30))
        self.updates_done = 0
        self.running_return = torch.zeros(config.num_envs, dtype=torch.float64, device=self.device)
        self.running_length = torch.zeros(config.num_envs, dtype=torch.int64, device=self.device)
        self.whole = self.environments.elapsed == 0  # not cut short by the staggered start
        self.failed: dict[int, str] = {}
        self.told_nonfinite = False
        self._refuse_early()

    # ---- construction ---------------------------------------------------------------------

    def _make_networks(self) -> None:
        config, task = self.config, self.task
        generator = torch.Generator().manual_seed(config.seed)
        actor = Actor(
            task.observation_size,
            task.action_size,
            config.hidden,
            initial_log_std=config.initial_log_std,
            state_dependent_std=config.state_dependent_std,
            generator=generator,
        )
        inputs = task.observation_size + (task.action_size if self.learns_q else 0)
        critics = Critics(inputs, config.hidden, config.critics, generator)
        targets = Critics(inputs, config.hidden, config.critics, generator)
        targets.load_state_dict(critics.state_dict())
        self.actor = actor.to(self.device, self.dtype)
        self.critics = critics.to(self.device, self.dtype)
        self.targets = targets.to(self.device, self.dtype).requires_grad_(False)  # noqa: FBT003
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), betas=(0.7, 0.95), fused=True)
            for name, network in (("actor", self.actor), ("critics", self.critics))
        }

    @torch.enable_grad()
    def _refuse_early(self) -> None:
        if self.learns_q:
            return
        require_gradient(self.environments)
        functions = (self.actor, self._normalize, self._bootstrap)
        needed = self.config.window * graph_bytes(self.environments, *functions)
        free = _free_bytes(self.device)
        if needed > 0.9 * free:
            raise RgpoError(
                f"a window of {self.config.window} steps x {self.config.num_envs} environments "
                f"needs about {needed / 2**30:.1f} GiB for its graph and {free / 2**30:.1f} GiB "
                "are free: shorten --window or lower --num-envs"
            )

    @property
    def learns_q(self) -> bool:
        """Whether the critics take the action too, and give its gradient."""
        return self.config.algo == "reppo"

    # ---- one update -----------------------------------------------------------------------

    def step(self) -> list[Row]:
        """Unroll, differentiate, learn, measure: one row of metrics."""
        start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._set_learning_rate()
        window = self._timed("rollout", self._unroll)
        if self.learns_q:  # the critics first: their gradient is the policy's
            alive = self._alive(window, None)
            advantage, explained = self._timed("critic", self._update_critics, window, alive)
            gradient = self._timed("backward", self._q_gradients, window)
        else:
            gradient = self._timed("backward", action_gradients, window)
            alive = self._alive(window, gradient)
        batch = self._batch(window, gradient, alive)
        metrics = self._timed("actor", self._update_actor, batch)
        if not self.learns_q:
            advantage, explained = self._timed("critic", self._update_critics, window, alive)
        metrics |= self._measure(batch) | {"explained_variance": explained}
        metrics |= self._compare_variances(window, gradient, advantage, alive)
        self.updates_done += 1
        self._adapt(metrics)
        self._see(window, alive)
        row = self._progress(window) | {name: float(value) for name, value in metrics.items()}
        return [row | self.seconds | {"seconds": time.perf_counter() - start}]

    def _timed(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` gives; its seconds are noted."""
        start = time.perf_counter()
        result = work(*arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[f"seconds_{name}"] = time.perf_counter() - start
        return result

    def _set_learning_rate(self) -> None:
        share = self.updates_done / self.config.updates
        decay = 1 - share if self.config.schedule == "linear" else 1.0
        rates = (self.config.learning_rate, self.config.critic_learning_rate)
        for optimizer, rate in zip(self.optimizers.values(), rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * decay

    def _unroll(self) -> Window:
        config = self.config
        size = (config.window, config.num_envs, self.task.action_size)
        noise = torch.randn(size, generator=self.generator, dtype=self.dtype, device=self.device)
        with torch.set_grad_enabled(not self.learns_q):
            return unroll(
                self.environments,
                self.actor,
                self._normalize,
                self._no_value if self.learns_q else self._bootstrap,
                noise,
                gamma=config.gamma,
                entropy_reward=self._entropy_weight() if self._soft_values else 0.0,
            )

    @property
    def _soft_values(self) -> bool:
        return self.config.soft_rewards and not self.learns_q

    def _entropy_weight(self) -> float:
        return float(np.exp(self.log_entropy_weight)) if self.config.entropy_coefficient else 0.0

    def _bootstrap(self, final: Tensor) -> Tensor:
        return self.targets(final).mean(0)

    def _no_value(self, final: Tensor) -> Tensor:
        return final.new_zeros(len(final))

    def _alive(self, window: Window, gradient: Tensor | None) -> Tensor:
        """Environments (E,) whose window is finite throughout; the others begin new episodes."""
        parts = [window.final, window.reward[..., None]] + ([] if gradient is None else [gradient])
        finite = torch.stack([torch.isfinite(part).all(-1) for part in parts]).all(0)
        alive = finite.all(0)
        if not bool(alive.all()):
            t, e = (int(i) for i in (~finite).nonzero()[0])
            where = f"environment {e}, step {t} of the window of update {self.updates_done + 1}"
            if not bool(alive.any()):
                raise RgpoError(
                    f"every environment's gradient or state was not finite, first in {where}: "
                    "shorten --window, lower --learning-rate or bound the dynamics"
                )
            if not self.told_nonfinite:
                warnings.warn(
                    f"a gradient or state was not finite in {where}; such environments are left "
                    "out of the update and start anew (metric nonfinite_environments)",
                    stacklevel=2,
                )
            self.told_nonfinite = True
            self.environments.restart(~alive)
            self.running_return[~alive], self.running_length[~alive] = 0, 0
            self.whole = self.whole | ~alive
        return alive

    def _batch(self, window: Window, gradient: Tensor, alive: Tensor) -> Batch:
        def flat(tensor: Tensor) -> Tensor:
            return tensor[:, alive].flatten(0, 1)

        action = flat(torch.stack(window.action).detach())
        mean, log_std = flat(window.mean), flat(window.log_std)
        log_prob = normal_log_prob(mean, log_std, action)
        return Batch(flat(window.observation), action, flat(gradient), mean, log_std, log_prob)

    # ---- policy ---------------------------------------------------------------------------

    def _update_actor(self, batch: Batch) -> dict[str, Any]:
        """M epochs over the window; the mean gradient norm and the steps taken."""
        norms: list[Tensor] = []
        for _ in range(self.config.epochs):
            for index in self._minibatches(len(batch.action), self.config.minibatches):
                loss, kl = self._actor_loss(batch, index)
                limit = self.config.target_kl
                if limit is not None and float(kl) > 1.5 * limit:
                    return _norms(norms)
                norms.append(self._optimize("actor", self.actor, loss))
        return _norms(norms)

    def _actor_loss(self, batch: Batch, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Minus surrogate, plus KL penalty, minus entropy bonus; and the mean KL."""
        mean, log_std = self.actor(batch.observation[index])
        surrogate, _, _ = reparam_surrogate(
            self.recipe.objective,
            mean,
            log_std,
            batch.action[index],
            batch.gradient[index],
            batch.log_prob[index],
        )
        kl = normal_kl(batch.mean[index], batch.log_std[index], mean, log_std).mean()
        loss = -surrogate.mean()
        if self.penalty is not None:
            loss = loss + self.penalty.coefficient * kl
        if self.config.entropy_coefficient:
            loss = loss - self._entropy_weight() * normal_entropy(log_std).mean()
        return loss, kl.detach()

    def _minibatches(self, size: int, number: int) -> list[Any]:
        if number == 1:
            return [slice(None)]
        order = torch.randperm(size, generator=self.generator, device=self.device)
        return list(order.chunk(number))

    def _optimize(self, name: str, network: torch.nn.Module, loss: Tensor) -> Tensor:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        limit = self.config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
        optimizer.step()
        return norm

    # ---- critics --------------------------------------------------------------------------

    def _update_critics(self, window: Window, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Regression on TD(lambda) targets, then the targets follow.

        Returns the advantages (H, E) and the explained variance, both of the targets before.
        """
        inputs, returns, value = self._critic_targets(window)
        advantage, before = returns - value, value[:, alive].flatten()
        inputs, returns = inputs[:, alive].flatten(0, 1), returns[:, alive].flatten()
        for _ in range(self.config.critic_epochs):
            for index in self._minibatches(len(returns), self.config.critic_minibatches):
                error = self.critics(inputs[index]) - returns[index]
                # summed over critics: each learns as if alone, but for the joint gradient clip
                self._optimize("critics", self.critics, (error**2).mean(1).sum())
        share = 1 - self.config.target_keep
        with torch.no_grad():
            pairs = zip(self.targets.parameters(), self.critics.parameters(), strict=True)
            for target, online in pairs:
                target.lerp_(online, share)
        return advantage, explained_variance(before, returns)

    @torch.no_grad()
    def _critic_targets(self, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (H, E, I), TD(lambda) returns and values (H, E), by the target critics' minimum.

        Q: on-policy next actions, in the window those that were taken; the entropy of the next
        state is not counted where the task ended there.
        """
        shape = window.reward.shape
        inputs, following = window.observation, window.final
        reward = window.reward + window.bonus
        if self.learns_q:
            inputs = torch.cat([inputs, self._squash(torch.stack(window.action))], dim=-1)
            mean, log_std = self.actor(following)
            noise = torch.randn(
                mean.shape, generator=self.generator, dtype=self.dtype, device=self.device
            )
            action = mean + torch.exp(log_std) * noise
            going = ~(window.terminated | window.truncated)[:-1, :, None]
            taken = torch.stack(window.action)[1:]
            action = torch.cat([torch.where(going, taken, action[:-1]), action[-1:]])
            following = torch.cat([following, self._squash(action)], dim=-1)
            if self.config.soft_rewards:
                entropy = normal_entropy(log_std)
                entropy = entropy + (squash_log_slope(action) if self.task.bounded else 0.0)
                bonus = self.config.gamma * self._entropy_weight() * entropy
                reward = reward + torch.where(window.terminated, 0, bonus)
        value, next_value = (
            self.targets(x.flatten(0, 1)).amin(0).view(shape) for x in (inputs, following)
        )
        ends = (window.terminated, window.truncated)
        _, returns = gae(reward, value, next_value, *ends, self.config.gamma, self.config.lam)
        return inputs, returns, value

    def _q_gradients(self, window: Window) -> Tensor:
        """DQ / da at the cached actions, before squashing, mean over critics: (H, E, A)."""
        action = torch.stack(window.action).detach().requires_grad_()
        inputs = torch.cat([window.observation, self._squash(action)], dim=-1)
        value = self.critics(inputs.flatten(0, 1)).mean(0).sum()
        (gradient,) = torch.autograd.grad(value, action)
        return gradient

    def _squash(self, action: Tensor) -> Tensor:
        return torch.tanh(action) if self.task.bounded else action

    # ---- measuring ------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self, batch: Batch) -> dict[str, Any]:
        """Every diagnostic of the new policy against the old one, on the whole window."""
        mean, log_std = self.actor(batch.observation)
        log_ratio = normal_log_prob(mean, log_std, batch.action) - batch.log_prob
        ones = torch.ones_like(log_ratio)
        weight = self.recipe.objective.weight(log_ratio, ones)
        metrics: dict[str, Any] = ratio_diagnostics(log_ratio, ones, weight)
        metrics["kl"] = normal_kl(batch.mean, batch.log_std, mean, log_std).mean()
        metrics["kl_spike"] = metrics["kl"] > KL_SPIKE
        entropy = normal_entropy(log_std)
        if self.task.bounded:
            entropy = entropy + squash_log_slope(batch.action)
        metrics["entropy"] = entropy.mean()
        metrics["ratio_kept"] = (weight != 0).to(log_ratio.dtype).mean()
        norm = torch.linalg.vector_norm(batch.gradient, dim=-1)
        metrics["action_gradient_norm"] = norm.mean()
        metrics["action_gradient_max"] = norm.max()
        metrics["learning_rate"] = self.optimizers["actor"].param_groups[0]["lr"]
        metrics["kl_coefficient"] = self.penalty.coefficient if self.penalty else 0.0
        metrics["entropy_coefficient"] = self._entropy_weight()
        return metrics

    @torch.no_grad()
    def _compare_variances(
        self, window: Window, gradient: Tensor, advantage: Tensor, alive: Tensor
    ) -> dict[str, Any]:
        """Variance over samples of the two estimators of the same d J / d mean(s_t)."""
        score = (torch.stack(window.action).detach() - window.mean) * torch.exp(-2 * window.log_std)
        score = score * (window.discount * advantage)[..., None]

        def variance(sample: Tensor) -> Tensor:
            return sample[:, alive].flatten(0, 1).var(0).sum()

        return {
            "variance_pathwise": variance(gradient),
            "variance_score": variance(score),
            "nonfinite_environments": (~alive).sum(),
        }

    def _adapt(self, metrics: dict[str, Any]) -> None:
        """Adapt KL penalty and entropy weight; a run whose update was not finite has failed."""
        kl, norm = float(metrics["kl"]), float(metrics["gradient_norm"])
        if not (np.isfinite(kl) and np.isfinite(norm)):
            self.failed[0] = (
                f"update {self.updates_done} (step {self.steps_done}) had a non-finite gradient "
                "or KL: lower the learning rate or add a KL penalty (--set kl_coefficient=0.2)"
            )
        if self.penalty is not None:
            self.penalty = self.penalty.adapt(kl)
        if self.config.entropy_target is not None:  # d/d(log a) of a (H - target), SAC's form
            target = self.config.entropy_target * self.task.action_size
            self.log_entropy_weight -= 5e-3 * np.sign(float(metrics["entropy"]) - target)

    def _see(self, window: Window, alive: Tensor) -> None:
        """Take the window's observations into the statistics, for the next one."""
        raw = window.raw[:, alive].flatten(0, 1)
        self.moments.update(raw.double().cpu().numpy()[None])
        self.refresh()

    def refresh(self) -> None:
        """Normalise with the statistics as they are now."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, dtype=self.dtype, device=self.device)

        self.shift = tensor(self.moments.mean[0])
        self.scale = tensor(1 / np.sqrt(self.moments.variance[0] + 1e-8))

    def _normalize(self, observation: Tensor) -> Tensor:
        if not self.config.normalize_observations:
            return observation
        return torch.clamp((observation - self.shift) * self.scale, -10, 10)

    @torch.no_grad()
    def mode(self, observation: Tensor) -> Tensor:
        """Deterministic actions (N, A), as the environment takes them, from raw observations."""
        return self._squash(self.actor(self._normalize(observation))[0])

    @property
    def steps_done(self) -> int:
        """Environment steps so far."""
        return self.updates_done * self.config.batch_size

    def _progress(self, window: Window) -> Row:
        """Counters, and return and length of the episodes that ended in the window."""
        returns, lengths = [], []
        for reward, done in zip(window.reward, window.terminated | window.truncated, strict=True):
            self.running_return += reward
            self.running_length += 1
            if bool(done.any()):
                counted = done & self.whole
                returns.append(self.running_return[counted])
                lengths.append(self.running_length[counted].double())
                self.running_return[done], self.running_length[done] = 0, 0
                self.whole = self.whole | done
        ended = len(torch.cat(returns)) if returns else 0
        return {
            "update": self.updates_done,
            "step": self.steps_done,
            "return": float(torch.cat(returns).mean()) if ended else None,
            "episode_length": float(torch.cat(lengths).mean()) if ended else None,
            "episodes": ended,
        }

    # ---- checkpoints ----------------------------------------------------------------------

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Tensors and JSON of the run; with `restore`, training continues bit for bit."""
        tensors = {
            "environments.state": self.environments.state.detach(),
            "environments.elapsed": self.environments.elapsed,
            "environments.generator": self.environments.generator.get_state(),
            "generator": self.generator.get_state(),
            "running_return": self.running_return,
            "running_length": self.running_length,
            "whole": self.whole,
        }
        for name, network in self._networks().items():
            tensors |= {f"{name}.{k}": v.detach() for k, v in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"adam.{name}.{number}.{k}": v for k, v in state.items()}
        for name, array in self.moments.state(0).items():
            tensors[f"obs.{name}"] = torch.from_numpy(array)
        return [
            (
                tensors,
                {
                    "kl_coefficient": self.penalty.coefficient if self.penalty else None,
                    "log_entropy_weight": float(self.log_entropy_weight),
                },
            )
        ]

    def _networks(self) -> dict[str, torch.nn.Module]:
        return {"actor": self.actor, "critics": self.critics, "targets": self.targets}

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue where `states` was taken."""
        tensors = saved.tensors
        self.updates_done = saved.update
        self.environments.state = tensors["environments.state"].to(self.device)
        self.environments.elapsed = tensors["environments.elapsed"].to(self.device)
        self.environments.generator.set_state(tensors["environments.generator"])
        self.generator.set_state(tensors["generator"])
        self.running_return = tensors["running_return"].to(self.device)
        self.running_length = tensors["running_length"].to(self.device)
        self.whole = tensors["whole"].to(self.device)
        for name, network in self._networks().items():
            network.load_state_dict(part_of(tensors, f"{name}."))
        for name, optimizer in self.optimizers.items():
            _restore_optimizer(optimizer, part_of(tensors, f"adam.{name}."))
        self.moments.restore(0, {k: v.numpy() for k, v in part_of(tensors, "obs.").items()})
        self.refresh()
        self.log_entropy_weight = saved.state["log_entropy_weight"]
        if self.penalty is not None:
            coefficient = saved.state["kl_coefficient"]
            self.penalty = KLPenalty(coefficient, self.penalty.target)


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    document = optimizer.state_dict()
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        document["state"].setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(document)


def _norms(norms: list[Tensor]) -> dict[str, Any]:
    mean = torch.stack(norms).mean() if norms else torch.tensor(0.0)
    return {"gradient_norm": mean, "optimizer_steps": len(norms)}


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
