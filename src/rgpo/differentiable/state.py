"""What a checkpoint of a trainer holds, run by run, and how training goes on from it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rgpo.differentiable.learner import part_of
from rgpo.runs import checkpoint

if TYPE_CHECKING:
    from rgpo.differentiable.train import ReparamTrainer


def states(trainer: "ReparamTrainer") -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors and JSON of every run; with `restore`, training continues bit for bit."""
    return [_state_of_run(trainer, run) for run in range(trainer.runs)]


def _state_of_run(trainer: "ReparamTrainer", run: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    environments, penalty = trainer.environments, trainer.penalties[run]
    mine = _environments_of(trainer, run)
    tensors = {
        "environments.state": environments.state[mine].detach(),
        "environments.elapsed": environments.elapsed[mine],
        "environments.generator": environments.generators[run].get_state(),
    }
    for prefix, holder in _holders(trainer).items():
        tensors |= {f"{prefix}.{name}": one for name, one in holder.state(run).items()}
    return {name: tensor.cpu() for name, tensor in tensors.items()}, {
        "kl_coefficient": penalty.coefficient if penalty else None,
        "log_entropy_weight": float(trainer.log_entropy_weights[run]),
    }


def restore(trainer: "ReparamTrainer", saved: Sequence[checkpoint.Checkpoint]) -> None:
    """Continue where `states` was taken, every run after the same update."""
    trainer.updates_done = saved[0].update
    environments = trainer.environments
    environments.state = environments.state.detach().clone()
    for run, (tensors, state) in enumerate((one.tensors, one.state) for one in saved):
        mine = _environments_of(trainer, run)
        environments.state[mine] = tensors["environments.state"].to(trainer.device)
        environments.elapsed[mine] = tensors["environments.elapsed"].to(trainer.device)
        environments.generators[run].set_state(tensors["environments.generator"])
        for prefix, holder in _holders(trainer).items():
            holder.restore(run, part_of(tensors, f"{prefix}."))
        trainer.log_entropy_weights[run] = state["log_entropy_weight"]
        penalty = trainer.penalties[run]
        if penalty is not None:
            trainer.penalties[run] = replace(penalty, coefficient=state["kl_coefficient"])


def _environments_of(trainer: "ReparamTrainer", run: int) -> slice:
    number = trainer.config.num_envs
    return slice(run * number, (run + 1) * number)


def _holders(trainer: "ReparamTrainer") -> dict[str, Any]:
    """What has `state(run)` and `restore(run, state)`, by the prefix of its names."""
    return {"learner": trainer.learner, "obs": trainer.normalizer, "episodes": trainer.episodes}
