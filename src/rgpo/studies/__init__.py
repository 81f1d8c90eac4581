"""Named, reproducible comparisons."""
