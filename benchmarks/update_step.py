"""What does the training part of a step cost at a model's real dimensions, beside GRPO with a reference KL?

    python benchmarks/update_step.py [key=value ...] [--shape qwen3_1_7b] [--layers N] [--sequence-tokens 2048 10240]
        [--rows 8] [--methods sdpo ...] [--teacher-prompt-factor 5] [--repeats 5] [--warmup 2] [--dtype bf16]
        [--master-dtype fp32] [--peak-tflops N] [--out FILE]
    torchrun --nproc-per-node 8 benchmarks/update_step.py ...

One student, its optimiser and one second copy of the model, in verl's FSDP engines with the settings of a run, without
Ray and without a rollout. The methods take turns within a repetition, in another order each time:

* ``grpo_kl``: reference pass as verl's ``compute_ref_log_prob``, then verl's own update with a KL term and without a
  pass for the old log-probabilities (one optimiser step per batch).
* ``sdpo``: JSD on the student's 100 most likely tokens; ``sdpo_full``: on the whole vocabulary. Teacher pass, update,
  moving average of the teacher.
* ``sc_sdpo``: as ``sdpo`` with unequal weights, without the ``LEFT_OUT`` share of rows whose weight is 0. They still
  count in the denominators and in the tokens per second.

The reference and the teacher are the same fp32 copy, kept on the device. All rows of a length have as many tokens, of
which ``--prompt-share`` are the prompt; the teacher's prompt is ``--teacher-prompt-factor`` times as long (the default
5 holds a demonstration as long as the response; 1 gives teacher and reference equal work).

Weights are random, and never on disk: the model folder holds a configuration of the published dimensions and the tiny
world's tokenizer, and while the engines are built ``from_pretrained`` of the auto class that verl uses is replaced by
one that calls ``from_config``. Nothing else of verl or ours is replaced.

Seconds are medians of rank 0, between barriers. Peak memory is taken by phase in a repetition of its own: on CUDA the
allocator's, on a CPU the resident set's (/proc/self/clear_refs and VmHWM, after the C library gave back what was
free). ``rise`` is what the phase needed on top of what was there.

The matrix rate counts the products that are done: 2 x parameters x tokens for a forward pass, twice that for a backward
pass, the layers' forward again with gradient checkpointing, half a square for causal attention, and the head where its
logits are made (all tokens from logits; response tokens, and once more in the backward pass, from hidden states). Its
share is of ``--peak-tflops``, by default the dense bf16 rate of cards in ``PEAK_TFLOPS``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig

from recipe.cluster import prepare_environment
from recipe.compose import ROOT, compose_config

TOKENIZER = ROOT / "models" / "tiny_world" / "plain"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Dense bf16, by torch.cuda.get_device_name(): SXM modules.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}

BASELINE = "grpo_kl"
METHODS = {
    BASELINE: ["method=grpo", "actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0.001"],
    "sdpo": ["method=sdpo", "divergence=jsd_student_topk", "distill.teacher.states=hidden_states"],
    "sdpo_full": ["method=sdpo", "divergence=jsd_full"],
    "sc_sdpo": ["method=sc_sdpo", "divergence=jsd_student_topk", "distill.teacher.states=hidden_states"],
}
REFERENCE, STUDENT, TEACHER, UPDATE, EMA = "reference pass", "student pass", "teacher pass", "update", "teacher update"
PHASES = (REFERENCE, STUDENT, TEACHER, UPDATE, EMA)
# Share of the rows that SC-SDPO gives the weight 0.
LEFT_OUT = 0.3
GIB = 2**30

# --------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen3 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        """Of one layer's matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        """Of the head, tied or not."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Of all matrices."""
        return self.layers * self.layer_parameters + self.head_parameters * (1 if self.tied else 2)

    def layers_flops(self, rows: int, length: int) -> float:
        """Forward pass of the layers over rows of equal length."""
        attention = 2 * length**2 * self.heads * self.head_dim
        return rows * self.layers * (2 * self.layer_parameters * length + attention)

    def head_flops(self, tokens: int) -> float:
        """Logits of so many tokens."""
        return 2 * self.head_parameters * tokens

    def model_config(self) -> dict[str, Any]:
        """As ``config.json``."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
        }


SHAPES = {
    "tiny": Shape(128, 3, 4, 2, 32, 256, 128, tied=True),
    "qwen3_1_7b": Shape(2048, 28, 16, 8, 128, 6144, 151936, tied=True),
    "qwen3_8b": Shape(4096, 36, 32, 8, 128, 12288, 151936, tied=False),
}


def write_model_folder(folder: Path, shape: Shape) -> None:
    """Configuration and tokenizer, no weights."""
    (folder / "config.json").write_text(json.dumps(shape.model_config()))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)


@contextmanager
def random_weights(folder: Path, device: str) -> Iterator[None]:
    """Inside, verl builds models of this folder from their configuration; equal weights every time."""
    from transformers import AutoConfig
    from verl.utils.model import get_hf_auto_model_class

    auto_class = get_hf_auto_model_class(AutoConfig.from_pretrained(folder))

    def build(*, config: Any, torch_dtype: torch.dtype, **_: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        # Random numbers are made on the accelerator; host memory is where verl expects the weights, if not on `meta`.
        with torch.device(device):
            model = auto_class.from_config(config, dtype=torch_dtype)
        return model if next(model.parameters()).is_meta else model.to("cpu")

    with mock.patch.object(auto_class, "from_pretrained", build):
        yield


# --------------------------------------------------------------------------------------------------------- the setup


@dataclass(frozen=True)
class Setup:
    """What is measured on."""

    shape: Shape
    device: str
    rank: int
    world: int
    rows: int
    prompt_share: float
    teacher_prompt_factor: float
    dtype: str
    master_dtype: str
    overrides: list[str]

    @property
    def kept(self) -> int:
        """Rows that SC-SDPO forwards."""
        return max(1, self.rows - round(LEFT_OUT * self.rows))

    def lengths(self, sequence: int) -> tuple[int, int, int]:
        """Tokens of prompt, response and teacher prompt."""
        prompt = min(max(1, round(self.prompt_share * sequence)), sequence - 1)
        return prompt, sequence - prompt, max(1, round(self.teacher_prompt_factor * prompt))

    def config(self, method: str, folder: Path, longest: int) -> DictConfig:
        """A run's configuration."""
        prompt, response, _ = self.lengths(longest)
        precision = f"{{param_dtype:{self.dtype},reduce_dtype:fp32,buffer_dtype:fp32}}"
        settings = [
            *METHODS[method], f"hardware={'gpu' if self.device == 'cuda' else 'cpu'}", "model=tiny",
            f"actor_rollout_ref.model.path={folder}", f"data.max_prompt_length={prompt}",
            f"data.max_response_length={response}", f"actor_rollout_ref.rollout.max_model_len={longest}",
            # One prompt with all rows: a batch is one optimiser step.
            "data.train_batch_size=1", f"actor_rollout_ref.rollout.n={self.rows * self.world}",
            f"trainer.n_gpus_per_node={self.world}", "teacher=ema", "distill.context.kind=none",
            "actor_rollout_ref.actor.optim.lr=1e-6", "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
            f"actor_rollout_ref.actor.fsdp_config.mixed_precision={precision}",
            f"actor_rollout_ref.ref.fsdp_config.mixed_precision={precision}",
            f"actor_rollout_ref.actor.fsdp_config.model_dtype={self.master_dtype}",
        ]  # fmt: skip
        if self.device == "cuda" and not importable("flash_attn"):
            settings += [
                "actor_rollout_ref.model.use_remove_padding=false",
                "actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            ]
        return compose_config([*settings, *self.overrides])


def importable(module: str) -> bool:
    """Whether it is installed and fits this machine."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True


def join_processes(device: str) -> tuple[int, int]:
    """Rank and world size: torchrun's, or one process on loopback."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    prepare_environment(None if device == "cuda" else "cpu")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ------------------------------------------------------------------------------------------------------ a measurement


class Memory:
    """Bytes in use, and their highest since the last look."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def start(self) -> int | None:
        """Sets the high-water mark back; bytes in use, None where the kernel does not tell."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if self.trim is not None:
            self.trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return self._status("VmRSS")

    def peak(self) -> int:
        """Highest since ``start``."""
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    @staticmethod
    def _status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024


@dataclass
class Measurement:
    """One step of one method, phase by phase."""

    method: str
    setup: Setup
    memory: Memory | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    loss: float = math.nan

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One phase of it."""
        before = self.memory.start() if self.memory is not None else None
        self._settle()
        started = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"{self.method}, {name}: out of memory; fewer --layers or --sequence-tokens") from error
        self._settle()
        self.seconds[name] = time.perf_counter() - started
        if before is not None:
            peak = self.memory.peak()
            self.peaks[name] = {"peak": round(peak / GIB, 4), "rise": round((peak - before) / GIB, 4)}

    def _settle(self) -> None:
        if self.setup.device == "cuda":
            torch.cuda.synchronize()
        if self.setup.world > 1:
            torch.distributed.barrier()

    def check(self, metrics: dict[str, Any], key: str) -> None:
        """Raises RuntimeError where the update was not one: its time would mean nothing."""
        values = {name: [float(value) for value in as_list(metrics[name])] for name in (key, "grad_norm")}
        if not all(math.isfinite(value) for part in values.values() for value in part):
            raise RuntimeError(f"{self.method}: not finite: {values}")
        if not any(values["grad_norm"]):
            raise RuntimeError(f"{self.method}: the gradient is 0")
        self.loss = sum(values[key])


def as_list(value: Any) -> list[Any]:
    """verl's metrics are lists over mini-batches, or single values."""
    return value if isinstance(value, list) else [value]


class Method:
    """A method's settings on the one worker, and its batch."""

    def __init__(self, name: str, setup: Setup, config: DictConfig) -> None:
        from verl.utils.config import omega_conf_to_dataclass

        from verl_ext.config import distill_config
        from verl_ext.loss import Loss

        self.name, self.setup, self.config = name, setup, config
        self.distill = distill_config(config.distill)
        self.loss = Loss(self.distill, omega_conf_to_dataclass(config.actor_rollout_ref.actor))
        self.rows = setup.kept if name == "sc_sdpo" else setup.rows

    def batch(self, sequence: int) -> Any:
        """This rank's rows, as the trainer sends them."""
        from verl_ext.loss import ROWS, TOKENS, WEIGHT
        from verl_ext.passes import ROW_ID
        from verl_ext.standalone import make_batch
        from verl_ext.worker import MINI_BATCH, TEACHER_PROMPT

        prompt, response, teacher_prompt = self.setup.lengths(sequence)
        source = random.Random(self.setup.rank)

        def tokens(length: int) -> list[list[int]]:
            return [source.choices(range(3, self.setup.shape.vocabulary), k=length) for _ in range(self.rows)]

        weights = [1.0] * self.rows
        if self.name == "sc_sdpo":
            rates = [(1 + index % 7) / 8 for index in range(self.rows)]
            kernels = [math.sqrt(rate * (1 - rate)) for rate in rates]
            weights = [kernel * self.setup.rows / sum(kernels) for kernel in kernels]
        everyone = self.setup.rows * self.setup.world
        batch = make_batch(
            tokens(prompt),
            tokens(response),
            tokens(teacher_prompt),
            weights,
            rows=everyone,
            tokens=everyone * response,
            advantages=[[1.0 if index % 2 else -1.0] * response for index in range(self.rows)],
        )
        if self.distill.enabled:
            return batch
        # verl's own update has no such fields.
        return batch.exclude(WEIGHT, ROW_ID, MINI_BATCH, ROWS, TOKENS, TEACHER_PROMPT)

    def step(self, worker: Any, batch: Any, memory: Memory | None = None) -> Measurement:
        """One training step as of ``DistillTrainer``."""
        measurement = Measurement(self.name, self.setup, memory)
        worker.distill = self.distill
        worker.actor.set_loss_fn(self.loss)
        self._distill(worker, batch, measurement) if self.distill.enabled else self._grpo(worker, batch, measurement)
        return measurement

    def _settings(self) -> dict[str, Any]:
        rollout = self.config.actor_rollout_ref.rollout
        return {"temperature": rollout.temperature, "calculate_entropy": False}

    def _grpo(self, worker: Any, batch: Any, measurement: Measurement) -> None:
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import response_from_nested

        data = batch.clone(recurse=False)
        tu.assign_non_tensor(data, **self._settings(), compute_loss=False)
        with measurement.phase(REFERENCE):
            log_probs = worker.ref.infer_batch(data)["log_probs"]
            reference = response_from_nested(log_probs, batch["response_mask"])
        data = batch.clone(recurse=False)
        data["ref_log_prob"] = reference
        everyone = self.setup.rows * self.setup.world
        tu.assign_non_tensor(
            data,
            **self._settings(),
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=everyone,
            mini_batch_size=everyone,
            epochs=1,
            seed=0,
            dataloader_kwargs={"shuffle": False},
        )
        with measurement.phase(UPDATE):
            output = worker.update_actor(data)
        metrics = tu.get(output, "metrics")
        if "kl_loss" not in metrics:
            raise RuntimeError(f"{self.name}: the update had no KL term")
        measurement.check(metrics, "loss")

    def _distill(self, worker: Any, batch: Any, measurement: Measurement) -> None:
        from verl.utils import tensordict_utils as tu

        def data(**settings: Any) -> Any:
            copy = batch.clone(recurse=False)
            tu.assign_non_tensor(copy, **self._settings(), **settings)
            return copy

        if self.distill.student_pass:
            rows = data(distillation_only=True)
            with measurement.phase(STUDENT):
                worker.compute_log_prob(rows)
        rows = data()
        with measurement.phase(TEACHER):
            worker.compute_teacher(rows)
        rows = data(
            rollout_threshold=None,
            distillation_use_topk=self.distill.student_inputs == "logits",
            distillation_only=True,
            global_batch_size=self.setup.rows * self.setup.world,
        )
        with measurement.phase(UPDATE):
            output = worker.update_actor(rows)
        measurement.check(tu.get(output, "metrics"), "distill/loss")
        with measurement.phase(EMA):
            moved = worker.update_teacher(self.distill.teacher.update_rate)["moved"]
        if not moved:
            raise RuntimeError(f"{self.name}: the teacher did not move")

    def flops(self, sequence: int) -> dict[str, float]:
        """Of the matrix products of one rank, by phase."""
        shape, (_, response, teacher_prompt) = self.setup.shape, self.setup.lengths(sequence)
        layers = shape.layers_flops(self.rows, sequence)
        everywhere = shape.head_flops(self.rows * sequence)
        at_responses = shape.head_flops(self.rows * response)
        again = 1 if self.config.actor_rollout_ref.model.enable_gradient_checkpointing else 0
        if not self.distill.enabled:
            return {REFERENCE: layers + everywhere, UPDATE: (3 + again) * layers + 3 * everywhere}
        from_logits = self.distill.student_inputs == "logits"
        parts = {TEACHER: shape.layers_flops(self.rows, teacher_prompt + response)}
        head = 3 * everywhere if from_logits else 4 * at_responses
        if self.distill.teacher_states == "hidden_states":
            # The backward pass makes the teacher's logits again where the whole vocabulary is compared.
            head += at_responses * (2 if self.distill.divergence.support == "full" else 1)
        elif self.distill.divergence.inputs == "logits":
            parts[TEACHER] += shape.head_flops(self.rows * (teacher_prompt + response))
        else:
            parts[TEACHER] += at_responses
        if self.distill.student_pass:
            parts[STUDENT] = layers + (everywhere if from_logits else at_responses)
        return parts | {UPDATE: (3 + again) * layers + head}


# --------------------------------------------------------------------------------------------------------- the report


def measure(
    methods: list[Method], worker: Any, sequence: int, repeats: int, warmup: int
) -> tuple[list[dict[str, Measurement]], dict[str, Measurement]]:
    """The timed repetitions, and the one for the memory."""
    batches = {method.name: method.batch(sequence) for method in methods}
    memory = Memory(methods[0].setup.device)
    rounds = []
    for number in range(warmup + 1 + repeats):
        order = methods[number % len(methods) :] + methods[: number % len(methods)]
        watched = memory if number == warmup else None
        rounds.append({})
        for method in order:
            step = rounds[-1][method.name] = method.step(worker, batches[method.name], watched)
            if method.setup.rank == 0:
                seconds = ", ".join(f"{phase} {value:.3f} s" for phase, value in step.seconds.items())
                label = f"{sequence} tokens, repetition {number + 1} of {warmup + 1 + repeats}"
                print(f"{label}, {method.name}: {seconds}", file=sys.stderr, flush=True)
    return rounds[warmup + 1 :], rounds[warmup]


def summarize(
    methods: list[Method],
    sequence: int,
    timed: list[dict[str, Measurement]],
    watched: dict[str, Measurement],
    peak_tflops: float | None,
) -> dict[str, Any]:
    """Medians of every method, and ratios within the repetitions to GRPO."""
    setup = methods[0].setup
    prompt, response, teacher_prompt = setup.lengths(sequence)
    result: dict[str, Any] = {
        "sequence_tokens": sequence,
        "prompt_tokens": prompt,
        "response_tokens": response,
        "teacher_prompt_tokens": teacher_prompt,
        "methods": {},
        "ratios": {},
    }

    def totals(name: str) -> list[float]:
        return [sum(measurements[name].seconds.values()) for measurements in timed]

    for method in methods:
        name, flops = method.name, method.flops(sequence)
        phases = [phase for phase in PHASES if phase in timed[0][name].seconds]
        seconds = {phase: statistics.median(m[name].seconds[phase] for m in timed) for phase in phases}
        total = statistics.median(totals(name))
        rates = {phase: flops[phase] / seconds[phase] / 1e12 for phase in phases if phase in flops}
        rates["all"] = sum(flops.values()) / total / 1e12
        result["methods"][name] = {
            "rows_forwarded": method.rows * setup.world,
            "seconds": {phase: round(value, 4) for phase, value in ({"all": total} | seconds).items()},
            "tokens_per_second": round(setup.rows * setup.world * sequence / total, 1),
            "tflops_per_card": {phase: round(rate, 3) for phase, rate in rates.items()},
            "share_of_peak": peak_tflops and {phase: round(rate / peak_tflops, 4) for phase, rate in rates.items()},
            "memory_gib": watched[name].peaks or None,
            "loss": timed[-1][name].loss,
        }  # fmt: skip
    for method in methods:
        if method.name != BASELINE:
            ratios = [one / other for one, other in zip(totals(method.name), totals(BASELINE), strict=True)]
            result["ratios"][f"{method.name} / {BASELINE}"] = {
                "ratio": round(statistics.median(ratios), 4),
                "lowest": round(min(ratios), 4),
                "highest": round(max(ratios), 4),
            }
    return result


def table(result: dict[str, Any]) -> str:
    """One length, for people."""
    rows = [["method", "rows", *(f"{phase} s" for phase in PHASES), "all s", "ratio", "tokens/s", "TFLOP/s", "of peak"]]
    memory = [["GiB at most (on top)", *PHASES]]
    for name, part in result["methods"].items():
        ratio = result["ratios"].get(f"{name} / {BASELINE}", {"ratio": 1.0})["ratio"]
        share = part["share_of_peak"]
        times = [f"{part['seconds'][phase]:.4f}" if phase in part["seconds"] else "-" for phase in PHASES]
        rows.append([
            name, str(part["rows_forwarded"]), *times, f"{part['seconds']['all']:.4f}", f"{ratio:.3f}",
            f"{part['tokens_per_second']:.0f}", f"{part['tflops_per_card']['all']:.3g}",
            f"{share['all']:.1%}" if share else "-",
        ])  # fmt: skip
        peaks = part["memory_gib"] or {}
        found = [peaks.get(phase) for phase in PHASES]
        memory.append([name, *(f"{part['peak']:.2f} ({part['rise']:.3f})" if part else "-" for part in found)])
    lengths = ", ".join(f"{key.removesuffix('_tokens').replace('_', ' ')} {result[key]}" for key in result
                        if key.endswith("_tokens"))  # fmt: skip
    return "\n".join(["", f"tokens: {lengths}", *aligned(rows), "", *aligned(memory)])


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def main() -> int:
    """Runs and prints; the result is also written to ``--out``, after every length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny", help="dimensions of the model")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--sequence-tokens", type=int, nargs="+", help="prompt and response (2048; 256 for tiny)")
    parser.add_argument("--prompt-share", type=float, default=0.2, help="of these tokens")
    parser.add_argument("--teacher-prompt-factor", type=float, default=5.0, help="times the prompt's length")
    parser.add_argument("--rows", type=int, default=8, help="of each rank")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions")
    parser.add_argument("--warmup", type=int, default=2, help="repetitions before, at least 1")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the computation (default: bf16 on CUDA)")
    parser.add_argument("--master-dtype", choices=["bf16", "fp32"], default="fp32", help="of the student's weights")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help=f"with {BASELINE}")
    parser.add_argument("--peak-tflops", type=float, help="of one card (default: by its name)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("overrides", nargs="*", help="as of recipe.train, for all methods")
    arguments = parser.parse_intermixed_args()
    for name in ("rows", "repeats", "warmup"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    sequences = arguments.sequence_tokens or [256 if arguments.shape == "tiny" else 2048]
    if set(arguments.methods) <= {BASELINE}:
        parser.error(f"--methods needs one beside {BASELINE}")
    if min(sequences) < 2:
        parser.error("--sequence-tokens must be at least 2")
    if not 0 < arguments.prompt_share < 1 or arguments.teacher_prompt_factor <= 0:
        parser.error("--prompt-share must be between 0 and 1, --teacher-prompt-factor above 0")

    full = SHAPES[arguments.shape]
    layers = full.layers if arguments.layers is None else arguments.layers
    if not 1 <= layers <= full.layers:
        parser.error(f"--layers must be from 1 to {full.layers}")
    rank, world = join_processes(device)
    setup = Setup(
        shape=Shape(**{**vars(full), "layers": layers}),
        device=device,
        rank=rank,
        world=world,
        rows=arguments.rows,
        prompt_share=arguments.prompt_share,
        teacher_prompt_factor=arguments.teacher_prompt_factor,
        dtype=arguments.dtype or ("bf16" if device == "cuda" else "fp32"),
        master_dtype=arguments.master_dtype,
        overrides=arguments.overrides,
    )
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    peak_tflops = arguments.peak_tflops
    if peak_tflops is None and setup.dtype == "bf16":
        peak_tflops = PEAK_TFLOPS.get(machine)
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), setup.shape)
        names = list(dict.fromkeys([BASELINE, *arguments.methods]))
        configs = {name: setup.config(name, Path(folder), max(sequences)) for name in names}
        import verl  # noqa: F401  loads our plugin

        from verl_ext.standalone import StandaloneWorker

        # Built for one that has a teacher; a method sets what differs.
        first = next(config for config in configs.values() if config.distill.coefficient > 0)
        worker = StandaloneWorker(first)
        with random_weights(Path(folder), device):
            worker.init_model()
        methods = [Method(name, setup, config) for name, config in configs.items()]
        model = first.actor_rollout_ref.model
        result = {
            "date": date.today().isoformat(),
            "machine": machine,
            "torch": torch.__version__,
            "world": world,
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "shape": arguments.shape,
            "layers": layers,
            "matrix_parameters": setup.shape.parameters,
            "dtype": setup.dtype,
            "master_dtype": setup.master_dtype,
            "attention": model.override_config.attn_implementation,
            "packed": model.use_remove_padding,
            "gradient_checkpointing": model.enable_gradient_checkpointing,
            "peak_tflops": peak_tflops,
            "rows_per_rank": setup.rows,
            "repeats": arguments.repeats,
            "overrides": arguments.overrides,
            "lengths": [],
        }
        for sequence in sequences:
            timed, watched = measure(methods, worker, sequence, arguments.repeats, arguments.warmup)
            result["lengths"].append(summarize(methods, sequence, timed, watched, peak_tflops))
            if rank == 0:
                print(table(result["lengths"][-1]), flush=True)
                if arguments.out:
                    arguments.out.parent.mkdir(parents=True, exist_ok=True)
                    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
