"""node.sh and train.sbatch, with executables in place of Ray, Slurm and the trainer, and with shorter seconds.

They show what the scripts do; `count_nodes` alone meets what the real Ray writes.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipe.compose import ROOT

pytestmark = pytest.mark.contract

NODE, SBATCH = ROOT / "scripts/slurm/node.sh", ROOT / "scripts/slurm/train.sbatch"
REQUEUE = 75
LIMIT = 90

RAY = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$FAKES/ray_calls"
case $1 in
  status)
    nodes=$(($(cat "$FAKES"/nodes_* 2>/dev/null | wc -l)))
    printf 'Node status\n-----\nActive:\n'
    for ((i = 0; i < nodes; i++)); do printf ' 1 node_%s\n' "$i"; done
    printf 'Pending:\n (no pending nodes)\nTotal Usage:\n 0.0/64.0 CPU\n 0.0/%s.0 GPU\n' "$((nodes * 2))"
    ;;
  start)
    if [[ -e $FAKES/refusals_left && $2 == --address* ]]; then
      rm "$FAKES/refusals_left"
      echo 'cannot connect' && exit 1
    fi
    if [[ -e $FAKES/head_refusals_left && $2 == --head ]]; then
      rm "$FAKES/head_refusals_left"
      echo 'timed out during startup' && exit 1
    fi
    [[ ! -e $FAKES/refuse ]] || { echo 'cannot connect' && exit 1; }
    if [[ -e $FAKES/leave ]]; then
      setsid sleep 300 &>/dev/null &
      echo $! >>"$FAKES/ray_pids"
      env -i /bin/sleep 300 &>/dev/null &
      echo $! >>"$FAKES/ray_pids"
    fi
    grep SigIgn /proc/self/status >"$FAKES/ray_ignores"
    echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH" >>"$FAKES/auth"
    echo node >"$FAKES/nodes_$$"
    echo $$ >>"$FAKES/ray_pids"
    exec sleep 300
    ;;
esac
"""

DRIVER = r"""#!/usr/bin/env bash
printf '%s\0' "$RAY_ADDRESS" "$@" >"$FAKES/driver.new"
grep SigIgn /proc/self/status >"$FAKES/driver_ignores"
if [[ -n ${DRIVER_WAITS:-} ]]; then
  trap 'echo USR1 >>"$FAKES/signals"; exit 75' USR1
  trap 'echo TERM >>"$FAKES/signals"; exit 143' TERM
  mv "$FAKES/driver.new" "$FAKES/driver"
  for ((i = 0; i < 600; i++)); do sleep 0.1; done
fi
mv "$FAKES/driver.new" "$FAKES/driver"
exit "${DRIVER_EXIT:-0}"
"""

SRUN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$FAKES/srun_calls"
while [[ $1 == --* ]]; do shift; done
[[ $1 != hostname ]] || { echo "127.0.0.1 fe80::1 10.1.2.3 10.9.9.9" && exit 0; }
[[ $1 != ip ]] || { echo "2: ib0    inet 10.5.5.5/24 brd 10.5.5.255 scope global ib0" && exit 0; }
while [[ $1 != bash ]]; do shift; done
for name in HEAD_ADDRESS PORT NODES NODE_RANK LOG_DIR GPUS_PER_NODE CPUS_PER_NODE RUN_COMMAND VENV; do
  printf '%s=%s\n' "$name" "${!name}"
done >"$FAKES/handed_$NODE_RANK"
printf '%s\n' "$@" >>"$FAKES/handed_$NODE_RANK"
exec "$@"
"""

SCONTROL = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$FAKES/scontrol_calls"
if [[ $1 == show ]]; then printf 'no-such-node-a\nno-such-node-b\n'; fi
"""

# The scripts look once a second whether something has ended. Four times in a second here.
SLEEP = r"""#!/usr/bin/env bash
[[ $1 != 1 ]] || set -- 0.25
exec /bin/sleep "$@"
"""


class Launcher:
    """Starts scripts among the fakes and ends whatever they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.processes: list[subprocess.Popen[str]] = []
        (folder / "venv" / "bin").mkdir(parents=True)
        for name, text in (("ray", RAY), ("python", DRIVER), ("srun", SRUN), ("scontrol", SCONTROL), ("sleep", SLEEP)):
            path = folder / "venv" / "bin" / name
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755)

    def start(self, script: Path, *arguments: str, **variables: object) -> subprocess.Popen[str]:
        settings = {"VENV": self.folder / "venv", "LOG_DIR": self.log, "GPUS_PER_NODE": 2, "CPUS_PER_NODE": 64,
                    "POLL_SECONDS": 0.2, "JOIN_TIMEOUT": 60, "PORT": 6400, "HEAD_ADDRESS": "10.0.0.1",
                    "FAKES": self.folder, "TEMP_DIR": self.folder / "ray", "HOME": self.folder,
                    "PATH": f"{self.folder}/venv/bin:/usr/bin:/bin", **variables}  # fmt: skip
        process = subprocess.Popen(
            [script, *arguments],
            env={key: str(value) for key, value in settings.items()}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def node(self, rank: int, *arguments: str, **variables: object) -> subprocess.Popen[str]:
        return self.start(NODE, *arguments, **{"NODE_RANK": rank, **variables})

    def job(self, *arguments: str, **variables: object) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": 4711, "SLURM_JOB_NODELIST": "no-such-node-[a-b]", "SLURM_SUBMIT_DIR": ROOT,
                 "OUTPUT": self.folder / "out"}  # fmt: skip
        return self.start(SBATCH, *arguments, **{**slurm, **variables})

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def driver(self) -> list[str]:
        """RAY_ADDRESS and the arguments of the driver."""
        return self.read("driver").split("\0")[:-1]

    def leftover(self) -> list[int]:
        """Ray processes that still run."""
        return [int(pid) for pid in self.read("ray_pids").split() if Path(f"/proc/{pid}").exists()]

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for pid in self.leftover():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    started = Launcher(tmp_path)
    yield started
    started.close()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=LIMIT)
    return process.returncode, output


def ignores_usr1(line: str) -> bool:
    return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


# ------------------------------------------------------------------------------------------------------ what Ray writes


def counted(text: str) -> str:
    """``count_nodes`` of node.sh on a text."""
    lines = NODE.read_text(encoding="utf-8").splitlines()
    first = lines.index("count_nodes() {")
    function = "\n".join(lines[first : lines.index("}", first) + 1])
    run = ["bash", "-c", f"{function}\ncount_nodes"]
    return subprocess.run(run, input=text, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def status_v1(nodes: int, gpus: float) -> str:
    from ray.autoscaler._private.util import LoadMetricsSummary, format_info_string

    usage = {"CPU": (3.0, 64.0), "GPU": (1.0, gpus), "memory": (0.0, 1e9)} if gpus else {"CPU": (3.0, 64.0)}
    metrics = LoadMetricsSummary(
        usage=usage, resource_demand=[({"GPU": 9.0}, 4)], pg_demand=[], request_demand=[], node_types=[]
    )
    summary = SimpleNamespace(
        active_nodes={f"node_{i:056x}": 1 for i in range(nodes)}, idle_nodes={}, pending_launches={}, pending_nodes=[],
        failed_nodes=[("10.0.0.9", "node_dead")], node_availability_summary=None, legacy=False,
    )  # fmt: skip
    return format_info_string(metrics, summary)


def status_v2(nodes: int, gpus: float) -> str:
    from ray.autoscaler.v2.schema import ClusterStatus, NodeInfo, ResourceUsage
    from ray.autoscaler.v2.utils import ClusterStatusFormatter

    def node(i: int) -> NodeInfo:
        return NodeInfo("node", f"node_{i:056x}", f"{i}", f"10.0.0.{i}")

    usage = [ResourceUsage("CPU", 64.0, 3.0)] + ([ResourceUsage("GPU", gpus, 1.0)] if gpus else [])
    status = ClusterStatus(
        active_nodes=[node(0)][:nodes], idle_nodes=[node(i) for i in range(1, nodes)], cluster_resource_usage=usage,
        failed_nodes=[node(99)],
    )  # fmt: skip
    return ClusterStatusFormatter.format(status)


@pytest.mark.parametrize("written", [status_v1, status_v2])
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (1, 8), (3, 24)])
def test_living_nodes_and_gpus_are_read_from_what_ray_writes(
    written: Callable[[int, float], str], nodes: int, gpus: int
) -> None:
    assert counted(written(nodes, float(gpus))) == f"{nodes} {gpus}", written(nodes, float(gpus))


def test_ray_has_every_option_that_is_used() -> None:
    # Read, not imported: its command line imports all of Ray Serve.
    folder = Path(find_spec("ray").origin).parent
    source = (folder / "scripts/scripts.py").read_text(encoding="utf-8")
    there = set(re.findall(r'"(--[a-z-]+)"', source[: source.index("\ndef start(")].rpartition("@cli.command")[2]))
    lines = [line for line in NODE.read_text(encoding="utf-8").splitlines() if not line.startswith(("#", "  VENV"))]
    ours = "\n".join(line for line in lines if "arguments" in line or "start_ray --" in line or "own=(" in line)
    used = set(re.findall(r"(--[a-z][a-z-]+)", ours))
    assert {"--head", "--address", "--block", "--temp-dir", "--num-gpus", "--node-ip-address"} <= used <= there
    assert '"--address"' in (folder / "dashboard/modules/job/cli.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "No cluster status. It may take a few seconds for it to start up.\n"])
def test_no_status_is_no_nodes(text: str) -> None:
    assert counted(text) == "0 0"


# -------------------------------------------------------------------------------------------------------------- node.sh


def test_the_head_waits_for_every_node_before_the_driver_starts(launcher: Launcher) -> None:
    head = launcher.node(0, "a=b", "template='two  words'", NODES=2, RUN_COMMAND="python -m recipe.train x=y")
    until(lambda: "Ray has 1 of 2 nodes" in launcher.read("log/node_0.log"), "the head sees itself")
    assert not launcher.driver()
    (launcher.folder / "nodes_other").write_text("node\n", encoding="utf-8")
    code, output = ended(head)
    assert code == 0, output
    assert launcher.driver() == ["10.0.0.1:6400", "-m", "recipe.train", "x=y", "a=b", "template='two  words'"]
    assert "Ray has 1 of 2 nodes and 2 of 4 GPUs" in output and "Ray has 2 of 2 nodes and 4 of 4 GPUs" in output
    # Started in the background: the first look may be written before it.
    (start,) = [line for line in launcher.read("ray_calls").splitlines() if line.startswith("start ")]
    assert start.startswith("start --head --node-ip-address=10.0.0.1 --port=6400 ")
    assert "--num-gpus" not in start, "Ray has to find the GPUs itself"
    assert (launcher.log / "ended").exists() and not launcher.leftover()


def test_a_node_that_never_joins_is_named(launcher: Launcher) -> None:
    launcher.log.mkdir()
    (launcher.log / "node_2.log").write_text("[node 2] joins\ncannot connect\n\n", encoding="utf-8")
    code, output = ended(launcher.node(0, NODES=3, JOIN_TIMEOUT=1))
    assert code == 1
    assert "after 1 s (JOIN_TIMEOUT) 2 of 3 nodes and 4 of 6 GPUs are missing (GPUS_PER_NODE=2)" in output
    assert "rank 1: nothing was started there" in output and "rank 2: cannot connect" in output
    assert not launcher.driver() and not launcher.leftover()
    assert (launcher.log / "ended").exists(), "nodes that come later leave at once"


def test_gpus_that_ray_does_not_find_are_missing(launcher: Launcher) -> None:
    code, output = ended(launcher.node(0, GPUS_PER_NODE=8, JOIN_TIMEOUT=1))
    assert code == 1 and "0 of 1 nodes and 6 of 8 GPUs are missing" in output
    assert not launcher.driver()


def test_a_head_that_does_not_start_is_not_waited_for(launcher: Launcher) -> None:
    (launcher.folder / "refuse").touch()
    started = time.monotonic()
    code, output = ended(launcher.node(0, JOIN_TIMEOUT=600))
    assert code == 1 and "Ray's head did not start, or ended, 3 times" in output and "node_0.log" in output
    assert time.monotonic() - started < LIMIT


def test_a_head_that_was_too_slow_once_is_started_again(launcher: Launcher) -> None:
    (launcher.folder / "head_refusals_left").touch()
    code, output = ended(launcher.node(0))
    assert code == 0 and "Ray's head is not running: once more" in output
    assert launcher.driver() and not launcher.leftover()


def test_what_ray_leaves_behind_is_ended_and_nothing_else(launcher: Launcher) -> None:
    # One in a session of its own, as Ray's workers may be; one without the environment, as Ray's agents seem to be.
    (launcher.folder / "leave").touch()
    other = subprocess.Popen(["sleep", "300"], env={"PASSRATE_NODE": f"1:{launcher.log}", "PATH": "/usr/bin:/bin"})
    try:
        code, output = ended(launcher.node(0))
        assert code == 0 and "ended what Ray left behind" in output
        assert other.poll() is None and len(launcher.read("ray_pids").split()) == 3
        until(lambda: not launcher.leftover(), "all of Ray has ended")
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("exit_code", [0, 1, REQUEUE])
def test_the_drivers_exit_code_is_the_nodes(launcher: Launcher, exit_code: int) -> None:
    code, output = ended(launcher.node(0, DRIVER_EXIT=exit_code))
    assert code == exit_code, output


@pytest.mark.parametrize(("name", "code"), [("USR1", REQUEUE), ("TERM", 143)])
@pytest.mark.parametrize("way", ["process", "file"])
def test_a_signal_reaches_the_driver_and_its_exit_code_comes_back(
    launcher: Launcher, name: str, code: int, way: str
) -> None:
    head = launcher.node(0, DRIVER_WAITS=1)
    until(launcher.driver, "the driver runs")
    if way == "process":
        head.send_signal(getattr(signal, f"SIG{name}"))
    else:
        (launcher.log / "signal").write_text(f"{name}\n", encoding="utf-8")
    found, output = ended(head)
    assert (found, launcher.read("signals").split()) == (code, [name]), output
    assert not launcher.leftover()


def test_ray_ignores_sigusr1_and_the_driver_does_not(launcher: Launcher) -> None:
    assert ended(launcher.node(0))[0] == 0
    assert ignores_usr1(launcher.read("ray_ignores"))
    assert not ignores_usr1(launcher.read("driver_ignores"))


def test_a_worker_joins_in_the_end_and_leaves_with_the_head(launcher: Launcher) -> None:
    (launcher.folder / "refusals_left").touch()
    worker = launcher.node(1, NODES=2, LOGICAL_GPUS=1)
    head = launcher.node(0, NODES=2, DRIVER_EXIT=REQUEUE)
    assert ended(head)[0] == REQUEUE
    code, output = ended(worker)
    assert code == 0 and "Ray is not running here: once more" in output and "rank 0 has ended" in output
    starts = launcher.read("ray_calls").splitlines()
    joins = [line for line in starts if line.startswith("start --address=10.0.0.1:6400")]
    assert len(joins) == 2 and "--num-gpus=2" in joins[0]
    token = launcher.log / "ray_token"
    assert set(launcher.read("auth").splitlines()) == {f"token {token}"}
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text(encoding="utf-8")) == 64
    assert not launcher.leftover()


@pytest.mark.parametrize("token", [True, False])
def test_a_worker_that_cannot_join_gives_up(launcher: Launcher, token: bool) -> None:
    launcher.log.mkdir()
    (launcher.folder / "refuse").touch()
    if token:
        (launcher.log / "ray_token").write_text("t", encoding="utf-8")
    code, output = ended(launcher.node(1, NODES=2, JOIN_TIMEOUT=2))
    said = "could not join 10.0.0.1:6400 within 2 s" if token else "rank 0 wrote no"
    assert code == 1 and said in output


def test_a_log_folder_serves_one_start_only(launcher: Launcher) -> None:
    assert ended(launcher.node(0))[0] == 0
    code, output = ended(launcher.node(0))
    assert code == 1 and "was used before" in output


# --------------------------------------------------------------------------------------------------------- train.sbatch


def test_a_job_runs_on_all_its_nodes_and_is_requeued_when_the_driver_says_so(launcher: Launcher) -> None:
    code, output = ended(launcher.job("method=grpo", "a='b  c'", HEAD_ADDRESS="", DRIVER_EXIT=REQUEUE))
    assert code == 0 and f"exit code {REQUEUE}: requeued" in output
    assert launcher.read("scontrol_calls").splitlines() == ["show hostnames no-such-node-[a-b]", "requeue 4711"]
    assert launcher.driver() == [
        "10.1.2.3:6400", "-m", "recipe.supervise", "--", "python", "-m", "recipe.train", "hardware=gpu",
        "trainer.nnodes=2", "trainer.n_gpus_per_node=2", f"run.output_dir={launcher.folder}/out", "method=grpo",
        "a='b  c'",
    ]  # fmt: skip
    steps = [line for line in launcher.read("srun_calls").splitlines() if "node.sh" in line]
    for node in "ab":
        options = f"--overlap --nodes=1 --ntasks=1 --cpus-per-task=64 --nodelist=no-such-node-{node} bash "
        assert [line for line in steps if line.startswith(options)], steps
    assert {path.name for path in (launcher.log / "0").glob("node_*.log")} == {"node_0.log", "node_1.log"}
    assert not launcher.leftover()


def test_what_each_node_is_handed(launcher: Launcher) -> None:
    job = launcher.job("method=grpo", "a='b  c'", RUN_COMMAND="python -m recipe.sft x=y", CPUS_PER_NODE=12)
    assert ended(job)[0] == 0
    overrides = ["trainer.nnodes=2", "trainer.n_gpus_per_node=2", f"run.output_dir={launcher.folder}/out"]
    for rank, arguments in ((0, [*overrides, "method=grpo", "a='b  c'"]), (1, [])):
        handed = [
            "HEAD_ADDRESS=10.0.0.1", "PORT=6400", "NODES=2", f"NODE_RANK={rank}", f"LOG_DIR={launcher.log}/0",
            "GPUS_PER_NODE=2", "CPUS_PER_NODE=12",
            "RUN_COMMAND=python -m recipe.supervise -- python -m recipe.sft x=y", f"VENV={launcher.folder}/venv",
            "bash", f"{ROOT}/scripts/slurm/node.sh", *arguments,
        ]  # fmt: skip
        assert launcher.read(f"handed_{rank}").splitlines() == handed


@pytest.mark.parametrize(
    ("exit_code", "variables"), [(0, {}), (3, {}), (REQUEUE, {"SLURM_RESTART_COUNT": 2, "MAX_RESTARTS": 2})]
)
def test_any_other_end_is_the_jobs_end(launcher: Launcher, exit_code: int, variables: dict[str, int]) -> None:
    code, output = ended(launcher.job(DRIVER_EXIT=exit_code, **variables))
    assert code == exit_code, output
    assert "requeue" not in launcher.read("scontrol_calls")


@pytest.mark.parametrize(("name", "code", "calls"), [("USR1", 0, 1), ("TERM", 143, 0)])
def test_a_signal_to_the_batch_shell_reaches_the_driver(launcher: Launcher, name: str, code: int, calls: int) -> None:
    job = launcher.job(DRIVER_WAITS=1)
    until(launcher.driver, "the driver runs")
    job.send_signal(getattr(signal, f"SIG{name}"))
    found, output = ended(job)
    assert (found, launcher.read("signals").split()) == (code, [name]), output
    assert launcher.read("scontrol_calls").count("requeue") == calls


def test_the_supervisor_stands_before_any_command_and_may_be_left_out(launcher: Launcher) -> None:
    assert ended(launcher.job(RUN_COMMAND="python x.py", SUPERVISOR="python -m watch --"))[0] == 0
    assert launcher.driver()[1:6] == ["-m", "watch", "--", "python", "x.py"]
    (launcher.folder / "driver").unlink()
    assert ended(launcher.job(RUN_COMMAND="python x.py", SUPERVISOR="", LOG_DIR=launcher.folder / "second"))[0] == 0
    assert launcher.driver()[1] == "x.py"


def test_the_head_is_found_on_the_interface_that_is_asked_for(launcher: Launcher) -> None:
    assert ended(launcher.job(HEAD_ADDRESS="", INTERFACE="ib0"))[0] == 0
    assert launcher.driver()[0] == "10.5.5.5:6400"


def test_a_port_that_is_taken_is_passed_over(launcher: Launcher) -> None:
    for job in range(100, 200):
        with suppress(OSError), socket.create_server(("127.0.0.1", 20000 + job)):
            assert ended(launcher.job(HEAD_ADDRESS="127.0.0.1", PORT="", SLURM_JOB_ID=12000 + job))[0] == 0
            address, _, found = launcher.driver()[0].rpartition(":")
            assert address == "127.0.0.1" and 20000 + job < int(found) < 20000 + job + 50
            return
    pytest.skip("no port from 20100 to 20199 is free")


def test_containers_are_asked_for_in_their_own_way(launcher: Launcher) -> None:
    assert ended(launcher.job(VENV="", CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/x:/y"))[0] == 0
    assert f"--container-image=image.sqsh --container-workdir={ROOT} --container-mounts={ROOT}:{ROOT},/x:/y bash " in (
        launcher.read("srun_calls")
    )
    (launcher.folder / "driver").unlink()
    folder = launcher.folder / "second"
    assert ended(launcher.job(VENV="", APPTAINER_IMAGE="image.sif", LOG_DIR=folder))[0] == 0
    assert f" apptainer exec --nv --pwd {ROOT} --bind {ROOT}:{ROOT} image.sif bash " in launcher.read("srun_calls")
    code, output = ended(launcher.job(APPTAINER_IMAGE="a", CONTAINER_IMAGE="b"))
    assert code == 1 and "exclude each other" in output


def test_a_folder_that_is_not_the_checkout_is_refused(launcher: Launcher) -> None:
    code, output = ended(launcher.job(SLURM_SUBMIT_DIR=launcher.folder))
    assert code == 1 and "is not the checkout" in output
