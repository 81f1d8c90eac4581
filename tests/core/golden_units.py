"""Golden rows of test_golden.py: three policies, sequences, groups, expert data.

Units of one element; longer ones are in test_sequence_objectives.py and test_groups.py.
"""

import math

INF = float("inf")
LN2 = math.log(2)

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
    # k = 10, u = 1.2: tanh 1 = 0.76159416, sech^2 1 = 0.41997434; c = 1, then 3 cut to 2
    ("rgpo-decoupled", 1.2, 1.0, 1.2, 1 + 0.2 * 0.76159415596, 1.2 * 0.41997434161),
    ("rgpo-decoupled", 3.6, -1.0, 1.2, -2 - 0.4 * 0.76159415596, -2.4 * 0.41997434161),
    ("rgpo-decoupled", 3.0, 1.0, 1.0, 2.0, 2.0),
    ("rgpo-decoupled", 0.6, -1.0, 1.2, -0.5 - 0.1 * 0.76159415596, -0.6 * 0.41997434161),
    ("rgpo-decoupled-signed", 1.2, 1.0, 1.2, 1 + 0.2 * 0.76159415596, 1.2 * 0.41997434161),
    ("rgpo-decoupled-signed", 3.6, -1.0, 1.2, -2.4, -2.4),
    ("rgpo-decoupled-signed", 0.6, -1.0, 1.2, -0.6, -0.6),
    # one token: the sequence ratio is its own
    ("gspo-token", 1.0005, 1.0, None, 1.0004, 0.0),
    ("gspo-token", 1.0003, 1.0, None, 1.0003, 1.0003),
    ("gspo-token", 0.9996, -1.0, None, -0.9997, 0.0),
    ("luspo", 1.003, 1.0, None, 1.0025, 0.0),
    ("luspo", 0.997, -1.0, None, -0.998, 0.0),
    # |log r| beyond 0.4: e^0.4 and e^-0.4
    ("gmpo", 2.0, 1.0, None, 1.49182469764, 0.0),
    ("gmpo", 1.2, 1.0, None, 1.2, 1.2),
    ("gmpo", 0.5, -1.0, None, -0.67032004604, 0.0),
    ("gmpo", 2.0, -1.0, None, -2.0, -2.0),
    # k = 5000, r - 1 = 4e-4: tanh 1 = 0.76159416, sech^2 1 = 0.41997434
    ("rgpo-sequence", 1.0004, 1.0, None, 1 + 4e-4 * 0.76159415596, 1.0004 * 0.41997434161),
    ("rgpo-sequence", 0.9996, -1.0, None, -1 + 4e-4 * 0.76159415596, -0.9996 * 0.41997434161),
    # the peaks: (2/3)^2 e^(3 - 2) and (3/2)^3 e^(2 - 3)
    ("vespo", 2 / 3, 1.0, None, 4 * math.e / 9 * math.log(2 / 3), 4 * math.e / 9),
    ("vespo", 1.5, -1.0, None, -27 / 8 / math.e * math.log(1.5), -27 / 8 / math.e),
    ("topr-sequence", 4.0, 1.0, None, 2 * LN2, 1.0),
    ("topr-sequence", 4.0, -1.0, None, -2 * LN2, -1.0),
    ("topr-sequence", 0.5, -1.0, None, 0.5 * LN2, -0.5),
    ("vcpo", 16.0, 1.0, None, 32 * LN2, 8.0),
    ("vcpo", 0.5, -2.0, None, LN2, -1.0),
    ("minpro-variant", 8.0, 1.0, None, 15 * LN2, 5.0),
    ("minpro-variant", 0.5, -2.0, None, LN2, -1.0),
    # -log 0.5 > 0.5 is dropped, -log 0.7 is not
    ("ppo-opsm", 0.5, -1.0, None, 0.0, 0.0),
    ("ppo-opsm", 0.7, -1.0, None, -0.8, 0.0),
    ("ppo-opsm", 2.0, -1.0, None, -2.0, -2.0),
    ("ppo-opsm", 0.5, 1.0, None, 0.5, 0.5),
    # first token: bounds e^-0.025, e^0.05, and e^0.05 for A < 0 as well
    ("ctpo", 1.04, 1.0, None, 1.04, 1.04),
    ("ctpo", 1.1, 1.0, None, 1.05127109638, 0.0),
    ("ctpo", 0.97, -1.0, None, -0.97530991203, 0.0),
    ("ctpo", 1.1, -1.0, None, -1.05127109638, 0.0),
    ("ctpo", 1.04, -1.0, None, -1.04, -1.04),
    *(
        row
        for name in (
            "turn-ppo",
            "s-ppo-variant",
            "st-ppo-variant",
            "ppo-prefix-variant",
            "ppo-prefix-mean-variant",
        )
        for row in (
            (name, 2.0, 1.0, None, 1.2, 0.0),
            (name, 0.5, -1.0, None, -0.8, 0.0),
            (name, 2.0, -1.0, None, -2.0, -2.0),
        )
    ),
    # one sequence has none to be compared with
    *(
        (name, 2.0, sign, None, 0.0, 0.0)
        for name in ("rebel", "dpo", "ipo", "p3o-separate-variant", "p3o-joint-variant", "brain")
        for sign in (1.0, -1.0)
    ),
    # p = 1/4: p (1 - p) = 3/16; p = 1/2: 1/4
    ("chord-phi", 2.0, 1.0, {"log_prob": -2 * LN2}, 3 / 16 * LN2, 3 / 16),
    ("chord-phi", 2.0, -1.0, {"log_prob": -LN2}, -LN2 / 4, -1 / 4),
    ("chord-mu", 0.25, 1.0, None, -2 * LN2, 1.0),
    ("chord-mu", 0.25, -1.0, None, 2 * LN2, -1.0),
    ("chord-is", 2.0, 1.0, {"log_prob": -2 * LN2}, LN2 / 4, 1 / 4),
    ("chord-is", 2.0, -1.0, {"log_prob": -LN2}, -LN2 / 2, -1 / 2),
]
LIMITS = {
    "decoupled-ppo": (0, 0, 0, INF),
    "ppo-tis": (0, 0, 0, INF),
    "ppo-mis": (0, 0, 0, INF),
    "ppo-ewma": (0, 0, 0, 100),
    "ppo-ewma-revised": (0, 0, 0, INF),
    "remix": (0, 0, 0, INF),
    "rgpo-decoupled-signed": (0, 0, 0, 3),
    "gspo-token": (0, 0, 0, INF),
    "luspo": (0, 0, 0, INF),
    "gmpo": (0, 0, 0, INF),
    "topr-sequence": (1, 1, 0, 1),
    "vcpo": (0, 8, 0, 8),
    "minpro-variant": (0, 5, 0, 5),
    "ppo-opsm": (0, 0, 0, INF),
    "chord-phi": (0, 1e-6, 0, 1e-6),  # neutral log-probs end at -1e-6
    "chord-mu": (1, 1, 1, 1),
    "chord-is": (0, math.exp(-1e-6), 0, math.exp(-1e-6)),
    "turn-ppo": (0, 0, 0, INF),
    "s-ppo-variant": (0, 0, 0, INF),
    "st-ppo-variant": (0, 0, 0, INF),
    "ppo-prefix-variant": (0, 0, 0, INF),
    "ppo-prefix-mean-variant": (0, 0, 0, INF),
}
