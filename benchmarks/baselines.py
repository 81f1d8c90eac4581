"""PPO of other libraries with the hyper-parameters of `throughput.py`; every one ticks a clock.

`tick(n)` is called when n rollouts of 2,048 steps are done and learned from.
"""

from collections.abc import Callable

import gymnasium as gym
import torch
from cleanrl_style import CLIP, ENVS, EPOCHS, GAMMA, LAMBDA, MINIBATCH, NORM, RATE, TIME, VALUE
from torch import nn

Tick = Callable[[int], None]


def train_sb3(env_id: str, rollouts: int, tick: Tick, *, normalize: bool = False) -> None:
    """Stable-Baselines3's PPO on a DummyVecEnv, by default without VecNormalize."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            tick(self.num_timesteps // (ENVS * TIME))

        def _on_step(self) -> bool:
            return True

    envs = DummyVecEnv([lambda: gym.make(env_id)] * ENVS)
    model = PPO(
        "MlpPolicy",
        VecNormalize(envs) if normalize else envs,
        n_steps=TIME,
        batch_size=MINIBATCH,
        n_epochs=EPOCHS,
        learning_rate=RATE,
        device="cpu",
    )
    model.learn(rollouts * ENVS * TIME, callback=Clock())
    tick(rollouts)


def train_torchrl(env_id: str, rollouts: int, tick: Tick) -> None:
    """TorchRL's collector, ClipPPOLoss and GAE, put together as its tutorial does."""
    from tensordict.nn import TensorDictModule
    from tensordict.nn.distributions import NormalParamExtractor
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, ReplayBuffer
    from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
    from torchrl.envs import GymEnv, SerialEnv
    from torchrl.modules import OneHotCategorical, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    env = SerialEnv(ENVS, lambda: GymEnv(env_id))
    size = env.observation_spec["observation"].shape[-1]
    width = env.action_spec.shape[-1]
    continuous = env.action_spec.dtype.is_floating_point

    def mlp(outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
        ).to(torch.float32)

    head = nn.Sequential(mlp(2 * width), NormalParamExtractor()) if continuous else mlp(width)
    keys = ["loc", "scale"] if continuous else ["logits"]
    actor = ProbabilisticActor(
        TensorDictModule(nn.Sequential(Float(), head), ["observation"], keys),
        in_keys=keys,
        spec=env.action_spec,
        distribution_class=TanhNormal if continuous else OneHotCategorical,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Sequential(Float(), mlp(1)), in_keys=["observation"])
    collector = Collector(
        env, actor, frames_per_batch=ENVS * TIME, total_frames=rollouts * ENVS * TIME
    )
    advantage = GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=critic)
    loss_module = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=CLIP,
        entropy_bonus=False,
        normalize_advantage=True,
        critic_coeff=VALUE,
        loss_critic_type="l2",
    )
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(ENVS * TIME),
        sampler=SamplerWithoutReplacement(),
        batch_size=MINIBATCH,
    )
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=RATE, eps=1e-5)
    tick(0)
    for number, data in enumerate(collector):
        with torch.no_grad():
            advantage(data)
        buffer.extend(data.reshape(-1))
        for _ in range(EPOCHS * (ENVS * TIME // MINIBATCH)):
            found = loss_module(buffer.sample())
            optimizer.zero_grad()
            (found["loss_objective"] + found["loss_critic"]).backward()
            nn.utils.clip_grad_norm_(loss_module.parameters(), NORM)
            optimizer.step()
        tick(number + 1)
    collector.shutdown()


class Float(nn.Module):
    """Gymnasium's observations are float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As float32."""
        return x.to(torch.float32)
