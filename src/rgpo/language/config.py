"""What a run of `RecipeTrainer` depends on beyond TRL's own settings."""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from trl import GRPOConfig

from rgpo.core.ratio import Level

Aggregation = Literal["token-mean", "local-token-mean", "sequence-mean", "sequence-sum"]
Baseline = Literal["group", "leave-one-out", "remax", "critic"]
Place = Literal["loss", "reward"]


@dataclass
class FitsMachine:
    """Defaults that suit the machine; a base before one of TRL's configurations."""

    bf16: bool | None = None
    """None: where a GPU computes in it. On CPUs without bf16 units it is some 25 times slower."""

    activation_checkpointing: bool | None = None
    """None: with a GPU, to save memory; not without, where it only costs time."""

    gradient_checkpointing: bool | None = None
    """transformers' old name of `activation_checkpointing`."""

    def __post_init__(self: Any) -> None:
        gpu = has_gpu(self)
        if self.bf16 is None:
            self.bf16 = gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = gpu
        if not gpu:
            self.dataloader_pin_memory = False
        super().__post_init__()  # type: ignore[misc]


def has_gpu(args: Any) -> bool:
    """Whether there is a GPU to use."""
    return torch.cuda.is_available() and not args.use_cpu


@dataclass
class RecipeConfig(FitsMachine, GRPOConfig):
    """TRL's GRPOConfig, with the objective, the advantage, the lag and the critic by name.

    Settings of TRL's own objectives (`loss_type`, `epsilon`, `importance_sampling_level`, ...) are
    refused: the recipe has them. Everything else means what TRL says, except for the defaults
    below that depend on the machine; `machine` tells what was chosen.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "recipe_options"]  # noqa: RUF012, SLF001

    recipe: str = "rgpo-gate"
    """Objective by name; `rgpo objectives` lists them."""

    recipe_options: dict[str, Any] | str | None = None
    """Hyper-parameters of the recipe, such as {"sharpness": 4}; on a command line as JSON."""

    level: Level | None = None
    """Where the ratio is formed. None: where the recipe forms it."""

    reduction: Aggregation | None = None
    """How token terms become one number; None: as the recipe says. `token-mean` divides by the
    tokens of the whole optimiser step (TRL's dapo), `local-token-mean` every micro-batch by its
    own (bnpo), `sequence-mean` averages the means of the sequences (grpo), `sequence-sum` divides
    their sums by `max_completion_length` (dr_grpo)."""

    advantage: Baseline = "group"
    """Baseline of the reward: the group's mean (TRL's own, with `scale_rewards`), the mean of the
    rest of the group, the reward of the greedy completion, or a critic per token (GAE)."""

    lag: int = 0
    """Updates between the generation of a batch and the update that learns from it."""

    kl_in: Place = "loss"
    """Where `beta` * KL(policy || reference) goes: into the loss (k3 as in TRL), or per token into
    the reward (k1), as RLHF with a critic does."""

    gamma: float = 1.0
    """Discount per token, for the critic."""

    lam: float = 0.95
    """Lambda of generalised advantage estimation, for the critic."""

    critic_learning_rate: float | None = None
    """None: the policy's. The schedule is the policy's as well."""

    value_clip: float = 0.2
    """The critic's value is clipped to this distance from the value at generation; 0: off."""

    whiten_advantages: bool = True
    """Zero mean and unit variance over the tokens of a generated batch, for the critic."""

    disable_dropout: bool = True
    """Dropout would move the ratio without any update (arXiv 2403.17031, detail 4)."""

    use_vllm: bool | None = None
    """None: where there is a GPU and vLLM is installed."""

    def __post_init__(self) -> None:
        if self.use_vllm is None:
            self.use_vllm = has_gpu(self) and importlib.util.find_spec("vllm") is not None
        super().__post_init__()

    @property
    def machine(self) -> str:
        """One line that says how this run uses the machine."""
        precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "float32"
        checkpointing = "with" if self.activation_checkpointing else "without"
        sampler = f"vLLM ({self.vllm_mode})" if self.use_vllm else "transformers"
        return (
            f"{self.device.type}: {precision}, {checkpointing} activation checkpointing, "
            f"completions by {sampler}"
        )
