"""The definition of every key in a row of a run through gradients of a task or a critic."""

from rgpo.control.glossary import GLOSSARY as CONTROL
from rgpo.core.diagnostics import GLOSSARY as RATIO

_SHARED = (
    "update",
    "step",
    "return",
    "episode_length",
    "episodes",
    "kl",
    "kl_spike",
    "gradient_norm",
    "optimizer_steps",
    "learning_rate",
    "kl_coefficient",
    "seconds",
)

GLOSSARY: dict[str, str] = {
    **{name: CONTROL[name] for name in _SHARED},
    **{name: text for name, text in RATIO.items() if name != "kl_spike_rate"},
    "entropy": (
        "Mean entropy of the new policy; of the action as the environment sees it where the task "
        "squashes it by tanh."
    ),
    "entropy_coefficient": "Weight of the entropy in this update.",
    "ratio_kept": "Share of the window's samples whose weight is not 0 after the update.",
    "action_gradient_norm": "Mean over samples of |G|, G = dR / da at the cached action.",
    "action_gradient_max": "Largest |G| of the window.",
    "variance_pathwise": (
        "Variance over the window's samples of G, summed over action dimensions: the pathwise "
        "estimate of the return's derivative by the mean action."
    ),
    "variance_score": (
        "The same of gamma^c A (a - mean) / std^2, the score-function estimate of the same "
        "derivative, with the advantage of the same critic."
    ),
    "nonfinite_environments": (
        "Environments left out of the update, because their state or gradient was NaN or infinite."
    ),
    "seconds_rollout": "Seconds in policy and environment, forwards.",
    "seconds_backward": "Seconds of the back-propagation through time.",
    "seconds_actor": "Seconds of the policy's epochs.",
    "seconds_critic": "Seconds of the critics' targets and epochs.",
}


def markdown() -> str:
    """The table of docs/differentiable.md: what control's glossary does not have or says else."""
    own = {name: text for name, text in GLOSSARY.items() if CONTROL.get(name) != text}
    lines = ["| metric | definition |", "|---|---|"]
    lines += [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in own.items()]
    return "\n".join(lines) + "\n"
