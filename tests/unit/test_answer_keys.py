"""Which answers vote together: the verifier's rule, in killable processes, and plain text without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ext.answer_keys import AnswerKeys, answer_keys
from verl_ext.validation import validation_metrics
from verl_ext.verifier_config import route_through_pool
from verl_ext.verifiers import multiple_choice, tool_use


def config(function: str | None, **verifier: Any) -> DictConfig:
    """As much of a run's configuration as decides the rule."""
    own = {"custom_reward_function": {"path": None}}
    return OmegaConf.create({"verifier": {"function": function, "processes": 1, **verifier}, "reward": own})


def near(first: str, second: str) -> bool:
    return abs(float(first) - float(second)) <= 1


def test_without_a_rule_texts_are_compared() -> None:
    keys = AnswerKeys()
    assert keys([["1/2", "0.5", None, "", "1/2"], []]) == [["1/2", "0.5", None, "", "1/2"], []]
    assert keys.rule == "equal text" and keys([]) == []


def test_an_answer_joins_the_first_class_whose_first_answer_equals_it() -> None:
    """2 equals 1 and 3, which differ; what came first decides."""
    keys = AnswerKeys(near, rule="near", workers=3)
    assert keys([["1", "2", "3"], ["2", "1", "3"], ["9", "", None, "5", "9"]]) == [
        ["1", "1", "3"],
        ["2", "2", "2"],
        ["9", "", None, "5", "9"],
    ]
    assert keys.undecided == 0


def test_texts_are_compared_once_and_never_across_questions() -> None:
    asked: list[tuple[str, str]] = []

    def compare(first: str, second: str) -> bool:
        asked.append((first, second))
        return False

    AnswerKeys(compare)([["a", "b", "a", "b", "b"], ["a", "c"]])
    assert asked == [("a", "b"), ("a", "c")]


def test_a_pair_that_cannot_be_compared_is_counted_and_different() -> None:
    keys = AnswerKeys(lambda first, second: None)
    assert keys([["a", "b", "a"]]) == [["a", "b", "a"]] and keys.undecided == 1


@pytest.mark.parametrize("verifier", ["multiple_choice", "tool_use", "tiny_world", "code"])
def test_verifiers_whose_rule_is_equal_text_or_that_have_none_start_no_process(verifier: str) -> None:
    keys = answer_keys(config(f"verl_ext.verifiers.{verifier}:compute_score"))
    assert keys.rule == "equal text" and multiple_choice.equivalent is tool_use.equivalent
    assert keys([["A", "a"]]) == [["A", "a"]]


def test_a_reward_function_of_one_s_own_has_no_rule() -> None:
    made = config(MATHEMATICS)
    made.reward.custom_reward_function.path = "own.py"
    assert answer_keys(made).rule == answer_keys(config(None)).rule == "equal text"


def test_the_mathematics_rule_decides_the_majority_in_validation() -> None:
    """1/2 three times in three forms outvotes the wrong 3, which is there twice."""
    keys = answer_keys(config(MATHEMATICS))
    assert keys.rule == "verl_ext.verifiers.math_answer:equivalent"
    answers = [r"\frac{1}{2}", "3", "0.5", "3", "1/2", "", r"\frac{"]
    assert keys([answers])[0] == [answers[0], "3", answers[0], "3", answers[0], "", r"\frac{"]
    infos = {"acc": [float(a in (answers[0], "0.5", "1/2")) for a in answers], "pred": answers}
    arguments = (["math"] * 7, ["q"] * 7, infos)
    assert validation_metrics(*arguments)["val/maj@7"] == 0.0
    assert validation_metrics(*arguments, keys=keys)["val/maj@7"] == 1.0
    assert keys.undecided == 0


MATHEMATICS = "verl_ext.verifiers.math_answer:compute_score"
RULE = """
import time


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0


def equivalent(first, second):
    if second == "hang":
        time.sleep(60)
    if second == "fail":
        raise RuntimeError("no")
    return first.lower() == second.lower()
"""


def test_a_rule_that_hangs_or_fails_costs_its_pair_only(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(RULE)
    function = f"{tmp_path / 'rule.py'}:compute_score"
    keys = answer_keys(config(function, time_limit=0.5))
    assert keys([["A", "hang", "a"]]) == [["A", "hang", "A"]] and keys.undecided == 1
    here = answer_keys(config(function, processes=0))
    assert here([["A", "fail", "a"]]) == [["A", "fail", "A"]] and here.undecided == 1


def test_a_rule_in_a_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rule.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    made = config("rule.py:compute_score", processes=0)
    route_through_pool(made)
    monkeypatch.chdir("/")
    assert answer_keys(made)([["A", "a"]]) == [["A", "A"]]
