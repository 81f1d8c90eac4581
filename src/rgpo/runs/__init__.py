"""A run directory: configuration, metrics, checkpoints, statistics and the report."""
