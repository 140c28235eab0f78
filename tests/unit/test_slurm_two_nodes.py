"""The Slurm of two nodes: its configuration, what it reads of a job, what it refuses. Nothing is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import slurm_two_nodes
from benchmarks.namespaces import new_pair
from benchmarks.slurm_cluster import PACKAGES, PROGRAMS, check_slurm, gres_conf, read_job, slurm_conf
from benchmarks.slurm_two_nodes import SCRIPT, amiss_of, job_command, job_variables
from verl_ext.config import ConfigError

SHOWN = (
    "JobId=1 JobName=passrate-distill UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901759 Nice=0 "
    "Account=(null) QOS=(null) JobState=RUNNING Reason=None Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:01:26 NumNodes=2 ReqB:S:C:T=0:0:*:* TRES=cpu=32,node=2,billing=32,gres/gpu=2 Power=\n"
)


def test_a_job_is_read_by_key() -> None:
    job = read_job(SHOWN)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("RUNNING", "1", "0:0")
    assert (
        job["TRES"] == "cpu=32,node=2,billing=32,gres/gpu=2" and job["Power"] == "" and job["ReqB:S:C:T"] == "0:0:*:*"
    )


def test_every_file_of_slurm_is_in_its_folder_and_no_two_daemons_share_one() -> None:
    nodes = new_pair()
    lines = slurm_conf(Path("/state"), "host", nodes, 16).splitlines()
    paths = re.findall(r"[=](/[^,\s]+)", "\n".join(lines))
    assert len(paths) == len(set(paths)) == 7 and all(path.startswith("/state/") for path in paths)
    assert all("%n" in path for path in paths if "slurmd" in path)
    ports = re.findall(r"Port=(\d+)", "\n".join(lines))
    assert len(set(ports)) == 3 and all(int(port) > 1024 for port in ports)
    for node in nodes:
        assert sum(f"NodeAddr={node.address} " in line for line in lines) == 1
    assert f"SlurmctldHost=host({nodes[0].address})" in lines


def test_every_node_of_the_partition_and_of_the_devices_is_defined() -> None:
    text = slurm_conf(Path("/state"), "host", new_pair(), 16)
    defined = re.findall(r"^NodeName=(\S+)", text, re.M)
    assert re.search(r"^PartitionName=\S+ Nodes=(\S+)", text, re.M)[1].split(",") == defined
    assert re.match(r"NodeName=(\S+)", gres_conf())[1].split(",") == defined


def test_programs_that_are_missing_are_named_with_the_packages() -> None:
    check_slurm(lambda name: name)
    with pytest.raises(ConfigError, match=f"slurmd, sinfo not found: apt-get install .*{PACKAGES}"):
        check_slurm(lambda name: None if name in ("slurmd", "sinfo") else name)
    assert {"sbatch", "scontrol", "slurmctld", "munged"} <= set(PROGRAMS)


def test_every_request_of_the_script_for_a_large_machine_is_overridden(tmp_path: Path) -> None:
    """--exclusive, --signal, --requeue and --open-mode are meant to be those of the script."""
    asked = set(re.findall(r"^#SBATCH (--[a-z-]+)", SCRIPT.read_text(encoding="utf-8"), re.M))
    given = {word.split("=")[0] for word in job_command(tmp_path, []) if word.startswith("--")}
    kept = {"--exclusive", "--signal", "--requeue", "--open-mode", "--job-name", "--ntasks-per-node"}
    assert asked - given == kept


def test_the_variables_are_those_that_the_scripts_list() -> None:
    text = SCRIPT.read_text(encoding="utf-8") + SCRIPT.with_name("node.sh").read_text(encoding="utf-8")
    for name in job_variables(Path("/out"), Path("/ray"), "python x.py"):
        assert re.search(rf"^  {name} ", text, re.M), name


def result(**changes: object) -> dict[str, object]:
    part = {"processes": ["VLLM::EngineCore", "ray::WorkerDict"]}
    good = {
        "state": "COMPLETED", "exit_code": "0:0", "restarts": "1", "outcomes": ["preempted", "done"], "checkpoint": 2,
        "resumed_from": 2, "steps_lost": [], "steps_doubled": [], "not_finite": [], "ranks_without_files": [],
        "checkpoint_step": 6, "checkpoint_ranks": 2, "finished": True, "preempted_in": 2, "total": 200.0,
        "seconds": {"to_requeue": 5.0, "to_restart": 30.0, "restart_to_rollout": 60.0},
        "nodes": [{"address": name, "ray_address": name, **part} for name in ("a", "b")],
    }  # fmt: skip
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "told"),
    (
        ({"state": "FAILED"}, "the job's state is FAILED, not COMPLETED"),
        ({"restarts": "0"}, "the job's restarts is 0, not 1"),
        ({"outcomes": ["lost", "done"]}, "the supervisor saw ['lost', 'done']"),
        ({"resumed_from": 0}, "went on from 0, saved was 2"),
        ({"checkpoint": None, "resumed_from": None}, "went on from None, saved was None"),
        ({"steps_doubled": [3]}, "several rows, or beyond the last: 3"),
        ({"nodes": []}, "no node was looked at"),
    ),
)
def test_what_is_amiss_is_said(changes: dict[str, object], told: str) -> None:
    assert amiss_of(result(), 6) == []
    (said,) = amiss_of(result(**changes), 6)
    assert told in said


def test_the_table_names_the_preemption_and_what_is_amiss() -> None:
    shown = slurm_two_nodes.table(result(amiss=[]))
    assert "SIGUSR1 in step 2; requeued after 5.0 s, running again after 30.0 s" in shown
    assert "everything is as it should be" in shown and "amiss: x" in slurm_two_nodes.table(result(amiss=["x"]))


@pytest.mark.parametrize("step", ("0", "6"))
def test_a_preemption_without_a_step_before_or_after_it_is_refused(
    step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm_two_nodes.main(["--out", str(tmp_path / "out"), "--preempt-at", step]) == 2
    assert capsys.readouterr().err == f"error: --preempt-at {step}: expected 1 to 5 (--steps less one)\n"


def test_a_dry_run_prints_configuration_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm_two_nodes.main(["--out", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "ProctrackType=proctrack/linuxproc" in shown and f"{SCRIPT} model=tiny" in shown
    assert not (tmp_path / "out").exists()
