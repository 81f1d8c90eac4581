"""Golden rows of test_golden.py."""

GOLDEN = []
LIMITS = {}
