"""TRL's GRPOTrainer with any recipe of the core as its objective.

Generation, rewards, distribution, logging and checkpoints are TRL's. Two methods differ:

    _generate_and_score_completions   adds advantages, values, a lag, whatever the recipe needs
    _compute_loss                     rgpo.core.loss.policy_loss in place of TRL's surrogates

An update is all optimiser steps on one generated batch: `steps_per_generation` micro-batches,
`num_iterations` times.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, is_async_callable

from rgpo.core.advantage import normalize
from rgpo.core.clipping_bias import clip_normalizer, clipped_loss, gradient_norm
from rgpo.core.diagnostics import NO_SPREAD, explained_variance, has_spread
from rgpo.core.kl import forward_kl_gradient, k3, reverse_kl_gradient
from rgpo.core.loss import PolicyLoss, policy_loss
from rgpo.core.objective import safe_ratio
from rgpo.core.ratio import log_ratio
from rgpo.core.reduce import reduce
from rgpo.errors import RgpoError
from rgpo.language import refuse
from rgpo.language.advantages import above_baseline, above_median, left_one_out
from rgpo.language.config import RecipeConfig
from rgpo.language.critic import (
    Critic,
    CriticStep,
    token_advantages,
    token_rewards,
    value_loss,
)
from rgpo.language.lag import Batch, Lag
from rgpo.language.rewards import checked

logger = logging.get_logger(__name__)

FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""What TRL passes from a batch to the model beyond the tokens."""


class RecipeTrainer(GRPOTrainer):
    """`GRPOTrainer(model, reward_funcs, args, ...)` whose objective is `args.recipe`.

    `critic`, with advantage="critic", is a `Critic`, or a reward model (or the path of one) to
    initialise it from; None starts from a copy of the policy. All other arguments are TRL's.
    Settings that are inert, contradictory or unsupported raise RgpoError before training.
    """

    _tag_names = ("trl", "rgpo")

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RecipeConfig | None = None,
        train_dataset: Any = None,
        *,
        critic: Critic | PreTrainedModel | str | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else RecipeConfig("rgpo-language")
        tools = any(kwargs.get(k) for k in ("tools", "environment_factory", "rollout_func"))
        self.recipe = refuse.resolve(args)
        needs_reference = "reference_log_ratio" in self.recipe.objective.needs
        refuse.bad_settings(args, critic, tools)
        refuse.bad_reference(model, args, needs_reference)
        refuse.bad_tokenizer(kwargs.get("processing_class"))
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        self.reward_funcs = [
            f if isinstance(f, torch.nn.Module) or is_async_callable(f) else checked(f)
            for f in self.reward_funcs
        ]
        refuse.bad_tokenizer(self.processing_class)
        refuse.bad_prompts(self)
        if needs_reference and args.beta == 0:
            self._build_reference(isinstance(model, PeftModel))
        self.critic = self._build_critic(critic) if args.advantage == "critic" else None
        self.lag = Lag(args.lag)
        self._measured: list[dict[str, float]] = []
        self._told_no_spread = False
        if self.accelerator.is_main_process:
            print(f"recipe {self.recipe.name} on {args.machine}")

    # ---- models beside the policy

    def _build_reference(self, has_own_adapter: bool) -> None:
        """A frozen copy of the policy as it is now; with LoRA the policy without its adapter."""
        self.beta = 1.0  # TRL computes reference log-probs where this is not 0; ours is args.beta
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            reference = copy.deepcopy(model).requires_grad_(requires_grad=False).eval()
            reference.__dict__.pop("forward", None)  # TRL's patch, bound to the policy
            add_fused_lm_head(
                reference,
                temperature=self.temperature,
                cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
            )
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        elif has_own_adapter:  # trained before: the reference is the policy with a copy of it
            model.add_adapter("ref", model.peft_config["default"])
            for name, parameter in model.named_parameters():
                if ".ref." in name:
                    own = model.get_parameter(name.replace(".ref.", ".default."))
                    parameter.data.copy_(own.data)
                    parameter.requires_grad_(requires_grad=False)

    def _build_critic(self, source: Critic | PreTrainedModel | str | None) -> Critic:
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(source, Critic):
            critic = source
        elif source is not None:
            critic = Critic.from_reward_model(source)
        elif isinstance(policy, PeftModel):
            raise RgpoError(
                "a policy with adapters has no copy to start a critic from: pass critic="
            )
        else:
            critic = Critic.from_policy(policy)
        critic.refuse_misfit(policy)
        if self.args.disable_dropout:
            disable_dropout_in_model(critic)
        self.add_callback(CriticStep(self))
        return self.accelerator.prepare_model(critic, device_placement=True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """TRL's, with the critic's parameters as one more group."""
        first = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if first and self.critic is not None:
            rate = self.args.critic_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            group = {"params": list(self.critic.parameters()), "lr": rate, "weight_decay": 0.0}
            optimizer.add_param_group(group)
        return optimizer

    # ---- generation

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        if not self.model.training:
            return self._batch(inputs)
        self._end_update()
        batch = self.lag.exchange(self._batch(inputs), lambda: self._batch(self._other_prompts()))
        if "proximal_log_ratio" in self.recipe.objective.needs:
            batch = {**batch, "proximal_per_token_logps": self._log_prob_now(batch)}
        return batch

    def _batch(self, inputs: list[dict[str, Any]]) -> Batch:
        """TRL's batch, with our advantages and, where TRL left them out, behaviour log-probs."""
        batch: Batch = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" not in batch and (self.lag.updates or self.critic is not None):
            batch["old_per_token_logps"] = self._log_prob_now(batch)
        rewards, size, rows = self._rewards, self._group_size, len(inputs)
        if self.args.advantage == "leave-one-out":
            batch["advantages"] = self._local(left_one_out(rewards, size), rows)
        elif self.args.advantage == "remax":
            baseline = self._greedy_rewards(inputs)
            batch["advantages"] = self._local(above_baseline(rewards, baseline), rows)
        elif self.critic is not None:
            self._add_values(batch, self._local(rewards, rows))
        if "median_advantage" in self.recipe.objective.needs:
            batch["median_advantage"] = self._local(above_median(rewards, size), rows)
        return batch

    def _calculate_rewards(
        self, inputs: Any, prompts: list[Any], completions: list[Any], ids: list[list[int]]
    ) -> Tensor:
        per_function: Tensor = super()._calculate_rewards(inputs, prompts, completions, ids)
        self._stop_at_nan(self._local(per_function, len(prompts)), completions)
        weighted = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        self._rewards = torch.where(per_function.isnan().all(1), torch.nan, weighted)
        return per_function

    def _stop_at_nan(self, per_function: Tensor, completions: list[Any]) -> None:
        """RgpoError with the completion that a reward model has no number for.

        Reward functions are checked where they are called; their NaN stands for None.
        """
        for i, reward in enumerate(self.reward_funcs):
            bad = (~per_function[:, i].isfinite()).nonzero()
            if isinstance(reward, torch.nn.Module) and len(bad):
                told = f"{self.reward_func_names[i]!r} gave NaN for {completions[int(bad[0])]!r}"
                raise RgpoError(f"reward model {told}")

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _greedy_rewards(self, inputs: list[dict[str, Any]]) -> Tensor:
        """Reward of the greedy completion of every row's prompt (ReMax, arXiv 2310.10505)."""
        size = self._group_size
        each = size if len(inputs) % size == 0 else 1  # a group may be split over processes
        inputs = inputs[::each]
        prompts = [row["prompt"] for row in inputs]
        ids, images, fields = self._tokenize_prompts(prompts)
        sampling = self.generation_config
        self.generation_config = copy.deepcopy(sampling)
        self.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        try:
            completion_ids, _ = self._generate_single_turn(ids, images, fields, 1)
        finally:
            self.generation_config = sampling
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational(inputs[0]):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        # what rewards log is about the samples: not about these completions
        kept = self._rewards, self._pending_metrics, self._pending_extra_logs
        self._pending_metrics, self._pending_extra_logs = defaultdict(list), defaultdict(list)
        self._calculate_rewards(inputs, prompts, texts, completion_ids)
        greedy = self._rewards
        self._rewards, self._pending_metrics, self._pending_extra_logs = kept
        self.record("reward_greedy", greedy.nanmean().item())
        return greedy.repeat_interleave(each)

    def _add_values(self, batch: Batch, score: Tensor) -> None:
        """Per-token GAE in place of the advantages, and what the critic learns from."""
        mask = _mask(batch)
        with torch.no_grad():
            values = self._in_parts(batch, self._values)
        in_reward = self.args.kl_in == "reward"
        rewards = token_rewards(
            torch.nan_to_num(score, nan=0.0),
            mask,
            batch["old_per_token_logps"],
            batch["ref_per_token_logps"] if in_reward else None,
            self.args.beta,
        )
        advantage, returns = token_advantages(rewards, values, mask, self.args.gamma, self.args.lam)
        if self.args.whiten_advantages:
            advantage = self._whitened(advantage, mask)
        batch["advantages"] = advantage
        batch |= {"old_values": values, "returns": returns}
        explained = explained_variance(values.flatten(), returns.flatten(), mask.flatten())
        self.record("critic/explained_variance", explained.item())
        self.record("critic/value_mean", values[mask].mean().item())
        self.record("critic/return_mean", returns[mask].mean().item())

    def _whitened(self, advantage: Tensor, mask: Tensor) -> Tensor:
        """Zero mean and unit variance over the tokens of all processes (details 16 and 17)."""
        pair = torch.stack([advantage, mask.to(advantage.dtype)], dim=-1)
        pair = self.accelerator.gather(self.accelerator.pad_across_processes(pair, dim=1))
        white = normalize(pair[..., 0], pair[..., 1].bool())
        return self._local(white, len(mask))[:, : mask.shape[1]]

    def _local(self, of_all_processes: Tensor, rows: int) -> Tensor:
        start = self.accelerator.process_index * rows
        return of_all_processes[start : start + rows]

    def _other_prompts(self) -> list[dict[str, Any]]:
        """Rows for one more batch of the initial policy, drawn like TRL's: K times each prompt."""
        groups = self.args.generation_batch_size // self.num_generations
        generator = torch.Generator().manual_seed(self.args.seed + 1 + len(self.lag.queue))
        chosen = torch.randint(len(self.train_dataset), (groups,), generator=generator)
        index = chosen.repeat_interleave(self.num_generations).tolist()
        rows = len(index) // self.accelerator.num_processes
        start = self.accelerator.process_index * rows
        return [self.train_dataset[i] for i in index[start : start + rows]]

    def _log_prob_now(self, batch: Batch) -> Tensor:
        """Log-probs (B, T) of the present policy, without gradient."""
        kwargs = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, kwargs):
            return self._forward(
                self.model, batch, batch_size=self.args.per_device_train_batch_size
            )[0]

    def _in_parts(self, batch: Batch, function: Callable[[Batch], Tensor]) -> Tensor:
        size = self.args.per_device_train_batch_size
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        parts = [
            function({key: batch[key][start : start + size] for key in keys})
            for start in range(0, len(batch["prompt_ids"]), size)
        ]
        return torch.cat(parts)

    # ---- forward passes

    def _forward(
        self, model: Any, batch: Batch, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs (B, T), entropies (B, T) and the experts' auxiliary loss, by TRL."""
        ids, attention_mask = _tokens(batch)
        extra = {key: batch.get(key) for key in FORWARD_KEYS}
        return self._get_per_token_logps_and_entropies(
            model, ids, attention_mask, batch["completion_ids"].size(1), **options, **extra
        )

    def _values(self, batch: Batch) -> Tensor:
        ids, attention_mask = _tokens(batch)
        with self.accelerator.autocast():
            return self.critic(ids, attention_mask, batch["completion_ids"].size(1))

    # ---- the loss

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        mask = _mask(inputs)
        log_prob, entropy, experts = self._forward(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        behavior = inputs.get("old_per_token_logps")
        behavior = log_prob.detach() if behavior is None else behavior
        reducing, steps = self._reducing(inputs, mask)
        advantage = self._advantage(inputs, log_prob, behavior, entropy)
        result = policy_loss(
            self.recipe,
            log_prob,
            behavior,
            advantage,
            mask,
            segment_ids=_turns(inputs) if self.recipe.level == "turn" else None,
            **_further(inputs),
            **reducing,
        )
        loss = result.loss
        if self.recipe.step == "clip-normalized" and self.model.training:
            bias = clipped_loss(self.recipe, result, advantage, mask, **reducing)
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            loss = loss * clip_normalizer(gradient_norm(bias, parameters))
        penalty = self._penalty(inputs, log_prob, behavior, mask, result)
        if penalty is not None:
            loss = loss + reduce(penalty, mask, **reducing)
        loss = loss + self._extras(mask, entropy, experts, steps)
        if self.critic is not None and self.model.training:
            loss = loss + self._critic_loss(inputs, mask)
        self._measure(result, entropy, mask)
        return loss

    def _advantage(
        self, inputs: Batch, log_prob: Tensor, behavior: Tensor, entropy: Tensor
    ) -> Tensor:
        """Advantages (B, T), times what TRL multiplies its loss per token with.

        The same thing for homogeneous objectives; `refuse` refuses the others.
        """
        advantage = inputs["advantages"]
        if advantage.dim() == 1:
            advantage = advantage.unsqueeze(1)
        mask = _mask(inputs).to(log_prob.dtype)
        factors = []
        if self.off_policy_mask_threshold is not None:
            sampling = inputs.get("sampling_per_token_logps", behavior)
            threshold = self.off_policy_mask_threshold
            factors.append(self.get_off_policy_mask(advantage, log_prob, sampling, mask, threshold))
        if self.top_entropy_quantile < 1:
            factors.append(self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile))
        if "importance_sampling_ratio" in inputs:
            factors.append(inputs["importance_sampling_ratio"])
        for factor in factors:
            advantage = advantage * factor
        return advantage.expand_as(log_prob)

    def _reducing(self, inputs: Batch, mask: Tensor) -> tuple[dict[str, Any], float]:
        """Arguments of `reduce` as TRL aggregates, and the number of micro-batches per step."""
        training = self.model.training
        steps = float(self.current_gradient_accumulation_steps) if training else 1.0
        kind = self.args.reduction or self.recipe.reduction
        if kind == "local-token-mean":
            return {"reduction": "token-mean", "denominator": mask.sum() * steps}, steps
        if kind == "sequence-mean":
            return {"reduction": kind, "denominator": len(mask) * steps}, steps
        if kind == "sequence-sum":
            constant = float(self.max_completion_length)
            return {
                "reduction": kind,
                "denominator": len(mask) * steps,
                "constant": constant,
            }, steps
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if training:  # they are those of the generated batch: take one optimiser step's share
            tokens = tokens * steps / self.args.steps_per_generation
        return {"reduction": "token-mean", "denominator": tokens}, steps

    def _penalty(
        self, inputs: Batch, log_prob: Tensor, behavior: Tensor, mask: Tensor, result: PolicyLoss
    ) -> Tensor | None:
        """KL terms (B, T): `beta` to the reference as TRL has it, the recipe's to the behaviour."""
        penalty = None
        if "ref_per_token_logps" in inputs:
            kl = k3(-log_ratio(log_prob, inputs["ref_per_token_logps"], mask))
            if self.args.use_bias_correction_kl:
                kl = kl * safe_ratio(result.log_ratio)
            self.record("kl", self._mean(kl, mask))
            if self.args.beta != 0 and self.args.kl_in == "loss":
                penalty = self.args.beta * kl
        if self.recipe.kl is not None:
            gradient = {"forward": forward_kl_gradient, "reverse": reverse_kl_gradient}
            own = gradient[self.recipe.kl.direction](log_ratio(log_prob, behavior, mask))
            own = self.recipe.kl.weight(self._progress()) * own
            penalty = own if penalty is None else penalty + own
        return penalty

    def _extras(
        self, mask: Tensor, entropy: Tensor, experts: Tensor | None, steps: float
    ) -> Tensor | float:
        """TRL's entropy bonus and its auxiliary loss of mixtures of experts."""
        loss: Tensor | float = 0.0
        if self.entropy_coef != 0:
            bonus = mask.to(entropy.dtype)
            if self.top_entropy_quantile < 1:
                threshold = 1 - self.top_entropy_quantile
                bonus = bonus * self.get_high_entropy_mask(entropy, bonus, threshold)
            mean = (entropy * bonus).sum() / bonus.sum().clamp(min=1.0)
            loss = loss - self.entropy_coef * mean / steps
        if experts is not None:
            loss = loss + self.router_aux_loss_coef * experts / steps
            self.record("aux_loss", self.accelerator.gather_for_metrics(experts).mean().item())
        return loss

    def _critic_loss(self, inputs: Batch, mask: Tensor) -> Tensor:
        """Clipped squared error, as a mean over the tokens of the optimiser step."""
        per_token = value_loss(
            self._values(inputs), inputs["old_values"], inputs["returns"], self.args.value_clip
        )
        self.record("critic/value_loss", self._mean(per_token, mask))
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return reduce(per_token, mask, "token-mean", denominator=tokens)

    # ---- what is measured, and what adapts to it

    def record(self, name: str, value: float) -> None:
        """Add to the mean that TRL logs under this name."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _mean(self, x: Tensor, mask: Tensor) -> float:
        """Mean over the unmasked tokens of all processes."""
        totals = torch.stack([torch.where(mask, x.detach(), 0).sum(), mask.sum()])
        total, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        return total / max(count, 1)

    def _measure(self, result: PolicyLoss, entropy: Tensor, mask: Tensor) -> None:
        self.record("entropy", self._mean(entropy, mask))
        names = list(result.diagnostics)
        values = torch.stack([result.diagnostics[name].float() for name in names])
        values = self.accelerator.gather(values).view(-1, len(names)).nanmean(0).tolist()
        measured = dict(zip(names, values, strict=True))
        for name, value in measured.items():
            self.record(f"ratio/{name}", value if math.isfinite(value) else math.nan)
        if self.model.training:
            self._measured.append(measured)

    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def _end_update(self) -> None:
        """Adapt the recipe to its last pass over a batch, and say when the ratio never moved."""
        if not self._measured:
            return
        spread = max(measured["ratio_spread"] for measured in self._measured)
        last = self._measured[-self.args.steps_per_generation :]
        mean = {name: sum(m[name] for m in last) / len(last) for name in last[0]}
        self._measured = []
        moved = bool(has_spread(torch.tensor(spread)))
        started = self.lr_scheduler is None or max(self.lr_scheduler.get_last_lr()) > 0
        if not moved and started and not self._told_no_spread:
            self._told_no_spread = True
            logger.warning("%s (num_iterations, steps_per_generation, or a lag)", NO_SPREAD)
        objective = self.recipe.objective.adapt({**mean, "progress": self._progress()})
        kl = self.recipe.kl and self.recipe.kl.adapt(mean["kl_k3"])
        if kl is not None:
            self.record("ratio/kl_coefficient", kl.coefficient)
        self.recipe = replace(self.recipe, objective=objective, kl=kl)

    # ---- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if not folder.exists() or self.args.save_only_model:
            return
        state = {
            "step": self._step,
            "batch": self._buffered_inputs,
            "queue": list(self.lag.queue),
            "measured": self._measured,
            "recipe": self.recipe.hyper_parameters(),
        }
        torch.save(state, folder / self._state_file)
        if self.critic is not None and self.args.should_save:
            tensors = self.accelerator.unwrap_model(self.critic).state_dict()
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, folder / "critic.safetensors"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not Path(checkpoint, self._state_file).exists():
            return
        state = torch.load(
            Path(checkpoint, self._state_file), map_location=self.args.device, weights_only=True
        )
        self._step, self._buffered_inputs = state["step"], state["batch"]
        self.lag.restore(state["queue"])
        self._measured = state["measured"]
        self.recipe = self.recipe.configure(**state["recipe"])
        if self.critic is not None:
            tensors = load_file(Path(checkpoint, "critic.safetensors"))
            self.accelerator.unwrap_model(self.critic).load_state_dict(tensors)

    @property
    def _state_file(self) -> str:
        return f"rgpo-{self.accelerator.process_index}.pt"


def _tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, P + T) of prompts and completions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def _mask(batch: Batch) -> Tensor:
    """True at tokens (B, T) that the policy chose: neither padding nor results of tools."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def _further(batch: Batch) -> dict[str, Tensor]:
    """Inputs of recipes that the batch has, by the names of `policy_loss`."""
    given = {
        "reference_log_prob": batch.get("ref_per_token_logps"),
        "proximal_log_prob": batch.get("proximal_per_token_logps"),
    }
    if "median_advantage" in batch:
        median = batch["median_advantage"].unsqueeze(1)
        given["median_advantage"] = median.expand_as(batch["completion_ids"])
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _turns(batch: Batch) -> Tensor:
    """Turn of every token (B, T): a new one starts after each result of a tool."""
    own = _mask(batch).long()
    starts = torch.diff(own, dim=1, prepend=torch.zeros_like(own[:, :1])) == 1
    return starts.long().cumsum(1)
