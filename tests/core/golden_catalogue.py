"""Golden rows of test_golden.py: objectives that weigh elements, alone or as a batch."""

import math

INF = float("inf")
LOG2 = math.log(2)
GATE_2 = 2 * 1.8158323094e-4  # r sech^2(k (r - 1)/2) at k = 10, r = 2, see test_golden.py
GATE_HALF = 0.5 * (1 - 0.98661429815**2)  # the same at r = 1/2
TANH = 1023 / 1025  # tanh(5 ln 2) = (2^10 - 1)/(2^10 + 1)
GOLDEN = [
    # outward: the gate of rgpo; restoring: min(r, 3), and 3 (1 + ln(4/3)) at r = 4
    ("rgpo-signed", 2.0, 1.0, None, 1 + 0.2 * 0.99990920426, GATE_2),
    ("rgpo-signed", 0.5, 1.0, None, 0.5, 0.5),
    ("rgpo-signed", 0.5, -1.0, None, -(1 - 0.2 * 0.98661429815), -GATE_HALF),
    ("rgpo-signed", 2.0, -1.0, None, -2.0, -2.0),
    ("rgpo-signed", 4.0, -1.0, None, -3 * (1 + math.log(4 / 3)), -3.0),
    ("rgpo-signed-kl", 0.5, 2.0, None, 1.0, 1.0),
    ("rgpo-signed-kl", 4.0, -1.0, None, -3 * (1 + math.log(4 / 3)), -3.0),
    # c = 1: minus |d| - 0.2 tanh(5 |d|) and tanh^2(5 d), at d = +-ln 2
    ("rgpo-pullback", 2.0, 1.0, None, 1.19998184085 - LOG2 + 0.2 * TANH, GATE_2 - TANH**2),
    (
        "rgpo-pullback",
        0.5,
        -1.0,
        None,
        -(1 - 0.2 * 0.98661429815 + LOG2 - 0.2 * TANH),
        TANH**2 - GATE_HALF,
    ),
    ("rgpo-pullback", 4.0, -1.0, None, -3 * (1 + math.log(4 / 3)), -3.0),
]
LIMITS = {
    "rgpo-signed": (0, 0, 0, 3),
    "rgpo-signed-kl": (0, 0, 0, 3),
    "rgpo-pullback": (0, -1, -1, 3),
}
