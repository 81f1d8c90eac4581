"""The true reward of the embedded experiment: positivity with a fluency floor.

    gold(x, y) = compound(y)   where log pi_ref(y | x) / |y| >= floor, and y is not empty
               = -1            elsewhere

compound is vaderSentiment's score in [-1, 1] of the answer's words (Hutto and Gilbert 2014), pi_ref
the policy before RL, |y| its tokens with the end, and floor the 5% quantile of the left side over
pi_ref's own answers: praise counts only in sentences that the model itself would have said. It
labels the preference pairs (the synthetic set-up of Gao et al., arXiv 2210.10760); the policy
never sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from rgpo.errors import RgpoError
from rgpo.language.sample import Policy, Sample

QUANTILE = 0.05


@dataclass
class Gold:
    """The scorer, with the reference policy that judges fluency."""

    reference: Policy
    floor: float

    @classmethod
    def calibrated(cls, reference: Policy, samples: Sequence[Sample]) -> Self:
        """With the floor that the reference's own answers set."""
        means = torch.tensor([float(row.mean()) for row in reference.log_probs(samples)])
        return cls(reference, float(means.quantile(QUANTILE)))

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """One score in [-1, 1] per answer."""
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise RgpoError('the gold scorer needs `pip install "rgpo[language]"`') from None
        analyzer = SentimentIntensityAnalyzer()
        fluent = [float(row.mean()) >= self.floor for row in self.reference.log_probs(samples)]
        return [
            analyzer.polarity_scores(s.text)["compound"] if ok and s.text.strip() else -1.0
            for s, ok in zip(samples, fluent, strict=True)
        ]
