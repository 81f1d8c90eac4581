"""Ratio-controlling policy objectives as pure PyTorch functions; imports nothing else of rgpo."""
