"""The loggers of ``trainer.logger`` beside the run's own files, by verl's :class:`~verl.utils.tracking.Tracking`.

A logger is a convenience: one that stops working in the middle of a run is warned about once, tried again at growing
distances, and counted, but it does not end the run. One that cannot start ends it before the workers are started.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from omegaconf import DictConfig, OmegaConf

from verl_ext.config_values import ConfigError
from verl_ext.logger_names import extra_loggers
from verl_ext.redaction import redacted, redacted_text

# Steps between two tries of a logger that keeps failing: a dead connection may take minutes to say so.
LONGEST_PAUSE: Final = 64
LOST: Final = "loggers/records_lost"

Warn = Callable[[str], None]


class Tracker(Protocol):
    """verl's ``Tracking``."""

    def log(self, data: dict[str, Any], step: int) -> None:
        """One record."""

    def finish(self, exit_code: int) -> None:
        """Writes what is left."""


class Logger:
    """One of the loggers. ``lost`` counts the records that it did not take."""

    def __init__(self, name: str, tracker: Tracker, warn: Warn) -> None:
        self.name, self.lost = name, 0
        self._tracker, self._warn = tracker, warn
        self._failures = 0
        self._next_try = -math.inf

    def log(self, record: dict[str, float], step: int) -> None:
        """Hands a record over, or counts it as lost."""
        if step < self._next_try:
            self.lost += 1
            return
        try:
            self._tracker.log(data=record, step=step)
        except Exception as error:  # whatever a third party's client raises
            if not self.lost:
                self._warn(
                    f"logger {self.name} does not work any more ({_one_line(error)}); the run goes on, tries it again "
                    f"from time to time and counts what it misses under {LOST}; metrics.jsonl has everything"
                )
            self.lost += 1
            self._failures += 1
            self._next_try = step + min(2**self._failures, LONGEST_PAUSE)
        else:
            self._failures = 0

    def finish(self, exit_code: int) -> None:
        """Ends it; what it missed is said."""
        try:
            self._tracker.finish(exit_code=exit_code)
        except Exception as error:  # as above; the run itself has ended by now
            self._warn(f"logger {self.name} could not be ended properly: {_one_line(error)}")
        if self.lost:
            self._warn(f"logger {self.name} lacks {self.lost} records of this run; metrics.jsonl has them")


class Loggers:
    """All of them; none is fine."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = loggers

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """The numbers of a record to each logger; texts and lists, which most of them refuse, are left out."""
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        for one in self._loggers:
            one.log(numbers, step)

    def counts(self) -> dict[str, int]:
        """Records that a logger did not take, over all of them; for the run's own metrics, empty without loggers."""
        return {LOST: sum(one.lost for one in self._loggers)} if self._loggers else {}

    def finish(self, exit_code: int) -> None:
        """Ends all of them."""
        for one in self._loggers:
            one.finish(exit_code)


@contextmanager
def running_loggers(config: DictConfig, warn: Warn) -> Iterator[Loggers]:
    """What ``trainer.logger`` names, started with the configuration less its secrets, and ended on leaving.

    Args:
        warn: told once for each logger that stops working.

    Raises:
        ConfigError: a logger is unknown, not installed or cannot start.
    """
    started: list[Logger] = []
    exit_code = 1
    try:
        names = extra_loggers(config.trainer.logger)
        settings = redacted(OmegaConf.to_container(config, resolve=True)) if names else {}
        for name in names:
            started.append(Logger(name, _start(name, config, settings), warn))
        yield Loggers(started)
        exit_code = 0
    finally:
        Loggers(started).finish(exit_code)


def _start(name: str, config: DictConfig, settings: dict[str, Any]) -> Tracker:
    from verl.utils.tracking import Tracking

    reason = "see the log"
    try:
        tracker = Tracking(config.trainer.project_name, config.trainer.experiment_name, [name], settings)
    except Exception as error:  # no network, no account: each client has errors of its own
        tracker, reason = None, _one_line(error)
    # verl's mlflow gives up after a few tries and goes on without.
    if tracker is None or name not in tracker.logger:
        raise ConfigError(f"trainer.logger: {name} cannot start ({reason}); repair it or leave {name} out")
    return tracker


def _one_line(error: BaseException) -> str:
    text = " ".join(redacted_text(str(error)).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
