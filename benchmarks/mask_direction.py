"""Which way the policy is pushed by reused gradients, under each weight on the ratio.

A policy is trained for a while (mask, KL penalty), then takes one more update of M epochs. On the
window of many environments that the policy before that update has played, the gradient of the
surrogate at the policy after it is computed with every weight. The ratio alone is unbiased: its
gradient is the reference, and the cosine between those of two halves of the environments says how
much of a difference is noise.

    python benchmarks/mask_direction.py [--tasks rgpo/Pendulum ...] [--epochs 5 10] [--envs 4096]
"""

import argparse
import dataclasses

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rgpo.differentiable.config import ReparamConfig
from rgpo.differentiable.learner import Batch
from rgpo.differentiable.surrogate import reparam_surrogate
from rgpo.differentiable.train import ReparamTrainer
from rgpo.differentiable.window import action_gradients
from rgpo.settings import configured
from rgpo.studies.differentiable import KL, THRESHOLDS, WEIGHTS

SETTLE = 13
"""Windows that the many environments play before they are measured."""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(THRESHOLDS))
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--envs", type=int, default=4096)
    parser.add_argument("--updates", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="samples kept, and cosine with the gradient of the ratio alone")
    for heading in ("task", "epochs", "KL", "two halves", *list(WEIGHTS)[1:]):
        table.add_column(heading)
    for task in options.tasks:
        for epochs in options.epochs:
            config = ReparamConfig(env=task, epochs=epochs, set=(f"kl_coefficient={KL}",), track=())
            table.add_row(task, str(epochs), *measured(config, options.envs, options.updates))
    Console().print(table)


def measured(config: ReparamConfig, envs: int, updates: int) -> list[str]:
    """The cells of one task and number of epochs."""
    trainer = ReparamTrainer([config])
    for _ in range(updates):
        trainer.step()
    batch = window_of_many(trainer, envs)
    kl = trainer.step()[0]["kl"]
    rows = trainer.learner.actor.rows
    reference, _ = direction(trainer, batch, rows, "ratio")
    first, second = (direction(trainer, half, rows, "ratio")[0] for half in halves(batch))
    cells = [f"{kl:.2f}", f"{cosine(first, second):.3f}"]
    for weight in list(WEIGHTS)[1:]:
        found, kept = direction(trainer, batch, rows, weight)
        cells.append(f"{kept:.0%}, {cosine(found, reference):.3f}")
    return cells


def window_of_many(trainer: ReparamTrainer, envs: int) -> Batch:
    """A window of the same policy in many environments, with its gradients."""
    many = ReparamTrainer([dataclasses.replace(trainer.config, num_envs=envs)])
    many.learner.restore(0, trainer.learner.state(0))
    many.normalizer.restore(0, trainer.normalizer.state(0))
    for _ in range(SETTLE):
        window = many._unroll(many._schedule())  # noqa: SLF001
    everyone = torch.ones(1, envs, dtype=torch.bool)
    return many._batch(window, action_gradients(window), everyone)  # noqa: SLF001


def halves(batch: Batch) -> list[Batch]:
    """Every other sample, which are other environments."""
    return [
        Batch(**{f.name: getattr(batch, f.name)[:, i::2] for f in dataclasses.fields(Batch)})
        for i in range(2)
    ]


def direction(
    trainer: ReparamTrainer, batch: Batch, rows: Tensor, weight: str
) -> tuple[Tensor, float]:
    """Gradient (P,) of the surrogate under a weight, and the share of samples that it keeps."""
    objective = configured(*WEIGHTS[weight]).objective
    leaf = rows.detach().clone().requires_grad_()
    mean, log_std = trainer.learner.actor(batch.observation, leaf)
    surrogate, _, found = reparam_surrogate(
        objective, mean, log_std, batch.action, batch.gradient, batch.log_prob
    )
    (gradient,) = torch.autograd.grad(surrogate.mean(), leaf)
    return gradient[0], float((found != 0).double().mean())


def cosine(first: Tensor, second: Tensor) -> float:
    """Of the angle between two vectors."""
    return float(torch.cosine_similarity(first, second, dim=0))


if __name__ == "__main__":
    main()
