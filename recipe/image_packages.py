"""What the GPU image gets on top of verl's published one: the CUDA lock, less what is bound to the image's own CUDA.

    python3 recipe/image_packages.py [NAME…] >packages.txt        # all of it, or these packages alone

Standard library only: it runs in the published image, before anything of ours is installed there. That image has a
Python of its own (3.12); the lock was resolved for 3.11, but its hashes are those of every file of a version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
LOCKS = (REQUIREMENTS / "cuda.txt", REQUIREMENTS / "flash_attn.txt")
BOUND = ("torch", "vllm", "flash-attn")
"""The image has to bring them in the locked version: each is compiled for the other."""
FROM_IMAGE = re.compile(r"torch|torchaudio|torchvision|triton|vllm|(nvidia|flashinfer|cuda)-.+")
"""Taken as the image has them: its torch is linked to its CUDA libraries."""
WHERE = (
    "name another of verl's images for verl 0.9.1 with --build-arg VERL_TAG=…: docker/README.md and "
    ".github/workflows/vllm.yml of verl at v0.9.1 name them, hub.docker.com/r/verlai/verl/tags lists them"
)

Installed = Callable[[str], "str | None"]


def lock_lines(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """A lock's options, and each package's lines with its hashes, by its name."""
    options: list[str] = []
    packages: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("--"):
            options.append(line)
        elif match := re.match(r"([A-Za-z0-9._-]+)==", line):
            lines = packages.setdefault(match[1], [])
            lines.append(line)
        elif line.startswith(" "):
            lines.append(line)
    return options, packages


def pinned(lines: list[str]) -> str:
    """The version of a package's lines."""
    return lines[0].partition("==")[2].split()[0]


def installed_version(name: str) -> str | None:
    """Of this interpreter's environment; None where it has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def misfits(locks: dict[str, list[str]], installed: Installed) -> list[str]:
    """What of :data:`BOUND` the image lacks or has in another version, in words; local parts (+cu130) do not count."""
    found = {name: installed(name) for name in BOUND}
    return [
        f"{name} is {found[name] or 'missing'}, wanted is {pinned(locks[name])}"
        for name in BOUND
        if (found[name] or "").split("+")[0] != pinned(locks[name])
    ]


def on_top(options: list[str], packages: dict[str, list[str]]) -> str:
    """A requirements file for ``pip install --no-deps --require-hashes``: what the image does not bring."""
    chosen = [line for name, lines in packages.items() if not FROM_IMAGE.fullmatch(name) for line in lines]
    return "\n".join([*options, *chosen, ""])


def main(names: Sequence[str] = (), installed: Installed = installed_version) -> int:
    """Prints the requirements. Returns 2 where the image is not one for this project or a name is not locked."""
    locks: dict[str, list[str]] = {}
    options: list[str] = []
    for path in LOCKS:
        more, packages = lock_lines(path.read_text(encoding="utf-8"))
        options += more
        locks |= packages
    wrong = misfits(locks, installed)
    if wrong:
        print(f"error: this is not the image that the locks are for: {'; '.join(wrong)}: {WHERE}", file=sys.stderr)
        return 2
    unknown = sorted(set(names) - set(locks))
    if unknown:
        print(f"error: not in {LOCKS[0].name}: {', '.join(unknown)}", file=sys.stderr)
        return 2
    print(on_top(options, {name: locks[name] for name in names or locks if name not in BOUND}), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
