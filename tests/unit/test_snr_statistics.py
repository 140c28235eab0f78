"""SNR² by pass rate on synthetic gradients whose truth is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.snr_shape import TooFewBins, fit_exponents, is_bell
from recipe.snr_statistics import (
    LEFT_OUT,
    MIN_QUESTIONS_FOR_SPREAD,
    analyse,
    bin_edges,
    bin_questions,
    bootstrap_snr,
    resampled_snr,
    snr_parts,
    snr_squared,
)

MIDPOINTS = (np.arange(10) + 0.5) / 10


def gaussians(rng: np.random.Generator, n: int, dimensions: int, snr2: float, noise: float = 1.0) -> np.ndarray:
    """[n, D] gradients with tr Σ = noise, mean of squared norm snr2 * noise."""
    gradients = rng.standard_normal((n, dimensions)) * math.sqrt(noise / dimensions)
    gradients[:, 0] += math.sqrt(snr2 * noise)
    return gradients


def population(rng: np.random.Generator, n: int, dimensions: int, curve) -> tuple[np.ndarray, np.ndarray]:
    """n questions in the middle of each of ten bins, with SNR² = curve(p)."""
    gradients = [gaussians(rng, n, dimensions, curve(p)) for p in MIDPOINTS]
    return np.repeat(MIDPOINTS, n), np.concatenate(gradients)


def bell(p: float) -> float:
    return 0.3 * p**1.3 * (1 - p) ** 0.8


# ------------------------------------------------------------------------------------------------------------- bins


def test_bins_are_closed_on_the_left_and_the_last_one_on_both_sides() -> None:
    rates = np.array([0.0, 0.099, 0.1, 0.29, 0.3, 29 / 100, 0.999, 1.0, math.nan])
    assert bin_questions(rates, 10).tolist() == [0, 0, 1, 2, 3, 2, 9, 9, LEFT_OUT]
    assert bin_questions(np.arange(101) / 100, 100).tolist() == [*range(100), 99]
    assert bin_edges(4).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("samples", [1, 3, 8, 10])
def test_exact_bins_count_successes(samples: int) -> None:
    rates = torch.arange(samples + 1, dtype=torch.float32) / samples
    assert bin_questions(rates, "exact", samples=samples).tolist() == list(range(samples + 1))
    edges = bin_edges("exact", samples=samples)
    assert len(edges) == samples + 2 and (np.diff(edges) > 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=40), st.integers(1, 30))
def test_every_measured_question_lies_inside_its_bin(rates: list[float], bins: int) -> None:
    index = bin_questions(rates, bins)
    edges = bin_edges(bins)
    for rate, at in zip(rates, index.tolist(), strict=True):
        if math.isnan(rate):
            assert at == LEFT_OUT
        else:
            assert edges[at] - 1e-9 <= rate <= edges[at + 1] + 1e-9


@pytest.mark.parametrize(
    ("rates", "bins", "samples", "message"),
    [
        ([0.5, 1.2], 10, None, "question 1 has 1.2"),
        ([[0.5]], 10, None, r"\[P\]"),
        ([0.5], 0, None, "bins must be"),
        ([0.5], 2.5, None, "bins must be"),
        ([0.5], "three", None, "exact"),
        ([0.5], "exact", None, "samples"),
        ([0.5], "exact", 0, "samples must be"),
        ([0.5, 3 / 7], "exact", 8, r"question 1 .* no multiple of 1/8 \(1 such"),
    ],
)
def test_bad_bins_are_refused(rates, bins, samples, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bin_questions(rates, bins, samples=samples)


# -------------------------------------------------------------------------------------------------------------- SNR²


def test_snr_equals_the_definition_with_the_whole_covariance() -> None:
    gradients = gaussians(np.random.default_rng(0), 40, 6, 0.4) * 1e-3
    trace = float(np.trace(np.cov(gradients, rowvar=False)))
    mean = gradients.mean(axis=0)
    parts = snr_parts(gradients)
    assert parts.noise == pytest.approx(trace, rel=1e-12)
    assert parts.signal == pytest.approx(mean @ mean - trace / 40, rel=1e-12)
    assert parts.snr2 == snr_squared(gradients) == pytest.approx(parts.signal / trace, rel=1e-12)
    assert parts.n == 40


@pytest.mark.parametrize("snr2", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_signal_estimate_is_unbiased(snr2: float, n: int) -> None:
    rng = np.random.default_rng(1)
    found = [snr_parts(gaussians(rng, n, 12, snr2, noise=4.0)) for _ in range(1500)]
    for values, truth in (([one.signal for one in found], 4 * snr2), ([one.noise for one in found], 4.0)):
        assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / math.sqrt(len(values)))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 9), st.floats(1e-6, 1e6), st.integers(0, 2**32 - 1))
def test_snr_does_not_depend_on_order_rotation_or_scale(n: int, dimensions: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = gaussians(rng, n, dimensions, 0.5)
    expected = snr_parts(gradients)
    rotation, _ = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))
    for other in (gradients[rng.permutation(n)], gradients @ rotation):
        assert snr_parts(other).signal == pytest.approx(expected.signal, abs=1e-9 * expected.noise)
        assert snr_parts(other).noise == pytest.approx(expected.noise, rel=1e-9)
    assert snr_squared(gradients * scale) == pytest.approx(expected.snr2, rel=1e-6, abs=1e-9)


def test_torch_and_numpy_of_any_precision_agree() -> None:
    gradients = gaussians(np.random.default_rng(2), 30, 8, 0.5)
    assert snr_squared(torch.from_numpy(gradients).requires_grad_()) == snr_squared(gradients)
    assert snr_squared(torch.from_numpy(gradients).float()) == pytest.approx(snr_squared(gradients), rel=1e-5)
    assert snr_squared(torch.from_numpy(gradients).bfloat16()) == pytest.approx(snr_squared(gradients), rel=0.05)


def test_bins_that_say_nothing_are_nan_and_equal_gradients_infinite() -> None:
    assert math.isnan(snr_squared(np.zeros((0, 3)))) and math.isnan(snr_squared(np.ones((1, 3))))
    assert math.isnan(snr_squared(np.zeros((4, 3))))
    assert snr_squared(np.ones((4, 3))) == math.inf
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert snr_squared(opposite) == 0.0 and snr_parts(opposite).signal < 0


@pytest.mark.parametrize(
    ("gradients", "message"), [([1.0, 2.0], r"\[N, D\]"), ([[1.0], [math.nan], [math.inf]], r"gradient 1 .*\(2 such")]
)
def test_bad_gradients_are_refused(gradients, message: str) -> None:
    for function in (snr_parts, bootstrap_snr):
        with pytest.raises(ValueError, match=message):
            function(np.asarray(gradients))


# -------------------------------------------------------------------------------------------------------- bootstrap


def test_resamples_equal_the_mean_over_pairs_of_different_questions() -> None:
    gradients = gaussians(np.random.default_rng(3), 7, 4, 0.8)
    replicates = resampled_snr(gradients, resamples=20, seed=5)
    counts = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=20)
    for row, value in zip(counts, replicates, strict=True):
        drawn = np.repeat(np.arange(7), row)
        pairs = [(i, j) for i in drawn for j in drawn if i != j]
        signal = np.mean([gradients[i] @ gradients[j] for i, j in pairs])
        noise = np.mean([np.sum((gradients[i] - gradients[j]) ** 2) / 2 for i, j in pairs])
        assert value == pytest.approx(signal / noise, rel=1e-10)


def test_resampling_does_not_shift_the_estimate_although_questions_repeat() -> None:
    # High dimension: a pair of a question with itself would add tr S / n, here many times the spread.
    gradients = gaussians(np.random.default_rng(4), 40, 800, 0.05)
    replicates = resampled_snr(gradients, resamples=2000, seed=0)
    spread = replicates.std()
    assert abs(replicates.mean() - snr_squared(gradients)) < 0.15 * spread
    assert 1 / 40 > 5 * spread  # the shift that repeated questions would cause


@pytest.mark.parametrize(
    ("n", "dimensions", "snr2", "lowest", "highest"),
    [
        (100, 20, 0.3, 0.85, 1.25),
        (100, 400, 0.1, 0.8, 1.3),
        (30, 100, 0.5, 0.8, 1.35),
        # No signal: a degenerate U-statistic, whose resampled spread is sqrt(3) too large.
        (100, 20, 0.0, 1.3, 2.1),
    ],
)
def test_the_standard_error_is_the_spread_over_repeated_data(n, dimensions, snr2, lowest, highest) -> None:
    rng = np.random.default_rng(6)
    data = [gaussians(rng, n, dimensions, snr2) for _ in range(250)]
    parts = [snr_parts(one) for one in data]
    spread = np.std([one.signal / one.noise for one in parts])
    errors = [bootstrap_snr(one, resamples=200).se for one in data[:60]]
    assert lowest < np.mean(errors) / spread < highest


@pytest.mark.parametrize(("n", "dimensions", "snr2"), [(60, 30, 0.2), (30, 200, 0.5), (60, 30, 0.0)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(n: int, dimensions: int, snr2: float) -> None:
    rng = np.random.default_rng(7)
    spreads = [bootstrap_snr(gaussians(rng, n, dimensions, snr2), resamples=300) for _ in range(200)]
    covered = np.mean([one.low <= snr2 <= one.high for one in spreads])
    assert covered >= 0.88  # of 0.95; more than that is expected without signal
    assert all(0 <= one.low <= one.high for one in spreads)


def test_the_bootstrap_is_repeatable_and_nearly_free_of_the_order() -> None:
    rng = np.random.default_rng(8)
    gradients = gaussians(rng, 50, 10, 0.3)
    assert bootstrap_snr(gradients, seed=3) == bootstrap_snr(gradients, seed=3)
    assert bootstrap_snr(gradients, seed=3) != bootstrap_snr(gradients, seed=4)
    shuffled = bootstrap_snr(gradients[rng.permutation(50)], seed=3)
    assert shuffled.se == pytest.approx(bootstrap_snr(gradients, seed=3).se, rel=0.15)


def test_too_few_questions_have_no_spread() -> None:
    few = gaussians(np.random.default_rng(9), MIN_QUESTIONS_FOR_SPREAD - 1, 4, 1.0)
    for gradients in (few, np.ones((10, 3)), np.zeros((10, 3)), np.zeros((0, 3))):
        spread = bootstrap_snr(gradients)
        assert math.isnan(spread.se) and math.isnan(spread.low) and math.isnan(spread.high)
    enough = gaussians(np.random.default_rng(9), MIN_QUESTIONS_FOR_SPREAD, 4, 1.0)
    assert bootstrap_snr(enough).se > 0


@pytest.mark.parametrize(("options", "name"), [({"resamples": 1}, "resamples"), ({"confidence": 1.0}, "confidence")])
def test_bad_settings_of_the_bootstrap_are_refused(options, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        bootstrap_snr(np.ones((10, 2)), **options)


# -------------------------------------------------------------------------------------------------------- exponents


@settings(max_examples=40, deadline=None)
@given(st.floats(-1, 3), st.floats(-1, 3), st.floats(1e-3, 1e3), st.integers(3, 12), st.randoms(use_true_random=False))
def test_exact_values_give_exact_exponents(alpha, beta, scale, bins, random) -> None:
    centres = (np.arange(bins) + 0.5) / bins
    values = scale * centres**alpha * (1 - centres) ** beta
    variances = values**2 * np.array([0.01 + random.random() for _ in centres])
    order = random.sample(range(bins), bins)
    fit = fit_exponents(centres[order], values[order], variances[order])
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=1e-7)
    assert fit.scale == pytest.approx(scale, rel=1e-6)
    assert (fit.bins_used, fit.bins_left_out) == (bins, 0)


@pytest.mark.parametrize("seed", range(4))
def test_exponents_of_synthetic_gradients_are_found(seed: int) -> None:
    report = analyse(*population(np.random.default_rng(seed), 300, 60, bell), resamples=200)
    assert report.fit.alpha == pytest.approx(1.3, abs=0.5)
    assert report.fit.beta == pytest.approx(0.8, abs=0.5)
    assert report.fit.r_squared > 0.9 and report.fit.bins_used == 10
    assert abs(report.fit.alpha - 1.3) < 4 * report.fit.alpha_se
    assert report.verdict.kind == "bell" and 0.4 < report.verdict.peak < 0.8


def test_standard_errors_describe_the_scatter_of_the_exponents() -> None:
    rng = np.random.default_rng(10)
    values = 0.1 * MIDPOINTS**1.3 * (1 - MIDPOINTS) ** 0.8
    relative = 0.1
    fits = [
        fit_exponents(MIDPOINTS, values * np.exp(relative * rng.standard_normal(10)), (relative * values) ** 2)
        for _ in range(400)
    ]
    for name in ("alpha", "beta", "scale"):
        scatter = np.std([getattr(fit, name) for fit in fits])
        assert 0.85 < np.mean([getattr(fit, f"{name}_se") for fit in fits]) / scatter < 1.35
    assert np.mean([fit.reduced_chi2 for fit in fits]) == pytest.approx(1, abs=0.2)


def test_a_misfit_larger_than_the_errors_widens_them() -> None:
    values = 0.1 * MIDPOINTS * (1 - MIDPOINTS)
    bent = values * np.where(np.arange(10) % 2, 1.5, 1 / 1.5)
    narrow, wide = (fit_exponents(MIDPOINTS, one, (0.01 * values) ** 2) for one in (values, bent))
    assert wide.reduced_chi2 > 100 and wide.alpha_se > 10 * narrow.alpha_se


def test_bins_that_cannot_be_used_are_left_out_and_counted() -> None:
    centres = np.array([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0])
    values = 2.0 * centres**1.0 * (1 - centres) ** 2.0
    variances = np.full(8, 1e-4)
    values[[0, 7]] = 0.01
    values[2], values[3], variances[6] = 0.0, math.nan, math.nan
    fit = fit_exponents(centres, values, variances)
    assert (fit.bins_used, fit.bins_left_out) == (3, 5)
    assert (fit.alpha, fit.beta, fit.scale) == pytest.approx((1.0, 2.0, 2.0), abs=1e-9)
    assert math.isnan(fit.alpha_se) and math.isnan(fit.r_squared) and math.isnan(fit.reduced_chi2)
    assert "no estimate of the error" in str(fit)


def test_shrunken_rates_keep_the_end_bins() -> None:
    centres = np.arange(9) / 8
    shrunken = (8 * centres + 0.5) / 9
    values = 0.3 * shrunken**1.2 * (1 - shrunken) ** 0.7
    fit = fit_exponents(centres, values, values**2, edges="shrink", samples=8)
    assert (fit.alpha, fit.beta, fit.bins_used) == pytest.approx((1.2, 0.7, 9), abs=1e-9)
    assert fit_exponents(centres, values, values**2).bins_used == 7


def test_two_bins_are_refused_with_what_is_missing() -> None:
    with pytest.raises(
        TooFewBins,
        match=r"at least 3 bins.*found 2 of 5 \(no signal or not measured: 1, no standard error: 1, at 0 or 1: 1",
    ):
        fit_exponents([0.0, 0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, math.nan])
    with pytest.raises(TooFewBins, match="found 1 of 4"):
        fit_exponents([0.5] * 4, [1.0] * 4, [1.0] * 4)


@pytest.mark.parametrize(
    ("centres", "options", "message"),
    [
        ([0.1, 0.5], {}, "one shape"),
        ([0.1, 0.5, 1.5], {}, r"\[0, 1\]"),
        ([0.1, 0.5, math.nan], {}, r"\[0, 1\]"),
        ([0.1, 0.5, 0.9], {"edges": "clip"}, "exclude"),
        ([0.1, 0.5, 0.9], {"edges": "shrink"}, "samples"),
        ([0.1, 0.5, 0.9], {"edges": "shrink", "samples": 0}, "samples"),
    ],
)
def test_bad_input_of_the_fit_is_refused(centres, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_exponents(centres, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], **options)


# ------------------------------------------------------------------------------------------------------- is it a bell


def test_a_clear_bell_is_one_in_any_order_of_the_bins() -> None:
    values, order = MIDPOINTS * (1 - MIDPOINTS), np.random.default_rng(0).permutation(10)
    verdict = is_bell(MIDPOINTS, values, np.full(10, 0.01))
    assert verdict.kind == "bell" and verdict.peak == pytest.approx(0.45)
    assert verdict.sentence.startswith("a bell: summit at p=0.45, above p=0.05 by 14.1 ")
    shuffled = is_bell(MIDPOINTS[order], values[order], np.full(10, 0.01))
    assert shuffled.kind == "bell" and shuffled.peak in (0.45, 0.55)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1, 2, 3, 4, 5], "no bell: highest at p=0.9, an end of the measured range"),
        ([5, 4, 3, 2, 1], "no bell: highest at p=0.1, an end"),
        ([3, 3.1, 3, 2.9, 3], "no bell: highest at p=0.3, but only 0.7 standard errors above p="),
        ([0, 3, 3.1, 3, 2.9], r"no bell: highest at p=0.5, but only 1.4 standard errors above p=0.9 \(2.1 needed\)"),
        ([1, 5, 1, 5, 1], "no bell: SNR² rises more than once, with summits at p=0.3 and p=0.7 and less at p=0.5"),
        ([5, 3, 1, 3, 5], "no bell: highest at p=0.1, an end"),
    ],
)
def test_what_is_no_bell_is_said_with_its_reason(values: list[float], sentence: str) -> None:
    verdict = is_bell([0.1, 0.3, 0.5, 0.7, 0.9], values, [0.1] * 5)
    assert verdict.kind == "no bell" and verdict.peak is None
    assert verdict.sentence.startswith(sentence.replace("\\", ""))


def test_small_dents_do_not_spoil_a_bell() -> None:
    verdict = is_bell([0.1, 0.3, 0.5, 0.7, 0.9], [0, 3, 2.9, 3.1, 1], [0.1] * 5)
    assert (verdict.kind, verdict.peak) == ("bell", 0.7)


def test_a_flat_curve_is_rarely_called_a_bell() -> None:
    rng = np.random.default_rng(11)
    normal = [is_bell(MIDPOINTS, 5 + rng.standard_normal(10), np.ones(10)).kind for _ in range(1000)]
    assert normal.count("bell") <= 50
    # The same from gradients, few a bin, whose errors are themselves estimates.
    found = [
        analyse(*population(np.random.default_rng(seed), 12, 20, lambda p: 0.1), resamples=100).verdict.kind
        for seed in range(60)
    ]
    assert found.count("bell") <= 3 and found.count("no bell") >= 57


def test_fewer_than_three_measured_bins_leave_it_undecided() -> None:
    verdict = is_bell([0.1, 0.3, 0.5, 0.7], [1.0, 2.0, math.nan, 1.0], [0.1, 0.1, 0.1, math.nan])
    assert verdict.kind == "undecided" and "2 of 4 bins" in verdict.sentence
    assert is_bell([], [], []).kind == "undecided"


def test_bad_input_of_the_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        is_bell([0.5], [1.0], [1.0], level=0)
    with pytest.raises(ValueError, match="one shape"):
        is_bell([0.5], [1.0, 2.0], [1.0])


# --------------------------------------------------------------------------------------------------------- the whole


def test_the_report_holds_every_bin_and_is_strict_json() -> None:
    rates, gradients = population(np.random.default_rng(12), 20, 16, bell)
    keep = rates != MIDPOINTS[3]
    rates, gradients = np.append(rates[keep], math.nan), np.append(gradients[keep], np.zeros((1, 16)), axis=0)
    report = analyse(rates, torch.from_numpy(gradients).float(), resamples=50, about={"step": 20})
    assert [one.n for one in report.bins] == [20, 20, 20, 0, 20, 20, 20, 20, 20, 20]
    assert report.settings["questions"] == 180 and report.settings["unmeasured"] == 1
    assert report.settings["step"] == 20 and report.settings["dimensions"] == 16
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["bins"][3]["snr2"] is None and plain["bins"][3]["centre"] == pytest.approx(0.35)
    assert plain["bins"][4]["snr2"] == report.bins[4].snr2
    assert plain["fit"]["alpha"] == report.fit.alpha and plain["verdict"]["kind"] == report.verdict.kind


def test_a_bin_does_not_depend_on_the_order_of_questions_or_on_other_bins() -> None:
    rng = np.random.default_rng(13)
    rates, gradients = population(rng, 20, 16, bell)
    whole = analyse(rates, gradients, resamples=50)
    order = rng.permutation(len(rates))
    shuffled = analyse(rates[order], gradients[order], resamples=50)
    for one, other in zip(whole.bins, shuffled.bins, strict=True):
        assert (one.n, one.centre) == (other.n, pytest.approx(other.centre))
        assert (one.signal, one.noise) == pytest.approx((other.signal, other.noise), rel=1e-9)
    alone = analyse(rates[rates == MIDPOINTS[4]], gradients[rates == MIDPOINTS[4]], resamples=50)
    assert alone.bins[4] == whole.bins[4]


def test_the_centre_of_a_bin_is_the_mean_rate_or_the_midpoint() -> None:
    gradients = np.random.default_rng(14).standard_normal((6, 4))
    rates = [0.0, 0.0, 0.125, 0.75, 1.0, 1.0]
    for bins, centre, samples, expected in (
        (2, "mean", None, [0.125 / 3, 2.75 / 3]),
        (2, "midpoint", None, [0.25, 0.75]),
        ("exact", "mean", 8, [k / 8 for k in range(9)]),
    ):
        report = analyse(rates, gradients, bins=bins, centre=centre, samples=samples, resamples=10)
        assert [one.centre for one in report.bins] == pytest.approx(expected)


def test_too_little_data_for_a_fit_is_a_finding_but_bad_settings_are_refused() -> None:
    report = analyse([0.2, 0.4], np.ones((2, 3)))
    assert report.fit is None and "found 0 of 10" in report.no_fit and report.verdict.kind == "undecided"
    assert analyse([], np.zeros((0, 3))).verdict.kind == "undecided"
    for options, message in (
        ({"edges": "shrink"}, "samples"),
        ({"edges": "clip"}, "edges"),
        ({"centre": "median"}, "centre"),
        ({"level": 2.0}, "level"),
    ):
        with pytest.raises(ValueError, match=message):
            analyse([0.2, 0.4], np.ones((2, 3)), **options)
    with pytest.raises(ValueError, match="3 pass rates for 2 gradients"):
        analyse([0.2, 0.4, 0.6], np.ones((2, 3)))
