"""Two real network namespaces: they reach each other, lose their link, and are gone afterwards. Root only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.namespaces import (
    ADDRESSES,
    Node,
    check_possible,
    end_processes,
    link_down,
    link_up,
    namespaces,
    new_pair,
    run_all,
)
from recipe.compose import ROOT
from verl_ext.config import ConfigError

pytestmark = pytest.mark.contract

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=1)"
SERVE = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
while True:
    server.accept()[0].close()
"""
HOLD = """
import time
from benchmarks.namespaces import namespaces, new_pair
nodes = new_pair()
with namespaces(nodes):
    print(*(node.name for node in nodes), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def nodes() -> tuple[Node, Node]:
    pair = new_pair()
    try:
        check_possible()
        with namespaces(pair):
            pass
    except ConfigError as error:  # no root, no iproute2, or a container that may not
        pytest.skip(str(error))
    return pair


def there(*names: str) -> bool:
    return any(Path(f"/run/netns/{name}").exists() for name in names)


def start(node: Node, program: str) -> subprocess.Popen[str]:
    command = node.inside([sys.executable, "-S", "-E", "-c", program])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def connects(node: Node, address: str) -> bool:
    command = node.inside([sys.executable, "-S", "-E", "-c", CONNECT, address])
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_they_reach_each_other_but_for_a_cut_link_and_leave_nothing(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    with namespaces(nodes):
        server = start(second, SERVE)
        assert server.stdout.readline() == "ready\n"
        assert [process.pid for process in second.processes()] == [server.pid] and first.pids() == []
        assert connects(first, ADDRESSES[1]) and not connects(first, ADDRESSES[0])
        run_all(link_down(second))
        assert not connects(first, ADDRESSES[1])
        run_all(link_up(second))
        assert connects(first, ADDRESSES[1])
        assert len(end_processes([second])) == 1 and server.wait() == -signal.SIGKILL
        left = start(first, SERVE)
        left.stdout.readline()
    assert left.wait() == -signal.SIGKILL
    assert not there(first.name, second.name)


def test_an_error_inside_leaves_nothing(nodes: tuple[Node, Node]) -> None:
    with pytest.raises(RuntimeError, match="inside"), namespaces(nodes):
        assert there(nodes[0].name) and there(nodes[1].name)
        raise RuntimeError("inside")
    assert not there(nodes[0].name, nodes[1].name)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_leaves_nothing(nodes: tuple[Node, Node], number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        # Tests that a script runs in the background ignore the signal, and so would the process.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    names = process.stdout.readline().split()
    assert len(names) == 2 and there(*names)
    process.send_signal(number)
    process.wait(60)
    assert not there(*names)
