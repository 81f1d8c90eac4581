"""Golden rows of test_golden.py: three policies, sequences, groups, expert data.

Units of one element; longer ones are in test_sequence_objectives.py and test_groups.py.
"""

INF = float("inf")

GOLDEN = [
    # r = 2 = c u with u = 0.9: c = 20/9 is below the cap of 5
    ("decoupled-ppo", 2.0, 1.0, 0.9, 2.0, 2.0),
    # r = 12, u = 1.1: c = 10.9 is cut to 5
    ("decoupled-ppo", 12.0, 1.0, 1.1, 5.5, 5.5),
    # r = 3, u = 1.5 is clipped to 1.2, c = 2
    ("decoupled-ppo", 3.0, 1.0, 1.5, 2.4, 0.0),
    ("decoupled-ppo", 0.5, -1.0, 0.5, -0.8, 0.0),
    ("decoupled-ppo", 3.0, -2.0, 1.5, -6.0, -6.0),
    # c = 3 is cut to 2
    ("ppo-tis", 3.0, 1.0, 1.0, 2.0, 2.0),
    ("ppo-tis", 1.5, -1.0, 1.0, -1.5, -1.5),
    # c = 3 and c = 0.4 are outside [0.5, 2]
    ("ppo-mis", 3.0, 1.0, 1.0, 0.0, 0.0),
    ("ppo-mis", 0.4, -1.0, 1.0, 0.0, 0.0),
    ("ppo-mis", 1.5, -1.0, 1.0, -1.5, -1.5),
    # the weight r = 150 is cut to 100
    ("ppo-ewma", 150.0, 1.0, 1.1, 100.0, 100.0),
    ("ppo-ewma", 3.0, 1.0, 1.5, 2.4, 0.0),
    ("ppo-ewma", 150.0, -1.0, 3.0, -100.0, -100.0),
    ("ppo-ewma-revised", 3.0, 1.0, 1.0, 2.0, 2.0),
    ("ppo-ewma-revised", 0.6, -1.0, 0.6, -0.8, 0.0),
    # c = 2/1.6 = 1.25: clipped at 1.45; c = 2/1.25 = 1.6: up to 1.8
    ("remix", 2.0, 1.0, 1.6, 1.45, 0.0),
    ("remix", 2.0, 1.0, 1.0, 2.0, 2.0),
    # c = 0.5/0.5 = 1: flat below 0.8; c = 0.5/0.8 = 0.625: down to 0.425
    ("remix", 0.5, -1.0, 0.5, -0.8, 0.0),
    ("remix", 0.5, -1.0, 0.8, -0.5, -0.5),
]
LIMITS = {
    "decoupled-ppo": (0, 0, 0, INF),
    "ppo-tis": (0, 0, 0, INF),
    "ppo-mis": (0, 0, 0, INF),
    "ppo-ewma": (0, 0, 0, 100),
    "ppo-ewma-revised": (0, 0, 0, INF),
    "remix": (0, 0, 0, INF),
}
