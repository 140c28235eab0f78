"""The loss: fixed denominators, what weighs nothing contributes nothing, truncated ratios, statistics of its rows."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_ext.chunks import Head
from verl_ext.config import distill_config
from verl_ext.loss import (
    RECORDED,
    ROWS,
    TOKENS,
    WEIGHT,
    Loss,
    aggregate,
    row_statistics,
    truncated_ratio,
    without_first,
)
from verl_ext.packing import to_jagged
from verl_ext.passes import ROW_ID, TeacherPass
from verl_ext.row_store import STORE
from verl_ext.student_values import DETAILS

MODES = ("seq-mean-token-mean", "token-mean")


def batch(seed: int = 0, rows: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    divergence = torch.rand(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths.unsqueeze(1)).to(torch.int64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    return divergence, mask, weights


def test_the_sequence_mean_is_the_mean_over_all_rows_of_weighted_token_means() -> None:
    divergence = torch.tensor([[1.0, 3.0, 100.0], [5.0, 100.0, 100.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    value = aggregate(divergence, mask, torch.tensor([2.0, 1.0, 0.0]), mode="seq-mean-token-mean", rows=10, tokens=99)
    assert float(value) == pytest.approx((2 * 2.0 + 5.0) / 10)


def test_the_token_mean_divides_weighted_sums_by_the_tokens_of_the_whole_mini_batch() -> None:
    divergence = torch.tensor([[1.0, 3.0], [5.0, 100.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    value = aggregate(divergence, mask, torch.tensor([2.0, 1.0]), mode="token-mean", rows=99, tokens=20)
    assert float(value) == pytest.approx((2 * 4.0 + 5.0) / 20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_of_weight_zero_contributes_nothing_whatever_it_holds(mode: str, poison: float) -> None:
    divergence, mask, weights = batch()
    weights[2] = 0.0
    clean = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20)
    divergence[2] = poison
    divergence.requires_grad_()
    value = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20)
    value.backward()
    assert value == clean
    assert torch.isfinite(divergence.grad).all() and (divergence.grad[2] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_values_outside_the_mask_are_never_read(mode: str) -> None:
    divergence, mask, weights = batch()
    clean = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20)
    assert aggregate(divergence.masked_fill(mask == 0, math.nan), mask, weights, mode=mode, rows=6, tokens=20) == clean


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None)
@given(cut=st.integers(1, 5), seed=st.integers(0, 50))
def test_the_sum_over_micro_batches_is_the_loss_of_the_whole(mode: str, cut: int, seed: int) -> None:
    divergence, mask, weights = batch(seed)
    tokens = int(mask.sum())
    whole = aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=tokens)
    parts = [
        aggregate(divergence[part], mask[part], weights[part], mode=mode, rows=6, tokens=tokens)
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_row_is_proportional_to_its_weight(mode: str) -> None:
    divergence, mask, _ = batch(3)
    divergence.requires_grad_()
    aggregate(divergence, mask, torch.ones(6), mode=mode, rows=6, tokens=20).backward()
    plain = divergence.grad.clone()
    divergence.grad = None
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 4.0, 1.0], dtype=torch.float64)
    aggregate(divergence, mask, weights, mode=mode, rows=6, tokens=20).backward()
    torch.testing.assert_close(divergence.grad, plain * weights.unsqueeze(1))


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_without_any_weight_is_zero_and_keeps_its_graph(mode: str) -> None:
    divergence, mask, _ = batch()
    divergence.requires_grad_()
    value = aggregate(divergence, mask, torch.zeros(6), mode=mode, rows=6, tokens=0)
    value.backward()
    assert float(value.detach()) == 0.0 and (divergence.grad == 0).all()


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sum'.*seq-mean-token-mean, token-mean"):
        aggregate(*batch(), mode="sum", rows=1, tokens=1)


# -------------------------------------------------------------------------------------------- tokens that are skipped


def test_the_first_tokens_of_every_response_leave_the_mask_and_no_others() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 1]])
    before = mask.clone()
    assert without_first(mask, 2).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert torch.equal(without_first(mask, 0), mask) and not without_first(mask, 9).any()
    assert without_first(torch.ones(3, dtype=torch.int64), 2).tolist() == [0, 0, 1]
    assert torch.equal(mask, before)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None)
@given(skip=st.integers(0, 6), cut=st.integers(1, 5), seed=st.integers(0, 50))
def test_the_loss_without_the_first_tokens_is_that_of_the_shorter_responses(
    mode: str, skip: int, cut: int, seed: int
) -> None:
    divergence, mask, weights = batch(seed)
    lengths = [max(0, int(length) - skip) for length in mask.sum(1)]
    expected = 0.0
    for row, weight, length in zip(divergence.tolist(), weights.tolist(), lengths, strict=True):
        if length:
            total = weight * sum(row[skip : skip + length])
            expected += total / (length * 6) if mode == "seq-mean-token-mean" else total / sum(lengths)
    found = 0.0
    for part in (slice(None, cut), slice(cut, None)):
        width = max(1, int(mask[part].sum(1).max()))  # a micro-batch is padded to its own longest response
        found += float(
            aggregate(
                divergence[part, :width],
                without_first(mask[part, :width], skip),
                weights[part],
                mode=mode,
                rows=6,
                tokens=sum(lengths),
            )
        )
    assert found == pytest.approx(expected, rel=1e-12, abs=0.0)


# ------------------------------------------------------------------------------------------------- truncated ratios


def test_a_truncated_ratio_is_the_quotient_of_probabilities_up_to_its_limit() -> None:
    log_p, log_q = torch.tensor([0.5, 0.25, 0.2]).log(), torch.tensor([0.25, 0.5, 0.01]).log()
    torch.testing.assert_close(truncated_ratio(log_p, log_q, 3.0), torch.tensor([2.0, 0.5, 3.0]))


def test_a_truncated_ratio_has_no_gradient_and_stays_finite() -> None:
    log_p = torch.tensor([0.0, -500.0, -1.0], requires_grad=True)
    ratio = truncated_ratio(log_p, torch.tensor([-500.0, 0.0, -1.0]), math.inf)
    assert not ratio.requires_grad
    torch.testing.assert_close(ratio, torch.tensor([math.exp(20), math.exp(-20), 1.0]))


# ---------------------------------------------------------------------------------------------------- a micro-batch

PROMPTS, RESPONSES = [2, 1, 3], [3, 1, 2]
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])


def make_config(**divergence: Any):
    return distill_config({"divergence": {"topk": 3} | divergence})


def columns(values: torch.Tensor) -> torch.Tensor:
    """[3, 3] of the padded responses as a jagged column."""
    return to_jagged([row[:size].clone() for row, size in zip(values, RESPONSES, strict=True)])


def micro_batch(weights: list[float], **settings: Any) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(7, (p + r,), generator=generator) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    data = TensorDict(
        {
            "input_ids": to_jagged(rows),
            "prompts": to_jagged([row[:p] for row, p in zip(rows, PROMPTS, strict=True)]),
            "responses": to_jagged([row[p:] for row, p in zip(rows, PROMPTS, strict=True)]),
            "response_mask": columns(MASK),
            "temperature": torch.ones(3),
            WEIGHT: torch.tensor(weights),
            ROW_ID: torch.tensor([4, 5, 6]),
            ROWS: torch.full((3,), 8),
            TOKENS: torch.full((3,), 20),
        },
        batch_size=3,
    )
    tu.assign_non_tensor(data, **settings)
    return data


LOG_PROBS = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, 0.0, 0.0], [-3.0, -0.2, 0.0]])
OLD = LOG_PROBS - torch.tensor([[1.0, -0.5, 0.0], [0.2, 0.0, 0.0], [-1.0, 2.0, 0.0]])
ROLLOUT = LOG_PROBS - torch.tensor([[0.3, 1.5, -0.4], [0.0, 0.0, 0.0], [0.6, -2.0, 0.0]])


def test_without_old_policy_threshold_or_weights_nothing_is_multiplied() -> None:
    data = micro_batch([1.0, 1.0, 1.0])
    assert Loss(make_config(), None).multipliers(LOG_PROBS, data) is None
    assert Loss(make_config(ratio_clip=2.0), None).multipliers(LOG_PROBS, data) is None
    data["old_log_probs"] = columns(OLD)
    assert Loss(make_config(), None).multipliers(LOG_PROBS, data) is None


def test_the_ratio_to_the_old_policy_is_truncated_at_ratio_clip() -> None:
    data = micro_batch([1.0, 1.0, 1.0])
    data["old_log_probs"] = columns(OLD)
    factors = Loss(make_config(ratio_clip=2.0), None).multipliers(LOG_PROBS, data)
    expected = torch.tensor([[2.0, math.exp(-0.5), 1.0], [math.exp(0.2), 1, 1], [math.exp(-1.0), 2.0, 1.0]])
    torch.testing.assert_close(factors[MASK.bool()], expected[MASK.bool()])


def test_the_ratio_to_the_rollout_is_taken_in_the_update_where_a_threshold_is_among_its_settings() -> None:
    data = micro_batch([1.0, 1.0, 1.0], rollout_threshold=1.5)
    data["rollout_log_probs"] = columns(ROLLOUT)
    factors = Loss(make_config(), None).multipliers(LOG_PROBS, data)
    expected = torch.tensor([[math.exp(0.3), 1.5, math.exp(-0.4)], [1.0, 1, 1], [1.5, math.exp(-2.0), 1.0]])
    torch.testing.assert_close(factors[MASK.bool()], expected[MASK.bool()])
    assert Loss(make_config(rollout_correction=False), None).multipliers(LOG_PROBS, data) is None


def test_verl_s_own_rollout_weights_are_used_where_its_pass_made_them() -> None:
    data = micro_batch([1.0, 1.0, 1.0], rollout_threshold=None)
    weights = torch.rand(3, 3, requires_grad=True)
    data["rollout_is_weights"] = columns(weights)
    factors = Loss(make_config(), None).multipliers(LOG_PROBS, data)
    assert torch.equal(factors[MASK.bool()], weights[MASK.bool()]) and not factors.requires_grad
    assert Loss(make_config(rollout_correction=False), None).multipliers(LOG_PROBS, data) is None


@pytest.mark.parametrize("by", ["threshold", "column"])
def test_both_factors_are_multiplied(by: str) -> None:
    data = micro_batch([1.0, 1.0, 1.0], rollout_threshold=1.5 if by == "threshold" else None)
    data["rollout_log_probs"], data["rollout_is_weights"] = columns(ROLLOUT), columns(MASK * 0.3)
    correction = Loss(make_config(), None).multipliers(LOG_PROBS, data)
    data["old_log_probs"] = columns(OLD)
    ratio = Loss(make_config(ratio_clip=2.0, rollout_correction=False), None).multipliers(LOG_PROBS, data)
    both = Loss(make_config(ratio_clip=2.0), None).multipliers(LOG_PROBS, data)
    torch.testing.assert_close(both[MASK.bool()], (ratio * correction)[MASK.bool()])
    assert (correction[MASK.bool()] != 1).any() and (ratio[MASK.bool()] != 1).any()


# ------------------------------------------------------------------------------------------------------ the whole call


def model_output(data: TensorDict, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = data["input_ids"].offsets()
    return {
        name: torch.nested.nested_tensor_from_jagged(torch.rand(int(offsets[-1]), generator=generator), offsets)
        for name in ("divergence", *DETAILS)
    }


def at_responses(values: torch.Tensor) -> torch.Tensor:
    """[3, 3] of the padded responses, from the packed values."""
    out, end = torch.zeros(3, 3), 0
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        end += prompt + response
        out[row, :response] = values.values()[end - response - 1 : end - 1]
    return out


@pytest.mark.parametrize("threshold", [None, 1.2])
def test_the_loss_is_the_weighted_aggregate_times_the_ranks_over_which_gradients_are_averaged(
    threshold: float | None,
) -> None:
    data = micro_batch([2.0, 0.0, 0.5], rollout_threshold=threshold, dp_size=4)
    data["rollout_log_probs"] = columns(ROLLOUT)
    output = model_output(data)
    loss, metrics = Loss(make_config(), None)(model_output=output, data=data)
    divergence = at_responses(output["divergence"])
    if threshold is not None:
        divergence = divergence * truncated_ratio(at_responses(output["student_log_probs"]), ROLLOUT, threshold)
    lengths = torch.tensor(RESPONSES)
    expected = 4 * ((divergence * MASK).sum(1) / lengths * torch.tensor([2.0, 0.0, 0.5])).sum() / 8
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert metrics["distill/loss"].aggregate() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("mode", "expected"), [("seq-mean-token-mean", 4 * 2.0 / 8), ("token-mean", 4 * 2.0 / 20)])
def test_skipped_tokens_have_no_loss_and_no_gradient_but_stay_in_the_statistics(mode: str, expected: float) -> None:
    data = micro_batch([2.0, 3.0, 0.5], dp_size=4)
    whole, cut = model_output(data), model_output(data)
    offsets = data["input_ids"].offsets()
    values = cut["divergence"].values().clone().requires_grad_()
    cut["divergence"] = torch.nested.nested_tensor_from_jagged(values, offsets)
    _, reference = Loss(make_config(aggregation=mode), None)(model_output=whole, data=data)
    loss, metrics = Loss(make_config(aggregation=mode, skip_tokens=2), None)(model_output=cut, data=data)
    loss.backward()
    # Only the first response is longer than two tokens; its third is predicted two before the end of the row.
    third = int(offsets[1]) - 2
    assert float(loss.detach()) == pytest.approx(expected * float(values[third].detach()), rel=1e-6)
    assert values.grad.nonzero().flatten().tolist() == [third]
    statistics = [name for name in metrics if name.startswith("rows/")]
    assert statistics and all(metrics[name] == reference[name] for name in statistics)


def test_the_hidden_states_call_returns_values_for_every_packed_token_and_log_probabilities_where_verl_needs_them() -> (
    None
):
    STORE.clear()
    generator = torch.Generator().manual_seed(1)
    count = sum(PROMPTS) + sum(RESPONSES)
    states = Head(torch.randn(count, 5, generator=generator), torch.randn(7, 5, generator=generator))
    teacher = TeacherPass("hidden_states")
    teacher.collect(Head(states.hidden.flip(0), states.weight), micro_batch([1.0, 1.0, 1.0]))
    teacher.leave_head()
    loss = Loss(make_config(support="full", tail=False), None)
    alone = loss(hidden_states=states, data=micro_batch([1.0, 0.0, 1.0], distillation_only=True))
    assert set(alone) == {"divergence", *DETAILS} and all(value.shape == (count,) for value in alone.values())
    beside = loss(hidden_states=states, data=micro_batch([1.0, 0.0, 1.0], calculate_entropy=True))
    assert set(beside) == {"divergence", *DETAILS, "log_probs", "entropy"}
    assert set(loss(hidden_states=states, data=micro_batch([0.0] * 3))) == {"divergence", *DETAILS, "log_probs"}
    processed = loss(student_logits=(states.hidden @ states.weight.t())[None], data=micro_batch([1.0, 0.0, 1.0]))
    for name, value in processed.items():
        assert value.shape == (1, count)
        torch.testing.assert_close(value[0], alone[name])
    STORE.clear()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        ({"divergence": {"support": "full", "tail": False}}, True),
        ({"divergence": {"inputs": "hidden_states"}}, True),
        ({"divergence": {"inputs": "logits"}}, False),
        ({"divergence": {"kind": "sampled_token"}}, False),
        ({"divergence": {"inputs": "hidden_states"}, "carrier": "advantage"}, False),
        ({"divergence": {"inputs": "hidden_states"}, "coefficient": 0.0}, False),
    ],
    ids=str,
)
def test_the_engine_calls_it_in_the_head_s_place_where_the_divergence_is_made_of_hidden_states(
    values: dict, expected: bool
) -> None:
    assert Loss(distill_config(values), None).reads_hidden_states is expected


def test_it_is_sent_to_the_workers_by_pickle() -> None:
    loss = Loss(make_config(clip=0.05, ratio_clip=2.0), {"loss_agg_mode": "token-mean"})
    copied = pickle.loads(pickle.dumps(loss))
    assert copied.config == loss.config and copied.actor_config == loss.actor_config
    assert copied.reads_hidden_states == loss.reads_hidden_states


# ---------------------------------------------------------------------------------------------- statistics of the rows

MEANS = ("divergence", "gap", "teacher_entropy", "student_nll", "student_mass", "teacher_mass")
STATISTICS = {f"rows/{name}" for name in ("id", *MEANS, "top_share", "token_divergence")}


def values_of_tokens(seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(3, 3, generator=generator) for name in ("divergence", *DETAILS)}


def test_the_statistics_are_means_over_the_tokens_of_every_distilled_row() -> None:
    values = values_of_tokens()
    found = row_statistics(values, MASK, micro_batch([1.0, 0.0, 0.5]))
    assert set(found) == STATISTICS and found["rows/id"] == [4, 6]
    gap = values["teacher_log_probs"] - values["student_log_probs"]
    for name, value in {**values, "gap": gap, "student_nll": -values["student_log_probs"]}.items():
        if f"rows/{name}" in STATISTICS:
            expected = [float(value[0].mean()), float(value[2, :2].mean())]
            assert found[f"rows/{name}"] == pytest.approx(expected), name


def test_masked_tokens_are_out_of_the_statistics_whatever_they_hold() -> None:
    mask = MASK.clone()
    mask[0, 1] = 0
    clean = row_statistics(values_of_tokens(), mask, micro_batch([1.0, 1.0, 1.0]))
    spoilt = {name: value.masked_fill(mask == 0, math.nan) for name, value in values_of_tokens().items()}
    assert row_statistics(spoilt, mask, micro_batch([1.0, 1.0, 1.0])) == clean
    assert clean["rows/divergence"][0] == pytest.approx(float(values_of_tokens()["divergence"][0, [0, 2]].mean()))


def test_the_top_share_is_that_of_the_largest_token_of_a_short_response() -> None:
    values = values_of_tokens()
    values["divergence"] = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0], [3.0, 1.0, 9.0]])
    found = row_statistics(values, MASK, micro_batch([1.0, 1.0, 1.0]))["rows/top_share"]
    assert found == pytest.approx([5 / 8, 0.0, 3 / 4])  # the third row has two tokens
    values = {name: torch.arange(60.0).expand(3, 60) for name in ("divergence", *DETAILS)}
    found = row_statistics(values, torch.ones(3, 60), micro_batch([1.0, 0.0, 0.0]))["rows/top_share"]
    assert found == pytest.approx([(57 + 58 + 59) / sum(range(60))])


def test_the_divergence_of_recorded_rows_is_kept_token_by_token() -> None:
    values, data = values_of_tokens(), micro_batch([1.0, 0.0, 0.5])
    data[RECORDED] = torch.tensor([0, 1, 1])
    found = row_statistics(values, MASK, data)["rows/token_divergence"]
    assert found[0] == () and found[1] == pytest.approx(tuple(values["divergence"][2, :2].tolist()))


def test_the_keys_are_the_same_whatever_rows_a_micro_batch_has() -> None:
    """verl joins the metrics of ranks and micro-batches by their keys."""
    data = micro_batch([1.0, 1.0, 1.0])
    data[ROW_ID] = torch.tensor([-1, 5, -1])
    found = row_statistics(values_of_tokens(), MASK, data)
    assert set(found) == STATISTICS and found["rows/id"] == [5]
    none = row_statistics(values_of_tokens(), MASK, micro_batch([0.0, 0.0, 0.0]))
    assert set(none) == STATISTICS and all(value == [] for value in none.values())


def test_a_row_whose_tokens_are_all_masked_counts_as_zero() -> None:
    mask = MASK.clone()
    mask[1] = 0
    assert row_statistics(values_of_tokens(), mask, micro_batch([1.0, 1.0, 1.0]))["rows/divergence"][1] == 0.0


def test_a_row_that_is_not_finite_shows_in_its_own_statistics_alone() -> None:
    values = values_of_tokens()
    values["divergence"][2, 1] = math.nan
    found = row_statistics(values, MASK, micro_batch([1.0, 1.0, 1.0]))["rows/divergence"]
    assert [math.isfinite(value) for value in found] == [True, True, False]
