"""Golden rows of test_golden.py: objectives that weigh elements, alone or as a batch."""

import math

INF = float("inf")
LOG2 = math.log(2)
GATE_2 = 2 * 1.8158323094e-4  # r sech^2(k (r - 1)/2) at k = 10, r = 2, see test_golden.py
GATE_HALF = 0.5 * (1 - 0.98661429815**2)  # the same at r = 1/2
TANH = 1023 / 1025  # tanh(5 ln 2) = (2^10 - 1)/(2^10 + 1)
LOG4 = math.log(4)
S4 = 0.98201379004  # s(4)
PSI = 1.5 * (2 ** (4 / 3) - 1) / (2 ** (4 / 3) + 1)  # 1.5 tanh(ln 2 / 1.5) = 0.6476890
HAZARD = math.log1p(math.exp(PSI)) ** 1.5 + (math.log1p(math.exp(-PSI)) / 0.8) ** 2
HAZARD_LOW = math.log1p(math.exp(-PSI)) ** 1.5 + (math.log1p(math.exp(PSI)) / 0.8) ** 2
HAZARD_1 = LOG2**1.5 + (LOG2 / 0.8) ** 2  # softplus(0) = ln 2: 1.3278
SECH2 = 1 - (PSI / 1.5) ** 2
ANO_A, NU = 1.5808761911755898, 1.28369899881397


def ano(x):
    """G as the authors write it, with z = a (x - 1.2) and c = (nu + 1) / (nu - 1)."""

    def phi(z):
        c = (NU + 1) / (NU - 1)
        softplus, log_sum = math.log1p(math.exp(z)), math.log(math.exp(z) + NU)
        return 10 / ANO_A * (z - (c + 1) * softplus + c * log_sum)

    return phi(ANO_A * (x - 1.2)) + 1 - phi(-0.2 * ANO_A)


def ano_slope(x):
    e = math.exp(ANO_A * (x - 1.2))
    return 10 * NU * (1 - e) / ((1 + e) * (e + NU))


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
    # tau = 4: s(4 (r - 1)), w = 4 r s (1 - s)
    ("p3o-scopic", 2.0, 1.0, None, S4, 8 * S4 * (1 - S4)),
    ("p3o-scopic", 0.5, -1.0, None, -0.11920292202, -2 * 0.11920292202 * 0.88079707798),
    ("mdpo", 2.0, 1.0, None, 2.0, 2.0),
    ("mdpo", 0.5, -3.0, None, -1.5, -1.5),
    # min(e^A, 20) log r
    ("awr", 2.0, 1.0, None, math.e * LOG2, math.e),
    ("awr", 2.0, 4.0, None, 20 * LOG2, 20.0),
    ("awr", 0.5, -1.0, None, -LOG2 / math.e, 1 / math.e),
    # alone in its batch: N psi = 1
    ("vmpo", 2.0, 1.0, None, LOG2, 1.0),
    ("vmpo", 0.5, -3.0, None, -LOG2, 1.0),
    # A d - 0.05 d^2, A - 0.1 d
    ("dro", 2.0, 1.0, None, LOG2 - 0.05 * LOG2**2, 1 - 0.1 * LOG2),
    ("dro", 0.5, -1.0, None, LOG2 - 0.05 * LOG2**2, -1 + 0.1 * LOG2),
    # sg[M W A] log r; PPO's mask is 0 for (A > 0, r > 1.2) and (A < 0, r < 0.8)
    ("rec-oneside-is", 2.0, 1.0, None, 0.0, 0.0),
    ("rec-oneside-is", 2.0, -1.0, None, -2 * LOG2, -2.0),
    ("rec-oneside-nois", 0.5, 1.0, None, -LOG2, 1.0),
    ("rec-oneside-nois", 0.5, -1.0, None, 0.0, 0.0),
    ("rec-twoside", 1.1, 1.0, None, 1.1 * math.log(1.1), 1.1),
    ("rec-twoside", 2.0, -1.0, None, 0.0, 0.0),
    # the ring: also r <= 0.4 for A > 0 and r >= 3 for A < 0
    ("rec-ring", 0.25, 1.0, None, -0.25 * LOG4, 0.25),
    ("rec-ring", 4.0, 1.0, None, 0.0, 0.0),
    ("rec-ring", 4.0, -1.0, None, -4 * LOG4, -4.0),
    ("rec-ring", 2.0, -1.0, None, 0.0, 0.0),
    # A d - 0.1 d^2
    ("opmd-kimi", 2.0, 1.0, None, LOG2 - 0.1 * LOG2**2, 1 - 0.2 * LOG2),
    ("opmd-kimi", 0.5, -1.0, None, LOG2 - 0.1 * LOG2**2, -1 + 0.2 * LOG2),
    # A / (1 + 1)
    ("opmd-trinity", 2.0, 1.0, None, LOG2 / 2, 0.5),
    ("opmd-trinity", 0.5, -1.0, None, LOG2 / 2, -0.5),
    # A + 0.1
    ("asymre", 2.0, 1.0, None, 1.1 * LOG2, 1.1),
    ("asymre", 2.0, -1.0, None, -0.9 * LOG2, -0.9),
    # A e^A
    ("red-weight", 2.0, 1.0, None, math.e * LOG2, math.e),
    ("red-weight", 2.0, -1.0, None, -LOG2 / math.e, -1 / math.e),
    # clip(r, 0.5, 2) A
    ("two-sided-mask", 1.5, 1.0, None, 1.5, 1.5),
    ("two-sided-mask", 3.0, 1.0, None, 2.0, 0.0),
    ("two-sided-mask", 3.0, -1.0, None, -2.0, 0.0),
    # 1 for A > 0, min(r, 1) for A < 0
    ("topr-token", 0.5, 1.0, None, -LOG2, 1.0),
    ("topr-token", 0.5, -1.0, None, 0.5 * LOG2, -0.5),
    ("topr-token", 2.0, -1.0, None, -LOG2, -1.0),
    # clip(r, 0.8, 11) and clip(r, 0, 101)
    ("dispo", 0.5, 1.0, None, -0.8 * LOG2, 0.8),
    ("dispo", 16.0, 1.0, None, 44 * LOG2, 11.0),
    ("dispo", 0.5, -1.0, None, 0.5 * LOG2, -0.5),
    ("dispo", 128.0, -1.0, None, -707 * LOG2, -101.0),
    # psi = +-PSI, sech^2(d / 1.5) = 1 - tanh^2
    ("mhpo", 2.0, 1.0, None, math.exp(PSI - HAZARD), math.exp(PSI - HAZARD) * SECH2),
    (
        "mhpo",
        0.5,
        -1.0,
        None,
        -math.exp(-PSI - HAZARD_LOW),
        -math.exp(-PSI - HAZARD_LOW) * SECH2,
    ),
    ("mhpo", 1.0, 1.0, None, math.exp(-HAZARD_1), math.exp(-HAZARD_1)),
    (
        "mhpo-normalized",
        2.0,
        1.0,
        None,
        math.exp(PSI - HAZARD + HAZARD_1),
        math.exp(PSI - HAZARD + HAZARD_1) * SECH2,
    ),
    ("mhpo-normalized", 1.0, -2.0, None, -2.0, -2.0),
    # G'(1.2) = 0; A < 0 mirrors the ratio at 1: 2 - 0.8 = 1.2
    ("ano", 1.2, 1.0, None, ano(1.2), 0.0),
    ("ano", 2.0, 1.0, None, ano(2.0), 2 * ano_slope(2.0)),
    ("ano", 0.8, 1.0, None, ano(0.8), 0.8 * ano_slope(0.8)),
    ("ano", 0.8, -1.0, None, ano(1.2) - 2, 0.0),
    ("ano", 1.5, -1.0, None, ano(0.5) - 2, -1.5 * ano_slope(0.5)),
    # beyond 1.2: 1.3 * 1.2 - 0.3 r; below 0.8: 1.3 * 0.8 - 0.3 r
    ("ppo-rb", 2.0, 1.0, None, 0.96, -0.6),
    ("ppo-rb", 0.5, -1.0, None, -0.89, 0.15),
    ("ppo-rb", 2.0, -1.0, None, -2.0, -2.0),
    # r A, and no force outward where the KL is 0.035 or more
    ("tr-ppo", 2.0, 1.0, {"kl": 0.05}, 2.0, 0.0),
    ("tr-ppo", 2.0, 1.0, {"kl": 0.03}, 2.0, 2.0),
    ("tr-ppo", 2.0, -1.0, {"kl": 0.05}, -2.0, -2.0),
    ("tr-ppo", 0.5, -1.0, {"kl": 0.05}, -0.5, 0.0),
    # there minus 5 (r - 1 - log r), and 5 (r - 1)
    ("truly-ppo", 2.0, 1.0, {"kl": 0.05}, 2 - 5 * (1 - LOG2), -3.0),
    ("truly-ppo", 0.5, -1.0, {"kl": 0.05}, -0.5 - 5 * (LOG2 - 0.5), 2.0),
    ("truly-ppo", 2.0, -1.0, {"kl": 0.05}, -2.0, -2.0),
    # r A - 0.1 (|r - 1| - 1e-5)
    ("biris-token", 2.0, 1.0, None, 1.900001, 1.8),
    ("biris-token", 0.5, -1.0, None, -0.549999, -0.45),
    # target 1.3 above the median, 0.7 below, 1 at it: -|r - target| |A|
    ("bpo", 1.1, 1.0, None, -0.2, 1.1),
    ("bpo", 2.0, 1.0, None, -0.7, -2.0),
    ("bpo", 0.5, -1.0, None, -0.2, 0.5),
    ("bpo", 2.0, 3.0, {"median_advantage": 0.0}, -3.0, -6.0),
    ("gbpo", 1.1, 1.0, {"median_advantage": 0.01}, -0.2, 1.1),
    ("gbpo", 2.0, -1.0, {"median_advantage": -0.01}, -1.3, -2.0),
    # r A - 0.04 (r - 1)^2, r (A - 0.08 (r - 1))
    ("r2vpo", 2.0, 1.0, None, 1.96, 1.84),
    ("r2vpo", 2.0, -1.0, None, -2.04, -2.16),
    ("r2vpo", 0.5, 1.0, None, 0.49, 0.52),
    # at the start of the dual ascent: r A - (r - 1)^2, r (A - 2 (r - 1))
    ("r2vpo-dual-variant", 0.5, 1.0, None, 0.25, 1.0),
    ("r2vpo-dual-variant", 0.5, -1.0, None, -0.75, 0.0),
    # p = 0.6, q = p / r: 0.4 is 0.2 away, 0.5 is 0.1; p = 0.1, q = 0.4; p = 0.9, q = 0.03
    ("dppo-tv", 1.5, 1.0, {"log_prob": math.log(0.6)}, 0.0, 0.0),
    ("dppo-tv", 1.2, 1.0, {"log_prob": math.log(0.6)}, 1.2 * math.log(1.2), 1.2),
    ("dppo-tv", 0.25, -1.0, {"log_prob": math.log(0.1)}, 0.0, 0.0),
    ("dppo-tv", 30.0, -1.0, {"log_prob": math.log(0.9)}, -20 * math.log(30), -20.0),
    # KL = 0.2 log 1.5 = 0.081; p = 0.55, q = 0.5: 0.005
    ("dppo-kl", 1.5, 1.0, {"log_prob": math.log(0.6)}, 0.0, 0.0),
    ("dppo-kl", 1.5, -1.0, {"log_prob": math.log(0.6)}, -1.5 * math.log(1.5), -1.5),
    ("dppo-kl", 1.1, 1.0, {"log_prob": math.log(0.55)}, 1.1 * math.log(1.1), 1.1),
    # alone and with d^2 > 0.04: bounds 0.7 and 1.5
    ("m2po", 1.4, 1.0, None, 1.4, 1.4),
    ("m2po", 2.0, 1.0, None, 1.5, 0.0),
    ("m2po", 0.5, -1.0, None, -0.7, 0.0),
    ("m2po", 2.0, -1.0, None, -2.0, -2.0),
    # kept alone, or the only one and therefore kept: PPO
    ("sample-dropout", 1.1, 1.0, None, 1.1, 1.1),
    ("sample-dropout", 4.0, 1.0, None, 1.2, 0.0),
    ("sample-dropout", 0.5, -1.0, None, -0.8, 0.0),
    # A > 0 alone: `high` rises until it counts (1.55), at most to 3; A < 0 alone: the last, 0.9
    ("bapo", 1.52, 1.0, None, 1.52, 1.52),
    ("bapo", 4.0, 1.0, None, 3.0, 0.0),
    ("bapo", 0.85, -1.0, None, -0.9, 0.0),
    ("bapo", 2.0, -1.0, None, -2.0, -2.0),
    ("bapo", 4.0, -1.0, None, -3.0, 0.0),
    # clipped ones count: met at once for A > 0; the last `low`, 0.8, for A < 0
    ("bapo-published", 1.52, 1.0, None, 1.2, 0.0),
    ("bapo-published", 0.85, -1.0, None, -0.85, -0.85),
    ("bapo-published", 0.75, -1.0, None, -0.8, 0.0),
]
LIMITS = {
    "rgpo-signed": (0, 0, 0, 3),
    "rgpo-signed-kl": (0, 0, 0, 3),
    "rgpo-pullback": (0, -1, -1, 3),
    "mdpo": (0, INF, 0, INF),
    "awr": (math.e, math.e, -1 / math.e, -1 / math.e),
    "vmpo": (1, 1, -1, -1),
    "dro": (4, -2, -2, 4),  # linear in d, without bound; here at d = -+30
    "opmd-kimi": (7, -5, -5, 7),  # likewise
    "opmd-trinity": (0.5, 0.5, 0.5, 0.5),
    "asymre": (1.1, 1.1, 0.9, 0.9),
    "red-weight": (math.e, math.e, 1 / math.e, 1 / math.e),
    "rec-oneside-is": (0, 0, 0, INF),
    "rec-oneside-nois": (1, 0, 0, 1),
    "rec-ring": (0, 0, 0, INF),
    "topr-token": (1, 1, 0, 1),
    "dispo": (0.8, 11, 0, 101),
    "ano": (0, 0, 0, INF),
    "ppo-rb": (0, -INF, 0, INF),
    "tr-ppo": (0, INF, 0, INF),  # at a KL of 0
    "truly-ppo": (0, INF, 0, INF),  # at a KL of 0
    "biris-token": (0, INF, 0, INF),
    "bpo": (0, -INF, 0, INF),
    "gbpo": (0, -INF, 0, INF),
    "r2vpo": (0, -INF, 0, INF),
    "r2vpo-dual-variant": (0, -INF, 0, INF),
    "dppo-tv": (0, 0, 0, 20),
    "dppo-kl": (0, 0, 0, 20),
    "m2po": (0, 0, 0, INF),
    "sample-dropout": (0, 0, 0, INF),
}
