"""A sender of weights whose receiver is gone: it says so; a slow one is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from verl_ext.watched_socket import WatchedSocket

ADDRESS = "inproc://weights"


class Gone(Exception):
    """Nobody will answer."""


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as made:
        yield made


def sender(context: zmq.Context, check) -> WatchedSocket:
    socket = context.socket(zmq.REQ)
    socket.bind(ADDRESS)
    return WatchedSocket(socket, check, every=0.01)


def after(calls: int) -> tuple[list[int], object]:
    """A check that finds nothing that many times."""
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) > calls:
            raise Gone

    return asked, check


def test_nobody_there_to_send_to(context):
    asked, check = after(3)
    watched = sender(context, check)
    with pytest.raises(Gone):
        watched.send_pyobj({"bucket": 1})
    assert len(asked) == 4
    watched.close()


def test_nobody_answers_any_more(context):
    asked, check = after(3)
    watched = sender(context, check)
    peer = context.socket(zmq.REP)
    peer.connect(ADDRESS)
    watched.send_pyobj({"bucket": 1})
    assert peer.recv_pyobj() == {"bucket": 1}
    with pytest.raises(Gone):
        watched.recv()
    assert len(asked) == 4
    watched.close()
    peer.close(linger=0)


def test_a_slow_peer_is_waited_for_and_nothing_is_lost(context):
    asked, check = after(10**6)
    watched = sender(context, check)

    def receive() -> None:
        while len(asked) < 3:
            time.sleep(0.001)
        peer = context.socket(zmq.REP)
        peer.connect(ADDRESS)
        for _ in range(2):
            message = peer.recv_pyobj()
            before = len(asked)
            while len(asked) < before + 3:
                time.sleep(0.001)
            peer.send(message)
        peer.close()

    receiver = threading.Thread(target=receive)
    receiver.start()
    for message in (b"first", b"last"):
        watched.send_pyobj(message)
        assert watched.recv() == message
    receiver.join()
    assert len(asked) >= 9
    watched.close()


def test_closing_gives_up_what_nobody_took():
    context = zmq.Context()
    watched = sender(context, lambda: None)
    peer = context.socket(zmq.REP)
    peer.connect(ADDRESS)
    watched.send_pyobj("never read")
    watched.close()
    peer.close(linger=0)
    context.term()  # would wait for ever
