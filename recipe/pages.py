"""The template environment of every HTML page: texts of runs and models are escaped, a missing value is an error."""

from __future__ import annotations

from pathlib import Path

import jinja2


def page_environment() -> jinja2.Environment:
    """Templates beside this file. ``autoescape`` is on: a model's output is not to be trusted with a browser."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
