"""Which answers vote together in maj@k: those that the verifier takes for the same.

A verifier's module may have a function ``equivalent(answer_a, answer_b) -> bool`` of two ``pred`` values. Such a rule
may be slow, and a hostile answer may hang it, so it runs where the verifier runs: in killable processes with the same
limits. Without a rule, or with plain equality for one, answers are the same where their texts are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from omegaconf import DictConfig

from verl_ext.verifier_config import POOLED, VerifierConfig, verifier_config
from verl_ext.verifier_pool import shared_pool
from verl_ext.verifier_process import load_function
from verl_ext.verifiers.result import OK, same_text

RULE = "equivalent"
SAME_ANSWER = "verl_ext.verifiers.same_answer:compute_score"

Answers = Sequence[Sequence[str | None]]
Compare = Callable[[str, str], bool | None]


class AnswerKeys:
    """Gives answers that are the same the same key: the text of the first of them.

    A rule with rounding is not transitive, so the order decides: an answer joins the first class whose first answer
    equals it.

    Attributes:
        rule: what compares two answers, for people: ``package.module:equivalent``, or ``equal text``.
        undecided: pairs so far that could not be compared (an error or a timeout); they count as different.
    """

    def __init__(self, compare: Compare | None = None, *, rule: str = "equal text", workers: int = 1) -> None:
        """
        Args:
            compare: two different texts -> whether they are the same answer; None where that cannot be said. Called
                from ``workers`` threads. None: texts are compared.
        """
        self.rule = rule
        self.undecided = 0
        self._compare, self._workers = compare, workers
        self._lock = threading.Lock()

    def __call__(self, answers_PK: Answers) -> list[list[str | None]]:
        """Keys of P questions' answers; None stays None and "" stays "": they are no answers."""
        if self._compare is None or not answers_PK:
            return [list(answers_K) for answers_K in answers_PK]
        with ThreadPoolExecutor(min(self._workers, len(answers_PK)), thread_name_prefix="answer-keys") as pool:
            return list(pool.map(self._of_question, answers_PK))

    def _of_question(self, answers_K: Sequence[str | None]) -> list[str | None]:
        firsts: list[str] = []
        key_of: dict[str, str] = {}
        for answer in answers_K:
            if answer and answer not in key_of:
                key_of[answer] = next((first for first in firsts if self._same(first, answer)), answer)
                if key_of[answer] == answer:
                    firsts.append(answer)
        return [key_of[answer] if answer else answer for answer in answers_K]

    def _same(self, first: str, second: str) -> bool:
        assert self._compare is not None
        found = self._compare(first, second)
        if found is None:
            with self._lock:
                self.undecided += 1
        return bool(found)


def answer_keys(config: DictConfig) -> AnswerKeys:
    """By the rule of the verifier that ``verifier.function`` names.

    Raises:
        Exception: whatever the verifier's module raises when it is imported.
    """
    own = config.reward.custom_reward_function
    routed = bool(own.path) and str(own.path) == str(POOLED)
    # The routed block has the whole path of a function in a file: workers may stand in another folder.
    settings = verifier_config(own.reward_kwargs.verifier if routed else config.verifier)
    if settings.function is None or (own.path and not routed):
        return AnswerKeys()
    rule = getattr(load_function(settings.function), "__globals__", {}).get(RULE)
    if not callable(rule) or rule is same_text:
        return AnswerKeys()
    name = f"{settings.function.rpartition(':')[0]}:{RULE}"
    return AnswerKeys(_comparison(settings, rule), rule=name, workers=max(1, settings.processes))


def _comparison(settings: VerifierConfig, rule: Callable[[str, str], bool]) -> Compare:
    if settings.processes == 0:

        def compare_here(first: str, second: str) -> bool | None:
            try:
                return bool(rule(first, second))
            except Exception:  # of another's function; counted, as the pool's failures are
                return None

        return compare_here
    pooled = replace(settings, function=SAME_ANSWER, options={"verifier": settings.function}).pool_settings()

    def compare(first: str, second: str) -> bool | None:
        verdict = shared_pool(pooled).submit(data_source="", solution_str=second, ground_truth=first).result()
        return verdict["acc"] == 1.0 if verdict["status"] == OK else None

    return compare
