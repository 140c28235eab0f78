"""A real Slurm of Debian's packages (slurmctld, two slurmd, munge) over a pair of namespaces, in a folder of its own.

Its key, sockets, ports and state are its own: a Slurm that is there already is neither used nor touched. What it needs
to run unprivileged in a container: no cgroups (proctrack/linuxproc, task/none), and CPUs that the host does not have
(config_overrides).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.namespaces import Command, Node
from verl_ext.config import ConfigError

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo")
PACKAGES = "slurmctld slurmd slurm-client munge"
MUNGE_USER = "munge"
NODE_NAMES = ("n0", "n1")
CONTROL_PORT, NODE_PORT = 26817, 26818
SECONDS_TO_START = 60.0


def check_slurm(which: Callable[[str], str | None] = shutil.which) -> None:
    """Raises ConfigError where Slurm's programs are not installed."""
    if missing := [name for name in PROGRAMS if which(name) is None]:
        raise ConfigError(f"{', '.join(missing)} not found: apt-get install --no-install-recommends {PACKAGES}")


def slurm_conf(folder: Path, host: str, nodes: Sequence[Node], cpus: int) -> str:
    """The text of slurm.conf; ``host`` is the name that both nodes share, ``cpus`` logical ones of each."""
    lines = [
        "ClusterName=two",
        f"SlurmctldHost={host}({nodes[0].address})",
        f"SlurmctldPort={CONTROL_PORT}",
        "SlurmUser=root",
        "SlurmdUser=root",
        # A job that is requeued waits for the old credentials to expire, two minutes by default.
        f"AuthInfo=socket={folder}/munge/socket,cred_expire=10",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd.%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "SlurmdTimeout=20",
        "KillWait=10",
        "GresTypes=gpu",
    ]
    for rank, (name, node) in enumerate(zip(NODE_NAMES, nodes, strict=True)):
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr={node.address} Port={NODE_PORT + rank} CPUs={cpus} "
            "Gres=gpu:1 State=UNKNOWN"
        )
    lines.append(f"PartitionName=two Nodes={','.join(NODE_NAMES)} Default=YES MaxTime=INFINITE State=UP")
    return "\n".join(lines) + "\n"


def gres_conf() -> str:
    """A device that exists, so that Slurm counts it as a GPU."""
    return f"NodeName={','.join(NODE_NAMES)} Name=gpu File=/dev/null\n"


def read_job(text: str) -> dict[str, str]:
    """`scontrol show job --oneliner` by key."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", text))


class SlurmCluster:
    """Daemons in the namespaces; they end with these."""

    def __init__(self, folder: Path, nodes: Sequence[Node], *, cpus: int) -> None:
        """``folder``: new, with a short path, which other users may enter."""
        self.folder, self.nodes, self.cpus = folder, nodes, cpus
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Raises ConfigError where the nodes are not ready after a minute; says what a daemon said last."""
        self._write_files()
        munge, head = self.folder / "munge", self.nodes[0]
        self._daemon(
            "munged",
            head.inside([
                "setpriv", f"--reuid={MUNGE_USER}", f"--regid={MUNGE_USER}", "--clear-groups", "munged", "--foreground",
                f"--socket={munge}/socket", f"--key-file={munge}/key", f"--pid-file={munge}/pid",
                f"--seed-file={munge}/seed", f"--log-file={munge}/log", f"--origin={head.address}",
            ]),
        )  # fmt: skip
        self._await("munged", (munge / "socket").exists)
        self._daemon("slurmctld", head.inside(["slurmctld", "-D"]))
        for name, node in zip(NODE_NAMES, self.nodes, strict=True):
            self._daemon(f"slurmd.{name}", node.inside(["slurmd", "-D", "-N", name]))
        self._await("slurmctld", lambda: self._states() == ["idle"] * len(self.nodes))

    def client(self, command: Command, environment: Mapping[str, str] | None = None) -> str:
        """What a client of Slurm prints on the first node. Raises ConfigError with what it said where it fails."""
        done = subprocess.run(
            self.nodes[0].inside(command),
            env={**(os.environ if environment is None else environment), **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ConfigError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """A job by key, as scontrol shows it."""
        return read_job(self.client(["scontrol", "show", "job", "--oneliner", number]))

    def _states(self) -> list[str]:
        try:
            return self.client(["sinfo", "--noheader", "--Node", "--format=%t"]).split()
        except ConfigError:  # the controller does not answer yet
            return []

    def _write_files(self) -> None:
        munge = self.folder / "munge"
        for path in (munge, self.folder / "state", *(self.folder / f"spool.{name}" for name in NODE_NAMES)):
            path.mkdir()
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o600)
        shutil.chown(munge, MUNGE_USER, MUNGE_USER)
        shutil.chown(munge / "key", MUNGE_USER, MUNGE_USER)
        conf = slurm_conf(self.folder, socket.gethostname(), self.nodes, self.cpus)
        (self.folder / "slurm.conf").write_text(conf, encoding="utf-8")
        (self.folder / "gres.conf").write_text(gres_conf(), encoding="utf-8")

    def _daemon(self, name: str, command: Command) -> None:
        with open(self.folder / f"{name}.out", "wb") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not ready():
            ended = [other for other, process in self._daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                said = {other: _tail(self.folder / f"{other}.out") for other in ended or [name]}
                raise ConfigError(f"Slurm did not start: {'; '.join(f'{k}: {v}' for k, v in said.items())}")
            time.sleep(0.2)


def _tail(path: Path, lines: int = 3) -> str:
    return " | ".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]) or "said nothing"
