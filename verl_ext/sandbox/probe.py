"""Which layers of the local sandbox work on this machine, found out by trying, and whether they are enough.

Enough means: no network, no writing and no reading outside, no processes that outlive the sandbox. A program of ours
tries all of it inside; what it reports is checked from outside where it leaves a trace.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .local import LAYERS, run_cases
from .types import DONE, Case, Limits, Program, SandboxError

ADVICE = (
    "Give the URL of a SandboxFusion server instead (option sandbox), or run where user namespaces or Landlock exist"
)
_LIMITS = Limits(cpu_seconds=5, wall_seconds=20, total_seconds=30)

# Each attempt prints nothing and either succeeds or raises; the report is what succeeded.
_ATTEMPTS = """
import json, os, socket
outside, port, caller = json.loads(input())
file = outside + "/file"

def connect():
    socket.create_connection(("127.0.0.1", port), timeout=5).close()

def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x", ("127.0.0.1", port))

def connect_unix():  # by a relative name: a socket's whole path may have 107 bytes
    here = os.getcwd()
    os.chdir(outside)
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.connect("socket")
    finally:
        os.chdir(here)

def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()

attempts = {
    "connect": connect,
    "send": send,
    "connect_unix": connect_unix,
    "read": lambda: open(file).read(),
    "environment": lambda: open(f"/proc/{caller}/environ").read(),
    "memory": lambda: open(f"/proc/{caller}/mem", "rb").close(),
    "overwrite": lambda: open(file, "w").write("x"),
    "truncate": lambda: os.truncate(file, 0),
    "empty": lambda: os.close(os.open(file, os.O_RDONLY | os.O_TRUNC)),
    "chmod": lambda: os.chmod(file, 0o777),
    "utime": lambda: os.utime(file, (1, 1)),
    "create": lambda: open(outside + "/new", "w").close(),
    "link": lambda: os.link(file, outside + "/link"),
    "remove": lambda: os.remove(file),
    "signal": lambda: os.kill(caller, 0),
    "fork": fork,
}
succeeded = []
for name, attempt in attempts.items():
    try:
        attempt()
        succeeded.append(name)
    except OSError:
        pass
open("own", "w").write("x")
print(json.dumps(succeeded))
"""
_WRITES = ("overwrite", "truncate", "empty", "chmod", "utime", "create", "link", "remove")
_NETWORK = ("connect", "send", "connect_unix")
_READS = ("read", "environment", "memory")


@dataclass(frozen=True)
class Layers:
    """What was found.

    Attributes:
        names: the layers that work, together; out of local.LAYERS.
        missing: the others, with the reason.
        breaches: what a program could still do with these layers: names of attempts, in words.
    """

    names: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]
    breaches: tuple[str, ...]

    @property
    def enough(self) -> bool:
        """Whether untrusted code may run."""
        return not self.breaches

    def __str__(self) -> str:
        parts = [f"layers: {', '.join(self.names) or 'none'} and resource limits"]
        parts += [f"no {name}: {reason}" for name, reason in self.missing]
        parts += [f"not prevented: {', '.join(self.breaches)}"] if self.breaches else []
        return "; ".join(parts)


def _reason_against(layers: Sequence[str]) -> str | None:
    """Why a harmless program does not run with these layers; None where it does."""
    try:
        (outcome,) = run_cases(Program("import json"), [Case()], _LIMITS, layers)
    except SandboxError as error:
        return str(error)
    return None if outcome.kind == DONE else f"a harmless program ended with {outcome.kind}: {outcome.stderr[-200:]}"


def breaches(layers: Sequence[str]) -> tuple[str, ...]:
    """What a program can do with exactly these layers that it should not: really tried.

    Raises:
        SandboxError: the layers do not work, or the trial itself failed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-probe-") as outside,
        socket.socket() as listener,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        os.chmod(outside, 0o777)
        file = Path(outside, "file")
        file.write_text("secret")
        file.chmod(0o666)
        descriptor = os.open(outside, os.O_RDONLY | os.O_DIRECTORY)
        try:
            unix.bind(f"/proc/self/fd/{descriptor}/socket")  # short, however long the folder's own path is
        finally:
            os.close(descriptor)
        os.chmod(outside + "/socket", 0o777)
        unix.listen()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        before = file.stat()
        stdin = json.dumps([outside, listener.getsockname()[1], os.getpid()])
        (outcome,) = run_cases(Program(_ATTEMPTS), [Case(stdin=stdin)], _LIMITS, layers)
        if outcome.kind != DONE:
            raise SandboxError(f"the trial program ended with {outcome.kind}: {outcome.stderr[-500:]}")
        succeeded = set(json.loads(outcome.stdout))
        try:
            listener.accept()[0].close()
            succeeded.add("connect")
        except BlockingIOError:
            pass
        after = file.stat() if file.exists() else None
        same = after is not None and (after.st_mode, after.st_mtime_ns, after.st_size, after.st_nlink) == (
            before.st_mode,
            before.st_mtime_ns,
            before.st_size,
            before.st_nlink,
        )
        if not same or sorted(os.listdir(outside)) != ["file", "socket"]:
            succeeded.add("overwrite")
    found = []
    if succeeded.intersection(_NETWORK):
        found.append("network")
    if succeeded.intersection(_WRITES):
        found.append("writing outside")
    if succeeded.intersection(_READS):
        found.append("reading outside")
    if "signal" in succeeded:
        found.append("signals to other processes")
    if "fork" in succeeded and "namespaces" not in layers:
        found.append("processes that outlive the sandbox")
    return tuple(found)


@functools.cache
def probe(without: tuple[str, ...] = ()) -> Layers:
    """Try every layer, then all that work together. The result is kept for the life of the process.

    Args:
        without: layers to leave out.

    Raises:
        SandboxError: not even a process with resource limits can be run.
    """
    missing = [(name, "switched off") for name in LAYERS if name in without]
    names: list[str] = []
    for name in LAYERS:
        if name in without:
            continue
        if name == "uid" and os.geteuid() != 0:
            missing.append((name, "not root: programs run as this user"))
            continue
        # A user id of its own needs a root in which the interpreter can be read: tried on top of the others.
        reason = _reason_against([*names, name])
        if reason is None:
            names.append(name)
        else:
            missing.append((name, reason))
    return Layers(tuple(names), tuple(missing), breaches(names))


def require(without: tuple[str, ...] = ()) -> Layers:
    """The layers to run untrusted code with.

    Raises:
        SandboxError: they do not prevent all that they must; the message says what, why, and what to do.
    """
    layers = probe(without)
    if not layers.enough:
        raise SandboxError(f"untrusted code is refused on this machine ({layers}). {ADVICE}")
    return layers
