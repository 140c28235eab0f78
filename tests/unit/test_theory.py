"""The theory figures: every quantity against enumeration, explicit distributions or finite differences in numpy."""

from __future__ import annotations

import itertools
import math
import pkgutil
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from recipe.theory import main
from recipe.theory_figures import FIGURES
from recipe.theory_gradients import (
    SMOOTHING,
    distillation_norms,
    expected_weights,
    policy_gradient_norms,
    success_probabilities,
)
from recipe.theory_learnability import leading_order, learnability
from recipe.theory_snr import bell_report

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "theory.md"
RIGHT = np.array([0.5, 0.3, 0.2, 0, 0, 0, 0])
WRONG = np.array([0, 0, 0, 0.4, 0.3, 0.2, 0.1])
DELTA = float(np.linalg.norm(RIGHT - WRONG))
SOME_RATES = (0.02, 0.3, 0.5, 0.9)


def tensor(*rates: float) -> torch.Tensor:
    return torch.tensor(rates, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- gradient norms


def advantages(outcomes: np.ndarray, estimator: str) -> np.ndarray:
    if estimator == "reinforce":
        return outcomes
    centred = outcomes - outcomes.mean()
    return centred / (outcomes.std(ddof=1) + 1e-6) if estimator == "grpo" else centred


def gradient_norm_by_enumeration(p: float, size: int, estimator: str) -> float:
    """Over every sequence of answers that a group can give."""
    probabilities = p * RIGHT + (1 - p) * WRONG
    total = np.zeros(len(RIGHT))
    for answers in itertools.product(range(len(RIGHT)), repeat=size):
        scores = np.eye(len(RIGHT))[list(answers)] - probabilities
        factors = advantages((RIGHT[list(answers)] > 0).astype(float), estimator)
        total += np.prod(probabilities[list(answers)]) * (factors @ scores) / size
    return float(np.linalg.norm(total)) / DELTA


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("estimator", ["reinforce", "grpo_without_std", "grpo"])
def test_the_expected_gradient_is_that_of_all_possible_groups(estimator: str, size: int) -> None:
    found = policy_gradient_norms(tensor(0.07, 0.6), size, estimator)
    expected = [gradient_norm_by_enumeration(p, size, estimator) for p in (0.07, 0.6)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("size", [2, 8, 16])
def test_without_a_deviation_the_law_is_p_times_one_minus_p(size: int) -> None:
    law = tensor(*(p * (1 - p) for p in SOME_RATES))
    torch.testing.assert_close(policy_gradient_norms(tensor(*SOME_RATES), size, "reinforce"), law, rtol=1e-12, atol=0)
    found = policy_gradient_norms(tensor(*SOME_RATES), size, "grpo_without_std")
    torch.testing.assert_close(found, (1 - 1 / size) * law, rtol=1e-12, atol=0)


def test_with_the_deviation_the_law_is_the_square_root_which_large_groups_approach() -> None:
    for size in (2, 8, 16):
        found = policy_gradient_norms(tensor(*SOME_RATES), size, "grpo")
        # verl divides by the sample's standard deviation plus 1e-6; without that it is SC-SDPO's mean weight.
        weights = expected_weights(tensor(*SOME_RATES), size, 0.5) * math.sqrt((size - 1) / size)
        torch.testing.assert_close(found, weights, rtol=1e-5, atol=0)
    misses = [1 - float(policy_gradient_norms(tensor(0.3), size, "grpo")) / math.sqrt(0.21) for size in (8, 16, 32, 64)]
    assert all(0 < later < 0.6 * earlier for earlier, later in itertools.pairwise(misses)) and misses[-1] < 0.02


def divergence(kind: str, logits: np.ndarray, teacher: np.ndarray) -> float:
    s = np.exp(logits - np.logaddexp.reduce(logits))
    mixture = (s + teacher) / 2
    return {
        "forward_kl": np.sum(teacher * np.log(teacher / s)),
        "reverse_kl": np.sum(s * np.log(s / teacher)),
        "jsd": (np.sum(s * np.log(s / mixture)) + np.sum(teacher * np.log(teacher / mixture))) / 2,
    }[kind]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_distillation_gradient_is_the_slope_of_the_divergence(kind: str) -> None:
    for p in SOME_RATES:
        probabilities = p * RIGHT + (1 - p) * WRONG
        teacher = (1 - SMOOTHING) * RIGHT + SMOOTHING * probabilities
        steps = 1e-5 * np.eye(len(RIGHT))
        logits = np.log(probabilities)
        slopes = [
            (divergence(kind, logits + step, teacher) - divergence(kind, logits - step, teacher)) / 2e-5
            for step in steps
        ]
        expected = float(np.linalg.norm(slopes)) / DELTA
        assert float(distillation_norms(tensor(p), kind)) == pytest.approx(expected, rel=1e-6)
        weighted = float(distillation_norms(tensor(p), kind, exponent=0.5))
        assert weighted == pytest.approx(math.sqrt(p * (1 - p)) * expected, rel=1e-6)


def test_sdpo_s_forward_kl_pulls_hardest_on_the_hardest_questions() -> None:
    rates = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    found = distillation_norms(rates, "forward_kl")
    torch.testing.assert_close(found, (1 - SMOOTHING) * (1 - rates), rtol=1e-9, atol=0)


# -------------------------------------------------------------------------------------------------------- weight bias


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_mean_weight_is_the_sum_over_successes(size: int) -> None:
    for p, exponent in itertools.product(SOME_RATES, (0.5, 1.0)):
        chances = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
        np.testing.assert_allclose(success_probabilities(tensor(p), size)[0], chances, rtol=1e-10)
        weights = [(k / size * (1 - k / size)) ** exponent for k in range(size + 1)]
        expected = math.fsum(a * b for a, b in zip(chances, weights, strict=True))
        found = float(expected_weights(tensor(p), size, exponent))
        assert found == pytest.approx(expected, rel=1e-10)
        if exponent == 1:
            assert found == pytest.approx((1 - 1 / size) * p * (1 - p), rel=1e-10)


@pytest.mark.parametrize(("p", "expected"), [(0.02, 0.0504), (0.1, 0.2095), (0.5, 0.4639)])
def test_the_mean_weight_of_eight_rollouts_has_the_known_values(p: float, expected: float) -> None:
    assert float(expected_weights(tensor(p), 8, 0.5)) == pytest.approx(expected, abs=5e-5)


# ------------------------------------------------------------------------------------------------------- learnability


def by_explicit_policies(p: float, b: float, normalised: bool) -> tuple[float, float]:
    """KL(π₀ || π*) and the gain from the two distributions over answers themselves."""
    start = p * RIGHT + (1 - p) * WRONG
    reward = (RIGHT > 0).astype(float)
    if normalised:
        reward = (reward - p) / math.sqrt(p * (1 - p))
    best = start * np.exp(reward / b)
    best /= best.sum()
    return float(np.sum(start * np.log(start / best))), float(best[RIGHT > 0].sum() - p)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("b", [0.3, 1.0, 7.0])
def test_learnability_is_that_of_the_regularised_optimum(b: float, normalised: bool) -> None:
    for successes in (1, 30, 50, 97):
        found = learnability(successes, 100, b, normalised=normalised)
        expected = by_explicit_policies(successes / 100, b, normalised)
        assert (found.divergence, found.gain) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_expansions_are_what_remains_at_a_large_temperature(normalised: bool) -> None:
    for successes in (5, 25, 50, 75, 95):
        misses = []
        for b in (50.0, 100.0):
            exact, law = (
                learnability(successes, 100, b, normalised=normalised),
                leading_order(successes / 100, b, normalised=normalised),
            )
            misses.append([exact.divergence / law.divergence - 1, exact.gain / law.gain - 1])
        assert np.abs(misses[0]).max() < 0.09
        # The next term has one more power of 1/b; at p = 1/2 the odd ones vanish.
        assert (np.abs(misses[1]) < 0.55 * np.abs(misses[0])).all()


def test_to_leading_order_only_the_square_root_is_left_of_a_normalised_reward() -> None:
    laws = [leading_order(p, 3.0, normalised=True) for p in SOME_RATES]
    assert {law.divergence for law in laws} == {1 / 18}
    assert [law.gain for law in laws] == pytest.approx([math.sqrt(p * (1 - p)) / 3 for p in SOME_RATES])


def test_the_leading_order_is_no_lower_bound() -> None:
    exact = learnability(9, 10, 1.0, normalised=False).divergence
    assert exact == pytest.approx(0.034702, abs=1e-6)
    assert exact < leading_order(0.9, 1.0, normalised=False).divergence == pytest.approx(0.045)


@pytest.mark.parametrize("successes", [0, 100])
def test_a_question_without_both_outcomes_has_no_learnability(successes: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 99"):
        learnability(successes, 100, 1.0, normalised=True)


# ----------------------------------------------------------------------------------------------------------- SNR bell


def test_the_bell_is_found_again_and_few_rollouts_flatten_it() -> None:
    known, measured = bell_report(1.3, 0.8), bell_report(1.3, 0.8, samples=10)
    assert known.verdict.kind == measured.verdict.kind == "bell"
    assert abs(known.fit.alpha - 1.3) < 3 * known.fit.alpha_se and abs(known.fit.beta - 0.8) < 3 * known.fit.beta_se
    assert measured.fit.alpha < known.fit.alpha - 0.2 and measured.fit.beta < known.fit.beta - 0.2
    summit = max(known.bins, key=lambda one: one.snr2)
    assert summit.snr2 == pytest.approx(0.5, abs=0.1)


# ------------------------------------------------------------------------------------------------ figures and command

NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_committed_figures_are_what_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--output", str(tmp_path / "figures")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "figures" / f"{name}.svg") for name in FIGURES]
    committed = sorted(path.name for path in (ROOT / "docs" / "theory").iterdir())
    assert committed == sorted(f"{name}.svg" for name in FIGURES)
    for name in committed:
        ours = (tmp_path / "figures" / name).read_text(encoding="utf-8")
        theirs = (ROOT / "docs" / "theory" / name).read_text(encoding="utf-8")
        assert NUMBER.sub("#", ours) == NUMBER.sub("#", theirs), name
        # Coordinates are in tenths of a pixel; another processor may round one the other way.
        pairs = zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True)
        assert max(abs(float(one) - float(two)) for one, two in pairs) < 0.11, name
        assert ElementTree.fromstring(ours).get("aria-label")


def test_the_page_names_every_figure_and_functions_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"\(theory/(\w+)\.svg\)", page)) == set(FIGURES)
    names = re.findall(r"`((?:verl_ext|recipe)\.[\w.]+)`", page)
    assert len(names) > 10
    for name in names:
        assert pkgutil.resolve_name(name) is not None
    for name, function in FIGURES.items():
        assert f"`recipe.theory_figures.{function.__name__}`" in page, name


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    assert main(["--output", str(taken)]) == 2
    assert f"--output {taken} cannot be written" in capsys.readouterr().err
