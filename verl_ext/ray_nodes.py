"""The nodes of a Ray cluster, asked of its control service: `python -m verl_ext.ray_nodes HOST:PORT`.

Writes a line a second to standard output, JSON: ``{"alive": ["ADDRESS ID", …]}``. A process of its own, because Ray
ends the process whose control service does not answer, and whoever watches a run must outlive that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from verl_ext.compat import alive_nodes

SECONDS = 1.0


class NodeWatch:
    """Which nodes of a cluster were lost since the watch began."""

    def __init__(
        self,
        command: list[str],
        *,
        silence: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``command`` writes the lines; ``silence``: seconds without one after which the control service is lost."""
        self._silence, self._clock = silence, clock
        self._heard = clock()
        self._first: set[str] | None = None
        self.alive: set[str] = set()
        """As of the last line."""
        self._ended = False
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    def of(cls, address: str) -> NodeWatch:
        """Watches the cluster at ``address``."""
        return cls([sys.executable, "-m", "verl_ext.ray_nodes", address])

    def _read(self) -> None:
        for line in self._process.stdout:
            alive = set(json.loads(line)["alive"])
            self._first = self._first if self._first is not None else alive
            self.alive, self._heard = alive, self._clock()
        self._ended = True

    def lost(self) -> str | None:
        """What was lost, in words; None: nothing."""
        if self._first is not None and (gone := sorted(self._first - self.alive)):
            return f"{len(gone)} of {len(self._first)} nodes lost: {', '.join(gone)}"
        quiet = self._clock() - self._heard
        if self._ended or quiet > self._silence:
            return f"Ray's control service does not answer (for {quiet:.0f} s)"
        return None

    def end(self) -> None:
        """Ends the process that asks."""
        self._process.kill()
        self._process.wait()


def main(arguments: list[str]) -> int:
    """Writes lines until nobody reads them."""
    ask = alive_nodes(arguments[0])
    while True:
        print(json.dumps({"alive": ask()}), flush=True)
        time.sleep(SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
