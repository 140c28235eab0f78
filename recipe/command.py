"""What the commands share: exit codes, and the list of presets in their help."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from recipe.compose import GROUPS, choices


def preset_lines() -> str:
    """Every group with its presets, a line each."""
    return "\n".join(f"  {group:<11}{' | '.join(choices(group))}" for group in GROUPS)


def exit_code(work: Callable[[], object], refusals: type[Exception] | tuple[type[Exception], ...]) -> int:
    """Does the work: 0; 2 where it was refused, in one line; 130 after Ctrl-C; 1 where the console showed a failure."""
    try:
        work()
    except refusals as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # The console has shown it, with the log; a second trace would bury that.
        print(json.dumps({"error": type(error).__name__}), file=sys.stderr)
        return 1
    return 0
