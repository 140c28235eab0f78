"""Synthetic gradients with a known signal-to-noise ratio, to show PACED's bell and what measuring it does to it."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from recipe.snr_statistics import SnrReport, analyse
from verl_ext.weighting import beta_kernel

QUESTIONS: Final = 2000
DIMENSIONS: Final = 24
RESAMPLES: Final = 60


def bell_report(
    alpha: float, beta: float, *, level: float = 0.5, samples: int | None = None, seed: int = 0
) -> SnrReport:
    """The SNR analysis of gradients drawn from PACED's form, SNR²(p) = level · p^alpha (1-p)^beta over its maximum.

    A question's pass rate is uniform on (0, 1) and its gradient normal, with a common direction of squared length
    SNR²(p) and noise of total variance 1.

    Args:
        level: SNR² at the summit.
        samples: the analysis sees pass rates from so many rollouts (PACED: K = 10); None: the true ones.
    """
    rng = np.random.default_rng(seed)
    rates_P = rng.uniform(size=QUESTIONS)
    gradients_PD = rng.standard_normal((QUESTIONS, DIMENSIONS)) / np.sqrt(DIMENSIONS)
    summit = torch.tensor([alpha / (alpha + beta)], dtype=torch.float64)
    scale = level / float(beta_kernel(summit, alpha=alpha, beta=beta))
    snr2_P = scale * beta_kernel(torch.from_numpy(rates_P), alpha=alpha, beta=beta).numpy()
    gradients_PD[:, 0] += np.sqrt(snr2_P)
    seen_P = rates_P if samples is None else rng.binomial(samples, rates_P) / samples
    return analyse(seen_P, gradients_PD, bins=10, samples=samples, resamples=RESAMPLES, seed=seed)
