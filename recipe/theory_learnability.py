"""What one step of KL-regularised learning could gain, by pass rate (SC-SDPO, arXiv 2605.27765).

With a reward r and a temperature b the best policy under E[r] - b KL(π || π₀) is π* ∝ π₀ e^{r/b}. SC-SDPO's argument:
KL(π₀ || π*), to leading order Var(r) / (2 b²), is p(1-p) / (2 b²) for outcomes and the same for every question once
rewards are normalised. The expansions are our reconstruction; b has the unit of the reward, divergences are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from verl_ext.preference import reweighted_target


@dataclass(frozen=True)
class Learnability:
    """Of a question with a given pass rate.

    Attributes:
        divergence: KL(π₀ || π*).
        gain: pass rate of π* minus that of π₀.
    """

    divergence: float
    gain: float


def learnability(successes: int, size: int, b: float, *, normalised: bool) -> Learnability:
    """Exact values at p = successes / size.

    Args:
        successes: from 1 to size - 1.
        b: temperature, above 0.
        normalised: reward (r - p) / √(p(1-p)) in place of the outcome r.

    Raises:
        ValueError: another number of successes, or a temperature that is not above 0.
    """
    if not 0 < successes < size:
        raise ValueError(f"successes must lie between 1 and {size - 1}, found {successes}")
    outcomes_N = (torch.arange(size) < successes).to(torch.float64)
    deviation = math.sqrt(successes / size * (1 - successes / size)) if normalised else 1.0
    target = reweighted_target((outcomes_N - successes / size) / deviation, beta=b)
    # KL(π₀ || π*) = log E e^{r/b} - E r / b; both rewards have mean 0 here.
    return Learnability(
        (target["objective"] - target["teacher"]) / b, (target["reward"] - target["teacher"]) * deviation
    )


def leading_order(rate: float, b: float, *, normalised: bool) -> Learnability:
    """The first term in 1/b: p(1-p) / (2 b²) and p(1-p) / b; normalised 1 / (2 b²) and √(p(1-p)) / b."""
    variance = rate * (1 - rate)
    if normalised:
        return Learnability(1 / (2 * b * b), math.sqrt(variance) / b)
    return Learnability(variance / (2 * b * b), variance / b)
