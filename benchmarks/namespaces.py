"""Two network namespaces as the nodes of a cluster on one host.

Each has an address, a loopback and routes of its own, and they are joined by a link that can be cut. Files, memory,
process ids and the clock are the host's. Nothing is changed outside of the namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from verl_ext.config import ConfigError

INTERFACE = "eth0"
"""In both, so that one GLOO_SOCKET_IFNAME fits both."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
"""Seen inside only: two such pairs on one host do not meet."""
TOOLS = ("ip", "nsenter")
SECONDS_TO_DIE = 20.0
ENDING = (signal.SIGTERM, signal.SIGHUP)

Command = list[str]


@dataclass(frozen=True)
class Node:
    """A namespace and its address."""

    name: str
    address: str

    def inside(self, command: Sequence[str]) -> Command:
        """The command, run in the namespace. Not `ip netns exec`: that hides the host's cgroups, without which slurmd
        does not start."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *command]

    def pids(self) -> list[int]:
        """All processes in the namespace."""
        return [int(word) for word in _run(["ip", "netns", "pids", self.name]).split()]

    def processes(self, name: str | None = None) -> list[psutil.Process]:
        """Those of a name; None: all. Zombies left out."""
        found = []
        for pid in self.pids():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if name in (None, process.name()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def new_pair() -> tuple[Node, Node]:
    """Two nodes with names of their own; nothing is made yet."""
    word = uuid.uuid4().hex[:6]
    first, second = (Node(f"node-{word}-{rank}", address) for rank, address in enumerate(ADDRESSES))
    return first, second


def making(nodes: Sequence[Node]) -> list[Command]:
    """The commands that make two namespaces and the link between them."""
    first, second = nodes
    link = ["ip", "link", "add", INTERFACE, "netns", first.name, "type", "veth"]
    commands = [["ip", "netns", "add", node.name] for node in nodes]
    commands.append([*link, "peer", "name", INTERFACE, "netns", second.name])
    for node in nodes:
        commands.append(["ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", INTERFACE])
        commands.append(["ip", "-n", node.name, "link", "set", "lo", "up"])
    for node in nodes:
        commands += link_up(node)
    return commands


def link_up(node: Node) -> list[Command]:
    """Joins a node again. The route leads nowhere, but who asks for this host's own address finds it by it."""
    return [
        ["ip", "-n", node.name, "link", "set", INTERFACE, "up"],
        ["ip", "-n", node.name, "route", "replace", "default", "dev", INTERFACE],
    ]


def link_down(node: Node) -> list[Command]:
    """Cuts a node off; its route goes with the link."""
    return [["ip", "-n", node.name, "link", "set", INTERFACE, "down"]]


def removing(nodes: Sequence[Node]) -> list[Command]:
    """The commands that remove the namespaces, once nothing runs in them; the link goes with them."""
    return [["ip", "netns", "delete", node.name] for node in nodes]


def check_possible(which: Callable[[str], str | None] = shutil.which, user: int | None = None) -> None:
    """Raises ConfigError where namespaces cannot be made here."""
    missing = [name for name in TOOLS if which(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not found: install iproute2 and util-linux (Linux only)")
    if (os.geteuid() if user is None else user) != 0:
        raise ConfigError(
            "network namespaces are made by root only: run it with sudo, or in a container with CAP_NET_ADMIN"
        )


def run_all(commands: Sequence[Command]) -> None:
    """Raises ConfigError with what a command said."""
    for command in commands:
        _run(command)


def _run(command: Command) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def end_processes(nodes: Sequence[Node], *, seconds: float = 0.0) -> list[str]:
    """Waits for the processes in the namespaces, then kills what is left; returns the names of those."""
    deadline = time.monotonic() + seconds
    while any(node.processes() for node in nodes) and time.monotonic() < deadline:
        time.sleep(0.1)
    names: list[str] = []
    # Once more for what was started in the meantime.
    killed: set[int] = set()
    deadline = time.monotonic() + SECONDS_TO_DIE
    while left := [process for node in nodes for process in node.processes()]:
        for process in left:
            with suppress(psutil.Error):
                if process.pid not in killed:
                    names.append(process.name())
                killed.add(process.pid)
                process.kill()
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(process.pid for process in left)} do not end")
        # Not psutil's wait: it would take the exit codes of this process's own children.
        time.sleep(0.05)
    return sorted(names)


@contextmanager
def namespaces(nodes: Sequence[Node]) -> Iterator[None]:
    """Inside, the namespaces exist. Afterwards they and every process in them are gone, also after Ctrl-C, SIGTERM and
    SIGHUP. After SIGKILL of this process they stay: `ip netns list`, `ip netns delete`."""
    with _ended_by_signals():
        try:
            run_all(making(nodes))
            yield
        finally:
            with _undisturbed():
                there = [node for node in nodes if Path(f"/run/netns/{node.name}").exists()]
                end_processes(there)
                run_all(removing(there))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What would end this process at once raises instead, so that it leaves nothing."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *ENDING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
