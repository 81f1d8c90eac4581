"""Golden rows of test_golden.py: inside [0.2, 2] the ratio, outside the edge."""

GOLDEN = [
    ("reparam-mask", 1.9, 1.0, None, 1.9, 1.9),
    ("reparam-mask", 2.1, 1.0, None, 2.0, 0.0),
    ("reparam-mask", 0.25, -3.0, None, -0.75, -0.75),
    ("reparam-mask", 0.1, -3.0, None, -0.6, 0.0),
    ("reparam-mask", 2.1, -1.0, None, -2.0, 0.0),
]
LIMITS = {}
