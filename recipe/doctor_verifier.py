"""The doctor's check of the verifier: right and wrong answers whose verdicts are known, judged as a run judges them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig

from recipe.findings import FAIL, OK, SKIP, Finding
from verl_ext.verifier_config import verifier_config


@dataclass(frozen=True)
class Case:
    """A response with the verdict that it must get."""

    response: str
    truth: Any
    right: bool
    extra_info: dict[str, Any] | None = None


_CALL = [{"Action": "search", "Action_Input": json.dumps({"q": "x"})}]
_TESTS = {"inputs": ["2\n"], "outputs": ["4\n"], "testtype": "stdin", "time_limit": 2}
_CHOICES = {"choices": ["A", "B", "C", "D"]}

GOLDEN: dict[str, tuple[Case, ...]] = {
    "verl_ext.verifiers.tiny_world:compute_score": (
        Case("(a)6-0=6(b)6-8=8\\boxed{8}", "8", True, {"problem": "6(a)-0(b)-8"}),
        Case("(a)6-0=6(b)6-8=7\\boxed{7}", "8", False, {"problem": "6(a)-0(b)-8"}),
    ),
    "verl_ext.verifiers.math_answer:compute_score": (
        Case("So it is \\boxed{\\frac{1}{2}}.", "0.5", True),
        Case("Answer: \\boxed{2/4}", "\\frac{1}{2}", True),
        Case("So it is \\boxed{\\frac{1}{3}}.", "0.5", False),
        Case("I do not know.", "0.5", False),
    ),
    "verl_ext.verifiers.multiple_choice:compute_score": (
        Case("<reasoning>x</reasoning>\n<answer>\nB\n</answer>", "B", True, _CHOICES),
        Case("<reasoning>x</reasoning>\n<answer>\nC\n</answer>", "B", False, _CHOICES),
    ),
    "verl_ext.verifiers.tool_use:compute_score": (
        Case('Action: search\nAction Input: {"q": "x"}', json.dumps(_CALL), True),
        Case('Action: search\nAction Input: {"q": "y"}', json.dumps(_CALL), False),
    ),
    "verl_ext.verifiers.code:compute_score": (
        Case("```python\nprint(int(input()) ** 2)\n```", json.dumps(_TESTS), True),
        Case("```python\nprint(int(input()) + 1)\n```", json.dumps(_TESTS), False),
    ),
}
"""By ``verifier.function``. They hold under every option that a preset sets."""


def check_golden(config: DictConfig) -> Finding:
    """Every case gets its verdict; the same pool of processes judges as in a run."""
    name = "verifier's golden set"
    settings = verifier_config(config.verifier)
    if settings.function not in GOLDEN:
        which = settings.function or "verl's own choice by data source"
        return Finding(name, SKIP, f"{which} has none; python -m data_prep.validate judges your rows' gold answers")
    cases = GOLDEN[settings.function]
    verdicts = asyncio.run(_judge(asdict(settings), cases))
    wrong = []
    for case, verdict in zip(cases, verdicts, strict=True):
        status = str(verdict.get("status") or "ok")
        if status != "ok":
            wrong.append(f"{case.response!r:.60} ended in {status}: {verdict.get('error') or verdict.get('feedback')}")
        elif (float(verdict["score"]) > 0) != case.right:
            expected = "right" if case.right else "wrong"
            wrong.append(f"{case.response!r:.60} scored {verdict['score']}, expected {expected}")
    if wrong:
        todo = f"look at verifier.function={settings.function} and verifier.options={dict(settings.options)}"
        return Finding(name, FAIL, "; ".join(wrong), todo)
    where = f"{settings.processes} processes" if settings.processes else "this process"
    return Finding(name, OK, f"{len(cases)} of {len(cases)} verdicts as known, in {where}")


async def _judge(verifier: dict[str, Any], cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    from verl_ext.verifiers.pooled import compute_score

    calls = [
        compute_score(
            data_source="doctor",
            solution_str=case.response,
            ground_truth=case.truth,
            extra_info=case.extra_info,
            verifier=verifier,
        )
        for case in cases
    ]
    return await asyncio.gather(*calls)
