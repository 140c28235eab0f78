"""What to send along with a bug report: one small archive without weights, completions or secrets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from verl_ext.redaction import redacted_text

NAME = "smoke-report.tar.gz"
OF_THE_TEST = ("table.txt", "results.json", "doctor.json", "versions.json", "machine.txt")
OF_A_RUN = ("config.yaml", "metrics.jsonl", "summary.json", "heartbeat.json", "run.log", "stacks-*.txt")
HEAD, TAIL = 200_000, 800_000
"""Characters of a text that are kept: versions and settings stand at its beginning, what went wrong at its end."""


def shortened(text: str) -> str:
    """Beginning and end of a long text, with what was left out named."""
    if len(text) <= HEAD + TAIL:
        return text
    return f"{text[:HEAD]}\n[… {len(text) - HEAD - TAIL} characters left out …]\n{text[-TAIL:]}"


def chosen(folder: Path) -> Iterator[Path]:
    """The files of a smoke test that go into the archive, in a fixed order; those that are there."""
    patterns = [*OF_THE_TEST, "logs/*.log", *(f"runs/*/{name}" for name in OF_A_RUN)]
    for pattern in patterns:
        yield from sorted(path for path in folder.glob(pattern) if path.is_file())


def write_bundle(folder: Path, more: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Packs them, each as text with its secrets hidden, and ``more``: name → text, written to ``folder`` as well.

    Returns:
        the archive, and the names in it.
    """
    for name, text in more.items():
        (folder / name).write_text(redacted_text(text), encoding="utf-8")
    target, names = folder / NAME, []
    with tarfile.open(target, "w:gz") as archive:
        for path in chosen(folder):
            name = str(path.relative_to(folder))
            data = redacted_text(shortened(path.read_text(encoding="utf-8", errors="replace"))).encode(
                "utf-8", "replace"
            )
            entry = tarfile.TarInfo(f"smoke-report/{name}")
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(data))
            names.append(name)
    return target, names
