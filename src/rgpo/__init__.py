"""Policy optimisation that controls how far data may be from the policy (RGPO and its family)."""

__version__ = "0.1.0"
