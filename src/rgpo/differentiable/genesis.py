"""Tasks whose dynamics are a rigid-body model in the simulator Genesis (`rgpo[genesis]`).

    dx_{t+1} / d(x_t, u_t)  by Genesis' own reverse pass,      x = (joint positions, velocities)

A Genesis scene has a state and a tape of its own; a task has neither. So every step here loads the
states it is given, runs one step and reads the states back, and its derivative does the same once
more with the tape on. A step is then a pure function of tensors, and windows, resets inside them
and resume work as for every other task, for about twice the time of one tape over the window.

Checked with genesis-world 1.4.5 on a CPU, in float64. Scenes are kept per task and number of
environments; the first costs minutes of compilation, which Genesis caches on disk.
"""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from rgpo.differentiable.tasks.cartpole import CART, GRAVITY, HALF_LENGTH, MAX_FORCE, POLE, Cartpole
from rgpo.differentiable.tasks.task import Task
from rgpo.errors import RgpoError


class GenesisTask(Task):
    """A task that Genesis moves: state (joint positions, velocities), action: forces.

    A subclass states the model and says what is seen, rewarded and where episodes start; its `step`
    calls `move`. Simulated in float64 on the CPU, unless `genesis.init` was called before with
    another backend or precision.
    """

    model: ClassVar[str]
    """MJCF text, such as `Path(...).read_text()`; Genesis does not read its global options."""
    actuated: ClassVar[dict[str, float]]
    """Joints of one degree of freedom that the actions push, in their order, and the force (N) or
    torque (N m) at action 1."""
    gravity: ClassVar[float] = 9.81
    """Downwards (-z), m/s^2."""
    substeps: ClassVar[int] = 1
    """Integration steps in one step."""
    constrained: ClassVar[bool] = False
    """Whether contacts, joint limits and equality constraints act."""

    def __init__(self) -> None:
        _genesis()  # said before training starts, if it is missing

    def move(self, state: Tensor, action: Tensor) -> Tensor:
        """States (E, S) after one step of `dt` seconds, from (E, S) and (E, A).

        NaN where state or action is not finite: Genesis would give up the whole batch.
        """
        return _Move.apply(_world(type(self), len(state)), state, action)


class _World:
    """A built scene of E environments, and how a step runs in it."""

    def __init__(self, task: type[GenesisTask], number: int) -> None:
        gs = _genesis()
        if not gs._initialized:  # noqa: SLF001  # there is no public question
            gs.init(backend=gs.cpu, precision="64", logging_level="error")
        self.scene = gs.Scene(
            sim_options=gs.options.SimOptions(
                dt=task.dt,
                substeps=task.substeps,
                gravity=(0.0, 0.0, -task.gravity),
                requires_grad=True,
            ),
            rigid_options=gs.options.RigidOptions(
                disable_constraint=not task.constrained,
                enable_collision=task.constrained,
                enable_joint_limit=task.constrained,
            ),
            show_viewer=False,
        )
        morph = gs.morphs.MJCF(file=task.model, default_armature=None)
        self.entity = self.scene.add_entity(morph)
        self.scene.build(n_envs=number)
        self.solver = self.scene.rigid_solver
        self.positions: int = self.entity.n_qs
        joints = [self.entity.get_joint(name) for name in task.actuated]
        self.dofs = [index for joint in joints for index in joint.dofs_idx_local]
        self.like: dict[str, Any] = {"dtype": gs.tc_float, "device": gs.device}
        self.scale = torch.tensor(list(task.actuated.values()), **self.like)
        self.rest = self._state()[0].detach().clone()

    def _state(self) -> Tensor:
        state = self.solver.get_state()
        return torch.cat([state.qpos, state.dofs_vel], dim=-1)

    def fresh(self, use: Tensor, state: Tensor, *others: Tensor) -> list[Tensor]:
        """Copies for Genesis; where not to `use` (E,) the state of rest, and zeros."""
        pairs = [(state, self.rest), *((other, torch.zeros((), **self.like)) for other in others)]
        use = use.to(self.rest.device)[:, None]
        return [torch.where(use, given.detach().to(safe), safe) for given, safe in pairs]

    def run(self, state: Tensor, action: Tensor) -> Tensor:
        """The next states; on the scene's tape."""
        self.scene.reset()
        self.entity.set_qpos(state[:, : self.positions].detach())
        self.entity.set_dofs_velocity(state[:, self.positions :])
        self.entity.control_dofs_force(self.scale * action, self.dofs)
        self.scene.step(update_visualizer=False)
        wrong = self.solver.get_error_envs_mask()  # such an environment stays where it was
        return torch.where(wrong[:, None], torch.nan, self._state())

    def reverse(self, state: Tensor, action: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """`slope` by the next states (E, S), taken back to states and actions."""
        from genesis.utils.misc import qd_to_torch

        inputs = (state.requires_grad_(), action.requires_grad_())
        try:
            before, pushed = torch.autograd.grad(self.run(*inputs), inputs, slope)
        except _genesis().GenesisException as error:
            raise RgpoError(f"Genesis could not differentiate a step: {error}") from error
        # positions cannot be put on the tape, but the reverse pass ends in their gradient
        place = qd_to_torch(self.solver.rigid_info.qpos.grad, transpose=True, copy=True)
        return torch.cat([place, before[:, self.positions :]], dim=-1), pushed


class _Move(torch.autograd.Function):
    """One step of all environments of a world.

    Genesis 1.4.5 crashes (segmentation fault) if its buffers are touched with gradients switched on
    and off in turn, or given tensors that belong to another graph: hence `enable_grad`, always, and
    fresh tensors.
    """

    @staticmethod
    def forward(ctx: Any, world: _World, state: Tensor, action: Tensor) -> Tensor:
        finite = torch.isfinite(state).all(-1) & torch.isfinite(action).all(-1)
        with torch.enable_grad():
            after = world.run(*world.fresh(finite, state, action)).detach().to(state)
        finite = finite & torch.isfinite(after).all(-1)
        ctx.world = world
        ctx.save_for_backward(finite, state, action)
        return torch.where(finite[:, None], after, torch.nan)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, Tensor]:
        finite, *inputs = ctx.saved_tensors
        finite = finite & torch.isfinite(slope).all(-1)
        with torch.enable_grad():
            gradients = ctx.world.reverse(*ctx.world.fresh(finite, *inputs, slope))
        before, pushed = (torch.where(finite[:, None], g.to(slope), torch.nan) for g in gradients)
        return None, before, pushed


@functools.cache
def _world(task: type[GenesisTask], number: int) -> _World:
    with torch.enable_grad():
        return _World(task, number)


@functools.cache
def _genesis() -> Any:
    """The package; RgpoError if it is missing."""
    try:
        import genesis
    except ImportError as error:
        raise RgpoError(
            f"Genesis cannot be imported ({error}): pip install 'rgpo[genesis]'"
        ) from error
    return genesis


_ROD = POLE * (2 * HALF_LENGTH) ** 2 / 12
"""Moment of inertia of the pole about its middle, kg m^2."""


class GenesisCartpole(GenesisTask, Cartpole):
    """`rgpo/Cartpole` in Genesis: the same masses, reward and integration, so the same numbers.

    What the tests compare, and the pattern for a task of your own.
    """

    model = f"""
    <mujoco>
      <worldbody>
        <body name="cart">
          <inertial pos="0 0 0" mass="{CART}" diaginertia="1 1 1"/>
          <joint name="slide" type="slide" axis="1 0 0"/>
          <geom type="box" size="0.2 0.1 0.05" contype="0" conaffinity="0"/>
          <body name="pole">
            <inertial pos="0 0 {HALF_LENGTH}" mass="{POLE}" diaginertia="{_ROD} {_ROD} 1e-6"/>
            <joint name="hinge" type="hinge" axis="0 1 0"/>
            <geom type="capsule" fromto="0 0 0 0 0 {2 * HALF_LENGTH}" size="0.03"
                  contype="0" conaffinity="0"/>
          </body>
        </body>
      </worldbody>
    </mujoco>
    """
    actuated: ClassVar = {"slide": MAX_FORCE}
    gravity = GRAVITY

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        order = [0, 2, 1, 3]  # places before speeds in Genesis; its own inverse
        state = self.move(state[:, order], action)[:, order]
        never = torch.zeros(len(state), dtype=torch.bool, device=state.device)
        return state, self.reward(state, action), never
