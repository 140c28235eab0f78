"""The settings of a verifier pool: see :mod:`verl_ext.verifier_pool`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ITEM_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


class VerifierError(ValueError):
    """The settings of a pool, or the verifier they name, cannot be used."""


@dataclass(frozen=True)
class PoolSettings:
    """What a pool runs and how.

    Attributes:
        function: ``package.module:function`` or ``/path/file.py:function``, a plain function in verl's
            ``compute_score`` form. What it may return: see :func:`verl_ext.verifier_process.complete`. A function
            ``warm_up`` of its module is called once before the first item, with those of ``options`` that it takes.
        options: its further keyword arguments; plain JSON values.
        processes: how many items are worked on at a time.
        time_limit: seconds for one item, from the moment a process gets it; waiting in the queue does not count.
        memory_mib: address space that a process may take beyond what it has when the verifier is loaded, in MiB.
        queue_size: how many items may wait; a further :meth:`VerifierPool.submit` blocks.
        environment: names of environment variables that the processes get beside PATH, HOME, the locale and the like.
        start_limit: seconds for a process to start and load the verifier.

    Raises:
        VerifierError: a value is out of range.
    """

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 2
    time_limit: float = 10.0
    memory_mib: int = 1024
    queue_size: int = 256
    environment: tuple[str, ...] = ()
    start_limit: float = 60.0

    def __post_init__(self) -> None:
        source, _, name = self.function.rpartition(":")
        if not source or not name:
            raise VerifierError(
                f"function={self.function!r} names no function; expected package.module:function or "
                "/path/file.py:function"
            )
        for count in ("processes", "memory_mib", "queue_size"):
            value = getattr(self, count)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise VerifierError(f"{count}={value!r} is not allowed; expected a whole number from 1")
        for limit in ("time_limit", "start_limit"):
            value = getattr(self, limit)
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
                raise VerifierError(f"{limit}={value!r} is not allowed; expected seconds above 0")
        if isinstance(self.environment, str):
            raise VerifierError(f"environment={self.environment!r} is not allowed; expected a list of names")
        taken = sorted(set(self.options) & set(ITEM_ARGUMENTS))
        if taken:
            raise VerifierError(f"options={taken} are not allowed; these come with every item")
        if source.endswith(".py"):
            object.__setattr__(self, "function", f"{os.path.abspath(os.path.expanduser(source))}:{name}")
        object.__setattr__(self, "environment", tuple(self.environment))
        object.__setattr__(self, "options", dict(self.options))
        try:
            self.key()
        except (TypeError, ValueError) as error:
            raise VerifierError(f"options={self.options!r} are not plain JSON values: {error}") from None

    def key(self) -> str:
        """The same text for equal settings."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)
