"""Where the divergence falls: shares, spans and profiles against what can be counted by hand."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe import localise
from verl_ext.localisation import around_wrong_step, localisation, profile, share_of_top, share_on_span, tokens_of_span
from verl_ext.verifiers.tiny_world import wrong_result

VALUES = st.lists(st.floats(0, 10), min_size=1, max_size=80)


def test_the_top_share_counts_one_token_of_twenty() -> None:
    assert share_of_top([0.0] * 19 + [3.0]) == 1.0 and share_of_top([1.0] * 20) == pytest.approx(1 / 20)
    assert share_of_top([1.0] * 21) == pytest.approx(2 / 21) and share_of_top([0.0, 0.0]) == 0.0
    assert share_of_top([-3.0, 1.0]) == 0.75 and share_on_span(["a", "b"], [-3.0, 1.0], (0, 1)) == (0.75, 0.5)


@given(VALUES)
def test_the_top_share_is_at_least_that_of_even_values(values: list[float]) -> None:
    share = share_of_top(values)
    assert 0 <= share <= 1 + 1e-12
    if sum(values) > 1e-6:
        assert share >= math.ceil(0.05 * len(values)) / len(values) - 1e-9


def test_a_span_is_covered_by_the_tokens_that_overlap_it() -> None:
    tokens = ["(a)", "6", "-", "0", "=", "", "5", "\\boxed{", "5", "}"]
    assert tokens_of_span(tokens, (7, 8)) == [6] and tokens_of_span(tokens, (0, 4)) == [0, 1]
    assert tokens_of_span(tokens, (2, 3)) == [0] and tokens_of_span(tokens, (99, 100)) == []
    assert share_on_span(["ab", "c", "d"], [1.0, 2.0, 1.0], (2, 4)) == (0.75, pytest.approx(2 / 3))


@given(VALUES, st.integers(1, 30))
def test_a_profile_of_one_row_stays_within_its_values(values: list[float], positions: int) -> None:
    found = profile([values], positions)
    assert len(found) == positions
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in found if value is not None)
    assert all(value is not None for value in found)


def test_rows_count_the_same_in_a_profile_whatever_their_length() -> None:
    assert profile([[1.0, 3.0], [5.0] * 10], 2) == [3.0, 4.0] and profile([], 2) == [None, None]


def test_a_wrong_result_is_found_by_its_place() -> None:
    prompt = "Work left to right mod 10: 6(a)-0(b)-8(c)-6\nmore"
    response = "(a)6-0=6(b)6-8=7(c)7-6=1\\boxed{1}"
    assert response[slice(*wrong_result(prompt, response))] == "7" and wrong_result(prompt, response) == (15, 16)
    assert wrong_result(prompt, "(a)6-0=6(b)6-8=8(c)8-6=2\\boxed{2}") is None
    assert wrong_result(prompt, "(a)6-0=6") is None and wrong_result("no problem", response) is None


def test_the_summary_is_by_outcome_and_knows_the_wrong_step() -> None:
    prompt, tokens = (
        "6(a)-0(b)-8",
        ["(a)", "6", "-", "0", "=", "6", "(b)", "6", "-", "8", "=", "7", "\\boxed{", "7", "}"],
    )
    divergence = [0.0] * 11 + [3.0, 0.0, 1.0, 0.0]
    wrong = {"prompt": prompt, "response": "".join(tokens), "tokens": tokens, "divergence": divergence, "reward": 0.0}
    right = wrong | {"reward": 1.0, "divergence": [0.1] * 15}
    found = localisation([wrong, right, {"reward": 0.0}], locate=wrong_result, positions=5)
    assert found["wrong"]["rows"] == found["right"]["rows"] == 1
    assert found["wrong"]["divergence"] == pytest.approx(4 / 15) and found["wrong"]["top5"] == 0.75
    assert found["wrong"]["profile"] == pytest.approx([0, 0, 0, 1.0, 1 / 3])
    step = found["wrong_step"]
    assert step["rows"] == 1 and step["share"] == 0.75 and step["tokens"] == pytest.approx(1 / 15)
    assert step["before"] == 0.0 and step["after"] == 0.25 and step["first"] == 1.0
    none = localisation([], locate=wrong_result)
    assert none["wrong_step"]["share"] is None and none["right"]["divergence"] is None


def recorded(tokens: list[str], divergence: list[float], reward: float) -> dict:
    return {
        "step": 1,
        "prompt": "6(a)-0(b)-8",
        "response": "".join(tokens),
        "tokens": tokens,
        "divergence": divergence,
        "reward": reward,
    }


TOKENS = ["(a)", "6", "-", "0", "=", "6", "(b)", "6", "-", "8", "=", "7", "\\boxed{", "7", "}"]


def test_the_shares_around_the_wrong_step_are_means_over_rows() -> None:
    one = recorded(TOKENS, [0.0] * 11 + [3.0, 0.0, 1.0, 0.0], 0.0)
    two = recorded(TOKENS, [1.0] + [0.0] * 10 + [1.0, 0.0, 0.0, 0.0], 0.0)
    found = around_wrong_step([one, two, one | {"reward": 1.0}], wrong_result, window=3)
    assert list(found) == [-3, -2, -1, 0, 1, 2, 3]
    assert found[0] == pytest.approx((0.75 + 0.5) / 2) and found[2] == pytest.approx(0.125) and found[-3] == 0.0
    assert around_wrong_step([one | {"reward": 1.0}], wrong_result) == {}


def test_the_command_tells_draws_and_refuses(tmp_path, capsys) -> None:
    rows = [recorded(TOKENS, [0.0] * 11 + [3.0, 0.0, 1.0, 0.0], 0.0), recorded(TOKENS, [0.1] * 15, 1.0), {"step": 1}]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    located = ["--locate", "verl_ext.verifiers.tiny_world:wrong_result"]
    assert localise.main([str(tmp_path), *located, "--plot", str(tmp_path / "plot.svg")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert (
        "75% of the divergence on 6.7% of the tokens" in told[2] and json.loads(told[-1])["wrong_step"]["share"] == 0.75
    )
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    for arguments, message in (
        ([str(tmp_path), "--locate", "nowhere:f"], "expected package.module:function"),
        ([str(tmp_path), "--steps", "5", "9"], "no completion carries its divergence"),
        ([str(tmp_path), "--plot", "x.svg"], "--plot needs --locate"),
        ([str(tmp_path / "none")], "no such file"),
    ):
        assert localise.main(arguments) == 2
        assert message in capsys.readouterr().err
