"""What the commands share: help, `--cfg`, exit codes, and the list of presets in their help."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

from omegaconf import OmegaConf

from recipe.compose import GROUPS, choices, compose_config
from verl_ext.preemption import REQUEUE_EXIT, Preempted


def preset_lines(*more: str) -> str:
    """Every group with its presets, a line each; ``more``: groups that only this command has."""
    return "\n".join(f"  {group:<11}{' | '.join(choices(group))}" for group in (*GROUPS, *more))


def command_line(
    arguments: Sequence[str] | None,
    *,
    help_text: Callable[[], str],
    config_name: str,
    run: Callable[[list[str]], object],
    refusals: type[Exception] | tuple[type[Exception], ...],
    resolve: bool = True,
) -> int:
    """A command over a composed configuration: `--help`, `--cfg`, or the work itself.

    Args:
        arguments: None: those of the process.
        config_name: primary configuration, which `--cfg` prints.
        run: does the work, given the overrides.
        refusals: errors that are one line for the user.
        resolve: print values in place of references.

    Returns:
        the exit code, see :func:`exit_code`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(help_text())
        return 0
    overrides = [argument for argument in arguments if argument != "--cfg"]

    def work() -> None:
        if "--cfg" in arguments:
            print(OmegaConf.to_yaml(compose_config(overrides, name=config_name), resolve=resolve))
        else:
            run(overrides)

    return exit_code(work, refusals)


def exit_code(work: Callable[[], object], refusals: type[Exception] | tuple[type[Exception], ...]) -> int:
    """Does the work and returns the exit code.

    0; 2 where it was refused, in one line; 75 after a signal that asks for a requeue; 130 after Ctrl-C; 1 where the
    console showed a failure.
    """
    try:
        work()
    except refusals as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Preempted:
        return REQUEUE_EXIT
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # The console has shown it, with the log; a second trace would bury that.
        print(json.dumps({"error": type(error).__name__}), file=sys.stderr)
        return 1
    return 0
