# ruff: noqa: E402 (verl fixes its platform at import)
"""verl's own worker and FSDP2 engine, on a CPU: prints the reward of every update as JSON.

verl knows CUDA and NPU. A platform of one's own is a documented extension of it; this one is CUDA's
with the device taken out. A process of its own, since a process has one platform.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ |= {
    "VERL_PLATFORM": "cpu",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
}
sys.path.insert(0, str(Path(__file__).parents[1] / "language"))

import tiny
import torch
from hydra import compose, initialize_config_module
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    """One process, no accelerator."""

    device_name = vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):  # noqa: ARG002
        return True

    def current_device(self):
        return "cpu"

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def nothing(self, *_):
        return None

    manual_seed = set_device = synchronize = set_allocator_settings = empty_cache = nothing


for measure in ("allocated", "reserved"):
    setattr(torch.cpu, f"max_memory_{measure}", lambda *_: 0)
    setattr(torch.cpu, f"memory_{measure}", lambda *_: 0)

from verl.models.transformers import monkey_patch
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from rgpo.adapters import verl as adapter

monkey_patch.is_trl_available = lambda: False  # verl 0.9.1 wants a class that TRL 1.16 dropped
EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(
    FSDPEngineWithLMHead
)
PROMPT, RESPONSE, N = 4, 10, 16


def actor_config(loss_mode, folder):
    """verl's actor and model configuration, from its own defaults."""
    actor, model = "actor_rollout_ref.actor", "actor_rollout_ref.model"
    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose(
            "ppo_trainer",
            overrides=[
                f"{actor}.policy_loss.loss_mode={loss_mode}",
                f"{actor}.strategy=fsdp2",
                f"{actor}.ppo_micro_batch_size_per_gpu=4",
                f"{actor}.optim.lr=1e-3",
                f"{actor}.fsdp_config.use_torch_compile=False",
                f"{model}.path={folder}",
                f"{model}.use_remove_padding=False",
                f"+{model}.override_config.attn_implementation=eager",
                "actor_rollout_ref.rollout.n=4",
            ],
        ).actor_rollout_ref
    return omega_conf_to_dataclass(composed.actor), omega_conf_to_dataclass(composed.model)


def build(folder):
    torch.distributed.init_process_group("gloo")
    actor, model = actor_config("rgpo", folder)
    actor.model_config = model
    engine = actor.engine
    engine.use_dynamic_bsz = False
    engine.micro_batch_size_per_gpu, engine.infer_micro_batch_size_per_gpu = 4, 8
    worker = TrainingWorker(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
            profiler_config=None,
        )
    )
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def as_verl(batch, **settings):
    """A padded batch in the form of verl's trainer."""
    data = tu.get_tensordict({k: v.clone() for k, v in batch.items()}, {"temperature": 1.0})
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(data, **settings)
    return data


def update(worker, seed):
    """Sample a group, train two epochs of two mini-batches on it: reward, worker's metrics."""
    torch.manual_seed(seed)
    prompts = torch.randint(4, 40, (1, PROMPT)).repeat(N, 1)
    with torch.no_grad():
        tokens = worker.engine.module.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=RESPONSE,
            min_new_tokens=RESPONSE,
            do_sample=True,
        )
    responses = tokens[:, PROMPT:].contiguous()
    vowels = torch.tensor(tiny.tokenizer().convert_tokens_to_ids(list("aeiou")))
    reward = torch.isin(responses, vowels).float().mean(1)
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(PROMPT + RESPONSE).repeat(N, 1),
        "prompts": prompts,
        "responses": responses,
        "response_mask": torch.ones_like(responses),
        "advantages": advantage[:, None].repeat(1, RESPONSE),
    }
    asked = as_verl(batch, calculate_entropy=True, compute_loss=False)
    log_probs = tu.get(worker.infer_batch(asked), "log_probs")
    batch["old_log_probs"] = no_padding_2_padding(log_probs, as_verl(batch)).float()
    batch["ref_log_prob"] = batch["old_log_probs"].clone()
    out = worker.train_mini_batch(
        as_verl(
            batch,
            calculate_entropy=False,
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=N // 2,
            mini_batch_size=N // 2,
            epochs=2,
            seed=seed,
            dataloader_kwargs={"shuffle": True},
            compute_loss=True,
        )
    )
    return float(reward.mean()), tu.get(out, "metrics")


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny.policy(folder)
        worker = build(folder)
        dual = actor_config("rgpo-dual-detached", folder)[0]
    rows = [update(worker, seed) for seed in range(20)]
    worker.set_loss_fn(partial(adapter.ppo_loss, config=dual))
    rows += [update(worker, seed) for seed in range(20, 22)]
    told = [
        {"reward": reward, "spread": float(max(m["rgpo/ratio_spread"])), "norm": m["grad_norm"]}
        for reward, m in rows
    ]
    print(json.dumps(told))


main()
