"""The program of one verifier process: reads items from its standard input, runs the verifier on one at a time.

Started by :mod:`verl_ext.verifier_child` as ``python -I verifier_process.py``. The protocol is one JSON line each way:
first the configuration, answered by ``{"ready": true}`` or ``{"failed": "why"}``; then per item its arguments, answered
by ``[number of the item, whether this process ends now, verdict]``. The process ends at the end of its input and when
the thread that started it ends (``PR_SET_PDEATHSIG``, see prctl(2)).

Separate processes keep hangs, crashes and memory apart; they are no sandbox against hostile code.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, BinaryIO

MAX_ANSWER_BYTES = 1 << 20
MAX_MESSAGE_CHARACTERS = 2000
PR_SET_PDEATHSIG = 1
COROUTINE_FLAG = 0x80  # inspect.CO_COROUTINE, without the import


class BadResult(ValueError):
    """What a verifier returned is no verdict."""


def main() -> int:
    """Serves until the end of the input; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    requests, answers = _take_streams()
    line = requests.readline()
    if not line:
        return 0
    settings = json.loads(line)
    _end_with_parent(settings["parent"])
    sys.path[:] = settings["path"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        function = load_function(settings["function"])
        check_arguments(function, settings["options"])
        # What a verifier would load at its first use: on no item's time, and before its memory is measured.
        _warm_up(function, settings["options"])
    except BaseException as error:  # SystemExit as well: whatever a module does on import is told to the parent
        _write(answers, _encode({"failed": f"{_safely_described(error)}{_place(error.__traceback__)}"}))
        return 1
    _limit_memory(settings["memory_mib"])
    _write(answers, _encode({"ready": True}))
    return _serve(function, settings["options"], settings["memory_mib"], requests, answers)


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``/path/file.py:function`` names.

    Raises:
        ValueError: the name has another form, or names no plain function.
        Exception: whatever the module raises on import.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"{name!r} names no function; expected package.module:function or /path/file.py:function")
    if source.endswith(".py"):
        if not os.path.isfile(source):
            raise ValueError(f"{source}: no such file")
        # A module name of its own, registered because dataclasses and pickle look classes up by it.
        spec = importlib.util.spec_from_file_location("verifier_file", source)
        assert spec is not None and spec.loader is not None  # always so for a name that ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {attribute!r}")
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & COROUTINE_FLAG:
        raise ValueError(f"{name} is a coroutine function; a verifier process runs plain functions")
    return function


def _warm_up(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    import inspect

    warm_up = getattr(sys.modules.get(getattr(function, "__module__", "")), "warm_up", None)
    if warm_up is not None:
        taken = inspect.signature(warm_up).parameters
        warm_up(**{name: value for name, value in options.items() if name in taken})


def check_arguments(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises TypeError where the function cannot be called with the four arguments of an item and these options."""
    import inspect

    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # some callables written in C do not tell theirs
    signature.bind(data_source="", solution_str="", ground_truth="", extra_info={}, **options)


def complete(result: Any) -> dict[str, Any]:
    """What a verifier returned, in the one shape of :mod:`verl_ext.verifiers.result`.

    A bare number (or bool) is the score. A dict needs ``score`` only: ``acc`` is the score where it is missing,
    ``pred`` and ``feedback`` are "", and ``format`` is 1.0 because a verifier that says nothing about the shape found
    no fault with it. Keys that the shape does not have are dropped. A status other than ``ok`` is a failure, whatever
    the score.

    Raises:
        BadResult: the score, acc or format is no finite number, or the status is unknown.
    """
    from verl_ext.verifiers.result import FAILURES, OK, failure

    values: Mapping[str, Any] = result if isinstance(result, Mapping) else {"score": result}
    status = values.get("status", OK)
    if status in FAILURES:
        why = _text(values, "error") or _text(values, "feedback")
        return failure(why or f"the verifier says status {status!r} and not why", status=str(status))
    if status != OK:
        raise BadResult(f"the verifier's status is {status!r}, expected one of {(OK, *FAILURES)}")
    if "score" not in values:
        raise BadResult(f"the verifier's result has no score, only {sorted(map(str, values))}")
    score = _number(values["score"], "score")
    return {
        "score": score,
        "acc": score if values.get("acc") is None else _number(values["acc"], "acc"),
        "pred": _text(values, "pred"),
        "format": 1.0 if values.get("format") is None else _number(values["format"], "format"),
        "feedback": _text(values, "feedback"),
        "status": OK,
        "error": "",
    }


def _number(value: Any, name: str) -> float:
    """Also of numpy and torch scalars; a string is not taken for a number."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadResult(f"the verifier's {name} is {repr(value)[:200]}, expected a finite number")
    return number


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return "" if value is None else str(value)


def describe(error: BaseException) -> str:
    """``Type: message`` of an exception."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[:MAX_MESSAGE_CHARACTERS]}..."


def _place(traceback: TracebackType | None) -> str:
    """The innermost line outside of this file and the import system, for people."""
    place = ""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen"):
            place = f" ({file}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


# ---------------------------------------------------------------------------------------------------------- the process


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """The pipes of the protocol, moved away from the numbers that a verifier's print() and input() use."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        # A verifier that prints half a surrogate pair must not fail for that.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    return requests, answers


def _end_with_parent(parent: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(0)  # it ended before the call


def _limit_memory(mib: int) -> None:
    """Address space: what the process has now, verifier loaded, and ``mib`` more; also for what it starts."""
    with open("/proc/self/statm", "rb") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    limit = size + (mib << 20)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(
    function: Callable[..., Any], options: Mapping[str, Any], memory_mib: int, requests: BinaryIO, answers: BinaryIO
) -> int:
    from verl_ext.verifiers.result import failure

    # Made now: there may be no memory left when they are needed.
    out_of_memory = failure(f"MemoryError: the verifier took more than {memory_mib} MiB; its process starts anew")
    too_large = failure(f"the verifier's result takes more than {MAX_ANSWER_BYTES} bytes")
    number, last = 0, False
    while not last:
        try:
            line = requests.readline()
            if not line:
                return 0
            number += 1
            answer = _encode([number, last, _verdict(function, json.loads(line), options)])
            if len(answer) > MAX_ANSWER_BYTES:
                last = True
                answer = _encode([number, last, too_large])
        except MemoryError:
            last = True
            answer = _encode([number, last, out_of_memory])
        _write(answers, answer)
    return 0


def _verdict(function: Callable[..., Any], item: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    from verl_ext.verifiers.result import failure

    try:
        return complete(function(**item, **options))
    except MemoryError:
        raise
    except BadResult as error:
        return failure(str(error))
    except BaseException as error:  # sys.exit() in a verifier must not end the process
        return failure(_safely_described(error))


def _safely_described(error: BaseException) -> str:
    try:
        return describe(error)
    except Exception as second:  # an exception whose own message cannot be made
        return f"{type(error).__name__} (its message cannot be read: {type(second).__name__})"


def _encode(message: Any) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


def _write(answers: BinaryIO, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[answers.write(view) :]


if __name__ == "__main__":
    # Without the end of the interpreter: neither threads nor exit functions of a verifier may hold it up.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
