"""Metrics from the statistics of the distilled rows: joined over mini-batches, by outcome and by pass rate."""

from __future__ import annotations

import math

import numpy as np
import pytest

from verl_ext.loss import ROW_STATISTICS
from verl_ext.row_metrics import MEANS, PASS_RATE_BINS, row_metrics, take_row_statistics, take_token_divergences

NAMES = ("gap", "divergence", "top_share", "teacher_entropy", "student_nll", "student_mass", "teacher_mass")


def rows_of(ids: list[int], gaps: list[float], **others: list[float]) -> dict[str, np.ndarray]:
    columns = {name: [float(i) for i in range(len(ids))] for name in NAMES} | {"gap": gaps} | others
    return {"id": np.asarray(ids, dtype=np.float64), **{k: np.asarray(v, dtype=float) for k, v in columns.items()}}


# ------------------------------------------------------------------------------------------------ out of the metrics


def test_the_statistics_of_one_mini_batch_are_taken_out_of_the_metrics() -> None:
    metrics = {"rows/id": [3, 1], "rows/gap": [0.5, -0.5], "grad_norm": 1.0, "rowsums": 2}
    found = take_row_statistics(metrics)
    assert metrics == {"grad_norm": 1.0, "rowsums": 2}
    assert {name: column.tolist() for name, column in found.items()} == {"id": [3.0, 1.0], "gap": [0.5, -0.5]}


def test_several_mini_batches_are_joined_in_their_order() -> None:
    found = take_row_statistics({"rows/id": [[3], [], [1, 2]], "rows/gap": [[0.5], [], [-0.5, math.nan]]})
    assert found["id"].tolist() == [3.0, 1.0, 2.0]
    assert found["gap"][:2].tolist() == [0.5, -0.5] and math.isnan(found["gap"][2])


@pytest.mark.parametrize("empty", [[], [[]], [[], []]])
def test_without_rows_the_columns_are_empty_and_there_are_no_metrics(empty: list) -> None:
    found = take_row_statistics({f"{ROW_STATISTICS}{name}": empty for name in ("id", *NAMES)})
    assert set(found) == {"id", *NAMES} and all(column.shape == (0,) for column in found.values())
    assert row_metrics(found, right_N=[True], pass_rates_N=[0.5], on_support=True) == {}


def test_token_divergences_are_taken_by_row_over_mini_batches() -> None:
    metrics = {"rows/id": [[3, 7], [], [1]], "rows/token_divergence": [[(0.5, 0.1), ()], [], [(2.0,)]]}
    assert take_token_divergences(metrics) == {3: (0.5, 0.1), 1: (2.0,)}
    assert list(metrics) == ["rows/id"] and take_token_divergences({}) == {}


def test_the_divergence_and_its_top_share_are_told_by_outcome() -> None:
    rows = rows_of([0, 1, 2], [0.0] * 3, divergence=[1.0, 3.0, 5.0], top_share=[0.2, 0.4, 0.6])
    found = row_metrics(rows, right_N=[True, False, False], pass_rates_N=[0.5] * 3, on_support=False)
    assert found["distill/divergence_right"] == 1.0 and found["distill/divergence_wrong"] == 4.0
    assert found["distill/top5_share_right"] == 0.2 and found["distill/top5_share_wrong"] == pytest.approx(0.5)
    assert found["distill/top5_share"] == pytest.approx(0.4)


def test_an_update_without_distillation_has_no_statistics() -> None:
    metrics = {"grad_norm": 1.0}
    assert take_row_statistics(metrics) == {} and metrics == {"grad_norm": 1.0}
    assert row_metrics({}, right_N=[], pass_rates_N=[], on_support=False) == {}


# --------------------------------------------------------------------------------------------------------- by outcome


def test_the_gap_is_the_median_over_right_rows_and_beside_it_over_wrong_ones() -> None:
    rows = rows_of([0, 2, 3, 5, 4], [0.1, 0.3, -9.0, -1.0, -2.0])
    right = [True, False, True, True, False, False]
    found = row_metrics(rows, right_N=right, pass_rates_N=[0.5] * 6, on_support=False)
    assert found["teacher/gap"] == pytest.approx(0.1)
    assert found["teacher/gap_mean"] == pytest.approx((0.1 + 0.3 - 9.0) / 3)
    assert found["teacher/gap_wrong"] == found["teacher/gap_wrong_mean"] == pytest.approx(-1.5)


@pytest.mark.parametrize(("right", "kept", "missing"), [(True, "gap", "gap_wrong"), (False, "gap_wrong", "gap")])
def test_an_outcome_without_rows_has_no_gap(right: bool, kept: str, missing: str) -> None:
    found = row_metrics(rows_of([1], [0.4]), right_N=[not right, right], pass_rates_N=[0.0, 1.0], on_support=False)
    assert found[f"teacher/{kept}"] == 0.4
    assert f"teacher/{missing}" not in found and f"teacher/{missing}_mean" not in found


def test_rows_are_matched_by_their_id_not_by_their_place() -> None:
    right, rates = [False, True, False], [0.1, 0.6, 0.9]
    one = row_metrics(rows_of([0, 1, 2], [1.0, 2.0, 3.0]), right_N=right, pass_rates_N=rates, on_support=False)
    other = row_metrics(
        rows_of(
            [2, 0, 1],
            [3.0, 1.0, 2.0],
            **{name: [2, 0, 1] for name in ("divergence", "top_share", "teacher_entropy", "student_nll")},
        ),
        right_N=right,
        pass_rates_N=rates,
        on_support=False,
    )
    assert one == other and one["teacher/gap"] == 2.0


# -------------------------------------------------------------------------------------------------------- by pass rate


def test_a_bin_includes_its_upper_bound_and_the_first_one_zero() -> None:
    rates = [0.0, 0.25, 0.26, 0.5, 0.51, 0.75, 0.76, 1.0]
    rows = rows_of(list(range(8)), [1, 2, 3, 4, 5, 6, 7, 8])
    found = row_metrics(rows, right_N=[True] * 8, pass_rates_N=rates, on_support=False)
    gaps = {name: found[f"by_pass_rate/gap/{name}"] for _, name in PASS_RATE_BINS}
    assert gaps == {"p0_25": 1.5, "p25_50": 3.5, "p50_75": 5.5, "p75_100": 7.5}
    assert found["by_pass_rate/divergence/p75_100"] == 6.5


def test_a_bin_without_rows_is_left_out() -> None:
    found = row_metrics(rows_of([0, 1], [1.0, 3.0]), right_N=[True] * 2, pass_rates_N=[0.3, 0.4], on_support=True)
    bins = {name.rsplit("/", 1)[1] for name in found if name.startswith("by_pass_rate/")}
    assert bins == {"p25_50"} and found["by_pass_rate/gap/p25_50"] == 2.0


def test_every_rate_falls_in_exactly_one_bin() -> None:
    bounds = [high for high, _ in PASS_RATE_BINS]
    assert bounds == sorted(bounds) and bounds[-1] == 1.0
    for rate in np.linspace(0, 1, 41):
        found = row_metrics(rows_of([0], [1.0]), right_N=[True], pass_rates_N=[rate], on_support=False)
        assert len([name for name in found if name.startswith("by_pass_rate/gap/")]) == 1


# ------------------------------------------------------------------------------------------------------------- masses


@pytest.mark.parametrize("on_support", [True, False])
def test_masses_are_metrics_only_where_there_is_a_support(on_support: bool) -> None:
    rows = rows_of([0, 1], [1.0, 3.0], teacher_mass=[0.9, 0.7], student_mass=[0.8, 0.6], divergence=[0.2, 0.4])
    found = row_metrics(rows, right_N=[True] * 2, pass_rates_N=[0.5] * 2, on_support=on_support)
    assert found["distill/divergence"] == pytest.approx(0.3) and found["teacher/entropy"] == 0.5
    assert any("mass" in name for name in found) == on_support
    if on_support:
        assert found["teacher/topk_mass"] == pytest.approx(0.8) and found["student/topk_mass"] == pytest.approx(0.7)
        assert {f"by_pass_rate/{name}/p25_50" for name in MEANS} <= set(found)
    assert all(type(value) is float for value in found.values())
