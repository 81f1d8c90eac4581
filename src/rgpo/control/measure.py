"""What an update did to the policies, measured on the rollout that it was fitted to."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rgpo.control.certify import certificates
from rgpo.control.distributions import Distribution
from rgpo.control.learner import Batch, Learner, objective_inputs
from rgpo.core.advantage import normalize
from rgpo.core.diagnostics import KL_SPIKE, explained_variance, ratio_diagnostics
from rgpo.core.objective import Objective


@torch.no_grad()
def measure(
    learner: Learner,
    distribution: Distribution,
    objectives: Sequence[Objective],
    batch: Batch,
    before: Tensor,
    *,
    gamma: float,
) -> dict[str, np.ndarray]:
    """Every diagnostic of the new policies against the behaviour policies: (R,) arrays.

    `before` (R, N, P) are the policies at the start of the update: the batch's own unless it is
    stale.
    """
    mask, count = batch.mask, torch.clamp(batch.mask.sum(-1), min=1)
    parameters, _ = learner.evaluate(batch.observation)
    log_ratio = distribution.log_prob(parameters, batch.action) - batch.log_prob
    advantage = normalize(batch.advantage, mask, dim=-1)
    weight = torch.stack(
        [
            _weight(
                objective, distribution, batch.run(r), parameters[r], log_ratio[r], advantage[r]
            )
            for r, objective in enumerate(objectives)
        ]
    )
    kl = behavior_kl = distribution.kl(before, parameters)
    if before is not batch.parameters:
        behavior_kl = distribution.kl(batch.parameters, parameters)
    entropy = distribution.entropy(parameters)
    metrics = ratio_diagnostics(log_ratio, advantage, weight, mask)
    metrics["kl"] = torch.where(mask, kl, 0).sum(-1) / count
    metrics["kl_behavior"] = torch.where(mask, behavior_kl, 0).sum(-1) / count
    metrics["kl_spike"] = (metrics["kl"] > KL_SPIKE).float()
    metrics["entropy"] = torch.where(mask, entropy, 0).sum(-1) / count
    metrics["explained_variance"] = explained_variance(batch.value, batch.returns, mask)
    table = torch.stack([tensor.double() for tensor in metrics.values()]).cpu().numpy()
    found = certificates(
        distribution, objectives, batch, parameters, log_ratio, behavior_kl, gamma=gamma
    )
    return dict(zip(metrics, table, strict=True)) | {k: v.numpy() for k, v in found.items()}


def _weight(
    objective: Objective,
    distribution: Distribution,
    batch: Batch,
    parameters: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
) -> Tensor:
    """The weight of every sample of one run; its advantages stand in for the median's."""
    inputs = objective_inputs(
        objective, distribution, parameters, log_ratio + batch.log_prob, batch
    )
    if "median_advantage" in objective.needs:
        inputs["median_advantage"] = batch.returns - batch.value
    return objective.weight(log_ratio, advantage, **inputs)
