"""Policy optimisation through the gradient of a differentiable simulator."""
