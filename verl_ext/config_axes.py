"""The axes of the method frame, one dataclass each; see :mod:`verl_ext.config` for the block they make up."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from verl_ext.config_values import ConfigError, fail, number, one_of, optional_number
from verl_ext.contexts import FEEDBACK_TEMPLATE, REPROMPT_TEMPLATE, RESERVED_TEMPLATE_KWARGS, SOLUTION_TEMPLATE
from verl_ext.reference_context import REFERENCE_TEMPLATE, ReferenceTemplate
from verl_ext.revision import PHRASES, PLACEMENTS

NORMALIZERS = ("none", "mean", "mean_active", "half", "max", "constant")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mixed", "akl", "sampled_token")
SUPPORTS = ("student_topk", "teacher_topk", "full")
CLIP_LEVELS = ("entry", "token")
INPUTS = ("auto", "logits", "hidden_states")
TEACHERS = ("ema", "frozen", "live", "synced", "trust_region", "external")
TEACHER_STATES = ("auto", "log_probs", "hidden_states")
CONTEXTS = ("sibling", "reference", "revision", "none")
SOURCES = ("student_rollouts", "reference", "pairs")
POSITIVES = ("teacher", "reference")
PAIR_LOG_PROBS = ("sum", "mean")
STAGED = ("sequences", "context", "divergence", "weighting")
"""Blocks that may change between stages; teacher and worker layout stay."""
KERNELS = ("beta", "interval", "gaussian")
RATES = ("batch", "store", "running")
DEMONSTRATIONS = ("first", "random", "shortest")
AGGREGATIONS = ("seq-mean-token-mean", "token-mean")
ON_NEGATIVE_GAP = ("warn", "stop", "ignore")
PAIR_FILTERS = ("none", "correct_pos", "correct_pos_wrong_neg", "bt_reward")


_OWN_KIND = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass
class SequencesConfig:
    """Which sequences are scored.

    Attributes:
        source: ``student_rollouts``; ``reference``: texts of the data set or of the teacher, replayed as responses; or
            ``pairs``: beside every student rollout a sample of the teacher with its context (PBSD), so that half of a
            question's rollouts are the teacher's.
        reference_key: key of ``extra_info`` that holds those texts, one or a list of them; rollout i of a question
            replays text i modulo their number.
        positive: where a pair's teacher sample comes from: ``teacher``, drawn on the rollout servers from the weights
            that are scored (a live teacher, or a frozen one that is the model without its adapter), or ``reference``,
            drawn beforehand and replayed from ``reference_key`` (frozen and external teachers).
    """

    source: str = "student_rollouts"
    reference_key: str = "solution"
    positive: str = "teacher"

    @property
    def replays(self) -> bool:
        """Whether texts under ``reference_key`` are needed."""
        return self.source == "reference" or (self.source == "pairs" and self.positive == "reference")

    def validate(self) -> None:
        one_of("sequences.source", self.source, SOURCES)
        one_of("sequences.positive", self.positive, POSITIVES)
        if not self.reference_key:
            fail("sequences.reference_key", self.reference_key, "a key of extra_info")


@dataclass
class TeacherConfig:
    """Whose weights the teacher has, and what it leaves for the update.

    Attributes:
        kind: ``ema`` (own fp32 copy, moved once per trainer step), ``frozen`` (own copy of the starting weights; under
            LoRA the student with its adapter off), ``live`` (the student's current weights, no second copy), ``synced``
            (own copy, replaced by the student's weights every ``sync_every`` steps), ``trust_region`` (logits
            (1 - tau) frozen + tau student, SDPO), ``external`` (the checkpoint ``path``, over the same vocabulary).
        update_rate: tau. ``ema``: teacher <- (1 - tau) teacher + tau student (SDPO: 0.05); ``trust_region``: the
            student's share of the logits.
        sync_every: trainer steps between two copies of the student, for ``synced``.
        sync_limit: so many copies at most (SD-Zero's iterative self-evolution: one); None: no limit.
        path: model folder or hub name, for ``external``.
        states: what the teacher pass keeps of a row until the update. ``log_probs`` on a support (8 K bytes a token),
            or ``hidden_states`` before the head (2 D bytes a token in bf16, and one copy of the head): the update then
            makes the teacher's logits itself, in chunks, so the support may be the student's of that very update, or
            the whole vocabulary. ``auto``: log_probs for ``teacher_topk`` and ``sampled_token``, else hidden_states.
        offload: keep the copy in host memory and load it once per pass; the states go there too.
        workers: so many workers (devices) of its own on each of ``nodes`` nodes, for ``external``; their product must
            divide the student's ranks. None: it stands beside the student, on the same devices.
        self_check_tolerance: largest mean divergence, in nats, between teacher and student on equal prompts before the
            first step. A larger one stops the run. Not looked at for ``external``.
        on_negative_gap: what to do when the teacher with its context finds the student's right answers *less* likely
            than the student does: ``warn``, ``stop`` or ``ignore``.
    """

    kind: str = "ema"
    update_rate: float = 0.05
    sync_every: int = 1
    sync_limit: int | None = None
    path: str | None = None
    states: str = "auto"
    offload: bool = False
    workers: int | None = None
    nodes: int = 1
    self_check_tolerance: float = 1e-3
    on_negative_gap: str = "warn"

    @property
    def beside(self) -> bool:
        """Whether it is on the student's devices."""
        return self.workers is None

    @property
    def has_own_weights(self) -> bool:
        """Whether a second model is built beside the student."""
        return self.kind != "live" and self.beside

    @property
    def moves(self) -> bool:
        """Whether its own weights follow the student: they are kept in fp32 and in the checkpoints."""
        return self.kind in ("ema", "synced")

    def rate_after(self, step: int) -> float:
        """tau of the move after trainer step ``step`` (from 1): 0 leaves it, 1 copies the student."""
        if self.kind == "ema":
            return self.update_rate
        due = self.kind == "synced" and step % self.sync_every == 0
        return float(due and (self.sync_limit is None or step // self.sync_every <= self.sync_limit))

    def validate(self) -> None:
        one_of("teacher.kind", self.kind, TEACHERS)
        number("teacher.update_rate", self.update_rate, 0.0, 1.0)
        number("teacher.sync_every", self.sync_every, 1)
        optional_number("teacher.sync_limit", self.sync_limit, 1)
        if self.sync_limit is not None and self.kind != "synced":
            fail("teacher.sync_limit", self.sync_limit, "null, or a number with kind=synced")
        if (self.kind == "external") != (self.path is not None):
            fail("teacher.path", self.path, "a model folder or hub name with kind=external, null otherwise")
        optional_number("teacher.workers", self.workers, 1)
        number("teacher.nodes", self.nodes, 1)
        if self.workers is not None and self.kind != "external":
            fail("teacher.workers", self.workers, "null, or a number with kind=external, whose weights stand still")
        one_of("teacher.states", self.states, TEACHER_STATES)
        number("teacher.self_check_tolerance", self.self_check_tolerance, 0.0)
        one_of("teacher.on_negative_gap", self.on_negative_gap, ON_NEGATIVE_GAP)


@dataclass
class ContextConfig:
    """What the teacher reads in place of the last user turn (SDPO's `self_distillation` block and its templates).

    Attributes:
        kind: ``sibling`` (a successful rollout of the same group, and feedback if switched on), ``reference`` (the data
            set's own solution), ``revision`` (the row's own attempt and a phrase that its reward chooses, SD-Zero) or
            ``none``.
        demonstration: which success serves: ``first`` in rollout order, ``random`` or ``shortest``.
        own_success: may a right row be its own demonstration.
        success_threshold: reward from which a rollout counts as a success; also the threshold of the pass rate.
        remove_thinking: delete thinking blocks from demonstrations and solutions.
        feedback: use the row's own feedback text.
        feedback_only_without_solution: ... only where the row has no demonstration.
        max_length: longest teacher prompt in tokens. Longer ones are left out and counted, never cut.
        reference_key: key of ``extra_info`` that holds the solution, for ``reference``.
        reference_template: the user turn of the teacher's prompt, for ``reference``; it may use {prompt}, {problem} and
            must use {solution}.
        phrases: whose control phrases stand between attempt and revision, for ``revision``: ``auto`` (those of the
            model's family), ``paper``, ``qwen`` or ``olmo``.
        phrase_right, phrase_wrong: the phrase after a right and after a wrong attempt; None: that of ``phrases``, which
            is put here before a run starts.
        placement: where attempt and phrase stand, for ``revision``: they begin the ``assistant``'s turn, or end the
            ``user``'s (the public code's second stage of fine-tuning).
        template_kwargs: arguments of the chat template for the teacher's prompt only, laid over
            ``data.apply_chat_template_kwargs`` (OPSD: enable_thinking true, the student's is false). Not for
            ``revision``, which goes on after the student's own turn, nor ``none``, which reads the student's tokens.
    """

    kind: str = "sibling"
    demonstration: str = "first"
    own_success: bool = False
    remove_thinking: bool = True
    success_threshold: float = 0.5
    feedback: bool = False
    feedback_only_without_solution: bool = True
    max_length: int = 10240
    reprompt_template: str = REPROMPT_TEMPLATE
    solution_template: str = SOLUTION_TEMPLATE
    feedback_template: str = FEEDBACK_TEMPLATE
    reference_key: str = "solution"
    reference_template: str = REFERENCE_TEMPLATE
    phrases: str = "auto"
    phrase_right: str | None = None
    phrase_wrong: str | None = None
    placement: str = "assistant"
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        one_of("context.kind", self.kind, CONTEXTS)
        self._validate_template_kwargs()
        one_of("context.demonstration", self.demonstration, DEMONSTRATIONS)
        number("context.max_length", self.max_length, 1)
        for key, names in (
            ("reprompt_template", ("prompt", "solution", "feedback")),
            ("solution_template", ("successful_previous_attempt",)),
            ("feedback_template", ("feedback_raw",)),
        ):
            text = getattr(self, key)
            for name in names:
                if "{" + name + "}" not in text:
                    fail(f"context.{key}", text, "a template that holds {" + name + "}")
        try:
            ReferenceTemplate(self.reference_template)
        except ValueError as error:
            raise ConfigError(f"distill.context.{error}") from error
        one_of("context.phrases", self.phrases, ("auto", *PHRASES))
        for key in ("phrase_right", "phrase_wrong"):
            text = getattr(self, key)
            if text is not None and not text.strip():
                fail(f"context.{key}", text, "a phrase, or null for that of context.phrases")
        one_of("context.placement", self.placement, PLACEMENTS)

    def _validate_template_kwargs(self) -> None:
        reserved = [name for name in RESERVED_TEMPLATE_KWARGS if name in self.template_kwargs]
        if reserved:
            fail("context.template_kwargs", self.template_kwargs, f"no {reserved[0]}, which is not the template's")
        if self.template_kwargs and self.kind in ("none", "revision"):
            fail("context.template_kwargs", self.template_kwargs, f"empty with kind={self.kind}, where the teacher "
                 "reads the student's own prompt")  # fmt: skip


@dataclass
class DivergenceConfig:
    """The distance between teacher and student at one position, and what a row's tokens are multiplied by.

    Attributes:
        kind: ``forward_kl`` KL(teacher||student), ``reverse_kl`` KL(student||teacher), ``jsd`` with ``alpha``,
            ``mixed`` alpha forward + (1 - alpha) reverse, ``akl``, ``sampled_token`` (REINFORCE form of the reverse KL
            at the sampled token; no support), or ``package.module:function`` of your own.
        support: ``student_topk`` or ``teacher_topk``: the ``topk`` most likely tokens of one side; ``full``: the whole
            vocabulary.
        tail: gather the rest of the vocabulary into one outcome; otherwise both sides are renormalised. Not with full.
        clip, clip_level: upper limit of every ``entry`` before the sum, or of the ``token``'s sum (OPSD: 0.05, entry).
        inputs: from where the update reads the student: its ``logits`` (verl's logits processor), or ``hidden_states``
            inside the head's forward, so that no logits of the whole micro-batch exist. ``auto``: hidden_states for
            the full vocabulary, else logits.
        aggregation: ``seq-mean-token-mean`` (mean over tokens, then over all rows of the mini-batch) or ``token-mean``.
        ratio_clip: SDPO's ``is_clip``: tokens are multiplied by min(pi / pi_old, ratio_clip), detached. None: off. The
            ratio is 1 where a batch is one optimiser step.
        rollout_correction: multiply by the truncated rollout-to-train ratio where ``algorithm.rollout_correction`` asks
            for one.
        skip_tokens: so many tokens at the beginning of every response carry no loss and are in no denominator (SDFT:
            3). Statistics of rows are of the whole response.
    """

    kind: str = "jsd"
    alpha: float = 0.5
    support: str = "student_topk"
    topk: int = 100
    tail: bool = True
    clip: float | None = None
    clip_level: str = "entry"
    inputs: str = "auto"
    aggregation: str = "seq-mean-token-mean"
    ratio_clip: float | None = None
    rollout_correction: bool = True
    skip_tokens: int = 0

    def validate(self) -> None:
        number("divergence.skip_tokens", self.skip_tokens, 0)
        if not _OWN_KIND.fullmatch(self.kind):
            one_of("divergence.kind", self.kind, DIVERGENCES)
        number("divergence.alpha", self.alpha, 0.0, 1.0)
        one_of("divergence.support", self.support, SUPPORTS)
        number("divergence.topk", self.topk, 1)
        if self.support == "full" and self.tail and self.kind != "sampled_token":
            fail("divergence.tail", True, "false with divergence.support=full, which leaves nothing outside")
        optional_number("divergence.clip", self.clip, 0.0, above=True)
        one_of("divergence.clip_level", self.clip_level, CLIP_LEVELS)
        if self.clip is not None and self.kind == "sampled_token":
            fail("divergence.clip", self.clip, "null with kind=sampled_token, which has no entries")
        one_of("divergence.inputs", self.inputs, INPUTS)
        one_of("divergence.aggregation", self.aggregation, AGGREGATIONS)
        optional_number("divergence.ratio_clip", self.ratio_clip, 0.0, above=True)


@dataclass
class PreferenceConfig:
    """PBSD's logistic loss on pairs, with ``carrier=preference`` (arXiv 2605.05040, Eq. 10).

    Attributes:
        beta: factor of the margin, above 0.
        beta_final: its value at the last step, reached linearly from ``beta``; None: constant.
        pair_filter: ``none`` (the paper), or an extension of ours: ``correct_pos`` (y+ is right),
            ``correct_pos_wrong_neg`` (and y- is wrong), ``bt_reward`` (label sigma(r+ - r-), whose fixed point is the
            teacher reweighted by exp(r / beta)).
        log_prob: a response's log-probability is the ``sum`` over its tokens or their ``mean`` (beta then wants to be
            larger by about the length).
    """

    beta: float = 0.1
    beta_final: float | None = None
    pair_filter: str = "none"
    log_prob: str = "sum"

    def beta_at(self, step: int, steps: int) -> float:
        """beta of trainer step ``step``, from 1 to ``steps``."""
        if self.beta_final is None or steps <= 1:
            return self.beta
        return self.beta + (self.beta_final - self.beta) * (step - 1) / (steps - 1)

    def validate(self) -> None:
        number("preference.beta", self.beta, 0.0, above=True)
        optional_number("preference.beta_final", self.beta_final, 0.0, above=True)
        one_of("preference.pair_filter", self.pair_filter, PAIR_FILTERS)
        one_of("preference.log_prob", self.log_prob, PAIR_LOG_PROBS)


@dataclass
class WeightingConfig:
    """Question weight, a normalised function of the pass rate (SC-SDPO: alpha = beta = 1/2; PACED: 1; SDPO: 0).

    Attributes:
        kernel: ``beta``: p^alpha (1-p)^beta; ``interval``: 1 from ``low`` to ``high``, else 0 (PACED's hard filter);
            ``gaussian``: around ``centre`` with standard deviation ``width``.
        rates: whose pass rates: those of the ``batch``; of a ``store``, fixed until they are taken again (PACED:
            questions of weight 0 are not sampled, and the normaliser runs over the training set); or a ``running``
            estimate, updated with every batch.
        store: folder of ``recipe.pass_rates``. None with rates=store: the run takes them before its first step.
        samples: rollouts per question where the run itself takes pass rates.
        recompute_every: steps after which the run takes them again with its present weights.
        recompute_at: the same once, at this fraction of the run (PACED's ablation: 0.5).
        decay: of older evidence in the running estimate, per batch that holds the question.
        normalizer: see :func:`verl_ext.weighting.question_weights`. SC-SDPO's own is unknown; ``mean`` keeps the
            learning rate's scale.
        cap: largest weight, applied last.
        floor_zero, floor_one: smallest kernel value at p = 0 and p = 1.
        constant: the given mean for the normaliser ``constant``.
    """

    alpha: float = 0.0
    beta: float = 0.0
    normalizer: str = "mean"
    cap: float | None = None
    floor_zero: float | None = None
    floor_one: float | None = None
    constant: float | None = None
    kernel: str = "beta"
    low: float = 0.2
    high: float = 0.8
    centre: float = 0.5
    width: float = 0.2
    rates: str = "batch"
    store: str | None = None
    samples: int = 8
    recompute_every: int | None = None
    recompute_at: float | None = None
    decay: float = 0.9

    @property
    def ignores_rates(self) -> bool:
        """Whether every question counts the same, whatever its pass rate."""
        floors = self.floor_zero is not None or self.floor_one is not None
        return self.kernel == "beta" and self.alpha == 0 and self.beta == 0 and not floors

    def validate(self) -> None:
        one_of("weighting.kernel", self.kernel, KERNELS)
        number("weighting.low", self.low, 0.0, 1.0)
        number("weighting.high", self.high, 0.0, 1.0)
        if self.low > self.high:
            fail("weighting.low", self.low, f"a number up to weighting.high={self.high}")
        number("weighting.centre", self.centre, 0.0, 1.0)
        number("weighting.width", self.width, 0.0, above=True)
        self._validate_rates()
        number("weighting.alpha", self.alpha, 0.0)
        number("weighting.beta", self.beta, 0.0)
        one_of("weighting.normalizer", self.normalizer, NORMALIZERS)
        optional_number("weighting.cap", self.cap, 0.0, above=True)
        optional_number("weighting.floor_zero", self.floor_zero, 0.0)
        optional_number("weighting.floor_one", self.floor_one, 0.0)
        optional_number("weighting.constant", self.constant, 0.0, above=True)
        if (self.normalizer == "constant") != (self.constant is not None):
            fail("weighting.constant", self.constant, "a positive number with normalizer=constant, null otherwise")

    def _validate_rates(self) -> None:
        one_of("weighting.rates", self.rates, RATES)
        number("weighting.samples", self.samples, 1)
        number("weighting.decay", self.decay, 0.0, 1.0, above=True)
        optional_number("weighting.recompute_every", self.recompute_every, 1)
        if self.recompute_at is not None and not 0 < self.recompute_at < 1:
            fail("weighting.recompute_at", self.recompute_at, "a fraction between 0 and 1, or null")
        for key in ("store", "recompute_every", "recompute_at"):
            if getattr(self, key) is not None and self.rates != "store":
                fail(f"weighting.{key}", getattr(self, key), f"null with weighting.rates={self.rates}")


@dataclass
class ScheduleConfig:
    """A run of two stages (PACED: forward KL along reference text, then reverse KL along student rollouts).

    Attributes:
        switch: fraction of the run's steps after which the second stage begins; None: one stage.
        second: what the second stage changes in the ``distill`` block, e.g. {divergence: {kind: reverse_kl}}; all else
            stays as in the first (a store too: rates=batch needs store=null beside it).
        recompute_pass_rates: take the pass rates again at the switch, where they come from a store (PACED).
    """

    switch: float | None = None
    second: dict[str, Any] = field(default_factory=dict)
    recompute_pass_rates: bool = True

    def validate(self) -> None:
        if self.switch is not None and not 0 < self.switch < 1:
            fail("schedule.switch", self.switch, "a fraction between 0 and 1, or null for one stage")
        if (self.switch is None) != (not self.second):
            fail("schedule.second", self.second, "what changes at schedule.switch; empty without a switch")
        unknown = sorted(set(self.second) - set(STAGED))
        if unknown:
            fail(f"schedule.second.{unknown[0]}", self.second[unknown[0]], f"one of the blocks {', '.join(STAGED)}")


@dataclass
class CompactionConfig:
    """Rows whose whole loss is exactly zero are left out of the forward passes.

    Attributes:
        enable: off forwards every row (the loss and gradient are the same).
    """

    enable: bool = True

    def validate(self) -> None: ...


@dataclass
class SamplesConfig:
    """Completions written to ``completions.jsonl`` with their teacher context."""

    per_step: int = 4
    every: int = 10

    def validate(self) -> None:
        number("samples.per_step", self.per_step, 0)
        number("samples.every", self.every, 1)
