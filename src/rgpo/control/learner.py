"""One update as a formula: autograd, torch.optim.Adam, any network. The reference of the fast path.

The reader's version of the algorithm; `rgpo.control.fast` computes the same numbers with a
hand-written backward pass and is tested against this file for every recipe.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import Distribution
from rgpo.control.networks import ActorCritic
from rgpo.control.trpo import natural_gradient_step
from rgpo.core.advantage import normalize
from rgpo.core.clipping_bias import clip_normalizer, clipped_away, gradient_norm
from rgpo.core.kl import k3
from rgpo.core.objective import Objective
from rgpo.core.recipes import Recipe
from rgpo.core.reduce import token_mean


@dataclass
class Batch:
    """One rollout of R runs, N = T * E samples each, ready to learn from."""

    observation: dict[str, Tensor]
    """Normalised; (R, N, O) float32 "vector", (R, N, C, H, W) uint8 "image"."""

    action: Tensor
    """(R, N, A), as the distribution stores it."""

    parameters: Tensor
    """(R, N, P): the behaviour policy's distribution parameters, for the exact KL."""

    log_prob: Tensor
    """(R, N): log-probability under the behaviour policy."""

    proximal_log_prob: Tensor
    """(R, N): under the recipe's anchor (`Recipe.anchor_decay`); used where an objective needs
    it."""

    advantage: Tensor
    """(R, N)."""

    returns: Tensor
    """(R, N): targets of the critic."""

    value: Tensor
    """(R, N): the critic's values at the start of the update."""

    mask: Tensor
    """(R, N) bool: False for the dummy step of an autoreset; contributes exactly nothing."""

    def run(self, r: int) -> "Batch":
        """Run r alone, without the leading axis."""
        tensors = {k: v[r] for k, v in vars(self).items() if k != "observation"}
        return Batch({k: v[r] for k, v in self.observation.items()}, **tensors)

    def __getitem__(self, index: Tensor) -> "Batch":
        """Samples by index, of a single run."""
        tensors = {k: v[index] for k, v in vars(self).items() if k != "observation"}
        return Batch({k: v[index] for k, v in self.observation.items()}, **tensors)


@dataclass(frozen=True)
class Schedule:
    """What changes from update to update, per run: (R,) float64 arrays."""

    learning_rate: np.ndarray
    kl_coefficient: np.ndarray
    """Of KL(old || new)."""

    reverse_kl_coefficient: np.ndarray
    """Of KL(new || old)."""


class Learner(Protocol):
    """R policies and their optimisers."""

    policies: list[ActorCritic]

    def set_recipes(self, recipes: list[Recipe]) -> None:
        """Objectives for the next update, of the same kinds as before."""

    def parameters_of_runs(self) -> Tensor:
        """A copy of all parameters, (R, P); zeros at the end of a run that has fewer."""

    def load_parameters(self, parameters: Tensor) -> None:
        """Take over what `parameters_of_runs` returned; the optimisers' state stays."""

    def act(self, observation: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Actions (R, E, A) for (R, E, ...) normalised observations and (R, E, K) noise."""

    def evaluate(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Distribution parameters (R, N, P) and values (R, N), without a graph."""

    def update(self, batch: Batch, order: np.ndarray, schedule: Schedule) -> dict[str, np.ndarray]:
        """All epochs over one rollout; `order` (R, epochs, N) permutes the samples.

        Returns (R,) arrays: `gradient_norm` (mean before clipping; NaN if any step's was not
        finite) and `optimizer_steps`.
        """

    def state(self, run: int) -> dict[str, Tensor]:
        """Parameters and optimiser state of one run, for a checkpoint."""

    def restore(self, run: int, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""


class PlainLearner:
    """The reference learner: one autograd loop per run."""

    def __init__(
        self,
        policies: list[ActorCritic],
        recipes: list[Recipe],
        distribution: Distribution,
        configs: list[TrainConfig],
    ) -> None:
        self.policies, self.recipes = policies, list(recipes)
        self.distribution, self.configs = distribution, configs
        self.device = next(policies[0].parameters()).device
        self.optimizers = [torch.optim.Adam(p.parameters(), eps=1e-5) for p in policies]

    def set_recipes(self, recipes: list[Recipe]) -> None:
        """See `Learner`."""
        self.recipes = list(recipes)

    @torch.no_grad()
    def parameters_of_runs(self) -> Tensor:
        """See `Learner`."""
        rows = [torch.cat([x.flatten() for x in p.parameters()]) for p in self.policies]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @torch.no_grad()
    def load_parameters(self, parameters: Tensor) -> None:
        """See `Learner`."""
        for policy, row in zip(self.policies, parameters, strict=True):
            homes = list(policy.parameters())
            sizes = [home.numel() for home in homes]
            for home, part in zip(homes, row[: sum(sizes)].split(sizes), strict=True):
                home.copy_(part.view_as(home))

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """See `Learner`."""
        actions = []
        for r, policy in enumerate(self.policies):
            inputs = {k: torch.from_numpy(v[r]).to(self.device) for k, v in observation.items()}
            drawn = torch.from_numpy(noise[r]).to(self.device)
            actions.append(self.distribution.sample(policy.policy(inputs), drawn).cpu().numpy())
        return np.stack(actions)

    @torch.no_grad()
    def evaluate(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Learner`; in slices of 1024 samples, which bounds the memory of a CNN."""
        parameters, values = [], []
        for r, policy in enumerate(self.policies):
            slices = zip(*(v[r].split(1024) for v in observation.values()), strict=True)
            parts = [policy(dict(zip(observation, s, strict=True))) for s in slices]
            parameters.append(torch.cat([p for p, _ in parts]))
            values.append(torch.cat([v for _, v in parts]))
        return torch.stack(parameters), torch.stack(values)

    def update(self, batch: Batch, order: np.ndarray, schedule: Schedule) -> dict[str, np.ndarray]:
        """See `Learner`."""
        results, shuffled = [], torch.from_numpy(order).to(self.device)
        for r in range(len(self.policies)):
            for group in self.optimizers[r].param_groups:
                group["lr"] = float(schedule.learning_rate[r])
            penalties = (schedule.kl_coefficient[r], schedule.reverse_kl_coefficient[r])
            results.append(self._update_run(r, batch.run(r), shuffled[r], penalties))
        return _summary(results)

    def _update_run(
        self, r: int, batch: Batch, order: Tensor, penalties: tuple[float, float]
    ) -> list[Tensor]:
        """The gradient norm of every step taken; the host waits only for a KL that may stop it."""
        config, policy = self.configs[r], self.policies[r]
        natural = self.recipes[r].step == "natural-gradient"
        if natural:
            natural_gradient_step(policy, self.distribution, batch, config)
        norms = []
        for epoch in order:
            for index in epoch.split(config.minibatch_size):
                sample = batch[index]
                parameters, value = policy(sample.observation)
                loss = config.value_coefficient * value_loss(value, sample, config.value_clip)
                if not natural:
                    policy_loss, kl = self._policy_loss(r, parameters, sample, penalties)
                    if config.target_kl is not None and kl > 1.5 * config.target_kl:
                        return norms
                    loss = loss + policy_loss
                norms.append(self._step(r, loss, config.max_grad_norm))
        return norms

    def _policy_loss(
        self, r: int, parameters: Tensor, sample: Batch, penalties: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Surrogate, KL penalties and entropy bonus of one minibatch; and its k3 estimate."""
        config, mask, objective = self.configs[r], sample.mask, self.recipes[r].objective
        log_prob = self.distribution.log_prob(parameters, sample.action)
        log_ratio = log_prob - sample.log_prob
        advantage = sample.advantage
        if config.normalize_advantages:
            advantage = normalize(advantage, mask)
        inputs = objective_inputs(objective, self.distribution, parameters, log_prob, sample)
        if "median_advantage" in objective.needs:
            median = self.policies[r].medians(sample.observation)
            inputs["median_advantage"] = sample.returns - median.detach()
        surrogate = objective.surrogate(log_ratio, advantage, **inputs)
        loss = -token_mean(surrogate, mask)
        if self.recipes[r].step == "clip-normalized":
            weight = objective.weight(log_ratio.detach(), advantage, **inputs)
            bias = token_mean(clipped_away(log_ratio, advantage, weight), mask)
            loss = loss * clip_normalizer(gradient_norm(bias, self.policies[r].parameters()))
        if "median_advantage" in objective.needs:
            loss = loss + 0.5 * token_mean(median_loss(sample.returns - median), mask)
        ends = (sample.parameters, parameters)
        for coefficient, (p, q) in zip(penalties, (ends, ends[::-1]), strict=True):
            if coefficient:
                loss = loss + float(coefficient) * token_mean(self.distribution.kl(p, q), mask)
        if config.entropy_coefficient:
            entropy = self.distribution.entropy(parameters)
            loss = loss - config.entropy_coefficient * token_mean(entropy, mask)
        return loss, token_mean(k3(log_ratio.detach()), mask)

    def _step(self, r: int, loss: Tensor, max_grad_norm: float) -> Tensor:
        self.optimizers[r].zero_grad()
        loss.backward()
        limit = max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.policies[r].parameters(), limit)
        self.optimizers[r].step()
        return norm

    def state(self, run: int) -> dict[str, Tensor]:
        """See `Learner`."""
        policy, optimizer = self.policies[run], self.optimizers[run]
        tensors = {f"policy.{k}": v.detach() for k, v in policy.state_dict().items()}
        for name, parameter in policy.named_parameters():
            for key, tensor in optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = tensor
        return tensors

    def restore(self, run: int, state: dict[str, Tensor]) -> None:
        """See `Learner`."""
        policy, optimizer = self.policies[run], self.optimizers[run]
        load_policy(policy, state)
        for name, parameter in policy.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam.{key}.{name}" in state:
                    saved = state[f"adam.{key}.{name}"].clone()
                    home = "cpu" if key == "step" else self.device  # as torch.optim keeps them
                    optimizer.state[parameter][key] = saved.to(home)


def objective_inputs(
    objective: Objective,
    distribution: Distribution,
    parameters: Tensor,
    log_prob: Tensor,
    batch: Batch,
) -> dict[str, Tensor]:
    """What the objective needs, apart from the median: (..., N) like `log_prob`, detached."""
    inputs = {}
    if "mask" in objective.needs:
        inputs["mask"] = batch.mask
    if "log_prob" in objective.needs:
        inputs["log_prob"] = log_prob.detach()
    if "proximal_log_ratio" in objective.needs:
        inputs["proximal_log_ratio"] = log_prob.detach() - batch.proximal_log_prob
    if "kl" in objective.needs:
        inputs["kl"] = distribution.kl(batch.parameters, parameters.detach())
    return inputs


def median_loss(error: Tensor) -> Tensor:
    """Softplus(e) - e / 2 of the error e = target - prediction: a smooth |e| / 2 (BPO's head).

    Its minimiser is the median of symmetric targets (arXiv 2604.18578; formula: official code).
    """
    return torch.nn.functional.softplus(error) - 0.5 * error


def value_loss(value: Tensor, sample: Batch, clip: float | None) -> Tensor:
    """Half the mean squared error to the returns; optionally PPO2's clipped maximum."""
    error = (value - sample.returns) ** 2
    if clip is not None:
        near = sample.value + torch.clamp(value - sample.value, -clip, clip)
        error = torch.maximum(error, (near - sample.returns) ** 2)
    return 0.5 * token_mean(error, sample.mask)


def load_policy(policy: ActorCritic, state: dict[str, Tensor]) -> None:
    """Copy the "policy." tensors of a checkpoint into a policy, in place."""
    prefix = "policy."
    policy.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )


def _summary(norms: list[list[Tensor]]) -> dict[str, np.ndarray]:
    means = [torch.stack(own).double().mean() if own else torch.tensor(0.0) for own in norms]
    steps = np.array([float(len(own)) for own in norms])
    return {"gradient_norm": np.array([float(mean) for mean in means]), "optimizer_steps": steps}
