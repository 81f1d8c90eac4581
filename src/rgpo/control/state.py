"""What a checkpoint of a trainer holds, run by run, and how training goes on from it."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rgpo.runs import checkpoint

if TYPE_CHECKING:
    from rgpo.control.train import Trainer


def states(trainer: "Trainer") -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors and JSON of every run; with `restore`, training continues bit for bit."""
    environments = trainer.environments.state()  # of all runs, once
    return [_state_of_run(trainer, run, environments) for run in range(trainer.runs)]


def _state_of_run(
    trainer: "Trainer", run: int, environments: dict[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {k: v.contiguous() for k, v in trainer.learner.state(run).items()}
    for prefix, moments in (("obs", trainer.normalizer.moments), ("ret", trainer.scaler.moments)):
        for name, array in moments.state(run).items():
            tensors[f"{prefix}.{name}"] = torch.from_numpy(array)
    mine = slice(run * trainer.envs, (run + 1) * trainer.envs)
    tensors["discounted"] = torch.from_numpy(trainer.scaler.discounted[run].copy())
    tensors["running_return"] = torch.from_numpy(trainer.collector.running_return[mine].copy())
    tensors["running_length"] = torch.from_numpy(trainer.collector.running_length[mine].copy())
    for key, array in trainer.collector.current.items():
        tensors[f"current.{key}"] = torch.from_numpy(array[mine].copy())
    if trainer.config.staleness:
        tensors["past"] = torch.stack([parameters[run] for parameters in trainer.past])
    if trainer.anchors is not None:
        tensors |= {f"anchor.{k}": v[run].clone() for k, v in trainer.anchors.state_dict().items()}
    penalty = trainer.penalties[run]
    return {k: v.cpu() for k, v in tensors.items()}, {
        "generator": checkpoint.generator_state(trainer.generators[run]),
        "kl_coefficient": None if penalty is None else penalty.coefficient,
        "objective": asdict(trainer.recipes[run].objective),
        "learning_rate_scale": trainer.rate_scales[run],
        "environments": _part(environments, mine),
    }


def restore(trainer: "Trainer", saved: Sequence[checkpoint.Checkpoint]) -> None:
    """Continue where `states` was taken, every run after the same update.

    Environments whose state could not be captured (EnvPool's) have started new episodes.
    """
    trainer.updates_done = saved[0].update
    for run, one in enumerate(saved):
        _restore_run(trainer, run, one.tensors, one.state)
    _restore_policies(trainer, saved)
    trainer.normalizer.refresh()
    states = [one.state["environments"] for one in saved]
    if any(state is None for state in states):
        return
    trainer.environments.restore(_joined(states))
    for run, one in enumerate(saved):
        mine = slice(run * trainer.envs, (run + 1) * trainer.envs)
        trainer.scaler.discounted[run] = one.tensors["discounted"].numpy()
        trainer.collector.running_return[mine] = one.tensors["running_return"].numpy()
        trainer.collector.running_length[mine] = one.tensors["running_length"].numpy()
        for key, array in trainer.collector.current.items():
            array[mine] = one.tensors[f"current.{key}"].numpy()


def _restore_run(
    trainer: "Trainer", run: int, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    trainer.learner.restore(run, tensors)
    for prefix, moments in (("obs", trainer.normalizer.moments), ("ret", trainer.scaler.moments)):
        moments.restore(
            run, {k: tensors[f"{prefix}.{k}"].numpy() for k in ("mean", "variance", "count")}
        )
    trainer.generators[run] = checkpoint.restore_generator(state["generator"])
    penalty = trainer.penalties[run]
    if penalty is not None and state["kl_coefficient"] is not None:
        trainer.penalties[run] = replace(penalty, coefficient=state["kl_coefficient"])
    if "objective" in state:
        objective = replace(trainer.recipes[run].objective, **state["objective"])  # type: ignore[type-var]
        trainer.recipes[run] = replace(trainer.recipes[run], objective=objective)
        trainer.rate_scales[run] = state["learning_rate_scale"]


def _restore_policies(trainer: "Trainer", saved: Sequence[checkpoint.Checkpoint]) -> None:
    """The past and averaged parameters of all runs, and their adapted objectives."""
    trainer.learner.set_recipes(trainer.recipes)
    trainer.past.append(trainer.learner.parameters_of_runs())
    if trainer.config.staleness:
        rows = torch.stack([one.tensors["past"] for one in saved], 1).to(trainer.device)
        trainer.past.extend(rows.unbind(0))
    if trainer.anchors is not None:
        names = trainer.anchors.state_dict()
        trainer.anchors.load_state_dict(
            {
                k: torch.stack([one.tensors[f"anchor.{k}"] for one in saved]).to(trainer.device)
                for k in names
            }
        )


def _part(state: dict[str, Any] | None, mine: slice) -> dict[str, Any] | None:
    """The part of a batch's environments that belongs to one run."""
    if state is None:
        return None
    lists = {k: v[mine] for k, v in state.items() if isinstance(v, list)}
    return state | lists


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of all runs' environments, put together again."""
    lists = {
        k: [one for state in states for one in state[k]]
        for k, v in states[0].items()
        if isinstance(v, list)
    }
    return states[0] | lists
