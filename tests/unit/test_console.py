"""The console keeps the terminal readable, loses nothing (the log has the rest), and puts everything back."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pty
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from recipe.console import RunConsole

ROOT = Path(__file__).parents[2]


def run_script(body: str, tmp_path: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    script = "import ctypes, os, sys\nfrom recipe.console import RunConsole\nlog = sys.argv[1]\n" + textwrap.dedent(
        body
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "run.log"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


# --- redirection ----------------------------------------------------------------------------------------------------


def test_everything_but_the_consoles_lines_lands_in_the_log(tmp_path: Path) -> None:
    done = run_script(
        """
        import logging, subprocess, warnings
        print("before")
        libc = ctypes.CDLL(None)
        with RunConsole(log, 2) as console:
            os.write(1, b"noise: descriptor 1\\n"); os.write(2, b"noise: descriptor 2\\n")
            print("noise: print"); print("noise: print to stderr", file=sys.stderr)
            libc.printf(b"noise: printf\\n")
            subprocess.run(["echo", "noise: child"], check=True)
            warnings.warn("noise: warning"); logging.warning("noise: logging")
            console.phase("starting Ray")
            console.step_line({"step": 1, "distill/loss": 0.5})
            console.summary({"method": "x", "after": float("nan")})
            console.note("too late for the terminal")
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "noise" not in done.stdout and "too late" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "before" and json.loads(lines[-1]) == {"method": "x", "after": None}
    assert any("starting Ray" in line for line in lines) and any(
        line.split()[:2] == ["1/2", "0.5000"] for line in lines
    )
    log = (tmp_path / "run.log").read_text()
    sources = ("descriptor 1", "descriptor 2", "print", "print to stderr", "printf", "child", "warning", "logging")
    assert all(f"noise: {source}" in log for source in sources)
    assert "starting Ray" in log and "too late" in log


def test_what_goes_on_beside_the_steps_is_said_once_a_minute_into_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("recipe.console.time.monotonic", lambda: now[0])
    with RunConsole(tmp_path / "run.log", 40, terminal=False) as console:
        for second in range(0, 130, 5):
            now[0] = 1000.0 + second
            console.working(f"pass rates: {second} of 130 samples", 130.0 - second)
    lines = [line.split(maxsplit=2)[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert "pass rates: 60 of 130 samples, about 1 min 10 s left" in lines[0] and "120 of 130" in lines[1]


def test_forty_steps_into_a_pipe(tmp_path: Path) -> None:
    done = run_script(
        """
        with RunConsole(log, 40) as console:
            for index in range(30): console.phase(f"start-up {index}")
            for step in range(41): console.step_line({"step": step, "distill/loss": 0.1, "time/step": 60.0})
            console.summary({"steps": 40})
        """,
        tmp_path,
    )
    lines = done.stdout.splitlines()
    assert len(lines) <= 60 and lines[-1] == '{"steps": 40}'
    assert sum("/40" in line for line in lines) == 41
    assert sum("pass rate" in line for line in lines) == 2
    assert all(character.isprintable() for line in lines for character in line)
    assert any(line.endswith("30 min 00 s") for line in lines if line.startswith("10/40"))
    assert "start-up 29" in (tmp_path / "run.log").read_text()


def test_on_a_terminal_there_is_a_bar_and_the_lines_fit(tmp_path: Path) -> None:
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    script = (
        "import sys\nfrom recipe.console import RunConsole\n"
        "with RunConsole(sys.argv[1], 40) as console:\n"
        "    console.phase('starting Ray')\n"
        "    for step in range(41): console.step_line({'step': step, 'distill/loss': 0.1, 'time/step': 60.0})\n"
        "    print('noise')\n"
        "    console.summary({'steps': 40})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run.log")], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        output += chunk
    assert process.wait(timeout=60) == 0
    os.close(leader)
    text = output.decode()
    assert "━" in text and "left" in text and "noise" not in text
    visible = [line for line in _screen(text) if line.strip()]
    assert json.loads(visible[-1]) == {"steps": 40}
    assert len(visible) <= 60 and all(len(line) <= 80 for line in visible)
    assert sum("/40" in line for line in visible) == 41  # the bar itself is gone at the end


def _screen(text: str) -> list[str]:
    """A terminal without a bottom, which knows the few controls that rich uses."""
    import re

    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                row = max(0, row - int(token[2:-1] or 1))
            elif token.endswith("K"):
                rows[row] = "" if token[2:-1] == "2" else rows[row][:column]
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + len(token) :]
            column += len(token)
    return rows


def test_nested_and_repeated_consoles(tmp_path: Path) -> None:
    done = run_script(
        """
        for round in range(3):
            with RunConsole(f"{log}.{round}", 1) as outer:
                os.write(1, b"in outer\\n")
                with RunConsole(f"{log}.{round}.inner", 1) as inner:
                    os.write(1, b"in inner\\n")
                    inner.step_line({"step": 1, "reward/mean": 0.125})
                    inner.summary({"inner": round})
                os.write(1, b"in outer again\\n")
                outer.summary({"outer": round})
            print("between", round, flush=True)
        print(len(os.listdir("/proc/self/fd")) < 20)
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("{")] == [
        f'{{"{name}": {index}}}' for index in range(3) for name in ("inner", "outer")
    ]
    assert [line for line in lines if line.startswith("between")] == ["between 0", "between 1", "between 2"]
    assert sum("0.125" in line for line in lines) == 3 and lines[-1] == "True"
    for index in range(3):
        outer, inner = ((tmp_path / f"run.log.{index}{end}").read_text() for end in ("", ".inner"))
        assert "in outer\n" in outer and "in outer again" in outer and "in inner" not in outer
        assert "in inner" in inner and "in outer" not in inner


def test_an_exception_is_explained_once_and_everything_is_put_back(tmp_path: Path) -> None:
    done = run_script(
        """
        open(log, "w").write("ValueError: from an earlier run\\n")
        try:
            with RunConsole(log, 5) as console:
                console.step_line({"step": 3})
                print("WARNING harmless"); print("RuntimeError: the worker died")
                raise KeyError("boom")
        except KeyError:
            print("caught"); print("caught on stderr", file=sys.stderr)
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "caught"
    assert done.stderr.count("The run failed after step 3 of 5: KeyError: 'boom'") == 1
    assert "the worker died" in done.stderr and "harmless" not in done.stderr and "earlier run" not in done.stderr
    assert f"Full log: {tmp_path / 'run.log'}" in done.stderr and done.stderr.endswith("caught on stderr\n")
    assert "Traceback (most recent call last)" in (tmp_path / "run.log").read_text()


def test_failure_by_hand_is_not_repeated_and_remote_tracebacks_are_cut(tmp_path: Path) -> None:
    done = run_script(
        """
        try:
            with RunConsole(log, 5) as console:
                try:
                    raise RuntimeError("ray::f() (pid=1)\\n  File 'a.py', line 1\\nValueError: the real cause\\x1b[0m")
                except RuntimeError as error:
                    console.failure(error)
                    raise
        except RuntimeError:
            pass
        """,
        tmp_path,
    )
    assert done.stderr.count("The run failed: ValueError: the real cause") == 1
    assert 'File "<string>"' in done.stderr  # nothing in the log explains it, so the traceback does
    assert done.stderr.count("The run failed") == 1 and "\x1b" not in done.stderr


def test_interrupt_is_one_line(tmp_path: Path) -> None:
    done = run_script(
        """
        try:
            with RunConsole(log, 5) as console:
                console.step_line({"step": 2}); raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        """,
        tmp_path,
    )
    assert done.stderr == f"interrupted after step 2 of 5; log: {tmp_path / 'run.log'}\n"


def test_quiet_leaves_the_summary(tmp_path: Path) -> None:
    done = run_script(
        """
        with RunConsole(log, 5, quiet=True) as console:
            console.phase("starting"); console.step_line({"step": 2}); console.summary({"a": 1})
        """,
        tmp_path,
    )
    assert done.stdout == '{"a": 1}\n' and done.stderr == ""


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    script = f"""
import os, sys
from recipe.console import RunConsole
with RunConsole({str(tmp_path / "run.log")!r}, 300) as console:
    for step in range(300): console.step_line({{"step": step}})
open({str(tmp_path / "finished")!r}, "w").close()
os._exit(0)
"""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=writing, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    os.close(writing)
    os.close(reading)
    assert process.wait(timeout=60) == 0 and (tmp_path / "finished").exists()
    log = (tmp_path / "run.log").read_text()
    assert "299/300" in log and log.count("cannot be written to any more") == 1


# --- inside this process, under pytest's own capturing --------------------------------------------------------------


def test_captured_by_capfd(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("tests.console")
    logger.addHandler(handler)
    before = sys.stdout, sys.stderr
    try:
        with RunConsole(tmp_path / "run.log", 1) as console:
            os.write(1, b"noise: write\n")
            libc.printf(b"noise: printf\n")
            print("noise: print")
            logger.error("noise: handler")
            console.step_line({"step": 1, "distill/loss": 0.25})
            console.summary({"done": True})
        print("after")
        logger.error("handler again")
    finally:
        logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr) == before
    captured = capfd.readouterr()
    assert "noise" not in captured.out + captured.err
    assert captured.out.splitlines()[-2:] == ['{"done": true}', "after"]
    assert captured.err == "handler again\n"
    log = (tmp_path / "run.log").read_text()
    assert all(f"noise: {source}" in log for source in ("write", "printf", "print", "handler"))


def test_captured_by_capsys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bad"), RunConsole(tmp_path / "run.log", 1) as console:
        print("noise")
        console.step_line({"step": 1})
        raise ValueError("bad")
    captured = capsys.readouterr()
    assert "1/1" in captured.out and "noise" not in captured.out and "ValueError: bad" in captured.err


def test_lines_from_threads_stay_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunConsole(tmp_path / "run.log", 400) as console:

        def work(start: int) -> None:
            for step in range(start, start + 100):
                console.step_line({"step": step, "reward/mean": 0.125})

        threads = [threading.Thread(target=work, args=(start,)) for start in (1, 101, 201, 301)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [line for line in capfd.readouterr().out.splitlines() if "/400" in line]
    assert sorted(int(line.split("/")[0]) for line in lines) == list(range(1, 401))
    assert all("0.125" in line for line in lines)


def test_misuse_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(tmp_path / "run.log", 1)
    with console:
        with pytest.raises(RuntimeError, match="already open"):
            console.__enter__()
        with pytest.raises(ValueError, match="flat.*nested"):
            console.summary({"nested": {"a": 1}})
    with console:  # the same one may be used again afterwards
        console.summary({"again": 1})
    assert capfd.readouterr().out == '{"again": 1}\n'
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        RunConsole(tmp_path / "file" / "run.log", 1).__enter__()
    print("still here")
    assert capfd.readouterr().out == "still here\n"


def test_a_forked_child_leaves_the_terminal_alone(tmp_path: Path) -> None:
    done = run_script(
        """
        try:
            with RunConsole(log, 1) as console:
                child = os.fork()
                if child == 0:
                    raise RuntimeError("in the child")
                os.waitpid(child, 0)
                console.summary({"a": 1})
        except RuntimeError:
            os._exit(0)
        """,
        tmp_path,
    )
    assert done.stdout == '{"a": 1}\n' and done.stderr == ""
