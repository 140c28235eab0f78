"""The forked ranks of the other tests: who they are, and what becomes of them when one fails."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.contract

_file = Path(__file__).with_name("forked_ranks.py")
_spec = importlib.util.spec_from_file_location("forked_ranks", _file)
forked_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(forked_ranks)

PROGRAM = """
import json, os, sys, time
from pathlib import Path
from forked_ranks import become_a_rank

loaded = os.getpid()
argument = become_a_rank(Path(sys.argv[1]))
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
print("case of", argument, flush=True)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
known = {name: os.environ[name] for name in names}
Path(f"{argument}_{rank}.json").write_text(json.dumps(known | {"process": os.getpid(), "loaded": loaded}))
if argument == "failing" and rank == 1:
    raise ValueError("this rank cannot go on")
if argument == "failing":
    time.sleep(300)
"""


def run(folder: Path, worlds: list[list[tuple[int, str]]], program: str = PROGRAM, timeout: float = 60) -> None:
    (folder / "program.py").write_text(program)
    planned = [[forked_ranks.World(*world) for world in together] for together in worlds]
    environment = os.environ | {"PYTHONPATH": str(_file.parent)}
    forked_ranks.run_ranks(folder / "program.py", folder, planned, environment, timeout)


def known(folder: Path, argument: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{argument}_*.json"))]


def runs(process: int) -> bool:
    """Whether it exists and is no zombie, which its new parent has still to look at."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_every_rank_knows_its_place_and_its_world(tmp_path: Path) -> None:
    run(tmp_path, [[(1, "one"), (2, "two")], [(3, "three")]])
    worlds = [known(tmp_path, name) for name in ("one", "two", "three")]
    assert [[rank["RANK"] for rank in world] for world in worlds] == [["0"], ["0", "1"], ["0", "1", "2"]]
    for world in worlds:
        assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) for rank in world} == {(f"{len(world)}",) * 2}
        assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in world}) == 1
        assert all(rank["RANK"] == rank["LOCAL_RANK"] for rank in world)
    ports = {world[0]["MASTER_PORT"] for world in worlds[:2]}
    assert len(ports) == 2, "worlds that run together do not meet"
    assert len({rank["loaded"] for world in worlds for rank in world}) == 1, "one process imported for all"
    assert (tmp_path / "world2_rank1.log").read_text() == "case of two\n"


def test_a_rank_that_fails_is_named_ends_the_others_and_no_world_follows(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(tmp_path, [[(3, "failing")], [(1, "later")]])
    message = str(caught.value)
    assert "rank 1 of 3 ended with 1 (2 others were stopped) in case of failing" in message
    assert "ValueError: this rank cannot go on" in message
    assert known(tmp_path, "later") == []


def test_ranks_that_take_too_long_are_ended(tmp_path: Path) -> None:
    waits = PROGRAM.replace('argument == "failing" and', "False and")
    with pytest.raises(RuntimeError, match="took longer than the time it has"):
        run(tmp_path, [[(2, "failing")]], waits, timeout=2)
    ranks = known(tmp_path, "failing")
    deadline = time.monotonic() + 30
    while any(runs(rank["process"]) for rank in ranks):
        assert time.monotonic() < deadline, "a rank was left running"
        time.sleep(0.05)


def test_a_program_that_fails_before_it_forks_is_shown(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)ended with 1 before any rank did.*no module that is there"):
        run(tmp_path, [[(1, "one")]], "raise ImportError('no module that is there')")
