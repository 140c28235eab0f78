"""LoRA on the real stack: the adapter switched off is the frozen teacher, in the trainer and in the rollout server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from recipe.compose import ROOT, compose_config
from recipe.export import export

pytestmark = pytest.mark.e2e

STEPS = 2
LORA = [
    "method=sdpo",
    "teacher=frozen",
    "adapter=lora",
    "actor_rollout_ref.model.lora_rank=8",
    "actor_rollout_ref.model.lora_alpha=16",
    # So that one step is seen in the log-probabilities.
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    # verl's own pass over the rollouts, which compares the server's probabilities with the trainer's.
    "distill.reuse_log_probs=never",
]
MEAN, LARGEST = "training/rollout_probs_diff_mean", "training/rollout_probs_diff_max"
"""|pi_trainer - pi_server| over the tokens of the step's rollouts."""


class Sink:
    """Keeps a run's metrics."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        self.steps[step] = dict(values)

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def train(runs: Any, name: str, *overrides: str, trainer_class: Any = None) -> tuple[Any, dict[int, dict[str, Any]]]:
    """The trainer after its last step, and the metrics by step."""
    from verl_ext.early import start
    from verl_ext.session import run_session
    from verl_ext.trainer import DistillTrainer

    shared = runs.overrides(STEPS, replay=False)
    config = compose_config([*shared, f"run.output_dir={runs.folder / name}", *overrides])
    sink = Sink()
    trainer = run_session(config, sink, start(config), trainer_class=trainer_class or DistillTrainer)
    return trainer, sink.steps


@pytest.fixture(scope="module")
def lora(runs: Any) -> tuple[Any, dict[int, dict[str, Any]]]:
    """A run whose trainer asks the server, after the last step, for answers with and without the adapter at once."""
    from verl_ext.trainer import DistillTrainer

    class Asking(DistillTrainer):
        def on_init_end(self) -> None:
            super().on_init_end()
            self.described = self.actor_rollout_wg.describe()

        def on_step_end(self) -> None:
            super().on_step_end()
            if self.global_steps < STEPS:
                return
            server = self.llm_server_manager.server_handles[0]
            self.prompts = [self.tokenizer(f"{a} + {a + 1} =")["input_ids"] for a in range(1, 9)]
            asked = [
                server.generate.remote(
                    prompt_ids=prompt,
                    sampling_params={"temperature": 1.0, "logprobs": True, "max_tokens": 12, "adapter": adapter},
                    request_id=f"{i}-{adapter}",
                )
                for i, prompt in enumerate(self.prompts)
                for adapter in (True, False)
            ]
            answers = ray.get(asked)
            self.answers = {True: answers[::2], False: answers[1::2]}

    return train(runs, "lora", *LORA, f"run.save_every={STEPS}", trainer_class=Asking)


@torch.no_grad()
def log_probs(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log pi(y_t) in nats, [T]."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


def largest_difference(model: Any, prompts: list[list[int]], answers: list[Any]) -> float:
    """Largest |log pi(y_t) - the server's| over the answers, in nats."""
    return max(
        float((log_probs(model, prompt, list(answer.token_ids)) - torch.tensor(answer.log_probs)).abs().max())
        for prompt, answer in zip(prompts, answers, strict=True)
    )


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny_world" / "plain", dtype=torch.float32).eval()


def test_the_teacher_is_the_student_with_its_adapter_off(lora: Any) -> None:
    trainer, steps = lora
    assert [parts["teacher"] for parts in trainer.described] == ["adapter off"]
    first, last = steps[1], steps[STEPS]
    assert first["self_check/divergence"] < 1e-6, "peft starts with B = 0"
    for step in (first, last):
        assert math.isfinite(step["distill/loss"]) and step["distill/loss"] > 0 and step["actor/grad_norm"] > 0
        assert math.isfinite(step["teacher/gap_mean"]) and "teacher/distance" not in step
    assert "fingerprint/teacher_0" not in last
    assert first["fingerprint/base_0"] == last["fingerprint/base_0"]
    assert first["fingerprint/adapter_0"] != last["fingerprint/adapter_0"]


def test_the_server_samples_with_the_adapter_as_the_trainer_computes(lora: Any) -> None:
    _, steps = lora
    assert steps[STEPS]["training/rollout_probs_diff_valid"] == 1
    # Full fine-tuning, measured in the same way: 3.1e-7 and 9.5e-7 (adapter=none teacher=live).
    assert steps[STEPS][MEAN] < 3e-6 and steps[STEPS][LARGEST] < 1e-5


def test_merged_weights_are_served_to_the_digits_of_bf16_and_merging_is_undone(runs: Any) -> None:
    _, steps = train(runs, "merged", *LORA, "actor_rollout_ref.model.lora.merge=true")
    # verl 0.9.1 sends merged weights in bf16, whatever the rollout's dtype.
    assert 1e-5 < steps[STEPS][MEAN] < 1e-2 and steps[STEPS]["training/rollout_actor_probs_pearson_corr"] > 0.99
    assert steps[1]["fingerprint/base_0"] == steps[STEPS]["fingerprint/base_0"]
    assert steps[1]["fingerprint/adapter_0"] != steps[STEPS]["fingerprint/adapter_0"]


def test_a_request_samples_from_the_base_weights_beside_others_that_do_not(lora: Any, runs: Any) -> None:
    trainer, _ = lora
    base = base_model()
    assert largest_difference(base, trainer.prompts, trainer.answers[False]) < 1e-4
    assert largest_difference(base, trainer.prompts, trainer.answers[True]) > 1e-2, "the adapter does something"
    # The checkpoint holds the adapter under peft's names, and the base weights as they were.
    folder: Path = runs.folder / "lora" / "checkpoints" / f"global_step_{STEPS}" / "actor"
    saved = torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=False)
    assert with_adapter(base, saved) > 0
    assert largest_difference(base, trainer.prompts, trainer.answers[True]) < 1e-4
    # So does the model made of it, with the adapter merged.
    (runs.folder / "lora" / "config.yaml").write_text(OmegaConf.to_yaml(trainer.config, resolve=True))
    export(runs.folder / "lora", runs.folder / "merged_model")
    merged = AutoModelForCausalLM.from_pretrained(runs.folder / "merged_model").eval()
    assert largest_difference(merged, trainer.prompts, trainer.answers[True]) < 1e-4


def with_adapter(model: Any, saved: dict[str, Any]) -> int:
    """Adds alpha / r B A to the model's weights; returns how many it changed."""
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in saved.items()}
    changed = 0
    for name, a in whole.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").split(".lora_A")[0]
            b = whole[name.replace("lora_A", "lora_B")]
            model.get_submodule(target).weight.data += (16 / 8) * (b @ a)
            changed += 1
    return changed
