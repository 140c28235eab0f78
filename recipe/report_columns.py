"""The metrics of a run as columns over its steps, and curves of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipe.alarm_looks import Record
from recipe.report_charts import Chart, Series, line_chart
from recipe.run_files import as_number


@dataclass(frozen=True)
class Columns:
    """The metrics of a run, a list over the steps for each key."""

    records: Sequence[Record]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]

    def __call__(self, key: str) -> list[float | None]:
        return [as_number(record.get(key)) for record in self.records]

    def ratio(self, above: str, below: str) -> list[float | None]:
        """One metric over another; None where one is missing or the second is 0."""
        pairs = zip(self(above), self(below), strict=True)
        return [None if a is None or not b else a / b for a, b in pairs]

    def chart(
        self, title: str, *curves: tuple[str, str, int], dashed: Sequence[str] = (), **options: Any
    ) -> Chart | None:
        """Curves given as (name, key, colour); those without a value are left out, and None where none has one."""
        series = [Series(name, self(key), color, dashed=key in dashed) for name, key, color in curves]
        known = [one for one in series if any(value is not None for value in one.values)]
        return line_chart(title, self.steps, known, **options) if known else None
