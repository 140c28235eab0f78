"""Will this run work here? `python -m recipe.doctor [the overrides of the run]` looks before minutes are spent."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from recipe import doctor_machine, preflight
from recipe.cluster import prepare_environment
from recipe.compose import compose_config
from recipe.doctor_equality import check_equality, is_small
from recipe.doctor_verifier import check_golden
from recipe.findings import FAIL, OK, SKIP, WARN, Finding, as_records, attempt, print_table, worst
from recipe.memory import DEVICE_GIB
from verl_ext.config import ConfigError, distill_config
from verl_ext.memory_estimate import GIB, Estimate

HELP = """Looks at everything a training run needs, before it is started: one line a check, and what to do about it.

Exit status: 0 nothing fails (warnings may be there), 1 a check fails, 2 the configuration itself is refused.
"""
EPILOG = """examples:
  python -m recipe.doctor                                                    the tiny world on this machine
  python -m recipe.doctor method=sdpo model=qwen3_8b data=tooluse hardware=gpu layout=gpus8
  python -m recipe.doctor --offline model=qwen3_8b hardware=gpu layout=gpus4      nothing of it is on this machine
  python -m recipe.doctor --layouts                                          every model on every GPU layout, a table
"""
OFFLINE = "not looked at with --offline"
NEEDS_MACHINE = (
    "revision phrases",
    "attention kernels",
    "teacher and support",
    "adapter",
    "revision turn",
    "data files",
    "questions",
)
"""Parts of the preflight that read the model, the data or this machine's packages."""


@dataclass
class Examination:
    """One doctor's visit.

    Attributes:
        deep: read the weights of a model of any size. device_bytes: of one device; None: find out.
    """

    config: DictConfig
    offline: bool = False
    deep: bool = False
    device_bytes: int | None = None
    findings: list[Finding] = field(default_factory=list)
    estimate: Estimate | None = None

    def run(self) -> list[Finding]:
        """Every check in its order: the cheap ones first."""
        config = self.config
        installed = doctor_machine.installed_versions()
        self._add("versions", lambda: doctor_machine.check_versions(installed, doctor_machine.lock_file()))
        self._unless_offline("vLLM plugin", doctor_machine.check_plugin)
        for name, part in preflight.parts(config):
            if self.offline and name in NEEDS_MACHINE:
                self._leave_out(name)
            else:
                self._add(name, _silent(part))
        self._add("verifier's golden set", lambda: check_golden(config))
        self._unless_offline("output folder", lambda: doctor_machine.check_folder(config))
        self._unless_offline("disk", lambda: doctor_machine.check_disk(config))
        if self.offline:
            for name in ("chat template", "prompts alike", "prompt lengths", "teacher prompt lengths",
                         "teacher equals student", "Ray resources", "workers", "nodes alike"):  # fmt: skip
                self._leave_out(name)
        else:
            self._look_at_prompts()
            self._look_at_cluster(list(installed))
        self._look_at_memory()
        return self.findings

    def _add(self, name: str, check: Callable[[], str | None | Finding]) -> bool:
        """Runs a check; whether it did not fail."""
        if sys.stderr.isatty():
            print(f"\r\033[K{name} …", end="", file=sys.stderr, flush=True)
        self.findings.append(attempt(name, check))
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return self.findings[-1].status != FAIL

    def _unless_offline(self, name: str, check: Callable[[], str | None | Finding]) -> None:
        if self.offline:
            self._leave_out(name)
        else:
            self._add(name, check)

    def _leave_out(self, name: str) -> None:
        self.findings.append(Finding(name, SKIP, OFFLINE))

    def _look_at_prompts(self) -> None:
        from recipe import doctor_prompts as prompts
        from recipe.revision_checks import model_tokenizer

        config, made = self.config, {}

        def load() -> str:
            made["tokenizer"] = model_tokenizer(config)
            made["questions"] = prompts.read_questions(config)
            if not made["questions"]:
                raise ConfigError("data.train_files has no rows")
            return f"{len(made['tokenizer'])} tokens; {len(made['questions'])} rows read"

        if not self._add("tokenizer and data", load):
            return
        tokenizer, questions = made["tokenizer"], made["questions"]
        if not self._add("chat template", lambda: prompts.check_template(config, tokenizer)):
            return
        compared = questions[: prompts.COMPARED]

        def compare() -> str:
            made["student"] = prompts.student_prompts(config, tokenizer, compared)
            try:
                return prompts.check_parity(config, tokenizer, compared, made["student"])
            except ValueError as error:
                raise ConfigError(str(error)) from error

        self._add("prompts alike", compare)
        self._add("prompt lengths", lambda: prompts.check_prompt_lengths(config, tokenizer, questions))
        self._add("teacher prompt lengths", lambda: prompts.check_context_lengths(config, tokenizer, questions))
        if "student" in made:
            self._look_at_weights(tokenizer, compared, made["student"])

    def _look_at_weights(self, tokenizer: Any, compared: Sequence[Any], student: list[list[int]]) -> None:
        from recipe.doctor_prompts import template_arguments
        from verl_ext.contexts import PromptTokenizer

        path = str(self.config.actor_rollout_ref.model.path)
        if not (self.deep or is_small(path)):
            todo = "--deep reads the weights; training checks it before its first step"
            self.findings.append(Finding("teacher equals student", SKIP, f"the weights of {path} are not read", todo))
            return
        tokenize = PromptTokenizer(tokenizer, template_arguments(self.config))
        teacher = [tokenize(question.messages) for question in compared]
        self._add("teacher equals student", lambda: check_equality(self.config, student, teacher))

    def _look_at_cluster(self, packages: list[str]) -> None:
        from recipe.doctor_ray import check_cluster

        found: list[Finding] = []

        def look() -> Finding:
            parts, gpu_bytes = check_cluster(self.config, packages)
            found.extend(parts)
            self.device_bytes = self.device_bytes or gpu_bytes
            return found.pop(0)

        self._add("Ray resources", look)
        self.findings.extend(found)

    def _look_at_memory(self) -> None:
        config = self.config
        if self.device_bytes is not None and config.run.platform != "cpu":
            size, source = self.device_bytes, "as given or as a worker saw it"
        elif self.offline and config.run.platform != "cpu":
            size, source = int(DEVICE_GIB * GIB), "an 80 GB GPU, assumed"
        else:
            size, source = doctor_machine.device_memory(config)

        def look() -> Finding:
            finding, self.estimate = doctor_machine.check_memory(config, size, source)
            return finding

        self._add("memory", look)


def _silent(part: Callable[[], None]) -> Callable[[], str | None]:
    def run() -> None:
        part()

    return run


def as_json(examination: Examination, seconds: float) -> dict[str, Any]:
    """Everything that was found, and the terms of the memory estimate in bytes."""
    terms = examination.estimate.terms if examination.estimate else []
    return {
        "method": examination.config.distill.method,
        "model": str(examination.config.actor_rollout_ref.model.path),
        "status": worst(examination.findings),
        "seconds": round(seconds, 1),
        "findings": as_records(examination.findings),
        "memory": [{"term": t.name, "bytes": t.bytes, "phases": t.phases, "host": t.host} for t in terms],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipe.doctor",
        description=HELP,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of recipe.train")
    parser.add_argument("--offline", action="store_true", help="no Ray, no data, no weights: the configuration alone")
    parser.add_argument("--deep", action="store_true", help="read the model's weights, whatever their size")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--gpu-gib", type=float, metavar="GIB", help="memory of one GPU (default: as found, else 79)")
    parser.add_argument("--layouts", action="store_true", help="every model on every layout of conf/layout, and end")
    args = parser.parse_intermixed_args(arguments)
    if args.gpu_gib is not None and not args.gpu_gib > 0:
        parser.error(f"--gpu-gib is {args.gpu_gib}; allowed: GiB above 0")
    if args.layouts:
        from recipe.layouts import markdown

        print(markdown(args.gpu_gib or DEVICE_GIB))
        return 0
    started = time.perf_counter()
    try:
        config = compose_config(args.overrides)
        distill_config(config.distill)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prepare_environment(config.run.platform)
    size = int(args.gpu_gib * GIB) if args.gpu_gib else None
    examination = Examination(config, offline=args.offline, deep=args.deep, device_bytes=size)
    try:
        findings = examination.run()
    except KeyboardInterrupt:
        return 130
    seconds = time.perf_counter() - started
    if args.json:
        print(json.dumps(as_json(examination, seconds)))
    else:
        shown = [finding for finding in findings if finding.line != OFFLINE]
        print_table(shown)
        if len(shown) < len(findings):
            print(f"{OFFLINE}: {', '.join(finding.name for finding in findings if finding.line == OFFLINE)}")
        counts = [(status, sum(f.status == status for f in findings)) for status in (OK, WARN, FAIL, SKIP)]
        print(f"{', '.join(f'{count} {status}' for status, count in counts if count)} in {seconds:.1f} s")
    return 1 if worst(findings) == FAIL else 0


if __name__ == "__main__":
    sys.exit(main())
