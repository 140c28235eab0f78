"""The typed ``distill`` block: the only source of our defaults, and the place where a wrong value is refused.

Every axis of the method frame is one dataclass of :mod:`verl_ext.config_axes`. ``conf/`` chooses values per paper; a
test holds the two together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from verl_ext.config_axes import (
    CompactionConfig,
    ContextConfig,
    DivergenceConfig,
    PreferenceConfig,
    SamplesConfig,
    ScheduleConfig,
    SequencesConfig,
    TeacherConfig,
    WeightingConfig,
)
from verl_ext.config_values import ConfigError as ConfigError  # the place where others look for it
from verl_ext.config_values import build, fail, number, one_of, optional_number

CARRIERS = ("loss", "advantage", "preference")


@dataclass
class DistillConfig:
    """loss = (1 - coefficient) * policy-gradient loss + coefficient * distillation loss (DESIGN, blend).

    Attributes:
        method: name of the preset; only for records.
        coefficient: lambda in [0, 1]; 0 switches distillation off at no cost, 1 the policy gradient.
        carrier: ``loss``: the divergence is the loss. ``advantage``: the self-teacher's token advantage
            w_q (log pi_T(y_t) - log pi_S(y_t)) goes through verl's clipped policy loss; on policy its gradient is that
            of the sampled-token reverse KL. ``divergence`` is then not used. ``preference``: the logistic loss on pairs
            of the block ``preference``; ``divergence`` then says what its self-check reads: full support for one,
            ``sampled_token`` for none.
        advantage_clip: largest absolute token advantage, before the weight; None: no limit.
        reuse_log_probs: skip verl's separate old-log-prob pass where there is one optimiser step per batch, because
            the ratio is 1 there: ``auto`` (when nothing else needs the pass) or ``never``.
        poll_interval: seconds between looks at the finished rollouts (verl: 2).
        non_finite_limit: optimiser steps in a row that may be skipped because loss or gradient is not finite; at one
            more the run ends, naming the rows.
        lost_groups: largest share of a batch's groups that may be left out because rollouts of theirs failed; with more
            the run ends. A group is trained on whole or not at all.
        fingerprints: write SHA-256 of every rank's student and teacher weights with each step, to compare runs.
    """

    method: str = "custom"
    coefficient: float = 1.0
    carrier: str = "loss"
    advantage_clip: float | None = None
    reuse_log_probs: str = "auto"
    poll_interval: float = 0.05
    non_finite_limit: int = 3
    lost_groups: float = 0.25
    fingerprints: bool = False
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)

    @property
    def enabled(self) -> bool:
        """Whether any distillation is done."""
        return self.coefficient > 0

    @property
    def policy_gradient(self) -> bool:
        """Whether the policy-gradient term is part of the loss."""
        return self.coefficient < 1 or self.carrier == "advantage"

    @property
    def divergence_loss(self) -> bool:
        """Whether the divergence is a term of the loss."""
        return self.enabled and self.carrier == "loss"

    @property
    def pairs(self) -> bool:
        """Whether the loss is the preference loss on pairs."""
        return self.enabled and self.carrier == "preference"

    def validate(self) -> None:
        """Raises ConfigError with the key, the value and what is allowed."""
        number("coefficient", self.coefficient, 0.0, 1.0)
        one_of("carrier", self.carrier, CARRIERS)
        optional_number("advantage_clip", self.advantage_clip, 0.0, above=True)
        one_of("reuse_log_probs", self.reuse_log_probs, ("auto", "never"))
        number("poll_interval", self.poll_interval, 0.0, above=True)
        number("non_finite_limit", self.non_finite_limit, 0)
        number("lost_groups", self.lost_groups, 0, 1)
        for part in fields(self):
            value = getattr(self, part.name)
            if is_dataclass(value):
                value.validate()
        if self.enabled and self.context.kind == "none" and self.teacher.kind == "live":
            fail(
                "context.kind",
                "none",
                "another kind: a live teacher without privileged text equals the student",
            )
        self._validate_states()
        self._validate_skip()
        self._validate_reference()
        self._validate_pairs()
        if self.schedule.switch is not None:
            try:
                self.second_stage().validate()
            except ConfigError as error:
                raise ConfigError(f"in the second stage (distill.schedule.second): {error}") from error

    def second_stage(self) -> DistillConfig:
        """The block of the second stage, itself without a schedule. Raises ConfigError."""
        values = dataclasses.asdict(self)
        for block, changes in self.schedule.second.items():
            if not isinstance(changes, dict):
                fail(f"schedule.second.{block}", changes, "a block of keys")
            values[block] |= changes
        values["schedule"] = {}
        return build(DistillConfig, values, "distill")

    def _validate_reference(self) -> None:
        if not self.enabled or self.sequences.source != "reference":
            return
        if self.context.kind in ("sibling", "revision"):
            fail("context.kind", self.context.kind, "none or reference with sequences.source=reference, which has no "
                 "rollouts")  # fmt: skip
        if self.divergence.kind == "sampled_token":
            fail("divergence.kind", "sampled_token", "a divergence over a support with sequences.source=reference: the "
                 "student did not sample that text")  # fmt: skip
        if self.policy_gradient:
            fail("sequences.source", "reference", "student_rollouts where a policy gradient is part of the loss")
        if self.weighting.rates != "store" and not self.weighting.ignores_rates:
            fail("weighting.rates", self.weighting.rates, "store with sequences.source=reference: replayed texts have "
                 "no pass rate of the student")  # fmt: skip

    def _validate_pairs(self) -> None:
        if (self.carrier == "preference") != (self.sequences.source == "pairs"):
            fail("sequences.source", self.sequences.source, "pairs with carrier=preference, and only there")
        if not self.pairs:
            return
        if self.coefficient != 1:
            fail("coefficient", self.coefficient, "1 with carrier=preference: half the rows are the teacher's, so no "
                 "policy gradient can be blended in")  # fmt: skip
        if self.context.kind not in ("reference", "none"):
            fail("context.kind", self.context.kind, "reference (or none, for an external teacher) with carrier="
                 "preference: the teacher reads it before it answers")  # fmt: skip
        sampled = self.sequences.positive == "teacher"
        kinds = ("live", "frozen") if sampled else ("frozen", "external")
        if self.teacher.kind not in kinds:
            allowed = f"{' or '.join(kinds)} with carrier=preference and sequences.positive={self.sequences.positive}"
            fail(
                "teacher.kind", self.teacher.kind, f"{allowed}: the teacher that samples y+ must be the one that scores"
            )
        if self.divergence.kind != "sampled_token" and self.divergence.support != "full":
            fail("divergence.support", self.divergence.support, "full (for the self-check) with carrier=preference, or "
                 "divergence.kind=sampled_token (without one)")  # fmt: skip
        if self.weighting.rates != "store" and not self.weighting.ignores_rates:
            fail("weighting.rates", self.weighting.rates, "store with carrier=preference: a question has too few "
                 "rollouts of the student for a pass rate")  # fmt: skip

    def _validate_skip(self) -> None:
        skip = self.divergence.skip_tokens
        if not skip or not self.enabled:
            return
        if self.policy_gradient or not self.divergence_loss:
            fail("divergence.skip_tokens", skip, "0, or a number with coefficient=1 and carrier=loss: a policy "
                 "gradient is divided by all tokens, and both terms share the denominators")  # fmt: skip

    def _validate_states(self) -> None:
        states = self.teacher.states
        if states == "hidden_states" and self.one_token:
            fail("teacher.states", states, "log_probs where only the sampled token's probability is compared")
        if not self.teacher.beside and (self.support_pass or not self.divergence_loss):
            fail("teacher.workers", self.teacher.workers, "null where the teacher needs what a student pass leaves "
                 "(student_topk with states=log_probs, carrier=advantage)")  # fmt: skip
        if self.one_token or self.divergence.support != "full":
            return
        if states == "log_probs":
            fail("teacher.states", states, "hidden_states with divergence.support=full")
        if self.divergence.inputs == "logits":
            fail("divergence.inputs", "logits", "hidden_states with divergence.support=full")

    @property
    def one_token(self) -> bool:
        """Whether teacher and student are compared at the sampled token only."""
        return not self.enabled or self.carrier == "advantage" or self.divergence.kind == "sampled_token"

    @property
    def teacher_states(self) -> str:
        """``log_probs`` or ``hidden_states``: what a row keeps of its teacher until the update."""
        if self.teacher.states != "auto":
            return self.teacher.states
        return "log_probs" if self.one_token or self.divergence.support == "teacher_topk" else "hidden_states"

    @property
    def student_inputs(self) -> str:
        """``logits`` or ``hidden_states``: from where the update reads the student."""
        if self.divergence.inputs != "auto":
            return self.divergence.inputs
        return "hidden_states" if not self.one_token and self.divergence.support == "full" else "logits"

    @property
    def support_pass(self) -> bool:
        """Whether the student's support must be known before the teacher pass."""
        on_student = not self.one_token and self.divergence.support == "student_topk"
        return on_student and self.teacher_states == "log_probs"

    @property
    def student_pass(self) -> bool:
        """Whether the teacher's part needs a separate student pass before the update."""
        return self.enabled and (self.support_pass or self.carrier == "advantage")


def distill_config(values: Any) -> DistillConfig:
    """Builds and validates the block from a mapping or an OmegaConf node.

    Raises:
        ConfigError: unknown key, wrong type or value.
    """
    if values is not None and not isinstance(values, dict):
        from omegaconf import OmegaConf

        values = OmegaConf.to_container(values, resolve=True)
    config = build(DistillConfig, values, "distill")
    config.validate()
    return config


def defaults() -> dict[str, Any]:
    """The block's defaults as plain values, for the Hydra config store."""
    return dataclasses.asdict(DistillConfig())
