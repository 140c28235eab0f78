"""Scoring a response outside the trainer with the very function the trainer uses.

A verifier that raises, or returns no number, is a broken verifier and not a wrong answer: status ``error``, no score.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.config import ConfigError
from verl_ext.verifier_config import POOLED, source_of, verifier_config
from verl_ext.verifiers.result import ERROR, TIMEOUT

DEFAULT_VERIFIER = "verl.utils.reward_score.default_compute_score"


@dataclass(frozen=True)
class Verdict:
    """What the verifier said.

    Attributes:
        score: the reward; None where the verifier failed.
        acc: right or wrong where the verifier says so beside the score, else the score.
        pred: the answer it found, None where it names none.
        status: ``ok``, ``error`` or ``timeout``.
        feedback: its words on a wrong answer.
        error: what went wrong, where the status is not ``ok``.
        format: 1 where the response has the shape that the prompt asks for, 0 where not; None where the verifier says
            nothing of it.
    """

    score: float | None
    acc: float | None
    pred: str | None
    status: str
    feedback: str | None
    error: str | None = None
    format: float | None = None


class Verifier:
    """A reward function as verl loads it, run in threads: it neither blocks the event loop nor may use signals."""

    def __init__(self, function: Callable[..., Any], identity: Mapping[str, Any], *, workers: int = 8) -> None:
        """``identity`` goes into the settings of a store: it must change when the verdicts may."""
        self.identity = dict(identity)
        self._function = function
        self._is_async = inspect.iscoroutinefunction(function)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    @classmethod
    def from_config(cls, config: DictConfig, *, workers: int = 8) -> Verifier:
        """From ``reward.custom_reward_function``, or verl's own choice by data source where that names none."""
        from verl.trainer.ppo.reward import get_custom_reward_fn
        from verl.utils.reward_score import default_compute_score

        try:
            function = get_custom_reward_fn(config)
        except (FileNotFoundError, AttributeError, ImportError, RuntimeError) as error:
            raise ConfigError(f"reward.custom_reward_function cannot be loaded: {error}") from error
        return cls(function or default_compute_score, verifier_identity(config, function), workers=workers)

    async def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None
    ) -> Verdict:
        """The verdict on one response; never raises for what the verifier does."""
        call = partial(
            self._function,
            data_source=data_source,
            solution_str=solution_str,
            ground_truth=ground_truth,
            # The two keys that verl's reward manager adds; a copy, since verifiers may write into it.
            extra_info={**(extra_info or {}), "num_turns": 2, "rollout_reward_scores": {}},
        )
        try:
            result = await (call() if self._is_async else asyncio.get_running_loop().run_in_executor(self._pool, call))
            return read_verdict(result)
        except Exception as error:
            return _failed(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Lets the threads go; calls that still run are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def read_verdict(result: Any) -> Verdict:
    """A reward function's number or dict as a verdict."""
    values = dict(result) if isinstance(result, Mapping) else {"score": result}
    status = str(values.get("status") or "ok")
    if status != "ok":
        message = str(values.get("error") or values.get("feedback") or f"status {status}")
        return _failed(message, status=TIMEOUT if status == TIMEOUT else ERROR)
    score, acc = values.get("score"), values.get("acc", values.get("score"))
    for name, value in (("score", score), ("acc", acc)):
        try:
            finite = math.isfinite(value)
        except TypeError:
            finite = False
        if not finite:
            return _failed(f"the verifier's {name} is {value!r}, expected a finite number")
    pred, feedback, well_formed = (values.get(key) for key in ("pred", "feedback", "format"))
    return Verdict(
        score=float(score),
        acc=float(acc),
        pred=None if pred is None else str(pred),
        status="ok",
        feedback=str(feedback) if feedback else None,
        format=float(well_formed) if isinstance(well_formed, Real) and math.isfinite(well_formed) else None,
    )


def _failed(message: str, status: str = ERROR) -> Verdict:
    return Verdict(score=None, acc=None, pred=None, status=status, feedback=None, error=message)


def verifier_identity(config: DictConfig, function: Callable[..., Any] | None) -> dict[str, Any]:
    """Import path, arguments and a hash of the source file; for verl's own verifier its version instead."""
    if function is None:
        from importlib.metadata import version

        return {"path": DEFAULT_VERIFIER, "version": version("verl")}
    settings = config.reward.custom_reward_function
    pooled = (settings.get("reward_kwargs") or {}).get("verifier")
    if str(settings.path) == str(POOLED) and pooled:
        verifier = verifier_config(pooled)
        return {
            "path": verifier.function,
            "kwargs": verifier.options,
            "limits": {"time": verifier.time_limit, "memory_mib": verifier.memory_mib},
            "source": _digest(source_of(verifier.function)),
        }
    raw = function.args[0] if isinstance(function, partial) else function
    source = inspect.getsourcefile(raw)
    if source is None:
        raise ConfigError(f"reward.custom_reward_function.path {settings.path}: its source cannot be read")
    return {
        "path": str(settings.path),
        "name": str(settings.name),
        "kwargs": OmegaConf.to_container(OmegaConf.create(settings.get("reward_kwargs") or {}), resolve=True),
        "source": _digest(Path(source)),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
