"""Ant of DFlex, a task of the paper (2508.06214), in the simulator `rewarped` 1.3.3.

`rewarped` steps a state of its own. Here every step begins from the states it is given, in fresh
buffers, because the tape of the step before still needs the old ones; values and gradients are
those of its own `step`, bit for bit. float32. Which versions install: docs/differentiable.md.
"""

import contextlib
import functools
import io
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rgpo.differentiable.tasks.task import Segment, Task, between
from rgpo.errors import RgpoError

POSITIONS, VELOCITIES, ACTIONS = 15, 14, 8


class Ant(Task):
    """State: joint positions, joint velocities and the last action, which is observed too."""

    state_size, observation_size, noise_size = POSITIONS + VELOCITIES + ACTIONS, 37, 29
    action_size, max_steps, dt = ACTIONS, 1000, 1 / 60

    def __init__(self) -> None:
        _suite()  # said before training starts, if it is missing

    def initial(self, noise: Tensor) -> Tensor:
        """As in rewarped: a torso near (0, 0.75, 0), turned by up to 7.5 degrees."""
        utils = _suite().utils.torch_utils
        place, turn, axis, legs, motion = noise.float().split([3, 1, 3, 8, 14], dim=-1)
        place = between(place, -0.1, 0.1) + place.new_tensor([0.0, 0.75, 0.0])
        upright = place.new_tensor([-(0.5**0.5), 0.0, 0.0, 0.5**0.5]).expand(len(noise), 4)
        angle = (turn[:, 0] - 0.5) * torch.pi / 12
        turned = utils.quat_from_angle_axis(angle, functional.normalize(axis - 0.5))
        bent = place.new_tensor([0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0])
        spin, speed, rates = (0.5 * (motion - 0.5)).split([3, 3, 8], dim=-1)
        speed = speed + torch.linalg.cross(place, spin)  # of the point at the origin, as a twist
        parts = [place, utils.quat_mul(upright, turned), bent + between(legs, -0.2, 0.2)]
        parts += [spin, speed, rates, torch.zeros_like(legs)]
        return torch.cat(parts, dim=-1).to(noise)

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        env = _loaded(state)
        env.state_0, env.control_0 = env.model.state(), env.model.control()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Warp looks for .grad where none is
            for name, tensor in zip(env.state_tensors_names, env.state_tensors, strict=True):
                env.state.assign(name, tensor)
            _forward_kinematics(env)
            env.pre_physics_step(action.float())
            env.do_physics_step()
        env.compute_observations()
        env.compute_reward()
        moved = [part.view(len(state), -1) for part in env.state_tensors]
        after = torch.cat([*moved, env.actions], dim=-1).to(state)
        return after, env.rew_buf.to(state), env.terminated_buf

    def observe(self, state: Tensor) -> Tensor:  # noqa: D102
        env = _loaded(state)
        env.compute_observations()
        return env.obs_buf.to(state)

    def drawing(self, state: Tensor) -> list[Segment]:  # noqa: ARG002, D102
        return []


def _loaded(state: Tensor) -> Any:
    """Environments with these states, in the graph but not yet in the buffers."""
    env = _environments(len(state), str(state.device))
    place, motion, env.actions = state.float().split([POSITIONS, VELOCITIES, ACTIONS], dim=-1)
    env.state_tensors = [place.flatten(), motion.flatten()]
    return env


@functools.cache
def _environments(number: int, device: str) -> Any:
    """Started, without time limits of their own."""
    made = _suite().ant.Ant
    with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        env = made(
            num_envs=number,
            device=device,
            episode_length=2**31 - 1,
            no_env_offset=True,
            use_graph_capture=False,
        )
        env.reset()
    env.reset_buf.zero_()
    return env


@functools.cache
def _suite() -> Any:
    """`rewarped.envs.dflex`; RgpoError if it is missing."""
    try:
        from rewarped.envs import dflex
        from rewarped.envs.dflex import ant
        from rewarped.envs.dflex.utils import torch_utils
    except ImportError as error:
        raise RgpoError(
            f"rewarped cannot be imported ({error}): see docs/differentiable.md"
        ) from error
    del ant, torch_utils  # imported for what they hang into the package
    return dflex


def _forward_kinematics(env: Any) -> None:
    import warp.sim

    state = env.state_0
    warp.sim.eval_fk(env.model, state.joint_q, state.joint_qd, None, state)
