"""Which loggers ``trainer.logger`` may name, checked before anything is started."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlparse

from verl_ext.config_values import ConfigError

# Every run writes these by itself: its terminal lines, metrics.jsonl and TensorBoard files in its folder.
ALWAYS_ON: Final = ("console", "tensorboard")
# What verl 0.9.1 knows beside them, and the package that each needs.
PACKAGES: Final[Mapping[str, str | None]] = {
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "clearml": "clearml",
    "vemlp_wandb": "volcengine_ml_platform",
    "rl_insight": "rl_insight",
    "file": None,
}
VEMLP_VARIABLES: Final = ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")


def extra_loggers(value: Any) -> list[str]:
    """The loggers of ``trainer.logger`` beside those that are always on; one name or a list.

    Raises:
        ConfigError: one is unknown, its package is not installed, or it has no account to write to.
    """
    names = [value] if isinstance(value, str) else list(value or [])
    extra: list[str] = []
    for name in names:
        if name in ALWAYS_ON or name in extra:
            continue
        if name not in PACKAGES:
            raise ConfigError(
                f"trainer.logger names {name!r}; allowed: {', '.join(PACKAGES)} (and {', '.join(ALWAYS_ON)}, which "
                "every run has)"
            )
        package = PACKAGES[name]
        if package is not None and find_spec(package) is None:
            raise ConfigError(
                f"trainer.logger names {name!r}, whose package {package} is not installed; "
                f"install it on the machine of the driver, or leave {name} out"
            )
        _check_account(name)
        extra.append(name)
    return extra


def _check_account(name: str) -> None:
    """Without one these would ask at a terminal that shows no question, or write nothing and say nothing."""
    if name == "wandb" and not _wandb_has_account():
        raise ConfigError(
            "trainer.logger names 'wandb', and there is no account: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )
    if name == "vemlp_wandb" and (missing := [key for key in VEMLP_VARIABLES if not os.environ.get(key)]):
        raise ConfigError(f"trainer.logger names 'vemlp_wandb', which needs the variable {missing[0]}; set it")
    if name == "rl_insight" and os.environ.get("VERL_RL_INSIGHT_ENABLE") != "1":
        raise ConfigError(
            "trainer.logger names 'rl_insight', which verl switches on by VERL_RL_INSIGHT_ENABLE=1; set it"
        )


def _wandb_has_account() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return True
    # `wandb login` writes the key there.
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return bool(host) and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
