"""The same update with a hand-written backward pass, for R runs at once.

The networks are one matrix of parameters (stacked.py), the derivatives of their outputs formulas
(heads.py); Adam and the gradient clip are a few operations on the whole matrix. No graph is
recorded, and the host never waits for the device inside an update. Tested against
`learner.PlainLearner` for every recipe. MLPs of equal widths on vector observations, diagonal
normal (free deviation) or one categorical action: `FastLearner.supports` says so.
"""

import math
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import Categorical, Distribution, Normal, SquashedNormal
from rgpo.control.heads import categorical_head, gaussian_head, value_gradient
from rgpo.control.learner import Batch, Schedule, load_policy
from rgpo.control.networks import ActorCritic
from rgpo.control.stacked import StackedNetworks
from rgpo.core.advantage import normalize
from rgpo.core.kl import k3
from rgpo.core.recipes import Recipe

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-5
UNROLL = 8


class FastLearner:
    """R actor-critics of one shape; see `learner.Learner` for the meaning of the methods."""

    @staticmethod
    def supports(
        observation_shapes: dict[str, tuple[int, ...]],
        distribution: Distribution,
        recipes: list[Recipe],
        config: TrainConfig,
    ) -> bool:
        """Whether this learner covers the task; otherwise `PlainLearner` does."""
        gaussian = isinstance(distribution, Normal) and not config.state_dependent_std
        categorical = isinstance(distribution, Categorical) and len(distribution.sizes) == 1
        head = gaussian or categorical
        steps = all(
            recipe.step == "gradient" and "median_advantage" not in recipe.objective.needs
            for recipe in recipes
        )
        equal_widths = len(set(config.hidden)) == 1
        return set(observation_shapes) == {"vector"} and head and steps and equal_widths

    def __init__(
        self,
        policies: list[ActorCritic],
        recipes: list[Recipe],
        distribution: Distribution,
        configs: list[TrainConfig],
    ) -> None:
        self.policies, self.distribution, self.config = policies, distribution, configs[0]
        self.networks = StackedNetworks(policies, self.config)
        self.runs, self.gaussian = self.networks.runs, self.networks.gaussian
        self.parameters, self.device = self.networks.parameters, self.networks.device
        self.set_recipes(recipes)
        targets = [math.inf if c.target_kl is None else 1.5 * c.target_kl for c in configs]
        self.kl_limit = torch.tensor(targets, device=self.device).view(-1, 1)
        self.stops = any(math.isfinite(t) for t in targets)
        self.max_norm = torch.tensor(self.config.max_grad_norm or math.inf, device=self.device)
        self.first_moment = torch.zeros_like(self.parameters)
        self.second_moment = torch.zeros_like(self.parameters)
        self.steps = np.zeros(self.runs, dtype=np.int64)
        self._minibatches = self._several
        if self.config.compile:
            options = {"cpp_wrapper": True}  # the matrix products are called from C++ as well
            self._minibatches = torch.compile(self._several, dynamic=False, options=options)

    def set_recipes(self, recipes: list[Recipe]) -> None:
        """See `Learner`; neighbours with equal objectives are computed together."""
        self.objectives = [
            (objective, len(list(group)))
            for objective, group in groupby(recipe.objective for recipe in recipes)
        ]
        self.needs = {name for objective, _ in self.objectives for name in objective.needs}

    def parameters_of_runs(self) -> Tensor:
        """See `Learner`."""
        return self.parameters.clone()

    def load_parameters(self, parameters: Tensor) -> None:
        """See `Learner`; in place, since the modules are views."""
        self.parameters.copy_(parameters)

    # ---- acting and evaluating ------------------------------------------------------------

    def act(self, observation: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Actor alone, in NumPy on the CPU."""
        if self.device.type != "cpu":
            return self._act_on_device(observation["vector"], noise)
        output = self.networks.actor_array(observation["vector"])
        if self.gaussian:
            return output + np.exp(self.networks.arrays["log_std"]) * noise
        sample = self.distribution.sample(torch.from_numpy(output), torch.from_numpy(noise))
        return sample.numpy()

    @torch.no_grad()
    def _act_on_device(self, vector: np.ndarray, noise: np.ndarray) -> np.ndarray:
        parameters, _ = self.evaluate({"vector": torch.from_numpy(vector).to(self.device)})
        drawn = torch.from_numpy(noise).to(self.device)
        return self.distribution.sample(parameters, drawn).cpu().numpy()

    @torch.no_grad()
    def evaluate(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Learner`."""
        views = self.networks.views(self.parameters)
        hidden = self.networks.hidden(views, observation["vector"])
        output, value = self.networks.heads(views, hidden[-1])
        if self.gaussian:
            output = torch.cat([output, views["log_std"].expand_as(output)], -1)
        return output, value

    # ---- learning -------------------------------------------------------------------------

    @torch.inference_mode()
    def update(self, batch: Batch, order: np.ndarray, schedule: Schedule) -> dict[str, np.ndarray]:
        """See `Learner`."""
        if isinstance(self.distribution, SquashedNormal):  # the same under both policies
            gaussian = Normal.log_prob(self.distribution, batch.parameters, batch.action)
            proximal = batch.proximal_log_prob + (gaussian - batch.log_prob)
            batch = replace(batch, log_prob=gaussian, proximal_log_prob=proximal)
        epochs, size = order.shape[1], self.config.minibatch_size
        count = order.shape[2] // size
        adam = self._adam_scales(schedule.learning_rate, epochs * count)
        penalties = self._penalties(schedule)
        active = torch.ones(self.runs, 1, dtype=torch.bool, device=self.device)
        norms = []
        rows = torch.from_numpy(order + np.arange(self.runs)[:, None, None] * order.shape[2])
        rows = rows.to(self.device)
        for epoch in range(epochs):
            index = rows[:, epoch].flatten()
            data = self._shuffle(batch, index, count)
            data["adam"] = adam[:, epoch * count : (epoch + 1) * count]
            for first in range(0, count, UNROLL):
                chunk = {k: v[:, first : first + UNROLL] for k, v in data.items()}
                norm, active = self._minibatches(chunk, penalties, active)
                norms.append(norm)
        return self._result(torch.stack(norms))

    def _shuffle(self, batch: Batch, index: Tensor, count: int) -> dict[str, Tensor]:
        """The epoch's minibatches, (R, M, B, ...): advantages normalised, the mask as a share."""

        def pick(tensor: Tensor) -> Tensor:
            rows = tensor.flatten(0, 1).index_select(0, index)
            return rows.unflatten(0, (self.runs, count, -1))

        mask = pick(batch.mask)
        advantage = pick(batch.advantage)
        if self.config.normalize_advantages:
            advantage = normalize(advantage, mask, dim=-1)
        share = mask / torch.clamp(mask.sum(-1, keepdim=True), min=1)
        extra = {"mask": mask} if "mask" in self.needs else {}
        if "proximal_log_ratio" in self.needs:
            extra["proximal_log_prob"] = pick(batch.proximal_log_prob)
        return extra | {
            "vector": pick(batch.observation["vector"]),
            "action": pick(batch.action),
            "parameters": pick(batch.parameters),
            "log_prob": pick(batch.log_prob),
            "advantage": torch.where(mask, advantage, 0),
            "returns": pick(batch.returns),
            "value": pick(batch.value),
            "share": share,
            "value_share": self.config.value_coefficient * share,
        }

    def _adam_scales(self, learning_rate: np.ndarray, steps: int) -> Tensor:
        """(R, steps, 2): the bias corrections, as factors of the step and of epsilon.

        lr m / (1 - beta1^t) / (sqrt(v) / root + epsilon) with root = sqrt(1 - beta2^t)
        is (lr root / (1 - beta1^t)) m / (sqrt(v) + epsilon root).
        """
        t = self.steps[:, None] + np.arange(1, steps + 1)
        root = np.sqrt(1 - BETA2**t)
        size = learning_rate[:, None] * root / (1 - BETA1**t)
        scales = np.stack([size, EPSILON * root], -1).astype(np.float32)
        return torch.from_numpy(scales).to(self.device)

    def _penalties(self, schedule: Schedule) -> tuple[Tensor | None, Tensor | None]:
        """Coefficients (R, 1) of the forward and the reverse KL; None where no run has one."""

        def column(array: np.ndarray) -> Tensor | None:
            values = torch.from_numpy(array.astype(np.float32)).view(-1, 1).to(self.device)
            return values if array.any() else None

        return column(schedule.kl_coefficient), column(schedule.reverse_kl_coefficient)

    def _several(
        self,
        chunk: dict[str, Tensor],
        penalties: tuple[Tensor | None, Tensor | None],
        active: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """UNROLL steps: sum of gradient norms and number of steps (R, 2); runs still active."""
        views, norms, steps = self.networks.views(self.parameters), [], []
        minibatches = zip(*(v.unbind(1) for v in chunk.values()), strict=True)
        for tensors in minibatches:
            minibatch = dict(zip(chunk, tensors, strict=True))
            gradient, kl = self._gradient(views, minibatch, penalties)
            if self.stops:
                active = active & (kl <= self.kl_limit)
            norms.append(self._adam(gradient, minibatch["adam"], active))
            steps.append(active)
        taken = torch.cat(steps, 1)
        total = torch.where(taken, torch.cat(norms, 1), 0).sum(1)
        return torch.stack([total, taken.sum(1)], 1), active

    def _gradient(
        self,
        views: dict[str, Tensor],
        minibatch: dict[str, Tensor],
        penalties: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient (R, P) of the loss, and the k3 estimate (R, 1) where a run may stop on it."""
        share = minibatch["share"]
        hidden = self.networks.hidden(views, minibatch["vector"])
        output, value = self.networks.heads(views, hidden[-1])
        head: Any = gaussian_head if self.gaussian else categorical_head
        log_prob, backward = head(output, views.get("log_std"), minibatch["action"])
        log_ratio = log_prob - minibatch["log_prob"]
        inputs = self._inputs(minibatch, log_prob, output, views.get("log_std"))
        force = self._weight(log_ratio, minibatch["advantage"], inputs) * share
        forward, reverse = (None if c is None else c * share for c in penalties)
        bonus = self.config.entropy_coefficient
        entropy = bonus * share if bonus else None
        d_output, d_log_std = backward(force, minibatch["parameters"], forward, reverse, entropy)
        d_value = value_gradient(
            value, minibatch["value"], minibatch["returns"], self.config.value_clip
        )
        d_value = (d_value * minibatch["value_share"]).unsqueeze(-1)
        gradient = self.networks.backward(views, hidden, d_output, d_value, d_log_std)
        kl = (k3(log_ratio) * share).sum(-1, keepdim=True) if self.stops else None
        return gradient, kl

    def _inputs(
        self,
        minibatch: dict[str, Tensor],
        log_prob: Tensor,
        output: Tensor,
        log_std: Tensor | None,
    ) -> dict[str, Tensor]:
        """Further inputs that some run's objective needs, each (R, B)."""
        inputs = {}
        if "mask" in self.needs:
            inputs["mask"] = minibatch["mask"]
        if "log_prob" in self.needs:
            inputs["log_prob"] = log_prob
        if "proximal_log_ratio" in self.needs:
            inputs["proximal_log_ratio"] = log_prob - minibatch["proximal_log_prob"]
        if "kl" in self.needs:
            if log_std is not None:
                output = torch.cat([output, log_std.expand_as(output)], -1)
            inputs["kl"] = self.distribution.kl(minibatch["parameters"], output)
        return inputs

    def _weight(self, log_ratio: Tensor, advantage: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Each run's own objective; neighbours with equal ones are computed together."""
        found, first = [], 0
        for objective, count in self.objectives:
            mine = slice(first, first + count)
            needed = {name: inputs[name][mine] for name in objective.needs}
            found.append(objective.weight(log_ratio[mine], advantage[mine], **needed))
            first += count
        return found[0] if len(found) == 1 else torch.cat(found)

    def _adam(self, gradient: Tensor, scales: Tensor, active: Tensor) -> Tensor:
        """Clip each run's gradient and take its Adam step in place; the norms before clipping."""
        size, epsilon = scales.split(1, 1)
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        if self.config.max_grad_norm:
            gradient = gradient * (self.max_norm / torch.maximum(norm, self.max_norm))
        if not self.stops:
            self.first_moment.lerp_(gradient, 1 - BETA1)
            self.second_moment.lerp_(gradient * gradient, 1 - BETA2)
            deviation = self.second_moment.sqrt().add_(epsilon)
            self.parameters.addcdiv_(self.first_moment * size, deviation, value=-1)
            return norm
        first = self.first_moment.lerp(gradient, 1 - BETA1)
        second = self.second_moment.lerp(gradient * gradient, 1 - BETA2)
        step = first * size / (second.sqrt() + epsilon)
        self.first_moment.copy_(torch.where(active, first, self.first_moment))
        self.second_moment.copy_(torch.where(active, second, self.second_moment))
        self.parameters.sub_(torch.where(active, step, 0))
        return norm

    def _result(self, norms: Tensor) -> dict[str, np.ndarray]:
        total, count = norms.sum(0).cpu().unbind(1)
        taken = count.numpy().astype(np.int64)
        self.steps += taken
        mean = (total / torch.clamp(count, min=1)).numpy()
        return {"gradient_norm": mean, "optimizer_steps": taken.astype(np.float64)}

    # ---- checkpoints ----------------------------------------------------------------------

    def state(self, run: int) -> dict[str, Tensor]:
        """The same names as `PlainLearner.state`, so that either learner can go on."""
        tensors = {f"policy.{k}": v.detach() for k, v in self.policies[run].state_dict().items()}
        moments = {"exp_avg": self.first_moment, "exp_avg_sq": self.second_moment}
        for name, parameter in self.policies[run].named_parameters():
            tensors[f"adam.step.{name}"] = torch.tensor(float(self.steps[run]))
            for key, matrix in moments.items():
                tensors[f"adam.{key}.{name}"] = self.networks.home(name, matrix[run]).view(
                    parameter.shape
                )
        return tensors

    def restore(self, run: int, state: dict[str, Tensor]) -> None:
        """Take over what either learner's `state` returned."""
        load_policy(self.policies[run], state)
        moments = {"exp_avg": self.first_moment, "exp_avg_sq": self.second_moment}
        for name, _ in self.policies[run].named_parameters():
            if f"adam.step.{name}" not in state:
                continue
            self.steps[run] = int(state[f"adam.step.{name}"])
            for key, matrix in moments.items():
                home = self.networks.home(name, matrix[run])
                home.copy_(state[f"adam.{key}.{name}"].view_as(home))
