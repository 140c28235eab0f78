"""The runner of the smoke test: real commands, small ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from recipe import smoke_run
from recipe.run_files import read_json_object
from recipe.smoke_run import FAILED, NOT_RUN, PASSED, Result, Smoke, SmokeFailure, Step, host_bytes, table
from verl_ext.config import ConfigError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke_run, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(smoke_run, "SAMPLE_SECONDS", 0.0)


def fine(log: Path) -> str:
    return log.read_text(encoding="utf-8").strip() or "silent"


def step(name: str, program: str, **more: object) -> Step:
    settings = {"limit": 60.0, "check": fine, **more}
    return Step(name, f"about {name}", (sys.executable, "-S", "-c", program), **settings)  # type: ignore[arg-type]


def smoke(folder: Path, *steps: Step, said: list[str] | None = None, **settings: object) -> Smoke:
    say: Callable[[str], None] = [].append if said is None else said.append
    return Smoke(folder, steps, settings, memory=lambda _: 7 << 30, say=say)


def outcome(run: Smoke) -> dict[str, tuple[str, str]]:
    return {result.name: (result.status, result.line) for result in run.ordered()}


def test_a_failed_step_ends_only_those_that_need_it(tmp_path: Path) -> None:
    said: list[str] = []
    run = smoke(
        tmp_path,
        step("a", "print('did a')"),
        step("b", "import sys; print('error: no such key'); sys.exit(2)", needs=("a",)),
        step("c", "print('never')", needs=("b",)),
        step("d", "print('did d')", needs=("a",)),
        said=said,
    )
    assert not run.run()
    assert outcome(run) == {
        "a": (PASSED, "did a"), "b": (FAILED, "exit code 2: error: no such key"), "c": (NOT_RUN, "needs b"),
        "d": (PASSED, "did d"),
    }  # fmt: skip
    assert run.results["a"].peak_bytes == 7 << 30 and run.results["a"].seconds is not None
    assert run.results["c"].seconds is None and not run.log(run.steps[2]).exists()
    assert any("2/4 b: failed" in line for line in said) and any("4/4 d: passed" in line for line in said)


def test_a_good_exit_code_does_not_make_up_for_what_is_missing(tmp_path: Path) -> None:
    def missing(_: Path) -> str:
        raise SmokeFailure("left nothing behind")

    run = smoke(tmp_path, step("a", "pass", check=missing))
    assert not run.run() and outcome(run) == {"a": (FAILED, "left nothing behind")}


def test_an_exit_code_that_the_check_judges(tmp_path: Path) -> None:
    run = smoke(tmp_path, step("a", "import sys; print('found'); sys.exit(1)", codes=(0, 1)))
    assert run.run() and outcome(run) == {"a": (PASSED, "found")}


def test_the_limit_ends_a_step_and_all_that_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(300)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('waits', flush=True)\ntime.sleep(300)\n"
    )
    run = smoke(tmp_path, step("a", program, limit=1.0), step("b", "print('after')"))
    assert not run.run()
    status, line = outcome(run)["a"]
    assert status == FAILED and line.startswith("ended after its 1.0 s (--limit a=SECONDS): ") and "waits" in line
    assert outcome(run)["b"] == (PASSED, "after")
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def counting(folder: Path, name: str, *, ok: str = "True") -> str:
    """A program that adds a line to a file each time and ends well where ``ok`` says so."""
    return f"p = {str(folder / name)!r}\nopen(p, 'a').write('x')\nn = len(open(p).read())\nassert {ok}\n"


def times(folder: Path, *names: str) -> list[int]:
    return [len((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else 0 for name in names]


def test_the_same_command_does_the_rest_only(tmp_path: Path) -> None:
    def steps() -> tuple[Step, ...]:
        return (
            step("a", counting(tmp_path, "a")),
            step("b", counting(tmp_path, "b", ok="n > 1"), needs=("a",)),
            step("c", counting(tmp_path, "c"), needs=("b",)),
            step("d", counting(tmp_path, "d"), needs=("a",)),
        )

    assert not smoke(tmp_path, *steps(), cpu=True).run()
    assert times(tmp_path, "a", "b", "c", "d") == [1, 1, 0, 1]
    again = smoke(tmp_path, *steps(), cpu=True)
    assert again.run() and times(tmp_path, "a", "b", "c", "d") == [1, 2, 1, 1]
    assert all(status == PASSED for status, _ in outcome(again).values())
    said: list[str] = []
    assert smoke(tmp_path, *steps(), said=said, cpu=True).run() and times(tmp_path, "a", "b", "c", "d") == [1, 2, 1, 1]
    assert all(line.endswith("passed before") for line in said)


def test_a_step_that_goes_on_with_anothers_output_is_repeated_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = step("first", f"import os; os.mkdir({str(folder)!r})", folder=folder)
    second = step("second", counting(tmp_path, "n", ok="n > 1"), needs=("first",), continues="first")
    assert not smoke(tmp_path, first, second).run()
    (folder / "left behind").touch()
    # mkdir would fail if the folder were still there.
    assert smoke(tmp_path, first, second).run() and not (folder / "left behind").exists()


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    assert smoke(tmp_path, step("a", "pass"), cpu=True, model="x").run()
    with pytest.raises(ConfigError, match=r"other settings \(model\); choose another --out"):
        smoke(tmp_path, step("a", "pass"), cpu=True, model="y")
    assert read_json_object(tmp_path / "results.json")["settings"] == {"cpu": True, "model": "x"}


def test_an_interrupted_step_leaves_no_process_and_no_result(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(pid: int) -> int:
        pids.append(pid)
        if len(pids) == 3:
            raise KeyboardInterrupt
        return 1

    run = Smoke(tmp_path, [step("a", "import time; time.sleep(300)")], {}, memory=interrupt, say=[].append)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert outcome(run) == {"a": (NOT_RUN, "was not reached")}
    assert not psutil.pid_exists(pids[0])


def test_the_memory_of_a_process_and_its_children_is_counted(tmp_path: Path) -> None:
    size = 64 << 20
    child = f"x = bytearray({size}); print('child', flush=True); import time; time.sleep(300)"
    program = (
        f"import subprocess, sys\nx = bytearray({size})\n"
        f"c = subprocess.Popen([sys.executable, '-S', '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "c.stdout.readline()\nimport time\ntime.sleep(1)\nc.kill()\n"
    )
    run = Smoke(tmp_path, [step("a", program)], {}, memory=host_bytes, say=[].append)
    assert run.run()
    peak = run.results["a"].peak_bytes
    assert peak is not None and 2 * size < peak < 4 * size
    assert host_bytes(2**22 - 1) is None


def test_the_table_has_a_row_a_step() -> None:
    results = [Result("tiny", PASSED, "loss 0.1", 75.0, 3 << 29), Result("train", NOT_RUN, "needs data")]
    assert table(results, {"tiny": "the tiny world", "train": "a model"}).splitlines() == [
        "step   result   time        peak GiB",
        "tiny   passed   1 min 15 s  1.5       the tiny world: loss 0.1",
        "train  not run                        a model: needs data",
    ]


def test_what_a_machine_does_not_have_is_said() -> None:
    assert smoke_run.output_of(["no-such-command"]).startswith("no-such-command: ")
    assert smoke_run.output_of([sys.executable, "-S", "-c", "print(1)"]) == "1\n"
