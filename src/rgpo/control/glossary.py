"""The definition of every key in a row of metrics.jsonl; docs/metrics.md is made from it."""

from rgpo.control.certify import GLOSSARY as CERTIFICATE_GLOSSARY
from rgpo.core.diagnostics import GLOSSARY as RATIO_GLOSSARY
from rgpo.core.diagnostics import KL_SPIKE

GLOSSARY: dict[str, str] = {
    "update": "Updates done; one update is all optimiser epochs over one rollout.",
    "step": "Environment steps of the run so far, dummy steps of autoresets included.",
    "return": "Mean undiscounted return of the training episodes that ended in this rollout.",
    "episode_length": "Mean length of those episodes.",
    "episodes": "Number of those episodes.",
    "kl": (
        "Exact KL(old || new) of the update, from the policy before it to the one after: mean over "
        "the rollout's states."
    ),
    "kl_behavior": (
        "Exact KL from the policy that collected the rollout to the one after the update; the same "
        "as `kl` unless the data are stale."
    ),
    "kl_spike": (
        f"1 if that KL is above {KL_SPIKE}, else 0; its mean over a run is the KL-spike rate."
    ),
    "entropy": "Mean entropy of the new policy (of the Gaussian before squashing).",
    "gradient_norm": "Mean norm of the joint gradient before clipping, over optimiser steps.",
    "optimizer_steps": "Optimiser steps taken; fewer than planned if target_kl ended the update.",
    "learning_rate": "Adam's learning rate in this update.",
    "kl_coefficient": "Coefficient of the KL penalty in this update, 0 without one.",
    "seconds_act": "Seconds in the policy while collecting; the share of one run of a batch.",
    "seconds_step": "Seconds in the environments, likewise.",
    "seconds_learn": "Seconds from the rollout's end to the measured update, likewise.",
    "seconds": "Seconds of the whole update, likewise.",
    **CERTIFICATE_GLOSSARY,
    **{name: text for name, text in RATIO_GLOSSARY.items() if name != "kl_spike_rate"},
}


def markdown() -> str:
    """The table of docs/metrics.md."""
    lines = ["| metric | definition |", "|---|---|"]
    escaped = {name: text.replace("|", "\\|") for name, text in GLOSSARY.items()}
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in escaped.items())]) + "\n"
