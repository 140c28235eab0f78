"""Point the process's standard output and standard error to a file, down to the file descriptors, and back again."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
from typing import Any, TextIO


def redirect_descriptors(log_fd: int, stack: contextlib.ExitStack) -> None:
    """Point descriptors 1 and 2, and with them ``sys.stdout``, ``sys.stderr`` and log handlers, to the log file."""
    _flush_all()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        saved = os.dup(descriptor)
        stack.callback(_restore_descriptor, saved, descriptor)
        os.dup2(log_fd, descriptor)
        if stream is None:
            continue
        if descriptor_of(stream) != descriptor:
            # Never closed: a log handler made by a library in the meantime may hold it after we are gone.
            replacement = open(  # noqa: SIM115
                descriptor, "w", closefd=False, buffering=1, encoding="utf-8", errors="backslashreplace"
            )
            setattr(sys, name, replacement)
            _move_handlers(stream, replacement)
            stack.callback(_restore_stream, name, stream, replacement)
        elif isinstance(stream, io.TextIOWrapper) and not stream.line_buffering:
            # Into a pipe Python buffers by the block; the log should be readable while the run goes on.
            stream.reconfigure(line_buffering=True)
            stack.callback(stream.reconfigure, line_buffering=False)


def _restore_descriptor(saved: int, descriptor: int) -> None:
    _flush_all()  # what is still buffered belongs in the log
    os.dup2(saved, descriptor)
    os.close(saved)


def _restore_stream(name: str, stream: TextIO, replacement: TextIO) -> None:
    flush(replacement)
    setattr(sys, name, stream)
    _move_handlers(replacement, stream)


def _move_handlers(old: TextIO, new: TextIO) -> None:
    """Logging handlers keep the stream they were made with: take those of ``old`` along."""
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in (one for one in known if isinstance(one, logging.Logger)):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def _flush_all() -> None:
    for stream in (sys.stdout, sys.stderr):
        flush(stream)
    # C's own buffer too: what a library printed with printf would otherwise appear after the summary, at exit.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def flush(stream: TextIO | None) -> None:
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def close_quietly(stream: TextIO) -> None:
    with contextlib.suppress(OSError):
        stream.close()


def descriptor_of(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
