"""Signals: noted while steps are made, at once otherwise, and the exit codes that follow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recipe.command import exit_code
from recipe.compose import ROOT
from verl_ext.preemption import REQUEUE_EXIT, Preempted, Preemption


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def preemption(told: list[str], clock: Clock) -> Preemption:
    made = Preemption(same_event_seconds=5, clock=clock)
    made.tell = told.append
    return made


def test_between_steps_a_signal_is_noted_and_raised_at_the_boundary(preemption: Preemption, told: list[str]) -> None:
    with preemption.deferring():
        preemption.check()
        preemption.handle(signal.SIGUSR1)
        assert preemption.requested and preemption.signal_name == "SIGUSR1"
        with pytest.raises(Preempted, match="SIGUSR1"):
            preemption.check()
    assert len(told) == 1 and "SIGUSR1: saving at the end of this step, then exit code 75" in told[0]


def test_before_the_first_step_it_ends_at_once(preemption: Preemption, told: list[str]) -> None:
    with pytest.raises(Preempted):
        preemption.handle(signal.SIGTERM)
    assert "ending now with exit code 75" in told[0]


def test_the_same_event_sent_twice_is_one_and_a_later_signal_ends_at_once(
    preemption: Preemption, clock: Clock, told: list[str]
) -> None:
    with preemption.deferring():
        preemption.handle(signal.SIGUSR1)
        clock.now = 4.9
        preemption.handle(signal.SIGTERM)
        assert len(told) == 1
        clock.now = 5.1
        with pytest.raises(Preempted):
            preemption.handle(signal.SIGTERM)
    assert "SIGTERM again: ending now, without saving" in told[1]


def test_deferring_nests(preemption: Preemption) -> None:
    with preemption.deferring():
        with preemption.deferring():
            pass
        preemption.handle(signal.SIGUSR1)
    assert preemption.requested


def test_messages_go_elsewhere_for_a_while(preemption: Preemption, told: list[str]) -> None:
    other: list[str] = []
    with preemption.telling(other.append), preemption.deferring():
        preemption.handle(signal.SIGUSR1)
    assert other and not told
    assert preemption.tell == told.append


@pytest.mark.parametrize(
    ("raised", "code"), ((Preempted("SIGTERM"), 75), (KeyboardInterrupt(), 130), (ValueError("x"), 1), (None, 0))
)
def test_exit_codes(raised: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        if raised is not None:
            raise raised

    assert exit_code(work, ()) == code
    assert REQUEUE_EXIT == 75


PROGRAM = """
import signal, sys, time
from pathlib import Path
from verl_ext.preemption import PREEMPTION, REQUEUE_EXIT, Preempted
PREEMPTION.listen()
steps = 0
try:
    ready = Path(sys.argv[1])
    if sys.argv[2] == "start":
        ready.touch()
        time.sleep(60)
    with PREEMPTION.beside_other_handlers():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as ray.init does
        if sys.argv[2] == "ray":
            ready.touch()
            time.sleep(60)
    with PREEMPTION.deferring():
        ready.touch()
        while True:
            PREEMPTION.check()
            for _ in range(3):
                time.sleep(0.01)
            steps += 1
except Preempted as error:
    print(error, steps)
    sys.exit(REQUEUE_EXIT)
"""


@pytest.mark.parametrize("where", ("start", "ray", "steps"))
@pytest.mark.parametrize("number", (signal.SIGUSR1, signal.SIGTERM))
def test_a_real_process_ends_with_75(tmp_path: Path, where: str, number: int) -> None:
    ready = tmp_path / "ready"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(ready), where], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while not ready.exists():
        assert process.poll() is None
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert output.split()[0] == signal.Signals(number).name


def test_the_train_command_listens_before_its_slow_imports() -> None:
    for name in ("train", "sft"):
        lines = (ROOT / "recipe" / f"{name}.py").read_text().splitlines()
        before = lines[: lines.index("    PREEMPTION.listen()")]
        imports = [line for line in before if line.startswith(("import ", "from "))]
        assert imports == ["from __future__ import annotations", "from verl_ext.preemption import PREEMPTION"]
    code = "import sys, verl_ext.preemption; print(*sorted(m for m in sys.modules if m.startswith(('torch', 'ray'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and not done.stdout.strip(), done.stderr
