"""The doctor's check on real weights: a teacher that is shown nothing equals the student, under the run's own loss.

The model is read by transformers on one device, without verl's engine and without ranks; the trainer repeats the check
through both engines before its first step (:mod:`verl_ext.teacher_checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.findings import FAIL, OK, SKIP, Finding
from verl_ext.config import DistillConfig, distill_config
from verl_ext.stages import stages

NAME = "teacher equals student"
RESPONSE = 16
"""Tokens after each prompt; any text will do."""
SMALL_BYTES = 50_000_000
"""Weights that are read without being asked for."""


def is_small(path: str) -> bool:
    """Whether the model is a local folder whose weights are read in no time."""
    folder = Path(path).expanduser()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    return bool(weights) and sum(file.stat().st_size for file in weights) <= SMALL_BYTES


def check_equality(config: DictConfig, student: Sequence[list[int]], teacher: Sequence[list[int]]) -> Finding:
    """Largest and mean divergence over a few rows, in every stage.

    Args:
        student: prompt ids as the rollouts have them. teacher: as the teacher's own code makes them, without context.
    """
    parts = [stage for stage in stages(distill_config(config.distill)) if stage.enabled]
    if not parts:
        return Finding(NAME, SKIP, "no distillation")
    if all(stage.teacher.kind == "external" for stage in parts):
        return Finding(NAME, SKIP, "the teacher is another model")
    model = _load(config)
    mean, largest = 0.0, 0.0
    for stage in parts:
        one_mean, one_largest = _discrepancy(config, stage, model, student, teacher)
        # The new one first: max keeps its first argument where the other is NaN.
        mean, largest = max(one_mean, mean), max(one_largest, largest)
    tolerance = parts[0].teacher.self_check_tolerance
    line = f"{mean:.2g} nats a token on {len(student)} prompts (largest {largest:.2g}), allowed {tolerance:g}"
    if not mean <= tolerance:
        todo = "look at the prompts of both (chat template), and at a divergence of your own: D(p, p) must be 0"
        return Finding(NAME, FAIL, line, todo)
    return Finding(NAME, OK, line)


def _load(config: DictConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    settings = config.actor_rollout_ref.model
    device = "cuda" if torch.cuda.is_available() and config.run.platform != "cpu" else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        settings.path,
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=bool(settings.get("trust_remote_code", False)),
    )
    return model.to(device).eval()


def _discrepancy(
    config: DictConfig,
    stage: DistillConfig,
    model: Any,
    student: Sequence[list[int]],
    teacher: Sequence[list[int]],
) -> tuple[float, float]:
    import torch

    from verl_ext.passes import StudentPass, TeacherPass
    from verl_ext.row_store import STORE
    from verl_ext.student_values import Discrepancy

    support = "none"
    if not stage.one_token:
        support = {"student_topk": "given"}.get(stage.divergence.support, stage.divergence.support)
    temperature = float(config.actor_rollout_ref.rollout.temperature)
    check = Discrepancy(stage)
    STORE.clear()
    try:
        with torch.no_grad():
            for student_ids, teacher_ids in zip(student, teacher, strict=True):
                response = student_ids[:RESPONSE]
                source, data = _forward(model, student_ids, response, temperature, stage.student_inputs)
                if stage.student_pass:
                    topk = stage.divergence.topk if stage.support_pass else None
                    StudentPass(topk, hidden_states=stage.student_inputs == "hidden_states").collect(source, data)
                shown, teacher_data = _forward(model, teacher_ids, response, temperature, "hidden_states")
                teaching = TeacherPass(stage.teacher_states, support=support, topk=stage.divergence.topk)
                teaching.collect(shown, teacher_data)
                teaching.leave_head()
                check.collect(source, data)
                STORE.clear()
    finally:
        STORE.clear()
    # The difference at a sampled token has a sign; a divergence has none.
    return abs(check.total / max(check.tokens, 1)), check.largest


def _forward(model: Any, prompt: list[int], response: list[int], temperature: float, inputs: str) -> tuple[Any, Any]:
    """What the loss reads of one row, and the row's data."""
    import torch
    from tensordict import TensorDict

    from verl_ext.chunks import Head, Logits
    from verl_ext.packing import to_jagged
    from verl_ext.passes import ROW_ID

    device = next(model.parameters()).device
    ids = torch.tensor([*prompt, *response], device=device)
    hidden = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    weight = model.get_output_embeddings().weight
    data = TensorDict(
        {
            "input_ids": to_jagged([ids]),
            "responses": to_jagged([ids[len(prompt) :]]),
            "temperature": torch.full((1,), temperature, device=device),
            ROW_ID: torch.zeros(1, dtype=torch.int64),
        },
        batch_size=1,
    )
    if inputs == "hidden_states":
        return Head(hidden, weight), data
    return Logits(hidden @ weight.t() / temperature), data
