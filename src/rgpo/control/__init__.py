"""Actor-critic training on vector environments."""
