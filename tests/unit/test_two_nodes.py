"""The campaign over two nodes: what it would run, what it finds in files, what it refuses. Nothing is started."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import two_nodes
from benchmarks.namespaces import ADDRESSES, check_possible, link_down, link_up, making, new_pair, removing
from benchmarks.node_launch import LaunchSettings, environment, node_command
from benchmarks.node_runs import address_in, nodes_amiss, tiny_run
from benchmarks.run_checks import complaints, not_finite, run_checks, steps_amiss
from benchmarks.two_nodes import Loss, loss_of
from verl_ext.checkpoint_manifest import Manifest, seal_files, write_manifest
from verl_ext.config import ConfigError


def test_the_nodes_of_two_runs_have_other_names_and_every_namespace_that_is_made_is_removed() -> None:
    one, other = new_pair(), new_pair()
    assert not {node.name for node in one} & {node.name for node in other}
    made = [command[-1] for command in making(one) if command[:3] == ["ip", "netns", "add"]]
    assert made == [command[-1] for command in removing(one)] == [node.name for node in one]


def test_nothing_is_made_outside_of_the_namespaces() -> None:
    nodes = new_pair()
    names = {node.name for node in nodes}
    for command in [*making(nodes), *link_up(nodes[0]), *link_down(nodes[1])]:
        assert command[:3] == ["ip", "netns", "add"] or names & set(command), command
    (link,) = [command for command in making(nodes) if "veth" in command]
    assert names <= set(link), "both ends of the link are made inside"
    assert [word for command in making(nodes) if "addr" in command for word in command if "/" in word] == [
        f"{address}/24" for address in ADDRESSES
    ]


@pytest.mark.parametrize(
    ("which", "user", "told"),
    (
        (lambda name: None, 0, "ip and nsenter not found"),
        (lambda name: None if name == "ip" else name, 0, "ip not found: install iproute2"),
        (lambda name: name, 1000, "by root only"),
    ),
)
def test_where_namespaces_cannot_be_made_it_says_so(which: Callable[[str], str | None], user: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_possible(which, user)


def settings(folder: Path) -> LaunchSettings:
    return LaunchSettings(folder / "launches", folder / "ray", ("model=tiny",))


def test_ranks_share_a_launch_and_launches_share_nothing(tmp_path: Path) -> None:
    nodes = new_pair()
    head, worker = (environment(settings(tmp_path), nodes, rank, 0) for rank in (0, 1))
    different = {key for key in head if head[key] != worker[key]}
    assert different == {"NODE_ADDRESS", "NODE_RANK", "TEMP_DIR"}
    again = environment(settings(tmp_path), nodes, 0, 1)
    assert {key for key in head if head[key] != again[key]} == {"LOG_DIR", "PORT"}
    assert head["RUN_COMMAND"].startswith("python -m recipe.supervise -- ")


def test_only_the_head_is_given_the_runs_arguments(tmp_path: Path) -> None:
    nodes = new_pair()
    head, worker = (node_command(settings(tmp_path), node, rank) for rank, node in enumerate(nodes))
    assert head[1] == f"--net=/run/netns/{nodes[0].name}" and worker[1] == f"--net=/run/netns/{nodes[1].name}"
    assert head[-1] == "model=tiny" and worker[-1].endswith("node.sh")


def test_what_is_given_wins_but_for_the_folder(tmp_path: Path) -> None:
    words = tiny_run(tmp_path, 8, 2, ["run.steps=3"])
    assert words.index("run.steps=3") > words.index("run.steps=8")
    assert words[-1] == f"run.output_dir={tmp_path}"


# ------------------------------------------------------------------------------------------------------------ the files


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 8))
def test_steps_that_are_lost_or_doubled_are_named(found: list[int], steps: int) -> None:
    amiss = steps_amiss([{"step": step} for step in found], steps)
    counts = Counter(found)
    assert amiss["lost"] == [step for step in range(1, steps + 1) if counts[step] == 0]
    assert amiss["doubled"] == sorted(step for step in set(found) if step and (counts[step] > 1 or step > steps))


@pytest.mark.parametrize("value", (None, math.nan, math.inf, "0.5", True))
def test_a_number_that_is_none_is_named(value: object) -> None:
    good = {"loss": 0.1, "reward/mean": 0, "time/step": 2.5}
    rows = [{"step": 0}, {"step": 1, **good}, {"step": 2, **good, "loss": value}]
    assert not_finite(rows[:2]) == [] and not_finite(rows) == ["2 loss"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps on two ranks, as it should be."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "global_step_2"
    (checkpoint / "actor").mkdir(parents=True)
    names = [f"actor/model_world_size_2_rank_{rank}.pt" for rank in (0, 1)]
    for name in names:
        (checkpoint / name).write_text(name)
    write_manifest(checkpoint, Manifest(2, 2, seal_files(checkpoint, names)))
    rows = [{"step": step, "loss": 0.1, "reward/mean": 0.5, "time/step": 2.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "attempts.jsonl").write_text('{"outcome": "lost"}\n{"outcome": "done"}\n')
    (folder / "summary.json").write_text("{}\n")
    return folder


def test_a_run_that_is_as_it_should_be_has_nothing_amiss(run: Path) -> None:
    found = run_checks(run, 2, 2)
    assert complaints(found, 2, 2) == [] and found["outcomes"] == ["lost", "done"]


def damage(run: Path) -> None:
    (run / "checkpoints" / "global_step_2" / "actor" / "model_world_size_2_rank_1.pt").write_text("other")


@pytest.mark.parametrize(
    ("harm", "steps", "ranks", "told"),
    (
        (lambda run: None, 3, 2, ["without a row in metrics.jsonl: 3", "is of step 2, not 3"]),
        (lambda run: None, 2, 4, ["ranks without a file in the last checkpoint: 0, 1, 2, 3", "is of 2 ranks, not 4"]),
        (damage, 2, 2, ["ranks without a file", "is of step None, not 2"]),
        (lambda run: (run / "summary.json").unlink(), 2, 2, ["did not finish"]),
        (lambda run: (run / "metrics.jsonl").unlink(), 2, 2, ["without a row in metrics.jsonl: 1, 2"]),
    ),
)
def test_what_is_amiss_in_a_run_is_said(
    run: Path, harm: Callable[[Path], object], steps: int, ranks: int, told: list[str]
) -> None:
    harm(run)
    said = complaints(run_checks(run, steps, ranks), steps, ranks)
    assert len(said) == len(told) and all(word in text for word, text in zip(told, said, strict=True)), said


def test_the_address_is_the_last_under_which_ray_started(tmp_path: Path) -> None:
    log = tmp_path / "node_1.log"
    assert address_in(log) is None
    log.write_text("INFO -- \x1b[37mLocal node IP\x1b[39m: \x1b[1m10.77.0.1\x1b[22m\n\nLocal node IP: 10.77.0.2\n")
    assert address_in(log) == "10.77.0.2"
    log.write_text("[node 1] joins\n")
    assert address_in(log) is None


def test_a_node_that_takes_no_part_is_named() -> None:
    good = {"address": "a", "ray_address": "a", "processes": ["VLLM::EngineCore", "ray::WorkerDict"]}
    assert nodes_amiss([good, {**good, "address": "b", "ray_address": "b"}]) == []
    assert nodes_amiss([]) == ["no node was looked at"]
    assert nodes_amiss([good, {"address": "b", "ray_address": None, "processes": ["ray::IDLE"]}]) == [
        "b: Ray started under None", "b: no model worker ran there", "b: no vLLM ran there",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the loss


def lost(**changes: object) -> Loss:
    good = {"step": 4, "driver_seconds": 12.0, "code": 75, "outcome": "lost", "checkpoint": 2, "resumed_from": 2}
    return Loss("link", "update", **{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    (
        ({"step": 0}, "the run ended before it"),
        ({"driver_seconds": 30.1}, "ended after 30.1 s, allowed are 30 s"),
        ({"driver_seconds": None}, "did not end, allowed are 30 s"),
        ({"code": 1}, "exit code 1, not 75"),
        ({"outcome": "failed"}, "calls it 'failed', not 'lost'"),
        ({"resumed_from": 0}, "went on from 0, the last checkpoint was 2"),
        ({"resumed_from": None}, "went on from None"),
    ),
)
def test_a_loss_is_held_against_what_should_have_come_of_it(changes: dict[str, object], told: str) -> None:
    assert lost().amiss(30.0) == []
    (said,) = lost(**changes).amiss(30.0)
    assert said.startswith("link in update: ") and told in said


def test_a_loss_is_a_fault_and_a_phase() -> None:
    assert loss_of("raylet:rollout") == Loss("raylet", "rollout")


@pytest.mark.parametrize("words", (["--losses", "raylet:walk"], ["--losses", "cable:update"], ["--losses", "raylet"]))
def test_other_losses_are_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        two_nodes.main(["--out", str(tmp_path / "out"), *words])
    assert ended.value.code == 2 and "expected FAULT:PHASE, raylet or link and rollout or update" in (
        capsys.readouterr().err
    )


def test_a_folder_with_something_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(two_nodes, "check_possible", lambda: None)
    (tmp_path / "old").touch()
    assert two_nodes.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path} is not empty; choose a new folder\n"


def test_a_dry_run_prints_what_would_be_run_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert two_nodes.main(["--out", str(tmp_path / "out"), "--dry-run", "--losses", "link:rollout"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ip netns add ") and lines[-1].startswith("ip netns delete ")
    assert sum("scripts/slurm/node.sh" in line for line in lines) == 2
    assert any(line.endswith("link set eth0 down") for line in lines)
    assert not (tmp_path / "out").exists()


def test_the_table_has_a_line_a_loss_and_what_is_amiss() -> None:
    shown = two_nodes.table(
        {"losses": [vars(lost()), vars(lost(step=0, driver_seconds=None, code=None))], "nodes": [], "amiss": ["x"]}
    ).splitlines()
    assert shown[1].split() == ["link", "update", "4", "12.0", "s", "-", "75", "2", "of", "2"]
    assert shown[2].split()[:6] == ["link", "update", "0", "-", "-", "-"] and shown[-1] == "amiss: x"
