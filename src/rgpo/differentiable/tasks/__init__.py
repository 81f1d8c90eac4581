"""Tasks with exact gradients, one file each."""

import difflib
import importlib

from rgpo.differentiable.tasks.cartpole import Cartpole
from rgpo.differentiable.tasks.hopper import Hopper
from rgpo.differentiable.tasks.lqr import LQR
from rgpo.differentiable.tasks.pendulum import Pendulum
from rgpo.differentiable.tasks.quadrotor import Quadrotor
from rgpo.differentiable.tasks.reacher import Reacher
from rgpo.differentiable.tasks.task import Task
from rgpo.errors import RgpoError

TASKS: dict[str, type[Task]] = {
    f"rgpo/{task.__name__}": task for task in (Pendulum, Cartpole, Quadrotor, Reacher, LQR, Hopper)
}


def make_task(name: str) -> Task:
    """The task of that id, "rgpo/Pendulum", or of your own module, "module:ClassName".

    Raises RgpoError, with the nearest ids, if there is none.
    """
    if name in TASKS:
        return TASKS[name]()
    module, _, attribute = name.partition(":")
    if attribute:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RgpoError(f"there is no differentiable task {name!r}: {error}") from error
        if isinstance(found, type) and issubclass(found, Task):
            return found()
        raise RgpoError(f"{name!r} is no rgpo.differentiable Task: make it a subclass")
    near = difflib.get_close_matches(name, TASKS, n=2, cutoff=0.4)
    hint = f", did you mean {' or '.join(near)}?" if near else ""
    raise RgpoError(
        f"{name!r} is no differentiable task{hint} choose from {', '.join(TASKS)}, or give your "
        'own as "module:ClassName"'
    )
