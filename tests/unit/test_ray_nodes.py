"""Which nodes were lost, from the lines of the process that asks; here a small one in its place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from verl_ext.ray_nodes import NodeWatch

LINES = """
import json, sys, time
for nodes in sys.argv[1:]:
    if nodes:
        print(json.dumps({"alive": nodes.split(",")}), flush=True)
    time.sleep(0.05)
if sys.argv[-1] != "":
    time.sleep(60)
"""


@pytest.fixture
def watch() -> Iterator[Callable[..., NodeWatch]]:
    made: list[NodeWatch] = []

    def make(*lines: str, **changes: float) -> NodeWatch:
        made.append(NodeWatch([sys.executable, "-S", "-c", LINES, *lines], **changes))
        return made[-1]

    yield make
    for each in made:
        each.end()


def until_lost(watch: NodeWatch) -> str:
    deadline = time.monotonic() + 30
    while (found := watch.lost()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_a_node_that_was_there_first_is_lost_by_name(watch: Callable[..., NodeWatch]) -> None:
    assert until_lost(watch("a 1,b 2", "a 1,b 2,c 3", "a 1,c 3")) == "1 of 2 nodes lost: b 2"


def test_one_that_joined_later_may_leave(watch: Callable[..., NodeWatch]) -> None:
    found = watch("a 1", "a 1,b 2", "a 1")
    time.sleep(0.4)
    assert found.lost() is None


def test_the_end_of_the_process_that_asks_is_a_loss(watch: Callable[..., NodeWatch]) -> None:
    assert "does not answer" in until_lost(watch("a 1", ""))


def test_silence_is_a_loss(watch: Callable[..., NodeWatch]) -> None:
    assert "control service does not answer" in until_lost(watch("a 1", silence=0.3))
