"""The plan of a train batch: pass rates, weights, contexts and masks from plain columns."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl_ext.batch_plan import RowBatch, is_padding_row, plan_batch
from verl_ext.compaction import keep_rows
from verl_ext.config import ContextConfig, WeightingConfig

UNIFORM = WeightingConfig(alpha=0.0, beta=0.0)
SC_SDPO = WeightingConfig(alpha=0.5, beta=0.5)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


TOKENIZER = byte_tokenizer()


def batch_of(*groups: str, **columns) -> RowBatch:
    """One group a string, one rollout a character: 1 right, 0 wrong, e verifier error."""
    rows = [(q, r, mark) for q, group in enumerate(groups) for r, mark in enumerate(group)]
    values = {
        "uids": [f"uid{q}" for q, _, _ in rows],
        "rollout_index": [r for _, r, _ in rows],
        "rewards": [1.0 if mark == "1" else 0.0 for _, _, mark in rows],
        "errors": [mark == "e" for _, _, mark in rows],
        "responses": [f"q{q} rollout {r}" for q, r, _ in rows],
        "feedback": None,
        "raw_prompts": [[{"role": "user", "content": f"question {q}"}] for q, _, _ in rows],
        "prompt_lengths": [10] * len(rows),
        "response_lengths": [20] * len(rows),
    }
    return RowBatch(**(values | columns))


def take(batch: RowBatch, order: list[int]) -> RowBatch:
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return RowBatch(**{name: None if c is None else [c[i] for i in order] for name, c in columns.items()})


def plan(batch: RowBatch, weighting=UNIFORM, context=None, **arguments):
    return plan_batch(batch, weighting=weighting, context=context or ContextConfig(), tokenizer=TOKENIZER, **arguments)


@pytest.mark.parametrize(("successes", "rows"), [(0, 0), (1, 7), (2, 8), (7, 8), (8, 8)])
def test_rows_distilled_at_g_8(successes, rows):
    result = plan(batch_of("1" * successes + "0" * (8 - successes)))
    assert int(result.distill_N.sum()) == rows
    assert [ids is not None for ids in result.teacher_prompt_ids_N] == result.distill_N.tolist()


@pytest.mark.parametrize(("successes", "rows"), [(0, 0), (1, 8), (2, 8), (8, 8)])
def test_rows_distilled_at_g_8_where_own_success_serves(successes, rows):
    result = plan(batch_of("1" * successes + "0" * (8 - successes)), context=ContextConfig(own_success=True))
    assert int(result.distill_N.sum()) == rows


def test_a_group_of_one_distils_nothing():
    assert not plan(batch_of("1", "0")).distill_N.any()


def test_uniform_weights_are_exactly_one():
    result = plan(batch_of("0000", "1000", "1111", "1100"))
    assert result.weights_N.dtype == torch.float32
    assert result.weights_N.tolist() == [1.0] * 16


def test_sc_sdpo_weights_of_the_worked_example():
    # pass rates 0, 1/8, 1/2, 1 → 0, 1.592447, 2.407553, 0 with the mean as normaliser
    result = plan(batch_of("0" * 8, "1" + "0" * 7, "1111" + "0000", "1" * 8), SC_SDPO)
    assert result.weights_N[::8].tolist() == pytest.approx([0.0, 1.592447, 2.407553, 0.0], abs=1e-6)
    assert result.question_weights_P.dtype == torch.float64
    assert result.metrics["weight/mean"] == pytest.approx(1.0)
    assert result.metrics["weight/largest"] == pytest.approx(2.407553, abs=1e-6)
    assert result.metrics["weight/active_share"] == 0.5
    assert result.metrics["weight/effective_sample_size"] == pytest.approx(1.920, abs=1e-3)
    # solved questions keep their context, and weight 0 leaves them out of the forward passes
    assert result.distill_N.tolist() == [False] * 9 + [True] * 23
    kept = keep_rows(result.weights_N, result.distill_N, coefficient=1.0)
    assert kept.sum() == 7 + 8


def test_an_all_zero_batch_has_no_rows_to_forward():
    result = plan(batch_of("0000", "1111"), SC_SDPO)
    assert result.weights_N.tolist() == [0.0] * 8
    assert not keep_rows(result.weights_N, result.distill_N, coefficient=1.0).any()


def test_a_verifier_error_is_neither_wrong_nor_a_demonstration():
    batch = batch_of("e100", rewards=[1.0, 1.0, 0.0, 0.0])  # the error row even carries a reward
    result = plan(batch, SC_SDPO)
    assert result.pass_rates.rates_P.tolist() == pytest.approx([1 / 3])
    assert result.demonstrations_N == [1, None, 1, 1]
    assert result.metrics["pass_rate/rows_with_verifier_error"] == 1
    # not even where every reward is a success
    assert plan(batch_of("e00"), context=ContextConfig(success_threshold=0.0)).demonstrations_N == [1, 2, 1]


def test_a_question_without_a_verdict_has_weight_zero_and_no_part_in_the_normaliser():
    with_broken = plan(batch_of("1100", "eeee", "1000"), SC_SDPO)
    without = plan(batch_of("1100", "1000"), SC_SDPO)
    assert with_broken.weights_N[4:8].tolist() == [0.0] * 4
    assert torch.equal(with_broken.weights_N[[0, 8]], without.weights_N[[0, 4]])
    assert math.isnan(float(with_broken.pass_rates.rates_P[1]))
    assert with_broken.metrics["pass_rate/unmeasured"] == 1
    assert with_broken.metrics["weight/mean"] == pytest.approx(1.0)
    assert plan(batch_of("eeee", "1100")).weights_N.tolist() == [0.0] * 4 + [1.0] * 4
    assert plan(batch_of("eeee"), SC_SDPO).weights_N.tolist() == [0.0] * 4


def test_a_broken_reward_that_is_not_marked_is_refused_and_a_marked_one_is_not_looked_at():
    with pytest.raises(ValueError, match=r"row 1 \(uid uid0, rollout 1\): reward nan"):
        batch_of("10", rewards=[1.0, float("nan")])
    marked = plan(batch_of("1e0", rewards=[1.0, float("nan"), 0.0]))
    assert marked.demonstrations_N == [None, 0, 0]


def test_feedback_of_a_broken_verifier_is_not_shown_to_the_teacher():
    context = ContextConfig(feedback=True)
    result = plan(batch_of("e0", feedback=["Traceback", "off by one"]), context=context)
    assert result.used_feedback_N == [False, True] and result.distill_N.tolist() == [False, True]


def test_pass_rate_and_pool_share_one_threshold():
    batch = batch_of("000", rewards=[0.7, 0.69, 0.2])
    result = plan(batch, context=ContextConfig(success_threshold=0.7))
    assert result.pass_rates.rates_P.tolist() == pytest.approx([1 / 3])
    assert result.demonstrations_N == [None, 0, 0]
    # a float32 reward of 0.7 meets a threshold of 0.7 whatever the column's type
    single = np.array([0.7, 0.69, 0.2], dtype=np.float32)
    for rewards in (single, torch.from_numpy(single), single.tolist(), np.array([0.7, 0.69, 0.2])):
        found = plan(batch_of("000", rewards=rewards), context=ContextConfig(success_threshold=0.7))
        assert found.demonstrations_N == [None, 0, 0]


def test_verls_padding_rows_carry_nothing_and_are_counted_nowhere():
    real = batch_of("1000", "1100")
    order = [0, *range(8), 1]
    # padding rows are copies of a real row with a uid of their own
    padded = take(real, order)
    pad = [True] + [False] * 8 + [True]
    padded = replace(padded, uids=[f"pad{u}" if p else u for u, p in zip(padded.uids, pad, strict=True)])
    plain = plan(real, SC_SDPO)
    for batch in (padded, replace(padded, padding=pad), replace(padded, uids=take(real, order).uids, padding=pad)):
        result = plan(batch, SC_SDPO)
        assert result.weights_N[[0, 9]].tolist() == [0.0, 0.0] and not result.distill_N[[0, 9]].any()
        assert result.question_index_N[[0, 9]].tolist() == [-1, -1]
        assert result.teacher_prompt_ids_N[0] is None and result.teacher_prompt_ids_N[9] is None
        assert torch.equal(result.weights_N[1:9], plain.weights_N)
        assert result.teacher_prompt_ids_N[1:9] == plain.teacher_prompt_ids_N
        assert result.demonstrations_N[1:9] == [None if d is None else d + 1 for d in plain.demonstrations_N]
        assert result.metrics == plain.metrics


def test_padding_is_recognised_by_tag_or_uid():
    assert is_padding_row("x", {"is_padding": True}) and is_padding_row("pad0a1b")
    assert not is_padding_row("0a1bpad", {"is_padding": False}) and not is_padding_row("0a1b")


def test_a_batch_of_padding_only():
    result = plan(batch_of("10", padding=[True, True]), SC_SDPO)
    assert result.weights_N.tolist() == [0.0, 0.0] and not result.distill_N.any()


def test_too_long_rows_are_left_out_and_counted():
    full = len(plan(batch_of("10")).teacher_prompt_ids_N[1])
    assert plan(batch_of("10"), max_total=full + 20).distill_N.tolist() == [False, True]
    for result in (
        plan(batch_of("10"), max_total=full + 19),
        plan(batch_of("10"), context=ContextConfig(max_length=full - 1)),
    ):
        assert not result.distill_N.any() and result.teacher_prompt_ids_N == [None, None]
        assert result.metrics["context/too_long"] == 1
        assert result.weights_N.tolist() == [1.0, 1.0]


def test_without_context_the_teacher_reads_the_students_prompt():
    context = ContextConfig(kind="none")
    rendered = plan(batch_of("10", "0"), context=context)
    assert rendered.distill_N.all() and TOKENIZER.decode(rendered.teacher_prompt_ids_N[2]) == "[user]question 1>"
    given_ids = plan(batch_of("10", prompt_ids=[[1, 2], [1, 2]]), context=context)
    assert given_ids.teacher_prompt_ids_N == [[1, 2], [1, 2]] and given_ids.demonstrations_N == [None, None]
    too_long = plan(batch_of("10", prompt_ids=[[1, 2], [1]]), context=replace(context, max_length=1))
    assert too_long.distill_N.tolist() == [False, True] and too_long.metrics["context/too_long"] == 1


@pytest.mark.parametrize("kind", ["sibling", "reference"])
def test_the_teacher_s_template_arguments_are_laid_over_the_student_s(kind):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}|{{ mood }}{{ style }}{{ '<think>' if enable_thinking }}"
    batch = batch_of("10", extra_infos=[{"solution": "S"}] * 2)
    student = {"enable_thinking": False, "mood": "calm"}

    def end_of(template_kwargs):
        context = ContextConfig(kind=kind, template_kwargs=template_kwargs)
        result = plan_batch(
            batch, weighting=UNIFORM, context=context, tokenizer=tokenizer, template_kwargs=dict(student)
        )
        return tokenizer.decode(result.teacher_prompt_ids_N[1]).rpartition("|")[2]

    assert end_of({}) == "calm"
    assert end_of({"enable_thinking": True, "style": "bold"}) == "calmbold<think>"


REVISION = ContextConfig(kind="revision", phrase_right="R", phrase_wrong="W")


def test_a_revision_shows_the_row_s_own_attempt_and_the_phrase_of_its_reward():
    result = plan(batch_of("10e", "1"), context=REVISION)
    texts = [None if ids is None else TOKENIZER.decode(ids) for ids in result.teacher_prompt_ids_N]
    assert texts == [
        "[user]question 0>q0 rollout 0\n\nR\n\n",
        "[user]question 0>q0 rollout 1\n\nW\n\n",
        None,  # the verifier failed: neither right nor wrong
        "[user]question 1>q1 rollout 0\n\nR\n\n",
    ]
    assert result.distill_N.tolist() == [True, True, False, True] and result.demonstrations_N == [None] * 4
    names = ("rows", "phrase_right", "phrase_wrong", "without_verdict", "distilled")
    assert [result.metrics[f"context/{name}"] for name in names] == [4, 2, 1, 1, 3]
    user = plan(batch_of("0"), context=replace(REVISION, placement="user"))
    assert TOKENIZER.decode(user.teacher_prompt_ids_N[0]) == "[user]question 0\n\nq0 rollout 0\n\nW>"


def test_a_revision_follows_the_threshold_the_limits_and_the_order_and_skips_padding():
    batch = batch_of("0101", "e0", rewards=[0.0, 0.7, 0.3, 1.0, 1.0, 0.0], uids=["a"] * 4 + ["pad1", "b"])
    context = replace(REVISION, success_threshold=0.7)
    result = plan(batch, context=context)
    assert [ids and TOKENIZER.decode(ids)[-3] for ids in result.teacher_prompt_ids_N] == ["W", "R", "W", "R", None, "W"]
    assert result.metrics["context/rows"] == 5 and result.metrics["context/without_verdict"] == 0
    order = [5, 3, 0, 4, 2, 1]
    mixed = plan(take(batch, order), context=context)
    assert mixed.teacher_prompt_ids_N == [result.teacher_prompt_ids_N[i] for i in order]
    length = len(result.teacher_prompt_ids_N[0])
    too_long = plan(batch, context=context, max_total=length + 19)
    assert not too_long.distill_N.any() and too_long.metrics["context/too_long"] == 5
    with pytest.raises(ValueError, match="resolve_phrases"):
        plan(batch, context=ContextConfig(kind="revision"))


def test_distillation_off_renders_nothing():
    def never(*_, **__):
        raise AssertionError("a prompt was rendered")

    class Refusing:
        apply_chat_template = never

    result = plan_batch(
        batch_of("1100"), weighting=UNIFORM, context=ContextConfig(), tokenizer=Refusing(), enabled=False
    )
    assert not result.distill_N.any() and result.pass_rates.rates_P.tolist() == [0.5]


def test_metrics_are_plain_numbers_with_safe_names():
    context = ContextConfig(feedback=True)
    metrics = plan(batch_of("1100", "e000", "1111"), SC_SDPO, context=context).metrics
    assert all(type(value) is float for value in metrics.values())
    assert not [name for name in metrics if "max" in name or "min" in name]
    assert metrics["pass_rate/questions"] == 3
    assert [metrics[f"pass_rate/successes_{k:02d}"] for k in range(5)] == [1, 0, 1, 0, 1]
    assert metrics["context/no_success"] == 1 and metrics["context/distilled"] == 8


def test_errors_name_the_row_of_the_batch():
    broken = batch_of("10", "10")
    broken = replace(broken, raw_prompts=[*broken.raw_prompts[:3], [{"role": "assistant", "content": "?"}]])
    with pytest.raises(ValueError, match=r"row 3 \(uid uid1, rollout 1\)"):
        plan(broken)
    with pytest.raises(ValueError, match="column responses has 1 entries for 2 rows"):
        batch_of("10", responses=["x"])
    with pytest.raises(ValueError, match="response_lengths is -1"):
        batch_of("10", response_lengths=[5, -1])
    with pytest.raises(ValueError, match="'other'"):
        plan(batch_of("10"), context=ContextConfig(kind="other"))
    with pytest.raises(ValueError, match="question_id 'b'"):
        plan(batch_of("10", question_ids=["a", "b"]))


def test_a_random_choice_follows_the_question_id_and_not_the_uid_of_one_sampling():
    context = ContextConfig(demonstration="random")
    groups = ["11110000"] * 20
    ids = [f"question {q}" for q in range(20) for _ in range(8)]
    first = batch_of(*groups, question_ids=ids)
    again = replace(first, uids=[f"another {uid}" for uid in first.uids])
    chosen = plan(first, context=context, seed=3, step=5).demonstrations_N
    assert plan(again, context=context, seed=3, step=5).demonstrations_N == chosen
    assert plan(first, context=context, seed=4, step=5).demonstrations_N != chosen
    assert plan(first, context=context, seed=3, step=6).demonstrations_N != chosen


@given(
    st.lists(st.text("10e", min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from(["first", "random", "shortest"]),
    st.sampled_from([UNIFORM, SC_SDPO, WeightingConfig(alpha=1.0, beta=1.0, normalizer="mean_active", cap=1.2)]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=80, deadline=None)
def test_the_plan_of_a_row_does_not_depend_on_the_order_of_the_rows(groups, choice, weighting, random):
    count = sum(map(len, groups))
    lengths = [random.randint(1, 4) for _ in range(count)]
    feedback = [random.choice([None, "", "wrong"]) for _ in range(count)]
    batch = batch_of(*groups, response_lengths=lengths, feedback=feedback)
    context = ContextConfig(demonstration=choice, feedback=True)
    order = random.sample(range(count), count)
    plain, mixed = plan(batch, weighting, context), plan(take(batch, order), weighting, context)
    assert torch.equal(mixed.weights_N, plain.weights_N[order])
    assert torch.equal(mixed.distill_N, plain.distill_N[order])
    assert mixed.teacher_prompt_ids_N == [plain.teacher_prompt_ids_N[i] for i in order]
    assert [None if d is None else order[d] for d in mixed.demonstrations_N] == [
        plain.demonstrations_N[i] for i in order
    ]
    # as text, so that a rate that was not measured equals itself
    assert {k: repr(v) for k, v in mixed.metrics.items()} == {k: repr(v) for k, v in plain.metrics.items()}
