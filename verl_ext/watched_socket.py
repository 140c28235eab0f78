"""A ZeroMQ socket that does not wait for a peer that is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

CHECK_EVERY = 5.0  # seconds


class WatchedSocket:
    """The part of ``zmq.Socket`` that verl's sender of weights uses; whatever would block asks ``check`` meanwhile.

    Args:
        socket: the socket itself; belongs to this object from now on.
        check: raises where the peer is gone for good; called every ``every`` seconds that pass without a message.
        every: seconds.
    """

    def __init__(self, socket: zmq.Socket, check: Callable[[], None], every: float = CHECK_EVERY) -> None:
        self._socket, self._check, self._every = socket, check, every

    def send_pyobj(self, message: Any) -> None:
        """Sends once a peer takes it; raises what ``check`` raises."""
        self._wait(zmq.POLLOUT)
        self._socket.send_pyobj(message)

    def recv(self) -> bytes:
        """The answer; raises what ``check`` raises."""
        self._wait(zmq.POLLIN)
        return self._socket.recv()

    def close(self) -> None:
        """Gives up what was not taken: the process must be able to end."""
        self._socket.close(linger=0)

    def _wait(self, event: int) -> None:
        while not self._socket.poll(int(self._every * 1000), event):
            self._check()
