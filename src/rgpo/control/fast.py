"""The same update with a hand-written backward pass, for R runs at once.

All parameters of all runs live in one matrix (R, P); the modules of `networks` are views of it.
Actor and critic, and the runs, are the batch of batched matrix products; Adam and the gradient
clip are a few operations on the whole matrix. No graph is recorded, and the host never waits for
the device inside an update. Tested against
`learner.PlainLearner` for every recipe. MLPs of equal widths on vector observations, diagonal
normal (free deviation) or one categorical action: `FastLearner.supports` says so.
"""

import math
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from rgpo.control.config import TrainConfig
from rgpo.control.distributions import Categorical, Distribution, Normal, SquashedNormal
from rgpo.control.learner import Batch, Schedule, load_policy
from rgpo.control.networks import ActorCritic
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
        self.runs, self.width = len(policies), self.config.hidden[0]
        self.layers = len(self.config.hidden)
        self.gaussian = policies[0].gaussian
        self.set_recipes(recipes)
        targets = [math.inf if c.target_kl is None else 1.5 * c.target_kl for c in configs]
        self.device = next(policies[0].parameters()).device
        self.kl_limit = torch.tensor(targets, device=self.device).view(-1, 1)
        self.stops = any(math.isfinite(t) for t in targets)
        self.max_norm = torch.tensor(self.config.max_grad_norm or math.inf, device=self.device)
        self.minus_one = torch.tensor(-1.0, device=self.device)
        self._adopt(policies)
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

    # ---- parameters -----------------------------------------------------------------------

    def _adopt(self, policies: list[ActorCritic]) -> None:
        """Move the modules' parameters into one matrix and make them views of it."""
        inputs = policies[0].actor[0].in_features
        outputs = policies[0].actor[-1].out_features
        h, self.segments = self.width, {}
        shapes: list[tuple[str, tuple[int, ...]]] = []
        for layer in range(self.layers):
            shapes += [(f"w{layer}", (2, h, h if layer else inputs)), (f"b{layer}", (2, 1, h))]
        shapes += [("actor_w", (outputs, h)), ("actor_b", (1, outputs))]
        shapes += [("critic_w", (1, h)), ("critic_b", (1, 1))]
        if self.gaussian:
            shapes.append(("log_std", (1, outputs)))
        offset = 0
        for name, shape in shapes:
            self.segments[name] = (offset, shape)
            offset += math.prod(shape)
        self.parameters = torch.empty(self.runs, offset, device=self.device)
        for r, policy in enumerate(policies):
            self._bind(policy, r)
        if self.device.type == "cpu":
            view = self._views(self.parameters)
            self.arrays = {name: tensor.numpy() for name, tensor in view.items()}

    def _bind(self, policy: ActorCritic, run: int) -> None:
        for name, parameter in policy.named_parameters():
            home = self._home(name, self.parameters[run])
            home.copy_(parameter.detach().view_as(home))
            parameter.data = home.view(parameter.shape)

    def _home(self, name: str, row: Tensor) -> Tensor:
        """Where the module parameter of that name lives in one run's row."""
        if name == "log_std":
            return self._segment("log_std", row)
        network, index, kind = name.split(".")
        layer, letter = int(index) // 2, kind[0]
        if layer == self.layers:
            return self._segment(f"{network}_{letter}", row)
        return self._segment(f"{letter}{layer}", row)[0 if network == "actor" else 1]

    def _segment(self, name: str, row: Tensor) -> Tensor:
        offset, shape = self.segments[name]
        return row[offset : offset + math.prod(shape)].view(shape)

    def _views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Every segment of an (R, P) matrix as (R, *shape)."""
        return {
            name: matrix[:, offset : offset + math.prod(shape)].unflatten(1, shape)
            for name, (offset, shape) in self.segments.items()
        }

    def parameters_of_runs(self) -> Tensor:
        """See `Learner`."""
        return self.parameters.clone()

    def load_parameters(self, parameters: Tensor) -> None:
        """See `Learner`; in place, since the modules are views."""
        self.parameters.copy_(parameters)

    # ---- acting and evaluating ------------------------------------------------------------

    def act(self, observation: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
        """Actor alone, in NumPy: at a batch of 8 the dispatch of torch costs more than the sums."""
        if self.device.type != "cpu":
            return self._act_on_device(observation["vector"], noise)
        weights, hidden = self.arrays, observation["vector"]
        for layer in range(self.layers):
            hidden = hidden @ weights[f"w{layer}"][:, 0].swapaxes(1, 2)
            hidden += weights[f"b{layer}"][:, 0]
            hidden = self._activate_array(hidden)
        output = hidden @ weights["actor_w"].swapaxes(1, 2) + weights["actor_b"]
        if self.gaussian:
            return output + np.exp(weights["log_std"]) * noise
        sample = self.distribution.sample(torch.from_numpy(output), torch.from_numpy(noise))
        return sample.numpy()

    @torch.no_grad()
    def _act_on_device(self, vector: np.ndarray, noise: np.ndarray) -> np.ndarray:
        parameters, _ = self.evaluate({"vector": torch.from_numpy(vector).to(self.device)})
        drawn = torch.from_numpy(noise).to(self.device)
        return self.distribution.sample(parameters, drawn).cpu().numpy()

    def _activate_array(self, hidden: np.ndarray) -> np.ndarray:
        if self.config.activation == "tanh":
            return np.tanh(hidden, out=hidden)
        return np.maximum(hidden, 0, out=hidden)

    @torch.no_grad()
    def evaluate(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Learner`."""
        views = self._views(self.parameters)
        hidden = self._hidden(views, observation["vector"])
        output, value = self._heads(views, hidden[-1])
        if self.gaussian:
            output = torch.cat([output, views["log_std"].expand_as(output)], -1)
        return output, value

    def _hidden(self, views: dict[str, Tensor], vector: Tensor) -> list[Tensor]:
        """Input and hidden activations, each (2R, B, width), actor and critic in turn."""
        runs, batch, size = vector.shape
        hidden = [vector.unsqueeze(1).expand(runs, 2, batch, size).reshape(2 * runs, batch, size)]
        for layer in range(self.layers):
            weight, bias = views[f"w{layer}"].flatten(0, 1), views[f"b{layer}"].flatten(0, 1)
            weight = weight.transpose(1, 2)
            if self.config.activation == "relu":
                hidden.append(torch.relu(torch.baddbmm(bias, hidden[-1], weight)))
                continue
            # tanh x = 2 sigmoid(2x) - 1: within 2e-7 of torch.tanh, at a quarter of its time
            doubled = torch.baddbmm(bias, hidden[-1], weight, beta=2, alpha=2)
            hidden.append(torch.add(self.minus_one, torch.sigmoid(doubled), alpha=2))
        return hidden

    def _heads(self, views: dict[str, Tensor], top: Tensor) -> tuple[Tensor, Tensor]:
        """Actor outputs (R, B, K) and values (R, B)."""
        actor, critic = self._split(top)
        output = torch.baddbmm(views["actor_b"], actor, views["actor_w"].transpose(1, 2))
        value = torch.baddbmm(views["critic_b"], critic, views["critic_w"].transpose(1, 2))
        return output, value.squeeze(-1)

    def _split(self, top: Tensor) -> tuple[Tensor, Tensor]:
        pair = top.unflatten(0, (self.runs, 2))
        return pair[:, 0], pair[:, 1]

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
        views, norms, steps = self._views(self.parameters), [], []
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
        hidden = self._hidden(views, minibatch["vector"])
        output, value = self._heads(views, hidden[-1])
        head = _gaussian_head if self.gaussian else _categorical_head
        log_prob, backward = head(output, views.get("log_std"), minibatch["action"])
        log_ratio = log_prob - minibatch["log_prob"]
        inputs = self._inputs(minibatch, log_prob, output, views.get("log_std"))
        force = self._weight(log_ratio, minibatch["advantage"], inputs) * share
        forward, reverse = (None if c is None else c * share for c in penalties)
        bonus = self.config.entropy_coefficient
        entropy = bonus * share if bonus else None
        d_output, d_log_std = backward(force, minibatch["parameters"], forward, reverse, entropy)
        d_value = self._value_gradient(value, minibatch) * minibatch["value_share"]
        gradient = self._backward(views, hidden, d_output, d_value.unsqueeze(-1), d_log_std)
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

    def _value_gradient(self, value: Tensor, minibatch: dict[str, Tensor]) -> Tensor:
        error = value - minibatch["returns"]
        clip = self.config.value_clip
        if clip is None:
            return error
        change = value - minibatch["value"]
        clipped = minibatch["value"] + torch.clamp(change, -clip, clip) - minibatch["returns"]
        inside = torch.where(change.abs() <= clip, clipped, 0)
        return torch.where(error**2 >= clipped**2, error, inside)

    def _backward(
        self,
        views: dict[str, Tensor],
        hidden: list[Tensor],
        d_output: Tensor,
        d_value: Tensor,
        d_log_std: Tensor | None,
    ) -> Tensor:
        """Chain rule from the heads down, in the order of the segments reversed."""
        actor, critic = self._split(hidden[-1])
        parts = [] if d_log_std is None else [d_log_std]
        parts += [d_value.sum(1), torch.bmm(d_value.transpose(1, 2), critic)]
        parts += [d_output.sum(1), torch.bmm(d_output.transpose(1, 2), actor)]
        d_actor = torch.bmm(d_output, views["actor_w"])
        d_critic = torch.bmm(d_value, views["critic_w"])
        upstream = torch.stack([d_actor, d_critic], 1).flatten(0, 1)
        for layer in reversed(range(self.layers)):
            if self.config.activation == "tanh":
                upstream = torch.ops.aten.tanh_backward(upstream, hidden[layer + 1])
            else:
                upstream = torch.where(hidden[layer + 1] > 0, upstream, 0)
            parts += [upstream.sum(1), torch.bmm(upstream.transpose(1, 2), hidden[layer])]
            if layer:
                upstream = torch.bmm(upstream, views[f"w{layer}"].flatten(0, 1))
        return torch.cat([part.reshape(self.runs, -1) for part in reversed(parts)], 1)

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
                tensors[f"adam.{key}.{name}"] = self._home(name, matrix[run]).view(parameter.shape)
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
                home = self._home(name, matrix[run])
                home.copy_(state[f"adam.{key}.{name}"].view_as(home))


def _gaussian_head(mean: Tensor, log_std: Tensor, action: Tensor):  # noqa: ANN202
    """Log pi (R, B) of a diagonal normal, and its gradient as a function of the forces on it.

    Without the log-determinant of a squashed normal, which drops out of the ratio.
    """
    inverse = torch.exp(-log_std)
    z = (mean - action) * inverse
    square = z * z
    constant = log_std.sum(-1) + 0.5 * math.log(2 * math.pi) * log_std.shape[-1]
    log_prob = -torch.add(constant, square.sum(-1), alpha=0.5)

    def backward(
        force: Tensor,
        old: Tensor,
        forward_kl: Tensor | None,
        reverse_kl: Tensor | None,
        bonus: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return d loss / d mean (R, B, A) and d loss / d log_std (R, A)."""
        force = force.unsqueeze(-1)
        d_mean = z * inverse * force
        d_log_std = torch.addcmul(force, square, force, value=-1).sum(1)
        old_mean, old_log_std = old.chunk(2, -1)
        if forward_kl is not None:
            shift = (mean - old_mean) * inverse
            kl = forward_kl.unsqueeze(-1)
            d_mean = d_mean + shift * inverse * kl
            spread = torch.exp(2 * (old_log_std - log_std))
            d_log_std = d_log_std + ((1 - spread - shift * shift) * kl).sum(1)
        if reverse_kl is not None:
            kl = reverse_kl.unsqueeze(-1)
            d_mean = d_mean + (mean - old_mean) * torch.exp(-2 * old_log_std) * kl
            d_log_std = d_log_std + (torch.expm1(2 * (log_std - old_log_std)) * kl).sum(1)
        if bonus is not None:
            d_log_std = d_log_std - bonus.sum(1, keepdim=True)
        return d_mean, d_log_std

    return log_prob, backward


def _categorical_head(logits: Tensor, _: None, action: Tensor):  # noqa: ANN202
    """Log pi (R, B) of one categorical action, and its gradient as a function of the forces."""
    log_probs = torch.log_softmax(logits, -1)
    log_prob = log_probs.gather(-1, action).squeeze(-1)

    def backward(
        force: Tensor,
        old: Tensor,
        forward_kl: Tensor | None,
        reverse_kl: Tensor | None,
        bonus: Tensor | None,
    ) -> tuple[Tensor, None]:
        """Return d loss / d logits (R, B, n)."""
        probs = torch.exp(log_probs)
        force = force.unsqueeze(-1)
        d_logits = (probs * force).scatter_add(-1, action, -force)
        if forward_kl is not None:
            d_logits = d_logits + (probs - torch.softmax(old, -1)) * forward_kl.unsqueeze(-1)
        if reverse_kl is not None:
            distance = log_probs - torch.log_softmax(old, -1)
            mean = (probs * distance).sum(-1, keepdim=True)
            d_logits = d_logits + probs * (distance - mean) * reverse_kl.unsqueeze(-1)
        if bonus is not None:
            entropy = -(probs * log_probs).sum(-1, keepdim=True)
            d_logits = d_logits + probs * (log_probs + entropy) * bonus.unsqueeze(-1)
        return d_logits, None

    return log_prob, backward
