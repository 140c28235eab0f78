"""The layers of the sandbox: what the probe finds, and the seccomp filters of both architectures."""

from __future__ import annotations

import os
import signal
import struct
import sys
import tempfile
from pathlib import Path

import pytest

from verl_ext.sandbox import probe, seccomp
from verl_ext.sandbox.local import run_cases
from verl_ext.sandbox.types import Case, Limits, Program, SandboxError

LIMITS = Limits(cpu_seconds=1, wall_seconds=1.5, total_seconds=20)
GOOD = "print(int(input()) * 2)"


def test_probe_finds_breaches_where_layers_are_off():
    found = probe.probe()
    assert found.enough and not found.breaches, found
    assert probe.require() == found
    assert "writing outside" in probe.breaches(["seccomp"]) and "network" not in probe.breaches(["seccomp"])
    assert "reading outside" in probe.breaches(["seccomp"])
    nothing = set(probe.breaches([]))
    assert {"network", "writing outside", "reading outside", "processes that outlive the sandbox"} <= nothing


def test_probe_works_under_a_long_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / ("long" * 30)  # a socket's address has room for 107 bytes
    folder.mkdir()
    usual = probe.breaches([])
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert probe.breaches([]) == usual
    assert probe.breaches(["namespaces", "landlock", "seccomp"]) == ()


def test_untrusted_code_is_refused_without_layers():
    with pytest.raises(SandboxError, match="writing outside.*SandboxFusion"):
        probe.require(without=("namespaces", "landlock"))
    with pytest.raises(SandboxError, match="network"):
        probe.require(without=("namespaces", "seccomp"))


def test_a_layer_that_cannot_be_had_is_an_error_and_not_an_outcome(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="'magic'"):
        list(run_cases(Program(GOOD), [Case()], LIMITS, ["magic"]))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SandboxError, match="cannot be started"):
        list(run_cases(Program(GOOD), [Case()], LIMITS, ["seccomp"]))


def evaluate(program: bytes, architecture: int, nr: int, arguments: tuple[int, ...] = ()) -> int:
    """What a filter answers to a system call: the part of classic BPF that it uses, read from seccomp(2)."""
    data = struct.pack("<iIQ6Q", nr, architecture, 0, *(arguments + (0,) * (6 - len(arguments))))
    instructions = list(struct.iter_unpack("HBBI", program))
    at = accumulator = 0
    while True:
        code, yes, no, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return value
        else:
            at += yes if (accumulator == value if code == 0x15 else accumulator >= value) else no


# Numbers from the kernel's headers, x86_64 and aarch64: not in our table.
DENIED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "ptrace": (101, 117),
    "execve": (59, 221),
    "execveat": (322, 281),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "process_vm_readv": (310, 270),
    "kexec_load": (246, 104),
    "memfd_create": (319, 279),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "fchmodat": (268, 53),
    "truncate": (76, 45),
    "setxattr": (188, 5),
    "shmget": (29, 194),
    "pidfd_open": (434, 434),
    "io_uring_setup": (425, 425),
}


@pytest.mark.parametrize(("architecture", "audit"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_of_both_architectures(architecture: str, audit: int):
    arm = architecture == "aarch64"
    program = seccomp.build(100, architecture)
    assert len(program) // 8 < 4096  # the kernel's limit

    def answer(x86: int, aarch64: int, *arguments: int) -> int:
        return evaluate(program, audit, aarch64 if arm else x86, arguments)

    for name, numbers in DENIED.items():
        assert answer(*numbers) in (seccomp.EPERM, seccomp.ENOSYS), name
    for name, numbers in {"read": (0, 63), "mmap": (9, 222), "futex": (202, 98), "exit_group": (231, 94)}.items():
        assert answer(*numbers) == seccomp.ALLOW, name
    assert answer(435, 435) == seccomp.ENOSYS  # clone3
    thread = 0x003D0F00  # what the C library asks for
    assert answer(56, 220, thread) == seccomp.ALLOW
    assert answer(56, 220, signal.SIGCHLD) == seccomp.EPERM
    assert answer(56, 220, thread | 0x10000000) == seccomp.EPERM  # with a user namespace
    assert answer(62, 129, 100, 9) == seccomp.ALLOW and answer(62, 129, 99, 9) == seccomp.EPERM  # kill
    assert answer(62, 129, 0xFFFFFFFF, 9) == seccomp.EPERM
    assert answer(302, 261, 0) == seccomp.ALLOW and answer(302, 261, 99) == seccomp.EPERM  # prlimit64
    assert answer(72, 25, 3, 1) == seccomp.ALLOW and answer(72, 25, 3, 8) == seccomp.EPERM  # fcntl F_SETOWN
    assert answer(16, 29, 0, 0x5412) == seccomp.EPERM  # ioctl TIOCSTI
    assert answer(257, 56, 0, 0, os.O_RDONLY) == seccomp.ALLOW
    assert answer(257, 56, 0, 0, os.O_RDONLY | os.O_TRUNC) == seccomp.EPERM
    assert answer(257, 56, 0, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) == seccomp.ALLOW
    assert answer(157, 167, 1) == seccomp.EPERM and answer(157, 167, 15) == seccomp.ALLOW  # prctl
    assert answer(53, 199, 1, 0x80001) == seccomp.ALLOW  # socketpair: AF_UNIX streams only
    assert answer(53, 199, 1, 2) == answer(53, 199, 2, 1) == seccomp.EPERM
    assert evaluate(program, 0x40000003, 1) == seccomp.KILL  # the 32-bit interface
    if not arm:
        assert evaluate(program, audit, 0x40000001) == seccomp.KILL  # x32
        assert answer(57, -1) == answer(58, -1) == seccomp.EPERM  # fork, vfork


def test_numbers_agree_with_this_machines_headers():
    header = Path("/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("not compared with the kernel's headers: they are not installed")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR")]
    table = {words[1].split("_NR", 1)[1].partition("_")[2]: words[2] for words in lines if len(words) == 3}
    numbers = seccomp.allowed_numbers("aarch64")
    compared = {name: nr for name, nr in numbers.items() if table.get(name, "").isdigit()}
    assert len(compared) > 80
    assert {name: int(table[name]) for name in compared} == compared


def test_an_unknown_architecture_has_no_filter():
    with pytest.raises(OSError, match="riscv64"):
        seccomp.build(1, "riscv64")
