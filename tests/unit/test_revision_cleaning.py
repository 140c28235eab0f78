"""Cleaning of revisions: what goes, what stays, and that long texts are no work."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.revision_cleaning import (
    LONGEST_BLOCK,
    MAX_OPENERS,
    OPENER_LENGTH,
    SHORTEST_BLOCK,
    clean,
    remove_openers,
    trim_repeats,
)

SENTENCE = "So the total is 12 apples."
NUMBERS = "".join(f"{i} " for i in range(500))
texts = st.text(st.sampled_from("ab \n.1"), max_size=80)
blocks = st.text(st.sampled_from("ab \n.1"), min_size=SHORTEST_BLOCK, max_size=40)


# -------------------------------------------------------------------------------------------------------------- openers


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("You're absolutely right, let me redo this. first add 3.", "First add 3."),
        ("You are correct! The sum is 3.", "The sum is 3."),
        ("You’re right\nThe sum is 3.", "The sum is 3."),
        ("Thank you for pointing out that 3.5 is wrong. the sum", "The sum"),
        ("Thanks! Great question! the sum", "The sum"),
        ("That's a great catch. We get 4.", "We get 4."),
        ("Good catch -- I slipped. We get 4.", "We get 4."),
        ("I apologize for the mistake.\n\nStep 1", "Step 1"),
        ("  My apologies. I'm sorry about that. Sorry for the noise. Of course! we get 4.", "We get 4."),
        ("Great observation", ""),
        ("You're right. x = 5", "x = 5"),
        ("You're right.\ndef f(x):\n    pass", "def f(x):\n    pass"),
        ("You're right.** 4 it is.", "4 it is."),
    ],
)
def test_openers_go_and_the_next_word_begins_with_a_capital(text: str, kept: str) -> None:
    assert remove_openers(text) == kept
    assert remove_openers(kept) == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "first add 3.",
        "Thanks to symmetry, x = 1.",
        "You are given 3 apples.",
        "You are right-handed with probability 0.9.",
        "Sure enough, 3 divides 12.",
        "Good point-set topology needs axioms.",
        "Of course, 3 + 4 = 7.",
        "We get 4. You're absolutely right!",
        "Sorrytown has 3 people.",
        "You're right, " + "and " * OPENER_LENGTH,
    ],
)
def test_a_solution_is_left_alone(text: str) -> None:
    assert remove_openers(text) == text


def test_at_most_a_few_openers_go() -> None:
    assert remove_openers("Good catch! " * (MAX_OPENERS + 1) + "Four.") == "Good catch! Four."


@given(texts)
def test_openers_leave_the_end_of_the_text(text: str) -> None:
    kept = remove_openers(f"Good catch! {text}")
    assert len(kept) <= len(text) and text.lower().endswith(kept.lower())
    assert remove_openers(text) == text


# ------------------------------------------------------------------------------------------------------------- repeats


@pytest.mark.parametrize("copies", [3, 4, 100])
@pytest.mark.parametrize("block", ["0123456789", "\n\n" + SENTENCE, NUMBERS[:LONGEST_BLOCK]])
def test_a_repeated_end_is_cut_to_one_copy(block: str, copies: int) -> None:
    assert trim_repeats("Answer: " + block * copies) == "Answer: " + block


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * (3 * SHORTEST_BLOCK - 1),
        SENTENCE * 2,
        SENTENCE * 3 + "End.",
        NUMBERS[: LONGEST_BLOCK + 1] * 3,
        f"{SENTENCE} {SENTENCE}\n{SENTENCE}",
        "012345678" * 3,
    ],
)
def test_a_text_without_such_an_end_is_left_alone(text: str) -> None:
    assert trim_repeats(text) == text


def test_a_loop_that_ends_in_a_loop_goes_as_a_whole() -> None:
    loop = SENTENCE + "-" * 40
    assert trim_repeats("Start. " + loop * 5) == "Start. " + SENTENCE + "-" * 10


def test_passes_follow_each_other() -> None:
    inner = "abcdefghijkl" * 3
    assert trim_repeats(("x = 5, " + "abcdefghijkl") * 2 + "x = 5, " + inner) == "x = 5, abcdefghijkl"


@settings(deadline=None)
@given(texts, blocks, st.integers(3, 5))
def test_the_result_is_a_prefix_and_stays_as_it_is(start: str, block: str, copies: int) -> None:
    text = start + block * copies
    trimmed = trim_repeats(text)
    assert text.startswith(trimmed) and len(trimmed) <= len(text) - 2 * SHORTEST_BLOCK
    assert trim_repeats(trimmed) == trimmed


@settings(deadline=None)
@given(texts)
def test_only_a_repeated_end_is_changed(text: str) -> None:
    repeats = any(text.endswith(text[-n:] * 3) for n in range(SHORTEST_BLOCK, len(text) // 3 + 1))
    assert (trim_repeats(text) != text) == repeats


@pytest.mark.parametrize(
    "text",
    [
        "a" * 50_000,
        " " * 50_000,
        "ab" * 25_000,
        SENTENCE * 2_000,
        ("a" * 1_499 + "b") * 34,
        "x" * 25_000 + ("y" * 700 + "z") * 36,
        "You're right. " * 3_600,
        "sorry, " + "a." * 25_000,
        "\n" + "\t " * 25_000 + "b",
    ],
    ids=range(9),
)
def test_long_texts_are_no_work(text: str) -> None:
    """Measured: 1 to 10 ms for 50,000 characters; the bound leaves room for a busy machine."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        clean(text)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05
