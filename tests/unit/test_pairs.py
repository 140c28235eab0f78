"""Pairs of a batch: which train, their coefficients, the self-check; against enumeration and autograd in float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from verl_ext.batch_plan import RowBatch
from verl_ext.chunks import Head, Logits
from verl_ext.config import ConfigError, distill_config
from verl_ext.config_axes import PreferenceConfig
from verl_ext.loss import ROWS, TOKENS, WEIGHT, Loss
from verl_ext.packing import to_jagged
from verl_ext.pair_check import LIMIT, PAIRS, PairCheck, reason_without
from verl_ext.pair_pass import COEFFICIENT, PREFIX, SIDE, PairPass
from verl_ext.pair_step import PairStep
from verl_ext.pairs import LEFT_OUT, NEGATIVE, NEITHER, POSITIVE, PairPlan, PairScores, plan_pairs, weigh_pairs
from verl_ext.passes import ROW_ID, TeacherPass
from verl_ext.preference import margins, pair_loss
from verl_ext.row_store import STORE

PAIRS_BLOCK = {
    "carrier": "preference",
    "sequences": {"source": "pairs"},
    "teacher": {"kind": "live"},
    "context": {"kind": "reference"},
    "divergence": {"kind": "reverse_kl", "support": "full", "tail": False},
}


def config(**changes: Any):
    return distill_config(OmegaConf.to_container(OmegaConf.merge(PAIRS_BLOCK, changes)))


def batch(groups: dict[str, list[tuple[int, float]]], **columns: Any) -> RowBatch:
    """Groups by uid, each a list of (rollout number, reward)."""
    rows = [(uid, rollout, reward) for uid, group in groups.items() for rollout, reward in group]
    values = {
        "uids": [uid for uid, _, _ in rows],
        "rollout_index": [rollout for _, rollout, _ in rows],
        "rewards": [reward for _, _, reward in rows],
        "errors": [False] * len(rows),
        "responses": ["text"] * len(rows),
        "feedback": None,
        "raw_prompts": [[{"role": "user", "content": "q"}]] * len(rows),
        "prompt_lengths": [3] * len(rows),
        "response_lengths": [5] * len(rows),
    }
    return RowBatch(**(values | columns))


def planned(rows: RowBatch, **changes: Any) -> PairPlan:
    arguments = {
        "taught_N": [True] * len(rows),
        "weights_N": [1.0] * len(rows),
        "settings": PreferenceConfig(),
        "beta": 0.1,
        "success_threshold": 0.5,
        "response_limit": 8,
    }
    return plan_pairs(rows, **(arguments | changes))


TWO_BY_FOUR = {"a": [(3, 0.0), (0, 1.0), (2, 0.0), (1, 1.0)], "b": [(1, 0.0), (0, 1.0), (2, 1.0), (3, 0.0)]}


def test_pairs_are_neighbouring_rollout_numbers_whatever_the_order_of_the_rows() -> None:
    plan = planned(batch(TWO_BY_FOUR))
    assert sorted(zip(plan.positive_P, plan.negative_P, strict=True)) == [(1, 3), (2, 0), (5, 4), (6, 7)]
    assert plan.sides_N == [NEGATIVE, POSITIVE, POSITIVE, NEGATIVE, NEGATIVE, POSITIVE, POSITIVE, NEGATIVE]
    assert plan.labels_P is None and plan.whole and plan.left_out() == {} and plan.keep_N.all()
    assert plan.metrics["preference/pairs"] == plan.metrics["preference/pairs_trained"] == 4
    assert plan.metrics["preference/pass_rate_positive"] == 0.75
    assert plan.metrics["preference/pass_rate_negative"] == 0.25


@pytest.mark.parametrize(
    ("columns", "arguments", "reason", "whole"),
    [
        ({}, {"taught_N": [True, False, True, True]}, "without_context", True),
        ({}, {"weights_N": [1.0, 0.0, 1.0, 1.0]}, "without_weight", True),
        ({"responses": [" \n", "text", "text", "text"]}, {}, "empty", False),
        ({"response_lengths": [5, 8, 5, 5]}, {}, "cut", False),
    ],
)
def test_a_pair_with_a_side_that_cannot_be_used_is_left_out_and_counted(
    columns: dict, arguments: dict, reason: str, whole: bool
) -> None:
    plan = planned(batch({"a": [(0, 1.0), (1, 0.0), (2, 1.0), (3, 0.0)]}, **columns), **arguments)
    assert (plan.positive_P, plan.negative_P) == ([2], [3])
    assert plan.sides_N == [NEITHER, NEITHER, POSITIVE, NEGATIVE]
    assert plan.left_out() == {reason: 1} and plan.whole is whole
    assert sum(plan.metrics[f"preference/pairs_{name}"] for name in LEFT_OUT) + len(plan.positive_P) == 2


def test_a_side_whose_rollout_was_lost_leaves_its_pair_out() -> None:
    plan = planned(batch({"a": [(0, 1.0), (2, 1.0), (3, 0.0)]}))
    assert plan.left_out() == {"lost": 1} and (plan.positive_P, plan.negative_P) == ([1], [2])


@pytest.mark.parametrize(
    ("pair_filter", "kept"),
    [("none", [0, 2, 4, 6]), ("correct_pos", [0, 2]), ("correct_pos_wrong_neg", [0]), ("bt_reward", [0, 2, 4, 6])],
)
def test_filters_keep_the_pairs_they_name(pair_filter: str, kept: list[int]) -> None:
    rows = batch({"a": [(0, 1), (1, 0), (2, 1), (3, 1), (4, 0), (5, 0), (6, 0), (7, 1)]})
    plan = planned(rows, settings=PreferenceConfig(pair_filter=pair_filter))
    assert plan.positive_P == kept and plan.negative_P == [row + 1 for row in kept]
    assert plan.metrics["preference/pairs_filtered"] == 4 - len(kept)
    if pair_filter == "bt_reward":
        sigma = 1 / (1 + math.exp(-1))
        torch.testing.assert_close(plan.labels_P, torch.tensor([sigma, 0.5, 0.5, 1 - sigma]))


def test_only_filters_that_read_a_verdict_need_one() -> None:
    rows = batch({"a": [(0, math.nan), (1, 0.0)]}, errors=[True, False])
    assert planned(rows).positive_P == [0]
    for name in ("correct_pos", "bt_reward"):
        plan = planned(rows, settings=PreferenceConfig(pair_filter=name))
        assert plan.positive_P == [] and plan.left_out() == {"unjudged": 1}


def test_the_target_of_the_rewards_is_told() -> None:
    plan = planned(batch({"a": [(0, 1.0), (1, 0.0), (2, 0.0), (3, 0.0)]}), beta=0.5)
    up, down = math.exp(2.0), 1.0
    assert plan.metrics["preference/target_reward"] == pytest.approx(up / (up + down))
    assert plan.metrics["preference/target_objective"] == pytest.approx(0.5 * math.log((up + down) / 2))


# ------------------------------------------------------------------------------------------------------- coefficients


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.01, 0.1, 1.0]),
    log_prob=st.sampled_from(["sum", "mean"]),
    labelled=st.booleans(),
)
def test_coefficients_have_the_gradient_of_the_weighted_paired_loss(
    seed: int, beta: float, log_prob: str, labelled: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (8,), generator=generator)
    tokens = -torch.rand(8, 5, generator=generator, dtype=torch.float64) * 4
    tokens.requires_grad_()
    teacher = -torch.rand(8, generator=generator, dtype=torch.float64) * 9
    weights = torch.rand(8, generator=generator, dtype=torch.float64).repeat_interleave(2)[:8]
    labels = torch.rand(3, generator=generator, dtype=torch.float64) if labelled else None
    mask = torch.arange(5) < lengths.unsqueeze(1)
    pos, neg = [0, 2, 6], [1, 3, 7]
    sides = [POSITIVE, NEGATIVE, POSITIVE, NEGATIVE, NEITHER, NEITHER, POSITIVE, NEGATIVE]
    plan = PairPlan(pos, neg, labels, sides, True, {})
    student = (tokens * mask).sum(1)
    scale = 1 / lengths.double() if log_prob == "mean" else torch.ones(8, dtype=torch.float64)
    four = [values[rows] * scale[rows] for values in (student, teacher) for rows in (pos, neg)]
    loss = (weights[pos] * pair_loss(margins(*four, beta=beta), labels)).sum()
    (expected,) = torch.autograd.grad(loss, tokens)
    unknown = torch.full((8,), math.nan, dtype=torch.float64)
    scores = PairScores(student.detach(), teacher, unknown, unknown)
    coefficients, _, metrics = weigh_pairs(plan, scores, weights, lengths.tolist(), beta=beta, log_prob=log_prob)
    torch.testing.assert_close(-coefficients.unsqueeze(1) * mask, expected, rtol=1e-10, atol=1e-14)
    assert metrics["distill/loss"] == pytest.approx(
        float(pair_loss(margins(*four, beta=beta), labels).mean().detach()), rel=1e-10
    )
    assert not {"preference/jeffreys", "preference/sampler_gap_positive"} & set(metrics), "not measured, not told"


def test_an_unknown_log_prob_is_refused() -> None:
    scores = PairScores(*torch.zeros(4, 2))
    with pytest.raises(ValueError, match="'max'.*sum, mean"):
        weigh_pairs(PairPlan([0], [1], None, [1, -1], True, {}), scores, torch.ones(2), [1, 1], beta=1, log_prob="max")


def sequences(length: int, size: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(size), repeat=length))


def test_the_self_check_averages_to_zero_over_fair_samples_and_only_there() -> None:
    """All pairs of responses of two tokens, each with its probability: E[m + beta (D+ + D-)] = 0."""
    generator = torch.Generator().manual_seed(0)
    size = 3
    first = torch.randn(2, size, generator=generator, dtype=torch.float64).log_softmax(-1)
    second = torch.randn(2, size, size, generator=generator, dtype=torch.float64).log_softmax(-1)
    student, teacher = ((first[side], second[side]) for side in (0, 1))

    def log_prob(model, one):
        return model[0][one[0]] + model[1][one[0], one[1]]

    def kl(left, right):
        return (left.exp() * (left - right)).sum(-1)

    def along(one, forward):
        pairs = [(teacher[0], student[0]), (teacher[1][one[0]], student[1][one[0]])]
        return sum(kl(t, s) if forward else kl(s, t) for t, s in pairs)

    everything = sequences(2, size)
    combos = list(itertools.product(everything, everything))
    columns = [
        [f(one) for combo in combos for one in combo]
        for f in (lambda one: log_prob(student, one), lambda one: log_prob(teacher, one))
    ]
    divergence = [value for pos, neg in combos for value in (along(pos, True), along(neg, False))]
    rows = 2 * len(combos)
    pos, neg = list(range(0, rows, 2)), list(range(1, rows, 2))
    plan = PairPlan(pos, neg, None, [POSITIVE, NEGATIVE] * len(combos), True, {})
    values = [torch.tensor(column, dtype=torch.float64) for column in (*columns, divergence)]
    scores = PairScores(*values, torch.zeros(rows))
    _, differences, metrics = weigh_pairs(plan, scores, torch.ones(rows), [2] * rows, beta=0.3)
    fair = torch.stack([(log_prob(teacher, p) + log_prob(student, n)).exp() for p, n in combos])
    swapped = torch.stack([(log_prob(student, p) + log_prob(student, n)).exp() for p, n in combos])
    assert float((fair * differences).sum()) == pytest.approx(0.0, abs=1e-14)
    assert abs(float((swapped * differences).sum())) > 0.01
    assert metrics["preference/sampler_gap_positive"] == 0.0
    assert metrics["preference/margin_expected"] == pytest.approx(-0.3 * metrics["preference/jeffreys"])


# --------------------------------------------------------------------------------------------------------- self-check


def rollout(**changes: Any):
    plain = {"top_p": 1.0, "top_k": -1, "temperature": 1.0}
    return OmegaConf.create({"actor_rollout_ref": {"rollout": plain | changes}})


@pytest.mark.parametrize(
    ("changes", "decoding", "named"),
    [
        ({}, {}, None),
        ({"preference": {"pair_filter": "bt_reward"}}, {}, None),
        ({}, {"top_p": 0.95}, "top_p=0.95"),
        ({}, {"top_k": 20}, "top_k=20"),
        ({}, {"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"divergence": {"kind": "sampled_token"}}, {}, "sampled_token"),
        ({"preference": {"log_prob": "mean"}}, {}, "log_prob=mean"),
        ({"preference": {"pair_filter": "correct_pos"}}, {}, "pair_filter=correct_pos"),
    ],
)
def test_the_self_check_is_off_where_it_cannot_hold_and_says_so(changes: dict, decoding: dict, named: str) -> None:
    warnings: list[str] = []
    check = PairCheck(config(**changes), rollout(**decoding), warnings.append)
    if named is None:
        assert check.reason is None and not warnings
        return
    assert named in str(reason_without(config(**changes), rollout(**decoding)))
    assert len(warnings) == 1 and "self-check of the pairs is off" in warnings[0] and named in warnings[0]
    assert check.look(torch.ones(PAIRS), whole=True) == {}


def test_the_self_check_warns_once_where_the_differences_do_not_average_out() -> None:
    warnings: list[str] = []
    check = PairCheck(config(), rollout(), warnings.append)
    noise = torch.randn(PAIRS // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(4):
        values = check.look(noise - noise.mean(), whole=True)
    assert not warnings and values["preference/check"] == pytest.approx(0.0, abs=1e-12)
    assert check.look(noise, whole=False) == {}, "a choice among the pairs is not looked at"
    wrong = PairCheck(config(), rollout(), warnings.append)
    wrong.look(noise + 1.0, whole=True)
    assert not warnings, "too few pairs yet"
    values = [wrong.look(noise + 1.0, whole=True) for _ in range(3)][-1]
    assert values["preference/check_errors"] > LIMIT
    assert len(warnings) == 1 and "not come from the distribution" in warnings[0]


# ------------------------------------------------------------------------------------------------------------- worker

PROMPTS, RESPONSES = [2, 1, 3, 2], [3, 2, 1, 2]
VOCABULARY, WIDTH, TEMPERATURE = 7, 5, 1.3


def micro_batch() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (p + r,), generator=generator) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    mask = [torch.ones(r, dtype=torch.int64) for r in RESPONSES]
    data = TensorDict(
        {
            "input_ids": to_jagged(rows),
            "prompts": to_jagged([row[:p] for row, p in zip(rows, PROMPTS, strict=True)]),
            "responses": to_jagged([row[p:] for row, p in zip(rows, PROMPTS, strict=True)]),
            "response_mask": to_jagged(mask),
            "rollout_log_probs": to_jagged([torch.full((r,), -1.0) for r in RESPONSES]),
            "temperature": torch.full((4,), TEMPERATURE),
            WEIGHT: torch.ones(4),
            ROW_ID: torch.tensor([4, 5, 6, -1]),
            SIDE: torch.tensor([POSITIVE, NEGATIVE, NEITHER, POSITIVE]),
            ROWS: torch.full((4,), 10),
            TOKENS: torch.full((4,), 20),
        },
        batch_size=4,
    )
    tu.assign_non_tensor(data, dp_size=2)
    return data


def head(seed: int) -> Head:
    generator = torch.Generator().manual_seed(seed)
    count = sum(PROMPTS) + sum(RESPONSES)
    return Head(torch.randn(count, WIDTH, generator=generator), torch.randn(VOCABULARY, WIDTH, generator=generator))


@pytest.mark.parametrize("cheap", [False, True])
def test_the_pair_pass_reads_both_sides_and_nothing_else(cheap: bool) -> None:
    STORE.clear()
    data, student, teacher = micro_batch(), head(1), head(2)
    logits = [source.hidden @ source.weight.t() / TEMPERATURE for source in (student, teacher)]
    s, t = (values.double().log_softmax(-1) for values in logits)
    block = config(divergence={"kind": "sampled_token"}) if cheap else config()
    keep = TeacherPass(block.teacher_states)
    keep.collect(teacher, data)
    keep.leave_head()
    scoring = PairPass(block)
    assert scoring.reads_hidden_states is not cheap
    # Without divergences the student's logits are read, which verl has divided by the temperature already.
    scoring.collect(Logits(logits[0]) if cheap else student, data)
    STORE.clear()
    ends = list(itertools.accumulate(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)))
    columns = scoring.columns([6, 5, 4, -1])
    assert set(columns) == {PREFIX + name for name in ("student", "teacher", "divergence", "sampler_gap")}
    for place, row in ((2, 0), (1, 1)):
        at = torch.arange(ends[row] - RESPONSES[row] - 1, ends[row] - 1)
        tokens = data["responses"][row].unsqueeze(1)
        own = (t if row == 0 else s)[at].gather(1, tokens)
        kl = (t.exp() * (t - s) if row == 0 else s.exp() * (s - t))[at].sum()
        found = {name.removeprefix(PREFIX): float(column[place]) for name, column in columns.items()}
        expected = {
            "student": float(s[at].gather(1, tokens).sum()),
            "teacher": float(t[at].gather(1, tokens).sum()),
            "divergence": math.nan if cheap else float(kl),
            "sampler_gap": float((own + 1.0).abs().mean()),
        }
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    for place in (0, 3):
        assert all(bool(column[place].isnan()) for column in columns.values()), "a row of no pair, and padding"


def test_the_loss_has_the_coefficients_as_gradient_and_does_not_depend_on_micro_batches() -> None:
    data = micro_batch()
    coefficients = torch.tensor([0.4, -0.3, 0.0, 0.0])
    data[COEFFICIENT] = coefficients
    offsets = data["input_ids"].offsets()
    values = -torch.rand(int(offsets[-1]), generator=torch.Generator().manual_seed(3))
    values[int(offsets[2]) :] = math.nan  # rows of no pair are not read
    values.requires_grad_()
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(values, offsets)}
    loss, metrics = Loss(config(), None)(model_output=output, data=data)
    loss.backward()
    expected = torch.zeros(int(offsets[-1]))
    for row in range(2):
        end = int(offsets[row + 1])
        # 2 ranks, whose gradients are averaged; 10 rows of the mini-batch are 5 pairs.
        expected[end - RESPONSES[row] - 1 : end - 1] = -2 * coefficients[row] / 5
    torch.testing.assert_close(values.grad, expected)
    assert metrics == {}, "the value of this loss means nothing"
    parts = 0.0
    for row in range(4):
        one = tu.index_select_tensor_dict(data, [row])
        part = {"log_probs": to_jagged([values.detach()[int(offsets[row]) : int(offsets[row + 1])]])}
        parts += float(Loss(config(), None)(model_output=part, data=one)[0])
    assert parts == pytest.approx(float(loss.detach()), rel=1e-6)


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preference": {"beta": 0.0}}, "preference.beta"),
        ({"preference": {"beta": -1.0}}, "preference.beta"),
        ({"preference": {"beta_final": 0.0}}, "preference.beta_final"),
        ({"preference": {"pair_filter": "right"}}, "correct_pos_wrong_neg"),
        ({"sequences": {"source": "student_rollouts"}}, "sequences.source"),
        ({"carrier": "loss"}, "sequences.source"),
        ({"coefficient": 0.5}, "coefficient"),
        ({"teacher": {"kind": "ema"}}, "live or frozen"),
        ({"teacher": {"kind": "synced"}}, "live or frozen"),
        ({"sequences": {"positive": "reference"}}, "frozen or external"),
        ({"context": {"kind": "sibling"}}, "context.kind"),
        ({"divergence": {"support": "student_topk", "tail": True}}, "divergence.support"),
        ({"weighting": {"alpha": 0.5, "beta": 0.5}}, "weighting.rates"),
    ],
)
def test_settings_that_do_not_make_pairs_are_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(**changes)


def test_beta_goes_linearly_to_its_final_value() -> None:
    assert PreferenceConfig(beta=0.1).beta_at(7, 10) == 0.1
    falling = PreferenceConfig(beta=0.5, beta_final=0.1)
    assert [falling.beta_at(step, 5) for step in (1, 3, 5)] == pytest.approx([0.5, 0.3, 0.1])
    assert falling.beta_at(1, 1) == 0.5


def test_the_passes_of_a_step_with_pairs() -> None:
    block = config()
    assert block.pairs and not block.divergence_loss and not block.policy_gradient
    assert not block.student_pass, "the pair pass is the student's, after the teacher's"
    assert block.teacher_states == "hidden_states"
    cheap = config(divergence={"kind": "sampled_token"})
    assert cheap.one_token and cheap.teacher_states == "log_probs" and not cheap.student_pass


def test_a_step_without_any_pair_names_the_reasons() -> None:
    warnings: list[str] = []
    settings = OmegaConf.merge(rollout(response_length=8), {"run": {"steps": 3}})
    step = PairStep(config(preference={"pair_filter": "correct_pos"}), settings, warnings.append)
    assert warnings.pop().startswith("the self-check of the pairs is off")
    rows = SimpleNamespace(
        batch=batch({"a": [(0, 0.0), (1, 0.0)], "b": [(0, 1.0), (1, 0.0)]}, response_lengths=[5, 5, 8, 5])
    )
    plan = SimpleNamespace(distill_N=torch.ones(4, dtype=torch.bool), weights_N=torch.ones(4))
    assert step.plan(rows, plan, 2).positive_P == []
    (message,) = warnings
    assert message == "step 2 makes no update: no pair trains; left out: {'cut': 1, 'filtered': 1}"
