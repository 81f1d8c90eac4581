"""PPO in one file, in the manner of CleanRL: the baseline of `throughput.py`, for its speed.

Written for this repository after the published recipe (ppo.py and ppo_continuous_action.py of
CleanRL: wrappers, initialisation, annealed rate, advantages normalised per minibatch), with the
hyper-parameters of the benchmark, for the present Gymnasium: a step that only resets is trained on
as it is, with reward 0.

    python benchmarks/cleanrl_style.py [HalfCheetah-v5] [100000]
"""

import sys
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

ENVS, TIME, EPOCHS, MINIBATCH = 8, 256, 10, 64
GAMMA, LAMBDA, CLIP, VALUE, NORM, RATE = 0.99, 0.95, 0.2, 0.5, 0.5, 3e-4


def make_env(env_id: str) -> gym.Env:
    """One environment with CleanRL's wrappers for continuous actions."""
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id))
    if isinstance(env.action_space, gym.spaces.Box):
        env = gym.wrappers.ClipAction(env)
        env = gym.wrappers.NormalizeObservation(env)
        env = gym.wrappers.TransformObservation(
            env, lambda x: np.clip(x, -10, 10), env.observation_space
        )
        env = gym.wrappers.NormalizeReward(env, gamma=GAMMA)
        env = gym.wrappers.TransformReward(env, lambda r: np.clip(r, -10, 10))
    return env


def layer(inputs: int, outputs: int, gain: float = np.sqrt(2)) -> nn.Linear:
    """Orthogonal weights, zero bias."""
    made = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(made.weight, gain)
    nn.init.zeros_(made.bias)
    return made


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64."""
    return nn.Sequential(
        layer(inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, outputs, gain)
    )


class Agent(nn.Module):
    """Actor and critic."""

    def __init__(self, observation: gym.spaces.Box, action: gym.Space) -> None:
        super().__init__()
        size = int(np.prod(observation.shape))
        self.continuous = isinstance(action, gym.spaces.Box)
        outputs = int(np.prod(action.shape)) if self.continuous else int(action.n)
        self.critic, self.actor = mlp(size, 1, 1.0), mlp(size, outputs, 0.01)
        self.log_std = nn.Parameter(torch.zeros(1, outputs if self.continuous else 0))

    def act(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Action, its log-probability, entropy and value."""
        output = self.actor(x)
        policy = (
            Normal(output, self.log_std.exp()) if self.continuous else Categorical(None, output)
        )
        action = policy.sample() if action is None else action
        log_prob, entropy = policy.log_prob(action), policy.entropy()
        if self.continuous:
            log_prob, entropy = log_prob.sum(-1), entropy.sum(-1)
        return action, log_prob, entropy, self.critic(x).squeeze(-1)


def train(env_id: str, updates: int, tick: Callable[[int], None], seed: int = 1) -> None:
    """Train; `tick` is called with the number of rollouts before each of them and at the end."""
    torch.manual_seed(seed)
    envs = gym.vector.SyncVectorEnv([lambda: make_env(env_id)] * ENVS)
    agent = Agent(envs.single_observation_space, envs.single_action_space)
    optimizer = torch.optim.Adam(agent.parameters(), lr=RATE, eps=1e-5)
    shape = envs.single_observation_space.shape
    obs = torch.zeros((TIME, ENVS, *shape))
    actions = torch.zeros((TIME, ENVS, *envs.single_action_space.shape))
    log_probs, rewards, dones, values = (torch.zeros(TIME, ENVS) for _ in range(4))
    next_obs = torch.tensor(envs.reset(seed=seed)[0], dtype=torch.float32)
    next_done = torch.zeros(ENVS)
    for update in range(updates):
        tick(update)
        optimizer.param_groups[0]["lr"] = RATE * (1 - update / updates)
        for t in range(TIME):
            obs[t], dones[t] = next_obs, next_done
            with torch.no_grad():
                action, log_probs[t], _, values[t] = agent.act(next_obs)
            actions[t] = action
            found, reward, terminated, truncated, _ = envs.step(action.numpy())
            rewards[t] = torch.as_tensor(reward)
            next_obs = torch.as_tensor(found, dtype=torch.float32)
            next_done = torch.as_tensor(terminated | truncated, dtype=torch.float32)
        advantages = estimate(agent, next_obs, next_done, rewards, dones, values)
        returns = advantages + values
        learn(
            agent,
            optimizer,
            *(x.flatten(0, 1) for x in (obs, actions, log_probs, advantages, returns)),
        )
    tick(updates)
    envs.close()


def estimate(
    agent: Agent,
    next_obs: Tensor,
    next_done: Tensor,
    rewards: Tensor,
    dones: Tensor,
    values: Tensor,
) -> Tensor:
    """Generalised advantages (T, E)."""
    with torch.no_grad():
        next_value, last = agent.critic(next_obs).squeeze(-1), torch.zeros(ENVS)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(TIME)):
        going = 1 - (next_done if t == TIME - 1 else dones[t + 1])
        value = next_value if t == TIME - 1 else values[t + 1]
        delta = rewards[t] + GAMMA * value * going - values[t]
        advantages[t] = last = delta + GAMMA * LAMBDA * going * last
    return advantages


def learn(
    agent: Agent,
    optimizer: torch.optim.Adam,
    obs: Tensor,
    actions: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    """Epochs of minibatches of the clipped surrogate."""
    order = np.arange(len(obs))
    for _ in range(EPOCHS):
        np.random.shuffle(order)  # noqa: NPY002 (as CleanRL does)
        for start in range(0, len(order), MINIBATCH):
            index = order[start : start + MINIBATCH]
            _, log_prob, _, value = agent.act(obs[index], actions[index])
            ratio = (log_prob - log_probs[index]).exp()
            advantage = advantages[index]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
            surrogate = torch.min(ratio * advantage, clipped * advantage).mean()
            loss = -surrogate + VALUE * 0.5 * ((value - returns[index]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), NORM)
            optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    env, steps = (*sys.argv[1:], *("HalfCheetah-v5", "100000")[len(sys.argv) - 1 :])
    began = time.perf_counter()
    train(env, -(-int(steps) // (ENVS * TIME)), lambda _: None)
    print(f"{int(steps) / (time.perf_counter() - began):,.0f} steps per second")
